"""The models of the zoo: data only. Errors are fractions; those of bundled models are read from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.errors import ModelFolderError, UnpublishedModelError, ZooError

if TYPE_CHECKING:
    from zoo.model_folder import ModelFolder

HERE = Path(__file__).resolve().parent

PAPER = "MetaSAug paper; ResNet-32, original pictures, 200 epochs, best test epoch"
AUTHORS = "README of the MetaSAug authors; ResNet-50"
SECOND_HAND = "cited elsewhere; ResNet-50"


@dataclass(frozen=True)
class OnHub:
    """Weights on the Hub, at one commit; `metasaug publish` prints it."""

    repo: str  # owner/name
    revision: str  # the commit, 40 hex digits
    manifest_sha256: str
    error: float | None  # test error of the last epoch; None where it was not measured
    summary: str  # on what data, after how much training


@dataclass(frozen=True)
class Entry:
    """One cell of a benchmark: what would be trained how, what the paper got, and the weights where there are any."""

    name: str
    dataset: str
    imbalance: float | None  # where the benchmark comes in several; None: as it is
    method: str
    loss: str
    command: str  # that trains it
    published_error: float | None = None  # None: not known
    published_source: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def hub(self) -> OnHub | None:
        return ON_HUB.get(self.name)

    @property
    def weights(self) -> Literal["bundled", "hub", "unpublished"]:
        """bundled: in this package; hub: fetched at first use; unpublished: not out, `how_to_make` says how."""
        return "bundled" if self.name in BUNDLED else "hub" if self.hub else "unpublished"

    @property
    def manifest_sha256(self) -> str | None:
        """Of the weights' manifest.json, which vouches for every file."""
        return self.hub.manifest_sha256 if self.hub else BUNDLED.get(self.name)

    @property
    def folder(self) -> Path:
        """Of a bundled model."""
        return HERE / "weights" / self.name

    def open(self, files: Sequence[str] = (), **hub: Any) -> "ModelFolder":
        """The model folder, its manifest checked; the one way to a model of the registry.

        files  that will be read, fetched at once where they are on the Hub      hub  as zoo.hub.HubFolder takes it
        Raises UnpublishedModelError, HubError or ModelFolderError.
        """
        from zoo.hub import HubFolder, own_copies
        from zoo.model_folder import ModelFolder

        asked, owner = hub.get("revision"), own_copies()
        if self.weights == "bundled":
            if asked is not None:
                raise ZooError(f"{self.name} is bundled with this package and has no revisions; hf:owner/repo@revision "
                               "names a model on the Hub.")
            return ModelFolder(self.folder, self.manifest_sha256)
        if owner is not None:
            # A copy of what is published holds the same bytes; of what is not, whatever goes by this name.
            folder = HubFolder(f"{owner}/{self.name}", **hub, files=files,
                               manifest_sha256=None if asked else self.manifest_sha256)
            name = folder.config["metasaug"]["name"]
            if name != self.name:
                raise ModelFolderError(f"{folder.source} calls itself {name!r}, not {self.name!r}. If it is what you "
                                       f"want, load it as hf:{folder.repo}.")
            return folder
        if self.hub is None:
            raise UnpublishedModelError(self.how_to_make)
        pinned = asked in (None, self.hub.revision)
        return HubFolder(self.hub.repo, **{**hub, "revision": self.hub.revision if pinned else asked}, files=files,
                         manifest_sha256=self.manifest_sha256 if pinned else None)

    @cached_property
    def _bundled(self) -> tuple[dict[str, Any] | None, str]:
        """The config of a bundled model and, in words, what it is, or why there is none."""
        if self.weights != "bundled":
            return None, "not published yet"
        try:
            config = self.open().config
        except ModelFolderError as error:  # one damaged folder is no reason to hide the other models
            return None, f"damaged: {error}"
        ours = config["metasaug"]
        return config, f"trained on {ours['dataset']}, {ours['schedule']}"

    @property
    def config(self) -> dict[str, Any] | None:
        """The config of a bundled model, checked; None where there is none."""
        return self._bundled[0]

    @property
    def summary(self) -> str:
        """What the weights were trained on and how long, in words."""
        return self.hub.summary if self.hub else self._bundled[1]

    @property
    def measured_error(self) -> float | None:
        """Test error of the last epoch, on the data that `summary` names."""
        if self.hub:
            return self.hub.error
        return None if self.config is None else (self.config["metasaug"].get("results") or {}).get("error")

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes in the order of the outputs; None where only the weights' folder or the data know them."""
        if self.config is not None:
            return tuple(self.config["label_names"])
        from zoo import label_names

        known = {"cifar10-lt": label_names.cifar10, "cifar100-lt": label_names.cifar100,
                 "imagenet-lt": label_names.imagenet, "inat18": label_names.inat18}
        return known[self.dataset]() if self.dataset in known else None

    @property
    def how_to_make(self) -> str:
        """What to do about an unpublished model."""
        from zoo.hub import OWNER

        ways = {"train it": self.command}
        if self.authors_file:
            ways["import the authors' file"] = f"metasaug import FILE --as {self.name} --out FOLDER"
        ways["load a copy of your own on the Hub"] = (
            f"hf:OWNER/REPO[@REVISION], or {OWNER}=OWNER for hf:OWNER/{self.name}")
        ready = ", ".join(entry.name for entry in ENTRIES if entry.weights != "unpublished")
        return "\n".join([f"The weights of {self.name} are not out yet. Ways to have them:",
                          *(f"  {what}: {how}" for what, how in ways.items()), f"Ready to use: {ready}."])

    @property
    def authors_file(self) -> bool:
        """Whether the authors, or those whose first stage they took (ce on the large sets), released such weights."""
        return self.dataset != "plankton" and (
            self.method == "metasaug" or (self.method == "ce" and self.imbalance is None))


# sha256 of manifest.json of each folder in weights/.
BUNDLED = {
    "metasaug-cifar10-lt": "2f72dc8b919393292ce0a24d91e167ad53347b87fb3067852192754b297a6862",
    "heldout-cifar10-lt": "8e2b622415f70d36078fcc42d4ec97beb1754d73b51261dc40a4e2d3edc2591c",
    "ce-cifar10-lt": "d975eeea91e8f729a56d7006e7a80cfe50a8bc9e47a22e4906248174e4a001d6",
    "metasaug-plankton": "80c4ec2615d4a908fb2cd4c36d58ca390349ad87bc051cdbb414e31cc482d128",
    "ce-plankton": "49edd6369edda27797c0d9338b8ec70cd7fc4ae606a040bc77cd6b5b9a6d1e7e",
}

# What `metasaug publish` prints goes here.
ON_HUB: dict[str, OnHub] = {}

# Test errors of MetaSAug in the paper, in %: data set, loss, by imbalance. Its focal cells are not known to us.
PUBLISHED = {
    ("cifar10-lt", "ce"): {200: 23.11, 100: 19.46, 50: 15.97, 20: 12.36, 10: 10.56},
    ("cifar10-lt", "ldam"): {200: 22.65, 100: 19.34, 50: 15.66, 20: 11.90, 10: 10.32},
    ("cifar100-lt", "ce"): {200: 60.06, 100: 53.13, 50: 48.10, 20: 42.15, 10: 38.27},
    ("cifar100-lt", "ldam"): {200: 56.91, 100: 51.99, 50: 47.73, 20: 42.47, 10: 38.72},
}


def _cifar(dataset: str, method: str, loss: str, imbalance: int) -> Entry:
    """A cell of CIFAR-LT: `metasaug-ldam-cifar100-lt-50`. Without a number: imbalance 100, the one most reported."""
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
    """The entries of a large benchmark, which comes in one imbalance."""
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
          "metasaug train folder --flips all --data pictures/"),
    Entry("heldout-plankton", "plankton", None, "heldout", "ce",
          "metasaug train folder --flips all --augment heldout --data pictures/"),
    Entry("ce-plankton", "plankton", None, "ce", "ce",
          "metasaug train folder --flips all --augment none --data pictures/"),
)

# Those that can be used first, bundled before Hub.
ENTRIES: tuple[Entry, ...] = tuple(
    sorted(_IN_ORDER, key=lambda entry: ("bundled", "hub", "unpublished").index(entry.weights)))


def list_models() -> list[Entry]:
    """Every model of the zoo, those whose weights are here first."""
    return list(ENTRIES)


def find(name: str) -> Entry | None:
    """The entry of this name or alias."""
    return next((entry for entry in ENTRIES if name in (entry.name, *entry.aliases)), None)
