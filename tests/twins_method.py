"""Naive twins of the method: one line an equation, no care for speed or memory. They are the truth.

N samples, C classes, A features.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call


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
    """Every loss of training.losses, from its paper's formula."""
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


def double_backward_step(net, x, y, x_meta, y_meta, S, loss, alpha, lookahead="network"):
    """loss(f, W, b, y, S) -> scalar; net(x) -> features after `with_features(net)`.

    -> (grad_S, gradients at S' as a function of S').
    """
    params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    fc = [n for n, m in net.named_modules() if m is net.get_classifier()][0]
    S = S.detach().clone().requires_grad_()
    buffers = {n: b.clone() for n, b in net.named_buffers()}

    def head(params, x, y, S):
        features, logits = functional_call(WithFeatures(net), _under_net(params | buffers), (x,))
        if S is None:
            return F.cross_entropy(logits, y)
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
