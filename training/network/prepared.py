"""Speed up a network for training: memory format, and depthwise convolutions over small maps on CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prepared(module: nn.Module, device: torch.device | str) -> nn.Module:
    """The module itself, on the device. Weights, names and, up to rounding, results do not change."""
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if torch.device(device).type == "cpu":
        for part in module.modules():
            if type(part) is nn.Conv2d and _is_depthwise(part):
                part.__class__ = DepthwiseConv2d
    return module


class DepthwiseConv2d(nn.Conv2d):
    """A convolution that in training pads maps smaller than its kernel itself.

    oneDNN then uses a kernel for the weights' gradient that is three to four times as fast: 12 ms instead of 40 for
    forward and backward of 32 pictures with 1,152 channels, 3 x 3 pixels and 5 x 5 weights (torch 2.14, AVX2).
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad and x.shape[-1] < self.kernel_size[1]:
            assert not isinstance(self.padding, str)
            height, width = self.padding
            return F.conv2d(F.pad(x, (width, width, height, height)), self.weight, self.bias, groups=self.groups)
        return super().forward(x)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return (conv.groups == conv.in_channels == conv.out_channels > 1 and conv.stride == conv.dilation == (1, 1)
            and conv.padding_mode == "zeros" and not isinstance(conv.padding, str))
