"""Class names of the benchmarks, by official class index, for data that has numbers only."""

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).with_name("names")


@cache
def cifar10() -> tuple[str, ...]:
    """The 10 classes of CIFAR-10."""
    return ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@cache
def cifar100() -> tuple[str, ...]:
    """The 100 fine classes of CIFAR-100."""
    return tuple((_FOLDER / "cifar100.txt").read_text(encoding="utf-8").splitlines())


@cache
def inat18() -> tuple[str, ...]:
    """The 8,142 species of iNaturalist 2018; its first JSON files have only numbers."""
    return tuple((_FOLDER / "inat18.txt").read_text(encoding="utf-8").splitlines())


@cache
def imagenet() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet, in the order of their WordNet ids, named as in torchvision."""
    return tuple(name for _, _, name in _imagenet())


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """WordNet ids ("n01440764") by class index; ImageNet's class folders have these names."""
    return tuple(wnid for wnid, _, _ in _imagenet())


@cache
def imagenet_lt_counts() -> tuple[int, ...]:
    """Training pictures per class in ImageNet-LT (Liu et al. 2019): 115,846 in all, 1,280 to 5."""
    return tuple(int(count) for _, count, _ in _imagenet())


@cache
def _imagenet() -> tuple[tuple[str, str, str], ...]:
    lines = (_FOLDER / "imagenet.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    return tuple((wnid, count, name) for wnid, count, name in rows)
