"""Read checkpoint files, your own or other people's: tensors by name. Nothing in a file can run.

Known layouts; every name may begin with "module." or "_orig_mod.":

    {"conv1.weight": …, "fc.weight": …}                                   tensors alone; also .safetensors
    {"state_dict": {"conv1.weight": …, "linear.weight": …}}               MetaSAug's CIFAR files, ResNet-32
    {"state_dict": {"feature": {…}, "classifier": {"fc.weight": …}}}      MetaSAug's ImageNet-LT, iNaturalist files
    {"state_dict_best": {"feat_model": {…}, "classifier": {…}}}           classifier-balancing (Kang et al. 2020)
"""

import argparse
import importlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.errors import TrainingError

# Plain values that checkpoints may hold besides tensors; all are harmless.
PLAIN: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"}]
PLAIN += [(getattr(importlib.import_module("numpy._core.multiarray"), name), f"numpy.{core}.multiarray.{name}")
          for core in ("core", "_core") for name in ("scalar", "_reconstruct")]

# Names of the last layer in files, besides its name in the network.
LAST_LAYERS = ("fc", "linear", "classifier", "head", "classifier.fc", "fc.fc", "head.fc")
# Keys under which files keep the tensors, the backbone and the last layer.
_WRAPPERS = ("state_dict_best", "state_dict", "model", "model_state_dict", "net", "model_ema")
_BACKBONES = ("feature", "feat_model", "feature_extractor", "backbone")
_CLASSIFIERS = ("classifier", "fc", "head")


def read_tensors(file: Path, flag: str) -> dict[str, Tensor]:
    """The tensors in a file, by name; those of a separate last layer as "classifier.…". flag: for errors."""
    tensors, _ = tensors_in(open_checkpoint(file, f"{flag} {file}"))
    if not tensors:
        raise TrainingError(f"{flag} {file} holds no weights by name.")
    return tensors


def open_checkpoint(file: Path | bytes, name: str) -> Mapping[str, Any]:
    """Open a file of torch.save or safetensors: tensors and plain values. name: for errors. Raises TrainingError."""
    try:
        source = io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")  # noqa: SIM115
        with source, warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
            if not isinstance(file, bytes) and file.suffix == ".safetensors":
                from safetensors.torch import load

                return load(source.read())
            if source.read(2) == b"PK":
                _check_zip(source, name)
            source.seek(0)
            warnings.simplefilter("ignore")
            loaded = torch.load(source, map_location="cpu", weights_only=True)
    except TrainingError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own message explains how to load it anyway, which is unsafe.
        asked = re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>", str(error))
        if asked is None:
            raise TrainingError(f"{name} is not a torch checkpoint, or damaged. Download it again.") from error
        raise TrainingError(f"{name} holds more than tensors and plain values: it asks for {asked[1] or asked[2]}, "
                            "which is refused, because loading it could run any code. Ask its authors for a file with "
                            "only the state dict.") from error
    except Exception as error:  # torch and safetensors raise many types for a broken archive or pickle
        raise TrainingError(f"{name} is not a torch checkpoint, or cut off: {first_line(error)}. Download it again."
                            ) from error
    if not isinstance(loaded, Mapping):
        raise TrainingError(f"{name} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    return loaded


def _check_zip(source: Any, name: str) -> None:
    """Refuse a zip that unpacks to much more than its size: torch does not compress, a zip bomb does."""
    packed = source.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(source) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            names = [entry.filename for entry in archive.infolist()]
    except zipfile.BadZipFile as error:
        raise TrainingError(f"{name} is a damaged or cut off zip: {error}. Download it again.") from error
    if not any(each.endswith("data.pkl") for each in names):
        raise TrainingError(f"{name} is a zip but no checkpoint of torch (it holds {', '.join(names[:5]) or 'nothing'}"
                            ").")
    if size > 2 * packed + 1_000_000:
        raise TrainingError(f"{name} would unpack to {size / 1e6:,.0f} MB from {packed / 1e6:,.0f} MB, which no "
                            "checkpoint does: refused.")


def tensors_in(loaded: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, those of a separate last layer as "classifier.…"; and whose layout it is."""
    found: Any = loaded
    while (inner := next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)) is not None:
        found = inner
    backbone = next((key for key in _BACKBONES if isinstance(found.get(key), Mapping)), None)
    if backbone is None:
        tensors = _tensors(found)
        return tensors, "MetaSAug" if "linear.weight" in tensors else "unknown"
    last: Mapping[str, Any] = next((found[key] for key in _CLASSIFIERS if isinstance(found.get(key), Mapping)), {})
    tensors = {**_tensors(found[backbone]), **{f"classifier.{key}": value for key, value in _tensors(last).items()}}
    return tensors, {"feat_model": "classifier-balancing", "feature": "MetaSAug"}.get(backbone, "unknown")


def _tensors(part: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(key).removeprefix("module.").removeprefix("_orig_mod."): value for key, value in part.items()
            if isinstance(value, Tensor)}


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".:")
