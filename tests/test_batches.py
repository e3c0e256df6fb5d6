"""Pictures of any size become batches that depend on (seed, epoch, index) and on nothing else."""

import dataclasses
import random
import weakref

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from training.data import batches as batches_module  # noqa: E402
from training.data.batches import (  # noqa: E402
    CROPS,
    META,
    ORDER,
    Batches,
    View,
    _part,
    hold,
    in_order,
    on_device,
    shown,
    slices,
)
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
    rng = random.Random(0)
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


def test_square_root_sampling_shows_so_many_of_each_class_and_others_each_time():
    # Given classes of 50, 9 and 4 pictures, of which an epoch shows 12, 9 and 4,
    labels = np.repeat([0, 1, 2], [50, 9, 4])
    split = Split(np.arange(63, dtype=np.uint8)[:, None, None, None].repeat(3, 3), labels)
    each = (12, 9, 4)
    made = Batches(split, view(size=(1, 1), mean=(0, 0, 0), std=(1 / 255,) * 3, flips="none", crops="resized"), 0, 10,
                   CPU, each_C=each)

    def seen(epoch, first=0):
        return np.concatenate([pictures[:, 0, 0, 0].round().int().numpy() for pictures, _ in made.epoch(epoch, first)])

    # when epochs are read, then each shows so many, none twice, mixed; common classes show others the next time;
    assert made.steps == 3
    for epoch in (0, 1):
        assert len(set(seen(epoch))) == 25
        assert tuple(np.bincount(labels[seen(epoch)])) == each
        assert (labels[seen(epoch)][:12] != 0).any()
    assert set(seen(0)) != set(seen(1)) and set(seen(0)) >= set(range(50, 63))
    # and an epoch that goes on in its middle is the same.
    np.testing.assert_array_equal(seen(1, 2), seen(1)[20:])


# ---- the gathers, against a loop over pictures ----


def one_by_one(split, how, at, drawn):
    """A batch the naive way: each picture padded, cropped, flipped and normalised by itself."""
    mean, std = (np.array(values, np.float32) for values in (how.mean, how.std))
    return np.stack([((how.augmented(split.pictures[i], row).astype(np.float32) / np.float32(255) - mean) / std)
                     .transpose(2, 0, 1) for i, row in zip(at, drawn, strict=True)])


@pytest.mark.parametrize("size", [(32, 32), (9, 9), (16, 23), (33, 8), (24, 2), (8, 1), (1, 1)])
@pytest.mark.parametrize("flips", ["none", "mirror", "all"])
@pytest.mark.parametrize("where", ["on the device", "too large for it"])
def test_gathers_are_a_loop_over_pictures_to_the_bit(size, flips, where, monkeypatch):
    # Given pictures of any size, also thinner than what they are padded by, that fit onto the device or do not,
    if flips == "all" and size[0] != size[1]:
        with pytest.raises(DataError, match="not square"):
            view(size=size, flips=flips)
        return
    if where == "too large for it":
        monkeypatch.setattr(batches_module, "on_device", lambda *_: None)
    rng = np.random.default_rng(1)
    split = Split(rng.integers(0, 256, (23, *size, 3), dtype=np.uint8), rng.integers(0, 4, 23))
    how = view(size=size, flips=flips)
    made = Batches(split, how, seed=3, batch_size=10, device=CPU)
    # when an epoch and its meta batches are read, from the start or from the middle,
    order = np.random.default_rng([3, 5, ORDER]).permutation(23)
    drawn = how.draw(np.random.default_rng([3, 5, CROPS]), 23)
    expected = [(order[i : i + 10], drawn[order[i : i + 10]]) for i in (0, 10, 20)]
    for first in (0, 2):
        # then each is what the loop makes of the same draws, the short last one too,
        for (pictures, labels), (at, rows) in zip(made.epoch(5, first), expected[first:], strict=True):
            np.testing.assert_array_equal(pictures.numpy(), one_by_one(split, how, at, rows))
            np.testing.assert_array_equal(labels.numpy(), split.labels[at])
            # in the types and the layout that networks expect,
            assert pictures.dtype == torch.float32 and labels.dtype == torch.int64
            assert pictures.is_contiguous(memory_format=torch.channels_last)
    # and a meta set is gone through in a new order each time.
    for step, (pictures, _) in zip(range(1, 6), made.meta(5, 1, 6), strict=True):
        turn, part = divmod(step, 2)
        rng = np.random.default_rng([3, 5, META, turn])
        at = rng.permutation(23)[part * 10 :][:10]
        np.testing.assert_array_equal(pictures.numpy(), one_by_one(split, how, at, how.draw(rng, 23)[at]))
    assert list(made.meta(5, 3, 3)) == []


def test_everything_in_a_batch_is_on_its_device_and_nothing_is_float64():
    """On the meta device any operation on tensors of two devices raises."""
    meta, seen = torch.device("meta"), set()

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.update(one.dtype for one in (result if isinstance(result, (tuple, list)) else [result])
                        if isinstance(one, torch.Tensor))
            return result

    split = Split(np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, np.int64))
    with Watched():
        made = Batches(split, view(size=(8, 8), flips="all"), 0, 4, meta)
        tested = [(pictures, pictures) for pictures, _ in in_order(split, made.view, meta)]
        batches = [*made.epoch(0), *made.meta(0, 0, 3), *tested]
    assert len(batches) == 6 and {one.device for batch in batches for one in batch} == {meta}
    assert torch.float32 in seen and torch.float64 not in seen


def test_stages_and_tests_share_what_is_on_the_device_as_long_as_it_lives():
    split = Split(np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, np.int64))
    there = on_device(split.pictures, torch.device("meta"))
    assert on_device(split.pictures, torch.device("meta")) is there
    # Stage 1 trains on the first of the pictures that stage 2 trains on.
    first = Batches(split, view(size=(8, 8)), 0, 4, CPU, first=6)
    assert [len(labels) for _, labels in first.epoch(0)] == [4, 2]
    alive = weakref.ref(there)
    del there, split, first
    assert alive() is None


def test_pictures_in_memory_are_cropped_as_from_disk(files):
    how = view(crops="resized", flips="all")
    split = Split(np.random.default_rng(0).integers(0, 256, (8, 20, 30, 3), dtype=np.uint8), np.zeros(8, np.int64))
    for (pictures, _), at in zip(Batches(split, how, 0, 4, CPU).epoch(0),
                                 np.random.default_rng([0, 0, ORDER]).permutation(8).reshape(2, 4), strict=True):
        drawn = how.draw(np.random.default_rng([0, 0, CROPS]), 8)[at]
        np.testing.assert_array_equal(pictures.numpy(), one_by_one(split, how, at, drawn))


@pytest.mark.parametrize("shape", [(500, 375), (1600, 1200), (1001, 803)])
def test_reduced_decoding_shows_the_same_parts_within_three_levels(tmp_path, shape):
    # Given photographs at quality 90,
    from benchmarks.loader import photograph

    rng = np.random.default_rng(0)
    for i in range(2):
        photograph(*shape, rng).save(tmp_path / f"{i}.jpg", quality=90)
    files = PictureFiles(tmp_path, ("0.jpg", "1.jpg"), np.zeros(2, np.int64))
    how = view(size=(96, 96), mean=(0, 0, 0), std=(1, 1, 1), crops="resized", flips="all", reduced=True)
    at = np.arange(2).repeat(8)
    drawn = how.draw(rng, 16)
    # when random parts are decoded in the quick way and exactly,
    quick, exact = (next(shown(files, one, at, drawn, slices([16]), CPU)) * 255
                    for one in (how, dataclasses.replace(how, reduced=False)))
    # then they are the same parts, to less than three levels on average; another crop is ten times as far.
    assert 0 < (quick - exact).abs().mean() < 3
    assert (quick - exact.roll(1, 0)).abs().mean() > 20


def test_a_resized_part_is_pillows(tmp_path):
    """The exact decoding, resized by torch: Pillow's resize of the same part to a level."""
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for how in (view(crops="resized", flips="none"), view(crops="resized", flips="none", interpolation="bicubic")):
        filter_ = Image.Resampling[how.interpolation.upper()]
        for seed in range(20):
            part = _part(random.Random(seed), 120, 90)
            scale = batches_module._scale(part, how)
            part = tuple(side // scale * scale for side in part)
            expected = np.asarray(Image.fromarray(picture).crop(part).resize((16, 16), filter_), int)
            assert np.abs(how.augmented(picture, np.array([seed, 0, 0, 0, 0])) - expected).max() <= 1
