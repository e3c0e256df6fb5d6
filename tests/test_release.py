"""`metasaug release`: from nothing to the Hub by one command, whatever happens on the way."""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import zoo
from export import release as releasing
from export.release import entries_named
from tests.hub_server import READER, WRITER, wait_until
from tests.test_command_line import run
from tests.test_hub import environment, renamed
from tests.test_list_files import make_imagenet_lt, make_inat
from training.recipes import Folder, ImageNetLT
from zoo.model_folder import CONFIG, MANIFEST, ModelFolder, manifest_of
from zoo.registry import ENTRIES, find

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("--epochs", "4", "--stage2-epochs", "2", "--architecture", "resnet8", "--input-size", "32", "--batch-size",
         "8", "--stage2-batch-size", "8", "--lr", "0.01", "--workers", "0")
PAIR = "metasaug-imagenet-lt,ce-imagenet-lt"  # cells that share their first stage


class Releases:
    """The command in a process of its own, again and again, against one Hub."""

    def __init__(self, hub, tmp_path: Path, *arguments: object):
        self.hub, self.out = hub, tmp_path / "runs"
        self.command = [sys.executable, "-m", "metasaug", "release", "--root", str(tmp_path / "data"), "--out",
                        str(self.out), "--owner", "me", *map(str, arguments), "--", *SHORT]
        self.environment = environment(hub, tmp_path / "home", HF_TOKEN=WRITER)

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(self.command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True)

    def to_the_end(self) -> tuple[int, str]:
        process = self.start()
        out, _ = process.communicate()
        assert "Traceback" not in out, out
        return process.returncode, out

    def stopped_once(self, holds, number: signal.Signals = signal.SIGKILL) -> int:
        process = self.start()
        assert wait_until(lambda: holds() or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(number)
        process.communicate()
        return process.returncode

    def run_of(self, name: str) -> Path:
        return next(self.out.glob(f"*/{name}"))

    def epochs_logged(self, name: str) -> list[int]:
        return [json.loads(line)["epoch"] for line in (self.run_of(name) / "log.jsonl").read_text().splitlines()]


# ---- the whole of it ----


@pytest.mark.long
def test_a_release_stopped_anywhere_continues_and_does_nothing_twice(hub, tmp_path, pictures):
    # Given ImageNet-LT, small, whose two models share their first stage, and iNaturalist with a damaged picture,
    make_imagenet_lt(tmp_path / "data" / "imagenet-lt", counts=(24, 12, 6), test=4)
    make_inat(tmp_path / "data" / "inat18")
    (tmp_path / "data" / "inat18" / "train_val2018" / "Insecta" / "Apis mellifera" / "train0.jpg").write_bytes(b"?")
    releases = Releases(hub, tmp_path, "--cells", PAIR)
    one, two = "metasaug-imagenet-lt", "ce-imagenet-lt"

    # when the release gets SIGTERM in its first stage, then the stage is saved, and nothing is published;
    assert releases.stopped_once(lambda: any(releases.out.glob("*/stage1/checkpoints/*.pt")), signal.SIGTERM) == 143
    assert not any(name.startswith("me/") for name in hub.repos)
    # killed between training and publishing, then the model is there, and nothing is published yet;
    hub.fail("silent", "commit/main", "POST")
    releases.stopped_once(lambda: any("commit/main" in path for _, path, _ in hub.log))
    assert hub.repos["me/" + one].messages == ["initial commit"]
    made = (releases.run_of(one) / "model" / MANIFEST).read_bytes()
    # killed while the second is read back: it is on the Hub by then.
    hub.faults.clear()
    hub.fail("silent", f"{two}/resolve/.*/{MANIFEST}")
    releases.stopped_once(lambda: hub.repos.get("me/" + two) and len(hub.repos["me/" + two].messages) == 2)
    hub.faults.clear()
    # Then the first stage was trained once, for both, and the first model was not trained again.
    assert releases.epochs_logged("stage1") == [1, 2]
    assert releases.epochs_logged(one) == releases.epochs_logged(two) == [3, 4]
    assert (releases.run_of(one) / "model" / MANIFEST).read_bytes() == made

    # Once more, with the damaged set: both are found published, its own model fails, with the reason,
    commits = {name: list(repo.messages) for name, repo in hub.repos.items()}
    releases.command[releases.command.index(PAIR)] = f"{PAIR},metasaug-inat18"
    code, out = releases.to_the_end()
    assert code == 1
    assert {name: repo.messages for name, repo in hub.repos.items()} == commits
    assert "1 of 3 models to do" in out and "Failed: inat18-" in out and "train0.jpg is not a picture" in out
    # the results stand beside the published ones and their source, and everybody can load the models.
    assert re.search(rf"^{one} .* 52\.33%, {re.escape(find(one).published_source)}$", out, re.MULTILINE)
    for name in (one, two):
        assert len(commits["me/" + name]) == 2
        model = zoo.load(f"hf:me/{name}@{hub.repos['me/' + name].refs['main']}")
        assert model.predict(pictures / "a.png").top[0].label in model.labels
        config = ModelFolder(releases.run_of(name) / "model").config["metasaug"]
        assert config["name"] == name and config["command"].startswith("metasaug train imagenet-lt ")
        assert "--data DIR" in config["command"] and str(tmp_path) not in json.dumps(config)
        assert config["recipe"]["epochs"] == 4


@pytest.mark.long
def test_a_release_killed_at_random_publishes_every_model_once(hub, tmp_path):
    # Given four models of two data sets,
    make_imagenet_lt(tmp_path / "data" / "imagenet-lt", counts=(24, 12, 6), test=4)
    make_inat(tmp_path / "data" / "inat18")
    releases = Releases(hub, tmp_path, "--cells", f"{PAIR},metasaug-inat18,ce-inat18")
    rng, names = np.random.default_rng(0), ["metasaug-imagenet-lt", "ce-imagenet-lt", "metasaug-inat18", "ce-inat18"]
    # when a signal comes 20 times at any moment, and once none comes,
    for _ in range(20):
        process = releases.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(1, 14))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        out, _ = process.communicate()
        assert process.returncode in (0, 130, 143, -2, -9, -15), out  # -2, -15: outside training
    code, out = releases.to_the_end()
    # then all are out, each by one commit, and each epoch was logged once.
    assert code == 0, out
    for name in names:
        assert len(hub.repos["me/" + name].messages) == 2, name
        assert zoo.load(f"hf:me/{name}").name == name
        assert releases.epochs_logged(name) == [3, 4]


def test_models_of_a_failed_first_stage_wait_for_it_and_others_go_on(tmp_path, capsys, monkeypatch):
    # Given two data sets, and no memory for training,
    make_imagenet_lt(tmp_path / "imagenet-lt")
    make_inat(tmp_path / "inat18")
    begun = []

    def fail(task, *_, **__):
        begun.append(task.name)
        raise RuntimeError("no memory.\nMore of it.")

    monkeypatch.setattr(releasing, "train", fail)
    # when both are released, then each first stage is tried once, no second stage is, and all reasons are shown.
    code, out, _ = run(capsys, "release", "--cells", f"{PAIR},metasaug-inat18", "--root", tmp_path, "--no-publish",
                       "--out", tmp_path / "runs", "--", *SHORT)
    assert code == 1 and [name.split("-")[0] for name in begun] == ["imagenet", "inat18"]
    assert all(name.endswith("/stage1") for name in begun)
    assert "no memory.\nMore of it." in out
    waiting = out.rpartition("first stage failed:")[2]
    assert all(name in waiting for name in ("metasaug-imagenet-lt", "ce-imagenet-lt", "metasaug-inat18"))


# ---- the plan ----


def test_the_plan_of_all_models_needs_nothing(hub, tmp_path, capsys, monkeypatch):
    # Given neither data nor a place for runs, when all models are planned,
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "release", "--dry-run", "--cells", "all")
    assert code == 0
    # then every model that is not out has a line; nothing was written or asked.
    rows = {line.split()[0]: line for line in out.split("\n\n")[1].splitlines()[1:]}
    assert set(rows) == {entry.name for entry in ENTRIES if entry.weights == "unpublished"}
    assert max(map(len, out.splitlines())) <= 110
    assert not list(tmp_path.iterdir()) and hub.log == []
    # Each takes its first stage from the first of those that share it, which has its own.
    assert rows["metasaug-inat18"].endswith("its own") and rows["focal-cifar10-lt-10"].endswith("its own")
    assert rows["ce-inat18"].endswith("that of metasaug-inat18")
    assert rows["metasaug-ldam-cifar100-lt-50"].endswith("that of metasaug-cifar100-lt-50")


def test_what_was_left_open_is_no_other_recipe():
    # Given models as their runs left them, of what the pictures or a ready backbone decided,
    chosen = dataclasses.replace(Folder(), architecture="resnet18", epochs=40, batch_size=64, input_size=96,
                                 crop_mode="squash", crops="shift", covariance="full")
    on_backbone = ImageNetLT(backbone="some/folder/model", architecture="resnet18", epochs=20, stage2_epochs=20,
                             last_layer="ready", input_size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))

    def model(recipe):
        return SimpleNamespace(config=json.loads(json.dumps({"metasaug": {"recipe": recipe.to_dict()}})))

    # then the recipes that left it open are the same, and those that say otherwise are not.
    for open_one, settled in [(Folder(), chosen), (ImageNetLT(backbone="other/model"), on_backbone)]:
        assert releasing.other_recipe(open_one, model(settled)) is None
        assert releasing.other_recipe(settled, model(settled)) is None
        told = releasing.other_recipe(dataclasses.replace(open_one, seed=1, input_size=32), model(settled))
        assert told == f"input_size {settled.input_size}, not 32, seed 0, not 1"


def test_names_data_sets_and_all_are_cells():
    names = [entry.name for entry in entries_named(["inat18,metasaug-inat17", "ce-inaturalist18"])]
    assert names == ["metasaug-inat17", "metasaug-inat18", "heldout-inat18", "ce-inat18"]
    assert entries_named(["all"]) == list(ENTRIES) == entries_named([",".join({e.dataset for e in ENTRIES})])


@pytest.mark.parametrize(("arguments", "told"), [
    (("--cells", "imagenet,inat19"), ["'imagenet'. Did you mean imagenet-lt", "'inat19'. Did you mean inat18"]),
    (("--cells", ","), ["--cells takes names"]),
    (("--cells", "inat18", "--data", "inat19=x"), ["--data inat19=x: give DATASET=DIR", "inat18"]),
    (("--cells", "inat18", "--data", "inat18="), ["--data inat18=: give DATASET=DIR"]),
    (("--cells", "inat18", "--", "--out", "x"), ["no --data, --out, --name"]),
    (("--cells", "inat18", "--", "--data", "x"), ["no --data, --out, --name"]),
    (("--cells", "inat18", "--", "--resume"), ["no --data, --out, --name"]),
    (("--cells", "inat18", "--", "epochs", "2"), ["epochs 2: give names with --cells"]),
    (("--cells", "inat18", "--", "--epochs", "two"), ["does not take --epochs two"]),
    (("--cells", "inat18", "--", "--epochs", "-1"), ["--epochs -1: must be greater than 0"]),
    (("--cells", "inat18,ce-cifar10-lt-50", "--", "--skip-bad"), ["for ce-cifar10-lt-50, does not take --skip-bad"]),
])
def test_what_was_typed_wrong_is_told(capsys, arguments, told):
    code, _, err = run(capsys, "release", *arguments)
    assert code == 2
    for each in told:
        assert each.replace("ce-inat18", "inat18") in err.replace("metasaug-inat18", "inat18"), err


# ---- what is needed ----


def ready(hub, tmp_path, monkeypatch, token=WRITER):
    make_imagenet_lt(tmp_path / "data" / "imagenet-lt")
    monkeypatch.setenv("HF_TOKEN", token)
    return ("release", "--cells", PAIR, "--root", tmp_path / "data", "--out", tmp_path / "runs", "--owner",
            "me", "--", *SHORT)


def test_all_that_is_missing_is_told_at_once_and_nothing_is_begun(hub, tmp_path, capsys, monkeypatch):
    # Given one data set of three, and nobody logged in,
    make_imagenet_lt(tmp_path / "data" / "imagenet-lt")
    monkeypatch.setattr(releasing.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    # when a release is asked for, then one error has it all.
    code, out, err = run(capsys, "release", "--cells", "imagenet-lt,inat18,plankton,ce-cifar10-lt-10", "--again",
                         "--root", tmp_path / "data", "--out", tmp_path / "runs", "--owner", "me")
    assert code == 2 and "imagenet-lt: 17 training pictures in 3 classes" in out
    for told in ("Log in with a token that may write (`hf auth login`, or HF_TOKEN)", "visipedia/inat_comp",
                 "about 120 GB",
                 f"inat18 in {tmp_path / 'data' / 'inat18'} (give --data inat18=DIR", "National Data Science Bowl",
                 "cifar-10-batches-py", "need onnxscript: pip install 'metasaug[train]'"):
        assert told in err, told
    assert not (tmp_path / "runs").exists()
    # Without --root it is asked for.
    code, _, err = run(capsys, "release", "--cells", "inat18", "--out", tmp_path / "runs", "--no-publish")
    assert code == 2 and "Where is inat18? Give --root DIR, with inat18 in it, or --data inat18=DIR." in err


@pytest.mark.parametrize(("token", "owner", "told"), [
    ("hf_wrong", "me", "refuses the token"), (READER, "me", "may only read"),
    (WRITER, "somebody", "you are me on the Hub, who may write for me, lab only")])
def test_a_token_that_may_not_publish_is_told_before_anything_is_trained(
        hub, tmp_path, capsys, monkeypatch, token, owner, told):
    monkeypatch.setattr(releasing, "train", lambda *_, **__: pytest.fail("something was started"))
    arguments = list(ready(hub, tmp_path, monkeypatch, token))
    arguments[arguments.index("me")] = owner
    code, _, err = run(capsys, *arguments)
    assert code == 2 and told in err


def test_classes_without_names_are_told_before_they_are_trained_for_days(hub, tmp_path, capsys, monkeypatch):
    # Given iNaturalist by list files, whose classes have no names, then a card could not be published.
    lists = tmp_path / "data" / "inat18"
    make_inat(lists)
    for part in ("train", "val"):
        content = json.loads((lists / f"{part}2018.json").read_text())
        label = {each["image_id"]: each["category_id"] for each in content["annotations"]}
        (lists / f"iNaturalist18_{part}.txt").write_text(
            "\n".join(f"{each['file_name']} {label[each['id']]}" for each in content["images"]))
        (lists / f"{part}2018.json").unlink()
    monkeypatch.setenv("HF_TOKEN", WRITER)
    arguments = ("--cells", "inat18", "--root", tmp_path / "data", "--out", tmp_path / "runs", "--owner", "me")
    code, _, err = run(capsys, "release", *arguments)
    assert code == 2 and "numbers instead of names" in err


# ---- what is out already ----


def test_what_is_bundled_is_out_and_made_again_only_on_request(capsys):
    code, out, _ = run(capsys, "release", "--dry-run", "--cells", "ce-cifar10-lt")
    assert code == 0 and "0 of 1 models to do" in out
    code, out, _ = run(capsys, "release", "--dry-run", "--cells", "ce-cifar10-lt", "--again")
    assert code == 0 and "1 of 1 models to do" in out and re.search("ce-cifar10-lt +160 [+] 40", out)


def published_elsewhere(files, recipe):
    """What another machine put on the Hub as ce-imagenet-lt."""
    changed = renamed(files, "ce-imagenet-lt")
    config = json.loads(changed[CONFIG])
    config["metasaug"]["recipe"] = recipe
    changed = {**changed, CONFIG: json.dumps(config).encode()}
    del changed[MANIFEST]
    return {**changed, MANIFEST: manifest_of(changed)}


def test_what_another_machine_published_is_out_unless_it_was_trained_otherwise(
        hub, files, tmp_path, capsys, monkeypatch):
    recipe = ImageNetLT(augment="none", epochs=4, stage2_epochs=2, architecture="resnet8", input_size=32,
                        batch_size=8, stage2_batch_size=8, lr=0.01).to_dict()
    begun = []
    monkeypatch.setattr(releasing.Order, "_do", lambda self, task, model: begun.append(self.failed.setdefault(
        task.name, "stopped")))
    arguments = list(ready(hub, tmp_path, monkeypatch))
    arguments[arguments.index(PAIR)] = "ce-imagenet-lt"
    # Given this very cell on the Hub, and nothing here, when it is released, then nothing is done.
    hub.add("me/ce-imagenet-lt", published_elsewhere(files, recipe))
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "0 of 1 models to do" in out
    head = json.loads(files[CONFIG])["metasaug"]["group_accuracy"]["head"]
    assert not begun and re.search(rf"^ce-imagenet-lt +[\d.]+% .* {head:.2%} ", out, re.MULTILINE)
    # Trained otherwise, it stays what it is, and is told; on request it is trained.
    hub.add("me/ce-imagenet-lt", published_elsewhere(files, {**recipe, "epochs": 90}))
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "with other flags (epochs 90, not 4). --again replaces it" in err and not begun
    arguments.insert(1, "--again")
    code, out, _ = run(capsys, *arguments)
    assert code == 1 and len(begun) == 1


def test_the_plan_in_the_docs_is_the_plan(capsys):
    page = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")
    command, shown = re.search(r"<!-- plan: metasaug (.+) -->\n```\n(.+?)\n```", page, re.DOTALL).groups()
    assert run(capsys, *command.split())[1].split("\n\n")[1] == shown
