"""Read and write model folders, the format of runs, Hub repositories and bundled weights. Needs no torch.

    config.json             timm's keys and, under "metasaug", how it was trained and its test results
    model.safetensors       weights, by their names in zoo.architectures
    covariance.safetensors  optional: running class covariances and their learned corrections
    onnx/model.onnx         one file; outputs logits, features, feature_map
    onnx/model_int8.onnx    optional: the same, quantised
    README.md               the model card
    accuracy.png            optional: the card's figure, accuracy per class
    manifest.json           sha256 and size of every file above

Each file is read once, as bytes, and used only if their sha256 is the one in the manifest. The manifest holds a digest
of itself, and the registry holds the manifest's sha256. Nothing is ever unpickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ModelFolderError
from zoo.files import write_atomically
from zoo.labels import GROUPS, UNKNOWN

CONFIG, WEIGHTS, COVARIANCE = "config.json", "model.safetensors", "covariance.safetensors"
ONNX, ONNX_INT8 = "onnx/model.onnx", "onnx/model_int8.onnx"
CARD, FIGURE, MANIFEST = "README.md", "accuracy.png", "manifest.json"
# An ONNX file is one protobuf message, which cannot be larger. The other files are read whole too.
MOST_BYTES = {CONFIG: 100_000_000, CARD: 100_000_000, FIGURE: 100_000_000, ONNX: 2**31, ONNX_INT8: 2**31}
MOST_BYTES_OF_ARRAYS = 2**35  # running and learned covariances of 1,000 classes and 2,048 features
FILES = (CONFIG, WEIGHTS, COVARIANCE, ONNX, ONNX_INT8, CARD, FIGURE)


class ModelFolder:
    """A verified model folder: opening checks the manifest, reading checks each file.

    path             of the folder
    manifest_sha256  the sha256 of manifest.json, where the registry has it
    Raises ModelFolderError, naming the file, for anything missing, changed or not of this format.
    """

    def __init__(self, path: str | os.PathLike, manifest_sha256: str | None = None):
        self.path = Path(path)
        self.known = manifest_sha256 is not None  # its bytes are checked against the registry
        self._checked: set[str] = set()
        if not self.path.is_dir():
            raise ModelFolderError(f"{self.path} is not a folder. `metasaug train` writes a model folder to RUN/model.")
        self.files = self._read_manifest(manifest_sha256)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r})"

    @property
    def source(self) -> str:
        """Where the folder comes from, in words."""
        return str(self.path)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> bytes:
        """The bytes of one file, checked against the manifest."""
        if name not in self.files:
            has = ", ".join(self.files)
            raise ModelFolderError(f"{self.path} has no {name} (it has {has})." + (
                " `metasaug export` adds it." if name == ONNX else
                " `metasaug export FOLDER --int8 --calibrate DIR` makes it." if name == ONNX_INT8 else ""))
        size, digest = self.files[name]
        content = self._bytes(name, size)
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise ModelFolderError(f"{self.path / name} is damaged or was changed: its bytes do not match "
                                   f"{MANIFEST}. Get the folder again.")
        self._checked.add(name)
        return content

    def check(self) -> None:
        """Check every file of the manifest that was not read yet."""
        for name in self.files:
            if name not in self._checked and not self._may_lack(name):
                self.read(name)

    def _may_lack(self, name: str) -> bool:
        """Covariances may be missing: predictions do not need them."""
        return name == COVARIANCE and not (self.path / name).exists()

    @cached_property
    def config(self) -> dict[str, Any]:
        config = _parse_json(self.read(CONFIG), self.path / CONFIG)
        check_config(config, self.path / CONFIG)
        return config

    @property
    def results(self) -> dict[str, Any] | None:
        """Test results at the end of training, or None if they were not measured."""
        return self.config["metasaug"].get("results")

    @cached_property
    def card(self) -> str:
        return self.read(CARD).decode("utf-8", errors="replace")

    def weights(self) -> dict[str, np.ndarray]:
        return self._tensors(WEIGHTS)

    def covariance(self) -> dict[str, np.ndarray]:
        """"running" and "learned": (C, A, A) or (C, A)."""
        return self._tensors(COVARIANCE)

    def _tensors(self, name: str) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return load(self.read(name))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # also for types that numpy lacks
            raise ModelFolderError(f"{self.path / name} is not a safetensors file: {error}.") from error

    def _bytes(self, name: str, size: int) -> bytes:
        """The file's bytes, at most one more than `size`: a wrong file may be endless."""
        path = self.path / name
        try:
            if path.exists() and not path.is_file():
                raise ModelFolderError(f"{path} is not a regular file. Get the folder again.")
            with open(path, "rb") as file:
                return file.read(min(size, os.fstat(file.fileno()).st_size) + 1)  # `size` may be absurd
        except FileNotFoundError:
            raise ModelFolderError(f"{path} is missing. Get the folder again.") from None
        except OSError as error:
            raise ModelFolderError(f"{path} cannot be read: {error.strerror or error}.") from error
        except MemoryError:
            raise ModelFolderError(f"{path} does not fit into this computer's memory.") from None

    def _read_manifest(self, expected: str | None) -> dict[str, tuple[int, str]]:
        path = self.path / MANIFEST
        if not path.exists():
            raise ModelFolderError(f"{self.path} is not a model folder: it has no {MANIFEST}. `metasaug train` writes "
                                   "a model folder to RUN/model.")
        content = self._bytes(MANIFEST, 100_000)
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise ModelFolderError(f"{path} is not the one that the registry names. Get the folder again.")
        manifest = _parse_json(content, path)
        try:
            files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        except (AttributeError, KeyError, TypeError):
            files = {}
        if not all(type(size) is int and size >= 0 and isinstance(digest, str) and digest.isascii()
                   for size, digest in files.values()):
            files = {}
        too_large = [name for name, (size, _) in files.items() if size > MOST_BYTES.get(name, MOST_BYTES_OF_ARRAYS)]
        if too_large:
            raise ModelFolderError(f"{path} says that {too_large[0]} is larger than any model of the zoo. Get the "
                                   "folder again.")
        # Writing what was read must give the same bytes, so that any changed bit shows.
        if not files or not set(files) <= set(FILES) or _manifest_bytes(files) != content:
            raise ModelFolderError(f"{path} is damaged or was changed. Get the folder again.")
        return files


def write_model_folder(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    covariance: Mapping[str, np.ndarray] | None = None,
) -> ModelFolder:
    """Write a new model folder, without ONNX and card, which export adds. Replaces an older one at the same path.

    config      checked by `check_config`             weights, covariance   arrays by name
    """
    from safetensors.numpy import save

    check_config(config, "the config")
    path = Path(path)
    try:
        for old in (*(path / name for name in (MANIFEST, *FILES)), *path.rglob(".*.tmp")):
            old.unlink(missing_ok=True)  # the manifest first: without it, this is no model folder
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be written: {error.strerror or error}.") from error
    add_files(path, {CONFIG: json_bytes(config), WEIGHTS: save(dict(weights)),
                     **({COVARIANCE: save(dict(covariance))} if covariance else {})}, {})
    return ModelFolder(path)


def add_files(path: Path, contents: Mapping[str, bytes], present: Mapping[str, tuple[int, str]]) -> None:
    """Write files and, last, the manifest that lists them and those `present`.

    Replaces older files. Each file is written whole or not at all.
    """
    for name, content in contents.items():
        _write(path / name, content)
    _write(path / MANIFEST, _manifest_bytes({**present, **_sizes_and_hashes(contents)}))


def manifest_of(contents: Mapping[str, bytes]) -> bytes:
    """The manifest.json of these files."""
    return _manifest_bytes(_sizes_and_hashes(contents))


def _sizes_and_hashes(contents: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
    return {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ModelFolderError(f"{path} could not be written: {error.strerror or error}.") from error


def _manifest_bytes(files: Mapping[str, tuple[int, str]]) -> bytes:
    listed = {name: {"sha256": files[name][1], "size": files[name][0]} for name in FILES if name in files}
    digest = hashlib.sha256(json_bytes(listed)).hexdigest()
    return json_bytes({"format": 1, "files": listed, "digest": digest})


def json_bytes(value: Any) -> bytes:
    """JSON in the form of config.json and manifest.json."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _parse_json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not JSON: {error}. Get the folder again.") from error
    if not isinstance(parsed, dict):
        raise ModelFolderError(f"{path} holds no JSON object. Get the folder again.")
    return parsed


# ---- the config's schema ----


def check_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Raises ModelFolderError naming the first key that is missing or invalid."""

    def need(holds: bool, key: str, what: str) -> None:
        if not holds:
            raise ModelFolderError(f"{where}: {key} must be {what}.")

    def text(value) -> bool:
        """Whether it is a string that can be encoded: folder names with invalid bytes cannot."""
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)

    def numbers(value, count: int) -> bool:
        return isinstance(value, list) and len(value) == count and all(number(x) for x in value)

    def number(value) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30

    need(isinstance(config.get("architecture"), str), "architecture", "a name in zoo.architectures")
    classes, names = config.get("num_classes"), config.get("label_names")
    need(type(classes) is int and classes >= 2, "num_classes", "an integer, at least 2")
    need(type(config.get("num_features")) is int and config["num_features"] >= 1, "num_features", "an integer")
    need(isinstance(names, list) and len(names) == classes and all(text(n) for n in names)
         and len(set(names)) == len(names), "label_names", f"{classes} different names")
    for key in ("pretrained_cfg", "metasaug"):
        need(isinstance(config.get(key), dict), key, "an object")
    cfg, ours = config["pretrained_cfg"], config["metasaug"]
    size = cfg.get("input_size")
    need(isinstance(size, list) and len(size) == 3 and all(type(x) is int for x in size) and size[0] == 3
         and all(1 <= x <= 4096 for x in size), "pretrained_cfg.input_size", "[3, height, width]")
    need(numbers(cfg.get("mean"), 3), "pretrained_cfg.mean", "three numbers")
    need(numbers(cfg.get("std"), 3) and min(cfg["std"]) > 0, "pretrained_cfg.std", "three numbers above 0")
    need(cfg.get("interpolation") in ("nearest", "bilinear", "bicubic", "lanczos"), "pretrained_cfg.interpolation",
         "nearest, bilinear, bicubic or lanczos")
    crop = cfg.get("crop_pct")
    need(number(crop) and 0.01 <= crop <= 1, "pretrained_cfg.crop_pct", "a number from 0.01 to 1")
    need(cfg.get("crop_mode") in (None, "center", "squash", "border"), "pretrained_cfg.crop_mode",
         "center, squash or border")
    counts, groups = ours.get("class_counts"), ours.get("groups")
    need(counts is None or (isinstance(counts, list) and len(counts) == classes
                            and all(type(n) is int and n >= 0 for n in counts)),
         "metasaug.class_counts", f"{classes} counts, or null")
    need(isinstance(groups, list) and len(groups) == classes and all(g in (*GROUPS, UNKNOWN) for g in groups),
         "metasaug.groups", f"{classes} of head, medium, tail, unknown")
    need(ours.get("groups_by") in ("count", "rank", UNKNOWN), "metasaug.groups_by", "count, rank or unknown")
    for key in ("name", "method", "dataset"):
        need(text(ours.get(key)), f"metasaug.{key}", "a text")
    prior = ours.get("prior")
    need(prior in ("train", "uniform", None) or (numbers(prior, int(classes or 0)) and min(prior) > 0),
         "metasaug.prior", f"train, uniform, {classes} numbers above 0, or null")
    reading = ours.get("reading") or {}
    need(isinstance(reading, dict) and set(reading) <= {"page", "white"}
         and (reading.get("page") in (None, "max", "mean") or (type(reading["page"]) is int and reading["page"] >= 1))
         and (reading.get("white") is None or (type(reading["white"]) is int and 1 <= reading["white"] < 2**32)),
         "metasaug.reading", "an object with a page and the value that is white, or null")
    scale = ours.get("cosine_scale")
    need(scale is None or (number(scale) and scale > 0), "metasaug.cosine_scale", "a number, or null")
    variants = ours.get("variants")
    need(variants is None or (isinstance(variants, dict) and all(isinstance(v, dict) for v in variants.values())),
         "metasaug.variants", "an object of objects, or null")
    calibration = ours.get("calibration")
    need(calibration is None or isinstance(calibration, dict), "metasaug.calibration", "an object, or null")
    if calibration:
        temperature, misfits = calibration.get("temperature"), calibration.get("misfits")
        need(number(temperature) and temperature > 0, "metasaug.calibration.temperature", "a number above 0")
        need(isinstance(misfits, list) and len(misfits) == classes
             and all(isinstance(m, list) and numbers(m, len(m)) for m in misfits),
             "metasaug.calibration.misfits", f"{classes} lists of numbers")
        energies = calibration.get("energies")
        need(isinstance(energies, list) and len(energies) > 0 and numbers(energies, len(energies)),
             "metasaug.calibration.energies", "numbers")
    results = ours.get("results")
    need(results is None or isinstance(results, dict), "metasaug.results", "an object, or null")
    if results:
        for key in ("images", "error", "macro_error", "worst_class_error"):
            need(number(results.get(key)), f"metasaug.results.{key}", "a number")
        need(isinstance(results.get("groups"), dict), "metasaug.results.groups", "an object")
        need(isinstance(results.get("per_class"), list) and len(results["per_class"]) == classes,
             "metasaug.results.per_class", f"{classes} rows")
