"""From a file, bytes, a PIL image or an array to what a network takes: the only home of decoding, mean and std.

Decoding, by rule: the first frame of an animation or page of a TIFF; EXIF orientation applied, broken EXIF ignored;
grey, palette, CMYK and other colour modes to RGB; transparency over white; 16-bit scaled to 8 (never clipped). Caps:
20 MB a file, 25 megapixels; baseline JPEG 100 megapixels, decoded at a quarter of its size above 25; JPEG 2000, whose
decoder takes 40 bytes a pixel, 10 megapixels.
"""

import functools
import io
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from zoo.containers import ICON, av1_sizes, bitmap_of_icon, largest_of_icon
from zoo.errors import PictureError

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray


class NamedPicture(NamedTuple):
    """A picture and what results call it, where it has no path of its own; or why it could not be had."""

    name: str
    picture: Picture | PictureError


MAX_FILE_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
MAX_JPEG_PIXELS = 100_000_000
MAX_JPEG_2000_PIXELS = 10_000_000
WHOLE_PIXELS = 4_000_000  # up to here a picture is resized before it is cropped, as torchvision does, to the bit

# Formats that are decoded inside this process by code that takes hostile input. EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "ICO", "PCX", "TGA")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with; it knows a few only before `init`."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


# What brings a picture upright, by its EXIF orientation.
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


def decode(
    source: Picture, name: str | None = None, shrink: Callable[[int, int], int] | None = None
) -> Image.Image:
    """The picture as 8-bit RGB, upright.

    source  a path; the bytes of a file; a PIL image, which stays as it is; or an array: (H, W), (H, W, 1), (H, W, 3)
            or (H, W, 4), of uint8, of uint16 (65535 is white), of bool, or of floats in [0, 1]
    name    what messages call it; a path's own name by default
    shrink  given the width and height of a file's upright picture: 1, 2, 4 or 8. A JPEG is decoded at that fraction of
            its sides, rounded up, and in the decoder's quick way: about a level less exact, colour edges unsmoothed.
            Pictures of other formats come whole.
    Raises PictureError, and nothing else, for anything that does not come out as a picture.
    """
    if isinstance(source, Image.Image):
        name = name or "the PIL image"
        _check_pixels(source.width, source.height, MAX_PIXELS, name)
    elif isinstance(source, np.ndarray):
        name = name or "the array"
        source = _from_array(np.asarray(source), name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name = name or "the bytes"
        source = _open(bytes(source), name, shrink)
    elif isinstance(source, (str, os.PathLike)):
        name = name or os.fsdecode(source)
        source = _open(_read(Path(os.fsdecode(source)), name), name, shrink)
    else:
        raise PictureError(f"{type(source).__name__} is no picture: give a path, bytes, a PIL image or an array.")
    try:
        return _to_rgb(source)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over, assertions among it
        raise PictureError(f"{name} is damaged or cut off: {_first_line(error)}.") from error


def preprocess(picture: Image.Image, pretrained_cfg: Mapping[str, Any]) -> np.ndarray:
    """float32 (3, H, W) as the network takes it: `fitted`, then (x / 255 - mean) / std.

    pretrained_cfg  input_size [3, H, W], mean, std, and what `fitted` takes
    """
    array = np.asarray(fitted(picture, pretrained_cfg), np.float32) / 255
    mean, std = (np.asarray(pretrained_cfg[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((array - mean) / std).transpose(2, 0, 1))


def fitted(picture: Image.Image, pretrained_cfg: Mapping[str, Any]) -> Image.Image:
    """The picture in the network's size, by timm's rules.

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
    """Where a side starts that is centred in a frame; halves are rounded as timm does, padding or cropping."""
    return (frame - side) // 2 if side < frame else -round((side - frame) / 2)


def _resize_and_crop(picture: Image.Image, height: int, width: int, interpolation: str, crop_pct: float):
    """torchvision's Resize(floor(size / crop_pct)) and CenterCrop, whole pixels and rounding as there."""
    full_height, full_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if picture.width * full_height <= picture.height * full_width:
        size = (full_width, max(full_height, full_width * picture.height // picture.width))
    else:
        size = (max(full_width, full_height * picture.width // picture.height), full_height)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    if size[0] * size[1] <= WHOLE_PIXELS:
        whole = picture.resize(size, _INTERPOLATIONS[interpolation])
        return whole.crop((left, top, left + width, top + height))
    # Cropping in the source first, where some weights round differently: a panorama of 200,000 x 10 pixels never
    # becomes one of 640,000 x 32.
    ratio_x, ratio_y = picture.width / size[0], picture.height / size[1]
    box = (left * ratio_x, top * ratio_y, (left + width) * ratio_x, (top + height) * ratio_y)
    box = (box[0], box[1], min(box[2], picture.width), min(box[3], picture.height))
    return picture.resize((width, height), _INTERPOLATIONS[interpolation], box=box)


# ---- decoding ----


def _read(path: Path, name: str) -> bytes:
    try:
        if path.is_dir():
            raise PictureError(f"{name} is a folder: name a picture in it, or use predict_folder.")
        if not path.exists():
            raise PictureError(f"{name} does not exist.")
        if not path.is_file():
            raise PictureError(f"{name} is no regular file.")
        _check_size(path.stat().st_size, name)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise PictureError(f"{name} cannot be read: {_first_line(error)}.") from error


def _open(content: bytes, name: str, shrink: Callable[[int, int], int] | None = None) -> Image.Image:
    if not content:
        raise PictureError(f"{name} is empty.")
    _check_size(len(content), name)
    try:
        if content.startswith(ICON):  # which Pillow decodes on opening
            content = largest_of_icon(content)
            if content.startswith(ICON):
                _check_pixels(*bitmap_of_icon(content), MAX_PIXELS, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, higher, bomb warning and remarks on broken metadata
            picture = Image.open(io.BytesIO(content), formats=_formats())
        cap, tile = _cap(picture, content), _tile(picture)
        inside = av1_sizes(content) if picture.format == "AVIF" else []
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"{name} has too many pixels (over {MAX_JPEG_PIXELS // 1_000_000} megapixels).") from None
    except Exception as error:
        raise PictureError(f"{name} {_what_it_is(content)}.") from error
    _check_pixels(picture.width, picture.height, cap, name)
    _check_pixels(*tile, MAX_PIXELS, f"A tile of {name}")
    for size in inside:
        _check_pixels(*size, cap, name)
    _decode_smaller(picture, shrink)
    return picture


def _decode_smaller(picture: Image.Image, shrink: Callable[[int, int], int] | None) -> None:
    """Set the scale at which libjpeg decodes: a quarter of a huge picture, and of that what `shrink` says."""
    scale = 4 if picture.width * picture.height > MAX_PIXELS else 1
    if shrink is not None:
        sides = -(-picture.width // scale), -(-picture.height // scale)
        scale *= shrink(*(sides[::-1] if _turn(picture) in _ON_ITS_SIDE else sides))
    if scale == 1 and shrink is None:
        return
    scale = min(scale, 8)  # Pillow takes the sides that are wanted, and halves as long as it stays above them
    drafted = picture.draft(None, (max(1, picture.width // scale), max(1, picture.height // scale)))
    if drafted is not None and shrink is not None:
        picture.decoderconfig = (picture.decoderconfig[0], 1)  # type: ignore[attr-defined]  # quick, colours unsmoothed


def _check_size(size: int, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise PictureError(f"{name} has {size / 1e6:.0f} MB; at most {MAX_FILE_BYTES / 1e6:.0f} MB are read.")


def _check_pixels(width: int, height: int, cap: int, name: str) -> None:
    if width * height == 0:
        raise PictureError(f"{name} has no pixels.")
    if width * height > cap:
        raise PictureError(f"{name} has {width * height / 1e6:.0f} megapixels ({width} x {height}); at most "
                           f"{cap // 1_000_000} are decoded of this kind. Make it smaller first.")


def _cap(picture: Image.Image, content: bytes) -> int:
    if picture.format == "JPEG2000":
        return MAX_JPEG_2000_PIXELS
    if picture.format not in ("JPEG", "MPO") or picture.info.get("progressive"):
        return MAX_PIXELS
    # Where not every colour is in the first scan, libjpeg holds the picture whole, as it does a progressive one.
    scan = content.rfind(b"\xff\xda", 0, picture.fp.tell())  # type: ignore[attr-defined]
    return MAX_JPEG_PIXELS if content[scan + 4] == len(picture.getbands()) else MAX_PIXELS


def _tile(picture: Image.Image) -> tuple[int, int]:
    """Width and height of a TIFF's tiles, each of which is decoded whole, however small the picture."""
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
    return "is no picture in a supported format (JPEG, PNG, GIF, BMP, TIFF, WebP, AVIF …), or its header is damaged"


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise PictureError(f"{name} has shape {array.shape}: expected (H, W), (H, W, 3) or (H, W, 4).")
    _check_pixels(array.shape[1], array.shape[0], MAX_PIXELS, name)
    if array.dtype.newbyteorder("=") == np.uint16:
        array = _scaled(array, 65535)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PictureError(f"{name} holds floats outside [0, 1]: scale them, or give uint8.")
        array = _scaled(array, 1)
    elif array.dtype != np.uint8:
        raise PictureError(f"{name} is of {array.dtype}: expected uint8, uint16, bool, or floats in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(picture: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture.load()
        transparent = picture.info.get("transparency")
        picture = _upright(picture)
        if picture.mode.startswith("I") or picture.mode == "F":
            return Image.fromarray(_deep_grey(np.asarray(picture), transparent)).convert("RGB")
        if picture.mode in ("RGBa", "La"):
            picture = picture.convert(picture.mode[:-1] + "A")
        if picture.mode in ("RGBA", "LA", "PA") or transparent is not None:
            picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
            white = Image.new("RGB", picture.size, "white")
            white.paste(picture, mask=picture.getchannel("A"))
            return white
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    turn = _turn(picture)
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata of a picture that is whole
        return None


def _deep_grey(array: np.ndarray, transparent: Any) -> np.ndarray:
    """Grey of more than 8 bits to uint8, the transparent value white. Integers: 65535 is white (larger ones: the
    largest is). Floats: 1 is white where none is above, else 255, else the largest; what is not finite is black."""
    if np.issubdtype(array.dtype, np.floating):
        top = float(array.max(initial=0, where=np.isfinite(array)))
        grey = _scaled(array, 1 if top <= 1 else 255 if top <= 255 else top)
    else:
        grey = _scaled(array, max(65535, int(array.max())))
    if isinstance(transparent, int):
        grey[array == transparent] = 255
    return grey


def _scaled(array: np.ndarray, white: float) -> np.ndarray:
    """round(255 x / white) as uint8, below 0 and not finite as 0; in pieces, for memory."""
    flat, scaled = array.reshape(-1), np.empty(array.size, np.uint8)
    for start in range(0, flat.size, 1_000_000):
        piece = flat[start : start + 1_000_000].astype(np.float64)
        piece[~np.isfinite(piece)] = 0
        scaled[start : start + 1_000_000] = np.rint(piece.clip(0, white) / white * 255)
    return scaled.reshape(array.shape)


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
