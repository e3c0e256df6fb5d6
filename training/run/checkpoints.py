"""Checkpoints to resume from: each file is complete or absent.

A checkpoint is one file, step-EPOCH-STEP-DIGEST.pt, the digest being the first 16 hex digits of the sha256 of its
bytes: content and check arrive by the same rename, so a torn write can never look good. It opens with
`weights_only=True`; nothing in it can run.
"""

import hashlib
import io
import pickle
import re
import warnings
from pathlib import Path

import torch

from training.errors import TrainingError
from zoo.files import write_atomically

NAME = re.compile(r"step-(\d+)-(\d+)-([0-9a-f]{16})\.pt")


def write(path: Path, content: bytes) -> None:
    """Write `content` to `path` completely, or leave what was there (zoo.files). Raises TrainingError."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise TrainingError(f"{path} could not be written ({error.strerror or error}); the file that was there before "
                            "is whole. Make room or choose another --out, then go on with --resume.") from error


def save(folder: Path, state: dict, epoch: int, step: int, keep: int = 2) -> Path:
    """Write a checkpoint, drop all but the newest `keep`, and what damage or a kill has left.

    A run goes on from its newest whole checkpoint: what stands there from this step on or later is damaged, and must
    not count among the kept.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"step-{epoch:05d}-{step:07d}-{digest}.pt"
    write(path, content)
    before = [old for *at, old in _newest_first(folder) if at < [epoch, step]]
    later = [old for *at, old in _newest_first(folder) if at >= [epoch, step] and old != path]
    for old in (*before[keep - 1 :], *later, *folder.glob(".step-*.tmp")):
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict:
    """The state in one file, on the CPU; TrainingError where its bytes are not those that were written."""
    match = NAME.fullmatch(path.name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"checkpoint {path} cannot be read: {error.strerror or error}.") from error
    if match is None or hashlib.sha256(content).hexdigest()[:16] != match[3]:
        raise TrainingError(f"checkpoint {path} is damaged: its bytes do not match the digest in its name.")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise TrainingError(f"checkpoint {path} is refused: it holds more than tensors and numbers.") from error


def whats_good(folder: Path) -> str:
    """What is left of a run that diverged, and what to do."""
    kept = "the last checkpoint is good." if _newest_first(folder) else "no checkpoint was written yet."
    return f"{kept} Try a smaller --lr or --strength."


def load_newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint, or None where there never was one; a damaged one is named in a warning and passed
    over. TrainingError where all are damaged: to start again is for a person to decide."""
    found = _newest_first(folder)
    for _, _, path in found:
        try:
            return path, load(path)
        except TrainingError as error:
            warnings.warn(f"{error} Falling back to the one before.", stacklevel=2)
    if found:
        raise TrainingError(f"No checkpoint in {folder} is whole ({', '.join(path.name for *_, path in found)}). Start "
                            "again with another --out; if the run's stage 1 was kept, with --stage1.")
    return None


def _newest_first(folder: Path) -> list[tuple[int, int, Path]]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found, reverse=True)
