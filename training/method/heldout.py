"""Held-out augmentation: augment each class by how far held-out features lie from its training mean.

ISDA and MetaSAug start from the covariance of the training features. Once the network fits its training pictures, that
covariance is too small, most of all for rare classes: their few features are pulled together, and new pictures lie
outside. The augmentation should imitate where new pictures of a class lie, relative to the training mean m_c that the
last layer has learned. The meta set can measure this, because it has pictures of each class that are not trained on:

    M_c = E (f - m_c)(f - m_c)^T over held-out features f of class c
        = their covariance + (their mean - m_c)(their mean - m_c)^T

Ten pictures say little about A directions, so M_c is shrunk towards the mean over all classes (docs/heldout.md):

    S_c = k_c / (k_c + 10) M_c + 10 / (k_c + 10) mean_c M_c          k_c held-out pictures of class c, 0 or more

Nothing is learned by gradient, S_c is positive semi-definite by construction, and a class without held-out pictures
gets the mean of the others.

Shape suffixes: N samples, M held-out samples, C classes, A features, U distinct classes.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.method.covariance import Rows, RunningCovariance, as_column, load_tensors
from training.method.finite import Finite
from training.method.losses import HeadLoss
from training.method.metasaug import StepResult, TrainBatch
from training.network.derivatives import BatchFeatures, Compute

# A class with this many held-out pictures gives its own M_c the same weight as the mean over all classes.
PRIOR = 10


class HeldOut:
    """S of each class, from held-out features; see the top of this file.

    running     of the training features; held-out features are measured from its mean
    pictures    (C,) held-out pictures of each class, 0 or more
    moment      M, (C, A, A) or (C, A): mean over all features so far, each from the training mean at that time
    seen        (C,) int64, held-out features so far; repeats count
    """

    def __init__(self, running: RunningCovariance, pictures: Sequence[int]):
        self.running = running
        self.moment = torch.zeros_like(running.covariance)
        self.seen = torch.zeros_like(running.counts)
        k_C = torch.tensor(pictures, dtype=running.mean.dtype, device=running.mean.device)
        self._own_C = k_C / (k_C + PRIOR)

    def rows(self, classes_U: Tensor) -> Tensor:
        """S of these classes -> (U, A, A) or (U, A); 0 before the first `update`."""
        mean = self.moment.sum(0) / (self.seen > 0).sum().clamp_min(1)
        own_U = as_column(torch.where(self.seen > 0, self._own_C, 0)[classes_U], self.moment)
        return torch.lerp(mean.expand_as(self.moment[classes_U]), self.moment[classes_U], own_U)

    @property
    def delta(self) -> Tensor:
        """S minus the covariance of the training features."""
        return self.rows(torch.arange(len(self.seen), device=self.seen.device)) - self.running.covariance

    @torch.no_grad()
    def update(self, features_MA: Tensor, labels_M: Tensor, finite: Finite | None = None) -> None:
        """Add held-out features (detached here) of classes that training has shown, unless `finite` has failed."""
        rows = Rows.of(labels_M, len(self.seen))
        known_M = self.running.counts[labels_M] > 0
        away_MA = features_MA.detach().to(self.moment.dtype) - self.running.mean[labels_M]
        if finite is not None:
            known_M, away_MA = (finite.kept(t, torch.zeros_like(t)) for t in (known_M, away_MA))
        looks_U, classes_U = rows.sum(known_M.long()), rows.classes_U
        seen_U = self.seen[classes_U] + looks_U
        moment_U = rows.scatter(away_MA, self.running.kind, known_M.to(away_MA.dtype))
        moment_U /= as_column(looks_U.clamp_min(1), self.moment)
        share_U = as_column(looks_U / seen_U.clamp_min(1), self.moment)
        rows.put(self.moment, torch.lerp(self.moment[classes_U], moment_U, share_U))
        rows.put(self.seen, seen_U)

    def state_dict(self) -> dict[str, Tensor]:
        return {"moment": self.moment, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_tensors(self.state_dict(), state)


def heldout_step(
    module: nn.Module,
    pictures: Tensor,
    labels_N: Tensor,
    held_pictures: Tensor,
    held_labels: Tensor,
    held: HeldOut,
    head_loss: HeadLoss,
    strength: float,
    class_weights: Tensor | None = None,
    compute: Compute | None = None,
) -> StepResult:
    """One step with the loss augmented by the current S; then both estimates are updated with their features.

    Leaves the gradient in `.grad`.

    module          in train mode; batch norm's running statistics see the training batch, the held-out one never
    held_pictures   not trained on, of classes in any proportion; like pictures, this process's part
    strength        lambda_t of this epoch
    meta_loss of the result is the plain cross entropy of the held-out batch before the update.
    Raises DivergenceError before anything is updated (batch norm's statistics aside).
    """
    batch = TrainBatch(module, pictures, labels_N, head_loss, strength, class_weights, compute)
    # Batch norm uses the batch's own statistics, as in training, so only the pictures differ.
    looks = BatchFeatures(module, held_pictures, len(held_labels), batch.compute, {}, graph=False)
    with torch.no_grad():
        held_loss = F.cross_entropy(head_loss.logits(looks.whole_NA, *batch.head), held_labels)
    batch.compute.finite.check(meta_loss=[held_loss])
    finite = batch.compute.finite
    result = batch.leave_gradient(held.rows(batch.rows.classes_U))
    held.running.update(head_loss.augmentable_features(result.features_NA), labels_N, batch.rows, finite)
    held.update(head_loss.augmentable_features(looks.whole_NA), held_labels, finite)
    return dataclasses.replace(result, meta_loss=held_loss)
