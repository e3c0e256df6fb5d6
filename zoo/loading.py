"""`zoo.load`: open a model by name, Hub repository or folder."""

import difflib
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from zoo.errors import ModelFolderError, UnknownModelError, UnpublishedModelError, ZooError
from zoo.hub import OWNER, PREFIX, HubFolder, own_copies, parse
from zoo.images import Picture
from zoo.model_folder import CONFIG, ONNX, ONNX_INT8, WEIGHTS, ModelFolder
from zoo.predictor import Backend, Device, Precision, Prediction, Predictor
from zoo.registry import Entry, find, list_models

log = logging.getLogger("zoo")


def load(
    name: str | os.PathLike, backend: Backend = "onnx", device: Device = "auto", precision: Precision = "fp32", *,
    revision: str | None = None, local_files_only: bool = False, token: str | None = None, threads: int = 0,
) -> Predictor:
    """Load a model of the zoo, from the Hub, or from a model folder.

    name              a name of `list_models`; hf:owner/repo or hf:owner/repo@revision on the Hub; or the path of a
                      model folder (`metasaug train` writes it to RUN/model)
    backend           onnx: ONNX Runtime, no torch needed; torch: the module itself
    device            auto: cuda if available; cuda: that or BackendError
    precision         int8: the quantised ONNX file, if the model has one; a third of the size or less, on the CPU
    revision          on the Hub: a branch, tag or commit. The registry's models are pinned to a commit
    local_files_only  use only the Hub's cache, make no request
    token             of the Hub, instead of HF_TOKEN or the one of `hf auth login`
    threads           of ONNX Runtime on the CPU; 0: one per core
    Raises UnknownModelError, UnpublishedModelError, HubError, ModelFolderError or BackendError. Every file is read
    once, and used only if its sha256 is the one in the manifest. Logs one line at level INFO.
    """
    network = WEIGHTS if backend == "torch" else ONNX_INT8 if precision == "int8" else ONNX
    folder = open_folder(name, (CONFIG, network), revision=revision, local_files_only=local_files_only, token=token)
    entry = find(os.fspath(name))
    predictor = Predictor(folder, backend, device, entry.name if entry else None, precision, threads)
    folder.check()  # the files that were not read yet
    ours = folder.config["metasaug"]
    log.info("%s: %s, trained on %s, %s; from %s", predictor.name, ours["method"], ours["dataset"],
             ours.get("schedule", "schedule not known"), folder.source)
    return predictor


def predict(name: str | os.PathLike, picture: Picture, top_k: int = 5) -> Prediction:
    """`load(name).predict(picture, top_k)`, for a single picture. For more pictures, load once and keep the model."""
    return load(name).predict(picture, top_k)


def open_folder(
    name: str | os.PathLike, files: Sequence[str] = (), *, revision: str | None = None, local_files_only: bool = False,
    token: str | None = None,
) -> ModelFolder:
    """The model folder behind a name or a path, with its manifest checked.

    files  fetched at once if the folder is on the Hub
    Raises as `load`.
    """
    name = os.fspath(name)
    hub: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "token": token}
    entry = find(name)
    if entry is not None:
        return open_entry(entry, files, **hub)
    if name.startswith(PREFIX):
        repo, named = parse(name)
        if revision is not None and named not in (None, revision):
            raise ZooError(f"{name} with revision={revision!r}: two revisions. Name one.")
        return HubFolder(repo, **{**hub, "revision": named or revision}, files=files)
    if not os.path.isdir(name):  # Path.is_dir may raise if the name is too long
        raise UnknownModelError(_unknown(name))
    if revision is not None:
        raise ZooError(f"{name} is a folder and has no revisions; hf:owner/repo@revision names a model on the Hub.")
    return ModelFolder(name)


def open_entry(entry: Entry, files: Sequence[str] = (), **hub: Any) -> ModelFolder:
    """The model folder of a registry entry, with its manifest checked.

    files  fetched at once if they are on the Hub          hub  revision, local_files_only, token, cache: as HubFolder
    Raises UnpublishedModelError, HubError or ModelFolderError.
    """
    asked, owner = hub.get("revision"), own_copies()
    if entry.bundled:
        if asked is not None:
            raise ZooError(f"{entry.name} is bundled with this package and has no revisions; hf:owner/repo@revision "
                           "names a model on the Hub.")
        return ModelFolder(entry.folder, entry.manifest_sha256)
    if owner is not None:
        # A copy of published weights must hold the same bytes; for unpublished ones only the name can be checked.
        folder = HubFolder(f"{owner}/{entry.name}", **hub, files=files,
                           manifest_sha256=None if asked else entry.manifest_sha256)
        name = folder.config["metasaug"]["name"]
        if name != entry.name:
            raise ModelFolderError(f"{folder.source} holds the model {name!r}, not {entry.name!r}. To load it "
                                   f"anyway: hf:{folder.repo}.")
        return folder
    if entry.hub is None:
        raise UnpublishedModelError(how_to_get(entry))
    pinned = asked in (None, entry.hub.revision)
    return HubFolder(entry.hub.repo, **{**hub, "revision": entry.hub.revision if pinned else asked}, files=files,
                     manifest_sha256=entry.manifest_sha256 if pinned else None)


def how_to_get(entry: Entry) -> str:
    """The ways to get the weights of an unpublished model."""
    ways = {"train it": entry.command}
    if entry.authors_file:
        ways["import the authors' file"] = f"metasaug import FILE --as {entry.name} --out FOLDER"
    ways["load your own copy from the Hub"] = f"hf:OWNER/REPO[@REVISION], or {OWNER}=OWNER for hf:OWNER/{entry.name}"
    ready = ", ".join(each.name for each in list_models() if each.weights != "unpublished")
    return "\n".join([f"The weights of {entry.name} are not published yet. You can",
                      *(f"  {what}: {how}" for what, how in ways.items()), f"Ready to use: {ready}."])


def _unknown(name: str) -> str:
    names = [known for entry in list_models() for known in (entry.name, *entry.aliases)]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    if os.path.exists(name):
        return f"{name} is a file: name the model folder, or a model (`metasaug list`)."
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", name) and not name.startswith("."):
        return f"{name} does not exist: no model folder is there. If it is a repository on the Hub: hf:{name}."
    if os.sep in name or name.startswith("."):
        return f"{name} does not exist: no model folder is there."
    return (f"No model is called {name!r}, and no folder either.{meant} `metasaug list --all` (zoo.list_models()) "
            "shows all names.")
