"""`metasaug publish`: check a model folder, upload it to the Hub in one commit, and read it back."""

import hashlib
import json
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro

from export.card import card, results_of
from export.errors import ExportError
from export.figure import accuracy_figure
from zoo.errors import HubError
from zoo.hub import PATIENCE, PREFIX, HubFolder, in_words, parse, within
from zoo.model_folder import CARD, FIGURE, FILES, MANIFEST, ONNX, ONNX_INT8, WEIGHTS, ModelFolder, manifest_of
from zoo.predictor import Precision, Predictor, torch_module
from zoo.registry import find

T = TypeVar("T")

SLOWEST_UPLOAD = 50_000  # bytes a second
WHERE = "For ON_HUB in zoo/registry.py:"


def publish(
    folder: tyro.conf.Positional[Path], repo: str, private: bool = False, dry_run: bool = False,
    incomplete: bool = False,
) -> None:
    """Upload a model folder to the Hub, for zoo.load("hf:owner/name"). The folder itself does not change.

    The command first checks every hash, the config, that ONNX and weights agree (if torch is installed), and that the
    card is complete. It rewrites the card, uploads all files in one commit, then reads them back and compares.

    Args:
        folder: A model folder, or a run of `metasaug train` with a model in it.
        repo: owner/name on the Hub, created if missing. Log in first: `hf auth login`, or HF_TOKEN.
        private: Make it a private repository.
        dry_run: Check everything, upload nothing.
        incomplete: Publish even if the card lacks results or training details.
    """
    if parse(f"{PREFIX}{repo}")[1] is not None:
        raise HubError(f"--repo {repo}: give owner/name without a revision. Publishing makes a new commit on main.")
    opened = whole(folder)
    print(f"{opened.config['metasaug']['name']}, from {opened.path}")
    print(f"  hashes  {len(opened.files)} files as in {MANIFEST}")
    print(f"  ONNX    {parity(opened)}")
    missing = what_the_card_lacks(opened.config)
    print(f"  card    {'lacks ' + ', '.join(missing) if missing else 'complete'}")
    if missing and not incomplete:
        raise ExportError(f"the card of {folder} lacks {', '.join(missing)}: readers could not judge the model. "
                          "`metasaug export FOLDER --data TEST` measures it; training or importing again may add "
                          "the rest. --incomplete publishes it anyway.")
    contents = contents_for(opened, repo)
    print(f"to {PREFIX}{repo}{' (private)' if private else ''}, in one commit:")
    for name, content in contents.items():
        print(f"  {len(content):>12,}  {name}")
    print(f"  {sum(map(len, contents.values())):>12,}  bytes")
    if dry_run:
        print("Dry run: nothing was uploaded.")
        return
    commit = upload(repo, contents, private, opened.config["metasaug"]["name"])
    read_back(repo, commit, contents)
    print(f"{PREFIX}{repo}@{commit}: uploaded, and read back the same.\n")
    print(entry(opened.config, repo, commit, hashlib.sha256(contents[MANIFEST]).hexdigest()))


def whole(folder: Path) -> ModelFolder:
    """Open the folder and check every file and the config. It must hold weights and ONNX."""
    if not (folder / MANIFEST).exists() and (folder / "model" / MANIFEST).exists():
        folder = folder / "model"
    opened = ModelFolder(folder)
    opened.check()
    _ = opened.config
    for name, remedy in ((WEIGHTS, "train or import the model again"), (ONNX, f"`metasaug export {folder}` adds it")):
        if name not in opened:
            raise ExportError(f"{folder} has no {name}: {remedy}.")
    return opened


def parity(opened: ModelFolder) -> str:
    """Run the ONNX files and, if torch is installed, compare fp32 with the weights. Returns the result in words.

    Raises ModelFolderError, or ExportError if they differ.
    """
    height, width = opened.config["pretrained_cfg"]["input_size"][1:]
    grey = np.full((height, width, 3), 128, np.uint8)
    precisions: dict[Precision, str] = {"fp32": ONNX, **({"int8": ONNX_INT8} if ONNX_INT8 in opened else {})}
    for precision, name in precisions.items():
        logits = Predictor(opened, "onnx", "cpu", precision=precision).predict(grey).logits
        if logits is None or not np.isfinite(logits).all():
            raise ExportError(f"{opened.path / name} answers a grey picture with values that are not numbers.")
    try:
        from export.to_onnx import check_parity
    except ModuleNotFoundError as error:
        return f"runs; not compared to the weights, {error.name} is not installed"
    return f"within {check_parity(opened.read(ONNX), torch_module(opened), opened.config):.1e} of the weights in torch"


def what_the_card_lacks(config: Mapping[str, Any]) -> list[str]:
    """What readers need to judge a model and the config does not have, in words."""
    ours = config["metasaug"]
    needed = {"results": "test results", "class_counts": "the training pictures of each class"}
    if not ours.get("imported"):
        needed |= {"schedule": "the schedule", "command": "the training command", "seed": "the seed",
                   "code_version": "the version of the code", "versions": "those of the libraries"}
    if results_of(ours):
        del needed["results"]
    missing = [words for key, words in needed.items() if ours.get(key) in (None, "", [], {})]
    if "int8" in (variants := ours.get("variants") or {}) and "groups" not in variants["int8"]:
        missing.append("what int8 gets right per group")
    if (ours.get("imported") or {}).get("licence") == "unknown":
        missing.append("the licence of the imported file")
    if all(name == str(c) for c, name in enumerate(config["label_names"])):
        missing.append("names of the classes")
    return missing


def contents_for(opened: ModelFolder, repo: str) -> dict[str, bytes]:
    """All files of the repository, with the card written for it and the manifest last."""
    figure = accuracy_figure(opened.config)
    made = {CARD: card(opened.config, repo, figure is not None).encode(), **({FIGURE: figure} if figure else {})}
    contents = {name: made[name] if name in made else opened.read(name)
                for name in FILES if name in made or (name in opened and name != FIGURE)}
    return {**contents, MANIFEST: manifest_of(contents)}


def upload(repo: str, contents: Mapping[str, bytes], private: bool, name: str) -> str:
    """Upload `contents` as one commit on main and remove files of an older model. Returns the commit.

    Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="metasaug", library_version=version("metasaug"))
    asked(repo, lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    if private and not asked(repo, lambda: api.model_info(repo)).private:
        raise HubError(f"{PREFIX}{repo} is there already, and public. Nothing was uploaded: make it private on its "
                       "page, or name another.")
    there = asked(repo, lambda: api.list_repo_files(repo))
    operations: list[Any] = [*(CommitOperationAdd(name, content) for name, content in contents.items()),
                             *(CommitOperationDelete(name) for name in FILES if name in there and name not in contents)]
    seconds = sum(map(len, contents.values())) / SLOWEST_UPLOAD
    message = f"{name}, by metasaug {version('metasaug')}"
    return asked(repo, lambda: api.create_commit(repo, operations, commit_message=message), seconds).oid


def asked(repo: str, call: Callable[[], T], seconds: float = 0) -> T:
    """The Hub's answer to `call` within PATIENCE plus `seconds`. Raises HubError."""
    try:
        return within(time.monotonic() + PATIENCE + seconds, call)
    except Exception as error:  # from any of the Hub's libraries
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        raise HubError(in_words(cause, repo, "main", "the upload")) from error


def read_back(repo: str, commit: str, contents: Mapping[str, bytes]) -> None:
    """Read all files back at this commit, without a cache. Raises HubError if any byte differs."""
    with tempfile.TemporaryDirectory() as cache:
        names = [name for name in contents if name != MANIFEST]
        folder = HubFolder(repo, commit, hashlib.sha256(contents[MANIFEST]).hexdigest(), names, cache=Path(cache))
        for name in names:
            if folder.read(name) != contents[name]:
                raise HubError(f"{folder.source}: {name} differs from what was uploaded. Publish again.")


def entry(config: Mapping[str, Any], repo: str, commit: str, manifest_sha256: str) -> str:
    """What to paste into zoo/registry.py, and where."""
    name = config["metasaug"]["name"]
    known = "" if find(name) else f"\n(No entry there is called {name}: add one, or load hf:{repo}.)"
    return f"{WHERE}\n{on_hub(config, repo, commit, manifest_sha256)}{known}"


def on_hub(config: Mapping[str, Any], repo: str, commit: str, manifest_sha256: str) -> str:
    """The item of ON_HUB, as Python."""
    ours = config["metasaug"]
    error = (results_of(ours) or {}).get("error")
    summary = f"trained on {ours['dataset']}, {ours.get('schedule', 'schedule not known')}"
    words = "\n        ".join(_quoted(part) for part in textwrap.wrap(summary, 100, drop_whitespace=False))
    return (f"    {_quoted(ours['name'])}: OnHub(\n        {_quoted(repo)}, {_quoted(commit)},\n"
            f"        {_quoted(manifest_sha256)}, {error if error is None else round(error, 6)},\n        {words}),")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # also a Python string in double quotes
