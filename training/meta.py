"""The MetaSAug step: one look ahead on balanced data tells in which direction each class should be augmented.

With Theta the parameters, S the class covariances, alpha the inner and eta the meta rate (paper, algorithm 1):

    1. g = grad_Theta L(Theta, S) on the long-tailed batch
    2. v = gradient of the plain cross entropy at Theta - alpha g on the balanced meta batch
    3. grad_S = -alpha d/dS <grad_Theta L(Theta, S), v>
    4. S' = S - eta grad_S; the gradient of L(Theta, S') is left in `.grad`, the optimizer's step is the caller's

The mixed derivative of 3 needs no second backward pass through the network: S enters only the last layer, so the
backbone's share is <grad_f L, f_dot>, where f_dot = J_f v_backbone is how the features move along v, one forward-mode
pass. What remains is a second derivative of the last layer alone. Exact, not an approximation (docs/method.md).

    result = metasaug_step(module, pictures, labels, meta_pictures, meta_labels, learned, head_loss,
                           strength=..., inner_rate=..., lookahead="classifier")      # or plain_step, isda_step
    optimizer.step()

`module` is any torch module with timm's interface: forward_features, forward_head(pre_logits=True) and
get_classifier() -> nn.Linear. Shape suffixes: N samples, C classes, A features, U the distinct classes of the batch.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.covariance import LearnedCovariance, RunningCovariance, nearest_semidefinite
from training.errors import DivergenceError
from training.losses import HeadLoss

Lookahead = Literal["network", "classifier"]
Fidelity = Literal["fixed", "reference"]


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind beside the gradients in `.grad`; detached."""

    loss: Tensor  # the loss whose gradient is in .grad: L(Theta, S')
    features_NA: Tensor
    logits_NC: Tensor  # plain evaluation logits of the training batch, before the update
    meta_loss: Tensor | None = None  # plain cross entropy of the meta batch after the look ahead
    loss_before: Tensor | None = None  # L(Theta, S): loss - loss_before is what the change of S did
    shift: Tensor | None = None  # |S' - S| / |S| over the classes of the batch; 0 where S is 0


def plain_step(
    module: nn.Module,
    pictures: Tensor,
    labels_N: Tensor,
    head_loss: HeadLoss,
    class_weights: Tensor | None = None,
) -> StepResult:
    """The loss without augmentation: its gradient is left in `.grad`. DivergenceError before that."""
    batch = TrainBatch(module, pictures, labels_N, head_loss, 0.0, class_weights)
    return batch.leave_gradient(None)


def isda_step(
    module: nn.Module,
    pictures: Tensor,
    labels_N: Tensor,
    running: RunningCovariance,
    head_loss: HeadLoss,
    strength: float,
    class_weights: Tensor | None = None,
) -> StepResult:
    """The loss augmented by the running covariances as they stand; they then take in the batch, as MetaSAug's do."""
    batch = TrainBatch(module, pictures, labels_N, head_loss, strength, class_weights)
    result = batch.leave_gradient(running.covariance[batch.classes_U])
    running.update(head_loss.augmentable_features(result.features_NA), labels_N)
    return result


def metasaug_step(
    module: nn.Module,
    pictures: Tensor,
    labels_N: Tensor,
    meta_pictures: Tensor,
    meta_labels: Tensor,
    learned: LearnedCovariance,
    head_loss: HeadLoss,
    *,
    strength: float,
    inner_rate: float,
    meta_rate: float = 0.1,
    lookahead: Lookahead = "classifier",
    fidelity: Fidelity = "fixed",
    class_weights: Tensor | None = None,
) -> StepResult:
    """One MetaSAug step but for the optimizer's; formulas at the top of this file.

    module         in train mode; batch norm's running statistics see the training batch once, the meta batch never
    meta_pictures  a class-balanced batch
    learned        S = running estimate + delta. Both are updated here, last; the running estimate with the features
                   of this batch only after their use, as in the authors' code
    strength       lambda_t of this epoch
    inner_rate     alpha, of a plain SGD step: the optimizer's current rate          meta_rate  eta
    lookahead      through the whole network, or through the last layer only
    fidelity       fixed: delta is kept from step to step, and S stays positive semi-definite. reference: as in the
                   authors' code S' = running - eta grad_S serves this step only, and nothing is projected
    raises         DivergenceError before anything is updated (batch norm's statistics aside)
    """
    batch = TrainBatch(module, pictures, labels_N, head_loss, strength, class_weights)
    fixed = fidelity == "fixed"
    S_U = learned.rows(batch.classes_U) if fixed else learned.running.covariance[batch.classes_U]
    grad_U, loss_before, meta_loss = meta_gradient(batch, S_U, meta_pictures, meta_labels, inner_rate, lookahead)
    check_finite(loss=[loss_before], meta_loss=[meta_loss], meta_gradient=[grad_U])

    new_U = S_U - meta_rate * grad_U
    if fixed:
        new_U = nearest_semidefinite(new_U)
    result = batch.leave_gradient(new_U)
    if fixed:
        learned.keep(batch.classes_U, new_U)
    learned.running.update(head_loss.augmentable_features(result.features_NA), labels_N)

    size = torch.linalg.vector_norm(S_U)
    shift = torch.where(size > 0, torch.linalg.vector_norm(new_U - S_U) / size, 0.0)
    return dataclasses.replace(result, meta_loss=meta_loss, loss_before=loss_before, shift=shift)


class TrainBatch:
    """The one forward pass of a step: its graph serves the inner gradient and, once S' is known, the real one."""

    def __init__(
        self,
        module: nn.Module,
        pictures: Tensor,
        labels_N: Tensor,
        head_loss: HeadLoss,
        strength: float = 0.0,
        class_weights: Tensor | None = None,
    ):
        self.module, self.pictures, self.labels_N = module, pictures, labels_N
        self.head_loss, self.strength, self.class_weights = head_loss, strength, class_weights
        self.classes_U, self.index_N = labels_N.unique(return_inverse=True)
        fc: nn.Linear = module.get_classifier()  # type: ignore[operator]
        self.head = [p for p in (fc.weight, fc.bias) if p is not None]
        self.body = {
            n: p for n, p in module.named_parameters() if p.requires_grad and all(p is not q for q in self.head)
        }
        self.random_state = _random_state(pictures.device)
        self.features_NA = features_of(module, pictures)

    def loss(self, features_NA: Tensor, head: Sequence[Tensor], S_U: Tensor | None) -> Tensor:
        """L as a function of the features, [W, b] and the covariances of `classes_U`, None for no augmentation."""
        logits_NC = self.head_loss.logits(features_NA, *head)
        if S_U is not None:
            spread_UC = self.head_loss.spread(head[0], self.classes_U, S_U)
            logits_NC = logits_NC + self.strength / 2 * spread_UC[self.index_N]
        return self.head_loss.of_logits(logits_NC, self.labels_N, self.class_weights)

    def leave_gradient(self, S_U: Tensor | None) -> StepResult:
        """Leaves the gradient of L(Theta, S) in `.grad`, in place of what was there; frees the graph."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        loss = self.loss(self.features_NA, self.head, S_U)
        grads = torch.autograd.grad(loss, trained, materialize_grads=True)
        check_finite(loss=[loss.detach()], gradient=grads)
        for p, g in zip(trained, grads, strict=True):
            p.grad = g
        features_NA = self.features_NA.detach()
        with torch.no_grad():
            logits_NC = self.head_loss.logits(features_NA, *self.head)
        return StepResult(loss.detach(), features_NA, logits_NC)

    def body_gradient(self, features_grad_NA: Tensor) -> dict[str, Tensor]:
        """The backward pass from the features on; keeps the graph."""
        grads = torch.autograd.grad(
            self.features_NA, list(self.body.values()), features_grad_NA, retain_graph=True, materialize_grads=True
        )
        return dict(zip(self.body, grads, strict=True))

    def tangent(self, directions: dict[str, Tensor]) -> Tensor:
        """f_dot (N, A): the derivative of the features as the body's parameters move along `directions`."""
        with (
            torch.no_grad(),
            batch_norm_without_memory(self.module, tangents=True),
            _replayed(self.random_state, self.pictures.device),
            warnings.catch_warnings(action="ignore", category=FutureWarning),  # of torch about its own forward rules
            sdpa_kernel(SDPBackend.MATH),  # fused attention has no forward-mode rule
            forward_ad.dual_level(),
        ):
            moving = {n: forward_ad.make_dual(self.body[n].detach(), d) for n, d in directions.items()}
            features = features_of(self.module, self.pictures, moving)
            tangent_NA = forward_ad.unpack_dual(features).tangent
            return torch.zeros_like(features) if tangent_NA is None else tangent_NA


def meta_gradient(
    batch: TrainBatch,
    covariance_U: Tensor,
    meta_pictures: Tensor,
    meta_labels: Tensor,
    inner_rate: float,
    lookahead: Lookahead = "classifier",
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 to 3 -> (grad_S for the batch's classes, L(Theta, S), meta loss after the look ahead)."""
    # 1. The last layer's gradient, kept differentiable in S; into the backbone it goes on as a plain backward pass.
    # In float64: it costs little beside a backbone, and differences of rounded numbers are what a mixed derivative is.
    precise = batch.features_NA.dtype if batch.features_NA.device.type == "mps" else torch.float64
    f_NA, S_U, *head = (t.detach().to(precise).requires_grad_() for t in (batch.features_NA, covariance_U, *batch.head))
    network = lookahead == "network" and bool(batch.body)
    loss = batch.loss(f_NA, head, S_U)
    inputs = [*head, f_NA] if network else head
    grads = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    body_steps = batch.body_gradient(grads[-1].detach().to(batch.features_NA.dtype)) if network else {}

    # 2. One plain SGD step, and the gradient of the meta loss there.
    ahead = [_stepped(p, g, inner_rate) for p, g in zip(batch.head, grads, strict=False)]
    ahead_body = {n: _stepped(batch.body[n], g, inner_rate) for n, g in body_steps.items()}
    with batch_norm_without_memory(batch.module), torch.set_grad_enabled(network):
        meta_features = features_of(batch.module, meta_pictures, ahead_body)
    meta_loss = F.cross_entropy(batch.head_loss.logits(meta_features, *ahead), meta_labels)
    v = torch.autograd.grad(meta_loss, [*ahead, *ahead_body.values()], materialize_grads=True)

    # 3. <grad_Theta L, v>: all of it that depends on S is in the last layer.
    directions = list(v[: len(head)])
    if network:
        directions.append(batch.tangent(dict(zip(ahead_body, v[len(head) :], strict=True))))
    along_v = torch.stack([(g * d).sum() for g, d in zip(grads, directions, strict=True)]).sum()
    (grad_U,) = torch.autograd.grad(along_v, S_U, materialize_grads=True)
    dtype = covariance_U.dtype
    return (-inner_rate * grad_U).to(dtype), loss.detach().to(dtype), meta_loss.detach()


def _stepped(parameter: Tensor, gradient: Tensor, rate: float) -> Tensor:
    return (parameter.detach() - rate * gradient.detach().to(parameter.dtype)).requires_grad_()


def check_finite(**tensors: Sequence[Tensor]) -> None:
    """Raises DivergenceError naming the first of these that holds a NaN or an infinity; one look at the device."""
    norms = torch.stack([torch.stack(torch._foreach_norm(list(group))).sum() for group in tensors.values()])
    for name, norm in zip(tensors, norms.tolist(), strict=True):
        if not abs(norm) < float("inf"):
            raise DivergenceError(f"The {name.replace('_', ' ')} is not finite ({norm}).")


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
    """Batch norm in train mode goes on using the batch's statistics, but leaves its running ones alone.

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
    """y = gamma x_hat + beta, and its tangent out of two fused kernels.

    The Jacobian of y in x is symmetric, so that the kernel of the backward pass also pushes tangents forward:

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
        return y_dot, None, None


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextlib.contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Dropout draws again what it drew when `states` were taken."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.set_rng_state(states[0])
        if cuda:
            torch.cuda.set_rng_state(states[1], device)
        yield
