"""Held-out augmentation: S is the scatter of pictures not trained on, about the training mean, and shrunk."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.test_meta import KINDS, resnet8, small_conv, vit_block
from tests.test_training import TINY, small_data
from training.errors import DivergenceError
from training.method import reference as naive
from training.method.covariance import RunningCovariance
from training.method.heldout import PRIOR, HeldOut, heldout_step
from training.method.losses import HeadLoss, class_balanced_weights
from training.network.derivatives import features_of
from training.run import loop, stages, steps

CPU = torch.device("cpu")


def a_stream(classes=4, features=5, n=600, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    return 3 + shift * y[:, None] + torch.randn(n, features, generator=g, dtype=torch.float64), y


@KINDS
@pytest.mark.parametrize("cuts", [[], [1, 2, 300], list(range(7, 600, 7))])
def test_any_split_gives_the_second_moment_about_the_training_mean(kind, cuts):
    # Given training features, and held-out ones that lie elsewhere, in batches of any sizes,
    held = HeldOut(RunningCovariance(4, 5, kind, torch.float64), [10, 20, 5, 0])
    held.running.update(*a_stream())
    f, y = a_stream(seed=1, shift=0.5)
    f, y = f[y < 3], y[y < 3]  # class 3 has no picture to spare
    for part in torch.arange(len(y)).tensor_split(cuts):
        held.update(f[part], y[part])
    # when S is asked for, then it is the moment about the training mean, shrunk by the number of pictures,
    away = f - held.running.mean[y]
    M = torch.stack([(away[y == c].T @ away[y == c]) / (y == c).sum() for c in range(3)])
    M = M if kind == "full" else M.diagonal(dim1=1, dim2=2)
    own = torch.tensor([k / (k + PRIOR) for k in (10, 20, 5)], dtype=torch.float64).reshape(3, *[1] * (M.ndim - 1))
    S = held.rows(torch.arange(4))
    torch.testing.assert_close(S[:3], own * M + (1 - own) * M.mean(0))
    # and the class without any has the mean of the others; for the demo, delta is what is more than the own estimate.
    torch.testing.assert_close(S[3], M.mean(0))
    torch.testing.assert_close(held.running.covariance + held.delta, S)


@KINDS
def test_it_finds_the_scatter_of_new_pictures_that_training_features_hide(kind):
    # Given a network that has pulled each class's training features to a third of their true scatter (as one that
    # fits them does), and moved them aside,
    classes, A = 5, 6
    g = torch.Generator().manual_seed(0)
    root = torch.randn(classes, A, A, generator=g, dtype=torch.float64)
    truth, middle = root @ root.mT, torch.randn(classes, A, generator=g, dtype=torch.float64)
    aside = torch.randn(classes, A, generator=g, dtype=torch.float64)

    def drawn(n, scale, move):
        y = torch.arange(classes).repeat_interleave(n)
        z = torch.randn(len(y), A, generator=g, dtype=torch.float64)
        return middle[y] + move * aside[y] + scale * (root[y] @ z[..., None])[..., 0], y

    # when many held-out features are seen of each, so many that nothing is shrunk,
    held = HeldOut(RunningCovariance(classes, A, kind, torch.float64), [10**9] * classes)
    held.running.update(*drawn(4000, 1 / 3, 1))
    held.update(*drawn(40_000, 1, 0))
    # then S is their scatter about the training mean, and ISDA's is a ninth of it.
    wanted = truth + aside[:, :, None] * aside[:, None]
    if kind == "diagonal":
        wanted, truth = wanted.diagonal(dim1=1, dim2=2), truth.diagonal(dim1=1, dim2=2)
    S = held.rows(torch.arange(classes))
    assert ((S - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max() < 0.03
    assert ((held.running.covariance - truth / 9).norm() / truth.norm()) < 0.02


@KINDS
def test_few_pictures_are_better_shrunk_than_alone(kind):
    # Given classes whose scatter is alike, and 10 held-out features of each,
    f, y = a_stream(classes=20, features=16, n=20_000)
    held = HeldOut(RunningCovariance(20, 16, kind, torch.float64), [10] * 20)
    held.running.update(f, y)
    g = torch.Generator().manual_seed(5)
    y = torch.arange(200) % 20
    held.update(3 + torch.randn(200, 16, generator=g, dtype=torch.float64), y)
    # then S is less than 0.6 times as far from the truth, which is 1, as the moment of a class alone.
    truth = torch.eye(16, dtype=torch.float64) if kind == "full" else torch.ones(16, dtype=torch.float64)
    away, alone = ((S - truth).norm() for S in (held.rows(torch.arange(20)), held.moment))
    assert away < 0.6 * alone


@KINDS
@pytest.mark.parametrize("make", [small_conv, vit_block, resnet8])
@pytest.mark.parametrize("loss", ["ce", "ldam", "ldam-published"])
def test_the_step_is_the_formulas(kind, make, loss):
    # Given a network and three batches of each kind,
    torch.manual_seed(0)
    C, counts, k = 7, (90, 60, 40, 20, 9, 5, 3), (2, 2, 2, 2, 2, 2, 0)
    net = make(C).double().train()
    twin = make(C).double().train()
    twin.load_state_dict(net.state_dict())
    head_loss, w = HeadLoss(loss, counts), class_balanced_weights(counts)
    A = net.get_classifier().in_features
    held = HeldOut(RunningCovariance(C, A, kind, torch.float64), k)
    seen, looks = [[] for _ in range(C)], [[] for _ in range(C)]
    for step in range(3):
        x, y = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 3, 5, 6, step])
        x_held, y_held = torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 6
        # when a step is taken, then its gradient is that of the loss with S = k/(k+10) M + 10/(k+10) mean M,
        moments = {c: torch.stack(looks[c]).mean(0) for c in range(C) if looks[c]}
        zero = torch.zeros((A, A) if kind == "full" else (A,), dtype=torch.float64)
        mean = sum(moments.values()) / len(moments) if moments else zero
        S = torch.stack([k[c] / (k[c] + 10) * moments[c] + 10 / (k[c] + 10) * mean if c in moments else mean
                         for c in range(C)])
        fc = twin.get_classifier()
        b = None if loss == "ldam-published" else fc.bias
        f = features_of(twin, x)
        wanted = naive.head_loss(f, fc.weight, b, y, S, 0.5, loss, counts, w)
        grads = torch.autograd.grad(wanted, list(twin.parameters()), allow_unused=True)
        result = heldout_step(net, x, y, x_held, y_held, held, head_loss, 0.5, w)
        torch.testing.assert_close(result.loss, wanted.detach(), rtol=1e-10, atol=1e-12)
        for p, g in zip(net.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None else g, rtol=1e-8, atol=1e-11)
        # batch norm remembers the training batch alone,
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(dict(net.named_buffers())[name], buffer)
        # and what is measured for the next step starts from the training means as they stand then.
        f_held = features_of(net, x_held).detach()
        twin.load_state_dict(net.state_dict())  # the look above has moved the running statistics of both
        f, f_held = (head_loss.augmentable_features(v.detach()) for v in (f, f_held))
        for row, c in zip(f, y.tolist(), strict=True):
            seen[c].append(row)
        for row, c in zip(f_held, y_held.tolist(), strict=True):
            if seen[c]:
                away = row - torch.stack(seen[c]).mean(0)
                looks[c].append(torch.outer(away, away) if kind == "full" else away * away)
    assert (held.seen > 0).tolist() == [True] * 4 + [False, True, False]  # class 4 was never in training, 6 never held


def test_what_is_not_finite_stops_before_anything_is_updated():
    net = small_conv(3).double().train()
    held = HeldOut(RunningCovariance(3, 9, "full", torch.float64), [2] * 3)
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    with pytest.raises(DivergenceError, match="meta loss is not finite"):
        heldout_step(net, x, y, x * float("nan"), y, held, HeadLoss("ce"), 0.5)
    assert not held.seen.any() and not held.running.counts.any()
    assert all(p.grad is None for p in net.parameters())


def test_a_fifth_of_the_meta_pictures_is_enough_to_measure_on(tmp_path):
    # Given six meta pictures a class, those of the last class in training as well,
    data = dataclasses.replace(small_data(), shared_meta_classes=(2,))
    recipe = dataclasses.replace(TINY, augment="heldout", meta_in_training="stage2")
    # when most are trained on in stage 2, then one of each class that can spare it is not, and measures alone;
    second = stages.data_of_stage(recipe, data, 2)
    assert second.class_counts == tuple(n + extra for n, extra in zip(data.class_counts, (5, 5, 6), strict=True))
    assert second.meta.labels.tolist() == [0, 1]
    trained_on = {picture.tobytes() for picture in second.train.pictures}
    assert trained_on.isdisjoint(picture.tobytes() for picture in second.meta.pictures)
    assert stages.data_of_stage(recipe, data, 1).class_counts == data.class_counts
    state, _ = loop.run(recipe, data, tmp_path, CPU)
    assert state.learned.seen[:2].min() > 0 and state.learned.seen[2] == 0


def test_only_pictures_that_are_not_trained_on_are_measured(tmp_path, monkeypatch):
    # Given a class too small to spare its meta pictures, which are in training as well,
    data = dataclasses.replace(small_data(), shared_meta_classes=(2,))
    measured = []
    real = steps.heldout_step

    def noted(module, pictures, labels, held_pictures, held_labels, *rest):
        measured.append(held_labels)
        return real(module, pictures, labels, held_pictures, held_labels, *rest)

    monkeypatch.setattr(steps, "heldout_step", noted)
    # when it trains, then that class is never looked at, and its S is what the others show.
    state, _ = loop.run(dataclasses.replace(TINY, augment="heldout"), data, tmp_path, CPU)
    assert measured and np.unique(torch.cat(measured)).tolist() == [0, 1]
    S = state.learned.rows(torch.arange(3))
    torch.testing.assert_close(S[2], state.learned.moment[:2].mean(0))
    assert S[2].norm() > 0 and torch.linalg.eigvalsh(S).min() >= -1e-6 * S.norm()
