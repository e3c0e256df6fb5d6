"""Cached features give what pictures give; no kill, neighbour, full disk or stranger's cache changes a byte of them."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training.data.batches import Batches  # noqa: E402
from training.data.datasets import Split  # noqa: E402
from training.errors import Interrupted, TrainingError  # noqa: E402
from training.method.closed_form import frozen_head_step  # noqa: E402
from training.method.covariance import LearnedCovariance, RunningCovariance  # noqa: E402
from training.method.heldout import HeldOut, heldout_step  # noqa: E402
from training.method.losses import HeadLoss, class_balanced_weights  # noqa: E402
from training.method.metasaug import isda_step, metasaug_step, plain_step  # noqa: E402
from training.network import feature_cache as features  # noqa: E402
from training.network.derivatives import features_of  # noqa: E402
from training.network.feature_cache import VIEWS, CachedBatches, FeatureCache, Head  # noqa: E402
from training.recipes import Cifar10LT, INat18  # noqa: E402
from training.run import evaluation, loop, stages  # noqa: E402
from zoo.architectures import create  # noqa: E402

from .test_datasets import write_class_folders  # noqa: E402
from .test_training import (  # noqa: E402
    CPU,
    TINY,
    Killed,
    assert_same_bits,
    coloured_stripes,
    kill_after,
    log_without_times,
    small_data,
)

DATA = small_data()
VIEW = stages.view_of(TINY, DATA)


def a_backbone(dtype=torch.float32):
    """ResNet-32 that has seen some stripes, so that its features are of a usual size."""
    torch.manual_seed(0)
    module = create("resnet8", 3)
    with torch.no_grad():
        for _ in range(30):
            module(torch.randn(50, 3, 16, 16))
    return module.to(dtype).eval()


def a_cache(folder, views=2, **how):
    return FeatureCache(folder, views, VIEW, 0, CPU, **how)


class OfViews(Batches):
    """Pictures in the views that a cache has of them, drawn as `CachedBatches` draws: the truth it is held to."""

    def __init__(self, pictures, views, kind, batch_size, dtype=torch.float32):
        super().__init__(pictures, VIEW, 0, batch_size, CPU)
        self.dtype = dtype
        self.drawn = np.stack([VIEW.draw(np.random.default_rng([0, k, VIEWS, kind == "meta"]), len(pictures))
                               for k in range(views)])

    def draw(self, rng, n):
        return rng.integers(0, len(self.drawn), n)

    def _shown(self, at, views, parts):
        return (pictures.to(self.dtype) for pictures in super()._shown(at, self.drawn[views, at], parts))


def closed_form(head, x, y, x_meta, y_meta, learned, loss, **how):
    return frozen_head_step(head.get_classifier(), features_of(head, x).detach(), y, features_of(head, x_meta).detach(),
                            y_meta, learned, loss, **how)


METHODS = {
    "plain": ("ce", lambda net, x, y, meta, learned, loss, w: plain_step(net, x, y, loss, w)),
    "isda": ("ce", lambda net, x, y, meta, learned, loss, w: isda_step(net, x, y, learned.running, loss, 0.5, w)),
    "metasaug": ("focal", lambda net, x, y, meta, learned, loss, w: metasaug_step(
        net, x, y, *meta, learned, loss, strength=0.5, inner_rate=0.1, class_weights=w)),
    "heldout": ("ce", lambda net, x, y, meta, learned, loss, w: heldout_step(
        net, x, y, *meta, learned, loss, 0.5, w)),
    "metasaug in closed form": ("ldam", lambda net, x, y, meta, learned, loss, w: closed_form(
        net, x, y, *meta, learned, loss, strength=0.5, inner_rate=0.1, class_weights=w)),
}


@pytest.mark.parametrize("method", METHODS)
def test_training_on_features_is_training_on_the_same_views_of_the_pictures(tmp_path, method):
    # Given a backbone in float64, three views of each picture, and their features kept as float64,
    module = a_backbone(torch.float64)
    cache = a_cache(tmp_path, 3, dtype=np.float64)
    loss_name, step = METHODS[method]
    runs = []
    for cached in (False, True):
        # when two epochs are trained on the pictures, and on the features,
        net = a_backbone(torch.float64).requires_grad_(False)
        net.get_classifier().requires_grad_()
        if cached:
            train, meta = (CachedBatches(part, cache.of(kind, part, module), VIEW, 0, 16, CPU, torch.float64)
                           for kind, part in (("train", DATA.train), ("meta", DATA.meta)))
            net = Head(net.get_classifier())
        else:
            train, meta = (OfViews(part, 3, kind, 16, torch.float64)
                           for kind, part in (("train", DATA.train), ("meta", DATA.meta)))
        running = RunningCovariance(3, 64, "diagonal", torch.float64)
        learned = HeldOut(running, (6, 6, 0)) if method == "heldout" else LearnedCovariance(running)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9, weight_decay=5e-4)
        losses = []
        for epoch in range(2):
            for (x, y), of_meta in zip(train.epoch(epoch), meta.meta(epoch, 0, train.steps), strict=True):
                losses.append(step(net, x, y, of_meta, learned, HeadLoss(loss_name, DATA.class_counts),
                                   class_balanced_weights(DATA.class_counts)).loss)
                optimizer.step()
        layer = net.get_classifier()
        runs.append([torch.stack(losses), layer.weight, layer.bias, learned.delta, learned.running.covariance])
    # then losses, weights and covariances are the same.
    for of_pictures, of_features in zip(*runs, strict=True):
        assert (of_pictures - of_features).norm() <= 1e-12 * max(1, of_pictures.norm())
    assert method == "isda" or method == "plain" or runs[0][3].norm() > 0


def frozen(**flags) -> Cifar10LT:
    usual = {"stage2_trains": "classifier", "covariance": "diagonal", "strength": 0.25, "lr": 0.01, "stage2_lr": 1e-3,
             "epochs": 8, "stage2_epochs": 4, "cache_features": 2}
    return dataclasses.replace(TINY, **usual, **flags)


def test_a_whole_run_on_features_ends_where_one_on_the_same_views_ends(tmp_path, monkeypatch):
    # Given a recipe whose stage 2 trains the last layer, run on features kept in float16 and in float32,
    ends = {}
    for dtype in (np.float16, np.float32):
        monkeypatch.setattr(loop, "FeatureCache", lambda *a, dtype=dtype, **k: FeatureCache(*a, **k, dtype=dtype))
        ends[dtype] = loop.run(frozen(), DATA, tmp_path / np.dtype(dtype).name, CPU)
    # and on pictures in the same views,
    monkeypatch.setattr(loop, "on_features", lambda stage, *_: dataclasses.replace(
        stage, batches=OfViews(DATA.train, 2, "train", 16), meta=OfViews(DATA.meta, 2, "meta", 16)))
    state, results = loop.run(frozen(), DATA, tmp_path / "pictures", CPU)
    truth = state.module.fc.weight.detach()

    def away(dtype):
        return ((ends[dtype][0].module.fc.weight - truth).norm() / truth.norm()).item()

    # then in float32 it ends on the same weights (measured: to the bit), in float16 to its rounding (measured: 1.3e-5),
    # and in the same answers.
    assert away(np.float32) < 1e-6
    assert away(np.float16) < 1e-4
    assert ends[np.float16][1]["per_class"] == ends[np.float32][1]["per_class"] == results["per_class"]


def test_the_test_set_gives_exactly_what_its_pictures_give(tmp_path):
    module = a_backbone()
    for pictures in (DATA.test, small_data().test):
        data = dataclasses.replace(DATA, test=pictures)
        by_features = evaluation.evaluate(module, data, VIEW, ("head",) * 3, CPU,
                                    features_KNA=a_cache(tmp_path).of("test", pictures, module))
        assert by_features == evaluation.evaluate(module, data, VIEW, ("head",) * 3, CPU)


def test_the_cache_waits_for_stage_2_and_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    # Given a large set's recipe: stage 1 trains the network, stage 2 the last layer,
    recipe = INat18(architecture="resnet8", epochs=4, stage2_epochs=2, batch_size=16, stage2_batch_size=16, lr=0.05,
                    stage2_lr=0.01, input_size=16, crops="shift", cache_features=2)
    seen = []
    whole, results = loop.run(recipe, DATA, tmp_path / "whole", CPU, on_progress=lambda state: seen.append(
        (state.epoch, (tmp_path / "whole" / "features").exists())))
    # then the features are computed where stage 1 has ended;
    assert {there for epoch, there in seen if epoch < 2} == {False}
    assert {there for epoch, there in seen if epoch >= 2} == {True}
    # when it is killed in either stage, and while the features are computed, then it goes on to the same bits.
    for after in (3, 7, 3):
        with pytest.raises(Killed):
            loop.run(recipe, DATA, tmp_path / "killed", CPU, resume=True, on_progress=kill_after(after))
    resumed, again = loop.run(recipe, DATA, tmp_path / "killed", CPU, resume=True)
    assert_same_bits(whole, resumed)
    assert again == results
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")
    assert bytes_in(tmp_path / "killed" / "features") == bytes_in(tmp_path / "whole" / "features")


def test_a_stop_signal_while_features_are_computed_leaves_at_the_next_part(tmp_path, monkeypatch):
    # Given a run that receives SIGTERM while its first features are computed,
    def stop(net, x):
        os.kill(os.getpid(), signal.SIGTERM)
        return features_of(net, x)

    monkeypatch.setattr(features, "features_of", stop)
    # when it stops, then with 143 after that part, and the run goes on from there.
    with pytest.raises(Interrupted) as caught:
        loop.run(frozen(), DATA, tmp_path, CPU)
    assert caught.value.exit_code == 143
    (done,) = (tmp_path / "features").glob("*.done")
    assert done.read_bytes() == b"\1"
    monkeypatch.setattr(features, "features_of", features_of)
    loop.run(frozen(), DATA, tmp_path, CPU, resume=True)


def test_where_the_backbone_moves_nothing_is_cached():
    with pytest.raises(TrainingError, match="stage2-trains classifier"):
        Cifar10LT(cache_features=2)


# ---- the files ----

MANY = coloured_stripes([700, 400, 200], 3)  # three parts a view


def bytes_in(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(parts: int):
    calls = iter(range(parts))

    def before_each():
        if next(calls, None) is None:
            raise Killed

    return before_each


def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(tmp_path):
    # Given features that nobody disturbed,
    module = a_backbone()
    whole = a_cache(tmp_path / "whole").of("train", MANY, module)
    # when a build is stopped after two parts, and a third one is torn in the middle,
    cache = a_cache(tmp_path / "stopped")
    with pytest.raises(Killed):
        cache.of("train", MANY, module, stop_after(3))
    (done,) = (tmp_path / "stopped").glob("*.done")
    (file,) = (tmp_path / "stopped").glob("*.float16")
    assert 0 < sum(done.read_bytes()) < 6
    with open(file, "r+b") as torn:
        torn.seek(5 * file.stat().st_size // 6)
        torn.write(b"torn")
    # then it goes on with the parts that are missing, and every byte is the same.
    computed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "features_of", lambda net, x: computed.append(len(x)) or features_of(net, x))
        again = cache.of("train", MANY, module)
    assert 0 < sum(computed) < 2 * len(MANY)
    assert np.array_equal(again, whole)
    assert bytes_in(tmp_path / "stopped") == bytes_in(tmp_path / "whole")


def test_features_are_used_again_only_for_what_they_were_made_of(tmp_path, monkeypatch):
    # Given a cache of two views,
    module, cache = a_backbone(), a_cache(tmp_path)
    first = cache.of("meta", DATA.meta, module)
    computed = []
    monkeypatch.setattr(features, "features_of", lambda net, x: computed.append(len(x)) or features_of(net, x))

    def computes(cache, pictures, module, kind="meta") -> bool:
        computed.clear()
        cache.of(kind, pictures, module)
        return bool(computed)

    # when the same is asked for again, also with another last layer, then nothing is computed;
    assert not computes(a_cache(tmp_path), DATA.meta, module)
    other_head = a_backbone()
    torch.nn.init.zeros_(other_head.fc.weight)
    assert not computes(cache, DATA.meta, other_head)
    # and whatever else differs, it is computed anew beside the old one, which stays as it is.
    pictures = DATA.meta.pictures.copy()
    pictures[0, 0, 0, 0] ^= 1
    assert computes(cache, Split(pictures, DATA.meta.labels), module)
    assert computes(cache, Split(DATA.meta.pictures, DATA.meta.labels[::-1].copy()), module)
    other = a_backbone()
    other.bn1.running_mean += 1e-3
    assert computes(cache, DATA.meta, other)
    for change in ({"views": 3}, {"seed": 1}, {"view": dataclasses.replace(VIEW, flips="none")},
                   {"view": dataclasses.replace(VIEW, mean=(0.4,) * 3)}, {"dtype": np.float32}):
        assert computes(dataclasses.replace(cache, **change), DATA.meta, module), change
    assert computes(cache, DATA.meta, module, "train") and computes(cache, DATA.meta, module, "test")
    assert np.array_equal(cache.of("meta", DATA.meta, module), first)


def test_pictures_on_disk_are_known_by_name_size_and_label(tmp_path):
    from training.data.datasets import PictureFiles
    from training.data.tables import list_class_folders

    write_class_folders(tmp_path / "pictures", {"a": 3, "b": 3}, size=(20, 20))
    paths, labels, _ = list_class_folders(tmp_path / "pictures")
    names = tuple(str(path.relative_to(tmp_path / "pictures")) for path in paths)

    def key():
        return features._pictures_key(PictureFiles(tmp_path / "pictures", names, labels))

    before = key()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "pictures")
    assert features._pictures_key(PictureFiles(tmp_path / "elsewhere", names, labels)) == before
    paths[0].write_bytes(paths[0].read_bytes() + b"\0")
    assert key() != before


def test_a_disk_too_small_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    # Given a disk with 10 kB left,
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    # when a run asks for more, then it stops before its first step and says how much it takes and what to do.
    with pytest.raises(TrainingError, match=r"take 46 kB in .*features, where 10 kB are free.*--features"):
        loop.run(frozen(), DATA, tmp_path, CPU, on_progress=lambda _: pytest.fail("trained"))
    # So does one whose checkpoints and model have no room.
    with pytest.raises(TrainingError, match=r"will write \S+ [kM]B into .*, where 10 kB are free.*--out"):
        loop.run(dataclasses.replace(frozen(), cache_features=0), DATA, tmp_path, CPU,
                 on_progress=lambda _: pytest.fail("trained"))


def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch):
    # Given a disk that is full after three parts,
    module, calls, write = a_backbone(), [], os.pwrite

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(features.os, "pwrite", full)
    with pytest.raises(TrainingError, match=r"No space left.*--resume"):
        a_cache(tmp_path / "full").of("train", MANY, module)
    # when there is room again, then it goes on to the same bytes.
    monkeypatch.setattr(features.os, "pwrite", write)
    a_cache(tmp_path / "full").of("train", MANY, module)
    a_cache(tmp_path / "whole").of("train", MANY, module)
    assert bytes_in(tmp_path / "full") == bytes_in(tmp_path / "whole")


def test_a_file_that_was_cut_off_is_named(tmp_path):
    module = a_backbone()
    a_cache(tmp_path).of("meta", DATA.meta, module)
    (file,) = tmp_path.glob("*.float16")
    os.truncate(file, 100)
    with pytest.raises(TrainingError, match=r"cut off or changed\. Remove it and meta-\w+\.done"):
        a_cache(tmp_path).of("meta", DATA.meta, module)


def test_features_beyond_float16_and_nan_are_told(tmp_path):
    module = a_backbone()
    module.layer3[-1].bn2.weight.data *= 1e6
    with pytest.raises(TrainingError, match=r"do not fit into float16.*without --cache-features"):
        a_cache(tmp_path).of("train", DATA.train, module)
    a_cache(tmp_path, dtype=np.float32).of("train", DATA.train, module)
    module.conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="NaN or infinite"):
        a_cache(tmp_path).of("train", DATA.train, module)


BUILD = """
import sys, time
from pathlib import Path
from tests.test_features import MANY, a_backbone, a_cache
from training.network import feature_cache as features
usual = features.features_of
def slow(net, x):
    time.sleep(0.05)
    return usual(net, x)
features.features_of = slow
a_cache(Path(sys.argv[1]), 4).of("train", MANY, a_backbone())
"""


def building(folder) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder)], stderr=subprocess.PIPE, text=True)


def test_runs_that_start_at_once_share_the_work_and_one_that_is_killed_leaves_it_to_the_others(tmp_path):
    # Given two processes that build the same cache, of which one is killed in the middle,
    one, other = building(tmp_path / "shared"), building(tmp_path / "shared")
    deadline = time.monotonic() + 60
    while not any(sum(done.read_bytes()) for done in (tmp_path / "shared").glob("*.done")):
        assert time.monotonic() < deadline and one.poll() is None
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    # when the other ends, then it ends well, and every byte is what one alone makes.
    assert other.wait(60) == 0, other.stderr.read()
    for process in (one, other):
        process.wait()
        process.stderr.close()
    a_cache(tmp_path / "alone", 4).of("train", MANY, a_backbone())
    assert bytes_in(tmp_path / "shared") == bytes_in(tmp_path / "alone")
