"""Honest answers: probabilities that are as often right as they say, sets that hold what they promise."""

import csv
import io
import itertools
import json
import pickle
import shutil

import numpy as np
import pytest

import zoo
from tests.test_command_line import run
from tests.test_own_pictures import paint_classes
from tests.test_predict_runs import paint
from tests.test_predictor import noise, with_config
from zoo.calibration import Calibration, estimate_prior, fit_calibration, fit_temperature, probabilities
from zoo.errors import ModelFolderError, ZooError
from zoo.model_folder import CARD, CONFIG, ONNX, ModelFolder

GROUPS = ("head", "head", "medium", "tail")


def world(number: int, prior: list[float], temperature: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are too sure by a known factor: softmax(logits / temperature) is the truth for equal classes.

    Labels are drawn with `prior`, features from a cloud around each class.
    """
    rng = np.random.default_rng(seed)
    centres_CA = np.random.default_rng(99).normal(size=(4, 6))
    labels_N = rng.choice(4, number, p=prior)
    x_NA = centres_CA[labels_N] + rng.normal(size=(number, 6))
    true_NC = x_NA @ centres_CA.T - (centres_CA**2).sum(1) / 2  # log p(x | c) + const
    return temperature * true_NC, labels_N


EQUAL, LONG = [0.25] * 4, [0.6, 0.25, 0.1, 0.05]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("prior", [EQUAL, LONG])
def test_the_temperature_is_found_whatever_the_class_frequencies(temperature, prior):
    # Given logits that are too sure, or not sure enough, by a known factor, and a cut of equal or unequal classes,
    logits_NC, labels_N = world(20_000, prior, temperature, seed=1)
    found = fit_calibration(logits_NC, labels_N, np.array(EQUAL), "a cut")
    # then that factor is found, since the frequencies of the cut are known.
    assert found["temperature"] == pytest.approx(temperature, rel=0.05)
    assert found["images"] == 20_000 and json.loads(json.dumps(found)) == found


def test_the_temperature_minimises_the_cross_entropy():
    logits_NC, labels_N = world(500, LONG, 2.0, seed=2)
    best = fit_temperature(logits_NC, labels_N)

    def loss(temperature: float) -> float:
        return -np.log(probabilities(logits_NC / temperature)[np.arange(500), labels_N]).mean()

    assert loss(best) <= min(loss(best * 1.01), loss(best / 1.01))
    # Logits that tell the classes apart without a mistake have no best one: a small one is taken.
    assert 0.05 <= fit_temperature(np.eye(3) * 5, np.arange(3)) < 0.2


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_hold_the_true_class_of_every_class_under_any_prior(coverage):
    # Given a calibration on equal classes, and pictures of a long tail,
    found = fit_calibration(*world(4000, EQUAL, 2.0, seed=3), np.array(EQUAL), "a cut")
    calibration = Calibration.of({"metasaug": {"calibration": found, "groups": GROUPS}})
    logits_NC, labels_N = world(40_000, LONG, 2.0, seed=4)
    inside_NC = 1 - probabilities(logits_NC / found["temperature"]) <= calibration.thresholds(coverage)
    # then each class is in the sets of its own pictures as often as promised; more promise, larger sets.
    for c in range(4):
        # 200 misfits of a class are kept: their share has a standard deviation of 0.03 at most.
        assert inside_NC[labels_N == c, c].mean() == pytest.approx(coverage, abs=0.075)
    sizes = [(1 - probabilities(logits_NC) <= calibration.thresholds(more)).sum(1).mean() for more in (0.5, 0.9, 0.99)]
    assert sizes == sorted(sizes)


def test_thresholds_are_the_ranks_of_the_textbook():
    # Given 9, 4 and no pictures of three classes of one group, and none of another group,
    misfits = (tuple(i / 10 for i in range(1, 10)), (0.2, 0.4, 0.6, 0.8), (), ())
    calibration = Calibration(1.0, misfits, (0.0,), ("head", "head", "head", "tail"))
    # then 0.8 takes the ceil(10 * 0.8) = 8th of 9 and the ceil(5 * 0.8) = 4th of 4; a class without pictures takes the
    # ceil(14 * 0.8) = 12th of the group's 13; and without a group's either, the class is in every set.
    assert calibration.thresholds(0.8).tolist() == [0.8, 0.8, 0.8, np.inf]
    # 0.9: the 9th of 9; of 4 there is no 5th, so the 13th of the group's 13.
    assert calibration.thresholds(0.9).tolist() == [0.9, 0.9, 0.9, np.inf]
    assert calibration.thresholds(0.95).tolist() == [np.inf] * 4
    for wrong in (0, 1, 1.5, -0.1, float("nan")):
        with pytest.raises(ZooError, match="coverage"):
            calibration.thresholds(wrong)


def test_a_cut_of_one_class_is_refused():
    with pytest.raises(ZooError, match="2 classes"):
        fit_calibration(np.zeros((5, 3)), np.zeros(5, int), None, "a cut")


# ---- a calibrated model ----


@pytest.fixture(scope="module")
def calibrated_folder(tiny_model_folder, tmp_path_factory):
    """The tiny model; its calibration is from noise, of which it knows nothing."""
    model = zoo.load(tiny_model_folder)
    logits_NC = np.stack([p.logits for p in model.predict_batch(noise(300, seed=5))])
    found = fit_calibration(logits_NC, np.arange(300) % 10, None, "noise")
    return with_config(tiny_model_folder, tmp_path_factory.mktemp("calibrated") / "m", calibration=found)


def test_predictions_are_tempered_and_have_sets(calibrated_folder, tiny_model_folder):
    model, plain = zoo.load(calibrated_folder), zoo.load(tiny_model_folder)
    temperature = model.calibration.temperature
    assert temperature > 5  # random weights know nothing, and are sure of it
    pictures = noise(40, seed=6)
    for mine, theirs in zip(model.predict_batch(pictures), plain.predict_batch(pictures), strict=True):
        # Given the same logits, then the order of the classes stays and the probabilities are tempered;
        assert (mine.logits == theirs.logits).all() and mine.top[0].index == theirs.top[0].index
        assert mine.probabilities == pytest.approx(probabilities(mine.logits[None] / temperature)[0], abs=1e-6)
        # sets grow with coverage, are in the order of the answers, and hold the first of them;
        sets = [[each.index for each in mine.set(share)] for share in (0.5, 0.8, 0.9, 0.99)]
        assert all(set(small) <= set(large) for small, large in itertools.pairwise(sets))
        assert all(s[0] == mine.top[0].index for s in sets)
        by_hand = [c for c in np.argsort(-mine.probabilities, kind="stable") if c == mine.top[0].index
                   or 1 - probabilities(mine.logits[None] / temperature)[0][c] <= model.calibration.thresholds(0.8)[c]]
        assert sets[1] == by_hand
        # a class that cannot be is in none; and a prediction travels between processes.
        assert mine.top[0].label not in {each.label for each in model.without([mine.top[0].label]).predict(
            pictures[0]).set(0.99)}
        assert pickle.loads(pickle.dumps(mine)).set(0.8) == mine.set(0.8)
        assert 0 <= mine.familiarity <= 1
        with pytest.raises(ZooError, match="metasaug calibrate"):
            theirs.set()
    assert model.predict_batch([b"x"])[0].set() == ()


def test_what_the_calibration_never_saw_is_unfamiliar(calibrated_folder):
    # Given a calibration whose energies lie high, then a picture with less is called unlike anything in training.
    model = zoo.load(calibrated_folder)
    seen = [p.familiarity for p in model.predict_batch(noise(300, seed=5))]
    assert np.quantile(seen, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    far = model.predict(noise(1)[0])
    strange = zoo.predictor.replace(far, familiarity=0.01)
    assert strange.unfamiliar and "unlike anything in training" in str(strange)
    assert "unlike" not in str(zoo.predictor.replace(far, familiarity=0.5))


def test_the_command_shows_unsure_sets_and_familiarity(capsys, calibrated_folder, tiny_model_folder, tmp_path):
    pictures = paint(tmp_path / "in", 20)
    model, unsure = zoo.load(calibrated_folder), 0
    sure = [p.top[0].probability for p in model.predict_folder(pictures)]
    threshold = round(float(np.median(sure)), 4)
    arguments = ["predict", calibrated_folder, pictures, "--threshold", threshold, "--coverage", "0.8"]
    assert run(capsys, *arguments, "--out", tmp_path / "r.csv", "--copy-to", tmp_path / "sorted")[0] == 0
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            p = model.predict(row["path"])
            assert row["set"].split(" | ") == [each.label for each in p.set(0.8)]
            assert int(row["set_size"]) == len(p.set(0.8))
            assert float(row["familiarity"]) == pytest.approx(p.familiarity, abs=1e-6)
            assert (row["unsure"] == "yes") == (p.top[0].probability < threshold)
            unsure += row["unsure"] == "yes"
    assert 0 < unsure < 20
    assert len(list((tmp_path / "sorted/unsure").iterdir())) == unsure
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.count("with 80% coverage") == 20 and out.count("unsure: less than") == unsure
    for flags, why in ((["--coverage", "1"], "between 0 and 1"), (["--threshold", "0"], "--threshold 0")):
        code, _, said = run(capsys, "predict", calibrated_folder, pictures, *flags)
        assert code == 2 and why in said
    code, _, said = run(capsys, "predict", tiny_model_folder, pictures, "--coverage", "0.9")
    assert code == 2 and "metasaug calibrate" in said


@pytest.mark.parametrize("broken", [
    {"temperature": 0}, {"temperature": "1"}, {"misfits": [[0.1]] * 9}, {"misfits": [["a"]] * 10}, {"energies": []},
    {"energies": [float("nan")]}])
def test_a_broken_calibration_is_refused(calibrated_folder, tmp_path, broken):
    found = ModelFolder(calibrated_folder).config["metasaug"]["calibration"]
    with pytest.raises(ModelFolderError, match="calibration"):
        zoo.load(with_config(calibrated_folder, tmp_path / "m", calibration={**found, **broken}))


# ---- the command that calibrates ----


def test_calibrate_writes_config_onnx_and_card(capsys, tiny_model_folder, tmp_path):
    onnx = pytest.importorskip("onnx")
    # Given a model folder and labelled pictures that it was not trained on, some to calibrate and some to measure on,
    folder = tmp_path / "m"
    shutil.copytree(tiny_model_folder, folder)
    names = ModelFolder(folder).config["label_names"]
    paint_classes(tmp_path / "cut", dict.fromkeys(names, 8))
    paint_classes(tmp_path / "test", dict.fromkeys(names, 5), seed=9)
    # when it is calibrated,
    paint(tmp_path / "strange", 7)
    code, out, _ = run(capsys, "calibrate", folder, "--data", tmp_path / "cut", "--every", "--test", tmp_path / "test",
                       "--strange", tmp_path / "strange")
    assert code == 0 and "80 pictures" in out and "on 50 test pictures" in out
    # then the folder is whole, and config, ONNX metadata and card say the same,
    opened = ModelFolder(folder)
    opened.check()
    found = opened.config["metasaug"]["calibration"]
    props = {each.key: each.value for each in onnx.load_from_string(opened.read(ONNX)).metadata_props}
    assert any(found == json.loads(value).get("metasaug", {}).get("calibration") for value in props.values()
               if value.startswith("{"))
    model = onnx.load_from_string(opened.read(ONNX))
    assert model.ir_version == 8 and [each.version for each in model.opset_import] == [18]
    card = opened.read(CARD).decode()
    assert "plain onnxruntime 1.16 or newer" in card
    assert f"temperature {found['temperature']:.3f}" in card
    # and what was measured is what comes out by hand.
    model = zoo.load(folder)
    tested = [(names.index(path.parent.name), model.predict(path)) for path in sorted((tmp_path / "test").glob("*/*"))]
    strange = [model.predict(path) for path in (tmp_path / "strange").iterdir()]
    other = found["measured"]["strange"]
    assert (other["images"], other["called"]) == (7, np.mean([p.unfamiliar for p in strange]))
    energy = [[np.logaddexp.reduce(p.logits.astype(float)) for p in some] for some in (strange, [p for _, p in tested])]
    assert other["auroc"] == pytest.approx(np.mean([[a < b for b in energy[1]] for a in energy[0]]))
    held = np.mean([names[c] in [each.label for each in p.set(0.9)] for c, p in tested])
    assert found["measured"]["coverage"]["all"]["coverage"] == pytest.approx(held)
    assert found["measured"]["risk"][0][1] == pytest.approx(np.mean([p.top[0].index != c for c, p in tested]))
    assert f"| all | {found['measured']['ece']['before']['all']:.1%} | " in card
    assert found["measured"]["ece"]["after"]["all"] < found["measured"]["ece"]["before"]["all"]
    # The weights and the logits are as they were; evaluate measures the tempered probabilities.
    assert ModelFolder(tiny_model_folder).files["model.safetensors"] == opened.files["model.safetensors"]
    before = zoo.load(tiny_model_folder).predict(noise(1)[0])
    assert (model.predict(noise(1)[0]).logits == before.logits).all()
    ece = {}
    for where in (folder, tiny_model_folder):
        assert run(capsys, "evaluate", where, "--data", tmp_path / "test", "--out", tmp_path / "r.json")[0] == 0
        ece[where] = json.loads((tmp_path / "r.json").read_text())["ece"]
    assert ece[folder] < ece[tiny_model_folder]


def test_a_file_that_uses_newer_operators_is_left_as_it_is():
    onnx = pytest.importorskip("onnx")
    from export.to_onnx import for_old_runtimes

    def network(operator: str):
        h = onnx.helper
        value = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
        graph = h.make_graph([h.make_node(operator, ["x"], ["y"])], "g", value[:1], value[1:])
        return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)

    # Relu is as old as ONNX; Gelu came with opset 20.
    old, new = network("Relu"), network("Gelu")
    assert for_old_runtimes(old) and (old.ir_version, old.opset_import[0].version) == (8, 18)
    assert not for_old_runtimes(new) and (new.ir_version, new.opset_import[0].version) == (10, 20)


def test_calibrate_says_what_it_needs(capsys, tiny_model_folder, tmp_path):
    pytest.importorskip("onnx")
    folder = tmp_path / "m"
    shutil.copytree(tiny_model_folder, folder)
    paint_classes(tmp_path / "cut", {"ant": 3, "bee": 2})
    before = (folder / CONFIG).read_bytes()
    for flags, why in (([], "--every"), (["--test", tmp_path / "cut"], "--every")):
        code, _, said = run(capsys, "calibrate", folder, "--data", tmp_path / "cut", *flags)
        assert code == 2 and why in said
    assert (folder / CONFIG).read_bytes() == before


def test_the_left_over_pictures_of_a_benchmark_are_neither_trained_nor_tested_on(tiny_model_folder, tmp_path,
                                                                                 monkeypatch):
    pytest.importorskip("torch")
    from export import calibrate
    from export.errors import ExportError
    from training.data.cifar import Pool, cut_pool
    from training.data.datasets import Split
    from zoo.predictor import Predictor

    # Given a pool of 100 pictures a class, of which the first 30 are copies of test pictures,
    pictures = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), np.uint8)
    every = Split(pictures, np.arange(1000) % 10)
    keys = [picture.tobytes() for picture in pictures]
    names = tuple(ModelFolder(tiny_model_folder).config["label_names"])
    pool = Pool(every.labels, keys, set(keys[:30]), every.at, every.at(np.arange(30)), names, "made up")
    data = cut_pool(pool, 10.0, 5, 0, "seeded")
    recipe = {"dataset": "cifar10-lt", "imbalance": 10.0, "meta_per_class": 5, "subset_seed": 0}
    model = Predictor(ModelFolder(with_config(tiny_model_folder, tmp_path / "m", recipe=recipe,
                                              class_counts=list(data.class_counts))))
    monkeypatch.setattr(calibrate, "find_pool", lambda *_: pool)
    # when the cut is taken, then it shares no picture with training or test, and holds all meta pictures.
    (cut, labels_N), (test, _), _ = calibrate.held_out(model, tmp_path, 20)
    taken = {picture.tobytes() for part in (data.train, data.test) for picture in part.pictures}
    assert len(cut) == len(labels_N) and not taken & {picture.tobytes() for picture in cut}
    assert {picture.tobytes() for picture in data.meta.pictures} <= {picture.tobytes() for picture in cut}
    assert len(test) == 30 and max(np.bincount(labels_N)) == 25
    assert [keys.index(picture.tobytes()) % 10 for picture in cut] == labels_N.tolist()
    other = Predictor(ModelFolder(with_config(tiny_model_folder, tmp_path / "o", recipe=recipe)))
    with pytest.raises(ExportError, match="other counts"):
        calibrate.held_out(other, tmp_path, 20)


def test_csv_of_a_set_opens_in_a_spreadsheet(calibrated_folder):
    from zoo.rows import Layout

    text = io.StringIO()
    csv.writer(text).writerow(Layout(2, 0.5, 0.8, True).cells(zoo.load(calibrated_folder).predict(noise(1)[0])))
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in next(csv.reader([text.getvalue()])))


def test_the_demo_shows_a_set_in_place_of_a_falsely_sure_answer(calibrated_folder, tiny_model_folder):
    pytest.importorskip("gradio")
    from zoo.demo.answers import honest

    picture = noise(1)[0]
    p = zoo.load(calibrated_folder).predict(picture)
    assert len(p.set(0.9)) > 6
    number = len(p.set(0.9))
    assert f"one of {number}: <b>{p.top[0].label}" in honest(p) and f"and {number - 6} more" in honest(p)
    replace = zoo.predictor.replace
    assert "unlike anything in training" in honest(replace(p, familiarity=0.0))
    assert "unlike" not in honest(replace(p, familiarity=0.5))
    alone = zoo.load(calibrated_folder).only(["gnu"]).predict(picture)
    assert "it is <b>gnu</b>, and nothing else" in honest(alone)
    assert honest(zoo.load(tiny_model_folder).predict(picture)) == ""


# ---- the prior of unlabelled pictures ----


@pytest.mark.parametrize("prior", [EQUAL, LONG, LONG[::-1], [0.97, 0.01, 0.01, 0.01]])
@pytest.mark.parametrize("own", [EQUAL, LONG])
def test_class_frequencies_are_estimated_without_labels(prior, own):
    # Given unlabelled pictures of other class frequencies than a calibrated model assumes,
    logits_NC, labels_N = world(8000, prior, 1.0, seed=7)
    logits_NC = logits_NC + np.log(own)
    # when the frequencies are estimated,
    found_C = estimate_prior(probabilities(logits_NC), np.array(own))
    # then they are near the true ones, and answers with them have fewer errors than with the model's own.
    assert found_C == pytest.approx(prior, abs=0.03) and found_C.sum() == pytest.approx(1)
    errors = [(np.argmax(logits_NC + shift_C, 1) != labels_N).mean()
              for shift_C in (np.log(found_C) - np.log(own), np.zeros(4))]
    assert errors[0] <= errors[1] + 0.002
    assert prior in (EQUAL, own) or own == prior or errors[0] < errors[1] - 0.005


def test_the_command_takes_priors_of_files_and_of_the_pictures(capsys, tiny_model_folder, tmp_path):
    folder = with_config(tiny_model_folder, tmp_path / "m", prior="uniform")
    pictures, model = paint(tmp_path / "in", 30), zoo.load(folder)

    def rows(*flags: object) -> tuple[list[dict], str]:
        code, out, said = run(capsys, "predict", folder, pictures, "--out", "-", *flags)
        assert code == 0
        return list(csv.DictReader(io.StringIO(out, newline=""))), said

    def same(found: list[dict], prior) -> bool:
        expected = list(model.predict_folder(pictures, prior=prior))
        return all(row["label"] == p.top[0].label and float(row["probability"]) == pytest.approx(
            p.top[0].probability, abs=2e-6) for row, p in zip(found, expected, strict=True))

    # A file gives each class a number, 0 to what cannot occur;
    numbers = [5, 1, 1, 0, 1, 1, 2, 1, 1, 1]
    (tmp_path / "prior.csv").write_text("label,number\n" + "".join(
        f"{label},{number}\n" for label, number in zip(model.labels, numbers, strict=True)))
    found, _ = rows("--prior", tmp_path / "prior.csv")
    assert same(found, numbers) and not any(model.labels[3] in row.values() for row in found)
    # the estimate is that of the library, and says why it may be wrong;
    found, said = rows("--prior", "estimate")
    assert same(found, model.estimate_prior(model.predict_folder(pictures)))
    assert "estimated from 30 pictures" in said and "no calibration" in said and "few for 10 classes" in said
    # a resumed run keeps the estimate of its first part.
    out = tmp_path / "rows.csv"
    arguments = ["predict", folder, pictures, "--prior", "estimate", "--out", out]
    assert run(capsys, *arguments)[0] == 0
    before = out.read_bytes()
    paint(tmp_path / "in/new", 3)
    code, _, said = run(capsys, *arguments, "--resume")
    assert code == 0 and "estimated" not in said and out.read_bytes().startswith(before)
    assert run(capsys, "predict", folder, pictures, "--out", out, "--resume")[0] == 2
    # Mistakes are named.
    for text, why in (("ant,1\n", "lacks 9 classes"), ("ant,1\nyeti,2\n", "no class 'yeti'"),
                      ("a,b\nant\n", "line 2")):
        (tmp_path / "wrong.csv").write_text(text)
        code, _, said = run(capsys, "predict", folder, pictures, "--prior", tmp_path / "wrong.csv")
        assert code == 2 and why in said
    code, _, said = run(capsys, "predict", folder, "-", "--prior", "estimate")
    assert code == 2 and "--list" in said
    code, _, said = run(capsys, "predict", tiny_model_folder, pictures, "--prior", "estimate")
    assert code == 2 and "which prior" in said
