"""The registry proves itself, and names are honest and forgiving."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest

import zoo
from zoo.errors import ModelFolderError, UnknownModelError, UnpublishedModelError, ZooError
from zoo.model_folder import CARD, ONNX, WEIGHTS, ModelFolder
from zoo.registry import HERE

BUNDLED = [entry for entry in zoo.list_models() if entry.weights == "bundled"]
UNPUBLISHED = [entry for entry in zoo.list_models() if entry.weights == "unpublished"]
every_bundled = pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.name)


# ---- the registry ----


def test_every_entry_has_what_a_user_reads():
    entries = zoo.list_models()
    assert len({entry.name for entry in entries}) == len(entries)
    weights = [entry.weights for entry in entries]
    assert set(weights) == {"bundled", "unpublished"} and weights == sorted(weights)  # bundled ones first
    for entry in entries:
        assert entry.name == entry.name.lower() and "/" not in entry.name and entry.dataset and entry.summary
        assert entry.imbalance is None or entry.imbalance >= 1
        assert entry.published_error is None or 0 < entry.published_error < 1
        assert (entry.published_error is None) == (entry.published_source is None)


def test_the_list_is_a_copy():
    zoo.list_models().clear()
    assert zoo.list_models()


def test_every_folder_of_weights_has_its_entry():
    """No bundled file without a name, no name without files: what ships is what is listed."""
    folders = {path.name for path in (HERE / "weights").iterdir() if path.is_dir()}
    assert folders == {entry.name for entry in BUNDLED}


@every_bundled
def test_a_bundled_model_is_whole_and_says_what_it_is(entry):
    folder = ModelFolder(entry.folder, entry.manifest_sha256)
    folder.check()
    assert {WEIGHTS, ONNX, CARD} <= set(folder.files)
    # The registry, the config and the card tell the same story.
    ours = folder.config["metasaug"]
    assert (ours["name"], ours["method"], ours["loss"]) == (entry.name, entry.method, entry.loss)
    assert ours["imbalance"] == entry.imbalance
    assert entry.measured_error == ours["results"]["error"] and f"{entry.measured_error:.2%}" in folder.card
    assert ours["dataset"] in entry.summary and ours["schedule"] in entry.summary
    assert "random" not in entry.summary.lower() and "synthetic" not in entry.summary.lower()
    assert sum(row["correct"] for row in ours["results"]["per_class"]) == round(
        (1 - entry.measured_error) * ours["results"]["images"])


@every_bundled
def test_the_registrys_sha256_is_the_bundled_manifests(entry):
    assert entry.manifest_sha256 == hashlib.sha256((entry.folder / "manifest.json").read_bytes()).hexdigest()


@every_bundled
def test_a_bundled_model_predicts_alike_on_both_backends(entry):
    """256 made-up pictures, batches of 1, 3 and 7: logits within 1e-4, the same class first."""
    pytest.importorskip("torch")
    from tests.test_predictor import noise

    onnx, torch = zoo.load(entry.name), zoo.load(entry.name, backend="torch", device="cpu")
    assert (onnx.name, onnx.backend, torch.backend) == (entry.name, "onnx", "torch")
    size = onnx.folder.config["pretrained_cfg"]["input_size"][1]
    pictures = noise(256, size=size)
    for batch, part in ((1, pictures[:16]), (3, pictures[16:46]), (7, pictures[46:])):
        for mine, theirs in zip(*(m.predict_batch(part, batch_size=batch) for m in (onnx, torch)), strict=True):
            assert np.abs(mine.logits - theirs.logits).max() <= 1e-4
            assert mine.top[0].index == theirs.top[0].index


@every_bundled
def test_no_path_of_the_training_machine_ships(entry):
    for path in entry.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            here = f"{Path(__file__).resolve().parents[2]}/".encode()
            assert here not in content and b"/home/" not in content and b"/root/" not in content, path
            assert not re.search(rb"/[\w.-]+/[\w./-]*\.py\b", content), path


def test_predict_is_load_and_predict(pictures):
    if not BUNDLED:
        pytest.skip("nothing is bundled")
    name = BUNDLED[0].name
    once = zoo.predict(name, pictures / "a.png", top_k=2)
    assert once == zoo.load(name).predict(pictures / "a.png", top_k=2)


# ---- names ----


@pytest.mark.parametrize(("name", "meant"), [
    ("metasaug-cifar10", "metasaug-cifar10-lt"), ("METASAUG-CIFAR10-LT", "metasaug-cifar10-lt"),
    ("MetaSAug-Cifar100-lt", "metasaug-cifar100-lt"), ("metasaug_cifar10_lt", "metasaug-cifar10-lt"),
    ("ce-cifar10lt", "ce-cifar10-lt")])
def test_a_near_miss_is_answered_with_what_was_meant(name, meant):
    with pytest.raises(UnknownModelError, match=rf"Did you mean .*\b{meant}\b"):
        zoo.load(name)


@pytest.mark.parametrize("name", ["resnet50", "x" * 5000, "a\0b", "é", "hf:owner/repo@main"])
def test_a_name_that_is_none_says_where_all_names_are(name):
    with pytest.raises(UnknownModelError) as caught:
        zoo.load(name)
    assert "metasaug list" in str(caught.value) or "no model folder is there" in str(caught.value)


@pytest.mark.parametrize("entry", UNPUBLISHED, ids=lambda entry: entry.name)
def test_an_unpublished_model_says_how_to_make_it_and_what_is_ready(entry):
    with pytest.raises(UnpublishedModelError) as caught:
        zoo.load(entry.name)
    assert entry.how_to_make in str(caught.value)
    for ready in BUNDLED:
        assert ready.name in str(caught.value)


@pytest.mark.parametrize("entry", [e for e in UNPUBLISHED if "cifar" in e.dataset], ids=lambda entry: entry.name)
def test_the_way_to_make_it_is_one_that_the_trainer_takes(entry, tmp_path):
    """`metasaug train …` as the message says, on data that is not there: it gets as far as asking for the data."""
    pytest.importorskip("torch")
    import shlex

    import metasaug

    command = entry.how_to_make.split(": ", 1)[1].split("\n")[0].replace("DIR", str(tmp_path / "absent"))
    arguments = shlex.split(command)
    assert arguments[:2] == ["metasaug", "train"]
    assert metasaug.main([*arguments[1:], "--out", str(tmp_path / "run")]) == 2


def test_folders_that_are_none_say_so(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    for path, kind, reason in [
        (tmp_path / "absent", UnknownModelError, "does not exist"), (tmp_path, ModelFolderError, "no manifest.json"),
        (tmp_path / "model.onnx", UnknownModelError, "is a file"), ("", UnknownModelError, "metasaug list"),
        ("./absent", UnknownModelError, "does not exist")]:
        with pytest.raises(kind, match=reason) as caught:
            zoo.load(path)
        assert isinstance(caught.value, ZooError)


def test_a_folder_loads_by_path_string_and_relative_path(tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tiny_model_folder.parent)
    for name in (tiny_model_folder, str(tiny_model_folder), "tiny", Path("tiny"), "./tiny/"):
        assert zoo.load(name).name == "tiny"


def test_a_registry_name_means_the_bundled_model_wherever_one_stands(tiny_model_folder, tmp_path, monkeypatch):
    """A folder of the same name in the working directory never stands in for it; ./NAME is that folder."""
    if not BUNDLED:
        pytest.skip("nothing is bundled")
    name = BUNDLED[0].name
    os.symlink(tiny_model_folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert zoo.load(name).folder.path == BUNDLED[0].folder
    assert zoo.load(f"./{name}").name == "tiny"


# ---- the package ----


def test_dir_lists_the_lazy_names_and_all_of_them_are_there():
    assert set(zoo.__all__) <= set(dir(zoo))
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = zoo.lod


def test_every_error_is_a_zoo_error():
    for name in zoo.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(zoo, name), ZooError) and getattr(zoo, name).__doc__
