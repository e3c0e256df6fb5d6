"""One frozen dataclass per benchmark; its fields are the flags of `metasaug train`.

Defaults are the paper's (MetaSAug, CVPR 2021) as its released code runs them; what the paper does not state is in
docs/method.md. What each expects is stated for the paper's hardware, what we ran ourselves in the README.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import ClassVar, Literal, Self

import numpy as np

from training.errors import TrainingError
from zoo.pixels import Reading

Loss = Literal["ce", "focal", "ldam", "ldam-published", "balanced-softmax", "logit-adjustment"]
Augment = Literal["none", "isda", "metasaug", "heldout"]
Crops = Literal["shift", "resized"]
Flips = Literal["none", "mirror", "all"]
CropMode = Literal["center", "squash", "border"]
Schedule = Literal["steps", "cosine", "one-cycle"]

WARM_UP = 0.1  # share of a one-cycle run in which the learning rate rises

# What a flag may be, both ends included.
RANGES = {"beta": (0, 1 - 1e-9), "strength": (0, 1e6), "meta_rate": (0, 1e6), "lr_drop": (0, 1),
          "momentum": (0, 1 - 1e-9), "weight_decay": (0, 1e6), "crop_pct": (0.01, 1), "crop_area": (0.01, 1),
          "color_jitter": (0, 1), "seed": (0, 2**63 - 1), "subset_seed": (0, 2**32 - 1), "gamma": (0, 1e6),
          "max_margin": (0, 1e6), "scale": (1e-6, 1e6), "tau": (0, 1e6)}


def without_place(source: str) -> str:
    """Of a path its last name, which says nothing of whose folder it lay in; a name of a library or the Hub whole."""
    return source if source.startswith(("torchvision:", "timm:", "hf:")) else PurePath(source).name


@dataclass(frozen=True)
class Recipe:
    """What decides the weights that come out, and nothing else: same recipe, same seed, same data, same weights."""

    dataset: ClassVar[str] = ""
    CHOSEN: ClassVar[tuple[str, ...]] = ()
    """Flags that may be left open, as 0, auto or nothing, to be chosen from the pictures (training.run.defaults)."""

    architecture: str = "resnet32"
    """Network: resnet32 (for CIFAR), resnet10, resnet18, resnet34, resnet50, resnext50_32x4d … (NAME-small: for
    pictures of up to 96 pixels), torchvision:NAME, timm:NAME."""

    pretrained: str | None = None
    """Start weights: torchvision:NAME, timm:NAME, a model of the zoo, a model folder, a .safetensors or .pth file.
    Tensors of another shape, as the last layer of other classes, start fresh."""

    backbone: str | None = None
    """A ready network of which only the last layer is trained: torchvision:NAME and timm:NAME with their own weights, a
    model of the zoo, a model folder, or a file (torchvision's, timm's, a stage 1 of classifier-balancing). It brings
    --architecture and how pictures are shown, and a last layer where its classes are these."""

    last_layer: Literal["auto", "fresh", "ready"] = "auto"
    """With --backbone. ready: go on with its own last layer, in stage 2 alone; fresh: stage 1 trains a new one; auto:
    ready where its classes are these."""

    cache_features: int = 0
    """Compute the features of so many views of each picture once, where only the last layer is trained: every epoch is
    then matrix products. 0: off, a new view an epoch. Disk: views x pictures x features x 2 bytes."""

    loss: Loss = "ce"
    """Loss; ldam: margins only, as the authors use it; ldam-published: the LDAM paper's own."""

    stage1_loss: Literal["auto", "ce", "same"] = "auto"
    """Loss of stage 1. ce: plain cross entropy, as the authors' code has with every loss; same: --loss; auto: ce
    with an augmentation, same otherwise. (ldam-published has its own in both.)"""

    augment: Augment = "metasaug"
    """Stage 2: none, isda (covariances as estimated), metasaug (covariances learned on the meta set) or heldout
    (covariances measured on the meta set, about the training means)."""

    class_weights: Literal["auto", "none", "balanced"] = "auto"
    """Weights of classes in stage 2. balanced: by effective number of pictures; auto: balanced with an
    augmentation, none otherwise. Balanced without augmentation is deferred re-weighting (DRW)."""

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
    which is when MetaSAug sees them. With heldout all but a fifth of them, which it then measures on."""

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

    schedule: Schedule = "steps"
    """steps: a drop at the start of stage 2 and one in its middle; cosine: stage 1 falls to 0 along half a cosine,
    stage 2 is at one rate; one-cycle: at each step, up for the first tenth of the run, then along half a cosine to 0
    at its end, whatever the stage."""

    stage2_epochs: int | None = None
    """Epochs of stage 2, the last ones of the run; without it the last fifth."""

    stage2_lr: float | None = None
    """Learning rate of stage 2; without it --lr times --lr-drop."""

    stage2_batch_size: int | None = None
    """Pictures a step in stage 2, and in the meta set's batches; without it --batch-size."""

    stage2_trains: Literal["network", "classifier"] = "network"
    """classifier: stage 2 leaves all but the last layer as stage 1 made it (the paper's setting for large sets)."""

    momentum: float = 0.9
    """Momentum of SGD."""

    weight_decay: float = 5e-4
    """Weight decay of SGD."""

    input_size: int | None = None
    """Height and width of the network's input; without it the pictures' own (CIFAR)."""

    mean: tuple[float, float, float] | None = None
    """Of each channel, in [0, 1], taken off the pictures; without it the --backbone's, or else the data's."""

    std: tuple[float, float, float] | None = None
    """Of each channel, which the pictures are divided by; without it the --backbone's, or else the data's."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How pictures are resized."""

    crop_mode: CropMode = "center"
    """How a picture comes to that size. center: shorter side resized, centre crop; squash: both sides resized,
    whatever the shape; border: the longer side resized, the rest filled. The model folder keeps it."""

    crop_pct: float = 1.0
    """center: the crop's share of the shorter side; 0.875 is 224 of 256."""

    crops: Crops = "shift"
    """Training pictures. shift: moved by up to an eighth at random (the CIFAR papers'); resized: a random part,
    resized (ImageNet's)."""

    crop_area: float = 0.08
    """Smallest share of a picture that --crops resized takes. 0.08 is ImageNet's; more for short runs."""

    flips: Flips = "mirror"
    """Training pictures at random mirrored; all: upside down and turned by a quarter too, for things that have no
    up; none: left as they are."""

    color_jitter: float = 0.0
    """Training pictures' brightness, contrast and saturation times 1 plus or minus this (--crops resized)."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the backbone in training, by torch's autocast; the last layer, and all of it in tests, in float32."""

    accumulate: int = 1
    """Parts in which a step's pictures follow each other where they do not fit into memory at once: a forward pass
    more, and batch norm sees a part."""

    compile: bool = False
    """torch.compile the backbone: minutes at the start, faster steps on a GPU."""

    seed: int = 0
    """Start weights, order and augmentation."""

    subset_seed: int = 0
    """Which pictures make the long tail and the meta set."""

    def __post_init__(self):
        for flag, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise TrainingError(f"--{flag.replace('_', '-')} {number}: must be a finite number.")
        for flag in ("epochs", "batch_size", "lr", "meta_per_class", "input_size", "accumulate", "stage2_epochs",
                     "stage2_lr", "stage2_batch_size"):
            value = getattr(self, flag)
            if value is not None and not value > 0 and not (value == 0 and flag in self.CHOSEN):
                raise TrainingError(f"--{flag.replace('_', '-')} {value}: must be greater than 0.")
        if self.batch_size == 1 or self.stage2_batch_size == 1:
            raise TrainingError("--batch-size 1: batch norm needs at least 2 pictures a step.")
        for flag, (low, high) in RANGES.items():
            value = getattr(self, flag)
            if not low <= value <= high and not (value == 0 and flag in self.CHOSEN):
                raise TrainingError(f"--{flag.replace('_', '-')} {value}: must be from {low:g} to {high:g}.")
        if self.input_size is not None and not self.input_size <= 4096:
            raise TrainingError(f"--input-size {self.input_size}: at most 4096.")
        if self.stage2_epochs is not None and self.epochs and self.stage2_epochs > self.epochs:
            raise TrainingError(f"--stage2-epochs {self.stage2_epochs}: they are among the {self.epochs} of --epochs, "
                                "so at most as many.")
        if self.backbone is not None and self.pretrained is not None:
            raise TrainingError("--backbone is a ready network that is not trained, --pretrained one to train on: name "
                                "one of them.")
        if self.last_layer == "ready" and self.backbone is None:
            raise TrainingError("--last-layer ready goes with --backbone.")
        if self.cache_features < 0:
            raise TrainingError(f"--cache-features {self.cache_features}: a number of views, or 0 for none.")
        if self.cache_features and not self.stands_still(in_stage2=True):
            raise TrainingError("--cache-features: features are computed once where the backbone stands still, which "
                                "it does with --stage2-trains classifier or with a ready --backbone.")
        for flag in ("mean", "std"):
            if (values := getattr(self, flag)) is not None and not all(0 <= value <= 1 for value in values):
                raise TrainingError(f"--{flag} {' '.join(map(str, values))}: of pictures in [0, 1]: each from 0 to 1.")
        if self.std is not None and min(self.std) < 1e-3:
            raise TrainingError("--std: each at least 0.001.")
        if self.color_jitter and self.crops == "shift":
            raise TrainingError("--color-jitter goes with --crops resized.")

    def stands_still(self, in_stage2: bool) -> bool:
        """Whether only the last layer is trained: all else is in eval mode, and its features may be cached."""
        return self.backbone is not None or (in_stage2 and self.stage2_trains == "classifier")

    @property
    def looks_at_meta(self) -> bool:
        """Whether each step of stage 2 passes a batch of the meta set through the network."""
        return self.augment in ("metasaug", "heldout")

    @property
    def stage2_epoch(self) -> int:
        """First epoch (from 0) of stage 2: re-weighting and augmentation on, learning rate dropped. 160 of 200.

        The last epoch is always in it: however short a run, it is of the method whose name it gets.
        """
        if self.stage2_epochs is not None:
            return self.epochs - self.stage2_epochs
        return min(math.ceil(0.8 * self.epochs), self.epochs - 1)

    def lr_at(self, epoch: float) -> float:
        """epoch   from 0; with a part of an epoch where the schedule goes by steps"""
        if self.schedule == "one-cycle":
            done = epoch / max(self.epochs, 1)
            return self.lr * min(1.0, done / WARM_UP + 0.01) * (1 + math.cos(math.pi * done)) / 2
        second = self.lr * self.lr_drop if self.stage2_lr is None else self.stage2_lr
        if self.schedule == "cosine":
            falling = self.lr * (1 + math.cos(math.pi * epoch / max(self.stage2_epoch, 1))) / 2
            return second if epoch >= self.stage2_epoch else falling
        if epoch < self.stage2_epoch:
            return self.lr
        last = math.ceil((self.stage2_epoch + self.epochs) / 2)  # 90 % where stage 2 is the last fifth
        return second * self.lr_drop if epoch >= last else second

    def strength_at(self, epoch: float) -> float:
        return self.strength * max(epoch, 1) / self.epochs  # a run of a single epoch has its strength too

    @property
    def weighted(self) -> bool:
        return self.class_weights == "balanced" or (self.class_weights == "auto" and self.augment != "none")

    @property
    def cosine_scale(self) -> float | None:
        """Scale of the cosine classifier that LDAM as published ends in; None for a linear last layer."""
        return self.scale if self.loss == "ldam-published" else None

    @property
    def balances(self) -> bool:
        """Whether the loss counts rare classes for more than their share of the pictures."""
        return self.weighted or self.loss in ("balanced-softmax", "logit-adjustment")

    def implicit_prior(self, class_counts: Sequence[int]) -> list[float]:
        """The class frequencies that the network's probabilities assume; they sum to 1.

        A softmax learns p(x|y) n_y w_y, with n_y pictures that weigh w_y each. Logit adjustment adds tau log n_y to
        the logits in training, which leaves n_y^(1 - tau) of it; balanced softmax is its tau = 1. What margins and
        the focal loss do is not a prior, and is not in it.
        """
        n_C = np.asarray(class_counts, np.float64)
        tau = {"balanced-softmax": 1.0, "logit-adjustment": self.tau}.get(self.loss, 0.0)
        log_C = (1 - tau) * np.log(n_C)
        if self.weighted:
            log_C -= np.log(1 - self.beta**n_C)
        log_C -= np.logaddexp.reduce(log_C)
        return [float(f"{p:.6g}") for p in np.exp(np.maximum(log_C, -600))]

    @property
    def method(self) -> str:
        """One word for tables: metasaug, isda, heldout, or the loss's own name."""
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
                       "meta_rate", "loss", "stage2_lr", "stage2_batch_size", "stage2_trains",
                       "lr_drop"}
        unused = {"gamma", "max_margin", "scale", "tau"} - {
            {"focal": "gamma", "ldam": "max_margin", "logit-adjustment": "tau"}.get(self.first_loss, "")}
        if self.first_loss == "ldam-published":
            unused -= {"max_margin", "scale"}
        shared = {k: v for k, v in self.to_dict().items() if k not in only_stage2 | unused}
        shared |= {"stage1_loss": self.first_loss, "meta_in_training": ("most" if self.augment == "heldout" else True)
                   if self.meta_in_training == "always" else False,
                   "cache_features": self.cache_features if self.stands_still(in_stage2=False) else 0}
        return json.dumps(shared, sort_keys=True)

    @classmethod
    def completed(cls, saved: dict) -> dict:
        """What an earlier version saved by `to_dict`: a flag that it did not know counts as its default."""
        return cls().to_dict() | saved

    @classmethod
    def completed_key(cls, saved: str) -> dict:
        """The same for a `stage1_key`."""
        return json.loads(cls().stage1_key()) | json.loads(saved)

    def to_dict(self) -> dict:
        """Everything, where weights come from by its last name only: nobody's folders go into a model folder."""
        flags = dataclasses.asdict(self)
        for flag in ("pretrained", "backbone"):
            if flags[flag] is not None:
                flags[flag] = without_place(flags[flag])
        return {"dataset": self.dataset, **flags}


@dataclass(frozen=True)
class Cifar10LT(Recipe):
    """CIFAR-10-LT: 10 classes, 4990 pictures in the largest, 4990 / IMBALANCE in the smallest.

    Expected: % error at imbalance 200, 100, 50, 20, 10, on the original pictures (the paper, ResNet-32, 200 epochs,
    best test epoch): --loss ce 23.11, 19.46, 15.97, 12.36, 10.56; --loss ldam 22.65, 19.34, 15.66, 11.90, 10.32.
    Cost: 124 steps an epoch at imbalance 100; about 18 s an epoch on 2 fast CPU cores, an hour for 200 epochs; minutes
    on a GPU.
    """

    dataset: ClassVar[str] = "cifar10-lt"

    imbalance: float = 100
    """Largest class / smallest class. The paper: 10, 20, 50, 100, 200; 1 is the balanced set."""

    subset: Literal["seeded", "authors"] = "seeded"
    """authors: the very pictures that the paper's code draws; seeded: drawn by --subset-seed, without copies."""


@dataclass(frozen=True)
class Cifar100LT(Cifar10LT):
    """CIFAR-100-LT: 100 classes, 490 pictures in the largest, 490 / IMBALANCE in the smallest.

    Expected: % error at imbalance 200, 100, 50, 20, 10, on the original pictures (the paper, ResNet-32, 200 epochs,
    best test epoch): --loss ce 60.06, 53.13, 48.10, 42.15, 38.27; --loss ldam 56.91, 51.99, 47.73, 42.47, 38.72.
    Cost: 107 steps an epoch at imbalance 100; about 16 s an epoch on 2 fast CPU cores, an hour for 200 epochs; minutes
    on a GPU.
    """

    dataset: ClassVar[str] = "cifar100-lt"


@dataclass(frozen=True)
class LargeSet(Recipe):
    """How the paper trains on large sets: plain first, then only the last layer, on features that stand still.

    Stage 1 is the plain training of classifier-balancing (Kang et al. 2020); stage 2 that of MetaSAug's code.
    """

    architecture: str = "resnet50"
    """Network: resnet50 in the paper; resnext50_32x4d, resnet10 …, torchvision:NAME, timm:NAME."""

    epochs: int = 110
    """Length of the run, both stages."""

    batch_size: int = 512
    """Pictures a step in stage 1."""

    lr: float = 0.2
    """Learning rate at the start of stage 1 (SGD with Nesterov momentum)."""

    schedule: Literal["steps", "cosine"] = "cosine"
    """cosine: stage 1 falls to 0 along half a cosine, stage 2 is at one rate; steps: a drop at the start of stage 2 and
    one in its middle."""

    stage2_epochs: int | None = 20
    """Epochs of stage 2, the last ones of the run."""

    stage2_lr: float | None = 3e-4
    """Learning rate of stage 2."""

    stage2_batch_size: int | None = 256
    """Pictures a step in stage 2, and in the meta set's batches."""

    stage2_trains: Literal["network", "classifier"] = "classifier"
    """classifier: stage 2 leaves all but the last layer as stage 1 made it; network: trains all of it."""

    covariance: Literal["full", "diagonal"] = "diagonal"
    """Form of the class covariances: (A, A) a class, or only the variances. Full ones of 8142 classes would take
    137 GB."""

    strength: float = 0.25
    """Lambda of the augmentation at the last epoch."""

    input_size: int | None = 224
    """Height and width of the network's input."""

    crop_pct: float = 0.875
    """Test pictures: the crop's share of the shorter side; 0.875 is 224 of 256."""

    crops: Crops = "resized"
    """Training pictures. resized: a random part of 8 to 100 %, resized; shift: moved by up to an eighth."""

    subset: Literal["seeded", "authors"] = "seeded"
    """The meta set. authors: the very pictures that the paper's code draws; seeded: drawn by --subset-seed."""

    skip_bad: bool = False
    """Leave out pictures that are missing or cannot be read (all named), instead of stopping."""


@dataclass(frozen=True)
class ImageNetLT(LargeSet):
    """ImageNet-LT: 1,000 classes, 115,846 training pictures, 1,280 to 5 a class; tested on ImageNet's 50,000.

    Expected: 52.33 % error (README of the authors, ResNet-50; an older one says 53.33). Meta set: 10 a class of its
    val list.
    Cost: not run by us. Reckoned, not measured: 90 epochs of 115,846 pictures at 800 a second (ResNet-50 at 224 in
    TF32 on an A100) are 4 hours, and the 20 of the last layer another quarter of an hour.
    """

    dataset: ClassVar[str] = "imagenet-lt"

    color_jitter: float = 0.4
    """Training pictures' brightness, contrast and saturation times 1 plus or minus this (--crops resized)."""


@dataclass(frozen=True)
class INat17(LargeSet):
    """iNaturalist 2017: 5,089 classes, 579,184 training pictures, 3,919 to 9 a class; tested on its val set.

    Expected: 36.72 % error (second hand, ResNet-50; the authors' commands were never published). Meta set: 5 a class
    of the training pictures, which stay in training.
    Cost: not run by us. Reckoned, not measured: 200 epochs of 579,184 pictures at 800 a second (ResNet-50 at 224 in
    TF32 on an A100) are 40 hours.
    """

    dataset: ClassVar[str] = "inat17"

    epochs: int = 220
    """Length of the run, both stages."""

    meta_per_class: int = 5
    """Pictures a class for the meta set; they are training pictures and stay in training."""


@dataclass(frozen=True)
class INat18(INat17):
    """iNaturalist 2018: 8,142 classes, 437,513 training pictures, 1,000 to 2 a class; tested on its val set.

    Expected: 30.50 % error (README of the authors, ResNet-50; cited elsewhere as 31.25). Meta set: 2 a class of the
    training pictures, which stay in training.
    Cost: not run by us. Reckoned, not measured: 200 epochs of 437,513 pictures at 800 a second (ResNet-50 at 224 in
    TF32 on an A100) are 30 hours.
    """

    dataset: ClassVar[str] = "inat18"

    meta_per_class: int = 2
    """Pictures a class for the meta set; they are training pictures and stay in training."""


@dataclass(frozen=True)
class OwnPictures(Recipe):
    """Your own pictures. Whatever is 0 or auto is chosen from the pictures and the machine (training.run.defaults)."""

    CHOSEN: ClassVar[tuple[str, ...]] = (
        "start", "architecture", "loss", "augment", "meta_in_training", "epochs", "batch_size", "lr", "schedule",
        "input_size", "mean", "std", "interpolation", "crop_mode", "crops", "crop_area", "flips", "covariance")

    start: str = "auto"
    """Pretrained network to start from: small, medium, large (`training.network.starts`), timm:NAME, torchvision:NAME,
    a file of weights; none: train from nothing; auto: the best one that this machine has or can fetch in time."""

    minutes: float = 0
    """With a start: minutes that the whole run may take. It sets --epochs and --input-size, once, by steps that are
    timed at the beginning; 0: at most 50, less where there are few pictures."""

    architecture: str = "auto"
    """Network: resnet32, resnet18, resnet18-small …, torchvision:NAME, timm:NAME; auto: the start's; from nothing,
    resnet32 up to 64 pixels, resnet18 above, resnet50 on a GPU with many pictures."""

    loss: Loss | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Loss; auto: logit-adjustment with a start, cross entropy otherwise."""

    augment: Augment | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Stage 2: none, isda, metasaug (the paper's) or heldout; auto: none with a start, isda otherwise."""

    meta_in_training: Literal["never", "stage2", "always", "auto"] = "auto"  # type: ignore[assignment]
    """Train on the meta pictures as well; auto: in stage 2, unless --augment or --backbone needs them apart."""

    epochs: int = 0
    """Length of the run, stage 2 being the last fifth; 0: as many as --minutes allow or the number of pictures asks
    for."""

    batch_size: int = 0
    """Pictures a step; 0: 32 with a start, else 100, fewer where there are few pictures."""

    lr: float = 0
    """Learning rate; 0: 0.02 with a start, 0.01 with --pretrained, 0.1 from nothing."""

    schedule: Schedule | Literal["auto"] = "auto"  # type: ignore[assignment]
    """steps: a drop at the start of stage 2 and one in its middle; cosine: stage 1 falls to 0, stage 2 is at one rate;
    one-cycle: at each step, up for a tenth of the run, then down to 0; auto: one-cycle with a start, else steps."""

    input_size: int | None = None
    """Height and width of the network's input; without it from the pictures' sizes and what the machine can do."""

    interpolation: Literal["bilinear", "bicubic", "auto"] = "auto"  # type: ignore[assignment]
    """How pictures are resized; auto: as the start was trained, else bilinear."""

    crop_mode: CropMode | Literal["auto"] = "auto"  # type: ignore[assignment]
    """How a picture comes to that size. center: shorter side resized, centre crop; squash: both sides resized,
    whatever the shape; border: the longer side resized, the rest filled; auto: squash where shapes differ much."""

    crops: Crops | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Training pictures. shift: moved by up to an eighth at random; resized: a random part, resized; auto: resized
    with a start or above 96 pixels."""

    crop_area: float = 0
    """Smallest share of a picture that --crops resized takes; 0: 0.35 with a start, else 0.08."""

    flips: Flips | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Training pictures at random mirrored; all: upside down and turned by a quarter too; none: left as they are; auto:
    with a start, what the first answer is not confused by, else mirror."""

    covariance: Literal["full", "diagonal", "auto"] = "auto"  # type: ignore[assignment]
    """Form of the class covariances: (A, A) a class, or only the variances; auto: full where they take under 64 MB."""

    lr_drop: float = 0.1
    """Factor of each of the two drops."""

    test_share: float = 0.2
    """Share of each class to test on, cut by file name, where no test set is given."""

    skip_bad: bool = False
    """Leave out pictures that cannot be read and classes without any (all named), instead of stopping."""

    page: int | Literal["max", "mean"] | None = None
    """Page of a TIFF that has several, from 1; or max or mean over all of them, pixel by pixel (a focus series).
    Without it the first."""

    white: int | None = None
    """The value that is white in 16-bit and 32-bit grey: 4095 for a camera of 12 bits. Without it what the file says,
    else the range found over all pictures. The model keeps it."""

    most_missing: float = 0
    """Largest share of a JPEG that may be missing at its end: 0.25 trains on what is there of damaged ones."""

    max_megapixels: float = 100
    """Largest picture that is read, in megapixels, JPEGs four times as large; 178 at most. More needs more memory."""

    def __post_init__(self):
        super().__post_init__()
        _ = self.reading  # which refuses what makes no sense
        if self.minutes < 0:
            raise TrainingError(f"--minutes {self.minutes:g}: how long the run may take, more than 0.")
        if self.start not in ("auto", "none") and (self.backbone or self.pretrained):
            raise TrainingError("--start is a network to train on from, as --pretrained, and --backbone one that is "
                                "not trained: name one of the three.")

    @property
    def reading(self) -> Reading:
        """What picture files leave open, as these flags say it."""
        return Reading(self.page, self.white, self.most_missing, self.max_megapixels)

    @property
    def starts_pretrained(self) -> bool:
        """Whether a first answer on the start's frozen features comes before training."""
        return self.start not in ("auto", "none")

    def to_dict(self) -> dict:
        return {**super().to_dict(), "start": without_place(self.start)}

    @classmethod
    def completed(cls, saved: dict) -> dict:
        """As for every recipe; before there were starts, everything was trained from nothing."""
        return cls(start="none", crop_area=0.08, interpolation="bilinear").to_dict() | saved

    def with_choices(self, saved: dict) -> Self:
        """What is open here, as an earlier run chose it."""
        saved = self.completed(saved)
        left_open = [flag for flag in self.CHOSEN if getattr(self, flag) in ("auto", 0, None)]
        return dataclasses.replace(self, **{flag: saved[flag] for flag in left_open if flag in saved})


@dataclass(frozen=True)
class Folder(OwnPictures):
    """Your own pictures in class folders: DATA/CLASS/picture.jpg, or DATA/train/CLASS with test/ and val/ beside it.

    No other flag is needed. The run starts from a pretrained network: a first model and report after minutes, then
    fine-tuning for as long as --minutes allow, then the better of the two by pictures that neither was trained on.
    Whatever is 0 or auto is chosen from the pictures and the machine, printed with its reason, and stored with the
    model. A test set (a fifth of each class) and a meta set are cut by file name where none is given.
    Cost: under an hour on a CPU, as printed before it starts; less on a GPU. Ctrl-C leaves the best model so far.
    """

    dataset: ClassVar[str] = "folder"


@dataclass(frozen=True)
class Table(OwnPictures):
    """Your own pictures in a CSV table: path and label and, where you have them, split and group.

    Pictures of one group (an animal, a track, a camera) are never parted. What the table does not split is cut by file
    name. All else is as for `metasaug train folder`.
    Cost: under an hour on a CPU, as printed before it starts; less on a GPU. Ctrl-C leaves the best model so far.
    """

    dataset: ClassVar[str] = "table"
