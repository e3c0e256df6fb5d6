"""Resume state is whole or not there."""

import errno
import os

import pytest

torch = pytest.importorskip("torch")

from training.errors import TrainingError  # noqa: E402
from training.run import checkpoints  # noqa: E402

pytestmark = pytest.mark.promise("checkpoint")


def state(value: float) -> dict:
    return {"weights": torch.full((100,), value), "epoch": int(value)}


def test_the_newest_two_are_kept_and_the_newest_is_found(tmp_path):
    for epoch in range(5):
        checkpoints.save(tmp_path, state(epoch), epoch, 0)
    assert len(list(tmp_path.iterdir())) == 2
    _, loaded = checkpoints.load_newest(tmp_path)
    assert loaded["epoch"] == 4
    assert torch.equal(loaded["weights"], torch.full((100,), 4.0))


@pytest.mark.parametrize("at", [0, 1, 100, -1])
def test_a_truncated_newest_falls_back_loudly(tmp_path, at):
    # Given two checkpoints, the newer cut off somewhere,
    checkpoints.save(tmp_path, state(1), 1, 0)
    newer = checkpoints.save(tmp_path, state(2), 2, 0)
    newer.write_bytes(newer.read_bytes()[:at])
    # when resuming, then the older one is used and the damaged one named.
    with pytest.warns(UserWarning, match=newer.name):
        _, loaded = checkpoints.load_newest(tmp_path)
    assert loaded["epoch"] == 1


def test_every_flipped_bit_is_noticed(tmp_path):
    path = checkpoints.save(tmp_path, state(1), 1, 0)
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        broken = bytearray(whole)
        broken[position] ^= 1 << (position % 8)
        path.write_bytes(broken)
        with pytest.raises(TrainingError, match="damaged"):
            checkpoints.load(path)


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, fails):
    # Given a whole file, and a disk that is full at some point of the next write,
    path = tmp_path / "state"
    checkpoints.write(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "write":
        real = open

        class Full:
            def __init__(self, *args):
                self.file = real(*args)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            write = full

        monkeypatch.setattr("builtins.open", Full)
    else:
        monkeypatch.setattr(os, fails, full)
    # when it is written again, then the error says so, the old content stands, and nothing else is there.
    with pytest.raises(TrainingError, match="No space left"):
        checkpoints.write(path, b"new" * 1000)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_in_a_checkpoint_can_run(tmp_path):
    """A pickle with a payload under a matching digest is refused by torch's weights-only reader."""
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    path = checkpoints.save(tmp_path, {"weights": Evil()}, 1, 0)
    with pytest.raises(TrainingError, match="refused"):
        checkpoints.load(path)
    assert not canary.exists()


def test_what_damage_and_kills_leave_is_cleared_away_by_the_next_write(tmp_path):
    """A damaged newest file once counted among the two that are kept."""
    # Given a good checkpoint, a damaged one after it, and a temporary file of a kill inside a write,
    checkpoints.save(tmp_path, state(1), 1, 0)
    damaged = checkpoints.save(tmp_path, state(3), 3, 0)
    damaged.write_bytes(b"")
    (tmp_path / f".{damaged.name}.77.tmp").write_bytes(b"half")
    # when the run goes on from the good one and saves again,
    new = checkpoints.save(tmp_path, state(2), 2, 0)
    # then the two whole ones stand there and nothing else.
    assert {path.name.split("-")[1] for path in tmp_path.iterdir()} == {"00001", "00002"}
    assert checkpoints.load_newest(tmp_path)[1]["epoch"] == 2
    new.write_bytes(b"")
    with pytest.warns(UserWarning, match="Falling back"):
        assert checkpoints.load_newest(tmp_path)[1]["epoch"] == 1


def test_where_every_checkpoint_is_damaged_nothing_starts_again_unasked(tmp_path):
    for epoch in (1, 2):
        path = checkpoints.save(tmp_path, state(epoch), epoch, 0)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(TrainingError, match=r"is whole .*--out"):
        checkpoints.load_newest(tmp_path)
