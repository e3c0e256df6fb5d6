"""The semantic directions of a class, held to what they are said to be."""

import shutil

import numpy as np
import pytest

import zoo
from zoo.directions import last_layer, variation
from zoo.model_folder import ModelFolder, write_model_folder


@pytest.fixture
def make(tiny_model_folder, tmp_path):
    """A model folder with given covariances: make(running, learned, cosine_scale=…)."""
    source = ModelFolder(tiny_model_folder)

    def made(covariance, **ours) -> ModelFolder:
        config = {**source.config, "metasaug": {**source.config["metasaug"], **ours}}
        return write_model_folder(tmp_path / "made", config, source.weights(), covariance)

    return made


def test_full_directions_are_those_along_which_samples_scatter(make):
    # Given a class whose features scatter by a known matrix, half of it running, half learned,
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    variances = np.zeros(64)
    variances[:4] = 9.0, 4.0, 1.0, 0.5
    covariance = (axes * variances) @ axes.T
    halves = np.zeros((10, 64, 64), np.float32)
    halves[3] = covariance / 2
    folder = make({"running": halves, "learned": halves.copy()})
    # when its directions are asked for,
    found = variation(folder, 3, count=3)
    # then they are the axes, largest first, with their shares and spreads, and half was learned.
    assert found.kind == "full" and found.features == 64
    assert found.learned_share == pytest.approx(0.5, abs=1e-5)
    weight = last_layer(folder).astype(np.float64)
    for k, d in enumerate(found.directions):
        assert abs(d.vector_A @ axes[:, k]) == pytest.approx(1, abs=1e-4)
        assert d.share == pytest.approx(variances[k] / 14.5, abs=1e-4)
        assert d.spread == pytest.approx(variances[k] ** 0.5, abs=1e-3)
        for j in range(10):  # the naive twin of what each class's lean and shift are
            towards = weight[j] - weight[3]
            cosine = towards @ d.vector_A / (np.linalg.norm(towards) or 1)
            assert d.lean_C[j] == pytest.approx(cosine, abs=1e-5)
            assert d.shift_C[j] == pytest.approx(d.spread * (towards @ d.vector_A), abs=1e-3)
        # The sign is such that the strongest lean lies ahead.
        assert d.shift_C.max() >= -d.shift_C.min()
    # And the pull of each class is the variance of the difference of its logit, as samples have it.
    samples = rng.multivariate_normal(np.zeros(64), covariance, 20_000, method="eigh")
    sampled = (samples @ (weight - weight[3]).T).var(0)
    assert found.pull_C == pytest.approx(sampled, rel=0.06, abs=1e-9)


def test_diagonal_directions_are_single_features_and_agree_with_the_full_form(make):
    rng = np.random.default_rng(1)
    diagonal = rng.random((10, 64)).astype(np.float32)
    of_diagonal = variation(make({"running": diagonal, "learned": np.zeros_like(diagonal)}), 2)
    full = np.stack([np.diag(row) for row in diagonal])
    of_full = variation(make({"running": full, "learned": np.zeros_like(full)}), 2)
    assert of_diagonal.kind == "diagonal"
    assert of_diagonal.pull_C == pytest.approx(of_full.pull_C, rel=1e-5)
    for a, b in zip(of_diagonal.directions, of_full.directions, strict=True):
        assert np.flatnonzero(a.vector_A).tolist() == [np.argmax(np.abs(b.vector_A))]
        assert a.share == pytest.approx(b.share) and a.lean_C == pytest.approx(b.lean_C, abs=1e-5)


def test_a_network_that_compares_by_cosine_is_measured_by_cosine(make):
    zeros = np.zeros((10, 64), np.float32)
    folder = make({"running": zeros + 1, "learned": zeros}, cosine_scale=30.0)
    assert np.linalg.norm(last_layer(folder), axis=1) == pytest.approx(np.ones(10), abs=1e-5)


def test_what_has_no_directions_says_so(make, tmp_path):
    zeros = np.zeros((10, 64), np.float32)
    # A class that was never seen has none;
    assert variation(make({"running": zeros, "learned": zeros}), 0).directions == ()
    # covariances of another model are named;
    with pytest.raises(zoo.ModelFolderError, match="running must be"):
        variation(make({"running": np.zeros((10, 5), np.float32), "learned": zeros}), 0)
    # and a model trained without them says that.
    shutil.rmtree(tmp_path / "made")
    with pytest.raises(zoo.ZooError, match="without class covariances"):
        variation(make(None), 0)
