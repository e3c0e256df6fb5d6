"""`zoo.load`: from a name or a folder to a model that predicts."""

import difflib
import logging
import os

from zoo.errors import UnknownModelError, UnpublishedModelError
from zoo.images import Picture
from zoo.model_folder import ModelFolder
from zoo.predictor import Backend, Device, Prediction, Predictor
from zoo.registry import Entry, find, list_models

log = logging.getLogger("zoo")


def load(name: str | os.PathLike, backend: Backend = "onnx", device: Device = "auto") -> Predictor:
    """A model of the zoo, or any model folder.

    name     a name of `list_models`, or the path of a model folder (what `metasaug train` leaves in RUN/model)
    backend  onnx: ONNX Runtime, no torch needed; torch: the module itself
    device   auto: cuda where there is one; cuda: that or BackendError
    Raises UnknownModelError, UnpublishedModelError, ModelFolderError or BackendError.
    """
    folder = open_folder(name)
    predictor = Predictor(folder, backend, device, name=os.fspath(name) if find(os.fspath(name)) else None)
    ours = folder.config["metasaug"]
    log.info("%s: %s, trained on %s, %s; from %s", predictor.name, ours["method"], ours["dataset"],
             ours.get("schedule", "schedule not known"), folder.path)
    return predictor


def predict(name: str | os.PathLike, picture: Picture, top_k: int = 5) -> Prediction:
    """`load(name).predict(picture, top_k)`, for a single picture; load once and keep the model for more."""
    return load(name).predict(picture, top_k)


def open_folder(name: str | os.PathLike) -> ModelFolder:
    """The checked model folder behind a name or a path, without loading its network."""
    name = os.fspath(name)
    entry = find(name)
    if entry is not None:
        folder = _bundled(entry)
    elif os.path.isdir(name):  # False, where Path may raise for a name too long
        folder = ModelFolder(name)
    else:
        raise UnknownModelError(_unknown(name))
    folder.check()
    return folder


def _bundled(entry: Entry) -> ModelFolder:
    if entry.weights == "bundled":
        return ModelFolder(entry.folder, entry.manifest_sha256)
    raise UnpublishedModelError(
        f"The weights of {entry.name} are not out yet. {entry.how_to_make}\n"
        f"Ready to use: {', '.join(e.name for e in list_models() if e.weights == 'bundled')}.")


def _unknown(name: str) -> str:
    names = [entry.name for entry in list_models()]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    if os.path.exists(name):
        return f"{name} is a file: name the model folder, or a model (`metasaug list`)."
    if os.sep in name or name.startswith("."):
        return f"{name} does not exist: no model folder is there."
    return (f"No model is called {name!r}, and no folder either.{meant} `metasaug list` (zoo.list_models()) shows all "
            "names.")
