"""What picture files leave open: the page, the value of 16-bit grey that is white, how much of the end may be missing.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image

from zoo.containers import MOST_PAGES
from zoo.errors import ZooError

MAX_FILE_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
MOST_MEGAPIXELS = 178  # beyond them Pillow opens nothing
RANGES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # of cameras, by their bits

_BITS, _PHOTOMETRIC, _LARGEST, _FORMAT = 258, 262, 281, 339  # tags of TIFF


@dataclass(frozen=True)
class Reading:
    """How to read what a file leaves open. The flags of `train`, `data check`, `evaluate` and `predict`."""

    page: int | Literal["max", "mean"] | None = None
    """Page of a TIFF that has several, from 1; or max or mean over all of them, pixel by pixel (a focus series).
    Without it what the model was trained on, else the first page."""

    white: int | None = None
    """The value that is white in 16-bit and 32-bit grey: 4095 for a camera of 12 bits. Without it what the file says;
    else the range found over the training pictures, which the model keeps; else 65535."""

    most_missing: float = 0.25
    """Largest share of a JPEG that may be missing at its end. What is there is read, and its row says so."""

    max_megapixels: float | None = None
    """Largest picture that is read, in megapixels, JPEGs four times as large; 178 at most. More needs more memory."""

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
        """Of a file. On one's own disk: what a picture of the largest size takes at 16 bits in four channels."""
        return MAX_FILE_BYTES if self.max_megapixels is None else max(MAX_FILE_BYTES, 8 * self.most_pixels)

    def to_dict(self) -> dict[str, Any]:
        """What a model folder keeps: how its training pictures were read; empty where no file left anything open."""
        return {key: value for key in ("page", "white") if (value := getattr(self, key)) is not None}

    def over(self, kept: Mapping[str, Any]) -> "Reading":
        """The same; what it leaves open as a model folder has it."""
        return replace(self, page=self.page or kept.get("page"), white=self.white or kept.get("white"))


PUBLIC = Reading()  # the caps of a public demo
LOCAL = Reading(max_megapixels=100)  # those of commands on one's own files
TO_TRAIN_ON = Reading(most_missing=0, max_megapixels=100)


@dataclass(frozen=True)
class Facts:
    """What was seen of a file's picture.

    pages     of a TIFF        missing   the share of a JPEG's rows that its end lacks; None: it is whole
    deepest   the largest value of 16-bit or 32-bit grey, where the file does not say which is white
    """

    pages: int = 1
    missing: float | None = None
    deepest: int | None = None

    def note(self, reading: Reading) -> str:
        """What a row says of them; nothing for an ordinary picture."""
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
    """What was seen of many pictures, as sentences."""

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
        """The same rows, each looked at in passing."""
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
            said.append(f"{self.cut_off:,} JPEGs lack their end, up to {share(self.most_missing)} of the picture: what "
                        "is there is read.")
        white = reading.white or max(RANGES[-1], self.deepest or 0)
        if self.deepest is not None and self.white != white:
            said.append(f"Warning: the largest value of the 16-bit pictures is {self.deepest:,}, and {white:,} is read "
                        f"as white{' (as in training)' if reading.white else ''}: they look too "
                        f"{'bright' if self.deepest > white else 'dark'} to the model if their camera ends at "
                        f"{self.white:,} (--white).")
        return said


def to_grey(picture: Image.Image, transparent: Any, reading: Reading) -> tuple[Image.Image, Facts]:
    """8-bit grey of a loaded picture of more bits; the transparent value is white.

    Integers: white is what the file says, else `reading.white`, else 65535 (where values are larger: the largest).
    Floats: white is 1 where none is above, else 255, else the largest; what is not finite is black.
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
    """The range that a file states: its bits, where they are fewer than 16; or its largest value, where that is a
    camera's range. PGM files come scaled to their own."""
    if kind == "PPM":
        return RANGES[-1]
    bits, largest = (tags.get(tag, (0,)) for tag in (_BITS, _LARGEST))
    if 8 < bits[0] < 16:
        return 2 ** bits[0] - 1
    return int(largest[0]) if int(largest[0]) in RANGES[1:-1] else None


def scaled(array: np.ndarray, white: float) -> np.ndarray:
    """round(255 x / white) as uint8, below 0 and not finite as 0; in pieces, for memory."""
    flat, result = array.reshape(-1), np.empty(array.size, np.uint8)
    for start in range(0, flat.size, 1_000_000):
        with np.errstate(invalid="ignore"):  # NaN of the kind that signals
            piece = flat[start : start + 1_000_000].astype(np.float64)
        piece[~np.isfinite(piece)] = 0
        result[start : start + 1_000_000] = np.rint(piece.clip(0, white) / white * 255)
    return result.reshape(array.shape)
