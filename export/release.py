"""`metasaug release`: train, measure, export and publish the models of the zoo that are not published yet.

The models form one queue (training.run.cells): those with the same first stage share it, and several of these commands
may work side by side. Each start reads from the run folders and the Hub what is left to do. So you may stop the command
at any moment: the same command continues.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from huggingface_hub.utils import disable_progress_bars

from export.command_line import finish
from export.errors import ExportError
from export.publish import asked
from export.publish import publish as upload
from training.command_line import Job, choose_device, job_of, run_to_model, settle
from training.errors import Interrupted
from training.recipes import OwnPictures, Recipe
from training.run.cells import Cell, Queue, Task, train
from zoo.errors import HubError, ModelFolderError, UnknownModelError, ZooError
from zoo.hub import PREFIX, HubFolder, own_copies
from zoo.model_folder import CARD, CONFIG, FIGURE, MANIFEST, ONNX, ModelFolder
from zoo.registry import ENTRIES, Entry, find

# Folder of each data set under --root.
FOLDERS = {"cifar10-lt": "cifar10", "cifar100-lt": "cifar100", "imagenet-lt": "imagenet-lt", "inat17": "inat17",
           "inat18": "inat18", "plankton": "plankton"}
WIDTH = max(len(entry.name) for entry in ENTRIES)
LIBRARIES = ("torch", "torchvision", "onnx", "onnxscript", "matplotlib")


def release(
    cells: tuple[str, ...],
    root: Path | None = None,
    owner: str | None = None,
    out: Path = Path("runs/release"),
    data: tuple[str, ...] = (),
    again: bool = False,
    private: bool = False,
    publish: bool = True,
    dry_run: bool = False,
    flags: tyro.conf.Positional[tuple[str, ...]] = (),
) -> int:
    """Train, measure, export and publish each named model that is not published yet.

    You may stop the command at any time; the same command continues. On a machine with several GPUs, start it once per
    GPU (CUDA_VISIBLE_DEVICES=0, 1, …): each takes models that no other is training. Flags after a lone -- go to each
    `metasaug train`, as in `metasaug release --cells inat18 … -- --workers 32`.
    Exit code 0: all done; 1: some models failed, each with its reason; 2: nothing was started; 129, 130, 143: stopped.

    Args:
        cells: Names from `metasaug list --all`, data sets (all their models), or all. Separate several by commas or
            spaces.
        root: Folder of the data sets: ROOT/cifar10, cifar100, imagenet-lt, inat17, inat18, plankton, each as `metasaug
            train` reads it.
        owner: User or organisation on the Hub. Models go to OWNER/NAME. By default METASAUG_HUB_OWNER.
        out: Folder of the runs. Models with the same first stage share OUT/GROUP.
        data: DATASET=DIR for a data set outside --root.
        again: Also make models that are published already.
        private: Make the repositories private.
        publish: Upload the models to the Hub. With --no-publish they stay in the run folders.
        dry_run: Print the plan and stop. Needs no data, no GPU and no connection.
        flags: Flags for `metasaug train`, after --.
    """
    if flags and not flags[0].startswith("-"):
        raise ExportError(f"{shlex.join(flags)}: give names with --cells. Only flags of `metasaug train` follow --.")
    disable_progress_bars()  # the Hub's
    places = by_data_set(data)
    models = [model_of(entry, places.get(entry.dataset) or (root and root.expanduser() / FOLDERS[entry.dataset]), flags)
              for entry in entries_named(cells)]
    order = Order(models, out, (owner or own_copies()) if publish else None, publish, private, again)
    if dry_run:
        print(order.plan())
        print("Dry run: nothing was started" + (", and the Hub was not asked." if publish else "."))
        return 0
    missing = order.what_is_missing()
    print(order.plan(), flush=True)
    if missing:
        raise ExportError("nothing was started:\n\n" + "\n\n".join(missing))
    return order.carry_out()


# ---- which models ----


@dataclass(frozen=True)
class Model:
    """An entry of the registry, and how it is trained here."""

    entry: Entry
    job: Job
    words: tuple[str, ...]  # its command, after `metasaug train`

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def cell(self) -> Cell:
        """Its place in the queue. Models on own pictures share no first stage: the pictures decide their settings."""
        recipe = self.job.recipe
        if isinstance(recipe, OwnPictures):
            return Cell(f"{self.name}/{self.name}", recipe, whole=True)
        group = hashlib.sha256(recipe.stage1_key().encode()).hexdigest()[:8]
        return Cell(f"{recipe.dataset}-{group}/{self.name}", recipe)


def entries_named(words: Sequence[str]) -> list[Entry]:
    """Entries by name, alias, data set or `all`, each once, in the registry's order.

    words   each may hold several, separated by commas. Raises UnknownModelError, with the nearest names.
    """
    found, unknown = set[str](), []
    for word in (word for each in words for word in each.replace(",", " ").split()):
        entry = find(word)
        named = [entry] if entry else [each for each in ENTRIES if word in (each.dataset, "all")]
        found |= {each.name for each in named}
        if not named:
            known = ["all", *FOLDERS, *(name for each in ENTRIES for name in (each.name, *each.aliases))]
            near = difflib.get_close_matches(word.lower(), known)
            unknown.append(f"No model or data set is called {word!r}."
                           + (f" Did you mean {' or '.join(near)}?" if near else ""))
    if unknown or not found:
        raise UnknownModelError("\n".join([*unknown, "--cells takes names from `metasaug list --all`, data sets ("
                                           f"{', '.join(FOLDERS)}), or all."]))
    return [entry for entry in ENTRIES if entry.name in found]


def model_of(entry: Entry, data: Path | None, flags: Sequence[str]) -> Model:
    """The entry's own `metasaug train` command, on these pictures.

    flags   of `metasaug train`, added to the command. Raises ExportError if it does not take them.
    """
    words = [*shlex.split(entry.command)[2:], *flags]  # after "metasaug train"
    try:
        job = job_of(words)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ExportError(f"`metasaug train {words[0]}`, for {entry.name}, does not take {shlex.join(flags)}: see "
                          "above.") from None
    asked_for = job.options
    place = Path(words[words.index("--data") + 1])
    if asked_for != dataclasses.replace(asked_for, data=place, out=None, name=None, stage1=None, resume=False,
                                        dry_run=False):
        raise ExportError("After --, no --data, --out, --name, --stage1, --resume or --dry-run: give release's own "
                          "--root, --data and --out before the --.")
    return Model(entry, dataclasses.replace(job, options=dataclasses.replace(asked_for, data=data)), tuple(words))


def by_data_set(words: Sequence[str]) -> dict[str, Path]:
    """{"inat18": Path("DIR")} of ["inat18=DIR"]."""
    given = {}
    for word in words:
        name, _, place = word.partition("=")
        if name not in FOLDERS or not place:
            raise ExportError(f"--data {word}: give DATASET=DIR, where DATASET is one of {', '.join(FOLDERS)}.")
        given[name] = Path(place).expanduser()
    return given


@dataclass
class Order:
    """What to make, and what is on the Hub already."""

    models: list[Model]
    out: Path
    owner: str | None
    publish: bool
    private: bool
    again: bool
    on_hub: dict[str, HubFolder] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # reasons, by model or run folder

    # ---- what is left ----

    def run_of(self, model: Model) -> Path:
        return self.out / model.cell.name

    def standing(self, model: Model) -> str:
        """published: bundled or on the Hub; trained: in its run folder, with ONNX and card; begun; new."""
        if model.entry.weights != "unpublished" and not self.again:
            return "published"
        local, remote = finished(self.run_of(model)), self.on_hub.get(model.name)
        if remote is not None and (not self.again or (local is not None and same(local, remote))):
            return "published"
        if local is not None:
            return "trained"
        return "begun" if any((self.run_of(model) / "checkpoints").glob("*.pt")) else "new"

    def left(self) -> list[Model]:
        done = ("published",) if self.publish else ("published", "trained")
        return [model for model in self.models if self.standing(model) not in done]

    def plan(self) -> str:
        """A line for each model that is left."""
        left, first = self.left(), dict[str, str]()
        where = f"to {PREFIX}{self.owner or 'OWNER'}/NAME" if self.publish else "not published"
        lines = [f"{len(left)} of {len(self.models)} models to do, {where}; runs in {self.out}", ""]
        if left:
            lines.append(f"{'model':<{WIDTH}} {'epochs':>9}  {'state':<8} first stage")
        for model in left:
            recipe = model.job.recipe
            shared = first.setdefault(model.cell.group, model.name)
            epochs = f"{recipe.stage2_epoch} + {recipe.epochs - recipe.stage2_epoch}" if recipe.epochs else "chosen"
            lines.append(f"{model.name:<{WIDTH}} {epochs:>9}  {self.standing(model):<8} "
                         + ("its own" if shared == model.name else f"that of {shared}"))
        return "\n".join(lines) + "\n"

    # ---- what is needed ----

    def what_is_missing(self) -> list[str]:
        """Everything that would stop the order later, with what to do. Asks the Hub, and reads all data sets."""
        missing = self._look_at_hub() if self.publish else []
        if lacking := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
            missing.append(f"Training and export need {', '.join(lacking)}: pip install 'metasaug[train]'.")
        for model in self.left():
            folder = finished(self.run_of(model))
            if folder is not None and (other := other_recipe(model.job.recipe, folder)):
                missing.append(f"{folder.path} was trained with other flags ({other}): remove it, or give another "
                               "--out.")
        return missing + self._look_at_data()

    def _look_at_data(self) -> list[str]:
        """Read each data set as training does, but without decoding pictures. Returns what is missing."""
        missing = []
        needed = {model.entry.dataset: model for model in self.left() if self.standing(model) != "trained"}
        for name, model in needed.items():
            place = model.job.options.data
            if place is None:
                missing.append(f"Where is {name}? Give --root DIR, with {FOLDERS[name]} in it, or --data {name}=DIR.")
                continue
            try:
                loaded = model.job.load(look=False)
            except ZooError as error:
                missing.append(f"{name} in {place} (give --data {name}=DIR for another place): {error}"
                               + (" It needs the 121 class folders of the National Data Science Bowl (2015)."
                                  if name == "plankton" else ""))
                continue
            print(f"{name}: {len(loaded.train):,} training pictures in {len(loaded.label_names):,} classes, in {place}",
                  flush=True)
            if self.publish and all(label == str(c) for c, label in enumerate(loaded.label_names)):
                missing.append(f"{name}: its classes have numbers instead of names, and `metasaug publish` refuses "
                               "those. Use the JSON files of the data set, or --no-publish.")
        return missing

    def _look_at_hub(self) -> list[str]:
        """Check that the account may write for the owner, and find the models there. Returns what is missing."""
        from huggingface_hub import HfApi

        if self.owner is None:
            return ["Who owns the models on the Hub? Give --owner NAME, set METASAUG_HUB_OWNER, or use --no-publish."]
        try:
            who = asked(self.owner, HfApi().whoami)
        except HubError as error:
            return [f"The Hub does not know who you are: {error} Log in with a token that may write (`hf auth login`, "
                    "or HF_TOKEN), or use --no-publish."]
        if lack := may_not_write(who, self.owner):
            return [lack]
        unready = []
        for model in self.models:
            if self.standing(model) == "published":  # bundled, or on the Hub by the registry
                continue
            try:
                if (folder := on_the_hub(f"{self.owner}/{model.name}")) is not None:
                    self.on_hub[model.name] = folder
                    if not self.again and (other := other_recipe(model.job.recipe, folder)):
                        unready.append(f"{folder.source} was trained with other flags ({other}). --again replaces it.")
            except ZooError as error:
                unready.append(str(error))
        return unready

    # ---- doing it ----

    def carry_out(self) -> int:
        """Make every model that is left. Returns 0, or 1 if some failed."""
        left = {model.cell.name: model for model in self.left()}
        for model in left.values():
            if self.standing(model) == "trained":
                self._attempt(model.name, partial(self._publish, model))
        queue = Queue([model.cell for model in left.values()], self.out,
                      done=lambda: {name for name, model in left.items()
                                    if self.standing(model) in ("trained", "published")},
                      may_take=lambda name: name not in self.failed)
        for task in queue.tasks():
            print(f"\n{len(queue.left())} left to train: {task.name}", flush=True)
            self._attempt(task.name, partial(self._do, task, left[task.cell.name]))
        print("\n" + results_table(self.models, self._config))
        waiting = [cell.name for cell in queue.left() if cell.name not in self.failed]
        for name, reason in self.failed.items():
            print(f"\nFailed: {name}: {reason}")
        if waiting:
            print(f"\nNot started, because their first stage failed: {', '.join(waiting)}")
        return int(bool(self.failed))

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        """Run `action`. If it fails, record the reason and go on with the other models."""
        try:
            action()
        except Interrupted:
            raise
        except (ZooError, OSError, RuntimeError) as error:  # RuntimeError: from torch, for example out of memory
            self.failed[name] = str(error)
            print(f"Failed: {name}: {str(error).splitlines()[0]}", flush=True)

    def _do(self, task: Task, model: Model) -> None:
        from training.network.distributed import Processes

        options = model.job.options
        device, how = choose_device(options.device), options.of_the_loop()
        if model.job.recipe.cache_features:  # models on one backbone share its features
            how["features"] = options.features or self.out / "features"
        data = model.job.load()
        if task.is_stage1:
            train(task, data, device, **how)
            return
        sys.argv[1:] = ["train", *model.words]  # the command that the model's card shows
        recipe, _ = settle(task.cell.recipe, data, device, task.folder)
        finish(run_to_model(recipe, data, task.folder, model.name, Processes(device=device), resume=True,
                            stage1=task.stage1, **how))
        if self.publish:
            self._publish(model)

    def _publish(self, model: Model) -> None:
        repo = f"{self.owner}/{model.name}"
        upload(self.run_of(model) / "model", repo, private=self.private)
        if (folder := on_the_hub(repo)) is not None:
            self.on_hub[model.name] = folder

    def _config(self, model: Model) -> Mapping[str, Any] | None:
        folder = self.on_hub.get(model.name) or finished(self.run_of(model)) or (
            ModelFolder(model.entry.folder) if model.entry.bundled else None)
        return None if folder is None else folder.config


# ---- what is there already ----


def finished(run: Path) -> ModelFolder | None:
    """The run's model, if it is measured and exported. (Publishing checks every byte.)"""
    try:
        folder = ModelFolder(run / "model")
        return folder if ONNX in folder and CARD in folder and folder.results else None
    except ModelFolderError:  # not there, or killed while it was written
        return None


def other_recipe(recipe: Recipe, folder: ModelFolder) -> str | None:
    """Flags in which the model differs from this recipe, except those that the recipe leaves open; None if none."""
    saved = recipe.completed(folder.config["metasaug"].get("recipe") or {})
    usual = type(recipe)().to_dict()

    def left_open(flag: str, value: Any) -> bool:
        return (flag in recipe.CHOSEN and value in ("auto", 0, None)) or (
            recipe.backbone is not None and value == usual[flag])

    ours = json.loads(json.dumps(recipe.to_dict()))
    differing = [f"{flag} {saved[flag]}, not {value}" for flag, value in ours.items()
                 if saved[flag] != value and not left_open(flag, value)]
    return ", ".join(differing[:5]) or None


def same(local: ModelFolder, remote: ModelFolder) -> bool:
    """Whether the Hub has the same weights and results. Cards always differ: they name different places."""
    return ({name: entry for name, entry in local.files.items() if name not in (CARD, FIGURE)}
            == {name: entry for name, entry in remote.files.items() if name not in (CARD, FIGURE)})


def on_the_hub(repo: str) -> HubFolder | None:
    """The model folder in a repository, at its newest commit, if there is one. Raises HubError."""
    from huggingface_hub import HfApi

    if not asked(repo, lambda: HfApi().file_exists(repo, MANIFEST)):
        return None
    return HubFolder(repo, files=(CONFIG,))


def may_not_write(who: Mapping[str, Any], owner: str) -> str | None:
    """Why the account may not publish for `owner`, as far as the Hub says; None if it may."""
    name = who.get("name", "?")
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        return f"The token of {name} on the Hub may only read: make one that may write, then `hf auth login`."
    roles = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or []}
    if owner != name and owner not in roles:
        return (f"--owner {owner}: you are {name} on the Hub, who may write for "
                f"{', '.join([name, *map(str, roles)])} only.")
    if roles.get(owner) == "read":
        return f"--owner {owner}: {name} may only read there; an administrator of {owner} can change that."
    return None


def results_table(models: Sequence[Model], config_of: Callable[[Model], Mapping[str, Any] | None]) -> str:
    """Test errors beside the published ones, with their source."""
    lines = [f"{'model':<{WIDTH}} {'error':>7} {'head':>7} {'medium':>7} {'tail':>7}  published"]
    for model in models:
        results = ((config_of(model) or {}).get("metasaug") or {}).get("results") or {}
        groups = results.get("groups", {})
        figures = [results.get("error"), *(groups.get(name, {}).get("accuracy") for name in ("head", "medium", "tail"))]
        entry = model.entry
        published = "" if entry.published_error is None else f"{entry.published_error:.2%}, {entry.published_source}"
        lines.append(f"{model.name:<{WIDTH}} " + " ".join(f"{'–' if n is None else f'{n:.2%}':>7}" for n in figures)
                     + f"  {published}")
    return "\n".join([*lines, "", "head, medium, tail: accuracy of these classes."])
