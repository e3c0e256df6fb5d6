"""Read the pictures in a zip one after another, without unpacking it to the disk.

A dangerous archive is refused as a whole, before any file in it is read: zip bombs, names outside the folder, links,
encryption, archives inside, too many entries. A file that is only damaged, or is not a picture, is one bad picture
among good ones.
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from zoo.errors import PictureError
from zoo.files import no_picture, passed_over_in_words
from zoo.images import NamedPicture
from zoo.pixels import MAX_FILE_BYTES

MAX_ENTRIES = 5_000
MAX_UNPACKED_BYTES = 2_000_000_000
MAX_RATIO = 100  # unpacked size / packed size, of a file over SMALL; pictures are compressed already and shrink little
SMALL = 1_000_000
MAX_DIRECTORY_BYTES = 4_000_000  # the list of entries, which Python's zipfile reads whole: 800 bytes per entry

_ARCHIVES = (".zip", ".jar", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_END, _ZIP64_LOCATOR = b"PK\x05\x06", b"PK\x06\x07"
_END_SIZE, _LOCATOR_SIZE = 22, 20


def is_zip(path: str | os.PathLike) -> bool:
    """Whether a file is a zip, by its name or its first bytes."""
    try:
        if not os.path.isfile(path):  # reading a pipe could block
            return False
        if Path(path).suffix.lower() == ".zip":
            return True
        with open(path, "rb") as file:
            return file.read(4) in (b"PK\x03\x04", _END)
    except (OSError, ValueError):
        return False


def open_zip(
    path: str | os.PathLike, name: str | None = None, passed_over: Counter[str] | None = None
) -> tuple[list[str], Iterator[NamedPicture]]:
    """The names of the pictures in a zip, and the pictures themselves, each read when it is needed.

    name         the archive's name in messages; its path by default
    passed_over  counts the files that are not pictures by name, as zoo.files.walk does
    A picture that cannot be read comes with its PictureError. Raises PictureError if the archive is refused or holds
    no pictures.
    """
    passed_over = Counter() if passed_over is None else passed_over
    name = name or os.fspath(path)
    try:
        with open(path, "rb") as file:
            _refuse_long_list(file, name)
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _refuse_dangers(archive.infolist(), name)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, struct.error, ValueError,
            UnicodeDecodeError) as error:
        raise PictureError(f"{name} is not a zip archive, or is damaged: {error}.") from error
    except OSError as error:
        raise PictureError(f"{name} cannot be read: {error.strerror or error}.") from error
    pictures = []
    for member in members:
        if (kind := no_picture(member.filename)) is None:
            pictures.append(member)
        else:
            passed_over[kind] += 1
    if not pictures:
        raise PictureError(f"{name} holds no pictures. {passed_over_in_words(passed_over)}".strip())
    return [member.filename for member in pictures], _read(path, pictures)


def _read(path: str | os.PathLike, members: list[zipfile.ZipInfo]) -> Iterator[NamedPicture]:
    with zipfile.ZipFile(path) as archive:
        for member in members:
            yield NamedPicture(member.filename, _content(archive, member))


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | PictureError:
    if member.file_size > MAX_FILE_BYTES:
        return PictureError(f"{member.filename} has {member.file_size / 1e6:.0f} MB; at most "
                            f"{MAX_FILE_BYTES / 1e6:.0f} MB are read.")
    try:
        with archive.open(member) as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        return PictureError(f"{member.filename} is damaged in the archive: {error}.")


def _refuse_long_list(file, name: str) -> None:
    """Check the length of the list of entries, from the archive's last bytes, before zipfile reads the whole list."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_SIZE - _LOCATOR_SIZE - 65_536))
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_SIZE:
        raise PictureError(f"{name} is not a zip archive, or is cut off.")
    entries, directory = struct.unpack_from("<HI", tail, at + 10)
    if tail[max(0, at - _LOCATOR_SIZE) : at].startswith(_ZIP64_LOCATOR) or entries == 0xFFFF:
        raise PictureError(f"{name} is a zip64 archive, for more or larger files than are read here: at most "
                           f"{MAX_ENTRIES:,} files.")
    if entries > MAX_ENTRIES or directory > MAX_DIRECTORY_BYTES:
        raise PictureError(f"{name} has {entries:,} entries: at most {MAX_ENTRIES:,} are read. Split it, or unpack it "
                           "and name the folder.")


def _refuse_dangers(members: list[zipfile.ZipInfo], name: str) -> None:
    if len(members) > MAX_ENTRIES:
        raise PictureError(f"{name} has {len(members):,} entries: at most {MAX_ENTRIES:,} are read. Split it, or "
                           "unpack it and name the folder.")
    for member in members:
        inside = _printable(member.filename)
        parts = re.split(r"[/\\]", member.orig_filename)
        if ".." in parts or member.orig_filename[:1] in ("/", "\\") or re.match(r"[A-Za-z]:", parts[0]):
            raise PictureError(f"{name} is refused: {inside} would leave the folder that it is unpacked in.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise PictureError(f"{name} is refused: {inside} is a link, not a file.")
        if member.flag_bits & 0x41:
            raise PictureError(f"{name} is refused: {inside} is encrypted. Zip the pictures without a password.")
        if inside.lower().endswith(_ARCHIVES):
            raise PictureError(f"{name} is refused: {inside} is an archive inside the archive. Unpack that one first.")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise PictureError(f"{name} is refused: {inside} is packed by an unusual method. Zip the pictures again.")
        if member.file_size > SMALL and member.file_size > MAX_RATIO * member.compress_size:
            raise PictureError(f"{name} is refused as a zip bomb: {inside} would grow from "
                               f"{member.compress_size / 1e6:.2f} to {member.file_size / 1e6:.0f} MB.")
    unpacked = sum(member.file_size for member in members)
    if unpacked > MAX_UNPACKED_BYTES:
        raise PictureError(f"{name} is refused: it would unpack to {unpacked / 1e9:.1f} GB; at most "
                           f"{MAX_UNPACKED_BYTES / 1e9:.0f} GB are read.")
    ends_at = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < ends_at:
            raise PictureError(f"{name} is refused as a zip bomb: its files overlap.")
        ends_at = member.header_offset + 30 + member.compress_size


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:120]
