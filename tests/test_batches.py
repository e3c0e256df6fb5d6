"""Pictures of any size become batches that depend on (seed, epoch, index) and on nothing else."""

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from training.data.batches import Batches, View, _part, hold, in_order  # noqa: E402
from training.data.datasets import PictureFiles, Split  # noqa: E402
from training.errors import DataError  # noqa: E402
from zoo.images import decode, fitted, preprocess  # noqa: E402

CPU = torch.device("cpu")
SHAPES = [(40, 20), (13, 60), (32, 32), (200, 90), (1, 7), (33, 31), (90, 300)]


def view(**changes) -> View:
    return View(**{"size": (16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), **changes})


@pytest.fixture
def files(tmp_path) -> PictureFiles:
    """Three pictures of each shape, as PNG and JPEG."""
    rng = np.random.default_rng(0)
    names = []
    for i, (width, height) in enumerate(SHAPES * 3):
        names.append(f"{i}.{'jpg' if i % 2 else 'png'}")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / names[-1])
    return PictureFiles(tmp_path, tuple(names), np.arange(len(names)) % 3)


def collected(batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(pictures.clone(), labels.clone()) for pictures, labels in batches]


def assert_same(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for left, right in zip(one, other, strict=True)
               for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_network_is_tested_on_what_predicting_shows_it(files, crop_mode):
    # Given pictures of many shapes, when training tests on them, from disk or from memory,
    how = view(crop_mode=crop_mode, crop_pct=0.875)
    expected = np.stack([preprocess(decode(path), how.pretrained_cfg) for path in files.paths])
    # then each is to the bit what zoo makes of it for anyone who predicts with the model folder.
    for pictures in (files, hold(files, how)):
        shown = torch.cat([batch for batch, _ in in_order(pictures, how, CPU)])
        np.testing.assert_allclose(shown.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("how", [view(crop_mode="squash", flips="all"),
                                 view(crops="resized", color_jitter=0.4)], ids=["shift", "resized"])
def test_neither_workers_nor_memory_change_a_bit(files, how):
    # Given an epoch and meta batches, decoded in this process,
    def batches(pictures, workers):
        made = Batches(pictures, how, seed=3, batch_size=4, device=CPU, workers=workers)
        return collected(made.epoch(5)) + collected(made.meta(5, 2, 9))

    alone = batches(files, 0)
    # when two processes decode, or the pictures are held in memory, then every batch is the same.
    assert_same(alone, batches(files, 2))
    if how.crops == "shift":
        assert_same(alone, batches(hold(files, how, workers=2), 0))


def test_an_epoch_goes_on_anywhere_and_shows_each_picture_once(files):
    made = Batches(files, view(flips="none"), seed=0, batch_size=4, device=CPU)
    whole = collected(made.epoch(1))
    assert [len(labels) for _, labels in whole] == [4, 4, 4, 4, 4]  # the last picture alone has no batch statistics
    assert_same(whole[3:], collected(made.epoch(1, first_step=3)))
    assert_same(collected(made.meta(1, 0, 8))[5:], collected(made.meta(1, 5, 8)))
    # Another epoch or seed shows another order.
    assert not torch.equal(whole[0][0], next(made.epoch(2))[0])
    assert not torch.equal(whole[0][0], next(Batches(files, view(flips="none"), 1, 4, CPU).epoch(1))[0])


@pytest.mark.parametrize(("flips", "seen"), [("none", 1), ("mirror", 2), ("all", 8)])
def test_flips_show_the_ways_up_that_they_say(flips, seen):
    # Given a picture that differs under every turn and mirror, many times, and no room to shift,
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    how = view(size=(4, 4), flips=flips)  # a quarter of an eighth of 4: padding 0
    made = Batches(Split(np.stack([picture] * 200), np.zeros(200, np.int64)), how, 0, 50, CPU)
    # when an epoch shows it, then as often as there are ways up, and each about as often as another.
    ways, counts = np.unique(np.concatenate([pictures.numpy() for pictures, _ in made.epoch(0)]).reshape(200, -1),
                             axis=0, return_counts=True)
    assert len(ways) == seen
    assert counts.min() > 200 / seen / 2.5


@pytest.mark.parametrize("shape", [(500, 375), (10, 2000), (1, 1), (3, 500)])
def test_resized_crops_are_parts_of_the_picture(shape):
    """RandomResizedCrop's rule, on panoramas and dots too, where its ten tries fail."""
    rng = np.random.default_rng(0)
    width, height = shape
    for _ in range(200):
        left, top, right, bottom = _part(rng, width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        if shape == (500, 375):
            assert 0.07 < (right - left) * (bottom - top) / (width * height) <= 1
            assert 0.74 < (right - left) / (bottom - top) < 1.35


def test_a_picture_that_vanishes_in_the_middle_of_training_is_named(files):
    for workers in (0, 2):
        made = Batches(files, view(), 0, 4, CPU, workers)
        if files.paths[5].exists():
            files.paths[5].unlink()
        with pytest.raises(DataError, match=r"5\.jpg does not exist"):
            collected(made.epoch(0))


def test_border_keeps_the_whole_picture_and_squash_fills_the_frame():
    # Given a wide white picture, and a mean that is dark,
    wide = Image.new("RGB", (80, 20), "white")
    cfg = view(mean=(0.1, 0.1, 0.1)).pretrained_cfg
    # when it is fitted, then border has a quarter of the frame white between two dark bands,
    border = np.asarray(fitted(wide, {**cfg, "crop_mode": "border"}))
    assert (border == 255).mean() == 0.25 and (border[6:10] == 255).all() and (border[:6] == 26).all()
    # and squash and center have all of it white.
    for mode in ("squash", "center", None):
        assert (np.asarray(fitted(wide, {**cfg, "crop_mode": mode})) == 255).all()


def test_fitting_is_timms():
    """crop_mode is timm's key: the same pixels as its own transforms."""
    timm_data = pytest.importorskip("timm.data")
    rng = np.random.default_rng(0)
    for mode in ("squash", "border", "center"):
        for crop_pct in (1.0, 0.875):
            cfg = view(size=(28, 28), crop_mode=mode, crop_pct=crop_pct).pretrained_cfg
            theirs = timm_data.create_transform(
                (3, 28, 28), interpolation="bilinear", mean=cfg["mean"], std=cfg["std"], crop_pct=crop_pct,
                crop_mode=mode)
            for width, height in ((90, 41), (41, 90), (64, 64), (29, 300)):
                picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                np.testing.assert_allclose(preprocess(picture, cfg), theirs(picture).numpy(), atol=1e-5,
                                           err_msg=f"{mode} {crop_pct} {width} x {height}")
