"""Files that are whole or not there, and their names as text."""

import os
from pathlib import Path


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
