"""How to read what picture files leave open: the page, the white value of 16-bit grey, a missing end."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image

from zoo.containers import MOST_PAGES
from zoo.errors import ZooError

MAX_FILE_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
MOST_MEGAPIXELS = 178  # Pillow opens nothing larger
RANGES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # of cameras, by their bits

_BITS, _PHOTOMETRIC, _LARGEST, _FORMAT = 258, 262, 281, 339  # tags of TIFF


@dataclass(frozen=True)
class Reading:
    """How to read what a file leaves open. The flags of `train`, `data check`, `evaluate` and `predict`."""

    page: int | Literal["max", "mean"] | None = None
    """Page of a TIFF with several pages, from 1; max or mean: over all pages, pixel by pixel (a focus series). By
    default as in training, else the first."""

    white: int | None = None
    """Value of white in 16-bit and 32-bit grey pictures, such as 4095 for a 12-bit camera. By default what the file
    says; else the range over the training pictures, stored with the model; else 65535."""

    most_missing: float = 0.25
    """Largest share of a JPEG that may be missing at its end. The rest is read, and its row says so."""

    max_megapixels: float | None = None
    """Largest picture to read, in megapixels (JPEGs: four times as large); at most 178. More takes more memory."""

    def __post_init__(self):
        if isinstance(self.page, int) and not 1 <= self.page <= MOST_PAGES:
            raise ZooError(f"--page {self.page}: a number from 1 to {MOST_PAGES}, max or mean.")
        if self.white is not None and not 1 <= self.white < 2**32:
            raise ZooError(f"--white {self.white}: a number from 1 to {2**32 - 1}.")
        if not 0 <= self.most_missing < 1:
            raise ZooError(f"--most-missing {self.most_missing:g}: a share, from 0 to below 1.")
        if self.max_megapixels is not None and not 0 < self.max_megapixels <= MOST_MEGAPIXELS:
            raise ZooError(f"--max-megapixels {self.max_megapixels:g}: above 0, at most {MOST_MEGAPIXELS}.")

    @property
    def most_pixels(self) -> int:
        return MAX_PIXELS if self.max_megapixels is None else round(self.max_megapixels * 1e6)

    @property
    def most_bytes(self) -> int:
        """The largest file; with `max_megapixels`, the bytes of such a picture with four channels of 16 bits."""
        return MAX_FILE_BYTES if self.max_megapixels is None else max(MAX_FILE_BYTES, 8 * self.most_pixels)

    def to_dict(self) -> dict[str, Any]:
        """What a model folder keeps: how its training pictures were read; empty if no file left anything open."""
        return {key: value for key in ("page", "white") if (value := getattr(self, key)) is not None}

    def over(self, kept: Mapping[str, Any]) -> "Reading":
        """The same reading, with `page` and `white` from a model folder if they are not set."""
        return replace(self, page=self.page or kept.get("page"), white=self.white or kept.get("white"))


PUBLIC = Reading()  # the caps of a public demo
LOCAL = Reading(max_megapixels=100)  # the caps of commands on your own files
TO_TRAIN_ON = Reading(most_missing=0, max_megapixels=100)


@dataclass(frozen=True)
class Facts:
    """Facts about the picture in a file.

    pages     of a TIFF        missing   the share of a JPEG's rows that are missing at its end; None: it is whole
    deepest   the largest value of 16-bit or 32-bit grey, if the file does not say which value is white
    """

    pages: int = 1
    missing: float | None = None
    deepest: int | None = None

    def note(self, reading: Reading) -> str:
        """The facts in words, for a row; empty for an ordinary picture."""
        notes = []
        if self.missing is not None:
            notes.append(f"cut off: {share(self.missing)} of the picture is missing")
        if self.pages > 1:
            notes.append(f"{reading.page} of {self.pages} pages" if isinstance(reading.page, str) else
                         f"page {reading.page or 1} of {self.pages}")
        return "; ".join(notes)


def share(missing: float) -> str:
    return "less than 1%" if missing < 0.01 else f"{missing:.0%}"


class HasFacts(Protocol):
    @property
    def facts(self) -> Facts: ...


Row = TypeVar("Row", bound=HasFacts)


class Remarks:
    """Facts about many pictures, as sentences."""

    def __init__(self) -> None:
        self.several_pages = self.cut_off = 0
        self.most_missing = 0.0
        self.deepest: int | None = None

    def add(self, facts: Facts) -> None:
        self.several_pages += facts.pages > 1
        self.cut_off += facts.missing is not None
        self.most_missing = max(self.most_missing, facts.missing or 0)
        if facts.deepest is not None:
            self.deepest = max(self.deepest or 0, facts.deepest)

    def noted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass the rows on, and add the facts of each."""
        for row in rows:
            self.add(row.facts)
            yield row

    @property
    def white(self) -> int | None:
        """The range of the camera: the smallest of RANGES that holds every value, or the largest value."""
        return None if self.deepest is None else next((top for top in RANGES if top >= self.deepest), self.deepest)

    def in_words(self, reading: Reading) -> list[str]:
        said = []
        if self.several_pages:
            what = {"max": "The largest value of all pages", "mean": "The mean of all pages"}.get(
                str(reading.page), f"Page {reading.page or 1}")
            said.append(f"{what} is read of {self.several_pages:,} TIFFs that have several pages (--page N, max or "
                        "mean).")
        if self.cut_off:
            said.append(f"{self.cut_off:,} JPEGs lack their end, up to {share(self.most_missing)} of the picture: the "
                        "rest is read.")
        white = reading.white or max(RANGES[-1], self.deepest or 0)
        if self.deepest is not None and self.white != white:
            said.append(f"Warning: the largest value of the 16-bit pictures is {self.deepest:,}, and {white:,} is read "
                        f"as white{' (as in training)' if reading.white else ''}: they look too "
                        f"{'bright' if self.deepest > white else 'dark'} to the model if their camera ends at "
                        f"{self.white:,} (--white).")
        return said


def to_grey(picture: Image.Image, transparent: Any, reading: Reading) -> tuple[Image.Image, Facts]:
    """8-bit grey of a loaded picture with more bits; the transparent value becomes white.

    Integers: white is what the file says, else `reading.white`, else 65535 (or the largest value, if it is larger).
    Floats: white is 1 if no value is above it, else 255, else the largest value; values that are not finite are black.
    """
    array, tags = np.asarray(picture), getattr(picture, "tag_v2", None) or {}
    facts = Facts()
    if np.issubdtype(array.dtype, np.floating):
        top = float(array.max(initial=0, where=np.isfinite(array)))
        grey = scaled(array, 1 if top <= 1 else 255 if top <= 255 else top)
    else:
        if array.dtype == np.int32 and tags.get(_BITS) == (32,) and tags.get(_FORMAT, (1,)) == (1,):
            array = array.view(np.uint32)  # which Pillow has no mode for
        top, said = int(array.max()), _white_by_tags(tags, picture.format)
        if said is None:
            facts = Facts(deepest=max(0, top))
        grey = scaled(array, said or reading.white or max(RANGES[-1], top))
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if isinstance(transparent, int):
        grey[array == transparent] = 255
    return Image.fromarray(grey), facts


def _white_by_tags(tags: Mapping[int, Any], kind: str | None) -> int | None:
    """The white value that a file states: by its bits, if fewer than 16, or by its largest value, if one of RANGES.

    PGM files come already scaled.
    """
    if kind == "PPM":
        return RANGES[-1]
    bits, largest = (tags.get(tag, (0,)) for tag in (_BITS, _LARGEST))
    if 8 < bits[0] < 16:
        return 2 ** bits[0] - 1
    return int(largest[0]) if int(largest[0]) in RANGES[1:-1] else None


def scaled(array: np.ndarray, white: float) -> np.ndarray:
    """round(255 x / white) as uint8, with negative and non-finite values as 0; in pieces, to save memory."""
    flat, result = array.reshape(-1), np.empty(array.size, np.uint8)
    for start in range(0, flat.size, 1_000_000):
        with np.errstate(invalid="ignore"):  # NaN of the kind that signals
            piece = flat[start : start + 1_000_000].astype(np.float64)
        piece[~np.isfinite(piece)] = 0
        result[start : start + 1_000_000] = np.rint(piece.clip(0, white) / white * 255)
    return result.reshape(array.shape)
