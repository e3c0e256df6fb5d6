"""Errors of the zoo: catch `ZooError`. Every message says what to do next."""


class ZooError(Exception):
    """Any error of the zoo, of training or of export that the user can fix."""


class UnknownModelError(ZooError):
    """A name that is neither a registry entry nor a folder; the message suggests similar names."""


class UnpublishedModelError(ZooError):
    """A registry entry without published weights; the message says how to make them."""


class ModelFolderError(ZooError):
    """A model folder with a missing, changed or malformed file; nothing of it was used."""


class HubError(ZooError):
    """A model that could not be fetched from the Hub or published to it.

    Causes: no connection, no such repository or revision, no permission, wrong bytes, no space in the cache.
    """


class BackendError(ZooError):
    """A requested backend or device that is not available."""


class DataError(ZooError):
    """Pictures of a data set, or their table, that are missing, unreadable or contradictory."""


class PictureError(ZooError):
    """Bytes that are not a picture, a truncated file, an unsupported format, or a picture over the caps."""


class Interrupted(ZooError):  # noqa: N818  (a request that was honoured, not a fault)
    """SIGINT, SIGTERM or SIGHUP arrived; what was done so far is kept. `exit_code` is 130, 143 or 129."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
