"""The MetaSAug step of a last layer on a frozen backbone in closed form: a few matrix products, no autograd.

This is the large-scale setting of the paper: features are computed once, only W and b are trained, covariances are
diagonal. It gives the same numbers as `metasaug_step` on these features, faster and in less memory.

    result = frozen_head_step(layer, features, labels, meta_features, meta_labels, learned, HeadLoss("ce"),
                              strength=..., inner_rate=...)
    optimizer.step()

Shape suffixes: N samples, M samples of the meta batch, C classes, A features, U the rows of the batch's classes,
K the classes of one chunk. With c_n the weight of a sample (they sum to 1), y its class, G = c (softmax - one-hot):

                                                                                                matrix products
    z = h W^T + lambda/2 s_y (W*W)^T + a constant a row,    h = f - lambda s_y w_y                      2
    g = dL/dW = G^T h + lambda (G^T s_y) W,  less lambda s_y (G W)_n in row y                           3  (2)
    z_meta = f_meta (W - alpha g)^T + ...,   V = dL_meta/d(W - alpha g) = G_meta^T f_meta               2
    z_dot = h V^T - lambda (s_y v_y) W^T + lambda s_y (W V)^T + v_b                                     3  (2)
    H = c P (z_dot - <P, z_dot>)
    dL_meta/ds_y = -alpha (lambda/2 (H (W*W) - 2 w_y H W) + lambda (G (W V) - w_y G V - v_y G W))       4  (3)
    z and g again, with S'                                                                              5

This is 19 products of N C A multiplications; plain cross entropy has 2. Three can be saved (counts in brackets),
because g and V have low rank when a product follows. For example f_meta (G^T h)^T = (f_meta h^T) G costs M N (A + C),
an eighth of N C A at N = 256, A = 2048. Of the other 16, 12 need only a row for each class if there are fewer classes
than samples. Constants in a row of z drop out of every softmax.

There are six passes over the classes, in chunks that stay in the cache. W*W, W V and G^T s are never whole in memory,
and only the batch's rows of S are read. A pass does one elementwise operation on a chunk; the rest is in the products.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.errors import TrainingError
from training.method.covariance import LearnedCovariance, Rows
from training.method.losses import HeadLoss
from training.method.metasaug import Fidelity, StepResult, relative_shift
from training.network.derivatives import Compute

# Losses that are cross entropy of logits with a constant shift, so the closed form is the same.
SUPPORTED_LOSSES = ("ce", "ldam", "balanced-softmax", "logit-adjustment")

# One in this many samples gets plain logits. Only train_error in the log needs them; for all they are a 17th product.
LOGGED = 8

# Numbers in one chunk of classes, (K, A): 4 MB of float32, which fit into a core's share of the last-level cache. On a
# GPU launching many small products is slow: 67 MB there, all of iNaturalist 2018.
_CHUNK_NUMBERS, _CHUNK_NUMBERS_GPU = 1_000_000, 2**24


@torch.no_grad()
def frozen_head_step(
    layer: nn.Linear,
    features_NA: Tensor,
    labels_N: Tensor,
    meta_features_MA: Tensor,
    meta_labels_M: Tensor,
    learned: LearnedCovariance,
    head_loss: HeadLoss,
    *,
    strength: float,
    inner_rate: float,
    meta_rate: float = 0.1,
    fidelity: Fidelity = "fixed",
    class_weights: Tensor | None = None,
    compute: Compute | None = None,
) -> StepResult:
    """`metasaug_step(lookahead="classifier")` for features that do not depend on the trained parameters.

    Leaves the gradient of L(W, b, S') in `layer.weight.grad` and `layer.bias.grad`, and updates `learned`, as there.

    layer      the last layer, (C, A); the caller does the optimizer's step
    learned    diagonal covariances
    head_loss  one of SUPPORTED_LOSSES
    raises     TrainingError for another loss or full covariances; DivergenceError before anything is updated
    """
    check_supported(head_loss, learned)
    fixed = fidelity == "fixed"
    head = ClosedFormHead(layer, features_NA, labels_N, head_loss, strength, class_weights)
    rows, finite = head.rows, (compute or Compute()).finite
    used_U = rows.sum(torch.ones_like(labels_N)) > 0
    S_UA = learned.rows(rows.classes_U) if fixed else learned.running.covariance[rows.classes_U]
    if rows.every_class:
        S_UA = torch.where(used_U[:, None], S_UA, 0)  # classes without samples in the batch count as 0
    grad_UA, meta_loss = head.meta_gradient(S_UA, meta_features_MA, meta_labels_M, inner_rate)
    loss_before = head.loss
    finite.check(loss=[loss_before], meta_loss=[meta_loss], meta_gradient=[grad_UA])

    new_UA = S_UA - meta_rate * grad_UA
    if fixed:
        new_UA.clamp_min_(0)
    grad_CA, grad_C = head.gradient_after_move(new_UA - S_UA, new_UA)
    finite.check(loss=[head.loss], gradient=[grad_CA, grad_C])
    layer.weight.grad = grad_CA
    if layer.bias is not None:
        layer.bias.grad = grad_C
    if fixed:
        learned.keep(rows, used_U, new_UA, finite)
    learned.running.update(features_NA, labels_N, rows, finite)

    shift = relative_shift(new_UA, S_UA, used_U)
    logged = head.plain_logits(-(-len(labels_N) // LOGGED))
    return StepResult(head.loss, features_NA, logged, meta_loss, loss_before, shift)


def holds(head_loss: HeadLoss, learned: LearnedCovariance) -> bool:
    """Whether the closed form supports this loss and this kind of covariance."""
    return head_loss.loss in SUPPORTED_LOSSES and learned.running.kind == "diagonal"


def check_supported(head_loss: HeadLoss, learned: LearnedCovariance) -> None:
    """Raise TrainingError where the closed form does not hold; `metasaug_step` covers these cases."""
    if head_loss.loss not in SUPPORTED_LOSSES:
        raise TrainingError(
            f"The closed form of the last layer has no --loss {head_loss.loss}. Use one of "
            f"{', '.join(SUPPORTED_LOSSES)}, or training.method.metasaug.metasaug_step."
        )
    if learned.running.kind != "diagonal":
        raise TrainingError(
            "The closed form of the last layer needs diagonal covariances. Use --covariance diagonal, or "
            "training.method.metasaug.metasaug_step."
        )


class ClosedFormHead:
    """The formulas at the top of this file; each method is a line or two of them."""

    def __init__(
        self,
        layer: nn.Linear,
        features_NA: Tensor,
        labels_N: Tensor,
        head_loss: HeadLoss,
        strength: float,
        class_weights: Tensor | None,
    ):
        self.W, self.f_NA, self.labels_N = layer.weight.detach(), features_NA, labels_N
        self.biased = layer.bias is not None
        self.b_C = layer.bias.detach() if self.biased else self.W.new_zeros(len(self.W))
        self.head_loss, self.strength = head_loss, strength
        self.rows = Rows.of(labels_N, len(self.W))
        self.w_UA = self.W[self.rows.classes_U]
        weights_N = torch.ones_like(features_NA[:, 0])
        if class_weights is not None:
            weights_N = class_weights.to(weights_N)[labels_N]
        self.c_N1 = (weights_N / weights_N.sum())[:, None]
        on_gpu = self.W.device.type != "cpu"
        self.chunk = max(1, (_CHUNK_NUMBERS_GPU if on_gpu else _CHUNK_NUMBERS) // self.W.shape[1])
        self.scratch_KA = self.W.new_empty(min(self.chunk, len(self.W)), self.W.shape[1])

    def meta_gradient(
        self, S_UA: Tensor, meta_features_MA: Tensor, meta_labels_M: Tensor, inner_rate: float
    ) -> tuple[Tensor, Tensor]:
        """-> (grad_S for the batch's classes, meta loss after the look ahead)."""
        lam, f_MA, h_NA = self.strength, meta_features_MA, self._centred(S_UA)
        self.z_NC, half_UA = self._logits(len(h_NA)), lam / 2 * S_UA
        for k, W_KA, scratch_KA in self._chunks():
            torch.addmm(self.b_C[k], h_NA, W_KA.T, out=self.z_NC[:, k])
            self._add(self.z_NC[:, k], half_UA, torch.mul(W_KA, W_KA, out=scratch_KA))
        self.loss, cP_NC = self._softmax(self.z_NC)
        G_NC = cP_NC.scatter_add(1, self.labels_N[:, None], -self.c_N1)
        G_UC = self._by_row(G_NC)

        # The look ahead: W - alpha g is never formed, only its logits of the meta features.
        z_MC, GW_UA = self._logits(len(f_MA)), torch.zeros_like(S_UA)
        moved_UA = -inner_rate * lam * S_UA
        for k, W_KA, scratch_KA in self._chunks():
            torch.mm(G_UC[:, k].T, moved_UA, out=scratch_KA)
            torch.addmm(self.b_C[k], f_MA, torch.addcmul(W_KA, scratch_KA, W_KA, out=scratch_KA).T, out=z_MC[:, k])
            GW_UA.addmm_(G_UC[:, k], W_KA)
        fh_MN = f_MA @ h_NA.T
        if self.biased:
            fh_MN += 1  # the bias has the constant feature 1
        z_MC.addmm_(-inner_rate * fh_MN, G_NC)
        z_MC.index_add_(1, self.rows.classes_U, inner_rate * lam * (f_MA @ (S_UA * GW_UA).T))
        c_M1 = f_MA.new_full((len(f_MA), 1), 1 / len(f_MA))
        meta_loss, cP_MC = _softmax_at(z_MC, meta_labels_M, c_M1)
        Gv_MC = cP_MC.scatter_add_(1, meta_labels_M[:, None], -c_M1)

        # The tangent of z along V.
        v_UA = Gv_MC[:, self.rows.classes_U].T @ f_MA
        to_dot_UA, back_UA = lam * S_UA, -lam * S_UA * v_UA
        z_dot_NC, GWV_UA = torch.mm(fh_MN.T, Gv_MC), torch.zeros_like(S_UA)
        for k, W_KA, scratch_KA in self._chunks():
            WV_KA = torch.mm(Gv_MC[:, k].T, f_MA, out=scratch_KA).mul_(W_KA)
            GWV_UA.addmm_(G_UC[:, k], WV_KA)
            self._add(z_dot_NC[:, k], to_dot_UA, WV_KA)
            self._add(z_dot_NC[:, k], back_UA, W_KA)
        mean_N11 = torch.bmm(cP_NC[:, None], z_dot_NC[..., None]) / self.c_N1[..., None]
        H_UC = self._by_row(z_dot_NC.sub_(mean_N11[:, 0]).mul_(cP_NC))

        HW_UA, HW2_UA = torch.zeros_like(S_UA), torch.zeros_like(S_UA)
        for k, W_KA, scratch_KA in self._chunks():
            HW_UA.addmm_(H_UC[:, k], W_KA)
            HW2_UA.addmm_(H_UC[:, k], torch.mul(W_KA, W_KA, out=scratch_KA))
        GV_UA = (G_UC @ Gv_MC.T) @ f_MA
        d_UA = lam / 2 * (HW2_UA - 2 * self.w_UA * HW_UA)
        d_UA += lam * (GWV_UA - self.w_UA * GV_UA - v_UA * GW_UA)
        if not self.rows.every_class:
            d_UA = self.rows.sum(d_UA)[self.rows.index_N]
        return -inner_rate * d_UA, meta_loss

    def gradient_after_move(self, move_UA: Tensor, S_UA: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of L in W and b once S has moved by `move_UA`, to `S_UA`."""
        half_UA, back_UA = self.strength / 2 * move_UA, -self.strength * move_UA * self.w_UA
        for k, W_KA, scratch_KA in self._chunks():
            self._add(self.z_NC[:, k], half_UA, torch.mul(W_KA, W_KA, out=scratch_KA))
            self._add(self.z_NC[:, k], back_UA, W_KA)
        self.loss, G_NC = self._softmax(self.z_NC)
        G_NC.scatter_add_(1, self.labels_N[:, None], -self.c_N1)
        G_UC, h_NA, spread_UA = self._by_row(G_NC), self._centred(S_UA), self.strength * S_UA

        grad_CA, GW_UA = torch.empty_like(self.W), torch.zeros_like(S_UA)
        for k, W_KA, _ in self._chunks():
            torch.mm(G_UC[:, k].T, spread_UA, out=grad_CA[k]).mul_(W_KA).addmm_(G_NC[:, k].T, h_NA)
            GW_UA.addmm_(G_UC[:, k], W_KA)
        grad_CA.index_add_(0, self.rows.classes_U, -spread_UA * GW_UA)
        return grad_CA, G_NC.sum(0)

    def plain_logits(self, samples: int) -> Tensor:
        """Evaluation logits of the first `samples` of the batch."""
        return F.linear(self.f_NA[:samples], self.W, self.b_C)

    def _logits(self, rows: int) -> Tensor:
        return self.W.new_empty(rows, len(self.W))

    def _centred(self, S_UA: Tensor) -> Tensor:
        """h = f - lambda s_y w_y."""
        away_UA = self.strength * S_UA * self.w_UA
        return self.f_NA - (away_UA[self.rows.index_N] if self.rows.every_class else away_UA)

    def _softmax(self, z_NC: Tensor) -> tuple[Tensor, Tensor]:
        return _softmax_at(self.head_loss.shifted(z_NC, self.labels_N), self.labels_N, self.c_N1)

    def _add(self, z_NK: Tensor, x_UA: Tensor, y_KA: Tensor) -> None:
        """z_n += x_u y^T, u the row of the sample."""
        if self.rows.every_class:
            z_NK += (x_UA @ y_KA.T)[self.rows.index_N]
        else:
            z_NK.addmm_(x_UA, y_KA.T)

    def _by_row(self, x_NC: Tensor) -> Tensor:
        """Samples of the same row summed -> (U, C)."""
        return self.rows.sum(x_NC) if self.rows.every_class else x_NC

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of classes, their rows of W, and memory of that size."""
        for first in range(0, len(self.W), self.chunk):
            k = slice(first, min(first + self.chunk, len(self.W)))
            yield k, self.W[k], self.scratch_KA[: k.stop - first]


def _softmax_at(z_NC: Tensor, labels_N: Tensor, c_N1: Tensor) -> tuple[Tensor, Tensor]:
    """-> (weighted cross entropy, c P (N, C)); G = c (P - one-hot)."""
    log_P_NC = z_NC.log_softmax(1)
    loss = -(c_N1 * log_P_NC.gather(1, labels_N[:, None])).sum()
    return loss, log_P_NC.exp_().mul_(c_N1)
