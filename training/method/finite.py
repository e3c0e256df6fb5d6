"""Check that every number of a step is finite, without waiting for the device."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from training.errors import DivergenceError


def check_finite(**tensors: Sequence[Tensor]) -> None:
    """Raise DivergenceError naming the first of these with a NaN or an infinity; waits for the device once."""
    for name, norm in zip(tensors, _norms(tensors.values()).tolist(), strict=True):
        if not abs(norm) < float("inf"):
            raise _not_finite(name, norm)


def _norms(groups: Iterable[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(torch._foreach_norm(list(group))).sum() for group in groups])


def _not_finite(name: str, norm: float) -> DivergenceError:
    return DivergenceError(f"The {name.replace('_', ' ')} is not finite ({norm}).")


class Finite:
    """The checks of a run's steps. Without a device they raise at once, as `check_finite` does.

    On a GPU (`device`) a check sets a flag on the device. From the first failed step on, `kept` returns old values, so
    this step and all later ones change nothing. `raise_if_failed` tells the host.
    """

    def __init__(self, device: torch.device | None = None):
        self.on_device = device is not None
        if device is not None:
            self.ok = torch.ones((), dtype=torch.bool, device=device)
            self.steps = torch.zeros((), dtype=torch.int64, device=device)  # that passed
            self.norm = torch.zeros((), dtype=torch.float64, device=device)  # of the first failure
            self.code = torch.zeros((), dtype=torch.int64, device=device)  # its index in `names`
            self.names: list[str] = []
            self.first_step = 0

    def begin(self, step: int) -> None:
        """Start an epoch at this step, from 0."""
        if self.on_device:
            self.first_step = step
            self.steps.zero_()

    def check(self, **tensors: Sequence[Tensor]) -> None:
        """Raise DivergenceError, or note on the device which of these is not finite."""
        if not self.on_device:
            return check_finite(**tensors)
        for name, norm in zip(tensors, _norms(tensors.values()).double(), strict=True):
            if name not in self.names:
                self.names.append(name)
            finite = norm.isfinite()
            now = self.ok & ~finite
            self.code.masked_fill_(now, self.names.index(name))
            self.norm.copy_(torch.where(now, norm, self.norm))
            self.ok.logical_and_(finite)

    def kept(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` while every check has passed, else `old`."""
        return torch.where(self.ok, new, old) if self.on_device else new

    @contextmanager
    def keeping(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Undo the block's changes to these if a check fails: batch norm's statistics change before any check."""
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors if self.on_device else ():
            groups.setdefault(tensor.dtype, []).append(tensor)
        before = {dtype: _flat(group) for dtype, group in groups.items()}
        yield
        for dtype, group in groups.items():
            parts = self.kept(_flat(group), before[dtype]).split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [part.view_as(t) for part, t in zip(parts, group, strict=True)])

    def end_step(self) -> None:
        if self.on_device:
            self.steps += self.ok

    def failed_step(self) -> int:
        """The step, from 1, that failed; 0 if none has, or if checks raise at once. Waits for the device."""
        return self.first_step + int(self.steps) + 1 if self.on_device and not bool(self.ok) else 0

    def raise_if_failed(self) -> None:
        """Raise DivergenceError if a check has failed; waits for the device."""
        if self.on_device and not bool(self.ok):
            raise _not_finite(self.names[int(self.code)], float(self.norm))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
