"""The MetaSAug step: a virtual update, tested on balanced data, shows how to augment each class.

With Theta the parameters, S the class covariances, alpha the inner and eta the meta rate (paper, algorithm 1):

    1. g = grad_Theta L(Theta, S) on the long-tailed batch
    2. v = gradient of the plain cross entropy at Theta - alpha g on the balanced meta batch
    3. grad_S = -alpha d/dS <grad_Theta L(Theta, S), v>
    4. S' = S - eta grad_S; the gradient of L(Theta, S') is left in `.grad`, and the caller does the optimizer's step

The mixed derivative in 3 needs no second backward pass through the network. S enters only the last layer, so the
backbone's share is <grad_f L, f_dot>. There f_dot = J_f v_backbone is the change of the features along v, from one
forward-mode pass. Only a second derivative of the last layer remains. This is exact (docs/method.md).

    result = metasaug_step(module, pictures, labels, meta_pictures, meta_labels, learned, head_loss,
                           strength=..., inner_rate=..., lookahead="classifier")      # or plain_step, isda_step
    optimizer.step()

`module` is any torch module with timm's interface: forward_features, forward_head(pre_logits=True) and
get_classifier() -> nn.Linear. Shape suffixes: N samples, C classes, A features, U the rows of the batch's classes
(`Rows`).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.method.covariance import (
    LearnedCovariance,
    Rows,
    RunningCovariance,
    as_column,
    nearest_semidefinite,
    precise_dtype,
)
from training.method.losses import HeadLoss
from training.network.derivatives import BatchFeatures, Compute

Lookahead = Literal["network", "classifier"]
Fidelity = Literal["fixed", "reference"]
Implementation = Literal["auto", "autograd", "closed form"]


@dataclass(frozen=True)
class StepResult:
    """Results of a step besides the gradients in `.grad`; detached."""

    loss: Tensor  # the loss whose gradient is in .grad: L(Theta, S')
    features_NA: Tensor
    logits_NC: Tensor  # plain evaluation logits of the batch before the update; in closed form only its first samples
    meta_loss: Tensor | None = None  # plain cross entropy of the meta batch after the look ahead
    loss_before: Tensor | None = None  # L(Theta, S): loss - loss_before is the effect of changing S
    shift: Tensor | None = None  # |S' - S| / |S| over the classes of the batch; 0 where S is 0


def plain_step(
    module: nn.Module,
    pictures: Tensor,
    labels_N: Tensor,
    head_loss: HeadLoss,
    class_weights: Tensor | None = None,
    compute: Compute | None = None,
) -> StepResult:
    """Leave the gradient of the loss without augmentation in `.grad`; raises DivergenceError before that."""
    return TrainBatch(module, pictures, labels_N, head_loss, 0.0, class_weights, compute).leave_gradient(None)


def isda_step(
    module: nn.Module,
    pictures: Tensor,
    labels_N: Tensor,
    running: RunningCovariance,
    head_loss: HeadLoss,
    strength: float,
    class_weights: Tensor | None = None,
    compute: Compute | None = None,
) -> StepResult:
    """One step with the loss augmented by the running covariances, which are then updated with the batch."""
    batch = TrainBatch(module, pictures, labels_N, head_loss, strength, class_weights, compute)
    result = batch.leave_gradient(running.covariance[batch.rows.classes_U])
    running.update(head_loss.augmentable_features(result.features_NA), labels_N, batch.rows, batch.compute.finite)
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
    compute: Compute | None = None,
    implementation: Implementation = "auto",
) -> StepResult:
    """One MetaSAug step without the optimizer's update; formulas at the top of this file.

    module         in train mode; batch norm's running statistics see the training batch once, the meta batch never
    meta_pictures  a class-balanced batch; like pictures, this process's part of it
    learned        S = running estimate + delta. Both are updated at the end: this step does not use the running
                   estimate of its own features, as in the authors' code
    strength       lambda_t of this epoch
    inner_rate     alpha, of a plain SGD step: the optimizer's current rate          meta_rate  eta
    lookahead      through the whole network, or through the last layer only
    fidelity       fixed: delta is kept from step to step, and S stays positive semi-definite. reference: as in the
                   authors' code S' = running - eta grad_S serves this step only, and nothing is projected
    implementation closed form: a few matrix products, if only the last layer trains and training.method.closed_form
                   supports loss and covariances; autograd: always possible; auto: closed form if possible
    raises         DivergenceError before anything is updated (batch norm's statistics aside)
    """
    from training.method import closed_form  # imports this module

    compute = compute or Compute()
    only_head_trains = not trained_body(module)
    if implementation == "auto" and only_head_trains and closed_form.holds(head_loss, learned):
        implementation = "closed form"
    if implementation == "closed form":
        features_NA, meta_features_MA = (BatchFeatures(module, x, len(y), compute, graph=False).whole_NA
                                         for x, y in ((pictures, labels_N), (meta_pictures, meta_labels)))
        return closed_form.frozen_head_step(
            module.get_classifier(), features_NA, labels_N, meta_features_MA, meta_labels,  # type: ignore[operator]
            learned, head_loss, strength=strength, inner_rate=inner_rate, meta_rate=meta_rate, fidelity=fidelity,
            class_weights=class_weights, compute=compute)

    batch = TrainBatch(module, pictures, labels_N, head_loss, strength, class_weights, compute, lookahead == "network")
    rows, finite, fixed = batch.rows, batch.compute.finite, fidelity == "fixed"
    used_U = rows.sum(torch.ones_like(labels_N)) > 0
    S_U = learned.rows(rows.classes_U, used_U) if fixed else learned.running.covariance[rows.classes_U]
    grad_U, loss_before, meta_loss = meta_gradient(batch, S_U, meta_pictures, meta_labels, inner_rate, lookahead)
    finite.check(loss=[loss_before], meta_loss=[meta_loss], meta_gradient=[grad_U])

    new_U = S_U - meta_rate * grad_U
    if fixed:
        new_U = nearest_semidefinite(new_U, used_U)
    result = batch.leave_gradient(new_U)
    if fixed:
        learned.keep(rows, used_U, new_U, finite)
    learned.running.update(head_loss.augmentable_features(result.features_NA), labels_N, rows, finite)

    shift = relative_shift(new_U, S_U, used_U)
    return dataclasses.replace(result, meta_loss=meta_loss, loss_before=loss_before, shift=shift)


def relative_shift(new_U: Tensor, old_U: Tensor, used_U: Tensor) -> Tensor:
    """|S' - S| / |S| over the used rows; 0 if S is 0."""
    used_U = as_column(used_U, old_U)
    size = torch.linalg.vector_norm(old_U * used_U)
    return torch.where(size > 0, torch.linalg.vector_norm((new_U - old_U) * used_U) / size, 0.0)


def trained_body(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, without the last layer's."""
    last = {id(p) for p in module.get_classifier().parameters()}  # type: ignore[operator, union-attr]
    return {n: p for n, p in module.named_parameters() if p.requires_grad and id(p) not in last}


class TrainBatch:
    """The single forward pass of a step, whose graph gives the inner gradient and, once S' is known, the real one.

    pictures   this process's part of the batch          labels_N   of the whole batch
    tangents   tangents of the features will be needed (`BatchFeatures`)
    """

    def __init__(
        self,
        module: nn.Module,
        pictures: Tensor,
        labels_N: Tensor,
        head_loss: HeadLoss,
        strength: float = 0.0,
        class_weights: Tensor | None = None,
        compute: Compute | None = None,
        tangents: bool = False,
    ):
        self.module, self.labels_N = module, labels_N
        self.head_loss, self.strength, self.class_weights = head_loss, strength, class_weights
        self.compute = compute or Compute()
        fc: nn.Linear = module.get_classifier()  # type: ignore[operator]
        self.rows = Rows.of(labels_N, fc.out_features)
        self.head = [p for p in (fc.weight, fc.bias) if p is not None]
        self.body = trained_body(module)
        self.features = BatchFeatures(module, pictures, len(labels_N), self.compute, graph=bool(self.body),
                                      tangents=tangents)
        self.features_NA = self.features.whole_NA

    def loss(self, features_NA: Tensor, head: Sequence[Tensor], S_U: Tensor | None) -> Tensor:
        """L as a function of the features, [W, b] and the covariances of `rows`, None for no augmentation."""
        bias_C = head[1] if len(head) > 1 else None
        return self.head_loss(features_NA, head[0], bias_C, self.labels_N, S_U, self.strength, self.class_weights,
                              self.rows[:2])

    def leave_gradient(self, S_U: Tensor | None) -> StepResult:
        """Set `.grad` to the gradient of L(Theta, S)."""
        f_NA = self.features_NA.detach().requires_grad_(bool(self.body))
        head = [p for p in self.head if p.requires_grad]
        loss = self.loss(f_NA, self.head, S_U)
        grads = torch.autograd.grad(loss, [*head, *([f_NA] if self.body else [])], materialize_grads=True)
        head_grads = [g.contiguous() for g in grads[: len(head)]]
        self.compute.processes.level(head_grads)
        body_grads = self.body_gradient(grads[-1]) if self.body else {}
        self.compute.finite.check(loss=[loss.detach()], gradient=[*head_grads, *body_grads.values()])
        for p, g in zip([*head, *self.body.values()], [*head_grads, *body_grads.values()], strict=True):
            p.grad = g
        with torch.no_grad():
            logits_NC = self.head_loss.logits(self.features_NA, *self.head)
        return StepResult(loss.detach(), self.features_NA, logits_NC)

    def body_gradient(self, features_grad_NA: Tensor) -> dict[str, Tensor]:
        """The backward pass from the features into the backbone; keeps the graph."""
        grads = self.features.backward(features_grad_NA, list(self.body.values()))
        return dict(zip(self.body, grads, strict=True))


def meta_gradient(
    batch: TrainBatch,
    covariance_U: Tensor,
    meta_pictures: Tensor,
    meta_labels: Tensor,
    inner_rate: float,
    lookahead: Lookahead = "classifier",
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 to 3 -> (grad_S for the batch's rows, L(Theta, S), meta loss after the look ahead)."""
    # 1. The last layer's gradient, kept differentiable in S; the backbone gets a plain backward pass.
    # In float64: it costs little next to a backbone, and a mixed derivative is a difference of rounded numbers.
    precise = precise_dtype(batch.features_NA)
    f_NA, S_U, *head = (t.detach().to(precise).requires_grad_() for t in (batch.features_NA, covariance_U, *batch.head))
    network = lookahead == "network" and bool(batch.body)
    loss = batch.loss(f_NA, head, S_U)
    inputs = [*head, f_NA] if network else head
    grads = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    body_steps = batch.body_gradient(grads[-1].detach()) if network else {}

    # 2. One plain SGD step, and the gradient of the meta loss there.
    ahead = [_stepped(p, g, inner_rate) for p, g in zip(batch.head, grads, strict=False)]
    ahead_body = {n: _stepped(batch.body[n], g, inner_rate) for n, g in body_steps.items()}
    meta = BatchFeatures(batch.module, meta_pictures, len(meta_labels), batch.compute, ahead_body, graph=network)
    f_meta_NA = meta.whole_NA.requires_grad_(network)
    meta_loss = F.cross_entropy(batch.head_loss.logits(f_meta_NA, *ahead), meta_labels)
    v = list(torch.autograd.grad(meta_loss, [*ahead, *([f_meta_NA] if network else [])], materialize_grads=True))

    # 3. <grad_Theta L, v>: only the last layer depends on S.
    if network:
        v_body = meta.backward(v.pop(), list(ahead_body.values()))
        v.append(batch.features.tangent(dict(zip(ahead_body, v_body, strict=True))))
    along_v = torch.stack([(g * d).sum() for g, d in zip(grads, v, strict=True)]).sum()
    (grad_U,) = torch.autograd.grad(along_v, S_U, materialize_grads=True)
    dtype = covariance_U.dtype
    batch.compute.processes.level([grad_U])
    return (-inner_rate * grad_U).to(dtype), loss.detach().to(dtype), meta_loss.detach()


def _stepped(parameter: Tensor, gradient: Tensor, rate: float) -> Tensor:
    return (parameter.detach() - rate * gradient.detach().to(parameter.dtype)).requires_grad_()
