"""Models on the Hugging Face Hub: files of one commit, each fetched when it is needed, every byte checked.

huggingface_hub handles the cache (HF_HOME), resuming, tokens (HF_TOKEN, `hf auth login`), the endpoint (HF_ENDPOINT),
HF_HUB_OFFLINE and the progress bar. This module adds checks of hashes, time limits, and one error that says what to
do. A cached file of a pinned commit makes no request.
"""

import errno
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from zoo.errors import HubError, ModelFolderError, ZooError
from zoo.model_folder import MANIFEST, ModelFolder

T = TypeVar("T")

PREFIX, OWNER = "hf:", "METASAUG_HUB_OWNER"
PATIENCE = 45.0  # seconds that a load may wait, plus `_time_for` its bytes
SLOWEST, SMALL = 200_000, 3_000_000  # bytes a second, bytes
PAUSES = (0.5, 2.0)  # seconds between tries

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def parse(name: str) -> tuple[str, str | None]:
    """"hf:owner/repo@revision" -> ("owner/repo", "revision"); ("owner/repo", None) without one. Raises HubError."""
    repo, at, revision = name.removeprefix(PREFIX).partition("@")
    if not _REPO.fullmatch(repo) or bool(at) != bool(revision.strip()):
        raise HubError(f"{name!r} is not the name of a model on the Hub: hf:owner/repo, or hf:owner/repo@revision with "
                       "a branch, tag or commit.")
    return repo, revision or None


def own_copies() -> str | None:
    """The owner on the Hub (METASAUG_HUB_OWNER) whose repositories replace the registry's for models not bundled."""
    owner = os.environ.get(OWNER, "").strip()
    if owner and not _REPO.fullmatch(f"{owner}/x"):
        raise HubError(f"{OWNER}={owner!r} is not a user or organisation on the Hub, the part before a repository's /.")
    return owner or None


class HubFolder(ModelFolder):
    """A model folder on the Hub, at the commit that `revision` named when it was opened.

    repo              owner/name                revision  branch, tag or commit; None: the newest of main
    manifest_sha256   where the registry has it; without it, files are checked against the repository's own manifest
    files             files to fetch at once, within a common time limit. Others are fetched when they are read
    local_files_only  use only the cache        token     of the Hub, instead of the one that is logged in
    cache             folder of the cache, instead of the one in HF_HOME
    Raises HubError. Wrong bytes are fetched once more, and removed from the cache if they stay wrong.
    """

    def __init__(self, repo: str, revision: str | None = None, manifest_sha256: str | None = None,
                 files: Sequence[str] = (), local_files_only: bool = False, token: str | None = None,
                 cache: Path | None = None):
        self.repo, self.revision = repo, revision or "main"
        self._local, self._token, self._cache = local_files_only, token, cache
        until = time.monotonic() + PATIENCE
        try:
            manifest = self._download(MANIFEST, until)
        except HubError as error:
            if getattr(error.__cause__, "errno", None) not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            manifest = self._in_cache(error)
        self.revision = manifest.parent.name  # the commit
        self._opened_twice(lambda: super(HubFolder, self).__init__(manifest.parent, manifest_sha256), MANIFEST)
        for name in files:
            if name in self.files:
                until += _time_for(self.files[name][0])
                self._fetch(name, until)

    def _in_cache(self, error: HubError) -> Path:
        """The manifest in a read-only cache; the Hub may have a newer commit."""
        self._local = True
        try:
            manifest = self._download(MANIFEST, time.monotonic() + PATIENCE)
        except HubError:
            raise error from error.__cause__
        warnings.warn(f"{error} Until then {PREFIX}{self.repo} is used as it is in the cache, commit "
                      f"{manifest.parent.name}; revision= with that commit says so without this warning.", stacklevel=4)
        return manifest

    @property
    def source(self) -> str:
        return f"{PREFIX}{self.repo}@{self.revision}"

    def read(self, name: str) -> bytes:
        if name not in self.files:
            return super().read(name)  # raises the error
        self._fetch(name)
        return self._opened_twice(lambda: super(HubFolder, self).read(name), name)

    def _may_lack(self, name: str) -> bool:
        return not (self.path / name).exists()

    def _fetch(self, name: str, until: float | None = None) -> None:
        if self._may_lack(name):
            self._download(name, until or time.monotonic() + PATIENCE + _time_for(self.files[name][0]))

    def _opened_twice(self, attempt: Callable[[], T], name: str) -> T:
        """The result of `attempt`; if the file's bytes are wrong, it is fetched again and tried once more."""
        try:
            return attempt()
        except ModelFolderError:
            size = 0 if name == MANIFEST else self.files[name][0]
            path = self._download(name, time.monotonic() + PATIENCE + _time_for(size), again=True)
        try:
            return attempt()
        except ModelFolderError as error:
            for wrong in {Path(os.path.realpath(path)), path}:  # no other process should find them in the cache
                with suppress(OSError):
                    wrong.unlink()
            raise HubError(f"{self.source}: {name} came with wrong bytes twice, and nothing of it was used. Try again "
                           f"later, or on another network; if this persists, the repository is damaged. ({error})"
                           ) from error

    def _download(self, name: str, until: float, again: bool = False) -> Path:
        from huggingface_hub import constants, hf_hub_download

        if again and (self._local or constants.is_offline_mode()):
            raise HubError(f"{self.source}: {name} is damaged in the cache, and being offline, it cannot be "
                           "fetched again: load the model once with a connection.")
        try:
            return Path(within(until, lambda: _patiently(lambda: hf_hub_download(
                self.repo, name, revision=self.revision, token=self._token, force_download=again,
                local_files_only=self._local, cache_dir=self._cache))))
        except ZooError:
            raise
        except Exception as error:  # of any of its libraries: httpx, hf_xet, the file system
            raise HubError(in_words(error, self.repo, self.revision, name)) from error


def _time_for(size: int) -> float:
    """Seconds allowed: at most a minute in all for a small model, as long as a slow line needs for a large one."""
    return size / SLOWEST if size < SMALL else size * 8 / SLOWEST


def _patiently(call: Callable[[], T]) -> T:
    """Retry `call` if the connection broke or the server failed; huggingface_hub does so in some cases only."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if status < 500 and not (status == 0 and _broken_line(error)):
                raise
            time.sleep(pause)
    return call()


def _broken_line(error: BaseException) -> bool:
    """Whether the connection failed or closed, or the number of bytes was not the announced one."""
    from huggingface_hub.errors import HTTPError

    return isinstance(error, (TimeoutError, HTTPError)) or "Consistency check failed" in str(error)


def within(until: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; TimeoutError if that takes longer than `until` (a time.monotonic).

    huggingface_hub waits six times up to 60 s for a silent server, and without limit for a server that sends slowly.
    The thread that is left behind writes only to the cache, and there only whole files.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="zoo.hub", daemon=True)
    thread.start()
    thread.join(max(0.0, until - time.monotonic()))
    if not outcome:
        raise TimeoutError("no answer, or a very slow one")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def in_words(error: BaseException, repo: str, revision: str, name: str) -> str:
    """A message: what went wrong with a file of a repository, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if error.__cause__ is None or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            return (f"{PREFIX}{repo}@{revision} is not in the cache ({constants.HF_HUB_CACHE}, {name} is missing), and "
                    "cannot be fetched offline (HF_HUB_OFFLINE, local_files_only): load it once with a connection.")
        error = error.__cause__  # why it could not be fetched
    where = f"{PREFIX}{repo}"
    if isinstance(error, errors.GatedRepoError):  # before its parent, RepositoryNotFoundError
        return (f"{where} is gated: ask for access on its page on the Hub; then log in with that account "
                "(`hf auth login`, or HF_TOKEN).")
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"The Hub has no repository {repo}, or it is private: check the name, and log in with an account that "
                "may read it (`hf auth login`, or HF_TOKEN).")
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{where} has no revision {revision!r}: name a branch, a tag or a commit, or none for main's newest."
    if isinstance(error, errors.EntryNotFoundError):
        return (f"{where} at {revision} holds no model of the zoo: it has no {MANIFEST}. `metasaug publish` makes such "
                "repositories." if name == MANIFEST else
                f"{where} at {revision} lacks {name}, though its {MANIFEST} names it: publish it again.")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (f"The Hub refuses {'the token' if status == 401 else 'access'} for {where} (HTTP {status}): log in "
                "with an account that has access (`hf auth login`, or HF_TOKEN), or remove an old token.")
    endpoint = constants.ENDPOINT
    if status is not None:
        return (f"The Hub ({endpoint}) answered HTTP {status} for {name} of {where}: try again "
                f"{'in some minutes' if status == 429 else 'later'}. What is in the cache loads meanwhile with "
                "local_files_only=True.")
    if _broken_line(error):
        return (f"{name} of {where} did not come through from {endpoint}: {_reason(error)}. Check the connection, a "
                "proxy, HF_ENDPOINT, and try again; what is in the cache loads with local_files_only=True.")
    if isinstance(error, OSError) and error.errno is not None:
        return (f"{name} of {where} cannot be written to the cache {constants.HF_HUB_CACHE}: "
                f"{error.strerror or error}. Make room, or set HF_HOME to another folder.")
    return f"{name} of {where} did not come through: {_reason(error)}. Try again."


def _reason(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return first.rstrip(". ") or type(error).__name__
