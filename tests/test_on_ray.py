"""`metasaug predict --ray` on a real cluster of this machine: the same rows as without, even if a worker dies."""

import csv
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import zoo
from tests.test_command_line import run
from tests.test_predict_runs import ROOT, paint, predict
from zoo import on_ray
from zoo.errors import ZooError
from zoo.rows import Layout

ray = pytest.importorskip("ray", reason="Ray is not installed")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_rows(ones: list[dict[str, str]], others: list[dict[str, str]]) -> None:
    """In the same order, to the last digit but one: a batch of another size may round otherwise."""
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        numbers = [name for name, cell in one.items() if cell.replace(".", "", 1).isdigit()]
        assert {**one, **dict.fromkeys(numbers)} == {**other, **dict.fromkeys(numbers)}
        assert [float(one[name]) for name in numbers] == pytest.approx([float(other[name]) for name in numbers],
                                                                       abs=2e-6)


def workers() -> list[int]:
    """The processes that hold the model: Ray names a process after what it does."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"_Worker" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            pass
    return found


def test_a_worker_dies_and_no_row_is_lost_or_doubled(capsys, tmp_path, monkeypatch):
    # Given 3,000 pictures, some bad, at a relative path, and their rows from one machine,
    monkeypatch.chdir(ROOT)
    pictures = os.path.relpath(paint(tmp_path / "in", 3000, bad=9), ROOT)
    whole, out = tmp_path / "whole.csv", tmp_path / "rows.csv"
    arguments = ["metasaug-cifar10-lt", pictures, "--batch", "16", "--exclude", "cat", "--coverage", "0.9"]
    assert run(capsys, "predict", *arguments, "--out", whole)[0] == 1
    # when two workers compute them, and one is killed half way,
    process = predict(*arguments, "--out", out, "--ray", "--workers", "2")
    killed = 0
    while process.poll() is None:
        if not killed and out.exists() and len(out.read_bytes().splitlines()) > 300 and (found := workers()):
            os.kill(found[0], signal.SIGKILL)
            killed += 1
        time.sleep(0.02)
    # then nothing is lost or doubled, and the order is the same.
    said = process.communicate()[1]
    assert (process.returncode, killed) == (1, 1), said
    assert_same_rows(rows(out), rows(whole))


@pytest.mark.long
def test_a_stopped_run_goes_on_with_or_without_ray(capsys, tiny_model_folder, tmp_path):
    pictures, whole, out = paint(tmp_path / "in", 2000), tmp_path / "whole.csv", tmp_path / "rows.csv"
    arguments = [tiny_model_folder, pictures, "--batch", "16"]
    assert run(capsys, "predict", *arguments, "--out", whole)[0] == 0
    process = predict(*arguments, "--out", out, "--ray", "--workers", "2")
    while process.poll() is None and (not out.exists() or len(out.read_bytes().splitlines()) < 300):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143 and "--resume" in said and "Traceback" not in said, said
    assert 300 <= len(rows(out)) < 2000
    assert run(capsys, "predict", *arguments, "--out", out, "--resume")[0] == 0
    assert_same_rows(rows(out), rows(whole))


class Bomb:
    """Ends the process that unpacks it."""

    def __reduce__(self):
        return os._exit, (1,)


def job_of(folder: Path) -> on_ray.Job:
    model = zoo.load(folder)
    return on_ray.Job(os.getcwd(), str(folder), "onnx", "cpu", "fp32", model.reading, False, model.classes,
                      on_ray.model_files(model), Layout(), None, 16)


@pytest.mark.long
def test_pictures_on_which_every_worker_dies_end_the_run(tiny_model_folder):
    with on_ray.cluster(), pytest.raises(ZooError, match="--ray"):
        list(on_ray.predict_each(job_of(tiny_model_folder), [Bomb()], workers=1))


def test_it_needs_a_file_and_the_same_model_everywhere(capsys, tiny_model_folder, tmp_path):
    code, _, said = run(capsys, "predict", tiny_model_folder, paint(tmp_path / "in", 2), "--ray")
    assert code == 2 and "--out FILE" in said
    with pytest.raises(ZooError, match="another model"):
        on_ray._Worker(replace(job_of(tiny_model_folder), files={"config.json": "0" * 64}), 1)
