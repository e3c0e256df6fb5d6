"""Files: written whole or not at all, names as text, and the one walk that finds the pictures under a folder."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Pictures by their ending: those that zoo.images reads, and those that it refuses by name. Both are listed, so that a
# phone's HEIC or a camera's raw file is an error with a reason and never missing without a word.
READ_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
                 ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx", ".mpo", ".tga", ".pcx"}
RAW_SUFFIXES = {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mrw", ".nef",
                ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}
OTHER_SUFFIXES = {".heic", ".heif", ".hif", ".svg", ".jxl", ".psd", ".dcm", ".exr", ".czi", ".lif", ".nd2"}
PICTURE_SUFFIXES = READ_SUFFIXES | RAW_SUFFIXES | OTHER_SUFFIXES

# What operating systems and archivers leave in folders, beside files whose name starts with a dot.
LEFT_BEHIND = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information",
               "lost+found"}


def write_atomically(path: Path, content: bytes) -> None:
    """All of `content` under `path`, or what was there before: temporary file, fsync, rename, fsync of the folder.

    Makes the folder. Raises OSError, with no temporary file left.
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
    """File names that are no text (Linux allows any bytes) with their odd bytes as \\udcXX."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def same_text(text: str) -> str:
    """One spelling of accents (NFC): macOS keeps another in file names than people type into tables."""
    return unicodedata.normalize("NFC", text)


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def left_behind(name: str) -> str | None:
    """What no person put into a folder: "hidden", or the name itself; else None."""
    return "hidden" if name.startswith(".") else name if name.casefold() in LEFT_BEHIND else None


def no_picture(path: str) -> str | None:
    """What a file is by its name, where that is not a picture's: "hidden", "Thumbs.db", ".csv"; else None."""
    if kind := next(filter(None, map(left_behind, re.split(r"[/\\]", path))), None):
        return kind
    ending = suffix(path)
    return None if ending in PICTURE_SUFFIXES else ending or "without ending"


def walk(root: Path, passed_over: Counter[str] | None = None) -> Iterator[tuple[str, str | None]]:
    """Every picture under `root`: its name relative to it, with "/", as the disk spells it; and None.

    passed_over  counts what is not a picture by its name
    Links are followed, unless they lead back to a folder above. A folder that cannot be listed, or a link to nothing,
    comes with the reason in place of None. In the order of the names, folder by folder.
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
    """Equal for the same folder under any name, links followed; None for what is not a folder."""
    try:
        status = os.stat(path) if path.is_dir() else None
    except OSError:  # a link to itself, or gone meanwhile
        return None
    return None if status is None else (status.st_dev, status.st_ino)


def passed_over_in_words(passed_over: Counter[str]) -> str:
    """"Passed over, not pictures by their names: 2 .csv, 1 Thumbs.db."; nothing where there was none."""
    kinds = [f"{n:,} {kind}" for kind, n in passed_over.most_common(8)]
    more = [f"{passed_over.total() - sum(n for _, n in passed_over.most_common(8)):,} others"] * (len(passed_over) > 8)
    return f"Passed over, not pictures by their names: {', '.join(kinds + more)}." if kinds else ""
