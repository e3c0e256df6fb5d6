"""One frozen dataclass per benchmark; its fields are the flags of `metasaug train`.

Defaults are the paper's (MetaSAug, CVPR 2021) as its released code runs them; DESIGN notes that the paper
does not state are in docs/method.md.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from training.errors import TrainingError

Loss = Literal["ce", "focal", "ldam", "ldam-published", "balanced-softmax", "logit-adjustment"]
Augment = Literal["none", "isda", "metasaug"]


@dataclass(frozen=True)
class Recipe:
    """What decides the weights that come out, and nothing else: same recipe, same seed, same data, same weights."""

    dataset: ClassVar[str] = ""

    architecture: str = "resnet32"
    """Network, one of zoo.architectures: resnet32 (for CIFAR), resnet10, resnet18, resnet50, resnext50_32x4d …"""

    loss: Loss = "ce"
    """Loss; ldam: margins only, as the authors use it; ldam-published: the LDAM paper's own."""

    stage1_loss: Literal["auto", "ce", "same"] = "auto"
    """Loss of stage 1. ce: plain cross entropy, as the authors' code has with every loss; same: --loss; auto: ce
    with isda and metasaug, same otherwise. (ldam-published has its own in both.)"""

    augment: Augment = "metasaug"
    """Stage 2: none, isda (covariances as estimated) or metasaug (covariances learned on the meta set)."""

    class_weights: Literal["auto", "none", "balanced"] = "auto"
    """Weights of classes in stage 2. balanced: by effective number of pictures; auto: balanced with isda and
    metasaug, none otherwise. Balanced without augmentation is deferred re-weighting (DRW)."""

    beta: float = 0.9999
    """Effective number: a class of n pictures counts as (1 - beta^n) / (1 - beta)."""

    covariance: Literal["full", "diagonal"] = "full"
    """Form of the class covariances: (A, A) a class, or only the variances."""

    lookahead: Literal["classifier", "network"] = "classifier"
    """How far the meta step looks ahead: through the last layer only, or through the whole network (the
    paper's, about 3 times the time of a stage-2 step)."""

    fidelity: Literal["fixed", "reference"] = "fixed"
    """reference: with the quirks of the authors' code (a learned covariance lives for one step)."""

    strength: float = 0.75
    """Lambda of the augmentation at the last epoch; at epoch e it is lambda * e / epochs."""

    meta_rate: float = 0.1
    """Eta, the step size of the learned covariance."""

    meta_per_class: int = 10
    """Pictures a class for the meta set, taken out before the long tail is cut."""

    meta_in_training: Literal["never", "stage2", "always"] = "never"
    """Train on the meta pictures as well: the fair control for methods that need none. stage2: in stage 2 only,
    which is when MetaSAug sees them."""

    gamma: float = 1.0
    """Focal loss: the exponent."""

    max_margin: float = 0.5
    """LDAM: the margin of the rarest class."""

    scale: float = 30.0
    """LDAM as published: the scale s of the normalised logits."""

    tau: float = 1.0
    """Logit adjustment: weight of the log prior."""

    epochs: int = 200
    """Length of the run. The schedule scales with it: stage 2 and the first drop at 80 %, the second at 90 %."""

    batch_size: int = 100
    """Pictures a step."""

    lr: float = 0.1
    """Learning rate before the drops (SGD with Nesterov momentum)."""

    lr_drop: float = 0.01
    """Factor of each of the two drops."""

    momentum: float = 0.9
    """Momentum of SGD."""

    weight_decay: float = 5e-4
    """Weight decay of SGD."""

    seed: int = 0
    """Start weights, order and augmentation."""

    subset_seed: int = 0
    """Which pictures make the long tail and the meta set."""

    def __post_init__(self):
        for flag in ("epochs", "batch_size", "lr", "meta_per_class"):
            if not getattr(self, flag) > 0:
                raise TrainingError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: must be greater than 0.")
        if self.batch_size < 2:
            raise TrainingError("--batch-size 1: batch norm needs at least 2 pictures a step.")

    @property
    def stage2_epoch(self) -> int:
        """First epoch (from 0) of stage 2: re-weighting and augmentation on, learning rate dropped. 160 of 200.

        The last epoch is always in it: however short a run, it is of the method whose name it gets.
        """
        return min(math.ceil(0.8 * self.epochs), self.epochs - 1)

    def lr_at(self, epoch: int) -> float:
        drops = (epoch >= self.stage2_epoch) + (epoch >= math.ceil(0.9 * self.epochs))
        return self.lr * self.lr_drop**drops

    def strength_at(self, epoch: int) -> float:
        return self.strength * max(epoch, 1) / self.epochs  # a run of a single epoch has its strength too

    @property
    def weighted(self) -> bool:
        return self.class_weights == "balanced" or (self.class_weights == "auto" and self.augment != "none")

    @property
    def cosine_scale(self) -> float | None:
        """Scale of the cosine classifier that LDAM as published ends in; None for a linear last layer."""
        return self.scale if self.loss == "ldam-published" else None

    @property
    def implicit_prior(self) -> Literal["train", "uniform"]:
        """What the network's probabilities take for granted: classes as frequent as in training, or all alike."""
        return "uniform" if self.weighted or self.loss in ("balanced-softmax", "logit-adjustment") else "train"

    @property
    def method(self) -> str:
        """One word for tables: metasaug, isda, or the loss's own name."""
        return self.loss if self.augment == "none" else self.augment

    @property
    def first_loss(self) -> Loss:
        """The loss of stage 1."""
        if self.loss == "ldam-published":  # its cosine classifier is another network than the other losses'
            return self.loss
        plain = self.stage1_loss == "ce" or (self.stage1_loss == "auto" and self.augment != "none")
        return "ce" if plain else self.loss

    def stage1_key(self) -> str:
        """Two recipes with the same key have the same stage 1, bit for bit, and may share it."""
        only_stage2 = {"augment", "class_weights", "beta", "covariance", "lookahead", "fidelity", "strength",
                       "meta_rate", "loss"}
        unused = {"gamma", "max_margin", "scale", "tau"} - {
            {"focal": "gamma", "ldam": "max_margin", "logit-adjustment": "tau"}.get(self.first_loss, "")}
        if self.first_loss == "ldam-published":
            unused -= {"max_margin", "scale"}
        shared = {k: v for k, v in self.to_dict().items() if k not in only_stage2 | unused}
        shared |= {"stage1_loss": self.first_loss, "meta_in_training": self.meta_in_training == "always"}
        return json.dumps(shared, sort_keys=True)

    def to_dict(self) -> dict:
        return {"dataset": self.dataset, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Cifar10LT(Recipe):
    """CIFAR-10-LT: 10 classes, 4990 pictures in the largest, 4990 / IMBALANCE in the smallest.

    The paper reports 19.46 % error at imbalance 100 on the original pictures (200 epochs, ResNet-32).
    Cost: 124 steps an epoch at imbalance 100; about 18 s an epoch on 2 fast CPU cores.
    """

    dataset: ClassVar[str] = "cifar10-lt"

    imbalance: float = 100
    """Largest class / smallest class. The paper: 10, 20, 50, 100, 200; 1 is the balanced set."""

    subset: Literal["seeded", "authors"] = "seeded"
    """authors: the very pictures that the paper's code draws; seeded: drawn by --subset-seed, without copies."""


@dataclass(frozen=True)
class Cifar100LT(Cifar10LT):
    """CIFAR-100-LT: 100 classes, 490 pictures in the largest, 490 / IMBALANCE in the smallest.

    The paper reports 53.13 % error at imbalance 100 on the original pictures (200 epochs, ResNet-32).
    """

    dataset: ClassVar[str] = "cifar100-lt"
