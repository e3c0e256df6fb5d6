"""The running covariance is exact under any split, safe for classes hardly seen; what is learned stays a covariance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import TrainingError
from training.method import reference as naive
from training.method.covariance import LearnedCovariance, Rows, RunningCovariance, nearest_semidefinite
from training.method.finite import Finite

KINDS = pytest.mark.parametrize("kind", ["full", "diagonal"])


def a_stream(classes=6, features=5, n=1000, seed=0):
    """Features far from zero; class 4 has one, class 5 none."""
    g = torch.Generator().manual_seed(seed)
    f = 100 + torch.randn(n, features, generator=g, dtype=torch.float64)
    y = torch.randint(0, classes - 2, (n,), generator=g)
    y[n // 2] = classes - 2
    return f, y


@KINDS
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 999), max_size=40, unique=True), seed=st.integers(0, 2**16))
def test_any_split_gives_numpys_covariance(kind, cuts, seed):
    # Given 1,000 features in batches of any sizes, when streamed,
    f, y = a_stream(seed=seed)
    running = RunningCovariance(6, 5, kind, torch.float64)
    for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 1000], strict=True):
        running.update(f[a:b], y[a:b])
    # then each class has the covariance that numpy finds over all of it at once.
    for c in range(4):
        S = np.cov(f[y == c].numpy(), rowvar=False, bias=True)
        np.testing.assert_allclose(running.covariance[c], S if kind == "full" else np.diag(S), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(running.mean[c], f[y == c].mean(0), rtol=1e-12)
    assert torch.equal(running.counts, torch.bincount(y, minlength=6))


@KINDS
def test_classes_hardly_seen_have_no_covariance_and_no_nan(kind):
    # Given a class with one feature and a class with none (their NaN is known from other code),
    f, y = a_stream()
    running = RunningCovariance(6, 5, kind, torch.float64)
    running.update(f, y)
    # then both have zero, and everything is finite, also after a second look at others.
    running.update(f[:3], y[:3])
    assert running.covariance.isfinite().all() and running.mean.isfinite().all()
    assert (running.covariance[4:] == 0).all()
    torch.testing.assert_close(running.mean[4], f[500])


@KINDS
def test_update_touches_only_the_classes_present(kind):
    running = RunningCovariance(6, 5, kind)
    running.covariance.fill_(float("nan"))
    running.covariance[1] = 0
    running.update(torch.randn(4, 5), torch.tensor([1, 1, 1, 1]))
    assert running.covariance[1].isfinite().all()
    assert running.covariance[[0, 2, 3, 4, 5]].isnan().all()


@KINDS
def test_saved_state_goes_on_to_the_same_bits(kind, tmp_path):
    # Given an estimate saved half way, to a file, with what was learned,
    f, y = a_stream()
    running = RunningCovariance(6, 5, kind)
    learned = LearnedCovariance(running)
    running.update(f[:500], y[:500])
    learned.delta.normal_()
    torch.save({"running": running.state_dict(), "learned": learned.state_dict()}, tmp_path / "state.pt")
    # when loaded into a fresh one, and both go on,
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = RunningCovariance(6, 5, kind)
    learned_again = LearnedCovariance(again)
    again.load_state_dict(saved["running"])
    learned_again.load_state_dict(saved["learned"])
    running.update(f[500:], y[500:])
    again.update(f[500:], y[500:])
    # then they are the same, bit for bit; and another size is refused.
    assert torch.equal(again.covariance, running.covariance) and torch.equal(again.mean, running.mean)
    assert torch.equal(learned_again.delta, learned.delta) and torch.equal(again.counts, running.counts)
    with pytest.raises(TrainingError, match="another architecture"):
        RunningCovariance(7, 5, kind).load_state_dict(saved["running"])


@KINDS
def test_equals_the_authors_estimator(kind):
    # Given 20 batches, when the authors' recurrence and ours take them in, then the numbers stay the same.
    twin, ours = naive.EstimatorCV(6, 5, kind), RunningCovariance(6, 5, kind, torch.float64)
    f, y = a_stream()
    for part in torch.arange(1000).split(50):
        twin.update(f[part], y[part])
        ours.update(f[part], y[part])
        torch.testing.assert_close(ours.covariance, twin.S, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(ours.mean, twin.mean)


def test_counts_are_whole_numbers():
    # Given a class seen 2^24 times, where float32 counts would stop counting, then one more still counts.
    running = RunningCovariance(2, 3)
    running.counts[0] = 2**24
    running.update(torch.zeros(1, 3), torch.tensor([0]))
    assert running.counts[0].item() == 2**24 + 1


def test_refusals_name_the_figure_and_the_way_out():
    with pytest.raises(TrainingError, match=r"137 GB.*diagonal"):
        RunningCovariance(8142, 2048, "full")
    with pytest.raises(TrainingError, match="at least 2"):
        RunningCovariance(1, 5)


def test_nearest_semidefinite_is_the_eigenvalue_clamp():
    # Given symmetric matrices with and without negative eigenvalues,
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 6, 6, generator=g, dtype=torch.float64)
    S = torch.cat([root @ root.mT, root + root.mT])
    # when projected, then the good ones are untouched, and the others lose their negative part alone.
    projected = nearest_semidefinite(S)
    assert torch.equal(projected[:4], S[:4])
    values, vectors = torch.linalg.eigh(S[4:])
    torch.testing.assert_close(projected[4:], vectors @ torch.diag_embed(values.clamp_min(0)) @ vectors.mT)
    assert torch.linalg.eigvalsh(projected).min() > -1e-12
    assert nearest_semidefinite(torch.tensor([[1.0, -2.0]])).tolist() == [[1.0, 0.0]]


@KINDS
def test_learned_covariance_stays_semidefinite_as_the_estimate_moves(kind):
    # Given a learned correction that made S smaller than the estimate,
    f, y = a_stream()
    running = RunningCovariance(6, 5, kind, torch.float64)
    running.update(f, y)
    learned = LearnedCovariance(running)
    classes = torch.tensor([0, 2])
    used_C = torch.tensor([True, False, True, False, False, False])
    learned.keep(Rows.of(torch.arange(6), 6), used_C, running.covariance * 0.1, Finite())
    torch.testing.assert_close(learned.rows(classes), running.covariance[classes] * 0.1)
    # when the estimate shrinks under it, then what is used still has no negative variance; other classes are as they
    # were estimated.
    running.covariance *= 0.5
    S = learned.rows(torch.arange(6))
    smallest = torch.linalg.eigvalsh(S).min() if kind == "full" else S.min()
    assert smallest >= -1e-12
    torch.testing.assert_close(S[1], running.covariance[1])
