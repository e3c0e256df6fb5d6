"""Whether every number of a step is finite, decided without waiting for the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from training.errors import DivergenceError


def check_finite(**tensors: Sequence[Tensor]) -> None:
    """Raises DivergenceError naming the first of these that holds a NaN or an infinity; waits for the device once."""
    for name, norm in zip(tensors, _norms(tensors.values()).tolist(), strict=True):
        if not abs(norm) < float("inf"):
            raise _not_finite(name, norm)


def _norms(groups: Iterable[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(torch._foreach_norm(list(group))).sum() for group in groups])


def _not_finite(name: str, norm: float) -> DivergenceError:
    return DivergenceError(f"The {name.replace('_', ' ')} is not finite ({norm}).")


class Finite:
    """The checks of a run's steps. Without a device they raise at once, as `check_finite` does.

    On a GPU (`device`) a check leaves a flag there. From the first step that fails on, `kept` gives old values, so
    that this step and all later ones change nothing, and the host learns of it from `raise_if_failed`.
    """

    def __init__(self, device: torch.device | None = None):
        self.on_device = device is not None
        if device is not None:
            self.ok = torch.ones((), dtype=torch.bool, device=device)
            self.steps = torch.zeros((), dtype=torch.int64, device=device)  # that went well
            self.norm = torch.zeros((), dtype=torch.float64, device=device)  # of what failed first
            self.code = torch.zeros((), dtype=torch.int64, device=device)  # its place in `names`
            self.names: list[str] = []

    def check(self, **tensors: Sequence[Tensor]) -> None:
        """Raises DivergenceError, or notes on the device which of these is not finite."""
        if not self.on_device:
            return check_finite(**tensors)
        norms, first_name = _norms(tensors.values()).double(), len(self.names)
        self.names += tensors
        bad = ~norms.isfinite()
        place = bad.int().argmax()  # the first one
        now = self.ok & bad.any()
        self.code.copy_(torch.where(now, first_name + place, self.code))
        self.norm.copy_(torch.where(now, norms[place], self.norm))
        self.ok.logical_and_(~bad.any())

    def kept(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` while every check has passed, else `old`."""
        return torch.where(self.ok, new, old) if self.on_device else new

    def end_step(self) -> None:
        if self.on_device:
            self.steps += self.ok

    def raise_if_failed(self) -> None:
        """DivergenceError where a check has failed; waits for the device. `steps` then says how many went well."""
        if self.on_device and not bool(self.ok):
            raise _not_finite(self.names[int(self.code)], float(self.norm))
