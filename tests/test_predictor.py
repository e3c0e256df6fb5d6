"""Predictions: the same from both backends, in any company, and honest about groups and priors."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import zoo
from zoo.errors import BackendError, PictureError, ZooError
from zoo.model_folder import CONFIG, ModelFolder, add_files
from zoo.predictor import OUTPUTS


def noise(count: int, seed: int = 0, size: int = 32) -> list[np.ndarray]:
    """Made-up pictures from nearly flat to all noise."""
    rng = np.random.default_rng(seed)
    flat = rng.integers(0, 256, (count, 1, 1, 3))
    share = np.linspace(0, 1, count)[:, None, None, None]
    return list(((1 - share) * flat + share * rng.integers(0, 256, (count, size, size, 3))).astype(np.uint8))


def with_config(folder: Path, copy: Path, **ours) -> Path:
    """A copy of a model folder whose config says something else under "metasaug"; its manifest is right."""
    shutil.copytree(folder, copy)
    opened = ModelFolder(copy)
    config = {**opened.config, "metasaug": {**opened.config["metasaug"], **ours}}
    add_files(copy, {CONFIG: json.dumps(config).encode()}, {n: e for n, e in opened.files.items() if n != CONFIG})
    return copy


@pytest.fixture(scope="module")
def model(tiny_model_folder) -> zoo.Predictor:
    return zoo.load(tiny_model_folder)


@pytest.fixture(scope="module")
def assuming_train(tiny_model_folder, tmp_path_factory) -> zoo.Predictor:
    """A model of plain cross entropy: what it gives holds where classes are as frequent as in training."""
    return zoo.load(with_config(tiny_model_folder, tmp_path_factory.mktemp("prior") / "m", prior="train"))


def scores(prediction) -> bytes:
    """Every digit of it."""
    return b"".join(getattr(prediction, key).tobytes() for key in ("probabilities", *OUTPUTS))


# ---- two backends, one answer ----


def agree(mine: np.ndarray, theirs: np.ndarray) -> None:
    """To 1e-4 for values up to 10, in proportion above (random weights give logits of hundreds)."""
    assert np.abs(mine - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max() / 10)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_onnx_and_torch_agree_in_any_batch(tiny_model_folder, model, batch):
    pytest.importorskip("torch")
    # Given 85 made-up pictures, when both backends see them in batches of 1, 3 and 7,
    by_torch = zoo.load(tiny_model_folder, backend="torch", device="cpu")
    pictures = noise(85, seed=batch)
    mine, theirs = (m.predict_batch(pictures, batch_size=batch, feature_maps=True) for m in (model, by_torch))
    # then logits, features and feature maps agree, and so does the class named.
    for key in OUTPUTS:
        agree(np.stack([getattr(p, key) for p in mine]), np.stack([getattr(p, key) for p in theirs]))
    assert [p.top[0].index for p in mine] == [p.top[0].index for p in theirs]


def test_the_module_is_the_network_behind_the_prediction(model):
    torch = pytest.importorskip("torch")
    picture = noise(3)[1]
    assert not model.module.training
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(model.preprocess(picture)[None]))[0].numpy()
    agree(logits, model.predict(picture).logits)


# ---- one picture, many, a folder ----


def test_one_picture_many_and_a_folder_agree(model, pictures):
    paths = sorted(pictures.iterdir())
    alone = [model.predict(path) for path in paths]
    many = model.predict_batch(paths, batch_size=2)
    folder = list(model.predict_folder(pictures, batch_size=3))
    lazily = list(model.predict_each(iter(paths)))
    for group in (many, folder, lazily):
        assert [p.source for p in group] == [str(path) for path in paths]
        assert [p.top[0].label for p in group] == [p.top[0].label for p in alone]
        for a, b in zip(alone, group, strict=True):
            agree(a.logits, b.logits)


def test_a_path_its_bytes_its_pil_image_and_its_array_agree(model, pictures):
    path = pictures / "d.jpg"
    with Image.open(path) as picture:
        sources = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
        assert len({scores(model.predict(source)) for source in sources}) == 1
    assert [model.predict(s).source for s in sources[1:3]] == [str(path), "picture 1"]


def test_a_folder_is_walked_in_order_and_other_files_are_left_out(model, tmp_path):
    for name in ("b/2.png", "a.png", "b/1.png", ".hidden/x.png", "b/.DS_Store", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    (tmp_path / "c.jpg").write_text("no picture")
    rows = list(model.predict_folder(tmp_path))
    names = [Path(row.source).relative_to(tmp_path).as_posix() for row in rows]
    assert names == ["a.png", "b/1.png", "b/2.png", "c.jpg"]
    assert [r.error is None for r in rows] == [True, True, True, False]


def test_a_folder_that_is_none_or_empty_says_so_at_once(model, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, reason in [("file", "use predict for a single"), ("absent", "does not exist"), ("empty", "no pictures")]:
        with pytest.raises(PictureError, match=reason):
            model.predict_folder(tmp_path / name)


def bad_pictures(count: int) -> list:
    kinds = [b"", b"no picture", b"\x89PNG\r\n\x1a\n", "absent.png", "a\0b", np.zeros(3), None, Image.new("L", (0, 3))]
    return [kinds[i % len(kinds)] for i in range(count)]


def mixed_rows_equal_clean_rows(model, good: list, bad: list, seed: int) -> None:
    # Given good pictures and bad ones in between, at random places and in one long run,
    order = np.random.default_rng(seed).permutation(len(good) + len(bad) // 2)
    rest = len(bad) // 2
    mixed = [good[i] if i < len(good) else bad[i - len(good)] for i in order]
    mixed[5:5] = bad[rest : len(bad)] if len(bad) % 2 == 0 else bad[rest + 1 :]
    is_bad = [not isinstance(p, np.ndarray) or p.ndim != 3 for p in mixed]
    kept = [p for p, b in zip(mixed, is_bad, strict=True) if not b]
    # when all are predicted,
    rows, clean = (model.predict_batch(some, feature_maps=True) for some in (mixed, kept))
    # then there is a row for each, the bad ones with a reason and nothing else,
    assert len(rows) == len(mixed)
    assert [r.error is not None for r in rows] == is_bad
    for row in rows:
        assert row.error is None or (row.error and not row.top and not row.groups and row.logits is None)
    # and the good ones are, bit for bit, what they are without any bad one.
    assert [scores(r) for r in rows if r.error is None] == [scores(r) for r in clean]


def test_bad_pictures_change_no_digit_of_the_good_ones(model):
    mixed_rows_equal_clean_rows(model, noise(150), bad_pictures(60), seed=0)


def test_a_long_run_of_bad_pictures_changes_no_digit_either(model, monkeypatch):
    mixed_rows_equal_clean_rows(model, noise(70), bad_pictures(2400), seed=1)
    # Nor who is computed with whom, on which the last digits may hang: a batch once closed early after 1,000 bad ones.
    network, batches = model._network, []
    monkeypatch.setattr(model, "_network", lambda pictures: (batches.append(len(pictures)), network(pictures))[1])
    good = noise(70)
    model.predict_batch([*good[:10], *bad_pictures(2400), *good[10:]])
    assert batches == [64, 6]


@pytest.mark.promise("folder")
@pytest.mark.long
def test_a_thousand_good_and_two_hundred_bad(model, figure):
    mixed_rows_equal_clean_rows(model, noise(1000), bad_pictures(200), seed=2)
    figure("1,200 rows, 200 with a reason, 1,000 equal to the bit")


def test_rows_come_as_the_pictures_do(model):
    """Endless input: an endless camera gives rows, and bad pictures alone keep nothing back."""
    def camera():
        while True:
            yield from noise(3)

    rows = model.predict_each(camera(), batch_size=4)
    assert [next(rows).source for _ in range(5)] == [f"picture {i}" for i in range(1, 6)]
    broken = model.predict_each(iter([b"x", b"y"]))
    assert next(broken).error


def test_large_jpegs_are_decoded_smaller_on_request(tiny_model_folder):
    """At least at twice the network's 32 pixels; what is shown then differs by less than two levels on average."""
    reduced, whole = zoo.load(tiny_model_folder), zoo.load(tiny_model_folder)
    reduced.reduced = True
    assert [reduced._shrink(*size) for size in ((127, 500), (128, 500), (4000, 256), (3000, 2000))] == [None, 2, 4, 8]
    photograph = Image.fromarray(noise(2, size=150)[1]).resize((1200, 900), Image.Resampling.BICUBIC)
    levels = {}
    for kind, size in (("JPEG", (1200, 900)), ("JPEG", (120, 90)), ("PNG", (1200, 900))):
        file = io.BytesIO()
        photograph.resize(size).save(file, kind)
        shown = [model.preprocess(file.getvalue()) for model in (reduced, whole)]
        levels[kind, size] = 255 * 0.25 * np.abs(shown[0] - shown[1]).mean()
    assert 0 < levels.pop(("JPEG", (1200, 900))) < 2
    assert set(levels.values()) == {0.0}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(1e-4, 1e4), min_size=10, max_size=10), st.floats(0, 2))
def test_any_prior_moves_each_class_by_its_odds(assuming_train, prior, tau):
    answer = assuming_train.predict(noise(1)[0])
    moved = assuming_train.reweigh(answer, prior=prior, tau=tau)
    own = np.array(assuming_train.class_counts) / sum(assuming_train.class_counts)
    odds = np.exp(answer.logits.astype(np.float64)) * (np.array(prior) / own) ** tau
    np.testing.assert_allclose(moved.probabilities, odds / odds.sum(), atol=1e-5)
    assert moved.top[0].index == moved.probabilities.argmax()


def test_nothing_in_nothing_out(model):
    assert model.predict_batch([]) == []


@pytest.mark.parametrize("single", ["photo.jpg", b"bytes", Path("photo.jpg"), Image.new("RGB", (4, 4)),
                                    np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)])
def test_one_picture_where_several_are_expected_is_no_row_of_letters(model, single):
    with pytest.raises(PictureError, match="use predict"):
        model.predict_batch(single)


def test_a_stack_of_pictures_is_several(model):
    assert len(model.predict_batch(np.zeros((5, 32, 32, 3), np.uint8))) == 5


# ---- what a prediction says ----


def test_probabilities_groups_and_the_top_fit_together(model):
    for p in model.predict_batch(noise(20), top_k=3, feature_maps=True):
        assert p.probabilities.shape == (10,) and p.probabilities.sum() == pytest.approx(1, abs=1e-5)
        by_hand = np.exp(p.logits.astype(np.float64) - p.logits.max())
        assert p.probabilities == pytest.approx(by_hand / by_hand.sum(), abs=1e-6)
        assert list(p.groups) == ["head", "medium", "tail"] and sum(p.groups.values()) == pytest.approx(1)
        for group, mass in p.groups.items():
            by_hand = sum(p.probabilities[c] for c in range(10) if model.groups[c] == group)
            assert mass == pytest.approx(by_hand, abs=1e-5)
        assert [c.index for c in p.top] == list(np.argsort(-p.logits, kind="stable")[:3])
        for c in p.top:
            assert (c.label, c.group, c.train_images) == (model.labels[c.index], model.groups[c.index],
                                                          model.class_counts[c.index])
            assert c.probability == pytest.approx(p.probabilities[c.index], abs=1e-6)
        assert p.features.shape == (64,) and p.feature_map.shape == (64, 8, 8)
        assert p.feature_map.mean((1, 2)) == pytest.approx(p.features, rel=1e-5, abs=1e-5)
    # A map, which is large, is kept where it is asked for.
    assert all(p.feature_map is None for p in model.predict_batch(noise(2)))


def test_top_k_is_cut_at_the_number_of_classes_and_refused_below_one(model):
    picture = noise(1)[0]
    assert len(model.predict(picture).top) == 5
    assert len(model.predict(picture, top_k=1).top) == 1
    assert len(model.predict(picture, top_k=1000).top) == 10
    for wrong in (0, -1, 2.5, "3"):
        with pytest.raises(ZooError, match="top_k"):
            model.predict(picture, top_k=wrong)
        with pytest.raises(ZooError, match="top_k"):
            model.predict_batch([b"bad"], top_k=wrong)
    with pytest.raises(ZooError, match="batch_size 0"):
        model.predict_batch([picture], batch_size=0)


def test_a_prediction_prints_as_a_table(model, pictures):
    text = str(model.predict(pictures / "a.png", top_k=2))
    first, best, second, groups = text.splitlines()
    assert first == str(pictures / "a.png")
    assert "%" in best and "times in training" in best and "%" in second
    assert groups.split()[::2] == ["head", "medium", "tail"]
    bad = model.predict_batch([b"no picture"])[0]
    assert str(bad).startswith("picture 1\n  the bytes is not a picture")
    assert "array" not in repr(bad)


def test_a_bad_picture_alone_raises(model, tmp_path):
    for bad in bad_pictures(8):
        with pytest.raises(PictureError):
            model.predict(bad)


# ---- priors ----


def adjusted(logits: np.ndarray, log_shift: np.ndarray) -> np.ndarray:
    """Logit adjustment by hand (Menon et al. 2021)."""
    moved = np.exp(logits.astype(np.float64) + log_shift)
    return moved / moved.sum()


def test_priors_move_logits_by_the_log_of_their_ratio(assuming_train):
    model, picture = assuming_train, noise(5)[3]
    plain = model.predict(picture)
    counts = np.array(model.class_counts, float)
    own = np.log(counts / counts.sum())
    mine = np.arange(1, 11)
    cases = {"uniform": -np.log(10) - own, "train": np.zeros(10)}
    for prior, shift in cases.items():
        got = model.predict(picture, prior=prior)
        assert got.probabilities == pytest.approx(adjusted(plain.logits, shift), abs=1e-6), prior
        assert (got.logits == plain.logits).all()
    for prior in (mine, list(mine), mine / mine.sum(), mine * 1e300, mine * 1e-300):
        got = model.predict(picture, prior=prior)
        assert got.probabilities == pytest.approx(adjusted(plain.logits, np.log(mine / 55) - own), abs=1e-6)
    # tau moves half of it, none of it, or twice as much.
    for tau in (0, 0.5, 2):
        got = model.predict(picture, prior="uniform", tau=tau)
        assert got.probabilities == pytest.approx(adjusted(plain.logits, tau * (-np.log(10) - own)), abs=1e-6)
    # The uniform prior gives more to rare classes, and in a batch as well as alone.
    fair = model.predict_batch([picture], prior="uniform")[0]
    assert fair.groups["tail"] > plain.groups["tail"] and fair.groups["head"] < plain.groups["head"]


def test_a_model_trained_for_balance_moves_the_other_way(tiny_model_folder, tmp_path):
    model = zoo.load(with_config(tiny_model_folder, tmp_path / "m", prior="uniform"))
    picture = noise(5)[3]
    plain = model.predict(picture)
    counts = np.array(model.class_counts, float)
    got = model.predict(picture, prior="train")
    assert got.probabilities == pytest.approx(adjusted(plain.logits, np.log(counts)), abs=1e-6)
    assert model.predict(picture, prior="uniform").probabilities == pytest.approx(plain.probabilities, abs=1e-6)


@pytest.mark.parametrize(("prior", "reason"), [
    ("flat", "Unknown prior 'flat': uniform, train, or 10 numbers"), ([1, 2, 3], "10 numbers"),
    (np.zeros(10), "above 0"), ([1] * 9 + [float("nan")], "above 0"),
    ([1] * 9 + [-1], "above 0"),
    ([1] * 9 + [float("inf")], "above 0"),
    (3, "10 numbers"), (np.ones((2, 5)), "10 numbers"), (["a"] * 10, "10 numbers"), ({"a": 1}, "10 numbers")])
def test_a_prior_that_is_none_says_what_one_is(assuming_train, prior, reason):
    with pytest.raises(ZooError, match=reason):
        assuming_train.predict(noise(1)[0], prior=prior)


def test_tau_must_be_finite(assuming_train):
    for tau in (float("nan"), float("inf"), 1e308):
        with pytest.raises(ZooError, match="tau"):
            assuming_train.predict(noise(1)[0], prior="uniform", tau=tau)


def test_a_model_that_does_not_know_its_prior_refuses_any(model):
    """Nothing is guessed."""
    with pytest.raises(ZooError, match="does not say which prior"):
        model.predict(noise(1)[0], prior="uniform")


def test_unknown_counts_make_unknown_groups(tiny_model_folder, tmp_path):
    model = zoo.load(with_config(tiny_model_folder, tmp_path / "m", class_counts=None, groups=["unknown"] * 10,
                                 groups_by="unknown", prior="train", results=None))
    p = model.predict(noise(1)[0])
    assert model.class_counts is None and model.groups_by == "unknown"
    assert p.groups == {"unknown": pytest.approx(1)}
    assert p.top[0].train_images is None and p.top[0].group == "unknown"
    assert "unknown" in str(p) and "times in training" not in str(p)
    with pytest.raises(ZooError, match="not known"):
        model.predict(noise(1)[0], prior="train")


# ---- backends and devices ----


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_cuda_where_there_is_none_is_a_backend_error(tiny_model_folder, backend, monkeypatch):
    if backend == "torch":
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a CUDA device here")
    with pytest.raises(BackendError, match="device='cpu'"):
        zoo.load(tiny_model_folder, backend=backend, device="cuda")
    assert zoo.load(tiny_model_folder, backend=backend, device="auto").device == "cpu"


@pytest.mark.parametrize("wrong", [{"backend": "tensorrt"}, {"device": "mps"}, {"device": None}])
def test_unknown_backends_and_devices_list_the_known(tiny_model_folder, wrong):
    with pytest.raises(BackendError, match=r"onnx or torch|auto, cpu or cuda"):
        zoo.load(tiny_model_folder, **wrong)


def test_it_prints_as_what_it_is(model):
    assert repr(model) == "<tiny: 10 classes, onnx on cpu>"


def test_an_answer_is_reweighed_without_the_network(tiny_model_folder, pictures):
    # Given an answer, when another prior is asked for, then it is what predict says for that prior, and None undoes it.
    model = zoo.load(tiny_model_folder)
    model.folder.config["metasaug"]["prior"] = "uniform"
    plain = model.predict(pictures / "a.png")
    inverted = 1 / np.array(model.class_counts)
    model_network, model._network = model._network, None  # any pass through it now would fail
    for prior in ("train", inverted):
        again = model.reweigh(plain, prior=prior, tau=0.5, top_k=3)
        model._network = model_network
        assert again == model.predict(pictures / "a.png", prior=prior, tau=0.5, top_k=3)
        model._network = None
        assert again != plain and model.reweigh(again) == plain


def test_a_prior_in_numbers_is_the_one_that_answers_are_shifted_from(tiny_model_folder, pictures):
    # Given a model whose training assumed the square root of its counts' frequencies,
    model = zoo.load(tiny_model_folder)
    own = np.sqrt(np.array(model.class_counts, float))
    model.folder.config["metasaug"]["prior"] = (own / own.sum()).tolist()
    plain = model.predict(pictures / "a.png")
    # when asked for uniform classes, then each probability is divided by it; asked for its own, nothing changes.
    uniform = model.predict(pictures / "a.png", prior="uniform")
    expected = plain.probabilities / own
    np.testing.assert_allclose(uniform.probabilities, expected / expected.sum(), rtol=1e-4)
    same = model.predict(pictures / "a.png", prior=own)
    np.testing.assert_allclose(same.probabilities, plain.probabilities, rtol=1e-4)


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_model_that_was_loaded_before_a_fork_answers_after_it(backend):
    # Given a process that loads a model, predicts with several threads, and forks, when the child predicts,
    if backend == "torch":
        pytest.importorskip("torch")
    script = f"""
import os, signal, numpy as np, zoo
model = zoo.load("ce-cifar10-lt", backend={backend!r})
if {backend!r} == "torch":
    import torch
    torch.set_num_threads(4)
pictures = [np.full((32, 32), shade, np.uint8) for shade in range(16)]
answer = model.predict_batch(pictures)[3].top[0]
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if model.predict_batch(pictures)[3].top[0].label == answer.label else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180,
                          cwd=Path(zoo.__file__).parent.parent)
    # then it gives the same answer, and does not wait for threads that did not come along.
    assert done.stdout.strip() == "0", done.stderr
