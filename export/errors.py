"""Errors of export; `zoo.ZooError`s."""

from zoo.errors import ZooError


class ExportError(ZooError):
    """An export that would not give what the weights give; nothing was added to the folder."""
