"""`metasaug import`: turn a checkpoint that its authors released into a model folder with the same logits.

training/network/checkpoint_files.py reads the file. The architecture follows from the tensors' shapes.
"""

import functools
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from export.errors import ExportError
from training.data.cifar import CIFAR, CIFAR_MEAN, CIFAR_STD, long_tail_counts
from training.data.imagenet_inat import IMAGENET_LT, INAT, read_inat_json, read_list
from training.network.checkpoint_files import open_checkpoint, tensors_in
from zoo import label_names
from zoo.architectures import ARCHITECTURES, create
from zoo.labels import assign_groups
from zoo.model_folder import write_model_folder
from zoo.registry import Entry, find, list_models

LAYOUTS = """Expected one of
  {"state_dict": {"conv1.weight", …, "linear.weight", "linear.bias"}}       MetaSAug's CIFAR files
  {"state_dict": {"feature": {…}, "classifier": {"fc.weight", "fc.bias"}}}  MetaSAug's ImageNet-LT and iNaturalist files
  {"state_dict_best": {"feat_model": {…}, "classifier": {…}}}               classifier-balancing
or the tensors alone, of one of these networks: """ + ", ".join(ARCHITECTURES) + "."

_LAST_LAYERS = ("fc", "linear", "classifier", "head")

_LICENCES = {"MetaSAug": "mit", "classifier-balancing": "bsd-3-clause"}

# Parts that change the features or the logits, and that no network of the zoo has.
_OTHER_PARTS = {
    "modulatedatt": "modulated attention (OLTR)", "fc_add": "an extra layer before the classifier (use_fc)",
    "cosnorm_classifier": "OLTR's memory and cosine classifier", "fc_hallucinator": "OLTR's memory",
    "fc_selector": "OLTR's memory", "centroids": "a nearest-mean classifier"}


@dataclass(frozen=True)
class Checkpoint:
    """A file's weights under the names of zoo.architectures, and what the file says about itself.

    origin         MetaSAug, classifier-balancing, or unknown; known from the layout
    cosine_scale   set if the last layer is a cosine classifier
    stated_error   1 minus the best accuracy that the file states, as a fraction; or None
    notes          sentences on what was changed; no logit changes by more than rounding
    """

    architecture: str
    weights: dict[str, Tensor]
    origin: str
    cosine_scale: float | None
    stated_error: float | None
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return self.weights["fc.weight"].shape[0]


def import_file(
    file: tyro.conf.Positional[Path],
    name: Annotated[str, tyro.conf.arg(name="as")],
    out: Path,
    counts: Path | None = None,
    cosine_scale: float | None = None,
) -> Path:
    """Turn a checkpoint that its authors released into a model folder: same logits, nothing unpickled.

    Args:
        file: The checkpoint: MetaSAug's CIFAR, ImageNet-LT and iNaturalist files, or classifier-balancing's.
        name: A name from `metasaug list --all`. It sets the labels, the preprocessing and the published error.
        out: The new model folder.
        counts: A file that gives the training pictures of each class: iNaturalist's train2018.json, a list file
            (ImageNet_LT_train.txt), or a JSON list of numbers. By default the benchmark's counts, if known.
        cosine_scale: For a last layer without bias: the factor on its cosines (30 in LDAM's code), or 0 if it is a
            plain linear layer.
    """
    entry = find(name)
    if entry is None:
        raise ExportError(f"--as {name}: no such model. `metasaug list --all` shows the names.")
    about = _about(entry)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"--out {out} is there already: choose another folder, or remove it.")
    _check_file_name(file, entry)
    content = _read(file)
    checkpoint = read_checkpoint(content, file.name, cosine_scale)
    class_counts, counted_by, labels = _counts(entry, about, counts)
    if checkpoint.num_classes != len(labels):
        raise ExportError(f"{file.name} tells {checkpoint.num_classes} classes apart, {entry.name} has {len(labels)}"
                          f" ({about.title}): it is another model's file.")
    config = _config(entry, about, labels, class_counts, counted_by, checkpoint, file.name, content)
    _write(out, config, checkpoint)
    _tell(out, entry, config, checkpoint)
    if (near := nearly_released(content, file.name, checkpoint)) is not None:
        print(f"warning: {file.name} is almost {near['file']} as released by its authors, but its bytes differ: sha256 "
              f"{hashlib.sha256(content).hexdigest()}, not {near['sha256']}. It was damaged or changed: download it "
              "again.", file=sys.stderr)
    return out


# ---- the files that the authors released ----


@functools.cache
def _released_files() -> tuple[dict[str, Any], ...]:
    """The authors' twenty CIFAR files: hash, size and stated error in %.

    We measured all twenty on the original test pictures: each has the error that it states.
    """
    return tuple(json.loads(Path(__file__).with_name("released_files.json").read_text(encoding="utf-8")))


def released_file(content: bytes) -> dict[str, Any] | None:
    """The released file with these bytes, or None."""
    digest = hashlib.sha256(content).hexdigest()
    return next((row for row in _released_files() if row["sha256"] == digest), None)


def nearly_released(content: bytes, name: str, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """A released file with the same size and the same name or stated error, but other bytes; or None."""
    if released_file(content) is not None:
        return None
    stated = None if checkpoint.stated_error is None else round(100 * checkpoint.stated_error, 2)
    return next((row for row in _released_files()
                 if row["bytes"] == len(content) and (row["file"] == name or row["stated_error"] == stated)), None)


# ---- reading the file ----


def read_checkpoint(content: bytes, name: str, cosine_scale: float | None = None) -> Checkpoint:
    """Read the network from a checkpoint's bytes, without running any code. Raises ExportError."""
    loaded = open_checkpoint(content, name)
    tensors, origin = tensors_in(loaded)
    if not tensors:
        raise ExportError(f"{name}: no weights found. It holds\n{_shown(loaded)}\n{LAYOUTS}")
    notes: list[str] = []
    backbone, weight, bias, scales = _split(tensors, name)
    weight, bias, scale = _last_layer(weight, bias, scales, backbone, cosine_scale, name, notes)
    backbone = {key: _as_float32(tensor, key, name, notes) for key, tensor in backbone.items()}
    architecture = _architecture(backbone, loaded, name)
    module = create(architecture, len(weight), scale)
    weights = {**backbone, "fc.weight": weight} | ({"fc.bias": bias} if bias is not None else {})
    # Batch norm's counter came with torch 0.4.1 and changes no logit.
    weights |= {key: tensor for key, tensor in module.state_dict().items()
                if key.endswith("num_batches_tracked") and key not in weights}
    return Checkpoint(architecture, weights, origin, scale, _stated_error(loaded), tuple(dict.fromkeys(notes)))


def _stated_error(loaded: Mapping[str, Any]) -> float | None:
    accuracy = next((loaded[key] for key in ("best_acc1", "best_acc", "best_prec1") if key in loaded), None)
    try:
        accuracy = float(accuracy)  # type: ignore[arg-type]
    except (RuntimeError, TypeError, ValueError):  # missing, or not a number
        return None
    accuracy = accuracy if accuracy <= 1 else accuracy / 100
    return round(1 - accuracy, 6) if 0 <= accuracy <= 1 else None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ExportError(f"{file} cannot be read: {error.strerror or error}.") from error


# ---- from the authors' layout to our names ----


def _split(
    tensors: dict[str, Tensor], name: str
) -> tuple[dict[str, Tensor], Tensor, Tensor | None, Tensor | None]:
    """Split into the backbone, and the last layer's weight, bias and LWS scales."""
    for part, what in _OTHER_PARTS.items():
        if any(part in key.split(".") for key in tensors):
            raise ExportError(f"{name} has {what}, which no network of the zoo has: the imported model would give "
                              "other logits.")
    last: dict[str, Tensor] = {}
    backbone: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layers, _, kind = key.rpartition(".")
        is_last = kind in ("weight", "bias", "scales") and set(layers.split(".")) <= {*_LAST_LAYERS, "module"}
        if is_last and layers and kind in last:
            raise ExportError(f"{name} has two last layers, each with a {kind}: it is not clear which one to use.")
        (last if is_last and layers else backbone)[kind if is_last and layers else key] = tensor
    if "weight" not in last:
        raise ExportError(f"{name} has no last layer ({', '.join(f'{each}.weight' for each in _LAST_LAYERS)}). It "
                          f"holds\n{_shown(tensors)}\n{LAYOUTS}")
    return backbone, last["weight"], last.get("bias"), last.get("scales")


def _last_layer(
    weight: Tensor, bias: Tensor | None, scales: Tensor | None, backbone: Mapping[str, Tensor],
    cosine_scale: float | None, name: str, notes: list[str],
) -> tuple[Tensor, Tensor | None, float | None]:
    """The last layer: weight (C, A); bias (C,), or None for a cosine classifier; the cosine classifier's scale."""
    weight = _as_float32(weight, "the last layer's weight", name, notes)
    if weight.dim() != 2:
        raise ExportError(f"{name}: the last layer's weight has shape {tuple(weight.shape)}, expected (classes, "
                          "features).")
    if bias is None:
        if cosine_scale is None:
            raise ExportError(
                f"{name}: the last layer, {tuple(weight.shape)}, has no bias. If it is a cosine classifier, give its "
                "scale, which is not in the file: --cosine-scale 30 for LDAM's code. If it is a plain linear layer, "
                "give --cosine-scale 0. The zoo does not have the cosine classifier of OLTR and classifier-balancing "
                "(norm / (1 + norm)).")
        features = _features(backbone)
        if weight.shape[0] == features != weight.shape[1]:  # LDAM's NormedLinear is (features, classes)
            weight = weight.t().contiguous()
        if cosine_scale > 0:
            return weight, None, float(cosine_scale)
        bias = torch.zeros(len(weight))
        notes.append("The last layer had no bias; a bias of zeros was added.")
    elif cosine_scale is not None:
        raise ExportError(f"--cosine-scale is only for a last layer without bias; {name} has a bias.")
    bias = _as_float32(bias, "the last layer's bias", name, notes)
    if bias.shape != weight.shape[:1]:
        raise ExportError(f"{name}: the last layer has weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, "
                          "which do not belong together.")
    if scales is not None:
        scales = _as_float32(scales, "scales", name, notes)
        if scales.shape != bias.shape:
            raise ExportError(f"{name}: scales {tuple(scales.shape)} for {len(bias)} classes.")
        # Learnable weight scaling: logits (W f + b) s = (s W) f + s b.
        weight, bias = weight * scales[:, None], bias * scales
        notes.append("Its learned scales (LWS) were multiplied into the last layer.")
    return weight, bias, None


def _features(backbone: Mapping[str, Tensor]) -> int:
    """Width of the features: channels of the last batch norm."""
    return next((len(tensor) for tensor in reversed(list(backbone.values())) if tensor.dim() == 1), 0)


def _as_float32(tensor: Tensor, key: str, name: str, notes: list[str]) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return tensor
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_floating_point():
        raise ExportError(f"{name}: {key} has type {tensor.dtype} ({tensor.layout}): expected float numbers.")
    if tensor.dtype != torch.float32:
        notes.append(f"Its weights are {str(tensor.dtype).removeprefix('torch.')}; here they are float32.")
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ExportError(f"{name}: {key} holds {bad} values that are not numbers (NaN or infinite): its training "
                          "diverged, or the file is damaged.")
    if key.endswith("running_var") and (tensor < 0).any():
        raise ExportError(f"{name}: {key} is a variance and below 0: the file is damaged.")
    converted = tensor.to(torch.float32)
    if not torch.isfinite(converted).all():
        raise ExportError(f"{name}: {key} has values too large for float32.")
    return converted.contiguous()


def _architecture(backbone: Mapping[str, Tensor], loaded: Mapping[str, Any], name: str) -> str:
    """The architecture whose parameter names and shapes match."""
    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in tensors.items()
                if not key.startswith("fc.") and not key.endswith("num_batches_tracked")}

    theirs, nearest = shapes(backbone), (-1, "", "")
    for architecture in ARCHITECTURES:
        with torch.device("meta"):
            ours = shapes(create(architecture, 2).state_dict())
        if ours == theirs:
            return architecture
        same = sum(theirs.get(key) == shape for key, shape in ours.items())
        differing = [f"{key} {theirs.get(key, 'missing')}, expected {ours.get(key, 'nothing')}"
                     for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
        nearest = max(nearest, (2 * same - len(ours), architecture, "\n  ".join(differing[:4])
                                + (f"\n  … and {len(differing) - 4} more" if len(differing) > 4 else "")))
    raise ExportError(f"{name} is not a known network. It holds\n{_shown(loaded)}\nNearest is {nearest[1]}, but\n"
                      f"  {nearest[2]}\n{LAYOUTS}")


def _shown(found: Mapping[str, Any], depth: int = 1) -> str:
    """The first keys of each level with types and shapes."""
    def each(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return f"{type(value).__name__} of {len(value)}" if isinstance(value, (Mapping, list)) else type(value).__name__

    lines: list[str] = []
    for key, value in list(found.items())[:6]:
        lines.append("  " * depth + f"{str(key)[:80]}: {each(value)}")
        if isinstance(value, Mapping) and depth < 4:
            lines.append(_shown(value, depth + 1))
    if len(found) > 6:
        lines.append("  " * depth + f"… and {len(found) - 6} more")
    return "\n".join(line for line in lines if line)


# ---- what --as adds ----


@dataclass(frozen=True)
class _About:
    title: str
    labels: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


def _about(entry: Entry) -> _About:
    """An entry's data set: its classes, and the authors' preprocessing of test pictures."""
    released = [each for each in list_models()
                if each.dataset in (*CIFAR, "imagenet-lt", *INAT) and each.method != "heldout"]  # heldout is our own
    if entry not in released:
        raise ExportError(f"--as {entry.name}: no files of others are known for it. Names that have some: "
                          f"{', '.join(each.name for each in released)}.")
    if entry.dataset in CIFAR:
        labels = label_names.cifar10() if entry.dataset == "cifar10-lt" else label_names.cifar100()
        return _About(CIFAR[entry.dataset].title, labels, 32, CIFAR_MEAN, CIFAR_STD, 1.0)
    large = IMAGENET_LT if entry.dataset == "imagenet-lt" else INAT[entry.dataset]
    named = {"imagenet-lt": label_names.imagenet, "inat18": label_names.inat18}.get(entry.dataset)
    labels = named() if named else tuple(map(str, range(large.classes)))
    return _About(large.title, labels, 224, large.mean, large.std, 0.875)


def _counts(
    entry: Entry, about: _About, path: Path | None
) -> tuple[list[int] | None, str, tuple[str, ...]]:
    """Training pictures per class, their source, and the labels (iNaturalist 2017's come only from its JSON)."""
    labels = about.labels
    if path is not None:
        counts, names = _read_counts(path)
        if len(counts) != len(labels):
            raise ExportError(f"--counts {path} counts {len(counts)} classes, {entry.name} has {len(labels)}.")
        without = [labels[c] for c, n in enumerate(counts) if n < 1]
        if without:
            raise ExportError(f"--counts {path}: {len(without)} classes have no training picture, beginning with "
                              f"{', '.join(without[:5])}. Is this the list that the model was trained on?")
        if names and all(label.isdecimal() for label in labels):
            labels = names
        return counts, path.name, labels
    if entry.dataset in CIFAR and entry.imbalance:
        # The authors set 10 pictures of each class aside before they cut the tail.
        largest = CIFAR[entry.dataset].class_size - 10
        return long_tail_counts(largest, len(labels), entry.imbalance), "the benchmark's formula", labels
    if entry.dataset == "imagenet-lt":
        return list(label_names.imagenet_lt_counts()), "the published list", labels
    return None, "nobody", labels


def _read_counts(path: Path) -> tuple[list[int], tuple[str, ...]]:
    """Counts from iNaturalist's JSON (with names), a list file, or a JSON list of numbers."""
    start = _read(path)[:200].lstrip()
    if start.startswith(b"{"):
        listed, names = read_inat_json(path)
        return np.bincount(listed.labels, minlength=len(names)).tolist(), names
    if start.startswith(b"["):
        try:
            counts = json.loads(_read(path))
        except ValueError as error:
            raise ExportError(f"--counts {path} is not JSON: {error}.") from error
        if not all(type(n) is int and 0 <= n < 10**9 for n in counts):
            raise ExportError(f"--counts {path}: expected a list of whole numbers, one per class.")
        return counts, ()
    return np.bincount(read_list(path).labels).tolist(), ()


def _check_file_name(file: Path, entry: Entry) -> None:
    """Refuse an authors' CIFAR file if its name states another data set, loss or imbalance than `--as`."""
    said = re.search(r"cifar(100?)_(CE|LDAM|Focal)_imb([0-9.]*[0-9])", file.name, re.IGNORECASE)
    if said is None or entry.dataset not in CIFAR:
        return
    dataset, loss, imbalance = f"cifar{said[1]}-lt", said[2].lower(), 1 / float(said[3])
    if (entry.dataset, entry.loss) == (dataset, loss) and abs((entry.imbalance or 0) / imbalance - 1) < 0.01:
        return
    right = [each.name for each in list_models()
             if (each.dataset, each.method, each.loss) == (dataset, "metasaug", loss)
             and abs((each.imbalance or 0) / imbalance - 1) < 0.01]
    raise ExportError(f"The name {file.name} means {dataset}, loss {loss}, imbalance {imbalance:.4g}; {entry.name} "
                      f"is {entry.dataset}, loss {entry.loss}, imbalance {entry.imbalance:g}."
                      + (f" Import it --as {right[0]}." if right else ""))


# ---- the folder ----


def _config(
    entry: Entry, about: _About, labels: tuple[str, ...], counts: list[int] | None, counted_by: str,
    checkpoint: Checkpoint, file: str, content: bytes,
) -> dict[str, Any]:
    groups, groups_by = assign_groups(counts, len(labels))
    # Weights of classifier-balancing keep that name, even if --as names a MetaSAug model.
    others = checkpoint.origin == "classifier-balancing"
    borrowed = others and entry.method == "metasaug"
    name = f"classifier-balancing-{entry.dataset}" if borrowed else entry.name
    method = "classifier-balancing" if others else entry.method
    imbalance = entry.imbalance or (max(counts) / min(counts) if counts else None)
    return {
        "architecture": checkpoint.architecture, "num_classes": len(labels),
        "num_features": checkpoint.weights["fc.weight"].shape[1], "label_names": list(labels),
        "pretrained_cfg": {
            "input_size": [3, about.size, about.size], "mean": list(about.mean), "std": list(about.std),
            "interpolation": "bilinear", "crop_pct": about.crop_pct, "num_classes": len(labels), "classifier": "fc"},
        "metasaug": {
            "format": 1, "name": name, "method": method, "loss": entry.loss,
            "augment": "metasaug" if method == "metasaug" else "none",
            # The authors' second stage weights classes so that all count equally; plain training keeps frequencies.
            "prior": {"metasaug": "uniform", "ce": "train"}.get(method),
            "cosine_scale": checkpoint.cosine_scale, "recipe": {"dataset": entry.dataset}, "dataset": about.title,
            "imbalance": imbalance, "class_counts": counts, "groups": list(groups), "groups_by": groups_by,
            "seed": None, "schedule": "its authors' own", "results": None,
            "published_error": None if borrowed else entry.published_error,
            "published_source": None if borrowed else entry.published_source,
            "imported": {
                "file": file, "sha256": hashlib.sha256(content).hexdigest(), "origin": checkpoint.origin,
                "licence": _LICENCES.get(checkpoint.origin, "unknown"),
                "counts_from": counted_by, "stated_error": checkpoint.stated_error, "notes": list(checkpoint.notes),
                "released_file": found["file"] if (found := released_file(content)) else None},
        },
    }


def _write(out: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Write the whole folder or nothing: make it beside `out`, then move it there."""
    from export.card import write_card
    from export.to_onnx import export_folder

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch) / "model"
        write_model_folder(made, config, {key: tensor.numpy() for key, tensor in checkpoint.weights.items()})
        export_folder(made)
        write_card(made)
        if out.exists():
            out.rmdir()
        made.rename(out)


def _tell(out: Path, entry: Entry, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    ours = config["metasaug"]
    print(f"{out}: {config['architecture']}, {config['num_classes']} classes, weights, ONNX and card")
    for line in _remarks(entry, ours, checkpoint):
        print(f"  {line}")


def _remarks(entry: Entry, ours: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    yield from checkpoint.notes
    if ours["name"] != entry.name:
        yield (f"These are weights of classifier-balancing, not of MetaSAug: the folder is called {ours['name']}. "
               f"Only the labels and the preprocessing come from {entry.name}.")
    if ours["class_counts"] is None:
        yield "The training counts are not known, so every class's group is `unknown`. --counts FILE gives them."
    stated, published = checkpoint.stated_error, ours["published_error"]
    if stated is not None and published is not None:
        yield f"The file states an error of {stated:.2%}; the published error is {published:.2%}."
        if (released := ours["imported"]["released_file"]) is not None:
            yield (f"It is bit for bit {released} as the authors of MetaSAug released it. On the original test "
                   "pictures it has the stated error.")
        elif abs(stated - published) > 0.005:
            yield f"They differ: is this really the file of {entry.name}?"
