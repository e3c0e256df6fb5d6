"""Find the sizes that a container hides, before anything is decoded.

Icons and AVIF files hold pictures that may be larger than their outer header says. The tags of a TIFF or of EXIF data
may point to the same bytes many times. Without these checks, a file of 2 kB could be decoded to hundreds of megapixels
or read into gigabytes of tags.
"""

import io
import re
import struct
from collections.abc import Iterator

from PIL import Image

ICON, PNG = b"\0\0\1\0", b"\x89PNG\r\n\x1a\n"
MOST_PARTS = 1000  # of AV1 data before its first picture; real files have a few
MOST_PAGES = 1000  # of a TIFF; later pages are ignored


def largest_of_icon(content: bytes) -> bytes:
    """An icon's largest picture, in a tie the one with most colours: as PNG, or as an icon of this picture alone."""
    entries = [content[at : at + 16] for at in range(6, 6 + 16 * int.from_bytes(content[4:6], "little"), 16)]
    best = max(entries, key=lambda entry: ((entry[0] or 256) * (entry[1] or 256), entry[6] + 256 * entry[7]))
    picture = content[int.from_bytes(best[12:16], "little") :]
    return picture if picture.startswith(PNG) else ICON + b"\1\0" + best[:12] + struct.pack("<I", 22) + picture


def bitmap_of_icon(content: bytes) -> tuple[int, int]:
    """Width and height of the bitmap in an icon with one picture; its mask, of the same height, lies below it."""
    with Image.open(io.BytesIO(content[22:]), formats=("DIB",)) as bitmap:
        return bitmap.width, bitmap.height // 2


def av1_sizes(content: bytes) -> list[tuple[int, int]]:
    """Width and height in each AV1 sequence header of an AVIF file. Raises ValueError if there is none."""
    sizes = [size for data in _av1_data(content) for size in _sequence_sizes(data)]
    if not sizes:
        raise ValueError("no AV1 picture in it")
    return sizes


# ---- the directories of a TIFF, which EXIF data is too (TIFF 6.0, section 2) ----

_BYTES_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_KIND = 254  # of a page: bit 0, a smaller copy of another; bit 2, a mask
TIFF = re.compile(rb"II[*+]\0|MM\0[*+]|MM[*+]\0|II\0[*+]")
# Where Pillow reads EXIF data and the index of an MPO file, when it opens a picture or reads its orientation.
_INSIDE = re.compile(rb"(?:Exif\0\0|eXIf|EXIF....|MPF\0|\0\0\0\0)(?=II\*\0|MM\0\*)", re.DOTALL)


def check_tags(content: bytes) -> None:
    """Raises ValueError if the EXIF tags in a picture's file would take more bytes than the file has."""
    for found in _INSIDE.finditer(content):
        tiff_pages(content[found.end() :], most=1)


def tiff_pages(content: bytes, most: int = MOST_PAGES) -> list[int]:
    """Page numbers of a TIFF, from 0, without pages that are smaller copies or masks of others.

    Raises ValueError if their tags take more bytes than the file has.
    """
    order, big = "<" if content[:1] == b"I" else ">", b"+" in content[2:4]
    long, head, entry = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")
    head_size, entry_size, width = (8, 20, 8) if big else (2, 12, 4)
    pages: list[int] = []
    seen: set[int] = set()
    left, next_at = len(content), 8 if big else 4
    while len(seen) < most and next_at + width <= len(content):
        (at,) = struct.unpack_from(order + long, content, next_at)
        if at in seen or not 0 < at <= len(content) - head_size:
            break
        seen.add(at)
        (count,) = struct.unpack_from(order + head, content, at)
        next_at = at + head_size + count * entry_size
        kind = 0
        for place in range(at + head_size, min(next_at, len(content) - entry_size), entry_size):
            tag, type_, number = struct.unpack_from(order + entry, content, place)
            size, value_at = number * _BYTES_OF_TYPE.get(type_, 0), place + entry_size - width
            if size > width and struct.unpack_from(order + long, content, value_at)[0] + size > len(content):
                break  # as Pillow does: it reads broken data no further
            left -= size if size > width else entry_size
            if left < 0:
                raise ValueError("its tags are larger than the file")
            if tag == _KIND:
                kind = struct.unpack_from(order + ("H" if type_ == 3 else "I"), content, value_at)[0]
        if not pages or not kind & 5:
            pages.append(len(seen) - 1)
    return pages or [0]


# ---- the boxes of an AVIF file (ISO 14496-12, 23008-12) ----


def _av1_data(content: bytes) -> Iterator[bytes]:
    """The data of each AV1 item and of each track's first picture.

    In all at most twice the file, as alpha may share bytes.
    """
    outer, left = _boxes(content), 2 * len(content)

    def cut(source: bytes, extents: list[tuple[int, int]]) -> bytes:
        nonlocal left
        left -= sum(size or len(source) for _, size in extents)
        if left < 0:
            raise ValueError("its items overlap")
        return b"".join(source[at : at + size] if size else source[at:] for at, size in extents)

    for meta in outer.get(b"meta", ()):
        parts = _boxes(meta[4:])
        coded = {item for info in parts.get(b"iinf", ()) for item in _coded_items(info)}
        for places in parts.get(b"iloc", ()):
            for item, method, extents in _places(places):
                if item in coded:
                    source = b"".join(parts.get(b"idat", ())) if method == 1 else content
                    yield cut(source, extents)
    for track in (track for movie in outer.get(b"moov", ()) for track in _boxes(movie).get(b"trak", ())):
        table = track
        for kind in (b"mdia", b"minf", b"stbl"):
            table = b"".join(_boxes(table).get(kind, ()))
        parts = _boxes(table)
        for chunks, width in ((b"stco", 4), (b"co64", 8)):
            for offsets, sizes in zip(parts.get(chunks, ()), parts.get(b"stsz", ()), strict=False):
                at = int.from_bytes(offsets[8 : 8 + width], "big")
                size = int.from_bytes(sizes[4:8], "big") or int.from_bytes(sizes[12:16], "big")
                yield cut(content, [(at, size)])


def _boxes(data: bytes) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        end = at + size if size else len(data)
        found.setdefault(kind, []).append(data[start:end])
        at = max(end, start)
    return found


def _coded_items(info: bytes) -> Iterator[int]:
    for entry in _boxes(info[6 if info[0] == 0 else 8 :]).get(b"infe", ()):
        width = 2 if entry[0] == 2 else 4
        if entry[6 + width : 10 + width] == b"av01":
            yield int.from_bytes(entry[4 : 4 + width], "big")


def _places(data: bytes) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """For each item: its id, whether it is in the file (0) or in idat (1), and offsets and lengths."""
    reader = io.BytesIO(data)

    def number(width: int) -> int:
        return int.from_bytes(reader.read(width), "big")

    version = number(4) >> 24
    sizes = number(2)
    of_offset, of_length, of_base = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    of_index, of_id = sizes & 15 if version else 0, 4 if version == 2 else 2
    for _ in range(number(of_id)):
        item, method = number(of_id), number(2) & 15 if version else 0
        number(2)
        base = number(of_base)
        extents = [(number(of_index), base + number(of_offset), number(of_length))[1:] for _ in range(number(2))]
        yield item, method, extents
        if reader.tell() >= len(data):
            return


# ---- AV1 ----


def _sequence_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """The size in each sequence header among the open bitstream units (AV1 specification, 5.3)."""
    at = 0
    for _ in range(MOST_PARTS):
        if at >= len(data):
            return
        head, size, shift = data[at], 0, 0
        at += 1 + (head >> 2 & 1)
        if head & 2:
            while True:
                size |= (data[at] & 127) << shift
                at, shift = at + 1, shift + 7
                if data[at - 1] < 128:
                    break
        else:
            size = len(data) - at
        if head >> 3 & 15 == 1:
            yield _sequence_size(data[at : at + size])
        at += size
    raise ValueError(f"AV1 data in over {MOST_PARTS} parts")


def _sequence_size(header: bytes) -> tuple[int, int]:
    """The largest width and height that a sequence header allows (5.5)."""
    bits = iter("".join(f"{byte:08b}" for byte in header[:200]))

    def take(n: int) -> int:
        return int("".join(next(bits) for _ in range(n)) or "0", 2)

    take(4)  # profile, still
    if take(1):  # the short header of stills
        take(5)
    else:
        delay = 0
        if take(1):  # timing
            take(64)
            if take(1):
                zeros = 0
                while not take(1):
                    zeros += 1
                take(zeros)
            if take(1):
                delay = take(5) + 1
                take(42)
        display_delay = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if delay and take(1):
                take(2 * delay + 1)
            if display_delay and take(1):
                take(4)
    width, height = take(4) + 1, take(4) + 1
    return take(width) + 1, take(height) + 1
