"""The models of the zoo: data only. Errors are fractions; ours are read from the bundled folders themselves."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent

PAPER = "MetaSAug paper; ResNet-32, original pictures, 200 epochs, best test epoch"
AUTHORS = "README of the MetaSAug authors; ResNet-50"
SECOND_HAND = "cited elsewhere; ResNet-50"


@dataclass(frozen=True)
class Entry:
    """One model. `weights`: bundled (in this package) or unpublished (no weights are out; `how_to_make` says how)."""

    name: str
    dataset: str
    imbalance: float | None  # where the benchmark comes in several; None: as it is
    method: str
    loss: str
    weights: Literal["bundled", "unpublished"] = "unpublished"
    manifest_sha256: str | None = None
    published_error: float | None = None
    published_source: str | None = None

    @property
    def folder(self) -> Path:
        """Of a bundled model."""
        return HERE / "weights" / self.name

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The config of a bundled model, checked; None where there are no weights."""
        if self.weights != "bundled":
            return None
        from zoo.model_folder import ModelFolder

        return ModelFolder(self.folder, self.manifest_sha256).config

    @property
    def summary(self) -> str:
        """What the weights were trained on and how long, in words."""
        if self.config is None:
            return "not published yet"
        ours = self.config["metasaug"]
        return f"trained on {ours['dataset']}, {ours['schedule']}"

    @property
    def measured_error(self) -> float | None:
        """Test error of the last epoch, on the data that `summary` names."""
        return None if self.config is None else self.config["metasaug"]["results"]["error"]

    @property
    def how_to_make(self) -> str:
        """What to do about an unpublished model, in a sentence."""
        flags = [] if self.imbalance is None else [f"--imbalance {self.imbalance:g}"]
        flags += [f"--loss {self.loss}"] if self.loss != "ce" else []
        flags += ["--augment none"] if self.method != "metasaug" else []
        return f"To train it yourself: {' '.join(['metasaug train', self.dataset, *flags, '--data DIR'])}"


def _published(percent: float, source: str = PAPER) -> dict[str, Any]:
    return {"published_error": percent / 100, "published_source": source}


ENTRIES: tuple[Entry, ...] = (
    Entry("metasaug-cifar10-lt", "cifar10-lt", 100, "metasaug", "ce", "bundled",
          "cd59033c25b6dbb9c923c4515230bb1206be99c075085db43b0886a1d2559f96", **_published(19.46)),
    Entry("ce-cifar10-lt", "cifar10-lt", 100, "ce", "ce", "bundled",
          "f3849196b64efda8118a05dc567b9370a0b1b8973060dd4d4aa193f96d6c0cc8"),
    Entry("metasaug-cifar10-lt-200", "cifar10-lt", 200, "metasaug", "ce", **_published(23.11)),
    Entry("metasaug-cifar10-lt-50", "cifar10-lt", 50, "metasaug", "ce", **_published(15.97)),
    Entry("metasaug-cifar10-lt-20", "cifar10-lt", 20, "metasaug", "ce", **_published(12.36)),
    Entry("metasaug-cifar10-lt-10", "cifar10-lt", 10, "metasaug", "ce", **_published(10.56)),
    Entry("metasaug-ldam-cifar10-lt-200", "cifar10-lt", 200, "metasaug", "ldam", **_published(22.65)),
    Entry("metasaug-ldam-cifar10-lt", "cifar10-lt", 100, "metasaug", "ldam", **_published(19.34)),
    Entry("metasaug-ldam-cifar10-lt-50", "cifar10-lt", 50, "metasaug", "ldam", **_published(15.66)),
    Entry("metasaug-ldam-cifar10-lt-20", "cifar10-lt", 20, "metasaug", "ldam", **_published(11.90)),
    Entry("metasaug-ldam-cifar10-lt-10", "cifar10-lt", 10, "metasaug", "ldam", **_published(10.32)),
    Entry("metasaug-cifar100-lt-200", "cifar100-lt", 200, "metasaug", "ce", **_published(60.06)),
    Entry("metasaug-cifar100-lt", "cifar100-lt", 100, "metasaug", "ce", **_published(53.13)),
    Entry("metasaug-cifar100-lt-50", "cifar100-lt", 50, "metasaug", "ce", **_published(48.10)),
    Entry("metasaug-cifar100-lt-20", "cifar100-lt", 20, "metasaug", "ce", **_published(42.15)),
    Entry("metasaug-cifar100-lt-10", "cifar100-lt", 10, "metasaug", "ce", **_published(38.27)),
    Entry("metasaug-ldam-cifar100-lt-200", "cifar100-lt", 200, "metasaug", "ldam", **_published(56.91)),
    Entry("metasaug-ldam-cifar100-lt", "cifar100-lt", 100, "metasaug", "ldam", **_published(51.99)),
    Entry("metasaug-ldam-cifar100-lt-50", "cifar100-lt", 50, "metasaug", "ldam", **_published(47.73)),
    Entry("metasaug-ldam-cifar100-lt-20", "cifar100-lt", 20, "metasaug", "ldam", **_published(42.47)),
    Entry("metasaug-ldam-cifar100-lt-10", "cifar100-lt", 10, "metasaug", "ldam", **_published(38.72)),
    Entry("metasaug-imagenet-lt", "imagenet-lt", None, "metasaug", "ce", **_published(52.33, AUTHORS)),
    Entry("metasaug-inat17", "inat17", None, "metasaug", "ce", **_published(36.72, SECOND_HAND)),
    Entry("metasaug-inat18", "inat18", None, "metasaug", "ce", **_published(30.50, AUTHORS)),
)


def list_models() -> list[Entry]:
    """Every model of the zoo, bundled ones first."""
    return list(ENTRIES)


def find(name: str) -> Entry | None:
    return next((entry for entry in ENTRIES if entry.name == name), None)
