"""What picture files leave open: pages, the range of grey, a missing end, sizes on one's own disk."""

import contextlib
import struct
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from benchmarks.attacks import overlapping_tags
from tests.test_images import ROOT, as_bytes, drawing, png
from zoo.errors import PictureError, ZooError
from zoo.images import decode, read
from zoo.pixels import LOCAL, Reading, Remarks

pytestmark = pytest.mark.promise("pixels")

RAMP = np.arange(256).reshape(16, 16)


def tiff(values: np.ndarray, order: str = "<", big: bool = False, next_page: int = 0, **tags: int) -> bytes:
    """An uncompressed TIFF by hand: (H, W) or (H, W, samples), of any type."""
    height, width, *samples = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    number = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "strip": 273,
              "samples": 277, "rows": 278, "bytes": 279, "largest": 281, "format": 339}
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    said = {"width": width, "height": height, "bits": 8 * values.dtype.itemsize, "compression": 1, "photometric": 1,
            "strip": 0, "samples": samples[0] if samples else 1, "rows": height, "bytes": len(data), "format": kind}
    said |= tags
    entry, head = ("HHQQ", 16 + 8) if big else ("HHII", 8 + 2)
    size = struct.calcsize(order + entry)
    said["strip"] = head + len(said) * size + (8 if big else 4)
    start = struct.pack(order + ("2sHHHQQ" if big else "2sHIH"), b"II" if order == "<" else b"MM",
                        *((43, 8, 0, 16, len(said)) if big else (42, 8, len(said))))
    # LONG and LONG8 values lie left in their field, in either byte order.
    entries = b"".join(struct.pack(order + entry, number[name], 16 if big else 4, 1, value)
                       for name, value in sorted(said.items(), key=lambda pair: number[pair[0]]))
    return start + entries + struct.pack(order + ("Q" if big else "I"), next_page) + data


def grey(source: bytes, reading: Reading = LOCAL) -> np.ndarray:
    return np.asarray(decode(source, reading=reading))[..., 0]


# ---- the range of grey ----


def test_the_range_of_16_bit_grey_is_what_the_file_the_flag_or_the_model_says():
    twelve = tiff((RAMP * 16 + RAMP // 16).astype(np.uint16))  # 0 to 4095
    # Given grey of 12 bits in 16, when nothing says so, then white is 65535 and the picture nearly black,
    assert grey(twelve).max() == 16 and read(twelve)[1].deepest == 4095
    # and with the flag it is the picture that 8 bits would have shown.
    assert np.array_equal(grey(twelve, Reading(white=4095)), RAMP)
    # A file that names a camera's range is read by it; one that names its largest value is not.
    named = tiff((RAMP * 16 + RAMP // 16).astype(np.uint16), largest=4095)
    assert np.array_equal(grey(named), RAMP) and read(named)[1].deepest is None
    assert grey(tiff((RAMP * 16).astype(np.uint16), largest=4080)).max() == 16
    # What lies above is white, and no value is below black.
    assert grey(twelve, Reading(white=255)).min() == 0 and grey(twelve, Reading(white=255))[1:].min() == 255


def test_packed_12_bit_tiffs_and_pgm_know_their_range():
    rows = b"".join(struct.pack(">I", (a << 20) | (b << 8))[:3] for a, b in [(0, 4095), (2048, 1024)])
    packed = tiff(np.frombuffer(rows, np.uint8).reshape(1, 6), width=2, height=2, bits=12, rows=2)
    assert grey(packed).tolist() == [[0, 255], [128, 64]]
    pgm = b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 1024)
    assert grey(pgm).tolist() == [[255, 64]] and read(pgm)[1].deepest is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_where_zero_is_white_is_not_inverted(order):
    values = (RAMP * 257).astype(np.uint16)
    # Pillow reads only one byte order of it.
    with contextlib.nullcontext() if order == "<" else pytest.raises(PictureError, match="kind that is not read"):
        assert np.array_equal(grey(tiff(values, order, photometric=0)), 255 - RAMP)


def test_the_upper_half_of_32_bit_grey_is_not_black():
    whole = (RAMP * (2**32 // 256)).astype(np.uint32)
    assert (np.diff(grey(tiff(whole)).astype(int).ravel()) >= 0).all() and grey(tiff(whole)).max() == 255
    signed = (RAMP.astype(np.int64) * 1000 - 1000).astype(np.int32)
    assert grey(tiff(signed)).ravel()[:2].tolist() == [0, 0]


@pytest.mark.parametrize(("content", "reason"), [
    (tiff(np.zeros((4, 4, 3), np.float32), photometric=2), "kind that is not read"),
    (tiff(np.zeros((4, 4), np.uint8), ">", big=True), "BigTIFF")], ids=["floats in colour", "big-endian BigTIFF"])
def test_tiffs_that_are_not_read_are_named(content, reason):
    with pytest.raises(PictureError, match=reason):
        decode(content)


def test_a_little_endian_bigtiff_is_read():
    assert np.array_equal(grey(tiff(RAMP.astype(np.uint8), big=True)), RAMP)


@pytest.mark.parametrize(("masks", "is_read"), [
    ((0xFF0000, 0xFF00, 0xFF), True), ((0xFF000000, 0xFF0000, 0xFF00), True), ((0xFF, 0xFF00, 0xFF0000), False)])
def test_a_bmp_of_32_bits_with_fields_has_the_right_colours_or_is_refused_by_name(masks, is_read):
    # Given red, green and blue stored by these masks,
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30)]

    def stored(colour):
        return sum(value << (mask & -mask).bit_length() - 1 for value, mask in zip(colour, masks, strict=True))
    rows = b"".join(struct.pack("<I", stored(colour)) for colour in colours)
    header = struct.pack("<IiiHHIIiiII3I", 52, 4, 1, 1, 32, 3, len(rows), 0, 0, 0, 0, *masks)
    content = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows), 0, 0, 14 + len(header)) + header + rows
    # when read, then they are those colours, or the file is refused by name.
    with contextlib.nullcontext() if is_read else pytest.raises(PictureError, match="BMP"):
        assert np.asarray(decode(content))[0].tolist() == [list(colour) for colour in colours]


def test_a_data_set_whose_range_is_not_its_models_is_warned_of():
    remarks = Remarks()
    for content in (tiff(np.full((2, 2), n, np.uint16)) for n in (100, 4000)):
        remarks.add(read(content)[1])
    assert remarks.white == 4095
    assert "too dark" in remarks.in_words(Reading())[0] and "too bright" in remarks.in_words(Reading(white=255))[0]
    assert remarks.in_words(Reading(white=4095)) == []


# ---- pages ----


def stack(*pages: np.ndarray, **options) -> bytes:
    first, *others = (Image.fromarray(page) for page in pages)
    return as_bytes(first, "TIFF", save_all=True, append_images=others, **options)


def test_a_page_the_largest_or_the_mean_of_a_stack_is_read():
    pages = [np.full((4, 5), value, np.uint8) for value in (10, 90, 50)]
    content = stack(*pages)
    assert read(content)[1].pages == 3 and grey(content).max() == 10
    for page, value in ((1, 10), (2, 90), (3, 50), ("max", 90), ("mean", 50)):
        assert (grey(content, Reading(page=page)) == value).all()
    with pytest.raises(PictureError, match="3 pages, none with the number 4"):
        decode(content, reading=Reading(page=4))
    # 16 bits likewise; a picture with one page has no choice; a smaller copy of a page is no page.
    assert (grey(stack(*(page.astype(np.uint16) * 16 for page in pages)), Reading("max", white=4080)) == 90).all()
    assert (grey(as_bytes(Image.fromarray(pages[1])), Reading(page=7)) == 90).all()
    copies = bytearray(stack(pages[0], pages[1]))
    second = struct.unpack_from("<I", copies, struct.unpack_from("<I", copies, 4)[0] + 2
                                + 12 * struct.unpack_from("<H", copies, struct.unpack_from("<I", copies, 4)[0])[0])[0]
    struct.pack_into("<HHII", copies, second + 2, 254, 4, 1, 1)
    assert read(bytes(copies))[1].pages == 1


def test_pages_of_different_sizes_or_too_many_are_refused():
    with pytest.raises(PictureError, match="different sizes"):
        decode(stack(np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)), reading=Reading(page="max"))
    with pytest.raises(PictureError, match="pages of 40 x 50"):
        decode(stack(*[np.zeros((50, 40), np.uint8)] * 11), reading=Reading(page="mean", max_megapixels=0.002))


# ---- a missing end ----


def test_a_jpeg_that_lacks_its_end_is_read_and_says_how_much_is_missing():
    whole = drawing(size=(320, 400))
    content = as_bytes(whole, "JPEG", quality=90)
    # Given the file without its last two bytes, then nothing is missing; without a tenth, what is there is as it was,
    picture, facts = read(content[:-2])
    assert facts.missing == 0 and np.array_equal(picture, decode(content))
    picture, facts = read(content[: len(content) * 9 // 10])
    assert 0 < facts.missing < 0.25 and "missing" in facts.note(Reading())
    there = int(400 * (1 - facts.missing)) - 18  # the last row of blocks may be there in part
    assert np.array_equal(np.asarray(picture)[:there], np.asarray(decode(content))[:there])
    # and with half of it gone, or where nothing may be missing, it is refused with the share.
    with pytest.raises(PictureError, match=r"[45]\d% of the picture is missing"):
        decode(content[: len(content) // 2])
    with pytest.raises(PictureError, match=r"\d% of the picture is missing"):
        decode(content[:-2000], reading=Reading(most_missing=0))


def test_other_formats_are_not_guessed():
    for kind in ("PNG", "TIFF", "WEBP"):
        with pytest.raises(PictureError):
            decode(as_bytes(drawing(), kind)[:-100])


# ---- sizes ----


def test_ones_own_disk_may_hold_larger_pictures_than_a_public_demo_takes():
    large = png(6000, 5000, 1, 0, bytes(5000 * 751))
    with pytest.raises(PictureError, match=r"30 megapixels.*--max-megapixels"):
        decode(large)
    assert decode(large, reading=LOCAL).size == (6000, 5000)
    scope = tiff(np.zeros((3000, 4000, 2), np.uint8).view(np.uint16)[..., 0])
    with pytest.raises(PictureError, match="24 MB; at most 20"):
        decode(scope)
    assert decode(scope, reading=LOCAL).size == (4000, 3000)
    with pytest.raises(PictureError, match="30 megapixels"):
        decode(large, reading=Reading(max_megapixels=29))


@pytest.mark.parametrize("flags", [{"page": 0}, {"white": 0}, {"most_missing": 1.0}, {"max_megapixels": 0.0},
                                   {"max_megapixels": 500.0}])
def test_what_makes_no_sense_is_refused(flags):
    with pytest.raises(ZooError, match="--" + next(iter(flags)).replace("_", "-")):
        Reading(**flags)


# ---- tags ----


def test_tags_that_point_to_the_same_bytes_again_and_again_are_refused():
    """A TIFF or a PNG of 1 MB took 4.5 GB."""
    tags = overlapping_tags()
    for content in (tags, png(4, 4, 8, 0, bytes(20), (b"eXIf", tags)),
                    as_bytes(drawing(), "JPEG")[:2] + b"\xff\xe1\xff\xffExif\0\0" + tags[:65525] + b"\xff\xd9"):
        script = ("import resource, sys; from zoo.images import decode; from zoo.errors import PictureError\n"
                  "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                  "try: decode(sys.stdin.buffer.read())\nexcept PictureError: pass\n"
                  "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
        done = subprocess.run([sys.executable, "-c", script], input=content, capture_output=True, cwd=ROOT, check=True)
        assert int(done.stdout) < 50_000


# ---- anything ----


@settings(deadline=None)
@given(arrays(st.sampled_from([np.uint8, np.uint16, np.int32, np.float32, np.float64, np.bool_]),
              array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_any_array_is_a_picture_of_its_size_or_a_picture_error(array):
    try:
        picture = decode(array)
    except PictureError:
        return
    assert picture.mode == "RGB" and picture.size == array.shape[1::-1]


@settings(deadline=None)
@given(st.integers(1, 2**16 - 1), arrays(np.uint16, (3, 4)))
def test_16_bit_grey_is_scaled_by_white_to_the_nearest_grey(white, values):
    expected = np.rint(np.minimum(values, white) * (255 / white))
    assert np.abs(grey(tiff(values), Reading(white=white)) - expected).max() <= 1  # 1: halves


# ---- the host ----


def test_decoding_in_threads_leaves_no_filter_of_warnings():
    # Given a host with filters of its own,
    before = list(warnings.filters)
    broken = as_bytes(drawing(), "JPEG")
    broken = broken[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\x00" + broken[2:]
    # when eight threads decode at a time, some of them what Pillow warns of,
    threads = [threading.Thread(target=lambda: [decode(broken) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # then the filters are as they were, and other warnings are heard.
    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
