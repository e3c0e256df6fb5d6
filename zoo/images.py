"""Decode and normalise pictures: from a file, bytes, a PIL image or an array to a network's input.

Rules of decoding: the first frame of an animation; EXIF orientation applied, broken EXIF ignored; grey, palette, CMYK
and other colour modes to RGB; transparency over white; the high byte of 16-bit colour. zoo.pixels.Reading decides what
a file leaves open: pages, the range of 16-bit grey, a missing end.

Caps: 20 MB and 25 megapixels. Baseline JPEG: 4 times as many pixels, with width and height reduced to a quarter above
25 megapixels. JPEG 2000: 0.4 times as many, as its decoder takes 40 bytes a pixel. `Reading.max_megapixels` moves all
caps.
"""

import functools
import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from zoo.containers import ICON, TIFF, av1_sizes, bitmap_of_icon, check_tags, largest_of_icon, tiff_pages
from zoo.errors import PictureError
from zoo.pixels import MAX_PIXELS, MOST_MEGAPIXELS, PUBLIC, Facts, Reading, scaled, share, to_grey

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray


class NamedPicture(NamedTuple):
    """A picture, or the error that explains why there is none, with the name that results show."""

    name: str
    picture: Picture | PictureError


# Times the cap of other pictures. Pillow takes three seconds for a megapixel of numbers in text.
JPEG, JPEG_2000, PLAIN_PPM = 4, 0.4, 0.03
WHOLE_PIXELS = 4_000_000  # up to this size: resized before it is cropped, bit for bit as in torchvision

# Formats whose decoders run in this process and withstand hostile input. EPS, for example, would start Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "ICO", "PCX", "TGA")


@functools.cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this Pillow was built with; before `init` it knows only a few."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


# The transposition that turns a picture upright, by its EXIF orientation.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ON_ITS_SIDE = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip


Shrink = Callable[[int, int], int | None]


def decode(
    source: Picture, name: str | None = None, shrink: Shrink | None = None, reading: Reading = PUBLIC
) -> Image.Image:
    """The picture as 8-bit RGB, upright.

    source  a path; the bytes of a file; a PIL image, which is not changed; or an array: (H, W), (H, W, 1), (H, W, 3)
            or (H, W, 4), of uint8, of uint16 (65535 is white), of bool, or of floats in [0, 1]
    name    its name in messages; by default a path's own name
    shrink  takes the width and height of a file's upright picture, returns 1, 2, 4 or 8. A JPEG is decoded with sides
            divided by that number, rounded up, in the decoder's fast mode: about one level less exact, with colour
            edges unsmoothed. Other formats are decoded at full size, and so are JPEGs if it returns None.
    reading   how to read what files leave open, and the caps
    Raises PictureError, and nothing else, for anything that cannot be decoded to a picture.
    """
    return read(source, name, shrink, reading)[0]


def read(
    source: Picture, name: str | None = None, shrink: Shrink | None = None, reading: Reading = PUBLIC
) -> tuple[Image.Image, Facts]:
    """The picture as from `decode`, and the facts about its file."""
    if isinstance(source, Image.Image):
        name = name or "the PIL image"
        _check_pixels(source.width, source.height, reading.most_pixels, name)
    elif isinstance(source, np.ndarray):
        name = name or "the array"
        source = _from_array(np.asarray(source), name, reading)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(bytes(source), name or "the bytes", shrink, reading)
    elif isinstance(source, (str, os.PathLike)):
        name = name or os.fsdecode(source)
        return _from_file(_content(Path(os.fsdecode(source)), name, reading), name, shrink, reading)
    else:
        raise PictureError(f"{type(source).__name__} is not a picture: give a path, bytes, a PIL image or an array.")
    try:
        return _to_rgb(source, reading)
    except Exception as error:  # Pillow's decoders raise any exception, even AssertionError
        raise PictureError(f"{name} is damaged or cut off: {_first_line(error)}.") from error


def preprocess(picture: Image.Image, pretrained_cfg: Mapping[str, Any]) -> np.ndarray:
    """float32 (3, H, W) as the network takes it: `fitted`, then (x / 255 - mean) / std.

    pretrained_cfg  input_size [3, H, W], mean, std, and what `fitted` takes
    """
    array = np.asarray(fitted(picture, pretrained_cfg), np.float32) / 255
    mean, std = (np.asarray(pretrained_cfg[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((array - mean) / std).transpose(2, 0, 1))


def fitted(picture: Image.Image, pretrained_cfg: Mapping[str, Any]) -> Image.Image:
    """Fit the picture to the network's input size, by timm's rules.

    pretrained_cfg  input_size [3, H, W], interpolation, crop_pct, mean, and crop_mode:
                    center (or none): the shorter side to size / crop_pct, centre crop; squash: both sides, whatever
                    the shape; border: the longer side to size / crop_pct, the rest filled with the mean
    """
    _, height, width = pretrained_cfg["input_size"]
    interpolation, crop_pct = pretrained_cfg["interpolation"], pretrained_cfg["crop_pct"]
    mode = pretrained_cfg.get("crop_mode") or "center"
    if mode == "center":
        return _resize_and_crop(picture, height, width, interpolation, crop_pct)
    full_height, full_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    size = (full_width, full_height)
    if mode == "border":
        shrink = max(picture.width / full_width, picture.height / full_height)
        size = (max(1, round(picture.width / shrink)), max(1, round(picture.height / shrink)))
    resized = picture.resize(size, _INTERPOLATIONS[interpolation])
    whole = Image.new("RGB", (width, height), tuple(round(255 * m) for m in pretrained_cfg["mean"]))
    whole.paste(resized, (_offset(width, size[0]), _offset(height, size[1])))
    return whole


def _offset(frame: int, side: int) -> int:
    """Where a side that is centred in a frame starts; halves are rounded as in timm, for padding or cropping."""
    return (frame - side) // 2 if side < frame else -round((side - frame) / 2)


def _resize_and_crop(picture: Image.Image, height: int, width: int, interpolation: str, crop_pct: float):
    """torchvision's Resize(floor(size / crop_pct)) and CenterCrop, with the same rounding to whole pixels."""
    full_height, full_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if picture.width * full_height <= picture.height * full_width:
        size = (full_width, max(full_height, full_width * picture.height // picture.width))
    else:
        size = (max(full_width, full_height * picture.width // picture.height), full_height)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    if size[0] * size[1] <= WHOLE_PIXELS:
        whole = picture.resize(size, _INTERPOLATIONS[interpolation])
        return whole.crop((left, top, left + width, top + height))
    # Crop in the source, although some weights then round differently: a panorama of 200,000 x 10 pixels must not
    # become one of 640,000 x 32.
    ratio_x, ratio_y = picture.width / size[0], picture.height / size[1]
    box = (left * ratio_x, top * ratio_y, (left + width) * ratio_x, (top + height) * ratio_y)
    box = (box[0], box[1], min(box[2], picture.width), min(box[3], picture.height))
    return picture.resize((width, height), _INTERPOLATIONS[interpolation], box=box)


# ---- decoding ----


def _content(path: Path, name: str, reading: Reading) -> bytes:
    try:
        if path.is_dir():
            raise PictureError(f"{name} is a folder: name a picture in it, or use predict_folder.")
        if not path.exists():
            raise PictureError(f"{name} does not exist.")
        if not path.is_file():
            raise PictureError(f"{name} is not a regular file.")
        _check_size(path.stat().st_size, name, reading)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise PictureError(f"{name} cannot be read: {_first_line(error)}.") from error


def _from_file(content: bytes, name: str, shrink: Shrink | None, reading: Reading) -> tuple[Image.Image, Facts]:
    picture, pages = _open(content, name, shrink, reading)
    try:
        if isinstance(reading.page, str) and len(pages) > 1:
            return _all_pages(picture, pages, name, reading), Facts(len(pages))
        rgb, facts = _to_rgb(picture, reading)
        return rgb, replace(facts, pages=len(pages))
    except PictureError:
        raise
    except Exception as error:
        if picture.format not in ("JPEG", "MPO"):
            raise PictureError(f"{name} is damaged or cut off: {_first_line(error)}.") from error
        return _cut_off(content, name, shrink, reading, error)


def _cut_off(
    content: bytes, name: str, shrink: Shrink | None, reading: Reading, error: Exception
) -> tuple[Image.Image, Facts]:
    """What is there of a JPEG that lacks its end: with an end marker added, libjpeg fills the rest with mid-grey."""
    picture, _ = _open(content + b"\xff\xd9", name, shrink, reading)
    try:
        with _without_warnings():
            picture.load()
        grey = (np.asarray(picture.convert("RGB")) == 128).all((1, 2))
        missing = float(np.argmin(grey[::-1]) if not grey.all() else len(grey)) / len(grey)
        rgb, facts = _to_rgb(picture, reading)
    except Exception:
        raise PictureError(f"{name} is damaged or cut off: {_first_line(error)}.") from error
    if missing > reading.most_missing or reading.most_missing == 0:
        raise PictureError(f"{name} is cut off: {share(missing)} of the picture is missing. --most-missing allows "
                           "more.")
    return rgb, replace(facts, missing=missing)


def _open(content: bytes, name: str, shrink: Shrink | None, reading: Reading) -> tuple[Image.Image, list[int]]:
    """The picture, not decoded yet, at the requested page; and the page numbers of a TIFF."""
    if not content:
        raise PictureError(f"{name} is empty.")
    _check_size(len(content), name, reading)
    most = reading.most_pixels
    try:
        if content.startswith(ICON):  # which Pillow decodes on opening
            content = largest_of_icon(content)
            if content.startswith(ICON):
                _check_pixels(*bitmap_of_icon(content), most, name)
        check_tags(content)
        pages = tiff_pages(content) if TIFF.match(content) else [0]
        with _without_warnings():
            picture = Image.open(io.BytesIO(content), formats=_formats())
            if isinstance(reading.page, int) and len(pages) > 1:
                if reading.page > len(pages):
                    raise PictureError(f"{name} has {len(pages)} pages, none with the number {reading.page}.")
                picture.seek(pages[reading.page - 1])
        cap, tile = _cap(picture, content, most), _tile(picture)
        inside = av1_sizes(content) if picture.format == "AVIF" else []
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"{name} has too many pixels (over {MOST_MEGAPIXELS} megapixels).") from None
    except Exception as error:
        raise PictureError(f"{name} {_what_it_is(content)}.") from error
    _check_pixels(picture.width, picture.height, cap, name)
    _check_pixels(*tile, most, f"A tile of {name}")
    for size in inside:
        _check_pixels(*size, cap, name)
    _decode_smaller(picture, shrink)
    return picture, pages


def _all_pages(picture: Image.Image, pages: list[int], name: str, reading: Reading) -> Image.Image:
    """The largest value or the mean of all pages, pixel by pixel."""
    if len(pages) * picture.width * picture.height > 10 * reading.most_pixels:
        raise PictureError(f"{name} has {len(pages)} pages of {picture.width} x {picture.height} pixels; at most "
                           f"{10 * reading.most_pixels // 1_000_000} megapixels are read together. Name one by --page.")
    size, together = picture.size, np.zeros((picture.height, picture.width, 3), np.float32)
    for page in pages:
        picture.seek(page)
        if picture.size != size:
            raise PictureError(f"{name} has pages of different sizes: name one by --page.")
        _check_pixels(*_tile(picture), reading.most_pixels, f"A tile of {name}")
        pixels = np.asarray(_to_rgb(picture, reading)[0])
        together = np.maximum(together, pixels) if reading.page == "max" else together + pixels
    return Image.fromarray(np.rint(together / (1 if reading.page == "max" else len(pages))).astype(np.uint8))


def _decode_smaller(picture: Image.Image, shrink: Shrink | None) -> None:
    """Set the scale at which libjpeg decodes: a quarter for a huge picture, reduced further as `shrink` says."""
    scale, asked = 4 if picture.width * picture.height > MAX_PIXELS else 1, None
    if shrink is not None:
        sides = -(-picture.width // scale), -(-picture.height // scale)
        asked = shrink(*(sides[::-1] if _turn(picture) in _ON_ITS_SIDE else sides))
        scale *= asked or 1
    if scale == 1 and asked is None:
        return
    scale = min(scale, 8)  # `draft` takes the wanted sides, and halves as long as the result stays above them
    drafted = picture.draft(None, (max(1, picture.width // scale), max(1, picture.height // scale)))
    if drafted is not None and asked is not None:
        picture.decoderconfig = (picture.decoderconfig[0], 1)  # type: ignore[attr-defined]  # fast, colours unsmoothed


def _check_size(size: int, name: str, reading: Reading) -> None:
    if size > reading.most_bytes:
        raise PictureError(f"{name} has {size / 1e6:.0f} MB; at most {reading.most_bytes / 1e6:.0f} MB are read. Make "
                           "it smaller, or raise --max-megapixels.")


def _check_pixels(width: int, height: int, cap: int, name: str) -> None:
    if width * height == 0:
        raise PictureError(f"{name} has no pixels.")
    if width * height > cap:
        raise PictureError(f"{name} has {width * height / 1e6:.0f} megapixels ({width} x {height}); at most "
                           f"{cap // 1_000_000} are decoded of this kind. Make it smaller, or raise --max-megapixels.")


def _cap(picture: Image.Image, content: bytes, most: int) -> int:
    if picture.format == "JPEG2000":
        return round(JPEG_2000 * most)
    if content[:2] in (b"P2", b"P3"):
        return round(PLAIN_PPM * most)
    if picture.format not in ("JPEG", "MPO") or picture.info.get("progressive"):
        return most
    # If the first scan lacks a colour, libjpeg holds the whole picture in memory, as it does a progressive one.
    scan = content.rfind(b"\xff\xda", 0, picture.fp.tell())  # type: ignore[attr-defined]
    return JPEG * most if content[scan + 4] == len(picture.getbands()) else most


def _tile(picture: Image.Image) -> tuple[int, int]:
    """Width and height of a TIFF's tiles. Each is decoded whole, however small the picture is."""
    tags = getattr(picture, "tag_v2", None) or {}
    return int(tags.get(322, 1)), int(tags.get(323, 1))


def _what_it_is(content: bytes) -> str:
    start = content[:512].lstrip()
    if content[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf"):
        return "is a HEIC picture, which is not supported: save it as JPEG or PNG"
    if start.startswith((b"<", b"\xef\xbb\xbf<")) and b"<svg" in content[:4096]:
        return "is an SVG drawing, which is not supported: save it as PNG"
    if content.startswith(b"PK\x03\x04"):
        return "is a zip archive, not a picture"
    if start.startswith(b"%PDF"):
        return "is a PDF, not a picture: save its page as PNG"
    if content.startswith(b"MM\0+"):
        return "is a big-endian BigTIFF, which is not supported: save it as an ordinary TIFF or PNG"
    if content.startswith((b"MM\0*", b"II*\0", b"II+\0")):
        return ("is a TIFF of a kind that is not read (such as colour as floats), or damaged: save it with 8 bits, or "
                "as 16-bit grey")
    if content.startswith(b"BM"):
        return "is a BMP of a kind that is not read (such as unusual colour fields), or damaged: save it as PNG"
    return "is not a picture in a supported format (JPEG, PNG, GIF, BMP, TIFF, WebP, AVIF …), or its header is damaged"


def _from_array(array: np.ndarray, name: str, reading: Reading) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise PictureError(f"{name} has shape {array.shape}: expected (H, W), (H, W, 3) or (H, W, 4).")
    _check_pixels(array.shape[1], array.shape[0], reading.most_pixels, name)
    if array.dtype.newbyteorder("=") == np.uint16:
        array = scaled(array, reading.white or 65535)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PictureError(f"{name} holds floats outside [0, 1]: scale them, or give uint8.")
        array = scaled(array, 1)
    elif array.dtype != np.uint8:
        raise PictureError(f"{name} is of {array.dtype}: expected uint8, uint16, bool, or floats in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(picture: Image.Image, reading: Reading) -> tuple[Image.Image, Facts]:
    with _without_warnings():
        picture.load()
        transparent = picture.info.get("transparency")
        if picture.mode.startswith("I") or picture.mode == "F":
            grey, facts = to_grey(picture, transparent, reading)
            return _upright(grey, _turn(picture)).convert("RGB"), facts
        picture = _upright(picture, _turn(picture))
        if picture.mode in ("RGBa", "La"):
            picture = picture.convert(picture.mode[:-1] + "A")
        if picture.mode in ("RGBA", "LA", "PA") or transparent is not None:
            picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
            white = Image.new("RGB", picture.size, "white")
            white.paste(picture, mask=picture.getchannel("A"))
            return white, Facts()
        return picture if picture.mode == "RGB" else picture.convert("RGB"), Facts()


_quiet, _decoding = threading.Lock(), 0
_before: list = []


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Pillow's own bomb warning (its limit is higher) and its warnings of broken metadata.

    warnings.catch_warnings would not do: threads may leave it in another order than they entered it. Here the last
    thread that decodes restores the filters.
    """
    global _decoding, _before
    with _quiet:
        if _decoding == 0:
            _before = list(warnings.filters)
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _decoding += 1
    try:
        yield
    finally:
        with _quiet:
            _decoding -= 1
            if _decoding == 0:
                warnings.filters[:] = _before  # type: ignore[index]
                warnings._filters_mutated()  # type: ignore[attr-defined]


def _upright(picture: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata of an intact picture
        return None


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
