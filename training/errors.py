"""Errors of training, written for users. All are `zoo.ZooError`s."""

from pathlib import Path

from zoo import errors
from zoo.errors import DataError, ZooError

__all__ = ["DataError", "DivergenceError", "Interrupted", "TrainingError"]


class TrainingError(ZooError):
    """The run cannot start or continue; the message says what to do."""


class DivergenceError(TrainingError):
    """A NaN or an infinity, found before the update that would have spread it."""


class Interrupted(errors.Interrupted, TrainingError):  # noqa: N818
    """A signal arrived; the state is saved.

    model   the model folder that the run has left so far, if any
    """

    model: Path | None = None
