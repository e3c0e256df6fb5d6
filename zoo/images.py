"""From a file, bytes, a PIL image or an array to what a network takes: the only home of decoding, mean and std.

Decoding, by rule: the first frame of an animation or page of a TIFF; EXIF orientation applied; grey, palette, CMYK
and other colour modes to RGB; transparency over white; 16-bit scaled to 8 (never clipped). Caps: 20 MB a file, 25
megapixels; baseline JPEG 100 megapixels, decoded at reduced size above 25.
"""

import functools
import io
import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from zoo.errors import PictureError

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray

MAX_FILE_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
MAX_JPEG_PIXELS = 100_000_000

# Formats that are decoded inside this process by code that takes hostile input. EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "ICO", "PCX", "TGA")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with; it knows a few only before `init`."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


_PILLOW_RAISES = (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError, EOFError,
                  struct.error, OverflowError, IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError,
                  MemoryError, RuntimeError)  # fmt: skip

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip


def decode(source: Picture, name: str | None = None) -> Image.Image:
    """The picture as 8-bit RGB, upright.

    source  a path; the bytes of a file; a PIL image; or an array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), of
            uint8, of uint16 (65535 is white), of bool, or of floats in [0, 1]
    name    what messages call it; a path's own name by default
    Raises PictureError, and nothing else, for anything that does not come out as a picture.
    """
    if isinstance(source, Image.Image):
        name = name or "the PIL image"
    elif isinstance(source, np.ndarray):
        name = name or "the array"
        source = _from_array(source, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name = name or "the bytes"
        source = _open(bytes(source), name)
    elif isinstance(source, (str, os.PathLike)):
        name = name or str(source)
        source = _open(_read(Path(source), name), name)
    else:
        raise PictureError(f"{type(source).__name__} is no picture: give a path, bytes, a PIL image or an array.")
    try:
        return _to_rgb(source)
    except _PILLOW_RAISES as error:
        raise PictureError(f"{name} is damaged or cut off: {_first_line(error)}.") from error


def preprocess(picture: Image.Image, pretrained_cfg: Mapping[str, Any]) -> np.ndarray:
    """float32 (3, H, W) as the network takes it, by timm's rule: shorter side to size / crop_pct, centre crop,
    (x / 255 - mean) / std.

    pretrained_cfg  input_size [3, H, W], mean, std, interpolation, crop_pct
    """
    _, height, width = pretrained_cfg["input_size"]
    picture = _resize_and_crop(picture, height, width, pretrained_cfg["interpolation"], pretrained_cfg["crop_pct"])
    array = np.asarray(picture, np.float32) / 255
    mean, std = (np.asarray(pretrained_cfg[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((array - mean) / std).transpose(2, 0, 1))


def _resize_and_crop(picture: Image.Image, height: int, width: int, interpolation: str, crop_pct: float):
    scale = max(height / crop_pct / picture.height, width / crop_pct / picture.width)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    if size == picture.size:
        return picture.crop((left, top, left + width, top + height))
    # Cropping in the source first: a panorama of 20,000 x 10 pixels never becomes one of 64,000 x 32.
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
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PictureError(f"{name} has {size / 1e6:.0f} MB; at most {MAX_FILE_BYTES / 1e6:.0f} MB are read.")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise PictureError(f"{name} cannot be read: {_first_line(error)}.") from error


def _open(content: bytes, name: str) -> Image.Image:
    if not content:
        raise PictureError(f"{name} is empty.")
    if len(content) > MAX_FILE_BYTES:
        raise PictureError(f"{name} has {len(content) / 1e6:.0f} MB; at most {MAX_FILE_BYTES / 1e6:.0f} MB are read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, higher, bomb warning and remarks on broken metadata
            picture = Image.open(io.BytesIO(content), formats=_formats())
    except Image.DecompressionBombError:
        raise PictureError(f"{name} has too many pixels (over {MAX_JPEG_PIXELS // 1_000_000} megapixels).") from None
    except _PILLOW_RAISES as error:
        raise PictureError(f"{name} {_what_it_is(content)}.") from error
    pixels = picture.width * picture.height
    may_shrink = picture.format in ("JPEG", "MPO") and not picture.info.get("progressive")
    cap = MAX_JPEG_PIXELS if may_shrink else MAX_PIXELS
    if pixels > cap:
        raise PictureError(f"{name} has {pixels / 1e6:.0f} megapixels ({picture.width} x {picture.height}); at most "
                           f"{cap // 1_000_000} are decoded of this kind. Make it smaller first.")
    if pixels == 0:
        raise PictureError(f"{name} has no pixels.")
    if pixels > MAX_PIXELS:
        picture.draft(None, (picture.width // 4, picture.height // 4))  # libjpeg decodes at an eighth to a half
    return picture


def _what_it_is(content: bytes) -> str:
    start = content[:512].lstrip()
    if b"ftyphei" in content[:32] or b"ftyphev" in content[:32] or b"ftypmif1" in content[:32]:
        return "is a HEIC picture, which is not supported: save it as JPEG or PNG"
    if start.startswith((b"<svg", b"<?xml")) and b"<svg" in content[:4096]:
        return "is an SVG drawing, which is not supported: save it as PNG"
    if start.startswith(b"%PDF"):
        return "is a PDF, not a picture: save its page as PNG"
    return "is no picture in a supported format (JPEG, PNG, GIF, BMP, TIFF, WebP, AVIF …), or its header is damaged"


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise PictureError(f"{name} has shape {array.shape}: expected (H, W), (H, W, 3) or (H, W, 4).")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise PictureError(f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels. Make it smaller first.")
    if array.dtype == np.uint16:
        array = _from_16_bits(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PictureError(f"{name} holds floats outside [0, 1]: scale them, or give uint8.")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise PictureError(f"{name} is of {array.dtype}: expected uint8, uint16, bool, or floats in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(picture: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I") or picture.mode == "F":
            picture = Image.fromarray(_deep_grey(np.asarray(picture)))
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            if picture.mode in ("RGBa", "La"):
                picture = picture.convert(picture.mode[:-1] + "A")
            with_alpha = picture.convert("RGBA")
            white = Image.new("RGB", picture.size, "white")
            white.paste(with_alpha, mask=with_alpha.getchannel("A"))
            return white
        return picture.convert("RGB")


def _deep_grey(array: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits to uint8. Integers: 65535 is white (larger ones: the largest is). Floats: 1 is white
    where none is above, else 255, else the largest."""
    if np.issubdtype(array.dtype, np.floating):
        array = np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
        top = array.max()
        white = 1.0 if top <= 1 else 255.0 if top <= 255 else top
        return np.rint(array / white * 255).astype(np.uint8)
    array = array.astype(np.int64).clip(min=0)
    if array.max() > 65535:
        return np.rint(array / array.max() * 255).astype(np.uint8)
    return _from_16_bits(array)


def _from_16_bits(array: np.ndarray) -> np.ndarray:
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
