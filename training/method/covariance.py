"""Running class means and covariances of features, and the learned correction that MetaSAug adds to them.

Shapes never depend on the data and nothing waits for the device, so a GPU can replay a whole step as a graph. The
exception is the projection of full matrices onto positive semi-definite ones.

Shape suffixes: N samples, C classes, A features, U rows of a batch (`Rows`).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from training.errors import TrainingError
from training.method.finite import Finite

Kind = Literal["full", "diagonal"]

# A full S larger than this is a mistake on any machine: 8,142 classes of 2,048 features would take 137 GB.
_LARGEST_FULL_BYTES = 16e9


class Rows(NamedTuple):
    """The rows for a batch's classes: one per class if there are at most N classes, else one per sample.

    With a row per class, a sample's row is its class. With a row per sample, it is the row of the first sample of its
    class; rows that no sample uses are padding.

    classes_U   the class of each row          index_N   the row of each sample
    every_class row c is class c
    """

    classes_U: Tensor
    index_N: Tensor
    every_class: bool

    @classmethod
    def of(cls, labels_N: Tensor, num_classes: int) -> "Rows":
        if num_classes <= len(labels_N) or not len(labels_N):
            return cls(torch.arange(num_classes, device=labels_N.device), labels_N, True)
        first_N = (labels_N[:, None] == labels_N).int().argmax(1)
        return cls(labels_N, first_N, False)

    def sum(self, values_N: Tensor) -> Tensor:
        """Sums over the samples of each row, (U, ...)."""
        sums = values_N.new_zeros(len(self.classes_U), *values_N.shape[1:])
        return sums.index_add_(0, self.index_N, values_N)

    def put(self, into_C: Tensor, values_U: Tensor) -> None:
        """Write the values of each row into into_C at its class, in place."""
        if self.every_class:
            into_C.copy_(values_U)
        else:
            into_C[self.classes_U] = values_U[self.index_N]

    def scatter(self, away_NA: Tensor, kind: "Kind", weight_N: Tensor) -> Tensor:
        """Weighted sums of away away^T over the samples of each row -> (U, A, A), or their diagonals (U, A)."""
        if kind == "diagonal":
            return self.sum(weight_N[:, None] * away_NA * away_NA)
        rows_U = torch.arange(len(self.classes_U), device=away_NA.device)
        member_UN = (self.index_N == rows_U[:, None]) * weight_N
        return (member_UN[:, :, None] * away_NA).mT @ away_NA


class RunningCovariance:
    """The biased covariance of each class over all features seen so far, updated batch by batch.

        S_c = 1/n_c sum_i (f_i - m_c)(f_i - m_c)^T        (diagonal: its diagonal only)

    for any split into batches (Chan et al. 1979; the authors' EstimatorCV is the same recurrence). A class with no
    feature or one has S_c = 0. An update changes only the classes in the batch.

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
            raise TrainingError(f"{num_classes} class: the augmentation needs at least 2.")
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
    def update(self, features_NA: Tensor, labels_N: Tensor, rows: Rows | None = None,
               finite: Finite | None = None) -> None:
        """Add a batch of features (any float type; detached here), unless `finite` has failed.

        rows   of these labels, if the caller has them
        """
        rows = rows or Rows.of(labels_N, len(self.counts))
        features_NA = features_NA.detach().to(self.mean.dtype)
        ones_N = torch.ones_like(features_NA[:, 0])
        if finite is not None:  # after a failure the batch gets weight 0, which changes nothing
            features_NA = finite.kept(features_NA, torch.zeros_like(features_NA))
            ones_N = finite.kept(ones_N, torch.zeros_like(ones_N))
        counts_U = rows.sum(ones_N.long())
        mean_UA = rows.sum(features_NA) / counts_U.clamp_min(1)[:, None]
        scatter_U = rows.scatter(features_NA - mean_UA[rows.index_N], self.kind, ones_N)
        classes_U = rows.classes_U
        total_U = self.counts[classes_U] + counts_U
        share_U = counts_U.to(self.mean.dtype) / total_U.clamp_min(1)  # 0 for a class without samples in the batch
        away_UA = mean_UA - self.mean[classes_U]
        between_U = away_UA * away_UA if self.kind == "diagonal" else away_UA[:, :, None] * away_UA[:, None, :]
        w_U = as_column(share_U, self.covariance)
        within_U = scatter_U / as_column(counts_U.clamp_min(1), self.covariance)
        old_U = self.covariance[classes_U]
        rows.put(self.covariance, old_U * (1 - w_U) + within_U * w_U + between_U * (w_U * (1 - w_U)))
        rows.put(self.mean, self.mean[classes_U] + share_U[:, None] * away_UA)
        rows.put(self.counts, total_U)

    def state_dict(self) -> dict[str, Tensor]:
        return {"covariance": self.covariance, "mean": self.mean, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_tensors(self.state_dict(), state)


class LearnedCovariance:
    """S = running estimate + delta. The meta steps learn delta, which starts at 0.

    `nearest_semidefinite` keeps S positive semi-definite for the classes in the batch.
    """

    def __init__(self, running: RunningCovariance):
        self.running = running
        self.delta = torch.zeros_like(running.covariance)

    def rows(self, classes_U: Tensor, used_U: Tensor | None = None) -> Tensor:
        """S of these classes -> (U, A, A) or (U, A). used_U: rows that are needed; the others are not projected."""
        return nearest_semidefinite(self.running.covariance[classes_U] + self.delta[classes_U], used_U)

    def keep(self, rows: Rows, used_U: Tensor, covariance_U: Tensor, finite: Finite) -> None:
        """Set S of the used rows to `covariance_U`, by changing delta; the running estimate may move S again."""
        old_U = self.delta[rows.classes_U]
        new_U = torch.where(as_column(used_U, old_U) > 0, covariance_U - self.running.covariance[rows.classes_U], old_U)
        rows.put(self.delta, finite.kept(new_U, old_U))

    def state_dict(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_tensors(self.state_dict(), state)


def nearest_semidefinite(covariance_U: Tensor, used_U: Tensor | None = None) -> Tensor:
    """The nearest positive semi-definite matrices in Frobenius norm, or variances >= 0 for the diagonal form.

    used_U   bool; unused rows are not changed
    Only matrices that need it are decomposed: a much cheaper Cholesky factorisation finds them. It is tried on the
    matrix plus a rounding error (4 eps of the trace), so an eigenvalue may stay slightly below 0. The decomposition is
    in float64: CUDA's float32 eigenvectors would blur the small learned difference between S' and the estimate.
    """
    if covariance_U.ndim == 2:
        return covariance_U.clamp_min(0)
    eye = torch.eye(covariance_U.shape[-1], dtype=covariance_U.dtype, device=covariance_U.device)
    trace_U = covariance_U.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0)
    ridge_U = 4 * torch.finfo(covariance_U.dtype).eps * trace_U
    failed_U = torch.linalg.cholesky_ex(covariance_U + ridge_U[:, None, None] * eye).info != 0
    failed_U &= trace_U.isfinite() & covariance_U.sum((1, 2)).isfinite()  # NaN is left to `check_finite`
    if used_U is not None:
        failed_U &= used_U
    if not failed_U.any():
        return covariance_U
    values, vectors = torch.linalg.eigh(covariance_U[failed_U].to(precise_dtype(covariance_U)))
    projected = (vectors * values.clamp_min(0)[:, None, :]) @ vectors.mT
    covariance_U = covariance_U.clone()
    covariance_U[failed_U] = ((projected + projected.mT) / 2).to(covariance_U.dtype)
    return covariance_U


def precise_dtype(tensor: Tensor) -> torch.dtype:
    """float64; on MPS, which has none, the tensor's own type."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def as_column(values_U: Tensor, like: Tensor) -> Tensor:
    """(U,) reshaped to multiply covariances (U, A, A) or (U, A)."""
    return values_U.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def load_tensors(into: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy in place; TrainingError if the saved tensors have other shapes."""
    for name, tensor in into.items():
        if name not in state or state[name].shape != tensor.shape:
            saved = tuple(state[name].shape) if name in state else "nothing"
            raise TrainingError(
                f"The saved {name} of the class covariances is {saved}, but this run needs {tuple(tensor.shape)}: it "
                "has another architecture, list of classes or --covariance."
            )
        tensor.copy_(state[name])
