"""The run folder: a lock for one run at a time, and the model folder at its end."""

import fcntl
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from training.errors import TrainingError
from training.recipes import Recipe, without_place

ROOT = Path(__file__).resolve().parent.parent.parent

LOSSES_IN_WORDS = {"ce": "cross entropy", "focal": "focal loss", "ldam": "LDAM (margins only)",
                   "ldam-published": "LDAM as published", "balanced-softmax": "balanced softmax",
                   "logit-adjustment": "logit adjustment"}


def write_model(model: Path, name: str, recipe: Recipe, data, state, results: dict, processes: int = 1,
                command: str | None = None, schedule: str | None = None,
                calibration: Mapping[str, Any] | None = None) -> None:
    """Write the finished model folder, without ONNX: `metasaug train` adds it next, `metasaug export` at any time.

    command, schedule   in words; None: those of this process and of the recipe
    calibration         as zoo.calibration.fit_calibration gives it
    """
    import torch

    from training.network.starts import BY_NAME
    from training.run.stages import view_of
    from zoo.architectures import classifier_name
    from zoo.labels import assign_groups
    from zoo.model_folder import write_model_folder
    from zoo.registry import find

    entry = find(name)
    counts = data.class_counts
    groups, groups_by = assign_groups(counts)
    view = view_of(recipe, data)
    config = {
        "architecture": recipe.architecture.removeprefix("timm:"),  # as timm itself reads it
        "num_classes": len(data.label_names),
        "num_features": state.module.num_features,
        "label_names": list(data.label_names),
        "pretrained_cfg": {
            **view.pretrained_cfg, "num_classes": len(data.label_names), "classifier": classifier_name(state.module),
        },
        "metasaug": {
            "format": 1,
            "name": name,
            "method": recipe.method,
            "loss": recipe.loss,
            "augment": recipe.augment,
            "prior": recipe.implicit_prior(counts),
            "cosine_scale": recipe.cosine_scale,
            "recipe": recipe.to_dict(),
            **({"start": {"network": start.network, "learned_on": start.learned_on, "licence": start.licence}}
               if (start := BY_NAME.get(getattr(recipe, "start", ""))) else {}),
            "dataset": data.source,
            # As asked for: 100 on CIFAR-10-LT, where the counts, rounded down, make it 4990 / 49.
            "imbalance": recipe.to_dict().get("imbalance", max(counts) / min(counts)),
            "class_counts": list(counts),
            "groups": list(groups),
            "groups_by": groups_by,
            "group_accuracy": {group: figures["accuracy"] for group, figures in results["groups"].items()},
            "seed": recipe.seed,
            "schedule": schedule or schedule_in_words(recipe),
            "command": command or command_in_words(),
            "code_version": code_version(),
            **({"reading": kept} if (kept := view.reading.to_dict()) else {}),
            "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0],
                         "numpy": version("numpy")},
            "hardware": hardware(next(state.module.parameters()).device, processes),
            "seconds": round(state.seconds),
            "published_error": entry.published_error if entry else None,
            **({} if calibration is None else {"calibration": dict(calibration)}),
            "results": results,
        },
    }
    weights = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in state.module.state_dict().items()}
    covariance = None
    if recipe.augment != "none":
        covariance = {name: tensor.cpu().contiguous().numpy() for name, tensor in
                      {"running": state.covariance.covariance, "learned": state.learned.delta}.items()}
    write_model_folder(model, config, weights, covariance)


# Flags that name places on this machine, and what the card shows instead; None: leave the flag out.
PLACES = {"--data": "DIR", "--test": "DIR", "--meta": "DIR", "--lists": "DIR", "--table": "FILE",
          "--pretrained": "FILE", "--features": None, "--out": None, "--stage1": None, "--name": None,
          "--workers": None}


def command_in_words() -> str:
    """The command as another person would type it, without this machine's paths."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        flag, _, value = word.partition("=")
        if flag in PLACES:
            value or next(words, None)
            kept += [flag, place] if (place := PLACES[flag]) else []
        elif flag == "--backbone":
            kept += [flag, without_place(value or next(words, ""))]
        elif flag != "--resume":
            kept.append(word)
    return " ".join(["metasaug", *(kept if kept[:1] == ["train"] else ["train", *kept])])


def schedule_in_words(recipe: Recipe) -> str:
    """The schedule in words, for the card: "60 epochs: 48 of plain cross entropy, then …"."""
    weights = " with class-balanced weights" if recipe.weighted else ""
    first, second = (LOSSES_IN_WORDS[loss] for loss in (recipe.first_loss, recipe.loss))
    if recipe.augment == "isda":
        second = f"ISDA ({recipe.covariance} covariances)"
    elif recipe.augment == "heldout":
        second = f"held-out augmentation ({recipe.covariance} covariances)"
    elif recipe.augment == "metasaug":
        second = (f"MetaSAug ({recipe.covariance} covariances, look-ahead through the {recipe.lookahead}"
                  + (", quirks of the authors' code" if recipe.fidelity == "reference" else "") + ")")
    epochs = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}"
    if recipe.backbone is not None:
        epochs += f" of a last layer on {without_place(recipe.backbone)}"
    sampling = " with square-root sampling" if recipe.sampling == "square-root" else ""
    last, meta = recipe.epochs - recipe.stage2_epoch, recipe.meta_in_training == "stage2"
    if second == first and not weights:
        also = f"; the last {'epoch also trains' if last == 1 else f'{last} also train'} on the meta pictures"
        return f"{epochs} of plain {first}{sampling}{also if meta else ''}"
    before = f"{recipe.stage2_epoch} of plain {first}, then " if recipe.stage2_epoch else ""
    some = "most of the" if recipe.augment == "heldout" else "the"
    return (f"{epochs}: {before}{last} of {'the same' if second == first else second}{weights}"
            + (f", {some} meta pictures among those trained on" if meta else "") + sampling)


def code_version() -> str:
    """The distribution's version and, in a checkout, its commit; "+" if files differ from that commit."""
    own = distribution_version()
    if not (ROOT / ".git").exists():
        return own
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True,
                                text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return own
    return f"{own} ({commit})"


def distribution_version() -> str:
    """The installed version; in a copy that is not installed, that of its pyproject.toml."""
    try:
        return version("metasaug")
    except PackageNotFoundError:
        try:
            return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        except (OSError, KeyError, tomllib.TOMLDecodeError):
            return "unknown"


def hardware(device, processes: int = 1) -> str:
    import torch

    times = f"{processes} x " if processes > 1 else ""
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return times + f"{threads} CPU thread{'s' * (threads != 1)} ({platform.machine()})"


@contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Lock a run folder. A second run waits, or raises TrainingError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise TrainingError(f"--out {folder} cannot be written: {error.strerror or error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise TrainingError(f"{folder} is in use by another run; choose another --out.") from None
        yield
