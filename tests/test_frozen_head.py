"""The closed form of a frozen backbone's step is autograd's step, to rounding."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training.errors import DivergenceError, TrainingError
from training.method import closed_form as frozen_head
from training.method import reference as naive
from training.method.closed_form import SUPPORTED_LOSSES, frozen_head_step
from training.method.covariance import LearnedCovariance, RunningCovariance
from training.method.losses import HeadLoss, class_balanced_weights
from training.method.metasaug import metasaug_step


def a_setting(classes=7, features=9, n=12, m=10, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(features, classes, bias, dtype=dtype)
    f, f_meta = torch.randn(n, features, dtype=dtype).relu(), torch.randn(m, features, dtype=dtype).relu()
    y, y_meta = torch.randint(0, max(2, classes - 2), (n,)), torch.randint(0, classes, (m,))
    running = RunningCovariance(classes, features, "diagonal", dtype)
    running.covariance.uniform_()
    running.counts += 5
    return layer, (f, y, f_meta, y_meta), LearnedCovariance(running), [900 // (c + 1) for c in range(classes)]


def relative(ours, twin):
    return ((ours.double() - twin.double()).norm() / twin.double().norm()).item()


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(2, 30), features=st.integers(1, 20), n=st.integers(1, 20), m=st.integers(1, 20),
    loss=st.sampled_from(SUPPORTED_LOSSES), weighted=st.booleans(), bias=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_closed_form_equals_double_backward(classes, features, n, m, loss, weighted, bias, seed):
    # Given any sizes, a loss that the closed form covers, and chunks of a few classes,
    layer, data, learned, counts = a_setting(classes, features, n, m, bias, seed=seed)
    f, y, f_meta, _y_meta = data
    f_meta += 0.1  # no all-zero features: the truth would be 0, and relative error mean nothing
    f += 0.1
    head_loss = HeadLoss(loss, counts)
    w = class_balanced_weights(counts) if weighted else None
    S = learned.running.covariance.add_(0.1).clone()  # a step this small makes no variance negative
    shift = head_loss.shifted(torch.zeros(n, classes, dtype=f.dtype), y)
    # when stepped by autograd over the (N, C, A) differences, and in closed form,
    grad_S, new_S, *grads = naive.autograd_frozen_head_step(
        *data, layer.weight, layer.bias, S, 0.5, 0.1, 0.3, w, shift, naive.spread
    )
    frozen_head._CHUNK_NUMBERS, usual = 3 * features, frozen_head._CHUNK_NUMBERS
    try:
        result = frozen_head_step(layer, *data, learned, head_loss, strength=0.5, inner_rate=0.1, meta_rate=0.3,
                                  class_weights=w)
    finally:
        frozen_head._CHUNK_NUMBERS = usual
    # then the meta gradient and the gradients at S' are the same, and S of absent classes is as it was.
    present = torch.zeros(classes, dtype=torch.bool)
    present[y] = True
    assert (learned.delta[~present] == 0).all()
    ours = [learned.delta, result.shift * S[present].norm(), *(p.grad for p in layer.parameters())]
    for one, twin in zip(ours, [-0.3 * grad_S, (new_S - S).norm(), *grads], strict=True):
        assert (one - twin).norm() <= 1e-12 * max(twin.norm(), 1e-2)


class Cached(nn.Module):
    """Features are the pictures: what `metasaug_step` sees of a frozen backbone."""

    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def forward_features(self, x):
        return x

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.fc(x)

    def get_classifier(self):
        return self.fc


@pytest.mark.parametrize(("loss", "fidelity", "bias"), [
    *((loss, fidelity, True) for loss in SUPPORTED_LOSSES for fidelity in ("fixed", "reference")),
    ("ce", "fixed", False),
])  # fmt: skip
def test_five_steps_are_those_of_the_general_meta_step(loss, fidelity, bias):
    # Given the same start, when five whole steps are taken by either way, with a meta rate that drives variances to 0,
    runs = []
    for closed in (True, False):
        layer, data, learned, counts = a_setting(bias=bias)
        step = (lambda layer: layer) if closed else Cached
        function = frozen_head_step if closed else functools.partial(metasaug_step, implementation="autograd")
        optimizer = torch.optim.SGD(layer.parameters(), 0.5, momentum=0.9)
        for _ in range(5):
            result = function(step(layer), *data, learned, HeadLoss(loss, counts), strength=0.5, inner_rate=0.5,
                              meta_rate=50.0, fidelity=fidelity, class_weights=class_balanced_weights(counts))
            optimizer.step()
        runs.append([*layer.parameters(), learned.delta, learned.running.covariance, result.loss, result.loss_before,
                     result.meta_loss, result.shift, result.logits_NC[:2]])  # in closed form of an eighth of the batch
    # then weights, what was learned, estimates and figures are the same.
    for ours, general in zip(*runs, strict=True):
        torch.testing.assert_close(ours, general, rtol=1e-9, atol=1e-11)


def test_float32_errs_as_little_as_autograd():
    # Given a large layer in float32, and the truth in float64,
    layer, data, learned, _ = a_setting(classes=600, features=300, n=64, m=64, dtype=torch.float32)
    S = learned.running.covariance.clone()
    at = (*data, layer.weight, layer.bias, S)
    _, _, truth, _ = naive.autograd_frozen_head_step(
        *(t.double() if t.is_floating_point() else t for t in at), 0.5, 0.1, 0.1
    )
    _, _, twin, _ = naive.autograd_frozen_head_step(*at, 0.5, 0.1, 0.1)
    # when stepped, then the error is of the size of autograd's own (two orders of summation: up to 3 times).
    frozen_head_step(layer, *data, learned, HeadLoss("ce"), strength=0.5, inner_rate=0.1)
    assert relative(layer.weight.grad, truth) <= 3 * relative(twin, truth)


def test_what_the_closed_form_does_not_cover_is_refused():
    layer, data, learned, counts = a_setting()
    for loss in ("focal", "ldam-published"):
        with pytest.raises(TrainingError, match=r"no --loss .*metasaug_step"):
            frozen_head_step(layer, *data, learned, HeadLoss(loss, counts), strength=0.5, inner_rate=0.1)
    full = LearnedCovariance(RunningCovariance(7, 9, "full", torch.float64))
    with pytest.raises(TrainingError, match="--covariance diagonal"):
        frozen_head_step(layer, *data, full, HeadLoss("ce"), strength=0.5, inner_rate=0.1)


@pytest.mark.promise("divergence")
def test_divergence_stops_before_any_update():
    # Given a NaN in the meta features, when stepped, then it says so and nothing has changed.
    layer, (f, y, f_meta, y_meta), learned, _ = a_setting()
    before = learned.running.covariance.clone()
    with pytest.raises(DivergenceError, match="not finite"):
        frozen_head_step(layer, f, y, f_meta * float("nan"), y_meta, learned, HeadLoss("ce"), strength=0.5,
                         inner_rate=0.1)
    assert layer.weight.grad is None and torch.equal(learned.running.covariance, before)
    assert (learned.delta == 0).all()


def test_only_the_rows_of_the_batch_are_touched():
    # Given NaN in the rows of S of every absent class, when stepped, then they are not read.
    layer, data, learned, _ = a_setting()
    absent = torch.ones(7, dtype=torch.bool)
    absent[data[1]] = False
    learned.running.covariance[absent] = float("nan")
    frozen_head_step(layer, *data, learned, HeadLoss("ce"), strength=0.5, inner_rate=0.1)
    assert layer.weight.grad.isfinite().all()


def test_the_meta_step_takes_the_closed_form_where_it_holds(monkeypatch):
    # Given a last layer alone, and who computes its steps,
    taken = []
    real = frozen_head.frozen_head_step
    monkeypatch.setattr(frozen_head, "frozen_head_step", lambda *a, **k: taken.append(1) or real(*a, **k))
    for loss, implementation, expected in [("ce", "auto", 1), ("focal", "auto", 0), ("ce", "autograd", 0)]:
        layer, data, learned, counts = a_setting()
        metasaug_step(Cached(layer), *data, learned, HeadLoss(loss, counts), strength=0.5, inner_rate=0.1,
                      implementation=implementation)
        # then it is the closed form for the losses that have one, unless autograd is asked for.
        assert len(taken) == expected, (loss, implementation)
        taken.clear()
