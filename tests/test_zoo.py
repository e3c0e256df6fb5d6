"""The registry proves itself, and names are honest and forgiving."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import zoo
from zoo import registry
from zoo.errors import ModelFolderError, UnknownModelError, UnpublishedModelError, ZooError
from zoo.hub import parse
from zoo.model_folder import CARD, ONNX, WEIGHTS, ModelFolder
from zoo.registry import HERE, ON_HUB, find

BUNDLED = [entry for entry in zoo.list_models() if entry.weights == "bundled"]
UNPUBLISHED = [entry for entry in zoo.list_models() if entry.weights == "unpublished"]
every_bundled = pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.name)


# ---- the registry ----


def test_every_entry_has_what_a_user_reads():
    entries = zoo.list_models()
    names = [name for entry in entries for name in (entry.name, *entry.aliases)]
    assert len(set(names)) == len(names)
    weights = [entry.weights for entry in entries]
    assert weights == sorted(weights)  # bundled, hub, unpublished
    for entry in entries:
        assert entry.name == entry.name.lower() and "/" not in entry.name and entry.dataset and entry.summary
        assert entry.imbalance is None or entry.imbalance >= 1
        assert entry.published_error is None or 0 < entry.published_error < 1
        assert (entry.published_error is None) == (entry.published_source is None)
        assert (entry.manifest_sha256 is None) == (entry.weights == "unpublished") == (entry.measured_error is None)
        assert all(find(name) is entry for name in (entry.name, *entry.aliases))
        if entry.hub:
            assert parse(f"hf:{entry.hub.repo}@{entry.hub.revision}") == (entry.hub.repo, entry.hub.revision)
            assert re.fullmatch(r"[0-9a-f]{40}", entry.hub.revision)
            assert re.fullmatch(r"[0-9a-f]{64}", entry.hub.manifest_sha256)
    assert set(registry.BUNDLED) | set(ON_HUB) <= {entry.name for entry in entries}
    assert not set(registry.BUNDLED) & set(ON_HUB)


def test_every_cell_of_the_benchmark_has_its_name():
    """CIFAR-LT by data set, imbalance and loss, with and without MetaSAug; the large sets; plankton. Ours on all."""
    for dataset in ("cifar10-lt", "cifar100-lt"):
        for imbalance in (200, 100, 50, 20, 10):
            for loss in ("ce", "focal", "ldam"):
                for name, method in ((f"metasaug-{loss}-{dataset}-{imbalance}", "metasaug"),
                                     (f"{loss}-{dataset}-{imbalance}", loss)):
                    entry = find(name)
                    assert (entry.dataset, entry.imbalance, entry.loss, entry.method) == (
                        dataset, imbalance, loss, method)
            ours = find(f"heldout-{dataset}-{imbalance}")
            assert (ours.dataset, ours.imbalance, ours.loss, ours.method) == (dataset, imbalance, "ce", "heldout")
    for name in ("imagenet-lt", "inat17", "inat18", "plankton"):
        assert all(find(f"{method}-{name}").method == method for method in ("metasaug", "heldout", "ce"))
    assert find("metasaug-cifar10-lt") is find("metasaug-cifar10-lt-100") is find("metasaug-ce-cifar10-lt")
    assert find("metasaug-inaturalist2018") is find("metasaug-inat18")


def test_published_errors_are_the_papers_cells():
    for name, percent in [("metasaug-cifar10-lt", 19.46), ("metasaug-cifar10-lt-200", 23.11),
                          ("metasaug-ldam-cifar10-lt-10", 10.32), ("metasaug-cifar100-lt-50", 48.10),
                          ("metasaug-ldam-cifar100-lt-200", 56.91), ("metasaug-imagenet-lt", 52.33),
                          ("metasaug-inat18", 30.50), ("metasaug-inat17", 36.72)]:
        assert find(name).published_error == pytest.approx(percent / 100)
    # Not known to us, and not made up.
    for name in ("metasaug-focal-cifar10-lt", "ce-cifar10-lt", "ldam-cifar100-lt-10", "metasaug-plankton"):
        assert find(name).published_error is None
    assert find("metasaug-inat17").published_source != find("metasaug-inat18").published_source


def test_a_damaged_bundled_model_hides_no_other(tmp_path, monkeypatch, capsys):
    # Given a bundled folder with one wrong byte in its config, when models are loaded,
    import metasaug

    weights = Path(shutil.copytree(HERE / "weights", tmp_path / "weights"))
    (weights / BUNDLED[0].name / "config.json").write_bytes(b"x")
    monkeypatch.setattr("zoo.registry.HERE", tmp_path)
    # then the damaged one is refused, the others work, and the list needs none of them.
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        zoo.load(BUNDLED[0].name)
    assert zoo.load(BUNDLED[1].name).name == BUNDLED[1].name
    assert metasaug.main(["list"]) == 0
    assert f"{BUNDLED[0].measured_error:.2%}" in capsys.readouterr().out


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
    assert entry.imbalance in (ours["imbalance"], None)  # None: the set comes in one only
    assert entry.measured_error == round(ours["results"]["error"], 6) and f"{entry.measured_error:.2%}" in folder.card
    assert entry.classes == len(folder.config["label_names"])
    assert ours["dataset"] in entry.summary and ours["schedule"] in entry.summary
    assert "random" not in entry.summary.lower() and "synthetic" not in entry.summary.lower()
    assert sum(row["correct"] for row in ours["results"]["per_class"]) == round(
        (1 - ours["results"]["error"]) * ours["results"]["images"])


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


@pytest.mark.parametrize("name", ["resnet50", "x" * 5000, "a\0b", "é"])
def test_a_name_that_is_none_says_where_all_names_are(name):
    with pytest.raises(UnknownModelError) as caught:
        zoo.load(name)
    assert "metasaug list" in str(caught.value) or "no model folder is there" in str(caught.value)


@pytest.mark.parametrize("entry", UNPUBLISHED, ids=lambda entry: entry.name)
def test_an_unpublished_model_says_every_way_to_have_it(entry):
    """Training, importing the authors' file, one's own copy on the Hub; and what is ready."""
    with pytest.raises(UnpublishedModelError) as caught:
        zoo.load(entry.name)
    told = str(caught.value)
    for way in (entry.command, "METASAUG_HUB_OWNER", "hf:OWNER/REPO"):
        assert way in told
    # The authors released MetaSAug's weights and, on the large sets, the first stage that they began with.
    released = entry.dataset != "plankton" and entry.method != "heldout" and (
        entry.method == "metasaug" or entry.imbalance is None)
    assert (f"metasaug import FILE --as {entry.name}" in told) == released
    for ready in BUNDLED:
        assert ready.name in told


@pytest.mark.parametrize("entry", zoo.list_models(), ids=lambda entry: entry.name)
def test_the_command_is_one_that_the_trainer_takes(entry, tmp_path, capsys):
    """On data that is not there, it gets as far as asking for the data: a wrong flag is a SystemExit."""
    pytest.importorskip("torch")
    import shlex

    import metasaug

    words = shlex.split(entry.command)
    assert words[:2] == ["metasaug", "train"] and words[-2] == "--data"
    assert (f"--imbalance {entry.imbalance}" in entry.command) == (entry.imbalance is not None)
    # The default of benchmarks, and not of one's own pictures.
    unsaid = "--augment metasaug " if entry.dataset == "plankton" else ""
    augment = {"metasaug": unsaid, "heldout": "--augment heldout "}.get(entry.method, "--augment none ")
    assert entry.command.count("--augment") == bool(augment) and augment in entry.command
    assert (f"--loss {entry.loss}" in entry.command) == (entry.loss != "ce")
    assert metasaug.main([*words[1:-1], str(tmp_path / "absent"), "--out", str(tmp_path / "run")]) == 2
    assert "absent" in capsys.readouterr().err


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
