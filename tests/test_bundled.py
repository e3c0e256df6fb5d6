"""The bundled models: what their cards and the README say is what they do on the real pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo
import zoo.registry
from training.recipes import Cifar10LT, Folder

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = [entry for entry in zoo.list_models() if entry.weights == "bundled"]


def readme_row(entry) -> str:
    """A line of the README's table of results, from the model folder that `metasaug train` wrote."""
    results = zoo.ModelFolder(entry.folder).results
    groups = " | ".join(f"{results['groups'][group]['accuracy']:.1%}" for group in ("head", "medium", "tail"))
    return f"| `{entry.name}` | {results['error']:.2%} | {results['worst_class_error']:.1%} | {groups} |"


@pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.name)
def test_the_readme_states_what_the_model_folder_measured(entry):
    assert readme_row(entry) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cifar10_test(cifar10_jpeg):
    return cifar10_jpeg / "test"


@pytest.fixture(scope="module")
def plankton_test(plankton, tmp_path_factory, request):
    """Class folders of the test pictures that the training command cuts by file name. Only the long test decodes all
    24,261 pictures to find copies, which may move a few."""
    from training.data.own_pictures import load_folder

    data = load_folder(plankton / "train", look="long" in request.config.option.markexpr.split("not")[0])
    folder = tmp_path_factory.mktemp("plankton") / "test"
    for path, label in zip(data.test.paths, data.test.labels, strict=True):
        place = folder / data.label_names[label] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    return folder


TEST_PICTURES = {"cifar10-lt": ("cifar10_test", 10_000), "plankton": ("plankton_test", 6_075)}
CASES = [*((entry, "fp32") for entry in BUNDLED), (BUNDLED[0], "int8")]


def evaluated(entry, precision: str, folder: Path, out: Path) -> dict:
    import metasaug

    arguments = ["evaluate", entry.name, "--data", str(folder), "--precision", precision, "--out", str(out)]
    assert metasaug.main(arguments) == 0
    return json.loads(out.read_text())


def stated(entry, precision: str) -> list[int]:
    """Test pictures of each class that the model folder says are classified correctly."""
    ours = zoo.ModelFolder(entry.folder).config["metasaug"]
    if precision == "int8":
        return ours["variants"]["int8"]["correct_per_class"]
    return [row["correct"] for row in ours["results"]["per_class"]]


@pytest.mark.parametrize(("entry", "precision"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_sample_of_the_real_pictures_agrees_with_the_card(entry, precision, request, tmp_path):
    # Given some 250 test pictures, every n-th of each class, when a user evaluates a bundled model on them,
    fixture, images = TEST_PICTURES[entry.dataset]
    for folder in sorted(request.getfixturevalue(fixture).iterdir()):
        (tmp_path / "sample" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:: images // 250]:
            (tmp_path / "sample" / folder.name / path.name).symlink_to(path.resolve())
    results = evaluated(entry, precision, tmp_path / "sample", tmp_path / "results.json")
    # then as many are correct as draws from the card's counts would be, to four standard deviations.
    expected = variance = 0.0
    for row, correct, whole in zip(results["per_class"], stated(entry, precision),
                                   zoo.ModelFolder(entry.folder).results["per_class"], strict=True):
        assert row["label"] == whole["label"]
        drawn, n, p = row["test_images"], whole["test_images"], correct / max(whole["test_images"], 1)
        expected += drawn * p
        variance += drawn * p * (1 - p) * (n - drawn) / max(n - 1, 1)
    assert results["images"] >= 250
    assert abs(sum(row["correct"] for row in results["per_class"]) - expected) < 4 * variance**0.5


@pytest.mark.promise("parity")
@pytest.mark.long
@pytest.mark.parametrize(("entry", "precision"), CASES, ids=lambda value: getattr(value, "name", value))
def test_evaluation_on_all_real_pictures_gives_the_cards_numbers_again(entry, precision, request, tmp_path):
    fixture, images = TEST_PICTURES[entry.dataset]
    results = evaluated(entry, precision, request.getfixturevalue(fixture), tmp_path / "results.json")
    assert results["images"] == zoo.ModelFolder(entry.folder).results["images"] == images
    # Training measured by torch, this is ONNX Runtime: where two classes are as likely, the last bits decide. Of int8,
    # processors add up differently.
    assert [row["correct"] for row in results["per_class"]] == pytest.approx(
        stated(entry, precision), abs=10 if precision == "int8" else 1)


@pytest.mark.long
@pytest.mark.parametrize("entry", [entry for entry in BUNDLED if entry.dataset == "plankton"],
                         ids=lambda entry: entry.name)
def test_jpegs_decoded_at_a_part_of_their_size_cost_no_accuracy(entry, plankton_test):
    """At most 0.1 point. Of the bundled models' test pictures, only those of plankton are JPEGs and large enough."""
    model, right = zoo.load(entry.name), []
    paths = sorted(plankton_test.glob("*/*"))
    large = [path for path in paths if model._shrink(*Image.open(path).size)]
    for model.reduced in (False, True):
        right.append(sum(row.top[0].label == path.parent.name
                         for path, row in zip(large, model.predict_each(large), strict=True)))
    assert len(large) > 100 or model.folder.config["pretrained_cfg"]["input_size"][1] > 32
    assert abs(right[1] - right[0]) <= 0.001 * len(paths)


@pytest.mark.promise("parity")
@pytest.mark.long
@pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.name)
def test_onnx_equals_torch_on_256_real_pictures(entry, request, figure):
    from export.to_onnx import check_parity
    from zoo.images import decode, preprocess
    from zoo.model_folder import ONNX
    from zoo.predictor import torch_module

    folder = zoo.ModelFolder(entry.folder)
    paths = sorted(request.getfixturevalue(TEST_PICTURES[entry.dataset][0]).glob("*/*.*"))
    pictures = np.stack([preprocess(decode(path), folder.config["pretrained_cfg"])
                         for path in paths[:: len(paths) // 256][:256]])
    difference = check_parity(folder.read(ONNX), torch_module(folder), folder.config, pictures)
    figure(f"{entry.name}: {difference:.1e} on {len(pictures)} pictures")
    assert len(pictures) == 256 and difference <= 1e-4


def test_the_docs_state_what_int8_costs():
    right = {precision: figures["groups"] for precision, figures in
             zoo.load("ce-cifar10-lt").folder.config["metasaug"]["variants"].items()}
    lost = {group: right["fp32"][group]["accuracy"] - right["int8"][group]["accuracy"] for group in right["fp32"]}
    assert lost["head"] <= 0
    page = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    assert f"`ce-cifar10-lt` loses {100 * lost['tail']:.1f} points of tail accuracy" in page


@pytest.mark.parametrize("entry", [entry for entry in BUNDLED if entry.method in ("metasaug", "heldout")],
                         ids=lambda entry: entry.name)
def test_a_model_shares_everything_but_the_method_with_plain_cross_entropy(entry):
    """Same data, same length, same seed: the demo compares like with like."""
    ours, plain = (zoo.ModelFolder(one.folder).config["metasaug"]
                   for one in (entry, zoo.registry.find(f"ce-{entry.dataset}")))
    for key in ("dataset", "class_counts", "seed", "groups"):
        assert ours[key] == plain[key], key
    recipe = {"cifar10-lt": Cifar10LT, "plankton": Folder}[entry.dataset]()
    ours, plain = (recipe.completed(one["recipe"]) for one in (ours, plain))
    never = (False, "never")  # before it was a choice of three
    assert ours.pop("meta_in_training") in never and plain.pop("meta_in_training") in never
    differing = {k for k in ours if ours[k] != plain[k]}
    assert differing <= {"augment", "class_weights", "lookahead"}
