"""Errors of the zoo: catch `ZooError`. Every message says what to do next."""


class ZooError(Exception):
    """Anything that goes wrong in the zoo, in training or in export and that the person at the keyboard can mend."""


class UnknownModelError(ZooError):
    """A name that is neither a registry entry nor a folder; the message suggests near misses."""


class UnpublishedModelError(ZooError):
    """A registry entry whose weights are not out yet; the message says how to make them."""


class ModelFolderError(ZooError):
    """A model folder with a file missing, changed or not of this format; nothing of it was used."""


class HubError(ZooError):
    """A model on the Hub that could not be had: no way there, no such repository or revision, no permission, wrong
    bytes, no room in the cache; or one that could not be published."""


class BackendError(ZooError):
    """A backend or device that was asked for and is not here."""


class DataError(ZooError):
    """Pictures of a data set, or the table of them, that are missing, unreadable or contradict each other."""


class PictureError(ZooError):
    """Bytes that are no picture, a truncated file, an unsupported format, or a picture over the caps."""


class Interrupted(ZooError):  # noqa: N818  (it is a request that was honoured, not a fault)
    """SIGINT, SIGTERM or SIGHUP arrived; what was done so far is kept. `exit_code` is 130, 143 or 129."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
