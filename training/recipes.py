"""Every flag of a training, with its default: one frozen dataclass per data set.

A field's docstring is the flag's help text (training/help.py groups them). Defaults are those of the authors' released
code; docs/method.md lists what the paper leaves open.
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

SHOWN_WHOLE = 20  # square-root sampling: classes with up to this many pictures are shown whole in every epoch
WARM_UP = 0.1  # share of a one-cycle run in which the learning rate rises

# Allowed range of each flag, both ends included.
RANGES = {"beta": (0, 1 - 1e-9), "strength": (0, 1e6), "meta_rate": (0, 1e6), "lr_drop": (0, 1),
          "momentum": (0, 1 - 1e-9), "weight_decay": (0, 1e6), "crop_pct": (0.01, 1), "crop_area": (0.01, 1),
          "color_jitter": (0, 1), "seed": (0, 2**63 - 1), "subset_seed": (0, 2**32 - 1), "gamma": (0, 1e6),
          "max_margin": (0, 1e6), "scale": (1e-6, 1e6), "tau": (0, 1e6)}


def without_place(source: str) -> str:
    """A path's last part, without the user's folders; names of torchvision, timm and the Hub stay whole."""
    return source if source.startswith(("torchvision:", "timm:", "hf:")) else PurePath(source).name


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, and nothing else: same recipe, seed and data give same weights."""

    dataset: ClassVar[str] = ""
    CHOSEN: ClassVar[tuple[str, ...]] = ()
    """Flags that may be left at 0, auto or None: training.run.defaults chooses them from the pictures."""

    architecture: str = "resnet32"
    """Network: resnet32 (made for CIFAR), resnet10, resnet18, resnet34, resnet50, resnext50_32x4d, torchvision:NAME or
    timm:NAME. For pictures up to 96 pixels, take resnet18-small or similar."""

    pretrained: str | None = None
    """Start weights for the whole network: torchvision:NAME, timm:NAME, a model of the zoo, a model folder, or a
    .safetensors or .pth file. Tensors whose shape does not fit, such as the last layer, start fresh."""

    freeze: Literal["none", "early"] = "none"
    """Layers that are not trained. none: train all; early: keep the start weights of the early layers, whose feature
    maps have at least an eighth of the picture's side. A step then takes about half the time."""

    backbone: str | None = None
    """Pretrained network, used as a feature extractor: only a last layer is trained. torchvision:NAME or timm:NAME
    with their pretrained weights, a model of the zoo, a model folder, or a weights file of torchvision, timm or
    classifier-balancing. It also sets --architecture and how pictures are resized and normalised."""

    last_layer: Literal["auto", "fresh", "ready"] = "auto"
    """With --backbone. ready: keep the last layer it has, and run stage 2 only; fresh: train a new one in stage 1;
    auto: ready if its classes are your classes."""

    cache_features: int = 0
    """Compute features once, for this many random views of each picture, then train the last layer on them: epochs
    take seconds. 0: a new view every epoch. Disk space: views x pictures x features x 2 bytes."""

    loss: Loss = "ce"
    """Loss. ce: cross entropy; focal: focal loss; ldam: margins only, as in MetaSAug's code; ldam-published: as in the
    LDAM paper, with a cosine classifier; balanced-softmax and logit-adjustment: add the log of the class prior."""

    stage1_loss: Literal["auto", "ce", "same"] = "auto"
    """Loss of stage 1. ce: cross entropy, as in the authors' code; same: as --loss; auto: ce if --augment is on, else
    same. ldam-published uses its own loss in both stages."""

    augment: Augment = "metasaug"
    """Augmentation of features in stage 2. none; isda: with class covariances of the training features; metasaug (the
    paper's): with covariances learned on the meta set; heldout: with covariances measured on the meta set."""

    class_weights: Literal["auto", "none", "balanced"] = "auto"
    """Class weights in stage 2. balanced: by the effective number of pictures (--beta); auto: balanced if --augment
    is on, else none. balanced with --augment none is deferred re-weighting (DRW)."""

    beta: float = 0.9999
    """Class weights: a class of n pictures has the effective number (1 - beta^n) / (1 - beta)."""

    covariance: Literal["full", "diagonal"] = "full"
    """Class covariances. full: a matrix per class; diagonal: variances only, which needs far less memory."""

    lookahead: Literal["classifier", "network"] = "classifier"
    """Which weights the meta step updates virtually. classifier: the last layer, fast; network: all of them, as in the
    paper, about 3 times as slow."""

    fidelity: Literal["fixed", "reference"] = "fixed"
    """fixed: with our corrections (docs/method.md); reference: as in the authors' code, where a learned covariance
    lasts for one step only."""

    strength: float = 0.75
    """Strength of the augmentation (lambda) at the last epoch. At epoch e it is lambda * e / epochs."""

    meta_rate: float = 0.1
    """Step size of the learned covariances (eta)."""

    meta_per_class: int = 10
    """Pictures per class in the meta set, taken out before the long tail is cut."""

    meta_in_training: Literal["never", "stage2", "always"] = "never"
    """Also train on the meta pictures. stage2: in stage 2 only, when MetaSAug sees them too; always: in both stages,
    a fair comparison for methods without a meta set. --augment heldout keeps a fifth of them to measure on."""

    gamma: float = 1.0
    """Focal loss: exponent."""

    max_margin: float = 0.5
    """LDAM: margin of the rarest class."""

    scale: float = 30.0
    """ldam-published: scale of the cosine classifier's logits."""

    tau: float = 1.0
    """Logit adjustment: weight of the log prior. 1 is balanced softmax."""

    epochs: int = 200
    """Length of the run. The schedule scales with it: stage 2 starts at 80 %."""

    batch_size: int = 100
    """Pictures per step."""

    lr: float = 0.1
    """Learning rate at the start (SGD with Nesterov momentum)."""

    lr_drop: float = 0.01
    """Factor of each of the two learning rate drops."""

    schedule: Schedule = "steps"
    """Learning rate over time. steps: a drop at the start of stage 2 and one in its middle; cosine: falls to 0 in
    stage 1, constant in stage 2; one-cycle: rises for a tenth of the run, then falls to 0 along a cosine."""

    stage2_epochs: int | None = None
    """Epochs of stage 2, the last ones of the run. By default a fifth of --epochs."""

    stage2_lr: float | None = None
    """Learning rate of stage 2. By default --lr times --lr-drop."""

    stage2_batch_size: int | None = None
    """Pictures per step in stage 2, and per meta batch. By default --batch-size."""

    stage2_trains: Literal["network", "classifier"] = "network"
    """What stage 2 trains. network: all weights; classifier: the last layer only, as the paper does on large sets."""

    momentum: float = 0.9
    """Momentum of SGD."""

    weight_decay: float = 5e-4
    """Weight decay of SGD."""

    input_size: int | None = None
    """Height and width of the network's input, in pixels. By default those of the pictures."""

    train_size: int | None = None
    """Height and width of training pictures. By default --input-size. Random crops enlarge objects, so a model is
    better at a size above its training size."""

    mean: tuple[float, float, float] | None = None
    """Per-channel mean in [0, 1], subtracted from the input. By default the start network's, or the data's."""

    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation that divides the input. By default the start network's, or the data's."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter that resizes pictures."""

    crop_mode: CropMode = "center"
    """How test pictures become square. center: resize the shorter side, crop the centre; squash: resize both sides,
    which distorts; border: resize the longer side, fill the rest. Stored with the model."""

    crop_pct: float = 1.0
    """Side of the centre crop as a share of the picture's shorter side; 0.875 is 224 of 256 pixels."""

    crops: Crops = "shift"
    """Random crops of training pictures. shift: move by up to an eighth, usual for CIFAR; resized: cut a random part
    and resize it, usual for ImageNet."""

    crop_area: float = 0.08
    """--crops resized: smallest share of the picture's area. 0.08 is usual for ImageNet; use more in short runs."""

    flips: Flips = "mirror"
    """Random flips of training pictures. mirror: left and right; all: also upside down and quarter turns, for
    pictures that have no upright direction; none: no flips, for example for writing."""

    sampling: Literal["instance", "square-root"] = "instance"
    """Training pictures of an epoch. instance: all; square-root: fewer of common classes, in proportion to the square
    root of their number, drawn again in each epoch. Rare classes are then seen more often in the same time."""

    color_jitter: float = 0.0
    """--crops resized: random factor, 1 plus or minus this, on brightness, contrast and saturation."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the backbone in training (torch autocast). bfloat16 and float16 save time and memory on a GPU.
    The last layer and the test always use float32."""

    accumulate: int = 1
    """Split each step into this many parts if it does not fit into memory. Slower, and batch norm sees smaller
    batches."""

    compile: bool = False
    """Compile the backbone with torch.compile: minutes at the start, then faster steps on a GPU."""

    seed: int = 0
    """Seed of the start weights, the order of pictures and the augmentation."""

    subset_seed: int = 0
    """Seed that picks the pictures of the long tail, the meta set and the test set."""

    def __post_init__(self):
        for flag, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise TrainingError(f"--{flag.replace('_', '-')} {number}: must be a finite number.")
        for flag in ("epochs", "batch_size", "lr", "meta_per_class", "input_size", "train_size", "accumulate",
                     "stage2_epochs", "stage2_lr", "stage2_batch_size"):
            value = getattr(self, flag)
            if value is not None and not value > 0 and not (value == 0 and flag in self.CHOSEN):
                raise TrainingError(f"--{flag.replace('_', '-')} {value}: must be greater than 0.")
        if self.batch_size == 1 or self.stage2_batch_size == 1:
            raise TrainingError("--batch-size 1: batch norm needs at least 2 pictures per step.")
        for flag, (low, high) in RANGES.items():
            value = getattr(self, flag)
            if not low <= value <= high and not (value == 0 and flag in self.CHOSEN):
                raise TrainingError(f"--{flag.replace('_', '-')} {value}: must be from {low:g} to {high:g}.")
        if self.input_size is not None and not self.input_size <= 4096:
            raise TrainingError(f"--input-size {self.input_size}: at most 4096.")
        if self.train_size is not None and self.backbone is not None:
            raise TrainingError("--train-size does not work with --backbone, whose network is not trained. Remove one "
                                "of the two.")
        if self.stage2_epochs is not None and self.epochs and self.stage2_epochs > self.epochs:
            raise TrainingError(f"--stage2-epochs {self.stage2_epochs}: must be at most --epochs, {self.epochs}.")
        if self.backbone is not None and self.pretrained is not None:
            raise TrainingError("Give --pretrained (trains the whole network) or --backbone (trains only the last "
                                "layer), not both.")
        if self.last_layer == "ready" and self.backbone is None:
            raise TrainingError("--last-layer ready needs --backbone.")
        if self.cache_features < 0:
            raise TrainingError(f"--cache-features {self.cache_features}: must be a number of views, or 0.")
        if self.cache_features and not self.stands_still(in_stage2=True):
            raise TrainingError("--cache-features needs a backbone that is not trained: add --backbone or "
                                "--stage2-trains classifier.")
        for flag in ("mean", "std"):
            if (values := getattr(self, flag)) is not None and not all(0 <= value <= 1 for value in values):
                raise TrainingError(f"--{flag} {' '.join(map(str, values))}: each must be from 0 to 1.")
        if self.std is not None and min(self.std) < 1e-3:
            raise TrainingError(f"--std {' '.join(map(str, self.std))}: each must be at least 0.001.")
        if self.color_jitter and self.crops == "shift":
            raise TrainingError("--color-jitter needs --crops resized.")

    def stands_still(self, in_stage2: bool) -> bool:
        """Whether only the last layer is trained: the rest is in eval mode, and its features may be cached."""
        return self.backbone is not None or (in_stage2 and self.stage2_trains == "classifier")

    @property
    def looks_at_meta(self) -> bool:
        """Whether each step of stage 2 passes a batch of the meta set through the network."""
        return self.augment in ("metasaug", "heldout")

    @property
    def stage2_epoch(self) -> int:
        """First epoch (from 0) of stage 2: re-weighting and augmentation on, learning rate dropped. 160 of 200.

        It always has the last epoch, so even the shortest run uses the method that it is named after.
        """
        if self.stage2_epochs is not None:
            return self.epochs - self.stage2_epochs
        return min(math.ceil(0.8 * self.epochs), self.epochs - 1)

    def lr_at(self, epoch: float) -> float:
        """Learning rate at this epoch, from 0; fractional if the schedule changes with every step."""
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
        return self.strength * max(epoch, 1) / self.epochs  # a run of one epoch is augmented too

    @property
    def weighted(self) -> bool:
        return self.class_weights == "balanced" or (self.class_weights == "auto" and self.augment != "none")

    @property
    def cosine_scale(self) -> float | None:
        """Scale of the cosine classifier of LDAM as published; None for a linear last layer."""
        return self.scale if self.loss == "ldam-published" else None

    @property
    def balances(self) -> bool:
        """Whether the loss counts rare classes for more than their share of the pictures."""
        return self.weighted or self.loss in ("balanced-softmax", "logit-adjustment")

    def shown_counts(self, class_counts: Sequence[int]) -> tuple[int, ...]:
        """Pictures of each class that an epoch shows: all n, or with square-root sampling (Kang et al. 2020) sqrt(n k),
        at most n, where k is the size of the smallest class, at least SHOWN_WHOLE."""
        if self.sampling != "square-root":
            return tuple(class_counts)
        k = max(SHOWN_WHOLE, min(class_counts))
        return tuple(min(n, round(math.sqrt(n * k))) for n in class_counts)

    def implicit_prior(self, class_counts: Sequence[int]) -> list[float]:
        """The class frequencies that the network's probabilities assume; they sum to 1.

        A softmax learns p(x|y) n_y w_y, for n_y pictures of weight w_y in an epoch. Logit adjustment adds tau log n_y
        to the logits in training, which leaves n_y^(1 - tau). Margins and the focal loss do not change the prior.
        """
        n_C = np.asarray(self.shown_counts(class_counts), np.float64)
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
        if self.loss == "ldam-published":  # its cosine classifier makes a different network
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
        """The dict that an earlier version saved with `to_dict`, with defaults for flags that it did not know."""
        return cls().to_dict() | saved

    @classmethod
    def completed_key(cls, saved: str) -> dict:
        """The same for the string of `stage1_key`."""
        return json.loads(cls().stage1_key()) | json.loads(saved)

    def to_dict(self) -> dict:
        """All flags. Paths to weights lose their folders: a model folder must not reveal the user's."""
        flags = dataclasses.asdict(self)
        for flag in ("pretrained", "backbone"):
            if flags[flag] is not None:
                flags[flag] = without_place(flags[flag])
        return {"dataset": self.dataset, **flags}


@dataclass(frozen=True)
class Cifar10LT(Recipe):
    """CIFAR-10-LT: 10 classes, 4,990 pictures in the largest, 4,990 / IMBALANCE in the smallest.

    Expected: % error in the paper (ResNet-32, 200 epochs, best test epoch, original pictures) at imbalance 200, 100,
    50, 20, 10. --loss ce: 23.11, 19.46, 15.97, 12.36, 10.56. --loss ldam: 22.65, 19.34, 15.66, 11.90, 10.32.
    Cost: about 18 s an epoch at imbalance 100 on 2 fast CPU cores, an hour for 200 epochs; minutes on a GPU.
    """

    dataset: ClassVar[str] = "cifar10-lt"

    imbalance: float = 100
    """Pictures in the largest class / pictures in the smallest. The paper uses 10, 20, 50, 100, 200; 1 is balanced."""

    subset: Literal["seeded", "authors"] = "seeded"
    """Which pictures. seeded: drawn by --subset-seed; authors: exactly those that the authors' code draws."""


@dataclass(frozen=True)
class Cifar100LT(Cifar10LT):
    """CIFAR-100-LT: 100 classes, 490 pictures in the largest, 490 / IMBALANCE in the smallest.

    Expected: % error in the paper (ResNet-32, 200 epochs, best test epoch, original pictures) at imbalance 200, 100,
    50, 20, 10. --loss ce: 60.06, 53.13, 48.10, 42.15, 38.27. --loss ldam: 56.91, 51.99, 47.73, 42.47, 38.72.
    Cost: about 16 s an epoch at imbalance 100 on 2 fast CPU cores, an hour for 200 epochs; minutes on a GPU.
    """

    dataset: ClassVar[str] = "cifar100-lt"


@dataclass(frozen=True)
class LargeSet(Recipe):
    """How the paper trains on large sets: stage 1 trains the whole network, stage 2 only the last layer.

    Stage 1 is the plain training of classifier-balancing (Kang et al. 2020), stage 2 that of MetaSAug's code.
    """

    architecture: str = "resnet50"
    """Network: resnet50 as in the paper, resnext50_32x4d, resnet10, torchvision:NAME or timm:NAME."""

    epochs: int = 110
    """Length of the run, both stages."""

    batch_size: int = 512
    """Pictures per step in stage 1."""

    lr: float = 0.2
    """Learning rate at the start of stage 1 (SGD with Nesterov momentum)."""

    schedule: Literal["steps", "cosine"] = "cosine"
    """Learning rate over time. cosine: falls to 0 in stage 1, constant in stage 2; steps: a drop at the start of
    stage 2 and one in its middle."""

    stage2_epochs: int | None = 20
    """Epochs of stage 2, the last ones of the run."""

    stage2_lr: float | None = 3e-4
    """Learning rate of stage 2."""

    stage2_batch_size: int | None = 256
    """Pictures per step in stage 2, and per meta batch."""

    stage2_trains: Literal["network", "classifier"] = "classifier"
    """What stage 2 trains. classifier: the last layer only; network: all weights."""

    covariance: Literal["full", "diagonal"] = "diagonal"
    """Class covariances. full: a matrix per class (137 GB for 8,142 classes); diagonal: variances only."""

    strength: float = 0.25
    """Strength of the augmentation (lambda) at the last epoch."""

    input_size: int | None = 224
    """Height and width of the network's input, in pixels."""

    crop_pct: float = 0.875
    """Side of the centre crop as a share of the picture's shorter side; 0.875 is 224 of 256 pixels."""

    crops: Crops = "resized"
    """Random crops of training pictures. resized: cut a random part and resize it; shift: move by up to an eighth."""

    subset: Literal["seeded", "authors"] = "seeded"
    """Pictures of the meta set. seeded: drawn by --subset-seed; authors: exactly those that the authors' code draws."""

    skip_bad: bool = False
    """Leave out missing and unreadable pictures, and name them, instead of stopping."""


@dataclass(frozen=True)
class ImageNetLT(LargeSet):
    """ImageNet-LT: 1,000 classes, 115,846 training pictures, 1,280 to 5 per class. Tested on ImageNet's 50,000.

    Expected: 52.33 % error (authors' README, ResNet-50; an older version says 53.33). Meta set: 10 pictures per class
    of its val list.
    Cost: we have not run it. Estimate: 90 epochs at 800 pictures a second (ResNet-50 at 224 in TF32 on an A100) take
    4 hours, and the 20 epochs of the last layer another quarter of an hour.
    """

    dataset: ClassVar[str] = "imagenet-lt"

    color_jitter: float = 0.4
    """--crops resized: random factor, 1 plus or minus this, on brightness, contrast and saturation."""


@dataclass(frozen=True)
class INat17(LargeSet):
    """iNaturalist 2017: 5,089 classes, 579,184 training pictures, 3,919 to 9 per class. Tested on its val set.

    Expected: 36.72 % error (cited by others, ResNet-50; the authors' commands were never published). Meta set: 5
    training pictures per class, which stay in training.
    Cost: we have not run it. Estimate: 200 epochs at 800 pictures a second (ResNet-50 at 224 in TF32 on an A100) take
    40 hours.
    """

    dataset: ClassVar[str] = "inat17"

    epochs: int = 220
    """Length of the run, both stages."""

    meta_per_class: int = 5
    """Pictures per class in the meta set. They are training pictures and stay in training."""


@dataclass(frozen=True)
class INat18(INat17):
    """iNaturalist 2018: 8,142 classes, 437,513 training pictures, 1,000 to 2 per class. Tested on its val set.

    Expected: 30.50 % error (authors' README, ResNet-50; cited elsewhere as 31.25). Meta set: 2 training pictures per
    class, which stay in training.
    Cost: we have not run it. Estimate: 200 epochs at 800 pictures a second (ResNet-50 at 224 in TF32 on an A100) take
    30 hours.
    """

    dataset: ClassVar[str] = "inat18"

    meta_per_class: int = 2
    """Pictures per class in the meta set. They are training pictures and stay in training."""


@dataclass(frozen=True)
class OwnPictures(Recipe):
    """Your own pictures. training.run.defaults chooses every flag that is 0, auto or None from data and machine."""

    CHOSEN: ClassVar[tuple[str, ...]] = (
        "start", "architecture", "freeze", "loss", "augment", "meta_per_class", "meta_in_training", "epochs",
        "batch_size", "lr", "schedule", "input_size", "mean", "std", "interpolation", "crop_mode", "crops", "crop_area",
        "flips", "sampling", "covariance")

    start: str = "auto"
    """Pretrained network to fine-tune. small, medium, large: networks that we chose; timm:NAME; torchvision:NAME; a
    weights file; none: train from random weights; auto: the best of ours that is installed or can be downloaded."""

    minutes: float = 0
    """Time budget of the whole run, with a pretrained start. It sets --epochs and --input-size, by steps timed at the
    beginning. 0: up to 55 minutes, less for few pictures."""

    architecture: str = "auto"
    """Network: resnet32, resnet18, resnet18-small (for pictures up to 96 pixels), torchvision:NAME or timm:NAME. auto:
    that of --start; with --start none, resnet32 up to 64 pixels, else resnet18, or resnet50 on a GPU."""

    freeze: Literal["none", "early", "all", "auto"] = "auto"  # type: ignore[assignment]
    """Layers that are not trained. none: train all; early: keep the start's weights in the early layers, whose feature
    maps have at least an eighth of the picture's side, and a step takes about half the time; all: fit only a last
    layer, the first answer is the model; auto: early with a pretrained start on a CPU, else none; all if only a few
    steps of fine-tuning fit into the time."""

    loss: Loss | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Loss. ce: cross entropy; logit-adjustment, balanced-softmax: add the log of the class prior; focal; ldam; auto:
    logit-adjustment with a pretrained start, else ce."""

    augment: Augment | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Augmentation of features in stage 2: none, isda, metasaug (the paper's) or heldout. auto: none with a pretrained
    start, else isda."""

    meta_per_class: int = 0
    """Pictures per class in the meta set, at most a quarter of a class. 0: 10, or more if that is under 100 in all."""

    meta_in_training: Literal["never", "stage2", "always", "auto"] = "auto"  # type: ignore[assignment]
    """Also train on the meta pictures. stage2: in stage 2; always: in both stages; auto: in stage 2, unless --augment
    or --backbone needs them held out."""

    epochs: int = 0
    """Length of the run; the last fifth is stage 2. 0: chosen by --minutes, or by the number of pictures."""

    batch_size: int = 0
    """Pictures per step. 0: 32 with a pretrained start, else 100; fewer for few pictures."""

    lr: float = 0
    """Learning rate at the start. 0: 0.02 with --start, 0.01 with --pretrained, 0.1 from random weights."""

    schedule: Schedule | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Learning rate over time. steps: a drop at the start of stage 2 and one in its middle; cosine: falls to 0 in
    stage 1, constant in stage 2; one-cycle: rises for a tenth of the run, then falls to 0; auto: one-cycle with a
    pretrained start, else steps."""

    input_size: int | None = None
    """Height and width of the network's input, in pixels. By default chosen from the pictures and the machine."""

    interpolation: Literal["bilinear", "bicubic", "auto"] = "auto"  # type: ignore[assignment]
    """Filter that resizes pictures. auto: that of the pretrained start, else bilinear."""

    crop_mode: CropMode | Literal["auto"] = "auto"  # type: ignore[assignment]
    """How test pictures become square. center: resize the shorter side, crop the centre; squash: resize both sides,
    which distorts; border: resize the longer side, fill the rest; auto: squash if shapes differ much, else center."""

    crops: Crops | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Random crops of training pictures. shift: move by up to an eighth; resized: cut a random part and resize it;
    auto: resized with a pretrained start or above 96 pixels, else shift."""

    crop_area: float = 0
    """--crops resized: smallest share of the picture's area. 0: 0.35 with a pretrained start, else 0.08."""

    flips: Flips | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Random flips of training pictures. mirror: left and right; all: also upside down and quarter turns; none: no
    flips; auto: the flips after which the first model still recognises pictures; mirror without a pretrained start."""

    sampling: Literal["instance", "square-root", "auto"] = "auto"  # type: ignore[assignment]
    """Training pictures of an epoch. instance: all; square-root: fewer of common classes, in proportion to the square
    root of their number, drawn again in each epoch. Rare classes are then seen more often in the same time. auto:
    square-root with a pretrained start."""

    covariance: Literal["full", "diagonal", "auto"] = "auto"  # type: ignore[assignment]
    """Class covariances. full: a matrix per class; diagonal: variances only; auto: full if they take under 64 MB."""

    lr_drop: float = 0.1
    """Factor of each of the two learning rate drops."""

    test_share: float = 0.2
    """Share of each class to test on, if you give no test set. Pictures are picked by file name."""

    skip_bad: bool = False
    """Leave out unreadable pictures and empty classes, and name them, instead of stopping."""

    page: int | Literal["max", "mean"] | None = None
    """Page of a TIFF with several pages, from 1; max or mean: over all pages, pixel by pixel (a focus series). By
    default the first."""

    white: int | None = None
    """Value of white in 16-bit and 32-bit grey pictures, such as 4095 for a 12-bit camera. By default what the file
    says, or the range over all pictures. Stored with the model."""

    most_missing: float = 0
    """Share of a JPEG that may be missing at its end. 0.25: also train on JPEGs that lack their last quarter."""

    max_megapixels: float = 100
    """Largest picture to read, in megapixels (JPEGs: four times as large); at most 178. More takes more memory."""

    def __post_init__(self):
        super().__post_init__()
        _ = self.reading  # raises for values that make no sense
        if self.minutes < 0:
            raise TrainingError(f"--minutes {self.minutes:g}: must be greater than 0, or 0 for the default.")
        if self.start not in ("auto", "none") and (self.backbone or self.pretrained):
            raise TrainingError("--start, --pretrained and --backbone each name a network: give only one of the three.")

    @property
    def reading(self) -> Reading:
        """How to read picture files, by these flags."""
        return Reading(self.page, self.white, self.most_missing, self.max_megapixels)

    @property
    def may_end_with_meta(self) -> bool:
        """Whether training may end on the meta pictures too."""
        return self.meta_in_training in ("auto", "stage2") and self.augment in ("auto", "none", "isda")

    @property
    def starts_pretrained(self) -> bool:
        """Whether the run starts from a pretrained network, with a first model on its frozen features."""
        return self.start not in ("auto", "none")

    def to_dict(self) -> dict:
        return {**super().to_dict(), "start": without_place(self.start)}

    @classmethod
    def completed(cls, saved: dict) -> dict:
        """As for every recipe; versions without --start trained from random weights."""
        return cls(start="none", freeze="none", crop_area=0.08, interpolation="bilinear",
                   sampling="instance").to_dict() | saved

    def with_choices(self, saved: dict) -> Self:
        """This recipe, with the flags that it leaves open as an earlier run chose them."""
        saved = self.completed(saved)
        left_open = [flag for flag in self.CHOSEN if getattr(self, flag) in ("auto", 0, None)]
        return dataclasses.replace(self, **{flag: saved[flag] for flag in left_open if flag in saved})


@dataclass(frozen=True)
class Folder(OwnPictures):
    """Your own pictures in class folders: DATA/CLASS/picture.jpg, or DATA/train/CLASS, DATA/test/CLASS …

    You need no flag except --data. The run starts from a pretrained network. After a few minutes you have a first
    model and report. Then it fine-tunes for --minutes and keeps the better of the two models, judged on pictures that
    neither was trained on. Flags that are 0 or auto are chosen from your pictures and your machine; each choice is
    printed with its reason. A test or meta set that you do not give is cut from each class by file name.
    Cost: under an hour on a CPU, less on a GPU; printed before it starts. Ctrl-C keeps the best model so far.
    """

    dataset: ClassVar[str] = "folder"


@dataclass(frozen=True)
class Table(OwnPictures):
    """Your own pictures in a CSV table: path and label, and, if you have them, split and group.

    Pictures of one group (an animal, a track, a camera) stay in one split. Rows without a split get one by file name.
    Everything else is as in `metasaug train folder`.
    Cost: under an hour on a CPU, less on a GPU; printed before it starts. Ctrl-C keeps the best model so far.
    """

    dataset: ClassVar[str] = "table"
