"""Losses for long-tailed recognition, each alone or with the covariance augmentation of ISDA and MetaSAug.

Shape suffixes: N samples, C classes, A features (the input width of the last layer), U the distinct classes of a
batch. Covariances are full, (C, A, A), or diagonal, (C, A); everything here takes either.

Pure functions come first. `HeadLoss` composes them into the object that training uses: the loss of a last layer as a
function of its features, weight and bias. The loop and the meta step thus differentiate the same function.
docs/method.md says which combination is which published method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from training.recipes import Loss
from zoo.architectures import cosine_logits

# A chunk of classes may fill this many numbers, (chunk, C, A), at a time; 4 M float32 are 16 MB.
_CHUNK_NUMBERS = 4_000_000


# ---- class weights, margins, priors ----


def class_balanced_weights(class_counts: Sequence[int] | Tensor, beta: float = 0.9999) -> Tensor:
    """w_c = (1 - beta) / (1 - beta^n_c), scaled to sum to C (Cui et al. 2019, eq. 4) -> (C,) float64.

    class_counts  pictures of each class, >= 1 (a class without pictures has no weight: ValueError)
    beta          in [0, 1); 0 gives all ones
    """
    counts_C = _counts(class_counts)
    if not 0 <= beta < 1:
        raise ValueError(f"beta {beta}: must be in [0, 1).")
    weights_C = (1 - beta) / (1 - beta**counts_C)
    return weights_C / weights_C.sum() * len(weights_C)


def ldam_margins(class_counts: Sequence[int] | Tensor, max_margin: float = 0.5) -> Tensor:
    """m_c = max_margin * (min n / n_c)^(1/4): the rarest class has the widest (Cao et al. 2019, eq. 13) -> (C,)."""
    counts_C = _counts(class_counts)
    return max_margin * (counts_C.min() / counts_C) ** 0.25


def log_prior(class_counts: Sequence[int] | Tensor) -> Tensor:
    """log(n_c / sum n) -> (C,) float64."""
    counts_C = _counts(class_counts)
    return (counts_C / counts_C.sum()).log()


def _counts(class_counts: Sequence[int] | Tensor) -> Tensor:
    counts_C = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts_C.ndim != 1 or len(counts_C) < 2 or (counts_C < 1).any():
        raise ValueError("class_counts: one count a class, at least two classes, each with at least one picture.")
    return counts_C


# ---- losses of logits ----


def cross_entropy(logits_NC: Tensor, labels_N: Tensor, class_weights_C: Tensor | None = None) -> Tensor:
    """sum_n w_yn * ce_n / sum_n w_yn: F.cross_entropy(weight=...), the reduction of the authors' code.

    It is not the mean of w * ce: a batch with only rare classes weighs no more than one with only common classes.
    """
    return F.cross_entropy(logits_NC, labels_N, weight=_like(class_weights_C, logits_NC))


def focal(
    logits_NC: Tensor, labels_N: Tensor, class_weights_C: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    """sum_n w_yn * (1 - p_n)^gamma * ce_n / sum_n w_yn, p_n = exp(-ce_n) (Lin et al. 2017, eq. 5).

    The same weighted mean as `cross_entropy`, and equal to it at gamma 0. This is the paper's formula. LDAM's code and
    its derivatives weight ce before the power, which turns p_n into p_n^w.
    """
    focal_N = focal_of_log_probability(-F.cross_entropy(logits_NC, labels_N, reduction="none"), gamma)
    if class_weights_C is None:
        return focal_N.mean()
    weights_N = _like(class_weights_C, logits_NC)[labels_N]
    return (weights_N * focal_N).sum() / weights_N.sum()


def focal_of_log_probability(log_p_N: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p."""
    # 1 - p as -expm1(log p): exact for easy samples. The floor keeps the slopes of x^gamma, gamma < 2, finite at 0.
    wrong_N = (-torch.expm1(log_p_N)).clamp_min(torch.finfo(log_p_N.dtype).eps)
    return -(wrong_N**gamma) * log_p_N


def less_margin(logits_NC: Tensor, labels_N: Tensor, margins_C: Tensor) -> Tensor:
    """z_ny - m_y at the true class, z elsewhere (Cao et al. 2019, eq. 12, without the scale)."""
    margin_N = _like(margins_C, logits_NC)[labels_N]
    return logits_NC.scatter_add(1, labels_N[:, None], -margin_N[:, None])


# ---- the augmentation ----


def class_spread(weight_CA: Tensor, classes_U: Tensor, covariance_U: Tensor) -> Tensor:
    """q_uj = (w_j - w_u)^T S_u (w_j - w_u) -> (U, C): the variance of logit j minus logit u along S_u.

    Memory O(UC + CA) for the diagonal form and O(UC + a chunk) for the full one, never (N, C, A).

    covariance_U  rows of S for classes_U only, (U, A, A) or (U, A), symmetric, >= 0
    """
    own_UA = weight_CA[classes_U]
    if covariance_U.ndim == 2:
        if covariance_U.shape[0] * weight_CA.numel() <= _CHUNK_NUMBERS:
            # Without expanding the square, which doubles the error in float32.
            away_UCA = weight_CA[None] - own_UA[:, None]
            return (away_UCA * away_UCA * covariance_U[:, None]).sum(2)
        scaled_UA = covariance_U * own_UA
        constant_U1 = (scaled_UA * own_UA).sum(1, keepdim=True)
        return covariance_U @ (weight_CA * weight_CA).T - 2 * scaled_UA @ weight_CA.T + constant_U1
    chunk = max(1, _CHUNK_NUMBERS // weight_CA.numel())
    if chunk >= len(classes_U):
        return _full_spread(weight_CA, own_UA, covariance_U)
    # Checkpointed: the backward passes recompute a chunk at a time instead of keeping all U.
    return torch.cat([
        checkpoint(_full_spread, weight_CA, own_UA[i : i + chunk], covariance_U[i : i + chunk], use_reentrant=False,
                   preserve_rng_state=False)
        for i in range(0, len(classes_U), chunk)
    ])  # fmt: skip


def _full_spread(weight_CA: Tensor, own_UA: Tensor, covariance_UAA: Tensor) -> Tensor:
    away_UCA = weight_CA[None] - own_UA[:, None]
    return (torch.bmm(away_UCA, covariance_UAA) * away_UCA).sum(2)


def _like(values, example: Tensor):
    return None if values is None else values.to(device=example.device, dtype=example.dtype)


# ---- the loss of a last layer ----


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a last layer, as a function of its inputs.

        loss = HeadLoss("ldam", class_counts=counts)
        loss(features_NA, weight_CA, bias_C, labels_N)                          # plain
        loss(..., S_U=S[labels_N.unique()], strength=lam)                       # ISDA, MetaSAug
        loss(..., class_weights=class_balanced_weights(counts))                 # re-weighted
        loss.logits(features_NA, weight_CA, bias_C)                             # for evaluation

    loss            ce, focal, ldam (margins only, as MetaSAug's authors use it), ldam-published (cosine logits times
                    a scale, margins), balanced-softmax, logit-adjustment (with tau = 1 it is balanced softmax)
    class_counts    training pictures per class; not needed for ce and focal
    gamma, max_margin, scale, tau    of focal, both ldam, ldam-published, logit-adjustment
    """

    loss: Loss = "ce"
    class_counts: tuple[int, ...] = ()
    gamma: float = 1.0
    max_margin: float = 0.5
    scale: float = 30.0
    tau: float = 1.0

    def __post_init__(self):
        if self.loss not in get_args(Loss):
            raise ValueError(f"Unknown loss {self.loss!r}: one of {', '.join(get_args(Loss))}.")
        object.__setattr__(self, "class_counts", tuple(int(n) for n in self.class_counts))
        if self.loss not in ("ce", "focal"):
            _counts(self.class_counts)

    def __call__(
        self,
        features_NA: Tensor,
        weight_CA: Tensor,
        bias_C: Tensor | None,
        labels_N: Tensor,
        S_U: Tensor | None = None,
        strength: float = 0.0,
        class_weights: Tensor | None = None,
        by_class: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The training loss, a scalar. With S_U: an upper bound of its mean over infinitely many augmented features.

        For augmented features a' ~ N(a, strength * S_y), the expected cross entropy is at most that of the logits
        (ISDA, Wang et al. 2019, eq. 6)

            z'_nj = z_nj + strength / 2 * (w_j - w_y)^T S_y (w_j - w_y),    y = labels[n]

        S_U       covariances of the batch's distinct classes in ascending order, (U, A, A) or (U, A); None: plain loss
        strength  lambda >= 0      by_class  labels_N.unique(return_inverse=True), if the caller has it
        """
        logits_NC = self.logits(features_NA, weight_CA, bias_C)
        if S_U is not None:
            classes_U, index_N = by_class or labels_N.unique(return_inverse=True)
            logits_NC = logits_NC + strength / 2 * self.spread(weight_CA, classes_U, S_U)[index_N]
        return self.of_logits(logits_NC, labels_N, class_weights)

    def logits(self, features_NA: Tensor, weight_CA: Tensor, bias_C: Tensor | None = None) -> Tensor:
        """Evaluation logits: the plain last layer; ldam-published: scale * cosine, without the bias."""
        if self.loss == "ldam-published":
            return cosine_logits(features_NA, weight_CA, self.scale)
        return F.linear(features_NA, weight_CA, bias_C)

    def augmentable_features(self, features_NA: Tensor) -> Tensor:
        """The features that S is the covariance of: as they enter the logits (ldam-published: normalised)."""
        return F.normalize(features_NA) if self.loss == "ldam-published" else features_NA

    def spread(self, weight_CA: Tensor, classes_U: Tensor, covariance_U: Tensor) -> Tensor:
        """`class_spread` in the units of the logits (ldam-published: of normalised weights, times scale^2)."""
        if self.loss == "ldam-published":
            return self.scale**2 * class_spread(F.normalize(weight_CA), classes_U, covariance_U)
        return class_spread(weight_CA, classes_U, covariance_U)

    def of_logits(self, logits_NC: Tensor, labels_N: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """The training loss of (augmented) logits."""
        logits_NC = self.shifted(logits_NC, labels_N)
        if self.loss == "focal":
            return focal(logits_NC, labels_N, class_weights, self.gamma)
        return cross_entropy(logits_NC, labels_N, class_weights)

    def shifted(self, logits_NC: Tensor, labels_N: Tensor) -> Tensor:
        """Logits minus the margin of the true class, or plus the log prior: constants for the parameters."""
        if self._margins_C is not None:
            return less_margin(logits_NC, labels_N, self._placed(self._margins_C, logits_NC))
        return logits_NC if self._prior_C is None else logits_NC + self._placed(self._prior_C, logits_NC)

    def _placed(self, constant_C: Tensor, like: Tensor) -> Tensor:
        """The constant on the device of `like`, copied once: a CUDA graph cannot read from the host."""
        key = (like.device, like.dtype)
        if key not in self._on_device:
            self._on_device[key] = _like(constant_C, like)
        return self._on_device[key]

    @cached_property
    def _on_device(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    @cached_property
    def _margins_C(self) -> Tensor | None:
        if self.loss not in ("ldam", "ldam-published"):
            return None
        return ldam_margins(self.class_counts, self.max_margin) * (1 if self.loss == "ldam" else self.scale)

    @cached_property
    def _prior_C(self) -> Tensor | None:
        if self.loss not in ("balanced-softmax", "logit-adjustment"):
            return None
        return log_prior(self.class_counts) * (1 if self.loss == "balanced-softmax" else self.tau)
