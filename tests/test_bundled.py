"""The bundled models: what their cards and the README say is what they do on the real pictures."""

import json
from pathlib import Path

import pytest

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
def plankton_test(plankton, tmp_path_factory):
    """Class folders of the test pictures that the training command cuts by file name."""
    from training.data.own_pictures import load_folder

    data = load_folder(plankton / "train")
    folder = tmp_path_factory.mktemp("plankton") / "test"
    for path, label in zip(data.test.paths, data.test.labels, strict=True):
        place = folder / data.label_names[label] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    return folder


TEST_PICTURES = {"cifar10-lt": ("cifar10_test", 10_000), "plankton": ("plankton_test", 6_075)}


@pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.name)
def test_evaluation_on_the_real_pictures_gives_the_cards_numbers_again(entry, request, tmp_path, capsys):
    # Given the test pictures of its data set, when a user evaluates a bundled model on them,
    import metasaug

    fixture, images = TEST_PICTURES[entry.dataset]
    out = tmp_path / "results.json"
    folder = request.getfixturevalue(fixture)
    assert metasaug.main(["evaluate", entry.name, "--data", str(folder), "--out", str(out)]) == 0
    # then each count right, per group and class, is the card's. Training measured by torch, this is ONNX Runtime: of
    # thousands of pictures one may lie so close between two classes that the last bits decide.
    measured, card = json.loads(out.read_text()), zoo.ModelFolder(entry.folder).results
    assert measured["images"] == card["images"] == images
    for mine, theirs in zip(measured["per_class"], card["per_class"], strict=True):
        assert mine["label"] == theirs["label"]
        assert abs(mine["correct"] - theirs["correct"]) <= 1
    shown = capsys.readouterr().out
    assert f"on {images:,} test pictures" in shown
    assert all(f"{group} " in shown for group in card["groups"])


def test_int8_is_as_right_on_the_real_pictures_as_the_card_says(cifar10_jpeg, tmp_path):
    # Given the bundled int8 file, when it is measured again, then each class's count is that of the config,
    import metasaug

    out, data = tmp_path / "results.json", cifar10_jpeg / "test"
    assert metasaug.main(["evaluate", "metasaug-cifar10-lt", "--data", str(data), "--precision", "int8", "--out",
                          str(out)]) == 0
    measured = [row["correct"] for row in json.loads(out.read_text())["per_class"]]
    card = zoo.load("metasaug-cifar10-lt").folder.config["metasaug"]["variants"]
    # but for processors that add up int8 in another way.
    assert measured == pytest.approx(card["int8"]["correct_per_class"], abs=10)
    assert card["fp32"]["correct_per_class"] == pytest.approx(
        [row["correct"] for row in zoo.load("metasaug-cifar10-lt").folder.results["per_class"]], abs=1)


def test_the_readme_states_what_int8_costs():
    right = {precision: figures["groups"] for precision, figures in
             zoo.load("ce-cifar10-lt").folder.config["metasaug"]["variants"].items()}
    lost = {group: right["fp32"][group]["accuracy"] - right["int8"][group]["accuracy"] for group in right["fp32"]}
    assert lost["head"] <= 0
    said = f"`ce-cifar10-lt` loses {100 * lost['tail']:.1f} % of the tail and nothing of the head"
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("entry", [entry for entry in BUNDLED if entry.method != "ce"], ids=lambda entry: entry.name)
def test_a_model_shares_everything_but_the_method_with_plain_cross_entropy(entry):
    """Same data, same length, same seed: the demo compares like with like."""
    ours, plain = (one.config["metasaug"] for one in (entry, zoo.registry.find(f"ce-{entry.dataset}")))
    for key in ("dataset", "class_counts", "seed", "groups"):
        assert ours[key] == plain[key], key
    recipe = {"cifar10-lt": Cifar10LT, "plankton": Folder}[entry.dataset]()
    ours, plain = (recipe.completed(one["recipe"]) for one in (ours, plain))
    never = (False, "never")  # before it was a choice of three
    assert ours.pop("meta_in_training") in never and plain.pop("meta_in_training") in never
    differing = {k for k in ours if ours[k] != plain[k]}
    assert differing <= {"augment", "class_weights", "lookahead"}
