"""The networks, with timm's interface: forward_features, forward_head(pre_logits=), get_classifier. Needs torch.

Feature maps are (N, A, H, W), features (N, A), logits (N, C). Every network ends in one linear layer over A =
`num_features` features. The networks of `ARCHITECTURES` average their feature map to get them, which makes class
activation maps exact. Some of timm's networks do so too: `has_feature_map` says which.
"""

import difflib
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

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
            # Where the shape changes: every other pixel, and zeros for the new channels.
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing - half))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 pictures (He et al. 2016, section 4.2): 6n + 2 layers, 16, 32 and 64 channels.

    The same network as the authors' ResNet32 (their `linear` is `fc` here), with the same initial weights.
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


def create(architecture: str, num_classes: int, cosine_scale: float | None = None) -> Any:
    """Create a network by name, with fresh weights from torch's global random state. Nothing is downloaded.

    architecture  one of `ARCHITECTURES`, a torchvision classifier ("torchvision:mobilenet_v3_small") or a timm network
                  ("timm:convnext_atto"). "timm:" may be left out if no name in `ARCHITECTURES` is the same: model
                  folders that timm opens have such names
    cosine_scale  if given, the last layer is a CosineClassifier of this scale
    Raises ZooError for an unknown name, and for networks that do not end in one linear layer.
    """
    module: Any
    if architecture in ARCHITECTURES:
        module = ARCHITECTURES[architecture](num_classes)
        module.has_feature_map = True
    elif architecture.startswith("torchvision:"):
        module = _torchvision(architecture.removeprefix("torchvision:"), num_classes)
    else:
        module = _timm(architecture, num_classes)
    if cosine_scale is not None:
        parent, _, name = classifier_name(module).rpartition(".")
        cosine = CosineClassifier(module.num_features, num_classes, cosine_scale)
        setattr(module.get_submodule(parent), name, cosine)
    return module


def classifier_name(module: Any) -> str:
    """The name of the last layer in the module: "fc", "head.fc" …; timm's `pretrained_cfg["classifier"]`."""
    last = module.get_classifier()
    return next(name for name, layer in module.named_modules() if layer is last)


class TorchvisionNetwork(nn.Module):
    """A torchvision classifier, cut before its last layer. Its parameters are `body.` + torchvision's names, and `fc.`.

    last_place   torchvision's name of the last layer
    """

    def __init__(self, body: nn.Module, last: nn.Linear, last_place: str):
        super().__init__()
        self.body, self.fc, self.last_place = body, last, last_place
        self.num_classes, self.num_features = last.out_features, last.in_features
        self.default_cfg = {"input_size": (3, 224, 224)}

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.fc(features)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _torchvision(name: str, num_classes: int) -> Any:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ZooError(f"torchvision has no classifier {name!r}.{meant}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:  # two of them have further outputs in training by default
            body = models.get_model(name, weights=None, num_classes=num_classes, aux_logits=False)
        except TypeError:
            body = models.get_model(name, weights=None, num_classes=num_classes)
    linear = [(place, layer) for place, layer in body.named_modules() if isinstance(layer, nn.Linear)]
    if not linear or linear[-1][1].out_features != num_classes:
        raise ZooError(f"torchvision's {name} cannot be used here: it does not end in one linear layer.")
    where, last = linear[-1]
    parent, _, child = where.rpartition(".")
    setattr(body.get_submodule(parent), child, nn.Identity())
    try:
        return _checked(TorchvisionNetwork(body, last, where))
    except (RuntimeError, ValueError) as error:
        raise ZooError(f"torchvision's {name} cannot be used here: {error}.") from error


def _timm(architecture: str, num_classes: int) -> Any:
    name = architecture.removeprefix("timm:")
    try:
        import timm
    except ModuleNotFoundError:
        raise ZooError(f"Architecture {architecture!r} is none of {', '.join(ARCHITECTURES)}. For timm's networks: "
                       "pip install 'metasaug[timm]'.") from None
    # timm itself would also take "hf-hub:…" and "local-dir:…", and read or fetch weights from there.
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, {*ARCHITECTURES, *timm.list_models()}, n=3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ZooError(f"Unknown architecture {architecture!r}.{meant} There are {', '.join(ARCHITECTURES)} and, as "
                       "timm:NAME, the networks of timm (timm.list_models()).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = timm.create_model(name, pretrained=False, num_classes=num_classes)
        return _checked(module)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ZooError(f"timm's {name} cannot be used here: {error}") from error


def _checked(module: Any) -> Any:
    """Run the network to check that it is features and a linear layer; set `has_feature_map`."""
    last = module.get_classifier()
    if not isinstance(last, nn.Linear):
        raise ValueError("it does not end in one linear layer")
    training, size = module.training, module.default_cfg["input_size"]
    picture = torch.linspace(-2, 2, 2 * math.prod(size)).sin().view(2, *size)
    with torch.no_grad():
        feature_map = module.eval().forward_features(picture)
        features = module.forward_head(feature_map, pre_logits=True)
        if features.shape != (2, last.in_features) or not torch.allclose(last(features), module(picture), atol=1e-5):
            raise ValueError("its logits are not one linear layer over its features")
    module.train(training)
    module.num_features = last.in_features  # some timm networks count the channels before a hidden layer of the head
    module.has_feature_map = (
        isinstance(feature_map, Tensor) and feature_map.dim() == 4 and feature_map.shape[1] == last.in_features
        and torch.allclose(feature_map.mean((2, 3)), features, atol=1e-5))
    return module


def _torchvision_resnet(block: str, layers: list[int], small: bool, **options):
    """torchvision's ResNet, whose parameter names are also timm's, with timm's interface.

    small  for pictures of 32 to 96 pixels: the stem is one 3 x 3 convolution of stride 1, without pooling. The usual
           stem leaves a quarter of the width and height
    """

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
        if small:
            module.conv1, module.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
        return module

    return make


_RESNETS = {
    "resnet10": ("BasicBlock", [1, 1, 1, 1], {}),
    "resnet18": ("BasicBlock", [2, 2, 2, 2], {}),
    "resnet34": ("BasicBlock", [3, 4, 6, 3], {}),
    "resnet50": ("Bottleneck", [3, 4, 6, 3], {}),
    "resnet101": ("Bottleneck", [3, 4, 23, 3], {}),
    "resnet152": ("Bottleneck", [3, 8, 36, 3], {}),
    "resnext50_32x4d": ("Bottleneck", [3, 4, 6, 3], {"groups": 32, "width_per_group": 4}),
}

ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{6 * n + 2}": partial(CifarResNet, blocks_per_stage=n) for n in (5, 3, 1)},
    **{name: _torchvision_resnet(block, layers, False, **options)
       for name, (block, layers, options) in _RESNETS.items()},
    **{f"{name}-small": _torchvision_resnet(block, layers, True, **options)
       for name, (block, layers, options) in _RESNETS.items()},
}
