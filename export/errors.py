"""Errors of export; `zoo.ZooError`s."""

from zoo.errors import ZooError


class ExportError(ZooError):
    """The export failed, or would not match the weights; nothing was added to the folder."""
