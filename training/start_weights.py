"""Weights to start from: a model of the zoo, a model folder, or a file of tensors."""

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from training.errors import TrainingError
from zoo.loading import open_folder


def load_pretrained(module: nn.Module, source: str) -> list[str]:
    """Take over every tensor of the same name and shape; returns the names that start fresh.

    source   a name of the zoo, a model folder, a .safetensors file, or a torch file, opened with weights_only=True
    Raises TrainingError where nothing fits, or only little: less than half of the network's numbers.
    """
    weights = _read(source)
    own = module.state_dict()
    fitting = {name: weights[name].to(own[name]) for name in own
               if name in weights and weights[name].shape == own[name].shape}
    share = sum(own[name].numel() for name in fitting) / sum(tensor.numel() for tensor in own.values())
    if share < 0.5:
        raise TrainingError(f"--pretrained {source}: {len(fitting)} of {len(own)} tensors ({share:.0%} of the numbers) "
                            "fit this network by name and shape. Are the weights of another --architecture?")
    module.load_state_dict(fitting, strict=False)
    return sorted(own.keys() - fitting.keys())


def _read(source: str) -> dict[str, Tensor]:
    path = Path(source)
    if not path.is_file():
        return {name: torch.from_numpy(array.copy()) for name, array in open_folder(source).weights().items()}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise TrainingError(f"--pretrained {source} cannot be read as tensors: {str(error).splitlines()[0]}") from error
    except Exception as error:  # safetensors has an exception of its own
        raise TrainingError(f"--pretrained {source} is no file of weights: {error}") from error
    for key in ("state_dict", "state_dict_best", "model"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict):
        raise TrainingError(f"--pretrained {source} holds no weights by name.")
    return {name.removeprefix("module."): tensor for name, tensor in saved.items() if isinstance(tensor, Tensor)}
