"""Turn the death of a decoding process into an error that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from training.errors import TrainingError


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Raise a TrainingError instead of torch's RuntimeError about a dead worker."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError("A process that decodes pictures was killed, perhaps because memory ran out. Continue "
                            "from the last checkpoint with --resume and fewer --workers.") from error
