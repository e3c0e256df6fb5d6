"""Write files whole or not at all, handle file names as text, and find the pictures under a folder."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Endings of pictures: those that zoo.images reads, and those that it refuses. Both count as pictures, so that a phone's
# HEIC or a camera's raw file gives an error with a reason and is never skipped silently.
READ_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
                 ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx", ".mpo", ".tga", ".pcx"}
RAW_SUFFIXES = {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mrw", ".nef",
                ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}
OTHER_SUFFIXES = {".heic", ".heif", ".hif", ".svg", ".jxl", ".psd", ".dcm", ".exr", ".czi", ".lif", ".nd2"}
PICTURE_SUFFIXES = READ_SUFFIXES | RAW_SUFFIXES | OTHER_SUFFIXES

# What operating systems and archivers leave in folders, besides files whose name starts with a dot.
LEFT_BEHIND = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information",
               "lost+found"}


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, or leave the old file: temporary file, fsync, rename, fsync of the folder.

    Creates the folder. Raises OSError and leaves no temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def printable(text: str) -> str:
    """A file name as text; invalid bytes (Linux allows any) become \\udcXX."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def same_text(text: str) -> str:
    """The text with one spelling of accents (NFC): macOS file names have another than tables that people type."""
    return unicodedata.normalize("NFC", text)


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def left_behind(name: str) -> str | None:
    """The kind of a file that no person put there: "hidden", or the name itself; else None."""
    return "hidden" if name.startswith(".") else name if name.casefold() in LEFT_BEHIND else None


def no_picture(path: str) -> str | None:
    """The kind of a file that is not a picture by its name: "hidden", "Thumbs.db", ".csv"; None for a picture."""
    if kind := next(filter(None, map(left_behind, re.split(r"[/\\]", path))), None):
        return kind
    ending = suffix(path)
    return None if ending in PICTURE_SUFFIXES else ending or "without ending"


def walk(root: Path, passed_over: Counter[str] | None = None) -> Iterator[tuple[str, str | None]]:
    """Every picture under `root`, as (name, None); the name is relative to `root`, with "/", as the disk spells it.

    passed_over  counts the files that are not pictures by name
    Links are followed, unless they lead back to a folder above. A folder that cannot be listed, or a broken link, comes
    with the reason in place of None. The order is by name, folder by folder.
    """
    passed_over = Counter() if passed_over is None else passed_over
    open_folders = [("", _entries(root, ""), frozenset({folder_identity(root)}))]
    while open_folders:
        prefix, entries, above = open_folders[-1]
        entry = next(entries, None)
        if entry is None:
            open_folders.pop()
        elif isinstance(entry, OSError):
            yield prefix[:-1] or ".", f"{printable(str(root / prefix))} cannot be listed: {entry.strerror}."
        elif kind := left_behind(entry.name):
            passed_over[kind] += 1
        elif (identity := folder_identity(entry)) is not None:
            if identity not in above:
                inside = f"{prefix}{entry.name}/"
                open_folders.append((inside, _entries(root, inside), above | {identity}))
        elif (kind := no_picture(entry.name)) is None:
            yield prefix + entry.name, None
        elif entry.is_symlink() and not os.path.exists(entry.path):
            yield prefix + entry.name, f"{printable(prefix + entry.name)} is a link to nothing."
        else:
            passed_over[kind] += 1


def _entries(root: Path, prefix: str) -> "Iterator[os.DirEntry[str] | OSError]":
    try:
        with os.scandir(root / prefix) as entries:
            found = sorted(entries, key=lambda entry: same_text(entry.name))
    except OSError as error:
        yield error
    else:
        yield from found


def folder_identity(path: "Path | os.DirEntry[str]") -> tuple[int, int] | None:
    """Equal for the same folder under any name, links followed; None if the path is not a folder."""
    try:
        status = os.stat(path) if path.is_dir() else None
    except OSError:  # a link to itself, or gone meanwhile
        return None
    return None if status is None else (status.st_dev, status.st_ino)


def passed_over_in_words(passed_over: Counter[str]) -> str:
    """"Passed over, not pictures by their names: 2 .csv, 1 Thumbs.db."; empty if there were none."""
    kinds = [f"{n:,} {kind}" for kind, n in passed_over.most_common(8)]
    more = [f"{passed_over.total() - sum(n for _, n in passed_over.most_common(8)):,} others"] * (len(passed_over) > 8)
    return f"Passed over, not pictures by their names: {', '.join(kinds + more)}." if kinds else ""
