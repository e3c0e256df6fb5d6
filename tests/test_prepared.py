"""A network as training runs it on a CPU computes what the library's own does."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from training.network.prepared import DepthwiseConv2d, prepared  # noqa: E402


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("kernel", [3, 5])
def test_padded_by_hand_a_depthwise_convolution_is_the_same(side, kernel):
    # Given depthwise and other convolutions over maps below and above the kernel's size,
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=6), nn.Conv2d(6, 4, 1),
                          nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, 2, 1, groups=4)).double()
    ours = prepared(copy.deepcopy(plain), "cpu")
    # when one is prepared, then only the depthwise one of stride 1 is another class, under the same names,
    assert [type(part) is DepthwiseConv2d for part in ours] == [True, False, False, False]
    assert ours.state_dict().keys() == plain.state_dict().keys()
    # and results and all gradients, of second order too, are the same, in float64.
    x = torch.randn(3, 6, side, side, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (plain, ours):
        y = module(x)
        weights = [x, *module.parameters()]
        first = torch.autograd.grad(y.square().sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
        found.append([y, *first, *second])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
