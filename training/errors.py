"""What training raises for the person at the keyboard; all of it is a `zoo.ZooError`."""

from pathlib import Path

from zoo.errors import DataError, ZooError

__all__ = ["DataError", "DivergenceError", "Interrupted", "TrainingError"]


class TrainingError(ZooError):
    """A run that cannot start or cannot go on; the message says what to do."""


class DivergenceError(TrainingError):
    """A NaN or an infinity, found before the update that would have spread it."""


class Interrupted(TrainingError):  # noqa: N818  (it is a request that was honoured, not a fault)
    """SIGINT, SIGTERM or SIGHUP arrived; the state is saved. `exit_code` is 130, 143 or 129.

    model   the model folder that the run has left so far, if any
    """

    model: Path | None = None

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
