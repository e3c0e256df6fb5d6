"""The folder of uploads with a quota for all visitors together. The longest unused file is deleted first."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

QUOTA = 2_000_000_000  # bytes, of all uploads and the files that the demo made from them
MOST_AT_ONCE = 500_000_000  # bytes, of one request
UNFINISHED = 120.0  # seconds after which an upload that broke off is deleted
UNUSED = 3600.0  # seconds after which an unused file is deleted


class Uploads:
    """Uploads below `folder`, at most `quota` bytes."""

    def __init__(self, folder: Path, quota: int = QUOTA):
        self.folder, self.quota = Path(os.path.realpath(folder)), quota
        self._coming = 0  # bytes that requests under way may still bring
        self._lock = threading.Lock()

    def holds(self, path: Any) -> bool:
        """Whether the path in a request is a file in the folder."""
        if not isinstance(path, str) or not path or "\0" in path or len(path) > 4096:
            return False
        real = os.path.realpath(path)
        return real.startswith(f"{self.folder}{os.sep}") and os.path.isfile(real)

    @contextmanager
    def room_for(self, size: int | None) -> Iterator[int | None]:
        """Reserve room for an upload of `size` bytes (None: not announced). Yields the bytes; None: no room now."""
        wanted = MOST_AT_ONCE if size is None else size
        with self._lock:
            room = wanted <= MOST_AT_ONCE and self._coming + wanted <= self.quota
            self._coming += wanted * room
        try:
            if room:
                self.tidy()
            yield wanted if room else None
        finally:
            with self._lock:
                self._coming -= wanted * room

    def full(self, size: int | None) -> str:
        if (size or 0) > MOST_AT_ONCE:
            return f"The upload has {(size or 0) / 1e6:,.0f} MB; at most {MOST_AT_ONCE / 1e6:,.0f} MB at a time."
        return "Other visitors are uploading a lot at the moment: try again in a minute."

    def tidy(self) -> None:
        """Delete broken uploads, files unused for an hour and, over the quota, the longest unused files."""
        now, files = time.time(), []
        for at, _, names in os.walk(self.folder):
            for name in names:
                path = Path(at, name)
                with suppress(OSError):
                    found = path.stat()
                    files.append((max(found.st_mtime, found.st_atime), found.st_size, path))
        left = sum(size for _, size, _ in files) + self._coming
        for used, size, path in sorted(files):
            unfinished = path.parent == self.folder and now - used > UNFINISHED
            if left > self.quota or unfinished or now - used > UNUSED:
                with suppress(OSError):
                    path.unlink()
                    left -= size
                with suppress(OSError):
                    path.parent.rmdir()  # only where it is empty


def used(path: str) -> None:
    """Mark a file as used now."""
    with suppress(OSError):
        os.utime(path)
