"""`metasaug release`: from nothing to the Hub by one command, whatever happens on the way."""

import contextlib
import dataclasses
import json
import os
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
from export import release_runs
from export.release_plan import Work, disk_of, entries_named, work_of
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

    def killed_once(self, holds) -> None:
        process = self.start()
        assert wait_until(lambda: holds() or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
        assert wait_until(lambda: not self.still_running(), 60), "what it had started outlived it"

    def still_running(self) -> list[int]:
        """Processes that work in our folder, those that were started last first."""
        found = []
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                found += [int(place.parent.name)] * (os.fsencode(self.out) in place.read_bytes())
        return sorted(found, reverse=True)

    def commands(self, name: str) -> list[str]:
        """What was started for a cell: train or publish, in order."""
        log = (self.out / name / "output.log").read_text(encoding="utf-8")
        return re.findall(r"^== .* -m metasaug (\w+)", log, re.MULTILINE)

    def epochs_logged(self, name: str) -> list[int]:
        return [json.loads(line)["epoch"] for line in (self.out / name / "log.jsonl").read_text().splitlines()]


# ---- the whole of it ----


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_release_killed_anywhere_goes_on_and_does_nothing_twice(hub, tmp_path, pictures):
    # Given ImageNet-LT, small, whose two cells share their first stage, and iNaturalist with a damaged picture,
    make_imagenet_lt(tmp_path / "data" / "imagenet-lt", counts=(24, 12, 6), test=4)
    make_inat(tmp_path / "data" / "inat18")
    (tmp_path / "data" / "inat18" / "train_val2018" / "Insecta" / "Apis mellifera" / "train0.jpg").write_bytes(b"?")
    releases = Releases(hub, tmp_path, "--cells", PAIR)
    one, two = "metasaug-imagenet-lt", "ce-imagenet-lt"

    # when the release is killed in the middle of its first training, then that training saves, and ends with it;
    releases.killed_once(lambda: any((releases.out / one / "checkpoints").glob("*.pt")))
    assert "me/" + one not in hub.repos
    begun = releases.epochs_logged(one)
    assert begun and begun[-1] < 4
    # killed between training and publishing, then nothing is published yet;
    hub.fail("silent", "commit/main", "POST")
    releases.killed_once(lambda: any("commit/main" in path for _, path, _ in hub.log))
    assert hub.repos["me/" + one].messages == ["initial commit"]
    assert releases.epochs_logged(one) == [1, 2, 3, 4]
    # killed while the second is read back: it is on the Hub by then.
    hub.faults.clear()
    hub.fail("silent", f"{two}/resolve/.*/{MANIFEST}")
    releases.killed_once(lambda: hub.repos.get("me/" + two) and len(hub.repos["me/" + two].messages) == 2)
    hub.faults.clear()
    # Then the first was trained in two goes and not again, and the second began after the first stage of the first.
    assert releases.commands(one) == ["train", "train", "publish", "publish"]
    assert releases.commands(two) == ["train", "publish"]
    assert releases.epochs_logged(two) == [3, 4]

    # Once more, with the set that is damaged: both are found published, its own cell fails, with the reason,
    commits = {name: list(repo.messages) for name, repo in hub.repos.items()}
    releases.command[releases.command.index(PAIR)] = f"{PAIR},metasaug-inat18"
    code, out = releases.to_the_end()
    assert code == 1
    assert {name: repo.messages for name, repo in hub.repos.items()} == commits
    assert f"published already as hf:me/NAME: {one}, {two}" in out
    assert "Failed: metasaug-inat18: " in out and "train0.jpg is no picture" in out
    assert releases.commands(two) == ["train", "publish"] and releases.commands("metasaug-inat18") == ["train"]
    # the results stand beside the published ones and their source, and the lines to paste name what is on the Hub.
    assert re.search(rf"^{one} .* 52\.33% a$", out, re.MULTILINE) and f"a: {find(one).published_source}" in out
    for name in (one, two):
        assert len(commits["me/" + name]) == 2 and f'"{name}": OnHub(' in out
        commit = hub.repos["me/" + name].refs["main"]
        assert f'"me/{name}", "{commit}"' in out
        model = zoo.load(f"hf:me/{name}@{commit}")
        assert model.predict(pictures / "a.png").top[0].label in model.labels
        config = ModelFolder(releases.out / name / "model").config["metasaug"]
        assert config["name"] == name and config["command"].startswith("metasaug train imagenet-lt ")
        assert "--data DIR" in config["command"] and str(tmp_path) not in json.dumps(config)
        assert config["recipe"]["epochs"] == 4


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_release_killed_at_random_publishes_every_cell_once(hub, tmp_path):
    # Given four cells of two data sets,
    make_imagenet_lt(tmp_path / "data" / "imagenet-lt", counts=(24, 12, 6), test=4)
    make_inat(tmp_path / "data" / "inat18")
    releases = Releases(hub, tmp_path, "--cells", f"{PAIR},metasaug-inat18,ce-inat18")
    rng, names = np.random.default_rng(0), ["metasaug-imagenet-lt", "ce-imagenet-lt", "metasaug-inat18", "ce-inat18"]
    # when a signal comes 20 times at any moment, to the release or to what it has started, and once none comes,
    for _ in range(20):
        process = releases.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(1, 14))
        victims = [*releases.still_running(), process.pid] if rng.random() < 0.3 else [process.pid]
        with contextlib.suppress(ProcessLookupError):
            os.kill(victims[0], rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        out, _ = process.communicate()
        assert "Traceback" not in out, out
        assert process.returncode in (0, 1, 130, 143, -9, -15), out  # -15: while Python itself was starting
    code, out = releases.to_the_end()
    # then all are out, each by one commit, each epoch was logged once, and no second first stage was trained.
    assert code == 0, out
    for name in names:
        assert len(hub.repos["me/" + name].messages) == 2, name
        assert zoo.load(f"hf:me/{name}").name == name
        assert releases.epochs_logged(name) == ([1, 2, 3, 4] if name.startswith("metasaug") else [3, 4])


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_two_processes_a_training_are_stopped_killed_and_go_on_as_one(hub, tmp_path):
    # Given a release whose trainings are two processes each,
    make_imagenet_lt(tmp_path / "data" / "imagenet-lt", counts=(48, 24, 12), test=4)
    releases = Releases(hub, tmp_path, "--cells", PAIR, "--processes", 2)
    one, two = "metasaug-imagenet-lt", "ce-imagenet-lt"
    epochs = releases.command.index("--epochs") + 1
    releases.command[epochs] = "30"
    # when it is told to stop, when one of the two is killed, and when it is killed itself,
    for number, code in [(signal.SIGTERM, 143), (None, 1), (signal.SIGKILL, -9)]:
        before = set((releases.out / one / "checkpoints").glob("*.pt"))
        process = releases.start()
        assert wait_until(lambda: set((releases.out / one / "checkpoints").glob("*.pt")) - before, 120)  # noqa: B023
        if number is None:
            os.kill(releases.still_running()[0], signal.SIGKILL)
        else:
            process.send_signal(number)
        out, _ = process.communicate()
        # then all of it ends, nothing is published, and what was learned is kept,
        assert process.returncode == code and "Traceback" not in out, out
        assert wait_until(lambda: not releases.still_running(), 60), "what it had started outlived it"
        assert not hub.repos.get("me/" + one)
        assert number is not None or (f"Failed: {one}: ended by SIGKILL" in out
                                      and f"not begun, as its first stage is that of {one}" in out)
    # and in the end both cells are out, each epoch done once.
    code, out = releases.to_the_end()
    assert code == 0, out
    assert releases.epochs_logged(one) == list(range(1, 31)) and releases.epochs_logged(two) == [29, 30]
    for name in (one, two):
        assert len(hub.repos["me/" + name].messages) == 2
        assert ModelFolder(releases.out / name / "model").config["metasaug"]["hardware"].startswith("2 x ")


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_who_stops_the_release_stops_the_training_which_saves(tmp_path, number, code):
    # Given a release whose training takes long,
    training = tmp_path / "long_one.py"
    training.write_text("import pathlib, signal, sys, time\n"
                        "def save(number, frame): pathlib.Path('saved').touch(); sys.exit(128 + number)\n"
                        "for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(each, save)\n"
                        "pathlib.Path('begun').touch(); time.sleep(60)\n")
    script = ("import sys\nfrom pathlib import Path\nfrom export.release_runs import Children\n"
              "from training.errors import Interrupted\n"
              "try:\n    with Children() as children: children.run(['long_one.py'], Path('log'), 'metasaug train')\n"
              "except Interrupted as stop: sys.exit(stop.exit_code)\n")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert wait_until((tmp_path / "begun").exists, 30)
    # when the release alone gets a signal,
    process.send_signal(number)
    # then the training has saved, and the release leaves with the code of its signal.
    assert process.wait(30) == code
    assert wait_until((tmp_path / "saved").exists, 30)


def test_cells_of_one_failed_first_stage_wait_for_it_and_others_go_on(tmp_path, capsys, monkeypatch):
    # Given two data sets, and a training of the first that fails before its first stage has ended,
    make_imagenet_lt(tmp_path / "imagenet-lt")
    make_inat(tmp_path / "inat18")
    begun = []

    def fail(_self, words, *_):
        begun.append(words[words.index("--name") + 1])
        raise releasing.ExportError("no memory.\nMore of it.")

    monkeypatch.setattr(releasing.Children, "run", fail)
    # when both are released, then its other cell is not begun, the other data set is, and all is told at the end.
    code, out, _ = run(capsys, "release", "--cells", f"{PAIR},metasaug-inat18", "--root", tmp_path, "--no-publish",
                       "--out", tmp_path / "runs", "--", *SHORT)
    assert code == 1 and begun == ["metasaug-imagenet-lt", "metasaug-inat18"]
    assert "ce-imagenet-lt: not begun, as its first stage is that of metasaug-imagenet-lt." in out
    assert "Failed: metasaug-inat18: no memory.\nMore of it." in out and "3 cells of 3 failed" in out


# ---- the plan ----


def test_the_plan_of_all_cells_needs_nothing(hub, tmp_path, capsys, monkeypatch):
    # Given neither data nor a place for runs, when all cells are planned,
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "release", "--dry-run", "--cells", "all", "--price-per-hour", "2")
    assert code == 0
    # then every cell that is not out has a line, and the sums are those of the lines; nothing was written or asked.
    table = out.split("\n\n")[1].splitlines()
    rows = {line.split()[0]: line for line in table[1:-1]}
    assert set(rows) == {entry.name for entry in ENTRIES if entry.weights == "unpublished"}
    figures = {name: re.search(r"(\S+) +([\d.]+)  +(?:[\d.]+ [kMGT]B|\?)$", line) for name, line in rows.items()}
    total, cost = re.fullmatch(r"\d+ cells +([\d.]+) +([\d.]+) +\S+ GB", table[-1]).groups()
    assert sum(float(f[1]) for f in figures.values()) == pytest.approx(float(total), abs=0.05 * len(rows))
    assert float(cost) == pytest.approx(2 * float(total), abs=0.2)
    assert max(map(len, out.splitlines())) <= 110
    assert not list(tmp_path.iterdir()) and hub.log == []
    # Every cell takes its first stage from the first of those that share it, which has its own.
    assert "its own" in rows["metasaug-inat18"] and "its own" in rows["focal-cifar10-lt-10"]
    assert rows["ce-inat18"].split()[5] == "metasaug-inat18"
    assert rows["metasaug-ldam-cifar100-lt-50"].split()[5] == "metasaug-cifar100-lt-50"


def test_hours_are_pictures_over_speed(capsys):
    """90 epochs of 115,846 pictures, and 20 in which each costs two forward passes of three."""
    rows = {line.split()[0]: line.split() for line in run(
        capsys, "release", "--dry-run", "--cells", "imagenet-lt", "--pictures-per-second", "imagenet-lt=100",
        "--price-per-hour", "3")[1].splitlines() if "imagenet-lt" in line[:21]}
    plain, second = (epochs * 115_846 / 100 / 3600 for epochs in (90, 20))
    assert rows["metasaug-imagenet-lt"][1:8] == [
        "90", "+", "20", f"{90 * 227 + 20 * 453:,}", "its", "own", f"{plain + second * 2 / 3:.1f}"]
    assert rows["ce-imagenet-lt"][4:8] == [f"{20 * 453:,}", "metasaug-imagenet-lt", f"{second / 3:.1f}",
                                           f"{second / 3 * 3:,.2f}"]


def test_a_backbone_that_stands_still_costs_forward_passes_and_cached_features_one_for_each_view():
    frozen, count = {"backbone": "timm:resnet50.a1_in1k", "epochs": 30, "stage2_epochs": 20}, 115_846
    for recipe, stages in [
            (ImageNetLT(), (90, 20 * 2 / 3)), (ImageNetLT(augment="none"), (90, 20 / 3)),
            (ImageNetLT(cache_features=4), (90, 4 / 3)), (ImageNetLT(**frozen), (10 / 3, 20 * 2 / 3)),
            (ImageNetLT(**frozen, cache_features=4), (4 / 3, 0)),
            (ImageNetLT(backbone="m", epochs=20, cache_features=2), (0, 2 / 3))]:
        assert work_of(recipe, None, 100).seconds == pytest.approx([n * count / 100 for n in stages])
    features = 4 * count * 2048 * 2
    with_them, without = (disk_of(ImageNetLT(cache_features=k), None, 1000) for k in (4, 0))
    assert with_them - without == features


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
    (("--cells", ","), ["--cells: which?"]),
    (("--cells", "inat18", "--no-publish", "--out", "/dev/null/x"), ["--out /dev/null/x cannot be written"]),
    (("--cells", "inat18", "--price-per-hour", "-1"), ["--price-per-hour -1.0: a number"]),
    (("--cells", "inat18", "--data", "inat19=x"), ["--data inat19=x: DATASET=VALUE", "inat18"]),
    (("--cells", "inat18", "--data", "inat18="), ["--data inat18=: DATASET=VALUE"]),
    (("--cells", "inat18", "--pictures-per-second", "fast"), ["--pictures-per-second fast: a number"]),
    (("--cells", "inat18", "--pictures-per-second", "inat18=-1"), ["--pictures-per-second -1: a number"]),
    (("--cells", "inat18", "--processes", "0"), ["--processes 0: at least 1"]),
    (("--cells", "inat18", "--", "--out", "x"), ["no --data, --out, --name"]),
    (("--cells", "inat18", "--", "--data", "x"), ["no --data, --out, --name"]),
    (("--cells", "inat18", "--", "--resume"), ["no --data, --out, --name"]),
    (("--cells", "inat18", "--", "epochs", "2"), ["epochs 2: cells are named with --cells"]),
    (("--cells", "inat18", "--", "--epochs", "two"), ["ce-inat18 does not take --epochs two"]),
    (("--cells", "inat18", "--", "--epochs", "-1"), ["--epochs -1: must be greater than 0"]),
    (("--cells", "inat18,ce-cifar10-lt-50", "--", "--skip-bad"), ["ce-cifar10-lt-50 does not take --skip-bad"]),
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
    # Given one data set of three, nobody logged in, and a full disk,
    make_imagenet_lt(tmp_path / "data" / "imagenet-lt")
    monkeypatch.setattr(releasing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    monkeypatch.setattr(releasing.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    # when a release is asked for, then one error has it all.
    code, out, err = run(capsys, "release", "--cells", "imagenet-lt,inat18,plankton,ce-cifar10-lt-10", "--again",
                         "--root", tmp_path / "data", "--out", tmp_path / "runs", "--owner", "me")
    assert code == 2 and "imagenet-lt: 17 training pictures in 3 classes" in out
    for told in ("Log in with a token that may write (`hf auth login`, or HF_TOKEN)", "visipedia/inat_comp",
                 "about 120 GB",
                 f"looked for in {tmp_path / 'data' / 'inat18'} (--data inat18=DIR", "National Data Science Bowl",
                 "cifar-10-batches-py", "need onnxscript: pip install 'metasaug[train]'", "1 MB free"):
        assert told in err, told
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".lock"]
    # Without --root it is asked for; a dry run tells of the data too, where it may be, and of nothing else.
    code, _, err = run(capsys, "release", "--cells", "inat18", "--out", tmp_path / "runs", "--no-publish")
    assert code == 2 and "Where is inat18? --root DIR, with inat18 in it, or --data inat18=DIR." in err
    code, out, _ = run(capsys, "release", "--dry-run", "--cells", "inat18", "--root", tmp_path / "data")
    assert code == 0 and "visipedia/inat_comp" in out and "Hub was not asked" in out


@pytest.mark.parametrize(("token", "owner", "told"), [
    ("hf_wrong", "me", "refuses the token"), (READER, "me", "may only read"),
    (WRITER, "somebody", "me is logged in to the Hub, and is not of somebody. It may write for me, lab")])
def test_a_token_that_may_not_publish_is_told_before_anything_is_trained(
        hub, tmp_path, capsys, monkeypatch, token, owner, told):
    monkeypatch.setattr(releasing.Children, "run", lambda *_: pytest.fail("something was begun"))
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
    assert code == 2 and "the classes have numbers for names" in err


# ---- what is out already ----


def test_what_is_bundled_is_out_and_made_again_only_on_request(capsys):
    code, out, _ = run(capsys, "release", "--dry-run", "--cells", "ce-cifar10-lt")
    assert code == 0 and "0 cells to do" in out and "out already (bundled)" in out and "hours" not in out
    code, out, _ = run(capsys, "release", "--dry-run", "--cells", "ce-cifar10-lt", "--again")
    assert code == 0 and "1 cell to do" in out and "ce-cifar10-lt  160 + 40" in out


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
    monkeypatch.setattr(releasing.Children, "run", lambda _self, words, *_: begun.append(words))
    arguments = list(ready(hub, tmp_path, monkeypatch))
    arguments[arguments.index(PAIR)] = "ce-imagenet-lt"
    # Given this very cell on the Hub, and nothing here, when it is released, then nothing is done.
    hub.add("me/ce-imagenet-lt", published_elsewhere(files, recipe))
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "0 cells to do" in out and "published already as hf:me/NAME: ce-imagenet-lt" in out
    head = json.loads(files[CONFIG])["metasaug"]["group_accuracy"]["head"]
    assert not begun and re.search(rf"^ce-imagenet-lt +[\d.]+% .* {head:.2%} ", out, re.MULTILINE)
    # Trained otherwise, it stays what it is, and is told; on request it is trained.
    hub.add("me/ce-imagenet-lt", published_elsewhere(files, {**recipe, "epochs": 90}))
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "trained otherwise (epochs 90, not 4). With --again it is replaced" in err and not begun
    arguments.insert(1, "--again")
    code, out, _ = run(capsys, *arguments)
    assert code == 1 and "training left no whole model" in out and len(begun) == 1


# ---- progress ----


def test_the_time_left_is_corrected_by_what_was_measured(monkeypatch):
    # Given a plan of 100 steps of plain training in 100 seconds, and 100 in 400,
    now, told, said = [0.0], [], []
    monkeypatch.setattr(release_runs.time, "monotonic", lambda: now[0])

    class Line:
        on_terminal = False

        def show(self, text):
            pass

        def say(self, text):
            said.append(text)

    def tell(left, pace):
        told.append((left, pace))
        return f"{left:.0f} s left"

    gauge = release_runs.Gauge(Work(200, 0.5, (100.0, 400.0)), tell, Line(), "8 minutes")
    gauge.look("loading\n")
    # when steps take three times as long as reckoned,
    for step in range(0, 101, 10):
        now[0] = 3.0 * step
        gauge.look(f" 10%|#  | {step}/200 [00:10<1:00,  1.20step/s, epoch 1/2 loss 1.0]\r")
    # then so will those of the second stage; after the first minutes it is told in a line that stays.
    assert told[-1] == (pytest.approx(1200), pytest.approx(3))
    assert len(said) == 1 and said[0] == "step 60 of 200, 1320 s left; at its start 8 minutes were reckoned"


@pytest.mark.parametrize(("output", "code", "told"), [
    ("50%|\nmetasaug train: the disk is full.\nMake room.\n", 2, "the disk is full.\nMake room."),
    ("Traceback (most recent call last):\n  File\nRuntimeError: CUDA error: misaligned\n", 1,
     "RuntimeError: CUDA error: misaligned"),
    # Two processes under torchrun: the second only lost the first.
    ("metasaug train: Make room.\nNow.\n\nmetasaug train: another process ended.\nE1125 03:57:27.428000 23 api.py:753] "
     "failed\nTraceback (most recent call last):\n", 1, "Make room.\nNow.\n\nmetasaug train: another process ended."),
    ("[rank1]: Traceback (most recent call last):\n[rank1]: torch.OutOfMemoryError: no memory\nTraceback\n"
     "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\nFailures:\n", 1,
     "[rank1]: torch.OutOfMemoryError: no memory"),
    ("metasaug train: Another process of this training is gone\n=====\nRoot Cause (first observed failure):\n[0]:\n"
     "  exitcode  : -9 (pid: 1526)  (SIGKILL)\n", 1, "ended by SIGKILL, as the system does where memory runs out"),
    ("metasaug train: Another process of this training is gone\n[rank1]: KeyError: 'x'\n", 1, "[rank1]: KeyError: 'x'"),
    ("50%|## |\r60%|## |", -9, "ended by SIGKILL, as the system does where memory runs out"),
    ("", 3, "exit code 3")])
def test_a_failure_is_told_in_the_trainings_own_words(output, code, told):
    assert release_runs.reason(output, code, "metasaug train") == told


def test_many_processes_are_torchruns():
    assert release_runs.launched(["train", "inat18"], 1) == ["-m", "metasaug", "train", "inat18"]
    assert release_runs.launched(["train", "inat18"], 8) == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8", "-m", "metasaug", "train", "inat18"]


def test_the_plan_in_the_docs_is_the_plan(capsys):
    page = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")
    command, shown = re.search(r"<!-- plan: metasaug (.+) -->\n```\n(.+?)\n```", page, re.DOTALL).groups()
    assert run(capsys, *command.split())[1].split("\n\n")[1] == shown
