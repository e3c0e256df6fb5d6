"""A run that is killed, stopped, or loses its newest checkpoint goes on to the bits of one that nobody disturbed.

Runs that die are processes of their own, forked from a server that has everything imported: no three seconds each.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from tests.test_datasets import write_class_folders  # noqa: E402
from tests.test_processes import free_port  # noqa: E402
from tests.test_training import (  # noqa: E402
    CPU,
    TINY,
    Killed,
    assert_same_bits,
    kill_after,
    log_without_times,
    small_data,
)
from training.data.datasets import LongTailed, PictureFiles, Split  # noqa: E402
from training.errors import DivergenceError, Interrupted, TrainingError  # noqa: E402
from training.network.distributed import joined  # noqa: E402
from training.run import checkpoints, evaluation, log, loop, stages, state  # noqa: E402
from training.run.steps import Stepper  # noqa: E402
from zoo.model_folder import ModelFolder  # noqa: E402

SAVED_ALWAYS = 1e-9  # minutes
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.test_resume"])

SMALL = dataclasses.replace(TINY, epochs=4, stage2_epochs=2)
FROZEN = {"stage2_trains": "classifier"}
ON_DISK = {"crops": "resized", "input_size": 16}
KILLED = {"diagonal, through the network, on disk": {"lookahead": "network", "covariance": "diagonal", **ON_DISK}}
KILLED_LONGER = KILLED | {"full covariances": {}, "heldout": {"augment": "heldout"},
                          "frozen, on cached features": {**FROZEN, "covariance": "diagonal", **ON_DISK,
                                                         "cache_features": 2},
                          "frozen, in closed form, on disk": {**FROZEN, "covariance": "diagonal", **ON_DISK},
                          "full covariances, through the network": {"lookahead": "network"},
                          "frozen, full covariances": FROZEN,
                          "plain, on disk": {"augment": "none", **ON_DISK}, "isda": {"augment": "isda"}}


# ---- runs in processes of their own ----


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> Path:
    """The pictures of `small_data` as files."""
    root = tmp_path_factory.mktemp("pictures")
    data = small_data()
    for split in ("train", "meta"):
        pictures = getattr(data, split)
        for i, picture in enumerate(pictures.pictures):
            Image.fromarray(picture).save(root / f"{split}-{i:03d}-{pictures.labels[i]}.png")
    return root


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory) -> Path:
    """Large enough that every epoch has some steps."""
    root = tmp_path_factory.mktemp("classes")
    write_class_folders(root, {"ant": 40, "bee": 30, "cat": 20}, size=(20, 20))
    return root


@pytest.fixture(scope="module")
def cifar_folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("small-cifar")
    write_class_folders(root / "train", {f"c{i}": 24 for i in range(10)})
    write_class_folders(root / "test", {f"c{i}": 3 for i in range(10)}, seed=1)
    return root


def data_of(recipe, root: Path) -> LongTailed:
    """In memory, or on disk where worker processes decode them."""
    data = small_data()
    if recipe.crops == "shift":
        return data

    def files(split):
        names = tuple(sorted(path.name for path in root.glob(f"{split}-*.png")))
        return PictureFiles(root, names, np.array([int(name[-5]) for name in names]))

    return dataclasses.replace(data, train=files("train"), meta=files("meta"))


def train(recipe, root: Path, folder: Path, workers: int = 0, before=None, arguments: tuple = (),
          save_minutes: float = SAVED_ALWAYS) -> None:
    """A run that saves after every step; `before(*arguments)` prepares its end."""
    if before is not None:
        before(*arguments)
    # Steps of 30 ms at least: a kill that is sent after a checkpoint arrives while there is work left.
    loop.run(recipe, data_of(recipe, root), folder, CPU, resume=True, save_minutes=save_minutes, workers=workers,
             on_progress=lambda _: time.sleep(0.03))


def started(target, *arguments) -> multiprocessing.process.BaseProcess:
    process = FORKED.Process(target=target, args=arguments)
    process.start()
    return process


def ended(process, within: float = 120) -> int:
    """Its exit code, negative for the signal that killed it."""
    process.join(within)
    alive = process.exitcode is None
    if alive:
        process.kill()
        process.join()
    assert not alive, f"still alive after {within} s"
    return process.exitcode


def flat(value, prefix="") -> dict:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}/{key}").items()}
    return {prefix: value}


def assert_same_run(one: Path, other: Path, from_line: int = 0) -> None:
    """The last checkpoints, all of them but times, and the logs but times; where stage 1 was taken over, from 2 on."""
    saved, again = (flat(checkpoints.load_newest(folder / "checkpoints")[1]) for folder in (one, other))
    assert saved.keys() == again.keys()
    for name in saved.keys() - {"/seconds", "/log_bytes"}:
        same = torch.equal(saved[name], again[name]) if torch.is_tensor(saved[name]) else saved[name] == again[name]
        assert same, name
    assert any("momentum_buffer" in name for name in saved)
    assert log_without_times(one)[from_line:] == log_without_times(other)


def assert_nothing_left_over(folder: Path) -> None:
    assert len(list((folder / "checkpoints").iterdir())) <= 2
    assert len(list((folder / "stage1").iterdir())) == 1
    assert not list(folder.rglob("*.tmp"))


def kill_at_random(recipe, root: Path, folder: Path, kills: int, rng) -> None:
    """Kill -9 some checkpoints and some milliseconds on, with other workers each time, then let it end. Each kill must
    hit a run that is on its way."""
    for _ in range(kills):
        process = started(train, recipe, root, folder, int(rng.integers(0, 3)))
        seen, enough = set(folder.glob("checkpoints/*.pt")), rng.integers(0, 3)
        enough += len(seen)
        while len(seen) < enough and process.exitcode is None:
            seen.update(folder.glob("checkpoints/*.pt"))
            time.sleep(0.01)
        process.join(rng.uniform(0, 0.05))
        process.kill()
        assert ended(process) == -signal.SIGKILL, "the run ended before its kill"
    assert ended(started(train, recipe, root, folder, 1)) == 0


@pytest.mark.parametrize("method", KILLED)
def test_a_run_killed_at_random_goes_on_to_the_same_bits(tmp_path, on_disk, method):
    # Given an undisturbed run,
    recipe = dataclasses.replace(SMALL, **KILLED[method], epochs=4)
    assert ended(started(train, recipe, on_disk, tmp_path / "whole")) == 0
    # when it is killed at random moments, saving always, then it ends with the same bits and leaves no litter.
    rng = np.random.default_rng(list(KILLED).index(method))
    kill_at_random(recipe, on_disk, tmp_path / "killed", 3, rng)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_nothing_left_over(tmp_path / "killed")


def test_pictures_read_from_disk_on_request_train_to_the_same_bits(tmp_path, on_disk, monkeypatch):
    # Given pictures on disk that fit into memory, when a run holds them, and another may not hold any,
    recipe = dataclasses.replace(SMALL, epochs=2, stage2_epochs=1, input_size=16)
    data = data_of(dataclasses.replace(recipe, crops="resized"), on_disk)
    loop.run(recipe, data, tmp_path / "held", CPU)
    for module in (loop, stages):
        monkeypatch.setattr(module, "hold", None)
    loop.run(recipe, data, tmp_path / "read", CPU, in_memory=False)
    # then they end with the same bits.
    assert_same_run(tmp_path / "held", tmp_path / "read")


@pytest.mark.promise("resume")
@pytest.mark.long
@pytest.mark.parametrize("method", KILLED_LONGER)
def test_many_kills_at_random_and_the_same_bits(tmp_path, on_disk, method, figure):
    recipe = dataclasses.replace(SMALL, **KILLED_LONGER[method], epochs=24, stage2_epochs=12)
    assert ended(started(train, recipe, on_disk, tmp_path / "whole"), 600) == 0
    rng = np.random.default_rng(100 + list(KILLED_LONGER).index(method))
    kill_at_random(recipe, on_disk, tmp_path / "killed", 15, rng)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_nothing_left_over(tmp_path / "killed")
    figure(f"15 kills of {method}: the same bits")


CIFAR = ["cifar10-lt", "--imbalance", "4", "--meta-per-class", "4", "--epochs", "30"]
FOLDER = ["folder", "--epochs", "60", "--batch-size", "8", "--architecture", "resnet8", "--input-size", "16",
          "--crops", "resized", "--save-minutes", "0.001"]


@pytest.mark.promise("resume")
@pytest.mark.long
@pytest.mark.parametrize("flags", [CIFAR, FOLDER], ids=["cifar, in memory", "folder, on disk"])
def test_the_command_killed_at_random_ends_in_the_same_bits_and_model(
    tmp_path, class_folders, cifar_folders, flags, figure
):
    """kill -9 of the real command from its first moment to its last, 50 times, with other workers each time."""
    data = cifar_folders if flags is CIFAR else class_folders
    rng = np.random.default_rng(0)

    def run(name: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "training", *flags, "--data", data, "--out", tmp_path / name,
                                 "--resume", "--workers", str(rng.integers(0, 3))],
                                stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert run("whole").wait() == 0
    hit = 0
    for _ in range(50):
        process = run("killed")
        time.sleep(rng.uniform(1, 6))
        process.kill()
        hit += process.wait() == -signal.SIGKILL
    while (process := run("killed")).wait() != 0:  # the last kill's workers may hold the folder for half a second
        time.sleep(1)
    assert hit >= 10
    figure(f"{hit} kills of `metasaug train {flags[0]}`: the same bits and model")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_nothing_left_over(tmp_path / "killed")
    ones, others = (ModelFolder(tmp_path / name / "model").weights() for name in ("whole", "killed"))
    assert all(np.array_equal(ones[name], others[name]) for name in ones)


# ---- killed at the worst moments ----


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(place: str, nth: int = 1) -> None:
    """This process kills itself when it comes to that place for the nth time."""
    import zoo.files

    calls = itertools.count(1)

    def dying(real, after=False, of=lambda *_: True):
        def call(*arguments, **named):
            hit = of(*arguments) and next(calls) == nth
            if hit and not after:
                die()
            result = real(*arguments, **named)
            return die() if hit else result

        return call

    class HalfWritten:
        def __init__(self, path):
            self.file = open(path, "wb", buffering=0)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise AssertionError("it is dead by now")

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            die()

    after = place.startswith("after")
    if place == "within the write":
        zoo.files.open = lambda *how: HalfWritten(how[0]) if next(calls) == nth else open(*how)  # noqa: SIM115
    elif place.endswith("the rename"):
        os.replace = dying(os.replace, after)
    elif place == "before the old one is dropped":
        Path.unlink = dying(Path.unlink, of=lambda path, *_: path.suffix == ".pt")
    elif place == "within the model folder":
        os.replace = dying(os.replace, of=lambda path, *_: "model" in Path(path).parts)
    elif place == "after the log line":
        log.Log.write = dying(log.Log.write, after)
    else:
        assert place.endswith("stage 1 is kept"), place
        checkpoints.save = dying(checkpoints.save, after, of=lambda folder, *_: folder.name == "stage1")


DEATHS = [("before the rename", 2), ("within the write", 3), ("before the old one is dropped", 3),
          ("before stage 1 is kept", 1), ("after stage 1 is kept", 1), ("within the write", 2),
          ("after the log line", 1), ("after the rename", 4)]


def test_a_run_killed_at_every_bad_moment_goes_on_to_the_same_bits(tmp_path):
    # Given an undisturbed run, and one that dies within writes of checkpoints, around them, between the log's line and
    # the checkpoint that knows of it, and twice while stage 1 is handed over,
    train(SMALL, tmp_path, tmp_path / "whole")
    for place, nth in DEATHS:
        code = ended(started(train, SMALL, tmp_path, tmp_path / "killed", 0, die_at, (place, nth)))
        assert code == -signal.SIGKILL, place
    # when it is let go, then it ends with the same bits, nothing is left over,
    assert ended(started(train, SMALL, tmp_path, tmp_path / "killed")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_nothing_left_over(tmp_path / "killed")
    # and the stage 1 that it handed over serves another run as its own would.
    loop.run(SMALL, small_data(), tmp_path / "shared", CPU, stage1=tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "shared", from_line=2)


@pytest.mark.promise("resume")
@pytest.mark.long
def test_a_run_killed_while_its_model_is_written_still_ends_in_a_whole_one(tmp_path, class_folders):
    # Given a run that dies at each file of its model folder in turn (weights, manifest, ONNX, card),
    for nth in range(1, 40):
        run = FORKED.Process(target=command, args=(tmp_path / "run", *words(class_folders, 2)), kwargs={"dies": nth})
        run.start()
        if (code := ended(run)) == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and nth > 6
    # when it goes on at last, then the folder is whole, and nothing else is in it.
    folder = ModelFolder(tmp_path / "run" / "model")
    folder.check()
    assert {"README.md", "onnx/model.onnx", "covariance.safetensors"} <= set(folder.files)
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.promise("checkpoint")
@pytest.mark.long
def test_a_run_on_a_disk_that_is_really_full_goes_on_once_there_is_room(tmp_path, class_folders):
    """A file system of its own, which only root can mount."""
    # Given the real command on a disk that something else fills, and again once that is gone,
    disk, done = tmp_path / "disk", tmp_path / "done"
    disk.mkdir()
    train = shlex.join([sys.executable, "-m", "metasaug", "train", *words(class_folders, 20), "--save-minutes", "1e-9",
                        "--out", f"{disk}/run"])
    mounted = subprocess.run(["unshare", "-m", "sh", "-ec", f"""
        mount -t tmpfs -o size=8m none {disk}
        touch {tmp_path}/mounted
        {train} 2> {tmp_path}/said &
        until [ -n "$(ls {disk}/run/checkpoints 2> {tmp_path}/none)" ]; do sleep 0.05; done
        dd if=/dev/zero of={disk}/filler bs=4k || true
        wait $! && exit 9
        find {disk} -name '*.tmp' > {tmp_path}/litter
        rm {disk}/filler
        {train}
        cp -r {disk}/run {done}"""], check=False)
    if not (tmp_path / "mounted").exists():
        pytest.skip("no file system can be mounted here: it takes root")
    # then it ended with a sentence, left no half file, and went on to the bits of an undisturbed run.
    assert mounted.returncode == 0
    assert "No space left" in (tmp_path / "said").read_text() and "Traceback" not in (tmp_path / "said").read_text()
    assert not (tmp_path / "litter").read_text()
    assert subprocess.run([*shlex.split(train)[:-1], tmp_path / "whole"]).returncode == 0
    ones, others = (ModelFolder(folder / "model").weights() for folder in (tmp_path / "whole", done))
    assert all(np.array_equal(ones[name], others[name]) for name in ones)


# ---- checkpoints within an epoch ----


def test_checkpoints_within_an_epoch_lose_no_step(tmp_path):
    # Given a run that saves after every step, when it is killed in the middle of epochs of both stages,
    whole, _ = loop.run(SMALL, small_data(), tmp_path / "whole", CPU)
    steps = []
    for after in (7, 11):
        with pytest.raises(Killed):
            loop.run(SMALL, small_data(), tmp_path / "killed", CPU, resume=True,
                     save_minutes=SAVED_ALWAYS, on_progress=kill_after(after))
    resumed, _ = loop.run(SMALL, small_data(), tmp_path / "killed", CPU, resume=True,
                          on_progress=lambda state: steps.append((state.epoch, state.step)))
    # then it goes on at the step that was not saved, and ends with the bits and log of an undisturbed one.
    assert steps[0] == (3, 4)  # 7 + 11 steps at 5 an epoch; the killed one is taken again
    assert_same_bits(whole, resumed)
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")


def test_no_minutes_save_at_the_end_of_epochs_only(tmp_path):
    with pytest.raises(Killed):
        loop.run(TINY, small_data(), tmp_path, CPU, save_minutes=0, on_progress=kill_after(19))
    assert sorted(path.name[:18] for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00002-0000000", "step-00003-0000000"]


def test_dropout_is_drawn_again_as_it_was(tmp_path, monkeypatch):
    """Its draws once came from torch's own stream, which no checkpoint keeps."""
    # Given a network with dropout,
    real = state.create

    def with_dropout(*arguments):
        module = real(*arguments)
        module.layer1.add_module("dropout", torch.nn.Dropout(0.5))
        return module

    monkeypatch.setattr(state, "create", with_dropout)
    recipe = dataclasses.replace(SMALL, epochs=2, stage2_epochs=1)
    # when its run is killed and goes on, then its bits are those of an undisturbed one.
    whole, _ = loop.run(recipe, small_data(), tmp_path / "whole", CPU)
    with pytest.raises(Killed):
        loop.run(recipe, small_data(), tmp_path / "killed", CPU, save_minutes=SAVED_ALWAYS, on_progress=kill_after(7))
    resumed, _ = loop.run(recipe, small_data(), tmp_path / "killed", CPU, resume=True)
    assert_same_bits(whole, resumed)


# ---- many processes ----


def train_among(rank: int, port: int, recipe, folder: Path, save_minutes: float, kill_after_steps: int = 0) -> None:
    """One of three processes that train together."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    taken = itertools.count(1)
    with joined("cpu") as processes:
        loop.run(recipe, small_data(), folder, CPU, resume=True, save_minutes=save_minutes, processes=processes,
                 on_progress=lambda _: die() if next(taken) == kill_after_steps else None)


@pytest.mark.promise("resume")
@pytest.mark.long
def test_three_processes_killed_go_on_to_the_same_bits(tmp_path):
    """The mean of three equal numbers is not always that number: each checkpoint once moved the weights a little."""
    # Given three processes that train undisturbed, when others save always and are killed and go on,
    recipe = dataclasses.replace(SMALL, epochs=2, stage2_epochs=1, lookahead="network")

    def run(*how) -> list[int]:
        port = free_port()
        three = [started(train_among, rank, port, recipe, *how) for rank in range(3)]
        return [ended(process) for process in three]

    assert run(tmp_path / "whole", 0) == [0, 0, 0]
    assert run(tmp_path / "killed", SAVED_ALWAYS, 7) == [-signal.SIGKILL] * 3
    assert run(tmp_path / "killed", SAVED_ALWAYS) == [0, 0, 0]
    # then the bits are the same.
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_nothing_left_over(tmp_path / "killed")


# ---- damage, full disks ----


@pytest.mark.parametrize("damage", ["cut off", "flipped", "emptied"])
def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_bit(tmp_path, damage):
    # Given a killed run whose newest checkpoint is damaged somewhere,
    recipe = dataclasses.replace(SMALL, epochs=2, stage2_epochs=1)
    whole, _ = loop.run(recipe, small_data(), tmp_path / "whole", CPU)
    with pytest.raises(Killed):
        loop.run(recipe, small_data(), tmp_path / "hurt", CPU, save_minutes=SAVED_ALWAYS, on_progress=kill_after(7))
    newest = max((tmp_path / "hurt" / "checkpoints").iterdir())
    content = bytearray(newest.read_bytes())
    where = np.random.default_rng(5).integers(len(content))
    content[where] ^= 16
    newest.write_bytes({"cut off": content[:where], "flipped": content, "emptied": b""}[damage])
    # when it goes on, then it names the damaged one, takes the one before, and ends with the same bits and log.
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged.*Falling back"):
        resumed, _ = loop.run(recipe, small_data(), tmp_path / "hurt", CPU, resume=True)
    assert_same_bits(whole, resumed)
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "hurt")


def with_little_room(megabytes: float) -> None:
    """No file of this process may grow past that: writes fail as on a full disk. (Its progress bar may be a file.)"""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6), resource.RLIM_INFINITY))


def told(said: Path, *arguments) -> None:
    """As `train`, its error told as the command line does: in a sentence, with exit code 2."""
    try:
        train(*arguments)
    except TrainingError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(str(error))
        sys.exit(2)


@pytest.mark.parametrize(("megabytes", "which", "save_minutes"), [
    (0.2, "checkpoints/", SAVED_ALWAYS), pytest.param(0.2, "stage1/", 0, marks=pytest.mark.long),
    (0.00015, "log.jsonl", 0)])
def test_a_full_disk_ends_the_run_in_a_sentence_and_loses_nothing(tmp_path, megabytes, which, save_minutes):
    # Given a run that was killed after its first epoch, and a disk with room for the log but no checkpoint, or neither,
    recipe = dataclasses.replace(SMALL, epochs=3, stage2_epochs=1)
    whole, _ = loop.run(recipe, small_data(), tmp_path / "whole", CPU)
    with pytest.raises(Killed):
        loop.run(recipe, small_data(), tmp_path / "full", CPU, on_progress=kill_after(7))
    before = sorted((tmp_path / "full").rglob("*"))
    # when it goes on, then it ends with the file that could not be written and what to do,
    run = started(told, tmp_path / "said", recipe, tmp_path, tmp_path / "full", 0, with_little_room, (megabytes,),
                  save_minutes)
    assert ended(run) == 2
    said = (tmp_path / "said").read_text()
    assert which in said and "File too large" in said and "--resume" in said
    # what stood there stands, and no half of a file beside it,
    assert [path for path in sorted((tmp_path / "full").rglob("*")) if path.name != "stage1"] == before
    # and with room again it goes on to the same bits.
    resumed, _ = loop.run(recipe, small_data(), tmp_path / "full", CPU, resume=True)
    assert_same_bits(whole, resumed)
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "full")


# ---- signals ----


def test_a_stop_signal_during_a_look_at_the_test_set_does_not_wait_for_its_end(tmp_path, monkeypatch):
    # Given a run that receives SIGTERM while it looks at the test set,
    recipe = dataclasses.replace(SMALL, epochs=2, stage2_epochs=1)
    whole, _ = loop.run(recipe, small_data(), tmp_path / "whole", CPU, evaluate_every=1)
    real = evaluation.in_order

    def interrupting(*arguments):
        yield from real(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from real(*arguments)

    monkeypatch.setattr(evaluation, "in_order", interrupting)
    # when it stops, then all steps of the epoch are saved; it goes on with the look, and takes no step twice.
    with pytest.raises(Interrupted, match="epoch 1, after step 5") as caught:
        loop.run(recipe, small_data(), tmp_path / "stopped", CPU, evaluate_every=1)
    assert caught.value.exit_code == 143
    monkeypatch.undo()
    taken = []
    resumed, _ = loop.run(recipe, small_data(), tmp_path / "stopped", CPU, resume=True, evaluate_every=1,
                          on_progress=lambda state: taken.append((state.epoch, state.step)))
    assert taken[0] == (1, 1)
    assert_same_bits(whole, resumed)
    assert log_without_times(tmp_path / "stopped") == log_without_times(tmp_path / "whole")


def command(folder: Path, *words: str, group: bool = False, endless: Path | None = None, dies: int = 0) -> None:
    """`metasaug train …` of a process of its own.

    endless   touched within a step that does not end          dies   at this file of the model folder
    """
    import metasaug

    if dies:
        die_at("within the model folder", dies)
    if group:
        os.setsid()
    if endless is not None:
        def step(*_):
            endless.touch()
            time.sleep(600)

        Stepper.step = step
    sys.exit(metasaug.main(["train", *words, "--out", str(folder)]))


def words(class_folders: Path, epochs: int = 40) -> list[str]:
    return ["folder", "--data", str(class_folders), "--epochs", str(epochs), "--batch-size", "8", "--input-size", "16",
            "--architecture", "resnet8", "--crops", "resized", "--workers", "2", "--device", "cpu", "--resume"]


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long)])
def test_a_stop_signal_to_the_whole_terminal_saves_and_has_its_exit_code(tmp_path, class_folders, number, code):
    """Ctrl-C and the end of a terminal reach the worker processes as well; some schedulers send SIGTERM to all."""
    # Given the real command with worker processes, in a group of its own, some steps on its way,
    run = FORKED.Process(target=command, args=(tmp_path / "run", *words(class_folders), "--save-minutes", "1e-9"),
                         kwargs={"group": True})
    run.start()
    wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-0000[1-9]*")), run)
    # when the signal reaches all of them, then the run is saved, and leaves with its code, and nobody stays.
    os.killpg(run.pid, number)
    assert ended(run, 60) == code
    _, saved = checkpoints.load_newest(tmp_path / "run" / "checkpoints")
    assert saved["step"] > 0 or saved["epoch"] > 0
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(run.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_stop_signal_ends_it_at_once(tmp_path, class_folders, number, code):
    # Given a run within a step that does not end, when it is told to stop, then it waits for the step;
    run = FORKED.Process(target=command, args=(tmp_path / "run", *words(class_folders)),
                         kwargs={"endless": tmp_path / "in-step"})
    run.start()
    wait_for((tmp_path / "in-step").exists, run)
    os.kill(run.pid, number)
    run.join(1)
    assert run.exitcode is None
    # told again, it is gone.
    os.kill(run.pid, number)
    assert ended(run, 30) == code


def wait_for(there, process, within: float = 120) -> None:
    end = time.monotonic() + within
    while not there():
        assert time.monotonic() < end and process.exitcode is None, process.exitcode
        time.sleep(0.02)


def test_a_killed_worker_is_told_in_a_sentence(tmp_path, on_disk):
    # Given a run with a worker, when that is killed from outside, then the run says so and how to go on.
    recipe = dataclasses.replace(SMALL, **ON_DISK, epochs=40)
    run = started(told, tmp_path / "said", recipe, on_disk, tmp_path / "run", 1)
    wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")), run)
    while run.exitcode is None:  # there is none between two epochs
        for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        run.join(0.1)
    assert ended(run) == 2
    assert "--resume and fewer --workers" in (tmp_path / "said").read_text()


def test_workers_leave_when_their_run_is_killed(tmp_path, class_folders):
    """Such a worker once waited for ever to hand over its pictures, and held the lock of the run folder."""
    # Given a run with workers, when it alone is killed with -9,
    run = FORKED.Process(target=command, args=(tmp_path / "run", *words(class_folders), "--save-minutes", "1e-9"),
                         kwargs={"group": True})
    run.start()
    wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")), run)
    run.kill()
    assert ended(run) == -signal.SIGKILL
    # then its workers are gone within seconds, and the folder is free for the next one.
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(run.pid, 0)
            time.sleep(0.1)
    from training.run.run_folder import alone_in

    with alone_in(tmp_path / "run"):
        pass


# ---- what must never be saved ----


@pytest.mark.parametrize("at", [(3, 2), (2, 5)], ids=["mid-epoch", "at its end"])
@pytest.mark.parametrize("where", ["weight", "statistics", "momentum", "covariance", "learned"])
def test_a_number_that_is_not_finite_is_never_saved(tmp_path, where, at):
    # Given a run in stage 2 into whose state a NaN or an infinity comes, in a step or just before a checkpoint,
    def poison(state):
        if (state.epoch, state.step) == at:
            {"weight": state.module.fc.weight.data, "statistics": state.module.bn1.running_var,
             "momentum": next(iter(state.optimizer.state.values()))["momentum_buffer"],
             "covariance": state.covariance.covariance, "learned": state.learned.delta}[where][0] = float("inf")

    # when it trains, then it stops by name, and what it saved is whole and finite; without the poison it goes on.
    with pytest.raises(DivergenceError, match=r"not finite.*last checkpoint is good"):
        loop.run(SMALL, small_data(), tmp_path, CPU, on_progress=poison)
    saved = flat(checkpoints.load_newest(tmp_path / "checkpoints")[1])
    assert all(value.isfinite().all() for value in saved.values() if torch.is_tensor(value))
    assert saved["/epoch"] == at[0]


# ---- what a run goes on from ----


def test_a_checkpoint_of_before_a_flag_existed_still_serves(tmp_path):
    # Given a run killed in stage 2, by a version that knew neither --flips nor kept which pictures it had,
    def aged(folder):
        path, saved = checkpoints.load_newest(folder)
        key = json.loads(saved["stage1_key"])
        for kept in (saved["recipe"], key):
            del kept["flips"]
        del saved["data"]
        path.unlink()
        checkpoints.save(folder, saved | {"stage1_key": json.dumps(key)}, saved["epoch"], saved["step"])

    whole, _ = loop.run(TINY, small_data(), tmp_path / "whole", CPU)
    with pytest.raises(Killed):
        loop.run(TINY, small_data(), tmp_path / "old", CPU, on_progress=kill_after(22))
    aged(tmp_path / "old" / "checkpoints")
    aged(tmp_path / "old" / "stage1")
    # when it goes on, or its stage 1 serves another, then the flag counts as having had its default,
    resumed, _ = loop.run(TINY, small_data(), tmp_path / "old", CPU, resume=True)
    assert_same_bits(whole, resumed)
    shared, _ = loop.run(TINY, small_data(), tmp_path / "shared", CPU, stage1=tmp_path / "old")
    assert_same_bits(whole, shared)
    # and another value than the default is refused by name.
    aged(tmp_path / "shared" / "checkpoints")
    other = dataclasses.replace(TINY, flips="none")
    with pytest.raises(TrainingError, match="other settings: flips mirror"):
        loop.run(other, small_data(), tmp_path / "shared", CPU, resume=True)
    with pytest.raises(TrainingError, match="flips mirror, not none"):
        loop.run(other, small_data(), tmp_path / "new", CPU, stage1=tmp_path / "old")


def test_a_run_does_not_go_on_with_other_pictures(tmp_path):
    # Given a run that was stopped, and a picture that is gone, or has another label, when it should go on,
    plain = dataclasses.replace(TINY, epochs=2, augment="none")
    data = small_data()
    with pytest.raises(Killed):
        loop.run(plain, data, tmp_path / "run", CPU, on_progress=kill_after(7))
    fewer = dataclasses.replace(data, train=Split(data.train.pictures[:-1], data.train.labels[:-1]))
    labels = data.train.labels.copy()
    labels[[0, -1]] = labels[[-1, 0]]
    swapped = dataclasses.replace(data, train=Split(data.train.pictures, labels))
    renamed = dataclasses.replace(data, label_names=("a", "b", "z"))
    # then it is refused with what differs; so is a stage 1 of other pictures.
    for other, what in ((fewer, "c had 10 training pictures and has 9"), (swapped, "but not the same"),
                        (renamed, "z had no training pictures and has 10")):
        with pytest.raises(TrainingError, match=what):
            loop.run(plain, other, tmp_path / "run", CPU, resume=True)
        with pytest.raises(TrainingError, match=what):
            loop.run(plain, other, tmp_path / "new", CPU, stage1=tmp_path / "run")
