"""A plain, slow reference of the method, one line per equation: tests compare the fast code with it.

N samples, C classes, A features.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def spread(W, y, S):
    """q_nj = (w_j - w_yn)^T S_yn (w_j - w_yn) over the (N, C, A) differences, S full or diagonal."""
    D = W[None] - W[y][:, None]
    if S.ndim == 2:
        return (D * D * S[y][:, None]).sum(2)
    return torch.einsum("nca,nab,ncb->nc", D, S[y], D)


def margins(counts, max_margin):
    m = torch.tensor(counts, dtype=torch.float64) ** -0.25
    return m * max_margin / m.max()


def head_loss(f, W, b, y, S, strength, name="ce", counts=None, w=None, gamma=1.0, max_margin=0.5, scale=30.0, tau=1.0):
    """Every loss of training.method.losses, from its paper's formula."""
    counts = [1] * len(W) if counts is None else counts
    w = torch.ones(len(W), dtype=f.dtype) if w is None else w
    if name == "ldam-published":
        f, W, b = f / f.norm(dim=1, keepdim=True), W / W.norm(dim=1, keepdim=True), 0.0
    z = f @ W.T + (0.0 if b is None else b)
    if S is not None:
        z = z + strength / 2 * spread(W, y, S)
    if name in ("ldam", "ldam-published"):
        z = z - torch.eye(len(W), dtype=f.dtype)[y] * margins(counts, max_margin).to(f)[y][:, None]
    if name == "ldam-published":
        # s (z + q/2 lambda) with S scaled by s, or s^2 q: logits times s, variance times s^2
        z = scale * z + (0 if S is None else strength / 2 * (scale**2 - scale) * spread(W, y, S))
    prior = torch.tensor(counts, dtype=torch.float64).to(f)
    if name == "balanced-softmax":
        p = prior * z.exp() / (prior * z.exp()).sum(1, keepdim=True)
    elif name == "logit-adjustment":
        p = (z + tau * (prior / prior.sum()).log()).softmax(1)
    else:
        p = z.softmax(1)
    p_y = p[torch.arange(len(y)), y]
    loss = -p_y.log() * ((1 - p_y) ** gamma if name == "focal" else 1)
    return (w[y] * loss).sum() / w[y].sum()


def double_backward_step(net, x, y, x_meta, y_meta, S, loss, alpha, lookahead="network", cosine_scale=None):
    """-> (grad_S, gradients of all parameters at S' as a function of S'). loss(f, W, b, y, S) -> scalar.

    cosine_scale  of LDAM as published, whose logits are scale * cosine, also in the meta loss
    """
    params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    fc = next(n for n, m in net.named_modules() if m is net.get_classifier())
    S = S.detach().clone().requires_grad_()
    buffers = {n: b.clone() for n, b in net.named_buffers()}

    def head(params, x, y, S):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            features, logits = functional_call(WithFeatures(net), _under_net(params | buffers), (x,))
        if S is None and cosine_scale is None:
            return F.cross_entropy(logits, y)
        if S is None:
            cosine = F.normalize(features) @ F.normalize(params[f"{fc}.weight"]).T
            return F.cross_entropy(cosine_scale * cosine, y)
        return loss(features, params[f"{fc}.weight"], params.get(f"{fc}.bias"), y, S)

    moving = list(params) if lookahead == "network" else [n for n in params if n.startswith(f"{fc}.")]
    grads = torch.autograd.grad(head(params, x, y, S), [params[n] for n in moving], create_graph=True)
    ahead = params | {n: params[n] - alpha * g for n, g in zip(moving, grads, strict=True)}
    (grad_S,) = torch.autograd.grad(head(ahead, x_meta, y_meta, None), S)
    return grad_S, lambda new_S: torch.autograd.grad(head(params, x, y, new_S), list(params.values()))


class WithFeatures(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        fmap = self.net.forward_features(x)
        return self.net.forward_head(fmap, pre_logits=True), self.net.forward_head(fmap)


def _under_net(tensors):
    return {f"net.{n}": t for n, t in tensors.items()}


def matmul_spread(W, y, S):
    """`spread` for the diagonal form by expanding the square, which saves memory."""
    s, w = S[y], W[y]
    return s @ (W * W).T - 2 * (s * w) @ W.T + (s * w * w).sum(1, keepdim=True)


def autograd_frozen_head_step(
    f, y, f_meta, y_meta, W, b, S, strength, alpha, eta, w=None, shift=0.0, spread=matmul_spread
):
    """One step of a last layer on fixed features by double backward -> (grad_S, S', gradients in W and b at S').

    b      bias; None for a layer without one, and then its gradient is left out
    shift  (N, C) constants added to the logits: margins or priors
    """
    W, S, *b = (t.detach().clone().requires_grad_() for t in (W, S, b) if t is not None)

    def loss(S):
        return F.cross_entropy(F.linear(f, W, *b) + strength / 2 * spread(W, y, S) + shift, y, weight=w)

    steps = torch.autograd.grad(loss(S), (W, *b), create_graph=True)
    ahead = [p - alpha * g for p, g in zip((W, *b), steps, strict=True)]
    (grad_S,) = torch.autograd.grad(F.cross_entropy(F.linear(f_meta, *ahead), y_meta), S)
    new_S = (S - eta * grad_S).detach()
    return grad_S, new_S, *torch.autograd.grad(loss(new_S), (W, *b))


class EstimatorCV:
    """The authors' running estimate (their utils/loss file, class of the same name), one class at a time.

    With n_c features so far and m_c in the batch, r = m_c / (n_c + m_c), batch mean a and covariance V:

        S <- (1 - r) S + r V + r (1 - r) (mean - a)(mean - a)^T,    mean <- (1 - r) mean + r a
    """

    def __init__(self, num_classes, num_features, kind, dtype=torch.float64):
        self.kind = kind
        self.S = torch.zeros(num_classes, *[num_features] * (2 if kind == "full" else 1), dtype=dtype)
        self.mean = torch.zeros(num_classes, num_features, dtype=dtype)
        self.n = torch.zeros(num_classes, dtype=dtype)

    def update(self, features, labels):
        def square(x):
            return torch.outer(x, x) if self.kind == "full" else x * x

        for c in range(len(self.n)):
            f = features[labels == c]
            if len(f) == 0:
                continue
            r = len(f) / (self.n[c] + len(f))
            a = f.mean(0)
            V = sum(square(x - a) for x in f) / len(f)
            self.S[c] = (1 - r) * self.S[c] + r * V + r * (1 - r) * square(self.mean[c] - a)
            self.mean[c] = (1 - r) * self.mean[c] + r * a
            self.n[c] += len(f)


def authors_steps(net, batches, estimator, loss, alpha, eta, rate, lookahead):
    """The authors' loop: S' = S - eta grad_S is used for one step, then the batch updates the estimate. Plain SGD.

    loss(f, W, b, y, S) -> scalar. Changes the parameters of `net`; returns the loss of each step.
    """
    losses = []
    for x, y, x_meta, y_meta in batches:
        grad_S, real = double_backward_step(net, x, y, x_meta, y_meta, estimator.S, loss, alpha, lookahead)
        with torch.no_grad():
            features, _ = WithFeatures(net)(x)
        fc = net.get_classifier()
        losses.append(loss(features, fc.weight, fc.bias, y, estimator.S - eta * grad_S).item())
        grads = real(estimator.S - eta * grad_S)
        estimator.update(features, y)
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= rate * g
    return losses
