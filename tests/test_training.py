"""Whole small runs: they learn, they resume to the same bits, and they stop where they must."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training.data.batches import Batches  # noqa: E402
from training.data.datasets import LongTailed, Split  # noqa: E402
from training.errors import DivergenceError, Interrupted, TrainingError  # noqa: E402
from training.network.distributed import ALONE  # noqa: E402
from training.recipes import Cifar10LT  # noqa: E402
from training.run import evaluation, loop, stages, state, steps  # noqa: E402
from zoo.architectures import create  # noqa: E402
from zoo.labels import assign_groups  # noqa: E402

CPU = torch.device("cpu")
TINY = Cifar10LT(architecture="resnet8", epochs=5, batch_size=16, lr=0.05, imbalance=4, meta_per_class=4)


def coloured_stripes(n_per_class: list[int], seed: int, shuffled=False) -> Split:
    """Pictures of 16 x 16 whose class is the slope of their stripes; noise on top."""
    rng = np.random.default_rng(seed)
    pictures, labels = [], []
    y, x = np.mgrid[:16, :16]
    for c, n in enumerate(n_per_class):
        # A quarter turn in all: training mirrors pictures, and the mirror image of a class must be of that class.
        angle = np.pi / 2 * c / (len(n_per_class) - 1)
        for _ in range(n):
            wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.9 + rng.uniform(0, 6))
            noisy = wave[..., None] * rng.uniform(0.4, 1, 3) + rng.normal(0, 0.3, (16, 16, 3))
            pictures.append(np.clip(127 + 90 * noisy, 0, 255).astype(np.uint8))
            labels.append(c)
    labels = np.array(labels)
    return Split(np.stack(pictures), rng.permutation(labels) if shuffled else labels)


def small_data(shuffled=False) -> LongTailed:
    return LongTailed(coloured_stripes([40, 20, 10], 0, shuffled), coloured_stripes([6] * 3, 1, shuffled),
                      coloured_stripes([30] * 3, 2), ("a", "b", "c"), "stripes", (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("meta_in_training", ["never", "stage2"])
def test_square_root_sampling_reaches_batches_and_loss_of_both_stages(meta_in_training):
    # Given classes of 40, 20 and 10 pictures, of which an epoch shows sqrt(20 n),
    recipe = dataclasses.replace(TINY, sampling="square-root", loss="logit-adjustment", augment="none",
                                 meta_in_training=meta_in_training)
    both = stages.make_stages(recipe, small_data(), stages.view_of(recipe, small_data()), CPU, 0, ALONE)
    # when both stages are made, then batches and loss have these counts, with the meta pictures where they joined.
    for stage, counts in zip(both, ([40, 20, 10], [46, 26, 16] if meta_in_training == "stage2" else [40, 20, 10]),
                             strict=True):
        shown = recipe.shown_counts(counts)
        seen = torch.cat([labels for _, labels in stage.batches.epoch(0)])
        assert stage.loss.class_counts == shown and sum(shown) < sum(counts)
        assert seen.bincount().tolist() == list(shown)


class Killed(Exception):  # noqa: N818
    pass


def kill_after(steps: int):
    taken = iter(range(steps))

    def on_progress(_):
        if next(taken, None) is None:
            raise Killed

    return on_progress


def bits(state) -> dict[str, torch.Tensor]:
    """Everything that a run carries, flat."""
    optimizer = {f"momentum {i}": s["momentum_buffer"] for i, s in state.optimizer.state_dict()["state"].items()}
    return {**state.module.state_dict(), **optimizer,
            **{f"covariance {k}": v for k, v in state.covariance.state_dict().items()},
            **{f"learned {k}": v for k, v in state.learned.state_dict().items()}}


def assert_same_bits(one, other):
    one, other = bits(one), bits(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def log_without_times(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


METHODS = {
    "plain": {"augment": "none"},
    "isda": {"augment": "isda"},
    "metasaug": {},
    "metasaug through the network": {"lookahead": "network"},
    "metasaug, diagonal, ldam": {"covariance": "diagonal", "loss": "ldam"},
    "metasaug, reference": {"fidelity": "reference", "loss": "focal"},
    "heldout": {"augment": "heldout"},
}


def test_a_run_learns_and_with_shuffled_labels_the_gain_is_gone(tmp_path):
    # Given three classes told apart by their stripes, and the same pictures with labels shuffled,
    recipe = dataclasses.replace(TINY, epochs=15, lr=0.02)
    # when the same recipe trains on both,
    state, results = loop.run(recipe, small_data(), tmp_path / "real", CPU)
    _, shuffled = loop.run(recipe, small_data(shuffled=True), tmp_path / "shuffled", CPU)
    # then the real one learns what chance (67 % error) cannot, and the other does not.
    assert results["error"] < 0.3, results
    assert shuffled["error"] > 0.5
    log = log_without_times(tmp_path / "real")
    assert [line["epoch"] for line in log] == list(range(1, 16))
    # (In stage 2 the loss is the augmented one: it stands higher, and says nothing beside stage 1's.)
    assert log[recipe.stage2_epoch - 1]["loss"] < log[0]["loss"] / 2
    # The result is that of the last epoch, and the learned correction has moved.
    assert log[-1]["test"]["error"] == results["error"]
    assert results["epoch"] == 15
    assert state.learned.delta.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_anywhere_resumes_to_the_same_bits(tmp_path, method):
    # Given a run of each method that nobody disturbs,
    recipe = dataclasses.replace(TINY, **METHODS[method])
    whole, results = loop.run(recipe, small_data(), tmp_path / "whole", CPU)
    # when the same run is killed in stage 1 and twice in stage 2, each time going on from its last checkpoint,
    steps = Batches(small_data().train, stages.view_of(TINY, small_data()), 0, 16, CPU).steps
    for after in (steps + 2, 3 * steps - 1, steps):
        with pytest.raises(Killed):
            loop.run(recipe, small_data(), tmp_path / "killed", CPU, resume=True, on_progress=kill_after(after))
    resumed, again = loop.run(recipe, small_data(), tmp_path / "killed", CPU, resume=True)
    # then weights, momentum, covariances, results and log are bit for bit those of the undisturbed run.
    assert_same_bits(whole, resumed)
    assert again == results
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")


def test_a_stop_signal_in_the_middle_of_an_epoch_loses_nothing(tmp_path):
    # Given a run that receives SIGTERM in the middle of its fifth epoch, in stage 2,
    whole, _ = loop.run(TINY, small_data(), tmp_path / "whole", CPU)

    def stop(state):
        if (state.epoch, state.step) == (4, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    # when it stops, then it says so with 143, and that step is saved: no step is taken twice.
    with pytest.raises(Interrupted, match="after step 2") as caught:
        loop.run(TINY, small_data(), tmp_path / "stopped", CPU, on_progress=stop)
    assert caught.value.exit_code == 143
    first = []
    resumed, _ = loop.run(TINY, small_data(), tmp_path / "stopped", CPU, resume=True,
                          on_progress=lambda state: first.append((state.epoch, state.step)))
    assert first[0] == (4, 3)
    assert_same_bits(whole, resumed)
    assert log_without_times(tmp_path / "stopped") == log_without_times(tmp_path / "whole")


def test_a_shared_stage_1_is_the_same_as_training_it_oneself(tmp_path):
    # Given a plain run whose stage 1 is kept,
    plain = dataclasses.replace(TINY, augment="none")
    loop.run(plain, small_data(), tmp_path / "plain", CPU)
    # when MetaSAug starts from it, then it ends as if it had trained stage 1 itself.
    shared, _ = loop.run(TINY, small_data(), tmp_path / "shared", CPU, stage1=tmp_path / "plain")
    own, _ = loop.run(TINY, small_data(), tmp_path / "own", CPU)
    assert_same_bits(shared, own)
    # A stage 1 of another recipe is refused, and the difference named.
    with pytest.raises(TrainingError, match="seed 0, not 1"):
        loop.run(dataclasses.replace(TINY, seed=1), small_data(), tmp_path / "other", CPU, stage1=tmp_path / "plain")
    with pytest.raises(TrainingError, match="no stage-1 checkpoint"):
        loop.run(TINY, small_data(), tmp_path / "none", CPU, stage1=tmp_path / "nowhere")


@pytest.mark.parametrize("second", [
    {"loss": "ldam", "augment": "metasaug"}, {"loss": "focal", "augment": "isda"},
    {"loss": "balanced-softmax", "augment": "none", "stage1_loss": "ce"},
    {"augment": "none", "class_weights": "balanced", "meta_in_training": "stage2"},
])  # fmt: skip
def test_methods_that_begin_with_plain_cross_entropy_share_its_stage_1(tmp_path, second):
    # Given plain cross entropy, and a method that differs from it in stage 2 only,
    loop.run(dataclasses.replace(TINY, augment="none"), small_data(), tmp_path / "plain", CPU)
    method = dataclasses.replace(TINY, **second)
    # when it starts from the shared stage 1, then it ends as if it had trained that itself,
    shared, results = loop.run(method, small_data(), tmp_path / "shared", CPU, stage1=tmp_path / "plain")
    own, _ = loop.run(method, small_data(), tmp_path / "own", CPU)
    assert_same_bits(shared, own)
    # and its counts are those of what it trained on in the end.
    extra = 6 if method.meta_in_training == "stage2" else 0
    assert [row["train_images"] for row in results["per_class"]] == [40 + extra, 20 + extra, 10 + extra]


def test_a_loss_of_both_stages_does_not_pass_for_plain_cross_entropy(tmp_path):
    loop.run(dataclasses.replace(TINY, augment="none"), small_data(), tmp_path / "plain", CPU)
    for other in ({"loss": "focal"}, {"loss": "ldam-published"}, {"meta_in_training": "always"}):
        method = dataclasses.replace(TINY, augment="none", **other)
        with pytest.raises(TrainingError, match="another stage 1"):
            loop.run(method, small_data(), tmp_path / "other", CPU, stage1=tmp_path / "plain")


def test_a_run_folder_is_never_overwritten(tmp_path):
    loop.run(dataclasses.replace(TINY, epochs=1, augment="none"), small_data(), tmp_path, CPU)
    with pytest.raises(TrainingError, match="--resume"):
        loop.run(dataclasses.replace(TINY, epochs=1, augment="none"), small_data(), tmp_path, CPU)
    with pytest.raises(TrainingError, match=r"lr 0\.05"):
        loop.run(dataclasses.replace(TINY, epochs=1, augment="none", lr=0.1), small_data(), tmp_path, CPU, resume=True)


@pytest.mark.promise("divergence")
@pytest.mark.parametrize("method", ["plain", "metasaug"])
def test_divergence_stops_before_the_update(tmp_path, method):
    # Given a learning rate that must blow up,
    recipe = dataclasses.replace(TINY, **METHODS[method], lr=1e18)
    seen = []
    # when it trains, then it stops by name, and every weight that was seen after a step was finite.
    with pytest.raises(DivergenceError, match="epoch 1, step"):
        loop.run(recipe, small_data(), tmp_path, CPU,
                 on_progress=lambda s: seen.append(all(p.isfinite().all() for p in s.module.parameters())))
    assert all(seen)


def test_the_schedule_is_the_papers_at_200_epochs_and_scales():
    paper = Cifar10LT()
    assert [paper.lr_at(e) for e in (0, 159, 160, 179, 180, 199)] == pytest.approx([0.1, 0.1, 1e-3, 1e-3, 1e-5, 1e-5])
    assert (paper.stage2_epoch, paper.strength_at(160)) == (160, pytest.approx(0.8 * 0.75))
    short = Cifar10LT(epochs=60)
    assert (short.stage2_epoch, short.lr_at(53), short.lr_at(54)) == (48, pytest.approx(1e-3), pytest.approx(1e-5))


@pytest.mark.parametrize("epochs", range(1, 12))
def test_the_shortest_run_still_has_a_stage_2(epochs):
    """ceil(0.8 epochs) is past the end of a run of one to four: it was plain training under the method's name."""
    recipe = Cifar10LT(epochs=epochs)
    assert recipe.stage2_epoch < epochs
    assert 0 < recipe.strength_at(recipe.stage2_epoch) <= recipe.strength


@pytest.mark.parametrize("flags", [{"epochs": 0}, {"batch_size": 1}, {"lr": float("nan")}, {"meta_per_class": 0}])
def test_senseless_flags_are_refused(flags):
    with pytest.raises(TrainingError, match="--"):
        Cifar10LT(**flags)


# ---- the command line ----


def run_command(*words, **options):
    return subprocess.run([sys.executable, "-m", "training", *map(str, words)], capture_output=True, text=True,
                          timeout=300, **options)


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    from tests.test_datasets import write_class_folders

    root = tmp_path_factory.mktemp("small-cifar")
    write_class_folders(root / "train", {f"c{i}": 24 for i in range(10)})
    write_class_folders(root / "test", {f"c{i}": 3 for i in range(10)}, seed=1)
    return root


def test_the_command_ends_in_a_model_folder_that_the_zoo_loads(class_folders, tmp_path):
    # Given ten class folders, when the training command runs for one epoch,
    done = run_command("cifar10-lt", "--imbalance", 4, "--epochs", 1, "--meta-per-class", 4, "--data", class_folders,
                       "--architecture", "resnet8", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    # then its model folder opens in the zoo, says what it is, and predicts by ONNX.
    import zoo

    model = zoo.load(str(tmp_path / "run" / "model"))
    assert model.folder.config["metasaug"]["dataset"] == "CIFAR-10 (PNG)"
    assert model.folder.results["images"] == 30
    picture = next((class_folders / "test" / "c0").iterdir())
    assert len(model.predict(picture).top) == 5
    assert (tmp_path / "run" / "model" / "README.md").is_file()
    # It ends with what the model gets right, in words, and a page with the figures.
    assert "macro error" in done.stdout and "of 30 test pictures are correct" in done.stdout
    assert str(tmp_path / "run" / "report.html") in done.stdout and (tmp_path / "run" / "report.html").is_file()


def test_missing_data_and_wrong_flags_end_in_one_line(tmp_path, monkeypatch, capsys):
    import metasaug

    monkeypatch.chdir(tmp_path)
    assert metasaug.main(["train", "cifar10-lt", "--data", str(tmp_path / "nowhere")]) == 2
    assert "--data" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        metasaug.main(["train", "cifar10-lt", "--loss", "cosine"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "balanced-softmax" in said.out + said.err


def test_early_parts_stay_as_they_are_and_the_rest_trains(tmp_path):
    # Given a network whose first two stages work at an eighth of the side or finer, when it trains with --freeze early,
    recipe = dataclasses.replace(TINY, architecture="resnet10", freeze="early", epochs=2, stage2_epochs=1,
                                 augment="metasaug", lookahead="network")
    before = state.start(recipe, small_data(), CPU).module
    after, _ = loop.run(recipe, small_data(), tmp_path, CPU)
    # then their weights and running statistics stand still, in each method's steps, and all else moves.
    moved = {name.split(".")[0] for name, tensor in after.module.state_dict().items()
             if not torch.equal(tensor, before.state_dict()[name])}
    assert moved == {"layer3", "layer4", "fc"}


EARLY = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")


@pytest.mark.parametrize(("architecture", "size", "early"), [
    ("resnet18", 64, set(EARLY)), ("torchvision:resnet18", 64, {f"body.{part}" for part in EARLY}),
    ("timm:vit_tiny_patch16_224", 224, set())])
def test_early_parts_are_found_in_any_network(architecture, size, early):
    module = create(architecture, 3)
    found = steps.early_parts(module, size)
    assert {name for name, part in module.named_modules() if any(part is one for one in found)} == early


def test_training_shows_pictures_at_its_own_size(tmp_path, monkeypatch):
    # Given a size of training below that of the input, when trained, then steps and tests have theirs.
    seen = set()
    step, look = steps.Stepper.step, evaluation.evaluate
    monkeypatch.setattr(steps.Stepper, "step",
                        lambda self, x, *rest: seen.add(("step", *x.shape[2:])) or step(self, x, *rest))
    recipe = dataclasses.replace(TINY, input_size=24, train_size=16, epochs=2, stage2_epochs=1, augment="heldout")
    trained, results = loop.run(recipe, small_data(), tmp_path, CPU)
    assert seen == {("step", 16, 16)}
    view = stages.view_of(recipe, small_data())
    assert view.pretrained_cfg["input_size"] == [3, 24, 24]
    groups, _ = assign_groups(small_data().class_counts)
    assert look(trained.module, small_data(), view, groups, CPU)["error"] == results["error"]
