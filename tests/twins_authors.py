"""The authors' networks, said again in plain functions of a state dict: the truth that imports are held to.

After `resnet.py` (CIFAR) and `ImageNet_iNat/resnet_meta.py`, `test.py` of the MetaSAug code, and classifier-balancing's
`models/`; written anew. In eval mode; names are those of their files, after any "module.".
"""

import torch
import torch.nn.functional as F


def conv_norm(x, p, conv, norm, stride=1, padding=0, groups=1):
    x = F.conv2d(x, p[f"{conv}.weight"], None, stride, padding, 1, groups)
    return F.batch_norm(x, p[f"{norm}.running_mean"], p[f"{norm}.running_var"], p[f"{norm}.weight"], p[f"{norm}.bias"])


def cifar_resnet32(p, x):
    """MetaSAug's ResNet32: features (N, 64), logits (N, C)."""
    x = F.relu(conv_norm(x, p, "conv1", "bn1", 1, 1))
    for layer, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range(5):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = F.relu(conv_norm(x, p, f"{at}.conv1", f"{at}.bn1", stride, 1))
            out = conv_norm(out, p, f"{at}.conv2", f"{at}.bn2", 1, 1)
            if stride == 2:  # option A
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, channels // 4, channels // 4))
            x = F.relu(out + x)
    features = F.avg_pool2d(x, x.shape[3]).flatten(1)
    return features, F.linear(features, p["linear.weight"], p["linear.bias"])


def imagenet_features(p, x, depths, groups=1):
    """ResNet (bottleneck or basic blocks, by the names) as both repositories have it: features (N, A) of 224 x 224."""
    x = F.max_pool2d(F.relu(conv_norm(x, p, "conv1", "bn1", 2, 3)), 3, 2, 1)
    for layer, depth in enumerate(depths, 1):
        for block in range(depth):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            if f"{at}.conv3.weight" in p:
                out = F.relu(conv_norm(x, p, f"{at}.conv1", f"{at}.bn1"))
                out = F.relu(conv_norm(out, p, f"{at}.conv2", f"{at}.bn2", stride, 1, groups))
                out = conv_norm(out, p, f"{at}.conv3", f"{at}.bn3")
            else:
                out = F.relu(conv_norm(x, p, f"{at}.conv1", f"{at}.bn1", stride, 1))
                out = conv_norm(out, p, f"{at}.conv2", f"{at}.bn2", 1, 1)
            if f"{at}.downsample.0.weight" in p:
                x = conv_norm(x, p, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            x = F.relu(out + x)
    return F.avg_pool2d(x, 7, 1).flatten(1)


def dot_product(p, features):
    """classifier-balancing's and MetaSAug's linear classifier."""
    return F.linear(features, p["fc.weight"], p["fc.bias"])


def learnable_weight_scaling(p, features):
    """classifier-balancing's LWS."""
    return dot_product(p, features) * p["scales"]


def norm_linear(weight_AC, features, scale):
    """LDAM's and MetaSAug's normalised layer, whose weight is (A, C), times the scale in the loss."""
    return scale * F.normalize(features, dim=1).mm(F.normalize(weight_AC, dim=0))


def random_state(shapes, seed=0):
    """Weights that keep signals alive, batch norm's statistics included."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            value = value.abs() + 0.5
        elif len(shape) == 1 and name.endswith("weight"):
            value = 1 + 0.2 * value
        elif len(shape) > 1:
            value = value * (2 / value[0].numel()) ** 0.5
        else:
            value = 0.1 * value
        state[name] = value
    return state
