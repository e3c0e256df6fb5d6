"""Start weights and backbones: from a model of the zoo or of a library, a model folder or a file of tensors."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import TrainingError
from training.network.checkpoint_files import LAST_LAYERS, first_line, read_tensors
from zoo.architectures import ARCHITECTURES, TorchvisionNetwork, classifier_name
from zoo.loading import open_folder


def load_pretrained(module: nn.Module, source: str) -> list[str]:
    """Load every tensor of the same name and shape; returns the names of the others, which stay random.

    source   as for `find_backbone`; a torch file is opened with weights_only=True
    Raises TrainingError if less than half of the network's numbers fit.
    """
    own = module.state_dict()
    try:
        weights = unwrapped(find_backbone(source).weights(module), own)
    except TrainingError as error:
        raise TrainingError(str(error).replace("--backbone", "--pretrained")) from error
    fitting = {name: weights[name].to(own[name]) for name in own
               if name in weights and weights[name].shape == own[name].shape}
    share = sum(own[name].numel() for name in fitting) / sum(tensor.numel() for tensor in own.values())
    if share < 0.5:
        raise TrainingError(f"--pretrained {source}: {len(fitting)} of {len(own)} tensors ({share:.0%} of the numbers) "
                            "fit this network by name and shape. Were they trained for another --architecture?")
    module.load_state_dict(fitting, strict=False)
    return sorted(own.keys() - fitting.keys())


def unwrapped(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors whose names begin with the prefix that most of the network's numbers have, without that prefix.

    Training code wraps networks, which adds prefixes such as module., _orig_mod., model., encoder_q.
    """
    numbers: Counter[str] = Counter()
    for name, tensor in weights.items():
        parts = name.split(".")
        for i in range(len(parts)):
            inner = own.get(".".join(parts[i:]))
            if inner is not None and inner.shape == tensor.shape:
                numbers[name[: len(name) - len(".".join(parts[i:]))]] += tensor.numel()
    prefix = max(numbers, key=lambda prefix: (numbers[prefix], -len(prefix)), default="")
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _folder_weights(source: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in open_folder(source).weights().items()}


# ---- ready backbones ----


@dataclass(frozen=True)
class Backbone:
    """A ready network, known before its weights are fetched.

    source         as --backbone names it
    weights        called with the network to fill: its tensors, by that network's own names
    architecture   for zoo.architectures; None: a file that does not say
    num_classes    of its last layer; None: it has none
    label_names    of them; None where they are not known
    cfg            how it was shown pictures, as a model folder's pretrained_cfg; empty where that is not known
    cosine_scale   of a last layer that is a cosine classifier
    """

    source: str
    weights: Callable[[nn.Module], Mapping[str, Tensor]]
    architecture: str | None = None
    num_classes: int | None = None
    label_names: tuple[str, ...] | None = None
    cfg: Mapping[str, Any] = field(default_factory=dict)
    cosine_scale: float | None = None

    def has_last_layer_for(self, label_names: Sequence[str], cosine_scale: float | None) -> bool:
        """Whether its last layer is for exactly these classes: the same number and, if known, the same names."""
        names = tuple(label_names)
        return (self.num_classes == len(names) and self.label_names in (None, names)
                and self.cosine_scale == cosine_scale)


def find_backbone(source: str) -> Backbone:
    """torchvision:NAME, timm:NAME, a model of the zoo, a model folder, or a file. Library weights are downloaded later.

    Raises TrainingError or another ZooError for any other name.
    """
    if source.startswith("torchvision:"):
        return _torchvision(source, source.removeprefix("torchvision:"))
    if source.startswith("timm:"):
        return _timm(source, source.removeprefix("timm:"))
    path = Path(source)
    if path.is_file():
        return _torchvision_file(path) or _file(path)
    if path.suffix in (".pth", ".pt", ".tar", ".safetensors") and not path.exists():
        raise TrainingError(f"--backbone {source}: there is no such file.")
    config = open_folder(source).config
    cfg = {key: config["pretrained_cfg"].get(key) for key in
           ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    return Backbone(source, lambda _: _folder_weights(source), config["architecture"], config["num_classes"],
                    tuple(config["label_names"]), cfg, config["metasaug"].get("cosine_scale"))


def load_backbone(module: nn.Module, backbone: Backbone, last_layer: bool) -> None:
    """Load the backbone's weights into the network, with or without its last layer.

    Raises TrainingError if a tensor is missing, left over or of another shape: the features would be wrong.
    """
    own, last = module.state_dict(), classifier_name(module)
    weights = dict(unwrapped(backbone.weights(module), own))
    is_last = {name for name in own if name.startswith(f"{last}.")}
    if last + ".weight" not in weights:
        # Rename a last layer with another name, unless that is a name in the backbone.
        other = next((name for name in LAST_LAYERS
                      if f"{name}.weight" in weights and f"{name}.weight" not in own), None)
        if other is not None:
            weights = {name.replace(f"{other}.", f"{last}.", 1) if name.startswith(f"{other}.") else name: tensor
                       for name, tensor in weights.items()}
    wanted = own.keys() if last_layer else own.keys() - is_last
    # Batch norm's counter changes no feature, and older files lack it.
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = sorted(wanted - weights.keys() - counters)
    left_over = sorted(name for name in weights.keys() - own.keys() if not name.startswith(f"{last}."))
    shapes = [f"{name} {tuple(weights[name].shape)}, not {tuple(own[name].shape)}" for name in sorted(wanted)
              if name in weights and weights[name].shape != own[name].shape]
    if missing or left_over or shapes:
        what = [f"{len(names)} {kind} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})" for names, kind in
                ((missing, "missing"), (left_over, "left over"), (shapes, "of another shape")) if names]
        raise TrainingError(f"--backbone {backbone.source}: its tensors do not fit the network: {'; '.join(what)}. "
                            "Was it trained for another --architecture?")
    module.load_state_dict({name: weights[name].to(own[name]) for name in wanted if name in weights}, strict=False)


def _file(path: Path) -> Backbone:
    weights = read_tensors(path, "--backbone")
    last = [weights[f"{name}.weight"] for name in LAST_LAYERS if f"{name}.weight" in weights]
    classes = len(last[0]) if last and last[0].dim() == 2 else None
    # Training cannot continue with a last layer that has more than weight and bias (such as the scales of LWS).
    plain = all(name.rpartition(".")[2] in ("weight", "bias") for name in weights
                if name.rpartition(".")[0] in LAST_LAYERS)

    def named(module: nn.Module) -> Mapping[str, Tensor]:
        ours = any(name.startswith("body.") for name in weights)  # as `metasaug train` writes them
        return weights if ours else _torchvision_names(module, weights)

    return Backbone(str(path), named, num_classes=classes if plain else None)


# ---- the libraries' own weights ----


def _torchvision(source: str, name: str) -> Backbone:
    from torchvision import models

    if name not in models.list_models(module=models):
        from zoo.architectures import create

        create(source, 2)  # its error lists the names
    weights = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]

    def fetch(module: nn.Module) -> dict[str, Tensor]:
        try:
            return _torchvision_names(module, weights.get_state_dict(progress=True, check_hash=True))
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; RuntimeError: the hash
            file = weights.url.rpartition("/")[2]
            raise TrainingError(
                f"--backbone {source}: its weights could not be downloaded ({first_line(error)}). On a machine with a "
                f"network, get {weights.url}, and name the file here: --backbone PATH/{file} (or put it into "
                f"{Path(torch.hub.get_dir()) / 'checkpoints'}).") from error

    return _of_torchvision(source, name, weights, fetch)


def _torchvision_file(path: Path) -> Backbone | None:
    """A weights file of torchvision, recognised by its name."""
    from torchvision import models

    for name in models.list_models(module=models):
        for weights in models.get_model_weights(name):
            if weights.url.rpartition("/")[2] == path.name:
                return _of_torchvision(str(path), name, weights, lambda module: _torchvision_names(
                    module, read_tensors(path, "--backbone")))
    return None


def _of_torchvision(source: str, name: str, weights: Any, fetch: Callable) -> Backbone:
    if name in ("googlenet", "inception_v3"):
        raise TrainingError(f"--backbone {source}: its torchvision weights need an input format that is not "
                            "supported. Choose another network.")
    shown = weights.transforms()
    size = shown.crop_size[0]
    cfg = {"input_size": [3, size, size], "mean": list(shown.mean), "std": list(shown.std),
           "interpolation": shown.interpolation.value, "crop_pct": round(size / shown.resize_size[0], 4)}
    # Use the zoo's own network if it has one: timm can open that too, and its feature maps can be shown.
    architecture = name if name in ARCHITECTURES else f"torchvision:{name}"
    names = tuple(weights.meta["categories"])
    distinct = names if len(set(names)) == len(names) else None
    return Backbone(source, fetch, architecture, len(names), distinct, cfg)


def _torchvision_names(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(module, TorchvisionNetwork):
        return dict(weights)
    last = f"{module.last_place}."
    return {f"fc.{name.removeprefix(last)}" if name.startswith(last) else f"body.{name}": tensor
            for name, tensor in weights.items()}


def _timm(source: str, name: str) -> Backbone:
    from zoo.architectures import create

    create(source, 2)  # its error says what is missing: timm, this name in it, or one linear last layer
    import timm

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise TrainingError(f"--backbone {source}: timm has no weights for it. timm.list_models(pretrained=True) lists "
                            "models with weights.")

    def fetch(module: nn.Module) -> Mapping[str, Tensor]:
        try:
            return timm.create_model(name, pretrained=True, num_classes=module.num_classes).state_dict()
        except Exception as error:  # of huggingface_hub, its network library, urllib or timm
            where = f"{cfg.hf_hub_id} on the Hugging Face Hub" if cfg.hf_hub_id else cfg.url
            raise TrainingError(
                f"--backbone {source}: its weights could not be downloaded ({first_line(error)}). On a machine with a "
                f"network, get the .safetensors or .bin file of {where}, and name it here: --backbone FILE "
                f"--architecture {source}.") from error

    shown = {"input_size": list(cfg.input_size), "mean": list(cfg.mean), "std": list(cfg.std),
             "interpolation": cfg.interpolation or "bilinear", "crop_pct": cfg.crop_pct}
    return Backbone(source, fetch, source, cfg.num_classes or None, None, shown)
