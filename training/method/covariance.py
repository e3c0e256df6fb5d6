"""Running class means and covariances of features, and the learned correction that MetaSAug adds to them.

Shape suffixes: N samples, C classes, A features, U the distinct classes of a batch.
"""

from typing import Literal

import torch
from torch import Tensor

from training.errors import TrainingError

Kind = Literal["full", "diagonal"]

# A full S larger than this is a mistake on any machine: 8142 classes of 2048 features would take 137 GB.
_LARGEST_FULL_BYTES = 16e9


class RunningCovariance:
    """The biased covariance of each class over every feature seen so far, from one batch after another.

        S_c = 1/n_c sum_i (f_i - m_c)(f_i - m_c)^T        (diagonal: its diagonal only)

    whatever the split into batches (Chan et al. 1979; the authors' EstimatorCV is the same recurrence). A class with
    no feature or one has S_c = 0. An update touches the rows of the classes present and no other.

    covariance  (C, A, A) or (C, A)       mean  (C, A)       counts  (C,) int64
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        kind: Kind = "full",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if num_classes < 2:
            raise TrainingError(f"{num_classes} class: the augmentation is between classes; it needs at least 2.")
        shape: tuple[int, ...] = (num_classes, num_features)
        if kind == "full":
            size = num_classes * num_features**2 * dtype.itemsize
            if size > _LARGEST_FULL_BYTES:
                raise TrainingError(
                    f"Full covariances of {num_classes} classes with {num_features} features would take "
                    f"{size / 1e9:.0f} GB. Use the diagonal form (--covariance diagonal): "
                    f"{num_classes * num_features * dtype.itemsize / 1e6:.0f} MB."
                )
            shape = (num_classes, num_features, num_features)
        self.kind = kind
        self.covariance = torch.zeros(shape, dtype=dtype, device=device)
        self.mean = torch.zeros(num_classes, num_features, dtype=dtype, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, features_NA: Tensor, labels_N: Tensor) -> None:
        """Takes in a batch of features (any float type; detached here)."""
        classes_U, index_N = labels_N.unique(return_inverse=True)
        features_NA = features_NA.detach().to(self.mean.dtype)
        counts_U = torch.bincount(index_N, minlength=len(classes_U))
        mean_UA = features_NA.new_zeros(len(classes_U), features_NA.shape[1])
        mean_UA.index_add_(0, index_N, features_NA).div_(counts_U[:, None])
        scatter_U = scatter(features_NA - mean_UA[index_N], index_N, counts_U, self.kind)
        total_U = self.counts[classes_U] + counts_U
        share_U = counts_U.to(self.mean.dtype) / total_U
        away_UA = mean_UA - self.mean[classes_U]
        between_U = away_UA * away_UA if self.kind == "diagonal" else away_UA[:, :, None] * away_UA[:, None, :]
        w_U = as_column(share_U, self.covariance)
        within_U = scatter_U / as_column(counts_U, self.covariance)
        old_U = self.covariance[classes_U]
        self.covariance[classes_U] = old_U * (1 - w_U) + within_U * w_U + between_U * (w_U * (1 - w_U))
        self.mean[classes_U] += share_U[:, None] * away_UA
        self.counts[classes_U] = total_U

    def state_dict(self) -> dict[str, Tensor]:
        return {"covariance": self.covariance, "mean": self.mean, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_tensors(self.state_dict(), state)


class LearnedCovariance:
    """S = running estimate + delta: delta is what the meta steps have learned so far, zero at the start.

    S is kept positive semi-definite wherever it is used: `nearest_semidefinite`, of the classes in the batch.
    """

    def __init__(self, running: RunningCovariance):
        self.running = running
        self.delta = torch.zeros_like(running.covariance)

    def rows(self, classes_U: Tensor) -> Tensor:
        """S of these classes -> (U, A, A) or (U, A)."""
        return nearest_semidefinite(self.running.covariance[classes_U] + self.delta[classes_U])

    def keep(self, classes_U: Tensor, covariance_U: Tensor) -> None:
        """S of these classes is `covariance_U` from now on, until the running estimate moves under it."""
        self.delta[classes_U] = covariance_U - self.running.covariance[classes_U]

    def state_dict(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_tensors(self.state_dict(), state)


def nearest_semidefinite(covariance_U: Tensor) -> Tensor:
    """The nearest positive semi-definite matrices in Frobenius norm, or variances >= 0 for the diagonal form.

    Only matrices that need it are decomposed: a Cholesky factorisation, much cheaper, finds them. It is tried a
    rounding error (4 eps of the trace) above, so an eigenvalue may stay that little below zero. Decomposed in float64:
    what was learned is the small difference of S' and the estimate, and CUDA's float32 eigenvectors blur it.
    """
    if covariance_U.ndim == 2:
        return covariance_U.clamp_min(0)
    eye = torch.eye(covariance_U.shape[-1], dtype=covariance_U.dtype, device=covariance_U.device)
    trace_U = covariance_U.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0)
    ridge_U = 4 * torch.finfo(covariance_U.dtype).eps * trace_U
    failed_U = torch.linalg.cholesky_ex(covariance_U + ridge_U[:, None, None] * eye).info != 0
    failed_U &= trace_U.isfinite() & covariance_U.sum((1, 2)).isfinite()  # a NaN is for `check_finite` to find
    if not failed_U.any():
        return covariance_U
    values, vectors = torch.linalg.eigh(covariance_U[failed_U].to(precise_dtype(covariance_U)))
    projected = (vectors * values.clamp_min(0)[:, None, :]) @ vectors.mT
    covariance_U = covariance_U.clone()
    covariance_U[failed_U] = ((projected + projected.mT) / 2).to(covariance_U.dtype)
    return covariance_U


def scatter(away_NA: Tensor, index_N: Tensor, counts_U: Tensor, kind: Kind) -> Tensor:
    """Sums of away away^T over the rows of each class -> (U, A, A), or their diagonals (U, A).

    index_N   in [0, U), the class of each row          counts_U   how often it occurs
    """
    if kind == "diagonal":
        return away_NA.new_zeros(len(counts_U), away_NA.shape[1]).index_add_(0, index_N, away_NA * away_NA)
    parts = away_NA[index_N.argsort()].split(counts_U.tolist())
    return torch.stack([part_NA.T @ part_NA for part_NA in parts])


def precise_dtype(tensor: Tensor) -> torch.dtype:
    """float64, but on MPS, which has none, the tensor's own."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def as_column(values_U: Tensor, like: Tensor) -> Tensor:
    """(U,) to multiply covariances (U, A, A) or (U, A) by."""
    return values_U.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def load_tensors(into: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """In place; TrainingError where the saved ones have other shapes."""
    for name, tensor in into.items():
        if name not in state or state[name].shape != tensor.shape:
            saved = tuple(state[name].shape) if name in state else "nothing"
            raise TrainingError(
                f"The saved {name} of the class covariances is {saved}, this run needs {tuple(tensor.shape)}: another "
                "architecture, list of classes or --covariance."
            )
        tensor.copy_(state[name])
