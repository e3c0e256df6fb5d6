"""The backbone's part of a step: features of a batch, and their forward and backward derivatives.

A batch may be split over processes and, in each, into consecutive parts (`--accumulate`). The backbone may run in a
lower precision than the last layer. `BatchFeatures` hides this: features, gradients and tangents are those of the whole
batch. In the simplest case it is one forward pass and its graph.

Shape suffixes: N samples of the whole batch, A features.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.method.finite import Finite
from training.network.distributed import ALONE, Processes

Precision = Literal["float32", "bfloat16", "float16"]


class GradientScale:
    """Loss scale for float16 gradients, which underflow below 6e-8: a power of two, halved until none overflows.

    Like torch.amp.GradScaler, but an overflowed pass is repeated instead of skipping the step.
    """

    START, GROW_AFTER = 2.0**16, 2000

    def __init__(self) -> None:
        self.scale, self.good = self.START, 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.scale, self.good = saved["scale"], saved["good"]

    def __call__(self, backward: Callable[[float], list[Tensor]]) -> list[Tensor]:
        """Gradients, unscaled. backward: returns the gradients times its argument."""
        while True:
            grads = backward(self.scale)
            norms = torch.stack(torch._foreach_norm(grads))
            if bool(norms.isfinite().all()) or self.scale <= 1:
                break
            self.scale, self.good = self.scale / 2, 0
        grads = [g / self.scale for g in grads]
        self.good += 1
        if self.good >= self.GROW_AFTER:
            self.scale, self.good = min(self.scale * 2, 2.0**24), 0
        return grads


@dataclass
class Compute:
    """How the backbone is run.

    processes    that share each batch
    precision    bfloat16, float16: torch's autocast; float32: the parameters' own type
    accumulate   consecutive parts of a batch; batch norm uses the statistics of a part
    compiled     use torch.compile for the training pass, not for look-ahead passes
    finite       the checks of each step
    draws        the network may draw random numbers (dropout), and a second pass must draw the same
    """

    processes: Processes = ALONE
    precision: Precision = "float32"
    accumulate: int = 1
    compiled: bool = False
    scale: GradientScale = field(default_factory=GradientScale)
    finite: Finite = field(default_factory=Finite)
    draws: bool = True
    _bodies: dict[int, Callable] = field(default_factory=dict)

    def autocast(self, device: torch.device, cache: bool = True) -> contextlib.AbstractContextManager:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, getattr(torch, self.precision), cache_enabled=cache)

    def body(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        if not self.compiled:
            return _Body(module)
        if id(module) not in self._bodies:
            self._bodies[id(module)] = torch.compile(  # fallback_random: the same random numbers as uncompiled
                _Body(module), dynamic=False, options={"fallback_random": True})
        return self._bodies[id(module)]


class BatchFeatures:
    """The features of a batch (whole_NA) and their derivatives by the backbone's parameters.

    pictures     this process's part of the batch
    total        N, pictures in the whole batch
    parameters   other values of the backbone's parameters, by name; batch norm's running statistics then do not change
    graph        keep what `backward` needs; without it only tangents are possible
    tangents     `tangent` will be called: attention then uses its kernel, since fused ones draw dropout differently
    """

    def __init__(
        self,
        module: nn.Module,
        pictures: Tensor,
        total: int,
        compute: Compute,
        parameters: dict[str, Tensor] | None = None,
        graph: bool = True,
        tangents: bool = False,
    ):
        self.tangents = tangents
        self.module, self.total, self.compute, self.parameters = module, total, compute, parameters
        self.device, self.dtype = pictures.device, module.get_classifier().weight.dtype  # type: ignore[operator, union-attr]
        self.parts = pictures.tensor_split(min(compute.accumulate, max(1, len(pictures) // 2)))
        self.random_states: list[list[Tensor] | None] = []
        again, own = compute.draws and (tangents or len(self.parts) > 1), []
        with torch.set_grad_enabled(graph and len(self.parts) == 1):
            for part in self.parts:
                self.random_states.append(random_state(self.device) if again else None)
                own.append(self._forward(part, first=True))
        self.own_NA = torch.cat(own) if len(own) > 1 else own[0]
        self.whole_NA = compute.processes.gather(self.own_NA, total)

    def _forward(self, pictures: Tensor, first: bool = False) -> Tensor:
        remembering = first and self.parameters is None
        with (
            contextlib.nullcontext() if remembering else batch_norm_without_memory(self.module),
            sdpa_kernel(SDPBackend.MATH) if self.tangents else contextlib.nullcontext(),
            self.compute.autocast(self.device),
        ):
            if remembering:
                return self.compute.body(self.module)(pictures).to(self.dtype)
            return features_of(self.module, pictures, self.parameters).to(self.dtype)

    def backward(self, features_grad_NA: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients by `inputs`, which the features depend on, for the whole batch; keeps the graph."""
        if not inputs:
            return []
        own_NA = features_grad_NA[self.compute.processes.part(self.total)].to(self.dtype)

        def scaled(scale: float) -> list[Tensor]:
            return self.compute.processes.sum(self._backward(own_NA * scale, inputs))

        return self.compute.scale(scaled) if self.compute.precision == "float16" else scaled(1.0)

    def _backward(self, own_NA: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        if len(self.parts) == 1:
            return list(torch.autograd.grad(self.own_NA, inputs, own_NA, retain_graph=True, materialize_grads=True))
        sums: list[Tensor] = []
        grads_of_parts = own_NA.split([len(part) for part in self.parts])
        for part, state, grad_NA in zip(self.parts, self.random_states, grads_of_parts, strict=True):
            with torch.enable_grad(), _replayed(state, self.device):
                features_NA = self._forward(part)
            grads = torch.autograd.grad(features_NA, inputs, grad_NA, materialize_grads=True)
            sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else list(grads)
        return sums

    def tangent(self, directions: dict[str, Tensor]) -> Tensor:
        """f_dot (N, A): the derivative of the features as parameters (by name) move along `directions`."""
        assert self.tangents or not self.compute.draws, "dropout's draws were not kept"
        named = dict(self.module.named_parameters())
        own = []
        for part, state in zip(self.parts, self.random_states, strict=True):
            with (
                torch.no_grad(),
                batch_norm_without_memory(self.module, tangents=True),
                _replayed(state, self.device),
                warnings.catch_warnings(action="ignore", category=FutureWarning),  # torch's, about its own rules
                sdpa_kernel(SDPBackend.MATH),  # fused attention has no forward-mode rule
                self.compute.autocast(self.device, cache=False),
                forward_ad.dual_level(),
            ):
                moving = {n: forward_ad.make_dual(named[n].detach(), d) for n, d in directions.items()}
                features = features_of(self.module, part, moving)
                tangent_NA = forward_ad.unpack_dual(features).tangent
                own.append(torch.zeros_like(features) if tangent_NA is None else tangent_NA)
        return self.compute.processes.gather(torch.cat(own).to(self.dtype), self.total)


def features_of(module: nn.Module, pictures: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """What enters the last layer, (N, A); with some of the parameters (by name) in other values."""
    body = _Body(module)
    if not parameters:
        return body(pictures)
    return functional_call(body, {f"module.{n}": p for n, p in parameters.items()}, (pictures,))


class _Body(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.module.forward_features(pictures)  # type: ignore[operator]
        return self.module.forward_head(features, pre_logits=True)  # type: ignore[operator]


@contextlib.contextmanager
def batch_norm_without_memory(module: nn.Module, tangents: bool = False) -> Iterator[None]:
    """Batch norm in train mode uses the batch's statistics without changing its running ones.

    tangents  the pass is forward-mode: use `_BatchNormWithTangent`, about twice as fast as torch's own rule
    """
    norms = [
        m
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats
    ]
    for m in norms:
        m.track_running_stats = False
        if tangents and m.weight is not None and not isinstance(m, nn.SyncBatchNorm):
            m.forward = functools.partial(_normalised_with_tangent, m)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True
            m.__dict__.pop("forward", None)


def _normalised_with_tangent(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    return _BatchNormWithTangent.apply(x, norm.weight, norm.bias, norm.eps)[0]


class _BatchNormWithTangent(torch.autograd.Function):
    """y = gamma x_hat + beta, and its tangent by two fused kernels.

    The Jacobian of y in x is symmetric, so the kernel of the backward pass also pushes tangents forward:

        y_dot = backward_kernel(x_dot) + (gamma_dot x_hat + beta_dot)
    """

    @staticmethod
    def forward(x, gamma, beta, eps):
        return torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gamma, _, ctx.eps = inputs
        _, mean, inverse_std = output
        ctx.mark_non_differentiable(mean, inverse_std)
        ctx.save_for_forward(x, gamma, mean, inverse_std)

    @staticmethod
    def jvp(ctx, x_dot, gamma_dot, beta_dot, _):
        x, gamma, mean, inverse_std = ctx.saved_tensors
        variance = inverse_std**-2 - ctx.eps
        y_dot = F.batch_norm(x, mean, variance, gamma_dot, beta_dot, False, 0.0, ctx.eps)
        y_dot += torch.ops.aten.native_batch_norm_backward(
            x_dot, x, gamma, None, None, mean, inverse_std, True, ctx.eps, [True, False, False]
        )[0]
        return y_dot.to(x.dtype), None, None  # under autocast CUDA's kernels may give float32


def random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextlib.contextmanager
def _replayed(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Restore the random states, so dropout draws the same again; None: nothing is drawn."""
    if states is None:
        yield
        return
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.set_rng_state(states[0])
        if cuda:
            torch.cuda.set_rng_state(states[1], device)
        yield
