"""Minutes of a GPU as one command: rehearsed here on the CPU, with tiny pictures and without what is missing there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import ledger, on_gpu
from benchmarks.picture_pack import find_packs, read_pack, write_pack
from tests.test_datasets import write_class_folders
from training.data.cifar import cut_pool, find_pool
from training.errors import DataError
from training.recipes import Cifar10LT

ROOT = Path(__file__).resolve().parent.parent
TINY = """metric = "error"
tests = "every epoch of stage 2"
[methods]
ce = { augment = "none", class_weights = "none" }
broken = { augment = "none", stage2_lr = 1e30 }
isda = { augment = "isda" }
[sets.cifar10-lt-2]
train_pictures = 30
[sets.cifar10-lt-2.recipe]
dataset = "cifar10-lt"
architecture = "resnet8"
imbalance = 2
epochs = 3
stage2_epochs = 2
meta_per_class = 2
batch_size = 10
subset = "authors"
subset_seed = 0
[[cells]]
set = ["cifar10-lt-2"]
seeds = [0]
methods = ["ce", "broken", "isda"]
"""


@pytest.fixture
def folders(tmp_path) -> Path:
    for part, count, seed in (("train", 6, 0), ("test", 2, 1)):
        write_class_folders(tmp_path / part, {f"c{i}": count for i in range(10)}, seed=seed)
    return tmp_path


def same(a, b) -> bool:
    return a.identity() == b.identity() and a.notes == b.notes and a.source == b.source and all(
        np.array_equal(x.pictures, y.pictures) and np.array_equal(x.labels, y.labels)
        for x, y in ((a.train, b.train), (a.meta, b.meta), (a.test, b.test)))


@pytest.mark.parametrize("subset", ["authors", "seeded"])
def test_a_pack_gives_the_arrays_of_the_folders(folders, subset):
    # Given a data set with a copy of a test picture among its training pictures, packed in several parts,
    (folders / "train" / "c1" / "copy.png").write_bytes(next((folders / "test" / "c1").iterdir()).read_bytes())
    pool, recipe = find_pool("cifar10-lt", folders), Cifar10LT(imbalance=2, meta_per_class=2, subset=subset)
    parts = write_pack(folders, "cifar10-lt", pool, [recipe], 10_000)
    assert len(parts) > 1
    # when it is read, then training, meta and test set are those of the folders.
    back = read_pack(find_packs([folders])["cifar10-lt"])
    how = (recipe.imbalance, recipe.meta_per_class, recipe.subset_seed, recipe.subset)
    assert same(cut_pool(back, *how), cut_pool(pool, *how))
    # What it does not hold is refused, and a pack that lacks a part is none.
    with pytest.raises(DataError, match="does not hold"):
        cut_pool(back, 1, *how[1:])
    parts[0].unlink()
    assert not find_packs([folders])


# A machine where neither the distribution nor tyro is installed.
BARE = """
import importlib.metadata, runpy, sys
real = importlib.metadata.version
def version(name):
    if name == "metasaug":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tyro", "docstring_parser", "typeguard"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Every Python that is started from now on is such a machine's."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BARE)
    monkeypatch.setattr(on_gpu, "_environment", lambda processes=1: {
        **os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"})
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("stopped_first", [pytest.param(each, marks=pytest.mark.long) for each in (False, True)])
def test_the_whole_command_on_a_bare_machine_and_the_way_back(folders, bare, stopped_first):
    # Given a tiny protocol with a cell that diverges, its pack, and a Python without tyro and without the distribution,
    listed = folders / "tiny.toml"
    listed.write_text(TINY)
    protocol = ledger.Protocol(listed)
    on_gpu.pack(folders / "packs", protocol, {"cifar10-lt": folders}, 2, 13)
    out, runs = folders / "out", folders / "runs"

    def there(minutes: float) -> str:
        command = ["--minutes", str(minutes), "--out", str(out), "--runs", str(runs), "--protocol", str(listed),
                   "--workers", "2", "--parts", "cells", "--data", str(folders / "packs")]
        done = subprocess.run([sys.executable, "-m", "benchmarks.on_gpu", *command], cwd=ROOT, env=bare,
                              capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # when the command is run there (in the long form for too short a time first),
    told = there(0.5) if stopped_first else ""
    told += there(6)
    assert told.count("packed:") == 1 + stopped_first
    # then each cell is told on a line, and what comes back are few files of plain names, with rows and models.
    assert "cifar10-lt-2/ce/0: last" in told and "cifar10-lt-2/isda/0: last" in told, told
    assert {file.name for file in out.iterdir()} == {"results.json", "logs.tar.gz", "runs-1.tar"}
    # The one that diverges was tried twice, says why, and took nothing with it.
    failures = json.loads((out / "results.json").read_text())["failures"]
    assert [(failure["task"], failure["graphs"]) for failure in failures] == [
        ("cifar10-lt-2/0/broken", True), ("cifar10-lt-2/0/broken", False)]
    assert "DivergenceError" in failures[0]["error"][-1]
    # Merged here, the rows stand in the results, in the protocol's order, and the models open.
    results = folders / "results.json"
    on_gpu.merge(out, folders / "here", protocol, results)
    rows = ledger.rows_in(results)
    assert [row["method"] for row in rows] == ["ce", "isda"]
    assert [cell.method for cell in protocol.missing(results)] == ["broken"]
    for row in rows:
        assert [line["epoch"] for line in row["stage2_log"]] == [2, 3] and len(row["tests"]) == 2
        assert row["best"]["error"] == pytest.approx(min(row["tests"]), abs=1e-4)
        assert row["mean_of_last_10"] == pytest.approx(np.mean(row["tests"]), abs=1e-4)
        config = json.loads((folders / "here" / ledger.cell_of(row).folder / "model" / "config.json").read_text())
        assert config["metasaug"]["results"]["error"] == row["error"]
        assert "--subset authors" in config["metasaug"]["command"]
    # Merged again, nothing changes.
    on_gpu.merge(out, folders / "here", protocol, results)
    assert ledger.rows_in(results) == rows
