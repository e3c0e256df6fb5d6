"""The meta step gives what differentiating twice through everything gives, at a fraction of the work."""

import copy
from typing import get_args

import pytest
import torch
from torch import nn

from training.errors import DivergenceError, TrainingError
from training.method import reference as naive
from training.method.covariance import LearnedCovariance, RunningCovariance
from training.method.losses import HeadLoss, class_balanced_weights
from training.method.metasaug import TrainBatch, meta_gradient, metasaug_step
from training.recipes import Loss
from zoo.architectures import create

LOOKAHEADS = pytest.mark.parametrize("lookahead", ["network", "classifier"])
KINDS = pytest.mark.parametrize("kind", ["full", "diagonal"])


class WithHead(nn.Module):
    """timm's interface around a body; feature maps and tokens are averaged."""

    def __init__(self, body, features, num_classes, mean_over=()):
        super().__init__()
        self.body, self.mean_over = body, mean_over
        self.fc = nn.Linear(features, num_classes)

    def forward_features(self, x):
        return self.body(x)

    def forward_head(self, x, pre_logits=False):
        features = x.mean(self.mean_over) if self.mean_over else x
        return features if pre_logits else self.fc(features)

    def get_classifier(self):
        return self.fc


class Tokens(nn.Module):
    """4 x 4 patches as tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, 4)

    def forward(self, x):
        return self.embed(x).flatten(2).mT


def small_conv(num_classes):
    body = nn.Sequential(nn.Conv2d(3, 9, 3, bias=False), nn.BatchNorm2d(9), nn.Tanh())
    return WithHead(body, 9, num_classes, (2, 3))


def small_mlp(num_classes):
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 9), nn.GELU())
    return WithHead(body, 9, num_classes)


def vit_block(num_classes, dropout=0.0):
    block = nn.TransformerEncoderLayer(12, 3, 24, dropout, "gelu", batch_first=True, norm_first=True)
    return WithHead(nn.Sequential(Tokens(), block, nn.LayerNorm(12)), 12, num_classes, (1,))


def resnet8(num_classes):
    return create("resnet8", num_classes)


def a_setting(make=small_conv, num_classes=7, kind="full", n=8, dtype=torch.float64, seed=0, size=8):
    """A network, a batch with absent and repeated classes, a balanced batch, an estimate, weights of classes."""
    torch.manual_seed(seed)
    net = make(num_classes).to(dtype).train()
    x, y = torch.randn(n, 3, size, size, dtype=dtype), torch.randint(0, (num_classes + 1) // 2, (n,))
    y[-1] = y[0]
    m = min(2 * num_classes, 20)
    x_meta, y_meta = torch.randn(m, 3, size, size, dtype=dtype), torch.arange(m) % num_classes
    width = net.get_classifier().in_features
    running = RunningCovariance(num_classes, width, kind, dtype)
    running.update(torch.randn(20 * num_classes, width, dtype=dtype), torch.arange(20 * num_classes) % num_classes)
    counts = [1000 // (c + 1) for c in range(num_classes)]
    return net, (x, y, x_meta, y_meta), running, counts, class_balanced_weights(counts).to(dtype)


def assert_step_is_double_backward(setting, lookahead, loss="ce", rtol=1e-10):
    net, data, running, counts, w = setting
    S = running.covariance.clone()
    head_loss = HeadLoss(loss, counts, scale=5.0)

    def twin_loss(f, W, b, y, S):
        return naive.head_loss(f, W, b, y, S, 0.5, loss, counts, w, scale=5.0)

    # when grad_S is computed by double backward and by us,
    twin_grad, twin_real = naive.double_backward_step(
        net, *data, S, twin_loss, 0.1, lookahead, cosine_scale=5.0 if loss == "ldam-published" else None
    )
    batch = TrainBatch(net, *data[:2], head_loss, 0.5, w, tangents=True)
    grad_U, _, _ = meta_gradient(batch, S[batch.rows.classes_U], *data[2:], 0.1, lookahead)
    # then they agree, absent classes have none, and the real gradient that a whole step leaves behind agrees too.
    grad = torch.zeros_like(S)
    batch.rows.put(grad, grad_U)
    assert twin_grad.norm() > 0
    assert (grad - twin_grad).norm() <= rtol * twin_grad.norm()
    metasaug_step(net, *data, LearnedCovariance(running), head_loss, strength=0.5, inner_rate=0.1,
                  lookahead=lookahead, fidelity="reference", class_weights=w)
    ours = torch.cat([p.grad.flatten() for p in net.parameters()])
    twin = torch.cat([g.flatten() for g in twin_real(S - 0.1 * twin_grad)])
    assert (ours - twin).norm() <= rtol * twin.norm()


@LOOKAHEADS
@KINDS
@pytest.mark.parametrize("num_classes", [2, 7, 200])
def test_meta_step_equals_double_backward(num_classes, kind, lookahead):
    # Given a network, a long-tailed batch in which classes are absent and repeated, and a covariance estimate,
    assert_step_is_double_backward(a_setting(num_classes=num_classes, kind=kind), lookahead)


@LOOKAHEADS
@pytest.mark.parametrize("make", [small_mlp, vit_block])
def test_meta_step_equals_double_backward_for_other_networks(make, lookahead):
    # Given a network with batch norm of vectors, or with attention and layer norm,
    assert_step_is_double_backward(a_setting(make), lookahead)


@LOOKAHEADS
@KINDS
def test_meta_step_equals_double_backward_for_resnet8(kind, lookahead):
    # Given the network of the CIFAR tables,
    assert_step_is_double_backward(a_setting(resnet8, 10, kind, size=16), lookahead)


@LOOKAHEADS
@KINDS
@pytest.mark.parametrize("loss", get_args(Loss))
def test_meta_step_equals_double_backward_for_every_loss(loss, kind, lookahead):
    # Given any loss,
    setting = a_setting(kind=kind)
    if loss == "ldam-published":  # cosine logits have no bias
        setting[0].fc = nn.Linear(9, 7, bias=False, dtype=torch.float64)
    assert_step_is_double_backward(setting, lookahead, loss)


@LOOKAHEADS
def test_float32_errs_no_more_than_double_backward(lookahead):
    # Given eight settings in float32, and the truth in float64,
    errors = {"ours": 0.0, "twin": 0.0}
    for seed in range(8):
        net, data, running, counts, w = a_setting(num_classes=10, n=32, seed=seed)

        def gradients(dtype, net=net, data=data, running=running, counts=counts, w=w):
            net_, S, w_ = copy.deepcopy(net).to(dtype), running.covariance.to(dtype), w.to(dtype)
            data_ = [t.to(dtype) if t.is_floating_point() else t for t in data]

            def loss(f, W, b, y, S):
                return naive.head_loss(f, W, b, y, S, 0.5, w=w_)

            twin, _ = naive.double_backward_step(net_, *data_, S, loss, 0.1, lookahead)
            batch = TrainBatch(net_, *data_[:2], HeadLoss("ce"), 0.5, w_, tangents=True)
            ours, _, _ = meta_gradient(batch, S[batch.rows.classes_U], *data_[2:], 0.1, lookahead)
            grad = torch.zeros_like(S)
            batch.rows.put(grad, ours)
            return grad.double(), twin.double()

        # when grad_S is computed in float32 by double backward and by us,
        truth = gradients(torch.float64)[1]
        for name, grad in zip(errors, gradients(torch.float32), strict=True):
            errors[name] += ((grad - truth).norm() / truth.norm()).item() / 8
    # then our error is no larger (measured: 0.9 to 1.02 of it, by the number of threads; the last layer's second
    # derivative is in float64).
    assert errors["ours"] <= 1.1 * errors["twin"]
    assert errors["ours"] < 1e-5


@KINDS
@LOOKAHEADS
def test_reference_equals_the_authors_loop_over_20_steps(kind, lookahead):
    # Given the authors' loop, written from the formulas: S' lives for one step, the estimate starts from zero,
    net, _, _, _, w = a_setting(kind=kind)
    torch.manual_seed(1)
    batches = [(torch.randn(8, 3, 8, 8).double(), torch.randint(0, 4, (8,)),
                torch.randn(14, 3, 8, 8).double(), torch.arange(14) % 7) for _ in range(20)]
    twin, estimator = copy.deepcopy(net), naive.EstimatorCV(7, 9, kind)

    def loss(f, W, b, y, S):
        return naive.head_loss(f, W, b, y, S, 0.5, w=w)

    twin_losses = naive.authors_steps(twin, batches, estimator, loss, 0.1, 0.1, 0.05, lookahead)
    # when we take the same 20 steps,
    running = RunningCovariance(7, 9, kind, torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    ours = []
    for batch in batches:
        ours.append(metasaug_step(net, *batch, LearnedCovariance(running), HeadLoss("ce"), strength=0.5,
                                  inner_rate=0.1, lookahead=lookahead, fidelity="reference", class_weights=w))
        optimizer.step()
    # then losses, estimates and parameters are the same numbers.
    twin_losses = torch.tensor(twin_losses, dtype=torch.float64)
    torch.testing.assert_close(torch.stack([r.loss for r in ours]), twin_losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(running.covariance, estimator.S, rtol=1e-8, atol=1e-12)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@KINDS
def test_fixed_keeps_what_is_learned_and_reference_forgets_it(kind):
    # Given two steps on the same data, when taken in either fidelity,
    deltas = {}
    for fidelity in ("fixed", "reference"):
        net, data, running, _, w = a_setting(kind=kind)
        learned = LearnedCovariance(running)
        for _ in range(2):
            metasaug_step(net, *data, learned, HeadLoss("ce"), strength=0.5, inner_rate=0.1, fidelity=fidelity,
                          class_weights=w)
        deltas[fidelity] = learned.delta
    # then only fixed has a correction afterwards, and only in the rows of the batch's classes.
    assert (deltas["reference"] == 0).all()
    present = torch.zeros(7, dtype=torch.bool)
    present[data[1]] = True
    assert (deltas["fixed"][~present] == 0).all()
    assert (deltas["fixed"][present].flatten(1).norm(dim=1) > 0).all()


@KINDS
def test_learned_covariance_stays_a_covariance_under_huge_meta_steps(kind):
    # Given a meta rate so large that S - eta grad_S is no covariance (with one, the bound means something),
    net, data, running, _, w = a_setting(kind=kind)
    learned = LearnedCovariance(running)
    batch = TrainBatch(net, *data[:2], HeadLoss("ce"), 0.5, w, tangents=True)
    S_U = running.covariance[batch.rows.classes_U]
    grad_U, _, _ = meta_gradient(batch, S_U, *data[2:], 0.1)

    def smallest(S):
        return (torch.linalg.eigvalsh(S) if kind == "full" else S).min().item()

    assert smallest(S_U - 1e5 * grad_U) < -1e-3
    # when ten such steps are taken, then every S that is used has no negative variance in any direction.
    for _ in range(10):
        metasaug_step(net, *data, learned, HeadLoss("ce"), strength=0.5, inner_rate=0.1, meta_rate=1e5,
                      class_weights=w)
        assert smallest(learned.rows(torch.arange(7))) >= -1e-9


def test_running_statistics_see_the_training_batch_once():
    # Given batch norm, when a whole step is taken, then its statistics are those of one plain forward pass.
    net, data, running, _, _ = a_setting()
    twin = copy.deepcopy(net)
    twin.forward_features(data[0])
    metasaug_step(net, *data, LearnedCovariance(running), HeadLoss("ce"), strength=0.5, inner_rate=0.1,
                  lookahead="network")
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_draws_the_same_in_the_tangent():
    # Given dropout, when f_dot along any v is compared with a finite difference under the same draw, they agree.
    net, (x, y, *_), _, _, _ = a_setting(lambda c: vit_block(c, dropout=0.3))
    torch.manual_seed(3)
    batch = TrainBatch(net, x, y, HeadLoss("ce"), tangents=True)
    v = {n: torch.randn_like(p) for n, p in batch.body.items()}
    tangent = batch.features.tangent(v)

    def features(step):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for n, p in moved.named_parameters():
                if n in v:
                    p += step * v[n]
            torch.manual_seed(3)
            return moved.forward_head(moved.forward_features(x), pre_logits=True)

    torch.testing.assert_close(tangent, (features(1e-6) - features(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-6)


@LOOKAHEADS
@pytest.mark.promise("divergence")
@pytest.mark.parametrize("where", ["pictures", "meta pictures", "covariance"])
def test_divergence_stops_before_any_update(where, lookahead):
    # Given a NaN somewhere,
    net, data, running, _, _ = a_setting()
    learned = LearnedCovariance(running)
    {"pictures": data[0], "meta pictures": data[2], "covariance": running.covariance}[where].fill_(float("nan"))
    before = copy.deepcopy([list(net.parameters()), learned.state_dict(), running.state_dict()])
    # when a step is taken, then it says so, and parameters, gradients and estimates are what they were.
    with pytest.raises(DivergenceError, match="not finite"):
        metasaug_step(net, *data, learned, HeadLoss("ce"), strength=0.5, inner_rate=0.1, lookahead=lookahead)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before[0], strict=True))
    for state, old in ((learned.state_dict(), before[1]), (running.state_dict(), before[2])):
        for name in state:
            torch.testing.assert_close(state[name], old[name], rtol=0, atol=0, equal_nan=True)


def test_one_class_is_refused():
    with pytest.raises(TrainingError, match="at least 2"):
        RunningCovariance(1, 9, "full")
