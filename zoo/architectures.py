"""The networks, with timm's interface: forward_features, forward_head(pre_logits=), get_classifier. Needs torch.

Feature maps are (N, A, H, W), features (N, A), logits (N, C); every network here ends in global average pooling and
one linear layer, so that class activation maps are exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without weights (option A of He et al. 2016, section 4.2)."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.missing = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            # Where the shape changes: every other pixel, and zeros for the channels that are not there yet.
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing - half))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 pictures (He et al. 2016, section 4.2): 6n + 2 layers, 16, 32 and 64 channels.

    The same network as the authors' ResNet32 (their `linear` is `fc` here); start weights are theirs too.
    """

    def __init__(self, num_classes: int, blocks_per_stage: int):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 64
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks_per_stage)
        self.layer2 = self._stage(16, 32, 2, blocks_per_stage)
        self.layer3 = self._stage(32, 64, 2, blocks_per_stage)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))

    def forward_head(self, feature_map: Tensor, pre_logits: bool = False) -> Tensor:
        features = feature_map.mean((2, 3))
        return features if pre_logits else self.fc(features)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def cosine_logits(features_NA: Tensor, weight_CA: Tensor, scale: float) -> Tensor:
    """scale * cos(f_n, w_c) -> (N, C)."""
    return scale * F.linear(F.normalize(features_NA), F.normalize(weight_CA))


class CosineClassifier(nn.Linear):
    """`cosine_logits`: the last layer of LDAM as published (Cao et al. 2019). No bias."""

    def __init__(self, in_features: int, num_classes: int, scale: float):
        super().__init__(in_features, num_classes, bias=False)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return cosine_logits(features, self.weight, self.scale)


def create(architecture: str, num_classes: int, cosine_scale: float | None = None) -> nn.Module:
    """The network by its name, with fresh weights from torch's global random state.

    cosine_scale  where given, the last layer is a CosineClassifier of this scale
    Raises ZooError for a name that is not in `ARCHITECTURES`.
    """
    try:
        make = ARCHITECTURES[architecture]
    except KeyError:
        raise ZooError(f"Unknown architecture {architecture!r}: one of {', '.join(ARCHITECTURES)}.") from None
    module = make(num_classes)
    if cosine_scale is not None:
        module.fc = CosineClassifier(module.fc.in_features, num_classes, cosine_scale)
    return module


def _torchvision_resnet(block: str, layers: list[int], **options):
    """torchvision's ResNet, whose parameter names are also timm's, with timm's interface."""

    def make(num_classes: int) -> nn.Module:
        from torchvision.models import resnet

        class ResNet(resnet.ResNet):
            def forward_features(self, x: Tensor) -> Tensor:
                x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
                return self.layer4(self.layer3(self.layer2(self.layer1(x))))

            def forward_head(self, feature_map: Tensor, pre_logits: bool = False) -> Tensor:
                features = torch.flatten(self.avgpool(feature_map), 1)
                return features if pre_logits else self.fc(features)

            def get_classifier(self) -> nn.Linear:
                return self.fc

            def forward(self, x: Tensor) -> Tensor:
                return self.forward_head(self.forward_features(x))

        module = ResNet(getattr(resnet, block), layers, num_classes, **options)
        module.num_classes, module.num_features = num_classes, module.fc.in_features
        return module

    return make


ARCHITECTURES = {
    "resnet32": lambda num_classes: CifarResNet(num_classes, 5),
    "resnet10": _torchvision_resnet("BasicBlock", [1, 1, 1, 1]),
    "resnet18": _torchvision_resnet("BasicBlock", [2, 2, 2, 2]),
    "resnet34": _torchvision_resnet("BasicBlock", [3, 4, 6, 3]),
    "resnet50": _torchvision_resnet("Bottleneck", [3, 4, 6, 3]),
    "resnet101": _torchvision_resnet("Bottleneck", [3, 4, 23, 3]),
    "resnet152": _torchvision_resnet("Bottleneck", [3, 8, 36, 3]),
    "resnext50_32x4d": _torchvision_resnet("Bottleneck", [3, 4, 6, 3], groups=32, width_per_group=4),
}
