"""A run that is killed, stopped, or loses its newest checkpoint goes on to the bits of one that nobody disturbed."""

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")

from tests.test_training import (  # noqa: E402
    CPU,
    METHODS,
    TINY,
    Killed,
    assert_same_bits,
    kill_after,
    log_without_times,
    small_data,
)
from training import checkpoints, loop  # noqa: E402
from training.datasets import Split  # noqa: E402
from training.errors import TrainingError  # noqa: E402

SAVED_ALWAYS = 1e-9  # minutes

# ---- checkpoints within an epoch ----


@pytest.mark.parametrize("method", ["plain", "metasaug"])
def test_checkpoints_within_an_epoch_lose_no_step(tmp_path, method):
    # Given a run that saves after every step, and one that nobody disturbs,
    recipe = dataclasses.replace(TINY, **METHODS[method])
    whole, _ = loop.run(recipe, small_data(), tmp_path / "whole", CPU)
    # when it is killed in the middle of epochs of both stages,
    steps = []
    for after in (7, 15):
        with pytest.raises(Killed):
            loop.run(recipe, small_data(), tmp_path / "killed", CPU, resume=True, save_every=100,
                     save_minutes=SAVED_ALWAYS, on_progress=kill_after(after))
    resumed, _ = loop.run(recipe, small_data(), tmp_path / "killed", CPU, resume=True, save_every=100,
                          on_progress=lambda state: steps.append((state.epoch, state.step)))
    # then it goes on at the step that was not saved, and ends with the same bits and log.
    assert steps[0] == (4, 3)  # 7 + 15 steps at 5 an epoch; the killed one is taken again
    assert_same_bits(whole, resumed)
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")


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
