"""Checkpoints to resume from: each file is complete or absent.

A checkpoint is one file, step-EPOCH-STEP-DIGEST.pt. DIGEST is the first 16 hex digits of the sha256 of its bytes.
Content and digest arrive by the same rename, so a partial write is always detected. Checkpoints open with
`weights_only=True`: nothing in them can run.
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
    """Write `content` to `path` completely, or leave the old file (zoo.files). Raises TrainingError."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise TrainingError(f"{path} could not be written ({error.strerror or error}); the file that was there before "
                            "is whole. Make room or choose another --out, then continue with --resume.") from error


def save(folder: Path, state: dict, epoch: int, step: int, keep: int = 2) -> Path:
    """Write a checkpoint; remove all except the newest `keep`, damaged ones, and leftovers of a killed run.

    A run continues from its newest whole checkpoint. Files of this step or a later one are therefore damaged and must
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
    """The state in one file, on the CPU; TrainingError if its bytes have changed."""
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
    """Whether a run that diverged has a checkpoint, and what to do."""
    kept = "the last checkpoint is good." if _newest_first(folder) else "no checkpoint was written yet."
    return f"{kept} Try a smaller --lr or --strength."


def load_newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint; None if there is no checkpoint.

    Warns of damaged ones and skips them. TrainingError if all are damaged: you decide whether to start again.
    """
    found = _newest_first(folder)
    for _, _, path in found:
        try:
            return path, load(path)
        except TrainingError as error:
            warnings.warn(f"{error} Falling back to the one before.", stacklevel=2)
    if found:
        raise TrainingError(f"No checkpoint in {folder} is whole ({', '.join(path.name for *_, path in found)}). Start "
                            "again with another --out; if the run's stage 1 was kept, add --stage1.")
    return None


def _newest_first(folder: Path) -> list[tuple[int, int, Path]]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found, reverse=True)
