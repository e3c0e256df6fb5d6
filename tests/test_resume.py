"""A run that is killed, stopped, or loses its newest checkpoint goes on to the bits of one that nobody disturbed."""

import dataclasses

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
from training import loop  # noqa: E402

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
