"""From any bytes to the right pixels, or to one clear error."""

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from zoo.containers import av1_sizes
from zoo.errors import PictureError
from zoo.images import decode, preprocess
from zoo.pixels import MAX_FILE_BYTES

ROOT = Path(__file__).resolve().parent.parent


def as_bytes(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source) -> np.ndarray:
    picture = decode(source)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def drawing(mode: str = "RGB", size=(48, 40)) -> Image.Image:
    """Smooth colours with a shape on them: something that a codec keeps."""
    y, x = np.mgrid[: size[1], : size[0]]
    picture = Image.fromarray(np.stack([x * 255 // size[0], y * 255 // size[1], (x + y) % 256], -1).astype(np.uint8))
    ImageDraw.Draw(picture).rectangle((5, 8, size[0] // 2, size[1] // 2), fill=(250, 20, 30))
    return picture.convert(mode)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: what Pillow does not write."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*c) for c in chunks)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


# ---- the right pixels ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, kind):
    # Given a picture stored in one of the eight orientations,
    upright = drawing()
    store = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
             4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
             7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    stored = upright if store is None else upright.transpose(store)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    # when it is decoded, then it is upright.
    got = pixels(as_bytes(stored, kind, exif=exif, **options))
    assert got.shape == (40, 48, 3)
    assert np.abs(got.astype(int) - np.asarray(upright)).max() <= (12 if kind == "JPEG" else 0)


def test_broken_exif_does_not_cost_the_picture():
    got = pixels(as_bytes(drawing(), "JPEG", exif=b"Exif\0\0no TIFF header at all"))
    assert np.array_equal(got, pixels(as_bytes(drawing(), "JPEG")))


def test_cmyk_jpeg_and_tiff_come_out_as_rgb():
    for kind in ("JPEG", "TIFF"):
        got = pixels(as_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))
        assert np.abs(got.astype(int) - (255, 0, 0)).max() <= 3, kind


def test_grey_and_palette_keep_their_colours():
    assert (pixels(as_bytes(Image.new("L", (4, 4), 77))) == 77).all()
    assert (pixels(as_bytes(Image.new("1", (4, 4), 1))) == 255).all()
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize(2)
    assert (pixels(as_bytes(palette)) == (10, 200, 30)).all()


@pytest.mark.parametrize("picture", [
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("LA", (4, 4), (0, 0)), Image.new("RGBa", (4, 4), (0, 0, 0, 0)),
    Image.new("La", (4, 4), (0, 0)), Image.new("PA", (4, 4), (0, 0))], ids=lambda p: p.mode)
def test_what_is_transparent_is_white(picture):
    assert (pixels(picture) == 255).all()


def test_half_transparent_is_mixed_with_white():
    half_red = pixels(as_bytes(Image.new("RGBA", (4, 4), (255, 0, 0, 128))))
    assert np.abs(half_red.astype(int) - (255, 127, 127)).max() <= 1
    assert np.abs(pixels(as_bytes(Image.new("LA", (4, 4), (0, 51)))).astype(int) - 204).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_colour_is_white(kind):
    picture = Image.new("P", (4, 4), 3)
    picture.putpalette([0, 0, 0, 10, 20, 30, 200, 0, 0, 0, 200, 0])
    picture.putpixel((0, 0), 2)
    got = pixels(as_bytes(picture, kind, transparency=3))
    assert tuple(got[0, 0]) == (200, 0, 0)
    assert (got.reshape(-1, 3)[1:] == 255).all()


def test_a_transparent_grey_or_colour_is_white():
    assert (pixels(as_bytes(Image.new("L", (4, 4), 9), transparency=9)) == 255).all()
    assert (pixels(as_bytes(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7))) == 255).all()
    deep = Image.fromarray(np.array([[30000, 257 * 40]], np.uint16))
    assert pixels(as_bytes(deep, transparency=30000))[0].tolist() == [[255] * 3, [40] * 3]


def test_16_bits_are_scaled_not_clipped():
    # Given every 257th grey of 65,536, each of which is exactly an 8-bit grey,
    greys = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    # then each comes out as that grey, from a PNG, a TIFF, a PIL image or an array.
    for source in (as_bytes(Image.fromarray(greys)), as_bytes(Image.fromarray(greys), "TIFF"), Image.fromarray(greys),
                   Image.fromarray(greys.astype(np.int32)), greys, greys.astype(">u2")):
        assert np.array_equal(pixels(source)[..., 0], expected)


def test_16_bit_colour_and_grey_with_alpha():
    row = b"\0" + struct.pack(">6H", 0, 32768, 65535, 257 * 50, 257 * 100, 257 * 200)
    assert pixels(png(2, 1, 16, 2, row))[0].tolist() == [[0, 128, 255], [50, 100, 200]]
    row = b"\0" + struct.pack(">4H", 0, 0, 257 * 90, 65535)
    assert pixels(png(2, 1, 16, 4, row))[0].tolist() == [[255] * 3, [90] * 3]


@pytest.mark.parametrize(("values", "greys"), [
    ([0, 0.5, 1], [0, 128, 255]), ([0, 100, 255], [0, 100, 255]), ([0, 500, 1000], [0, 128, 255]),
    ([-1, np.nan, 1], [0, 0, 255]), ([np.inf, 0, 0.2], [0, 0, 51])])
def test_float_tiff_is_scaled_by_the_written_rule(values, greys):
    got = pixels(as_bytes(Image.fromarray(np.array([values], np.float32)), "TIFF"))
    assert np.array_equal(got[0, :, 0], greys)


def test_integers_beyond_16_bits_are_scaled_by_the_largest():
    assert pixels(Image.fromarray(np.array([[-5, 0, 70000, 140000]], np.int32)))[0, :, 0].tolist() == [0, 0, 128, 255]


def test_the_first_frame_of_an_animation_and_the_first_page_of_a_tiff():
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = as_bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (pixels(content) == (255, 0, 0)).all(), kind


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "TGA", "PCX", "GIF", "AVIF", "JPEG2000", "JPEG"])
def test_formats_keep_the_picture(kind):
    if kind not in Image.SAVE and not (Image.init() and kind in Image.SAVE):
        pytest.skip(f"this Pillow has no {kind}")
    mean_off = np.abs(pixels(as_bytes(drawing(), kind)).astype(int) - np.asarray(drawing())).mean()
    assert mean_off <= (14 if kind == "GIF" else 6)


@pytest.mark.parametrize(("array", "expected"), [
    (np.full((3, 4), 7, np.uint8), (7, 7, 7)),
    (np.full((3, 4, 1), 7, np.uint8), (7, 7, 7)),
    (np.full((3, 4, 3), (1, 2, 3), np.uint8), (1, 2, 3)),
    (np.full((3, 4, 4), (1, 2, 3, 0), np.uint8), (255, 255, 255)),
    (np.full((3, 4, 3), 65535, np.uint16), (255, 255, 255)),
    (np.full((3, 4), True), (255, 255, 255)),
    (np.full((3, 4, 3), 0.2, np.float32), (51, 51, 51)),
    (np.full((3, 4), 0.2, np.float64), (51, 51, 51)),
    (np.full((3, 4), 1, np.float16), (255, 255, 255)),
    (np.full((4, 3, 3), (1, 2, 3), np.uint8)[::-1, ::-1].transpose(1, 0, 2), (1, 2, 3)),
])
def test_arrays_of_each_type(array, expected):
    got = pixels(array)
    assert got.shape == (3, 4, 3)
    assert (got == expected).all()


@pytest.mark.parametrize(("array", "reason"), [
    (np.zeros((3, 4, 2), np.uint8), "shape"), (np.zeros((1, 3, 4, 3), np.uint8), "shape"), (np.zeros(5), "shape"),
    (np.zeros((0, 4, 3), np.uint8), "shape"), (np.zeros((3, 4), np.int64), "int64"), (np.zeros((3, 4), "U1"), "<U1"),
    (np.zeros((3, 4), object), "object"), (np.zeros((3, 4), complex), "complex"), (np.full((3, 4), 1.1), "outside"),
    (np.full((3, 4), -0.1), "outside"), (np.full((3, 4), np.nan), "outside"),
    (np.broadcast_to(np.uint8(0), (5001, 5001)), "megapixels")])
def test_arrays_that_are_no_picture_say_why(array, reason):
    with pytest.raises(PictureError, match=reason):
        decode(array)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA",
                                  "RGBX", "RGBa", "La", "I;16", "I;16L", "I;16B"])
def test_pil_images_of_every_mode(mode):
    assert decode(Image.new(mode, (5, 4))).size == (5, 4)


def test_a_pil_image_stays_as_it_is():
    picture = drawing("RGBA")
    before = picture.tobytes()
    decode(picture).paste((0, 0, 0), (0, 0, 9, 9))
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)


# ---- caps ----


def test_a_file_above_20_mb_is_refused_unread(tmp_path):
    big = tmp_path / "big.png"
    with open(big, "wb") as file:
        file.truncate(10 * 2**40)  # sparse; reading it would take days
    with pytest.raises(PictureError, match=r"big.png has \d+ MB; at most 20 MB"):
        decode(big)
    with pytest.raises(PictureError, match="at most 20 MB"):
        decode(bytes(MAX_FILE_BYTES + 1))


def test_26_megapixels_are_refused_without_decoding():
    # Given a PNG that says 5,200 x 5,000 and would break on decoding,
    content = png(5200, 5000, 8, 2, b"no pixels")
    # then the reason is its size, not the damage.
    with pytest.raises(PictureError, match=r"26 megapixels \(5200 x 5000\); at most 25"):
        decode(content)
    with pytest.raises(PictureError, match="megapixels"):
        decode(png(60000, 60000, 8, 2, b""))
    with pytest.raises(PictureError, match="26 megapixels"):
        decode(Image.new("L", (5200, 5000)))
    if Image.init() and "JPEG2000" in Image.OPEN:
        with pytest.raises(PictureError, match=r"12 megapixels .* at most 10"):
            decode(as_bytes(Image.new("L", (4000, 3000)), "JPEG2000"))


def test_a_picture_of_no_pixels_is_refused():
    with pytest.raises(PictureError, match="no pixels"):
        decode(Image.new("RGB", (0, 0)))


def test_a_large_baseline_jpeg_is_decoded_small_and_a_progressive_one_refused():
    # Given 26 megapixels of JPEG with a red left half,
    picture = Image.new("RGB", (6500, 4000), "blue")
    picture.paste((255, 0, 0), (0, 0, 3250, 4000))
    # when decoded, then it comes out at a quarter of its size with its halves in place; progressive has no such way.
    small = decode(as_bytes(picture, "JPEG", quality=30))
    assert small.size == (1625, 1000)
    assert small.getpixel((400, 500))[0] > 240 and small.getpixel((1200, 500))[2] > 240
    with pytest.raises(PictureError, match="26 megapixels"):
        decode(as_bytes(picture, "JPEG", quality=30, progressive=True))


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_at_a_fraction_of_its_upright_size(scale):
    # Given a photograph that lies on its side, as JPEG and as PNG,
    exif = Image.Exif()
    exif[0x0112] = 6
    told = []
    for kind in ("JPEG", "PNG"):
        whole = decode(as_bytes(drawing(size=(208, 160)), kind, exif=exif))
        # when a part of its resolution is enough,
        small = decode(as_bytes(drawing(size=(208, 160)), kind, exif=exif),
                       shrink=lambda *size: told.append(size) or scale)
        # then the choice is made by the upright size, the JPEG has that fraction of it, and the colours stay.
        assert told.pop() == whole.size == (160, 208)
        assert small.size == ((160 // scale, 208 // scale) if kind == "JPEG" else whole.size)
        greys = [np.asarray(picture.resize((20, 26)), float) for picture in (small, whole)]
        assert np.abs(greys[0] - greys[1]).mean() < 2
    # A huge one is told the size at which it is decoded anyway; fractions are rounded up.
    huge = decode(as_bytes(Image.new("RGB", (6001, 5000), "red"), "JPEG"), shrink=lambda *size: told.append(size) or 2)
    assert told == [(1501, 1250)] and huge.size == (751, 625)


def test_a_jpeg_that_libjpeg_would_hold_whole_counts_as_progressive():
    """One scan a colour is baseline by name, yet keeps 6 bytes a pixel in memory."""
    content = as_bytes(Image.new("RGB", (6500, 4000)), "JPEG", quality=30)
    at = content.rindex(b"\xff\xda")
    one_colour = content[: at + 2] + b"\0\x08\x01" + content[at + 5 : at + 7] + b"\0\x3f\0" + content[at + 14 :]
    with pytest.raises(PictureError, match="at most 25"):
        decode(one_colour)


def test_a_tile_larger_than_its_picture_is_refused():
    """Decoding 100 x 100 pixels of it would fill 16,000 x 16,000."""
    tile = zlib.compress(bytes(1000))
    tags = [(256, 100), (257, 100), (258, 8), (259, 8), (262, 1), (277, 1), (322, 16000), (323, 16000), (324, 134),
            (325, len(tile))]
    content = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)
               + bytes(4) + tile)
    with pytest.raises(PictureError, match=r"256 megapixels \(16000 x 16000\)"):
        decode(content)


def icon(picture: bytes, side: int = 16) -> bytes:
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(picture), 22) + picture


def test_an_icon_is_as_large_as_the_picture_in_it(monkeypatch):
    # Given icons that say 16 x 16 and hold 26 megapixels, as PNG and as a bitmap,
    huge = [png(5200, 5000, 8, 2, b"no pixels"), struct.pack("<IiiHHIIiiII", 40, 5200, 2 * 5000, 1, 32, *[0] * 6)]
    # when decoded, then their real size is the reason, and not a pixel is made.
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("pixels were made"))
    for content in huge:
        with pytest.raises(PictureError, match=r"26 megapixels \(5200 x 5000\)"):
            decode(icon(content))


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_of_an_icon_the_largest_picture_is_read(kind):
    content = as_bytes(drawing("RGBA", (64, 64)), "ICO", sizes=[(16, 16), (64, 64), (32, 32)], bitmap_format=kind)
    assert np.array_equal(pixels(content), np.asarray(drawing("RGB", (64, 64))))


def avif_that_says(width: int, height: int, picture: Image.Image, **options) -> bytes:
    content = bytearray(as_bytes(picture, "AVIF", **options))
    at = content.index(b"ispe") + 8
    content[at : at + 8] = struct.pack(">II", width, height)
    return bytes(content)


@pytest.mark.skipif(not (Image.init() is None and "AVIF" in Image.SAVE), reason="this Pillow has no AVIF")
def test_an_avif_is_as_large_as_the_video_frame_in_it(monkeypatch):
    """1,841 bytes that said 64 x 64 took 4.3 s and 300 MB, for 144 megapixels."""
    small = Image.new("RGB", (90, 70))
    for picture, options in ((small, {}), (small.convert("RGBA"), {}),
                             (small, {"save_all": True, "append_images": [Image.new("RGB", (90, 70), "red")]})):
        assert set(av1_sizes(as_bytes(picture, "AVIF", **options))) == {(90, 70)}
    monkeypatch.setattr("zoo.pixels.MAX_PIXELS", 6000)
    with pytest.raises(PictureError, match="90 x 70"):
        decode(avif_that_says(64, 64, small))
    # Where no frame is found, or items overlap without end, it is not a picture.
    with pytest.raises(PictureError, match="not a picture"):
        decode(avif_that_says(64, 64, small).replace(b"av01", b"av09"))
    whole = as_bytes(small, "AVIF")
    at = whole.index(b"iloc") + 4 + 8 + 6
    with pytest.raises(ValueError, match="overlap"):
        av1_sizes(whole[:at] + b"\xff\xff" + whole[at + 2 :])


# ---- what is not a picture ----


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "is empty"), (b"hello, world", "not a picture in a supported format"), (bytes(5000), "not a picture"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"), (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
    (b"\xef\xbb\xbf<!-- drawn --><svg/>", "SVG"), (b"%PDF-1.7\n", "PDF"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"), (b"<html><body/></html>", "not a picture"),
    (b"\x89PNG\r\n\x1a\n", "header is damaged"), (b"\xff\xd8\xff", "not a picture")])
def test_what_is_no_picture_is_named(content, reason):
    with pytest.raises(PictureError, match=reason):
        decode(content)


@pytest.mark.parametrize("thing", [None, 3, 2.5, [1, 2], {"a": 1}, object()])
def test_what_is_not_even_bytes_is_named_by_its_type(thing):
    with pytest.raises(PictureError, match=type(thing).__name__):
        decode(thing)


def test_paths_that_hold_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, reason in [("absent.png", "does not exist"), (".", "is a folder"), ("pipe.png", "not a regular file"),
                         ("loop.png", "loop.png"), ("a\0b.png", "a.b.png"), ("x" * 5000, "xxx")]:
        with pytest.raises(PictureError, match=reason):
            decode(tmp_path / name)
        with pytest.raises(PictureError, match=reason):
            decode(f"{tmp_path}/{name}")
    with pytest.raises(PictureError, match="/dev/zero is not a regular file"):
        decode("/dev/zero")


def test_paths_of_every_kind(tmp_path):
    drawing().save(tmp_path / "é.png")
    (tmp_path / "link.png").symlink_to("é.png")
    entry = next(e for e in os.scandir(os.fsencode(tmp_path)) if not e.is_symlink())  # its fspath is bytes
    for source in (tmp_path / "é.png", str(tmp_path / "é.png"), tmp_path / "link.png", entry):
        assert np.array_equal(pixels(source), np.asarray(drawing()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_one_clear_error(kind):
    content = as_bytes(Image.effect_noise((64, 64), 90).convert("P" if kind == "GIF" else "RGB"), kind)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        cut = content[: int(share * len(content))]
        if kind == "JPEG" and share > 0.6:  # read as far as it goes: test_pixels
            continue
        with pytest.raises(PictureError, match="holiday"):
            decode(cut, name="holiday")


def test_a_closed_pil_image_is_a_picture_error():
    picture = Image.open(io.BytesIO(as_bytes(drawing())))
    picture.close()
    with pytest.raises(PictureError, match="the PIL image"):
        decode(picture)


# ---- hostile bytes ----


def seeds() -> list[bytes]:
    """Small files of every format and mode that Pillow writes: what gets mutated."""
    Image.init()
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [as_bytes(drawing(mode), kind, **options) for kind, mode, options in [
        ("JPEG", "RGB", {"exif": exif}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {}),
        ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "I;16", {}),
        ("GIF", "P", {}), ("BMP", "RGB", {}), ("BMP", "1", {}), ("DIB", "L", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "F", {}), ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "1", {"compression": "group4"}), ("WEBP", "RGBA", {}), ("WEBP", "RGB", {"lossless": True}),
        ("PPM", "RGB", {}), ("ICO", "RGBA", {}), ("PCX", "P", {}), ("TGA", "RGBA", {"compression": "tga_rle"}),
        ("AVIF", "RGB", {}), ("JPEG2000", "RGB", {})] if kind in Image.SAVE]
    frames = [drawing().rotate(90 * turn) for turn in range(3)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        made.append(as_bytes(frames[0], kind, save_all=True, append_images=frames[1:]))
    return made


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    kind = rng.integers(6)
    near = min(len(changed), 200) if rng.random() < 0.6 else len(changed)  # headers are where it hurts
    if kind == 0:
        return bytes(changed[: rng.integers(len(changed))])
    for _ in range(int(rng.integers(1, 12))):
        at = int(rng.integers(near))
        if kind == 1:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            changed[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF]))
        elif kind == 3:
            number = int(rng.choice([0, 1, 65535, 2**31, 2**32 - 1]))
            changed[at : at + 4] = struct.pack(rng.choice(["<I", ">I"]), number)
        elif kind == 4:
            del changed[at : at + int(rng.integers(1, 40))]
            near = min(near, len(changed) - 1)
        else:
            changed[at:at] = rng.bytes(int(rng.integers(1, 40)))
        if len(changed) < 3 or near < 1:
            break
    return bytes(changed)


def decode_mutated(count: int, seed: int) -> tuple[int, int, float]:
    """How many came out as pictures, how many as PictureError, and the slowest; anything else raises."""
    rng = np.random.default_rng(seed)
    originals, pictures, refused, slowest = seeds(), 0, 0, 0.0
    cfg = {"input_size": [3, 32, 32], "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "crop_pct": 1.0}
    for i in range(count):
        content = mutated(originals[i % len(originals)], rng)
        began = time.perf_counter()
        try:
            array = preprocess(decode(content), cfg)
            assert array.shape == (3, 32, 32) and np.isfinite(array).all()
            pictures += 1
        except PictureError as error:
            message = str(error)
            if "the bytes " not in message or "\n" in message:
                raise AssertionError(message) from error
            refused += 1
        slowest = max(slowest, time.perf_counter() - began)
    return pictures, refused, slowest


def test_mutated_pictures_give_a_picture_or_a_picture_error():
    pictures, refused, slowest = decode_mutated(540, seed=0)
    assert pictures > 50 and refused > 50
    assert slowest < 3


# Of a process of its own, in bytes. Linux hands the parent's ru_maxrss on to a child; VmHWM is the child's.
PEAK = """
def peak():
    import pathlib, resource
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
"""


@pytest.mark.promise("pictures")
@pytest.mark.long
def test_ten_thousand_mutated_pictures_in_bounded_time_and_memory(figure):
    # Given a process of its own, whose peak memory is that of these pictures alone,
    script = PEAK + ("from tests.test_images import decode_mutated; print(*decode_mutated(10_000, seed=1)); "
                     "print(peak())")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=1800)
    # then nothing but pictures and PictureErrors came out, each in under 3 s, the process under 512 MB.
    assert done.returncode == 0, done.stderr
    figures, peak = done.stdout.splitlines()
    pictures, refused, slowest = figures.split()
    figure(f"10,000 changed pictures: {pictures} read, {refused} refused, the slowest {float(slowest):.2f} s, at most "
           f"{int(peak) / 1e6:.0f} MB")
    assert float(slowest) < 3
    assert int(peak) < 512e6


AT_THE_CAP = {
    "webp with alpha": lambda: as_bytes(Image.new("RGBA", (4990, 4990), (3, 4, 5, 6)), "WEBP", lossless=True, method=0),
    "float tiff": lambda: as_bytes(Image.new("F", (4990, 4990), 0.5), "TIFF", compression="tiff_deflate"),
    "16-bit png": lambda: png(4990, 4990, 16, 0, bytes(4990 * (1 + 2 * 4990))),
    "rgba png": lambda: png(4990, 4990, 8, 6, bytes(4990 * (1 + 4 * 4990))),
    "progressive jpeg": lambda: as_bytes(Image.new("RGB", (4990, 4990)), "JPEG", progressive=True, subsampling=0),
    "99 megapixels of jpeg": lambda: as_bytes(Image.new("RGB", (9950, 9950)), "JPEG", subsampling=0),
    "plain ppm": lambda: b"P3 865 865 255\n" + b"255 " * (3 * 865 * 865),
    "jpeg 2000": lambda: as_bytes(Image.new("RGB", (3160, 3160)), "JPEG2000"),
}


@pytest.mark.promise("pictures")
@pytest.mark.long
@pytest.mark.parametrize("kind", AT_THE_CAP)
def test_the_largest_allowed_pictures_stay_under_512_mb(kind, tmp_path, figure):
    (tmp_path / "picture").write_bytes(AT_THE_CAP[kind]())
    script = PEAK + (f"import time; from zoo.images import decode; p = decode({str(tmp_path / 'picture')!r}); "
                     "print(time.process_time(), peak())")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, peak = map(float, done.stdout.split())
    figure(f"largest {kind}: {seconds:.1f} s, {peak / 1e6:.0f} MB")
    assert peak < 512e6
    assert seconds < 5


def test_decoding_leaks_no_open_files(tmp_path, pictures):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else resource.RLIM_INFINITY
    for _ in range(20):
        for path in sorted(pictures.iterdir()):
            decode(path)
    if before != resource.RLIM_INFINITY:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


# ---- preprocessing ----


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875, 0.9])
def test_preprocessing_is_torchvisions(crop_pct, interpolation):
    """Resize(floor(size / crop_pct)), CenterCrop, ToTensor, Normalize on PIL, as timm and torchvision evaluate: the
    same pixels to the bit, and floats within 1e-6 (the order of / 255, - mean, / std rounds differently)."""
    transforms = pytest.importorskip("torchvision.transforms")
    mean, std = (0.466, 0.471, 0.38), (0.195, 0.194, 0.192)
    for size in (32, 33, 224):
        theirs_of = transforms.Compose([
            transforms.Resize(int(size / crop_pct), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(mean, std)])
        cfg = {"input_size": [3, size, size], "mean": list(mean), "std": list(std), "interpolation": interpolation,
               "crop_pct": crop_pct}
        for shape in [(32, 32), (33, 47), (500, 375), (375, 500), (10, 300), (300, 9), (256, 256), (1, 1), (97, 640)]:
            noise = np.random.default_rng(shape).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
            picture = Image.fromarray(noise)
            ours, theirs = preprocess(picture, cfg), theirs_of(picture).numpy()
            assert ours.shape == theirs.shape and ours.dtype == np.float32 and ours.flags.c_contiguous
            assert np.abs(ours - theirs).max() <= 1e-6, (size, shape)


def test_a_panorama_is_cropped_first_and_differs_by_half_a_grey_on_average(monkeypatch):
    """Resizing the crop alone gives what cropping the whole gives, but for the rounding of weights."""
    cfg = {"input_size": [3, 33, 33], "mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": 0.875}
    for shape in [(300, 9), (97, 640), (33, 47)]:
        picture = Image.fromarray(np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8))
        for interpolation in ("bilinear", "bicubic", "lanczos"):
            whole = preprocess(picture, {**cfg, "interpolation": interpolation})
            with monkeypatch.context() as patched:
                patched.setattr("zoo.images.WHOLE_PIXELS", 0)
                cropped = preprocess(picture, {**cfg, "interpolation": interpolation})
            greys = np.abs(whole - cropped) * 255
            assert greys.mean() < 0.5


def test_without_resizing_preprocessing_is_exact():
    picture = drawing(size=(32, 32))
    cfg = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear",
           "crop_pct": 1.0}
    by_hand = (np.asarray(picture, np.float64) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert np.abs(preprocess(picture, cfg) - by_hand.transpose(2, 0, 1)).max() < 1e-6


@pytest.mark.parametrize("size", [(20000, 10), (10, 20000), (1, 65000), (1, 1), (31, 33)])
@pytest.mark.parametrize("target", [(32, 32), (16, 64), (96, 24)])
def test_any_shape_of_picture_fits_any_input(size, target):
    cfg = {"input_size": [3, *target], "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bicubic", "crop_pct": 0.9}
    assert preprocess(Image.new("RGB", size, "white"), cfg) == pytest.approx(np.ones((3, *target)))
