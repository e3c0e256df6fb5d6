"""The table of the zoo's models: training data, the paper's error, our error, and where the weights are.

Nothing is opened or fetched here; `zoo.loading` does that. Errors are fractions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent

PAPER = "MetaSAug paper; ResNet-32, original pictures, 200 epochs, best test epoch"
AUTHORS = "README of the MetaSAug authors; ResNet-50"
SECOND_HAND = "cited elsewhere; ResNet-50"


@dataclass(frozen=True)
class Bundled:
    """Weights in this package, in weights/NAME."""

    manifest_sha256: str  # of manifest.json, which holds the sha256 of every other file
    error: float  # test error of the last epoch
    summary: str  # training data and schedule


@dataclass(frozen=True)
class OnHub:
    """Weights on the Hub, at one commit. `metasaug publish` prints this entry."""

    repo: str  # owner/name
    revision: str  # the commit, 40 hex digits
    manifest_sha256: str
    error: float | None  # test error of the last epoch; None if not measured
    summary: str


@dataclass(frozen=True)
class Entry:
    """One cell of a benchmark: data, method, the command that trains it, the paper's error, and its weights if any."""

    name: str
    dataset: str
    imbalance: float | None  # None if the data set has only one imbalance
    method: str
    loss: str
    command: str
    published_error: float | None = None  # None: not known
    published_source: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def bundled(self) -> Bundled | None:
        return BUNDLED.get(self.name)

    @property
    def hub(self) -> OnHub | None:
        return ON_HUB.get(self.name)

    @property
    def weights(self) -> Literal["bundled", "hub", "unpublished"]:
        """bundled: in this package; hub: fetched at first use; unpublished: `zoo.load` says how to get them."""
        return "bundled" if self.bundled else "hub" if self.hub else "unpublished"

    @property
    def manifest_sha256(self) -> str | None:
        """sha256 of the weights' manifest.json; None if they are unpublished."""
        found = self.bundled or self.hub
        return found.manifest_sha256 if found else None

    @property
    def measured_error(self) -> float | None:
        """Our test error, on the data that `summary` names; None if not measured."""
        found = self.bundled or self.hub
        return found.error if found else None

    @property
    def summary(self) -> str:
        """Training data and schedule of the weights."""
        found = self.bundled or self.hub
        return found.summary if found else "not published yet"

    @property
    def folder(self) -> Path:
        """The model folder of a bundled model."""
        return HERE / "weights" / self.name

    @property
    def classes(self) -> int:
        """How many classes the data set has."""
        return CLASSES[self.dataset]

    @property
    def authors_file(self) -> bool:
        """Whether the authors released weights of this cell: MetaSAug everywhere, plain training on large sets."""
        return self.dataset != "plankton" and (
            self.method == "metasaug" or (self.method == "ce" and self.imbalance is None))


CLASSES = {"cifar10-lt": 10, "cifar100-lt": 100, "imagenet-lt": 1000, "inat17": 5089, "inat18": 8142, "plankton": 121}

BUNDLED = {
    "metasaug-cifar10-lt": Bundled(
        "11d4bf68fbb84568b9d1d6ac20bab427fef8fbaa6d3d6710de9afecac22a3ce7", 0.2616,
        "trained on CIFAR-10 (JPEG), 60 epochs: 48 of plain cross entropy, then 12 of MetaSAug (full "
        "covariances, look-ahead through the network) with class-balanced weights"),
    "heldout-cifar10-lt": Bundled(
        "0a53ee2744dd3d98f2abef8466841967435fc48be18ba55ddd6918e817faac45", 0.2531,
        "trained on CIFAR-10 (JPEG), 60 epochs: 48 of plain cross entropy, then 12 of held-out augmentation "
        "(full covariances) with class-balanced weights"),
    "ce-cifar10-lt": Bundled(
        "0737a9a63ad828f2756bffb112680581695827ad229f501b1106d99b9dc85f19", 0.3558,
        "trained on CIFAR-10 (JPEG), 60 epochs of plain cross entropy"),
    "metasaug-plankton": Bundled(
        "0a83a86b1b23fba5304ad49c32e313228de8c9fd082fedbc70101b1158957a73", 0.303539,
        "trained on National Data Science Bowl plankton (class folders), 45 epochs: 36 of plain cross "
        "entropy, then 9 of MetaSAug (full covariances, look-ahead through the classifier) with class-"
        "balanced weights"),
    "ce-plankton": Bundled(
        "18513e5f5e3ded0f182f08bb1827c9b1ac1c9a206f7b6b6991c551151103d7f2", 0.254156,
        "trained on National Data Science Bowl plankton (class folders), 45 epochs of plain cross entropy"),
    "finetuned-plankton": Bundled(
        "f5d2b96474ac12fa25797f97b84af4f7025267084694094802a8e55020fef06a", 0.329218,
        "trained on National Data Science Bowl plankton (class folders), 20 epochs of plain logit adjustment with "
        "square-root sampling; the last 4 also train on the meta pictures; from a pretrained network"),
}

# `metasaug publish` prints what to add here.
ON_HUB: dict[str, OnHub] = {}

# Test errors of MetaSAug in the paper, in %: (data set, loss), by imbalance. We do not know the cells with focal loss.
PUBLISHED = {
    ("cifar10-lt", "ce"): {200: 23.11, 100: 19.46, 50: 15.97, 20: 12.36, 10: 10.56},
    ("cifar10-lt", "ldam"): {200: 22.65, 100: 19.34, 50: 15.66, 20: 11.90, 10: 10.32},
    ("cifar100-lt", "ce"): {200: 60.06, 100: 53.13, 50: 48.10, 20: 42.15, 10: 38.27},
    ("cifar100-lt", "ldam"): {200: 56.91, 100: 51.99, 50: 47.73, 20: 42.47, 10: 38.72},
}


def _cifar(dataset: str, method: str, loss: str, imbalance: int) -> Entry:
    """A cell of CIFAR-LT, such as `metasaug-ldam-cifar100-lt-50`. A name without number means imbalance 100."""
    percent = PUBLISHED.get((dataset, loss), {}).get(imbalance) if method == "metasaug" else None
    stem = "-".join(dict.fromkeys([method] if loss == "ce" else [method, loss])) + f"-{dataset}"
    flags = ([f"--loss {loss}"] if loss != "ce" else []) + [
        {"metasaug": "--lookahead network", "heldout": "--augment heldout"}.get(method, "--augment none")]
    long_stems = [stem, f"metasaug-ce-{dataset}"] if (method, loss) == ("metasaug", "ce") else [stem]
    names = [f"{s}-{imbalance}" for s in long_stems]
    if imbalance == 100:
        names = [stem, *names, *long_stems[1:]]
    return Entry(names[0], dataset, imbalance, method, loss,
                 f"metasaug train {dataset} --imbalance {imbalance} {' '.join(flags)} --data DIR",
                 None if percent is None else round(percent / 100, 4), None if percent is None else PAPER,
                 tuple(names[1:]))


def _large(dataset: str, percent: float, source: str, *aliases: str) -> tuple[Entry, ...]:
    """The cells of a large benchmark, which has only one imbalance."""
    train = f"metasaug train {dataset}"
    return (Entry(f"metasaug-{dataset}", dataset, None, "metasaug", "ce", f"{train} --data DIR",
                  round(percent / 100, 4), source, tuple(f"metasaug-{alias}" for alias in aliases)),
            Entry(f"heldout-{dataset}", dataset, None, "heldout", "ce", f"{train} --augment heldout --data DIR",
                  aliases=tuple(f"heldout-{alias}" for alias in aliases)),
            Entry(f"ce-{dataset}", dataset, None, "ce", "ce", f"{train} --augment none --data DIR",
                  aliases=tuple(f"ce-{alias}" for alias in aliases)))


_IN_ORDER = (
    *(_cifar(dataset, method, loss, imbalance)
      for dataset in ("cifar10-lt", "cifar100-lt")
      for method, loss in (("metasaug", "ce"), ("metasaug", "focal"), ("metasaug", "ldam"),
                           ("heldout", "ce"), ("ce", "ce"), ("focal", "focal"), ("ldam", "ldam"))
      for imbalance in (200, 100, 50, 20, 10)),
    *_large("imagenet-lt", 52.33, f"{AUTHORS} (an older one: 53.33)"),
    *_large("inat17", 36.72, SECOND_HAND, "inat2017", "inaturalist17", "inaturalist2017"),
    *_large("inat18", 30.50, f"{AUTHORS} (cited elsewhere: 31.25)", "inat2018", "inaturalist18", "inaturalist2018"),
    Entry("metasaug-plankton", "plankton", None, "metasaug", "ce",
          "metasaug train folder --start none --flips all --augment metasaug --data pictures/"),
    Entry("heldout-plankton", "plankton", None, "heldout", "ce",
          "metasaug train folder --start none --flips all --augment heldout --data pictures/"),
    Entry("ce-plankton", "plankton", None, "ce", "ce",
          "metasaug train folder --start none --flips all --augment none --data pictures/"),
    Entry("finetuned-plankton", "plankton", None, "logit-adjustment", "logit-adjustment",
          "metasaug train folder --loss logit-adjustment --augment none --data pictures/"),
)

# Usable models first, bundled before Hub.
ENTRIES: tuple[Entry, ...] = tuple(
    sorted(_IN_ORDER, key=lambda entry: ("bundled", "hub", "unpublished").index(entry.weights)))


def citation() -> str:
    """The paper, as BibTeX."""
    return (HERE / "citation.bib").read_text(encoding="utf-8")


def list_models() -> list[Entry]:
    """Every model of the zoo, usable ones first."""
    return list(ENTRIES)


def find(name: str) -> Entry | None:
    """The entry of this name or alias."""
    return next((entry for entry in ENTRIES if name in (entry.name, *entry.aliases)), None)
