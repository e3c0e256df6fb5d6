"""Each loss is its paper's formula, alone and augmented; the augmentation is what endless sampling would give."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from training.method import losses
from training.method import reference as naive
from training.method.losses import (
    HeadLoss,
    class_balanced_weights,
    class_spread,
    focal,
    ldam_margins,
)
from training.recipes import Loss

LOSSES = get_args(Loss)
COUNTS = (500, 120, 33, 7, 1)


def a_head(kind, classes=5, features=4, samples=9, seed=0):
    """Features, W, b, labels (one class absent, others repeated) and S, in float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(0, max(2, classes - 1), (samples,), generator=g)
    root = draw(classes, features, features)
    S = {"none": None, "diagonal": draw(classes, features) ** 2, "full": root @ root.mT}[kind]
    return draw(samples, features), draw(classes, features), draw(classes), labels, S


def rows(S, y):
    """The covariances of the batch's classes, as `HeadLoss` takes them."""
    return None if S is None else S[y.unique()]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_its_papers_formula(loss, kind, weighted):
    # Given any loss, alone, with variances or with covariances, weighted or not,
    f, W, b, y, S = a_head(kind)
    weights = class_balanced_weights(COUNTS) if weighted else None
    options = {"gamma": 1.5, "max_margin": 0.4, "scale": 7.0, "tau": 0.8}
    # when computed by us and by the formula written out over (N, C, A),
    ours = HeadLoss(loss, COUNTS, **options)(f, W, b, y, rows(S, y), 0.6, weights)
    twin = naive.head_loss(f, W, b, y, S, 0.6, loss, COUNTS, weights, **options)
    # then they are one number.
    torch.testing.assert_close(ours, twin, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize("loss", LOSSES)
def test_derivatives_of_losses(loss, kind):
    # Given any loss, when differentiated once and twice (the meta step does), then finite differences agree.
    f, W, b, y, S = a_head(kind, features=3, samples=5)
    head_loss = HeadLoss(loss, COUNTS, gamma=1.5, scale=4.0)
    inputs = [t.requires_grad_() for t in ((f, W, b) if S is None else (f, W, b, S))]

    def scalar(f, W, b, S=None):
        return head_loss(f, W, None if loss == "ldam-published" else b, y, rows(S, y), 0.5,
                         class_balanced_weights(COUNTS))

    assert torch.autograd.gradcheck(scalar, inputs)
    assert torch.autograd.gradgradcheck(scalar, inputs, atol=1e-4, rtol=1e-3)


def test_closed_form_replaces_endless_sampling():
    """One augmented logit stands for a cloud of augmented features."""
    # Given a three-class head, and one sample whose class has a known spread,
    g = torch.Generator().manual_seed(1)
    W = torch.randn(3, 2, generator=g, dtype=torch.float64)
    f, y = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([1])
    S = torch.tensor([[[0.8, 0.3], [0.3, 0.5]]], dtype=torch.float64).expand(3, 2, 2)
    # when we draw 200,000 features around it, as the paper's derivation imagines,
    noise = torch.randn(200_000, 2, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(0.5 * S[1]).T
    drawn = (f + noise) @ W.T
    augmented = HeadLoss("ce")(f, W, None, y, rows(S, y), 0.5)
    # then the odds against the true class have the closed form's mean, as its logits say,
    odds = (drawn - drawn[:, 1:2]).exp().mean(0)
    torch.testing.assert_close(augmented, odds.sum().log(), rtol=0.01, atol=0)
    # its loss bounds the sampled loss from above,
    sampled = F.cross_entropy(drawn, y.expand(len(drawn)))
    assert sampled < augmented < sampled + 0.2
    # and with no strength nothing moves.
    assert torch.equal(HeadLoss("ce")(f, W, None, y, rows(S, y), 0.0), F.cross_entropy(f @ W.T, y))


def test_full_spread_in_chunks_is_the_same(monkeypatch):
    # Given full covariances, when their classes go by twos for lack of memory, then value and gradients stay.
    _, W, _, _, S = a_head("full", classes=7)
    classes = torch.arange(7)
    outcomes = []
    for numbers in (10**6, 2 * W.numel()):
        monkeypatch.setattr(losses, "_CHUNK_NUMBERS", numbers)
        inputs = [W.clone().requires_grad_(), S.clone().requires_grad_()]
        spread = class_spread(inputs[0], classes, inputs[1])
        outcomes.append([spread, *torch.autograd.grad(spread.sin().sum(), inputs)])
    for whole, chunked in zip(*outcomes, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


def test_relations_between_losses():
    f, W, b, y, S = a_head("diagonal")
    z = F.linear(f, W, b)
    ce = F.cross_entropy(z, y)
    # Focal loss at gamma 0 is cross entropy; logit adjustment at tau 1 is balanced softmax, at tau 0 nothing.
    torch.testing.assert_close(focal(z, y, gamma=0.0), ce)
    adjusted, balanced = HeadLoss("logit-adjustment", COUNTS, tau=1.0), HeadLoss("balanced-softmax", COUNTS)
    torch.testing.assert_close(adjusted.of_logits(z, y), balanced.of_logits(z, y))
    torch.testing.assert_close(HeadLoss("logit-adjustment", COUNTS, tau=0.0).of_logits(z, y), ce)
    # A diagonal S is a full S with zeros beside it.
    torch.testing.assert_close(
        HeadLoss("ce")(f, W, b, y, rows(S, y), 0.5), HeadLoss("ce")(f, W, b, y, rows(torch.diag_embed(S), y), 0.5)
    )


def test_class_weights_and_margins():
    # Given counts, then weights follow the effective number, sum to C, and beta 0 is no weighting;
    weights = class_balanced_weights([1000, 10], 0.99)
    torch.testing.assert_close(weights[1] / weights[0], torch.tensor((1 - 0.99**1000) / (1 - 0.99**10)).double())
    assert weights.sum().item() == pytest.approx(2)
    assert class_balanced_weights([1000, 10], 0.0).tolist() == [1, 1]
    # the rarest class has the widest margin, and 16 times the pictures half of it.
    assert ldam_margins([160, 10]).tolist() == pytest.approx([0.25, 0.5])


def test_focal_loss_of_sure_samples_is_finite():
    # Given a sample the network is sure of in float32 (p rounds to 1), when differentiated, then no NaN at gamma < 1.
    z = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    loss = focal(z, torch.tensor([0, 0]), gamma=0.5)
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: HeadLoss("hinge"), "one of ce"),
        (lambda: HeadLoss("ldam"), "one count a class"),
        (lambda: class_balanced_weights([5, 0]), "at least one picture"),
        (lambda: class_balanced_weights([5, 5], 1.0), "in \\[0, 1\\)"),
    ],
)
def test_misuse_says_what_is_missing(make, hint):
    with pytest.raises(ValueError, match=hint):
        make()
