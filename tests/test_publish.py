"""Publishing: what is wrong stays here, what is right goes up in one commit, and comes back the same."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import metasaug
import zoo
import zoo.hub
import zoo.registry
from tests.hub_server import READER, WRITER
from tests.test_hub import renamed
from tests.test_layout import WITHOUT_TORCH
from zoo.model_folder import (
    CARD,
    CONFIG,
    COVARIANCE,
    FIGURE,
    MANIFEST,
    ONNX,
    WEIGHTS,
    ModelFolder,
    add_files,
    write_model_folder,
)
from zoo.registry import OnHub

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = [entry for entry in zoo.list_models() if entry.weights == "bundled"]


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def state(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = metasaug.main(["publish", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def logged_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


# ---- there and back ----


def test_what_is_published_is_loaded_by_its_name_once_the_entry_is_pasted(
        logged_in, files, tiny_model_folder, tmp_path, capsys, monkeypatch, pictures):
    # Given a trained folder by a name of the registry, in a run,
    folder = written(tmp_path / "run" / "model", renamed(files, "metasaug-inat18"))
    before = state(folder)
    # when the run is published, then the repository holds it in one commit, and the folder is as it was.
    code, out, err = run(capsys, tmp_path / "run", "--repo", "me/inat18")
    assert code == 0, err
    repo = logged_in.repos["me/inat18"]
    assert len(repo.messages) == 2 and repo.messages[1].startswith("metasaug-inat18, by metasaug ")
    held = repo.files("main")
    assert set(held) == {CONFIG, WEIGHTS, COVARIANCE, ONNX, CARD, FIGURE, MANIFEST, ".gitattributes"}
    assert all(held[name] == (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, COVARIANCE, ONNX))
    assert state(folder) == before and not repo.private
    # The entry that it prints, pasted into the registry, makes the name load, and predict as the folder does.
    pasted = out.split("For ON_HUB in zoo/registry.py:\n")[1]
    assert max(map(len, pasted.splitlines())) <= 120
    for name, where in eval("{" + pasted + "}", {"OnHub": OnHub}).items():
        monkeypatch.setitem(zoo.registry.ON_HUB, name, where)
    model = zoo.load("metasaug-inat18")
    assert model.folder.source == f"hf:me/inat18@{repo.refs['main']}"
    assert model.predict(pictures / "a.png") == zoo.load(folder).predict(pictures / "a.png")
    entry = zoo.registry.find("metasaug-inat18")
    assert entry.measured_error == model.folder.results["error"] and "Made-up animals" in entry.summary
    # Its card says how to load it from there.
    assert 'zoo.load("hf:me/inat18")' in model.folder.card and f"({FIGURE})" in model.folder.card


def test_publishing_again_changes_what_changed_and_removes_what_is_gone(
        logged_in, files, tiny_model_folder, tmp_path, capsys):
    assert run(capsys, tiny_model_folder, "--repo", "me/tiny")[0] == 0
    repo = logged_in.repos["me/tiny"]
    first = repo.refs["main"]
    # The same again is no commit;
    code, out, _ = run(capsys, tiny_model_folder, "--repo", "me/tiny")
    assert code == 0 and first in out and repo.refs["main"] == first
    # without covariances, theirs goes, and what others keep in the repository stays.
    repo.commit({**repo.files("main"), "notes.txt": b"mine"})
    less = written(tmp_path / "less", {n: c for n, c in files.items() if n in (CONFIG, WEIGHTS)})
    opened = ModelFolder(tiny_model_folder)
    write_model_folder(less, opened.config, opened.weights())
    add_files(less, {ONNX: files[ONNX]}, ModelFolder(less).files)
    assert run(capsys, less, "--repo", "me/tiny")[0] == 0
    assert set(repo.files("main")) == {CONFIG, WEIGHTS, ONNX, CARD, FIGURE, MANIFEST, ".gitattributes", "notes.txt"}
    assert zoo.load("hf:me/tiny").name == "tiny"


def test_private_is_private_or_an_error(logged_in, files, tiny_model_folder, capsys):
    assert run(capsys, tiny_model_folder, "--repo", "me/secret", "--private")[0] == 0
    assert logged_in.repos["me/secret"].private
    before = dict(logged_in.repos["owner/tiny"].refs)
    code, _, err = run(capsys, tiny_model_folder, "--repo", "owner/tiny", "--private")
    assert code == 2 and "is there already, and public. Nothing was uploaded" in err
    assert logged_in.repos["owner/tiny"].refs == before


# ---- a dry run ----


@pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.name)
def test_every_bundled_model_could_be_published(hub, entry, capsys):
    code, out, err = run(capsys, entry.folder, "--repo", f"me/{entry.name}", "--dry-run")
    assert code == 0, err
    assert "card    complete" in out and "nothing was uploaded" in out and "of the weights in torch" in out
    for name in (CONFIG, WEIGHTS, ONNX, CARD, FIGURE, MANIFEST):
        assert re.search(rf"^ +[\d,]+  {re.escape(name)}$", out, re.MULTILINE)
    assert hub.log == []


def test_it_needs_no_torch(tiny_model_folder):
    arguments = ["publish", str(tiny_model_folder), "--repo", "me/tiny", "--dry-run"]
    script = WITHOUT_TORCH + f"import metasaug; sys.exit(metasaug.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "runs; not compared to the weights" in done.stdout


# ---- what stays here ----


def test_a_damaged_folder_stays_here(hub, files, tmp_path, capsys):
    for name in (WEIGHTS, ONNX, CARD, CONFIG):
        folder = written(tmp_path / name.replace("/", "-"), {**files, name: files[name][:-1] + b"\0"})
        code, _, err = run(capsys, folder, "--repo", "me/tiny")
        assert code == 2 and Path(name).name in err
    assert hub.log == []


def test_an_onnx_of_other_weights_stays_here(hub, files, tiny_model_folder, tmp_path, capsys):
    pytest.importorskip("torch")
    opened = ModelFolder(tiny_model_folder)
    weights = opened.weights()
    weights["fc.bias"] = weights["fc.bias"] + 1
    other = write_model_folder(tmp_path / "other", opened.config, weights)
    add_files(other.path, {ONNX: files[ONNX]}, other.files)
    code, _, err = run(capsys, other.path, "--repo", "me/tiny")
    assert code == 2 and "differ" in err and hub.log == []


def test_a_folder_without_onnx_says_how_to_get_it(hub, tiny_model_folder, tmp_path, capsys):
    opened = ModelFolder(tiny_model_folder)
    bare = write_model_folder(tmp_path / "bare", opened.config, opened.weights()).path
    code, _, err = run(capsys, bare, "--repo", "me/tiny")
    assert code == 2 and "`metasaug export" in err and hub.log == []


@pytest.mark.parametrize(("missing", "told"), [
    ("results", "test results"), ("class_counts", "the training pictures of each class"),
    ("command", "the training command"), ("seed", "the seed"), ("versions", "those of the libraries"),
    ("schedule", "the schedule")])
def test_a_card_that_could_not_say_all_is_published_only_in_so_many_words(
        logged_in, files, tiny_model_folder, tmp_path, capsys, missing, told):
    opened = ModelFolder(tiny_model_folder)
    config = json.loads(json.dumps(opened.config))
    config["metasaug"][missing] = None if missing != "versions" else {}
    folder = write_model_folder(tmp_path / "model", config, opened.weights())
    add_files(folder.path, {ONNX: files[ONNX]}, folder.files)
    code, _, err = run(capsys, folder.path, "--repo", "me/less")
    assert code == 2 and f"lacks {told}" in err
    assert "me/less" not in logged_in.repos
    assert run(capsys, folder.path, "--repo", "me/less", "--incomplete", "--dry-run")[0] == 0


def test_a_seed_of_zero_is_a_seed(tiny_model_folder):
    from export.publish import what_the_card_lacks

    config = ModelFolder(tiny_model_folder).config
    assert config["metasaug"]["seed"] == 0 and what_the_card_lacks(config) == []


def test_results_of_the_onnx_files_count_and_int8_needs_its_own(tiny_model_folder):
    """Imported weights have no training behind them: `metasaug export --data` measures what they get right."""
    from huggingface_hub import ModelCard

    from export.card import card
    from export.publish import entry, what_the_card_lacks

    config = json.loads(json.dumps(ModelFolder(tiny_model_folder).config))
    ours = config["metasaug"]
    fp32 = {key: ours["results"][key] for key in ("images", "error", "macro_error", "worst_class_error", "groups")}
    ours.update(results=None, variants={"fp32": fp32, "int8": {"calibration_pictures": 512}})
    assert what_the_card_lacks(config) == ["what int8 gets right per group"]
    ours["variants"]["int8"].update(fp32)
    assert what_the_card_lacks(config) == []
    # Then the card's YAML and the registry's entry have these numbers.
    data = ModelCard(card(config)).data
    assert {r.metric_name: r.metric_value for r in data.eval_results}["accuracy"] == round(1 - fp32["error"], 4)
    ours.update(name="metasaug-inat18", schedule='the "long" one: ' + "x y" * 99)
    pasted = entry(config, "me/tiny", "a" * 40, "b" * 64).split("registry.py:\n")[1]
    (here,) = eval("{" + pasted + "}", {"OnHub": OnHub}).values()
    assert here == OnHub("me/tiny", "a" * 40, "b" * 64, pytest.approx(fp32["error"]),
                         f"trained on Made-up animals, {ours['schedule']}")


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/tiny@main", "", "hf:me/tiny", "me/"])
def test_a_repository_that_is_none_is_told(hub, tiny_model_folder, capsys, repo):
    code, _, err = run(capsys, tiny_model_folder, "--repo", repo)
    assert code == 2 and "owner/" in err and hub.log == []


# ---- what the Hub may do ----


@pytest.mark.parametrize(("token", "told"), [(None, "refuses the token"), (READER, "refuses access")])
def test_who_may_not_write_is_told_to_log_in(hub, tiny_model_folder, capsys, monkeypatch, token, told):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = run(capsys, tiny_model_folder, "--repo", "me/tiny")
    assert code == 2 and told in err and "hf auth login" in err and "me/tiny" not in hub.repos


@pytest.mark.parametrize(("kind", "pattern", "method"), [
    ("500", "create", "POST"), ("500", "/upload/", "PUT"), ("503", "commit/main", "POST"),
    ("silent", "commit/main", "POST"), ("flip", r"resolve/.*config\.json", "GET"), ("flip", "/cdn/", "GET")])
def test_a_hub_that_fails_is_one_error_and_no_entry(
        logged_in, tiny_model_folder, capsys, impatient, monkeypatch, kind, pattern, method):
    impatient(20)
    monkeypatch.setattr("export.publish.PATIENCE", 3 if kind == "silent" else 20)
    monkeypatch.setattr("export.publish.SLOWEST_UPLOAD", 1e9)
    logged_in.lfs.clear()  # nothing of it is there already
    logged_in.fail(kind, pattern, method)
    code, out, err = run(capsys, tiny_model_folder, "--repo", "me/tiny")
    assert code == 2 and "OnHub" not in out
    assert err.strip().splitlines()[-1].startswith("metasaug publish: ")


def test_an_upload_that_fails_once_goes_on(logged_in, tiny_model_folder, capsys, impatient):
    impatient(30)
    logged_in.lfs.clear()
    logged_in.fail("503", "/upload/", "PUT", times=1)
    assert run(capsys, tiny_model_folder, "--repo", "me/tiny")[0] == 0
    assert logged_in.faults[0].times == 0


# ---- the card ----


def test_the_hubs_own_readers_read_the_card(logged_in, tiny_model_folder, tmp_path, capsys):
    from huggingface_hub import ModelCard, metadata_load

    assert run(capsys, tiny_model_folder, "--repo", "me/tiny")[0] == 0
    (tmp_path / CARD).write_bytes(logged_in.repos["me/tiny"].files("main")[CARD])
    # From the Hub and from the file: data set, imbalance, and the metrics of every group.
    from_hub, from_file = ModelCard.load("me/tiny"), metadata_load(tmp_path / CARD)
    assert from_hub.data.to_dict() == from_file
    results = ModelFolder(tiny_model_folder).results
    (result,) = from_file["model-index"][0]["results"]
    assert result["dataset"] == {"name": "Made-up animals, imbalance 100", "type": "animals", "split": "test",
                                 "args": {"imbalance": 100.0}}
    measured = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert measured["accuracy"] == round(1 - results["error"], 4)
    for group, r in results["groups"].items():
        assert measured[f"accuracy ({group} classes)"] == round(r["accuracy"], 4)
    # And in words: use, limits, training data, command, seed, versions, licence, citation, figure.
    text = from_hub.text
    for told in ("## Intended use and limits", "## Training", "| data | Made-up animals", "| command | `pytest`",
                 "| seed | 0 |", "| versions | torch ", "Licence: ", "@inproceedings", f"]({FIGURE})"):
        assert told.lower() in text.lower(), told


BUNDLED = Path(zoo.__file__).parent / "weights" / "metasaug-cifar10-lt"


def test_a_card_begins_with_what_the_model_knows_how_well_and_what_its_probabilities_mean(tiny_model_folder):
    from export.card import card

    config = json.loads(json.dumps(ModelFolder(tiny_model_folder).config))
    ours = config["metasaug"]
    results, ours["calibration"] = ours["results"], None
    results["ece"] = 0.123

    def in_short():
        return card(config).split("## In short")[1].split("\n## ")[0]

    # Given a model without a calibration, then its card says so, and with which accuracy it knows how many classes;
    for fact in (f"{config['num_classes']} classes", f"{1 - results['macro_error']:.1%}", "12.3%", "Not calibrated"):
        assert fact in in_short()
    # with one, how far probabilities hold; not measured, nothing of how good it is.
    ours["calibration"] = ModelFolder(BUNDLED).config["metasaug"]["calibration"]
    held = ours["calibration"]["measured"]["ece"]["after"]["all"]
    assert f"{held:.1%}" in in_short() and "Not calibrated" not in in_short() and "`familiarity`" in in_short()
    ours["results"] = ours["calibration"] = None
    assert "%" not in in_short()


def test_the_figure_is_a_picture_of_its_numbers(tiny_model_folder):
    """Another accuracy is another picture; the same config is the same bytes, whatever the number of classes."""
    import io

    from PIL import Image

    from export.figure import accuracy_figure

    config = json.loads(json.dumps(ModelFolder(tiny_model_folder).config))
    figure = accuracy_figure(config)
    assert Image.open(io.BytesIO(figure)).size == (800, 620) and accuracy_figure(config) == figure
    config["metasaug"]["results"]["per_class"][9]["correct"] += 5
    assert accuracy_figure(config) != figure
    # Many classes, odd names, no counts, classes without test pictures; nothing measured.
    ours = config["metasaug"]
    config["num_classes"] = 500
    ours.update(class_counts=None, groups=["unknown"] * 500)
    ours["results"]["per_class"] = [{"label": f"$x_{c}^", "train_images": None, "test_images": c % 3, "correct": c % 2}
                                    for c in range(500)]
    assert accuracy_figure(config)
    config["num_classes"] = 5
    ours.update(groups=["unknown"] * 5)
    ours["results"]["per_class"] = ours["results"]["per_class"][:5]
    assert accuracy_figure(config)
    ours["results"] = None
    assert accuracy_figure(config) is None


def test_a_folder_whose_results_are_gone_loses_the_figure(tiny_model_folder, tmp_path):
    from export.card import write_card

    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    write_card(folder)
    assert FIGURE in ModelFolder(folder)
    config = json.loads(json.dumps(ModelFolder(folder).config))
    config["metasaug"]["results"] = None
    add_files(folder, {CONFIG: json.dumps(config).encode()}, ModelFolder(folder).files)
    write_card(folder)
    assert FIGURE not in ModelFolder(folder) and FIGURE not in ModelFolder(folder).card
    ModelFolder(folder).check()
