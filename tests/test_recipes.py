"""Every format and recipe trains for real, made small; what is chosen is said, pinned and can be overridden."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import metasaug  # noqa: E402
import zoo  # noqa: E402
from training import command_line  # noqa: E402
from training.command_line import (  # noqa: E402
    RunOptions,
    TrainCifar,
    TrainFolder,
    TrainLargeSet,
    TrainTable,
    run_name,
)
from training.data.datasets import LongTailed, PictureFiles  # noqa: E402
from training.errors import TrainingError  # noqa: E402
from training.help import flags_of  # noqa: E402
from training.method import closed_form  # noqa: E402
from training.method.covariance import RunningCovariance  # noqa: E402
from training.method.losses import class_balanced_weights  # noqa: E402
from training.network.start_weights import load_pretrained  # noqa: E402
from training.recipes import Cifar10LT, Cifar100LT, Folder, ImageNetLT, INat17, INat18, Table  # noqa: E402
from training.run import loop, run_folder, stages, steps  # noqa: E402
from training.run.defaults import choose  # noqa: E402
from zoo.architectures import create  # noqa: E402

from .test_list_files import make_imagenet_lt, make_inat  # noqa: E402
from .test_training import Killed, assert_same_bits, coloured_stripes, kill_after, small_data  # noqa: E402

CPU = torch.device("cpu")
COUNTS = [40, 20, 10]
SHORT = {"architecture": "resnet8", "input_size": 16, "batch_size": 16, "lr": 0.02, "meta_per_class": 4}


def redraw(paths_by_class, seed, shuffled):
    """Stripes, whose slope is their class, into these files; shuffled: of any class."""
    split = coloured_stripes([len(paths) for paths in paths_by_class], seed)
    order = np.random.default_rng(seed).permutation(len(split)) if shuffled else np.arange(len(split))
    for path, picture in zip([path for paths in paths_by_class for path in paths], split.pictures[order], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((20, 20)).save(path, format="PNG")


def folders(root, names=("a", "b", "c"), counts=COUNTS, tested=20):
    return {split: [[root / split / name / f"{i}.png" for i in range(n)]
                    for name, n in zip(names, numbers, strict=True)]
            for split, numbers in (("train", counts), ("test", [tested] * len(names)))}


def job_of(kind: str, root, shuffled: bool):
    """A job of each recipe over pictures in its own format; the test pictures keep their labels."""
    options = RunOptions(data=root)
    if kind == "folder":
        parts = folders(root)
        job = TrainFolder(Folder(**SHORT, epochs=15), options)
    elif kind == "table":
        parts = folders(root)
        rows = [f"{path.relative_to(root)},{path.parent.name},{split}" for split, classes in parts.items()
                for paths in classes for path in paths]
        job = TrainTable(Table(**SHORT, epochs=15), RunOptions(), table=root / "table.csv")
        root.mkdir()
        job.table.write_text("path,label,split\n" + "\n".join(rows) + "\n")
    elif kind == "imagenet-lt":
        make_imagenet_lt(root, COUNTS, val=4, test=20)
        parts = {"train": [sorted(folder.iterdir()) for folder in sorted((root / "train").iterdir())],
                 "test": [sorted(folder.iterdir()) for folder in sorted((root / "val").iterdir())]}
        flags = {**SHORT, "crops": "shift", "color_jitter": 0.0, "stage2_batch_size": 8}
        job = TrainLargeSet(ImageNetLT(**flags, epochs=18, stage2_epochs=3), options)
    else:
        make_inat(root, 2017 if kind == "inat17" else 2018, COUNTS)
        taken = [sorted(folder.iterdir()) for folder in sorted(root.glob("train_val*/Insecta/*"))]
        parts = {"train": [[p for p in paths if p.name.startswith("train")] for paths in taken],
                 "test": [[p for p in paths if p.name.startswith("val")] for paths in taken]}
        recipe = {"inat17": INat17, "inat18": INat18}[kind]
        job = TrainLargeSet(recipe(**SHORT, epochs=18, stage2_epochs=3, crops="shift"), options)
    for seed, (split, paths) in enumerate(parts.items()):
        redraw(paths, seed, shuffled and split == "train")
    return job


def trained(job, out):
    data = job.load()
    recipe, _ = command_line.settle(job.recipe, data, CPU, None)
    state, results = loop.run(recipe, data, out, CPU)
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    return recipe, losses[: recipe.stage2_epoch], results, state


@pytest.mark.parametrize("kind", ["folder", "table", "imagenet-lt", "inat17", "inat18"])
def test_each_format_trains_and_with_shuffled_labels_the_gain_is_gone(tmp_path, kind):
    # Given a long tail of three classes in the format of each recipe, and the same with labels shuffled in training,
    recipe, losses, results, _ = trained(job_of(kind, tmp_path / "real", False), tmp_path / "run")
    assert recipe.dataset == kind
    # when it trains, then the loss falls, and it learns what chance (67 % error) cannot;
    assert losses[-1] < losses[0] / 2
    assert results["macro_error"] <= 0.34, results["macro_error"]
    # with shuffled labels it does not.
    _, _, shuffled, _ = trained(job_of(kind, tmp_path / "shuffled", True), tmp_path / "other")
    assert shuffled["macro_error"] >= results["macro_error"] + 0.2


def write_hundred_colours(root, shuffled):
    """A colour a class: 12 training and 2 test pictures; shuffled: training pictures in the folders of any class."""
    rng = np.random.default_rng(0)
    colours = np.stack(np.meshgrid([30, 80, 130, 180, 230], [30, 80, 130, 180, 230], [40, 100, 160, 220]), -1)
    for split, n in (("train", 12), ("test", 2)):
        labels = np.repeat(np.arange(100), n)
        shown = rng.permutation(labels) if shuffled and split == "train" else labels
        for i, (label, colour) in enumerate(zip(labels, colours.reshape(-1, 3)[shown], strict=True)):
            path = root / split / f"c{label:03d}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(np.clip(colour + rng.normal(0, 4, (32, 32, 3)), 0, 255))).save(path)


@pytest.mark.long
def test_cifar_100_trains_and_with_shuffled_labels_the_gain_is_gone(tmp_path):
    # Given a hundred class folders, each of one colour, and the same with training pictures in any of them,
    def job(shuffled):
        write_hundred_colours(tmp_path / f"data-{shuffled}", shuffled)
        return TrainCifar(Cifar100LT(architecture="resnet8", epochs=8, imbalance=2, meta_per_class=2, input_size=16,
                                     batch_size=50, lr=0.05),
                          RunOptions(data=tmp_path / f"data-{shuffled}"))

    # when it trains, then the loss falls, and it learns what chance (99 % error) cannot;
    recipe, losses, results, _ = trained(job(False), tmp_path / "run")
    assert recipe.dataset == "cifar100-lt"
    assert losses[-1] < losses[0] / 2
    assert results["images"] == 200 and results["macro_error"] <= 0.6, results["macro_error"]
    # with shuffled labels it does not.
    _, _, shuffled, _ = trained(job(True), tmp_path / "other")
    assert shuffled["macro_error"] >= 0.95, shuffled["macro_error"]


@pytest.mark.parametrize("loss", ["ce", "focal", "ldam", "ldam-published", "balanced-softmax", "logit-adjustment"])
@pytest.mark.parametrize("augment", ["none", "isda", "metasaug", "heldout"])
def test_every_loss_runs_with_every_augmentation(tmp_path, loss, augment):
    recipe = Cifar10LT(architecture="resnet8", loss=loss, augment=augment, epochs=2, batch_size=35, lr=0.01,
                       stage1_loss="same")
    state, results = loop.run(recipe, small_data(), tmp_path, CPU)
    assert all(p.isfinite().all() for p in state.module.parameters())
    assert 0 <= results["error"] <= 1


# ---- the last layer alone ----


FROZEN = Cifar10LT(architecture="resnet8", epochs=6, stage2_epochs=3, batch_size=16, lr=0.02, schedule="cosine",
                   stage2_lr=0.01, stage2_batch_size=12, stage2_trains="classifier", covariance="diagonal")


@pytest.mark.parametrize("augment", ["none", "isda", "metasaug", "heldout"])
def test_with_the_backbone_frozen_only_the_last_layer_moves(tmp_path, augment):
    # Given the stage 1 of a run whose stage 2 trains the last layer only,
    recipe = dataclasses.replace(FROZEN, augment=augment)
    state, _ = loop.run(recipe, small_data(), tmp_path, CPU)
    from training.run import checkpoints

    _, saved = checkpoints.load_newest(tmp_path / "stage1")
    # then, at the end, everything else is what it was there to the bit, batch norm's statistics too.
    for name, tensor in state.module.state_dict().items():
        assert torch.equal(tensor, saved["module"][name]) == (not name.startswith("fc.")), name


@pytest.mark.parametrize("loss", ["ce", "ldam", "balanced-softmax"])
def test_the_closed_form_trains_as_the_meta_step_does(tmp_path, monkeypatch, loss):
    # Given a frozen stage 2, which the loop runs in closed form,
    recipe = dataclasses.replace(FROZEN, loss=loss)
    fast, _ = loop.run(recipe, small_data(), tmp_path / "fast", CPU)
    # when the same steps are taken by the general meta step, then the weights and covariances come out the same.
    monkeypatch.setattr(closed_form, "holds", lambda *_: False)
    slow, _ = loop.run(recipe, small_data(), tmp_path / "slow", CPU)
    torch.testing.assert_close(fast.module.fc.weight, slow.module.fc.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.learned.delta, slow.learned.delta, atol=1e-6, rtol=1e-3)
    assert fast.learned.delta.abs().sum() > 0


def test_a_frozen_stage_killed_in_the_middle_resumes_to_the_same_bits(tmp_path):
    whole, results = loop.run(FROZEN, small_data(), tmp_path / "whole", CPU)
    with pytest.raises(Killed):
        loop.run(FROZEN, small_data(), tmp_path / "killed", CPU, on_progress=kill_after(25))
    resumed, again = loop.run(FROZEN, small_data(), tmp_path / "killed", CPU, resume=True)
    assert_same_bits(whole, resumed)
    assert again == results


def test_the_large_sets_are_scheduled_as_the_paper_has_them():
    paper = ImageNetLT()
    assert (paper.stage2_epoch, paper.epochs) == (90, 110)
    assert [paper.lr_at(e) for e in (0, 45, 90, 109)] == pytest.approx([0.2, 0.1, 3e-4, 3e-4])
    assert (INat18().stage2_epoch, INat18().meta_per_class, INat17().meta_per_class) == (200, 2, 5)
    assert (paper.covariance, paper.stage2_batch_size, paper.strength) == ("diagonal", 256, 0.25)


# ---- your own pictures ----


def of_sizes(sizes, counts=(900, 300, 60)) -> LongTailed:
    """A data set that is only looked at."""
    labels = np.repeat(np.arange(len(counts)), counts)
    at = np.resize(np.array(sizes), (len(labels), 2))
    files = PictureFiles(None, tuple(map(str, range(len(labels)))), labels, at)
    return LongTailed(files, files, files, tuple(map(str, counts)), "sizes", (0.5,) * 3, (0.2,) * 3)


def test_choices_follow_the_pictures_and_the_machine():
    # Given small pictures, of which many are long,
    recipe, reasons = choose(Folder(start="none"), of_sizes([(55, 53), (30, 90), (60, 50)]), "cpu", 2)
    # then the small network, and no part is cut off; every choice is a line with a flag and a reason.
    assert (recipe.architecture, recipe.crop_mode, recipe.crops) == ("resnet32", "squash", "shift")
    assert recipe.input_size == 48
    assert all(line.startswith("--") and ": " in line for line in reasons)
    assert {line.split()[0] for line in reasons} == {
        "--augment", "--batch-size", "--epochs", "--input-size", "--architecture", "--crop-mode", "--crops",
        "--covariance"}
    # Photographs on a GPU are seen larger than on a CPU, where an hour must do.
    large = [(4000, 3000)]
    cpu, _ = choose(Folder(start="none"), of_sizes(large, (9000, 3000, 600)), "cpu", 2)
    gpu, _ = choose(Folder(start="none"), of_sizes(large, (9000, 3000, 600)), "cuda", 8)
    assert gpu.input_size == 224 and gpu.architecture == "resnet18" and gpu.crops == "resized"
    assert cpu.input_size < 100
    assert gpu.covariance == "full" or gpu.covariance == "diagonal"
    # Many classes and features: full covariances would be large.
    many, _ = choose(Folder(start="none", architecture="resnet18"), of_sizes(large, (20,) * 500), "cuda", 8)
    assert many.covariance == "diagonal"


@pytest.mark.parametrize("flag", ["architecture", "epochs", "batch_size", "input_size", "crop_mode", "crops",
                                  "covariance"])
def test_what_is_said_is_not_chosen(flag):
    said = {"architecture": "resnet50", "epochs": 7, "batch_size": 33, "input_size": 40, "crop_mode": "border",
            "crops": "resized", "covariance": "diagonal"}
    recipe, reasons = choose(Folder(start="none", **{flag: said[flag]}), of_sizes([(55, 53)]), "cpu", 2)
    assert getattr(recipe, flag) == said[flag]
    assert not any(line.startswith(f"--{flag.replace('_', '-')} ") for line in reasons)


def test_a_start_brings_its_own_recipe(monkeypatch):
    # Given a start at hand, on a machine that trains 25 pictures a second at 224 pixels and 55 minutes by default,
    monkeypatch.setattr("training.network.starts.choose_start", lambda device: ("small", "at hand"))

    def speed(recipe, pictures, size, seen, device):
        assert recipe.freeze == "early"
        return (size / 224) ** 2 / 25, (seen / 224) ** 2 / 75, 0.002

    monkeypatch.setattr("training.run.defaults.measure_speed", speed)
    # when photographs are to be learned, then the recipe is the start's, with as many epochs as the time allows,
    recipe, reasons = choose(Folder(), of_sizes([(400, 500)], (2000, 900, 100)), "cpu", 2)
    assert (recipe.start, recipe.architecture) == ("small", "timm:tf_efficientnet_lite0.in1k")
    assert (recipe.mean, recipe.interpolation) == ((0.5,) * 3, "bicubic")
    assert (recipe.train_size, recipe.input_size) == (224, 256)
    assert (recipe.loss, recipe.augment, recipe.meta_in_training) == ("logit-adjustment", "none", "stage2")
    assert recipe.lr <= 0.03
    assert recipe.sampling == "square-root"
    assert recipe.epochs == 40  # which 847 pictures an epoch leave time for
    longest, _ = choose(Folder(sampling="instance"), of_sizes([(400, 500)], (2000, 900, 100)), "cpu", 2)
    assert 0.6 * 55 * 60 * 25 < longest.epochs * 3000 * 1.1 < 55 * 60 * 25
    assert [flag for flag in recipe.CHOSEN if getattr(recipe, flag) in ("auto", 0, None)] == ["meta_per_class", "flips"]
    assert any(line.startswith("--start small: at hand") for line in reasons)
    # many of them are seen smaller, a few for a short time, small ones larger than they are;
    many, _ = choose(Folder(), of_sizes([(400, 500)], (300,) * 67), "cpu", 2)
    assert many.sampling == "instance"  # classes of one size
    assert many.train_size == 128 and many.epochs >= 3  # its test set is as large
    few, reasons = choose(Folder(), of_sizes([(400, 500)], (20,) * 8), "cpu", 2)
    assert few.freeze == "all" and few.input_size == 256 and any("--minutes gives more" in line for line in reasons)
    tiny, _ = choose(Folder(), of_sizes([(30, 30)]), "cpu", 2)
    assert (tiny.train_size, tiny.input_size) == (128, 160)
    # and who names a size has it.
    said, _ = choose(Folder(input_size=128), of_sizes([(400, 500)]), "cpu", 2)
    assert (said.train_size, said.input_size) == (None, 128)
    said, _ = choose(Folder(train_size=96), of_sizes([(400, 500)]), "cpu", 2)
    assert (said.train_size, said.input_size) == (96, 128)
    # --minutes gives more or less, and what is said stands.
    longer, _ = choose(Folder(minutes=20), of_sizes([(400, 500)], (20,) * 8), "cpu", 2)
    assert longer.epochs > few.epochs and longer.freeze == "early"
    said, _ = choose(Folder(augment="metasaug", lr=0.005, epochs=3, input_size=96), of_sizes([(400, 500)]), "cpu", 2)
    assert (said.augment, said.lr, said.epochs, said.input_size) == ("metasaug", 0.005, 3, 96)
    assert said.meta_in_training == "never"


def test_square_root_sampling_shows_small_classes_whole_and_says_which_prior_that_is():
    recipe = Folder(sampling="square-root", loss="ce", augment="none")
    assert recipe.shown_counts([2000, 500, 20, 7]) == (200, 100, 20, 7)
    assert recipe.shown_counts([90, 80, 70]) == (79, 75, 70)
    assert dataclasses.replace(recipe, sampling="instance").shown_counts([9, 5]) == (9, 5)
    assert recipe.implicit_prior([2000, 500]) == pytest.approx([2 / 3, 1 / 3], abs=1e-5)
    balanced = dataclasses.replace(recipe, loss="logit-adjustment")
    assert balanced.implicit_prior([2000, 500]) == pytest.approx([1 / 2, 1 / 2], abs=1e-5)


def test_a_run_on_own_pictures_is_named_after_them():
    assert run_name(Folder(), "field mice (class folders)") == "field-mice"
    assert run_name(Folder(augment="metasaug", epochs=3), "μ/x (2) (table)") == "metasaug-μ-x-2_epochs-3"
    assert run_name(Cifar10LT(), "CIFAR-10 (pickled)").startswith("metasaug-cifar10-lt")


def test_a_network_that_takes_one_size_is_given_that_size():
    for flags in ({"start": "none"}, {"start": "none", "epochs": 5}):
        recipe, reasons = choose(Folder(architecture="timm:vit_tiny_patch16_224", **flags), of_sizes([(55, 53)]),
                                 "cpu", 2)
        assert recipe.input_size == 224 and any("takes no other" in line for line in reasons)
    # and the covariances' size is by its own number of features
    assert any("192 features" in line for line in reasons)


def test_without_a_start_at_hand_training_begins_from_nothing_and_says_so(monkeypatch):
    monkeypatch.setattr("training.network.starts.choose_start", lambda device: None)
    recipe, reasons = choose(Folder(), of_sizes([(55, 53)]), "cpu", 2)
    assert (recipe.start, recipe.architecture, recipe.lr, recipe.loss) == ("none", "resnet32", 0.1, "ce")
    assert "pip install" in reasons[0]


def test_pretrained_weights_are_not_trained_at_a_rate_that_destroys_them():
    recipe, _ = choose(Folder(pretrained="weights.pth"), of_sizes([(55, 53)]), "cpu", 2)
    assert (recipe.start, recipe.lr) == ("none", 0.01)


def test_one_cycle_rises_for_a_tenth_of_the_run_and_ends_at_zero():
    recipe = Cifar10LT(schedule="one-cycle", epochs=10, lr=0.1)
    rates = [recipe.lr_at(step / 100) for step in range(1000)]
    assert max(rates) == pytest.approx(0.1, rel=0.05) and 80 <= rates.index(max(rates)) <= 110
    assert rates[0] < 0.005 and rates[-1] < 1e-5
    assert rates[100:] == sorted(rates[100:], reverse=True)


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory):
    """Class folders of oblong pictures, and nothing else."""
    root = tmp_path_factory.mktemp("own") / "stripes"
    parts = folders(root, counts=[40, 24, 12])["train"]
    redraw(parts, 0, False)
    for path in root.rglob("*.png"):
        Image.open(path).resize((44, 20)).save(path)
    return root


def test_own_pictures_become_a_model_without_another_flag(own_pictures, tmp_path, capsys, monkeypatch):
    # Given class folders and no pretrained network, when no other flag is given (and the run is cut short),
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("export.to_onnx.export_folder", lambda path: 0.0)
    assert metasaug.main(["train", "folder", "--data", str(own_pictures), "--start", "none", "--epochs", "3"]) == 0
    shown = capsys.readouterr().out
    # then it says what it chose and why,
    assert "--crop-mode squash: 100% of the pictures are over 1.5 times as long as wide" in shown
    # and the model predicts the test pictures as its results say, from files alone.
    (model_folder,) = (tmp_path / "runs").glob("*/model")
    model = zoo.load(model_folder, backend="torch")
    recipe = model.folder.config["metasaug"]["recipe"]
    assert recipe["input_size"] == 32 and recipe["crop_mode"] == "squash" and recipe["batch_size"] == 16
    data = TrainFolder(Folder(), RunOptions(data=own_pictures)).load()
    right = sum(model.predict(path).top[0].label == model.labels[label]
                for path, label in zip(data.test.paths, data.test.labels, strict=True))
    assert right == sum(row["correct"] for row in model.folder.results["per_class"])
    # Its card names no folder of this machine.
    assert str(own_pictures) not in model.folder.card + json.dumps(model.folder.config)


def test_a_resumed_run_keeps_its_choices(own_pictures, tmp_path):
    # Given a run of own pictures that chose its settings, and was stopped after an epoch,
    job = TrainFolder(Folder(start="none", epochs=2), RunOptions(data=own_pictures))
    data = job.load()
    recipe, _ = command_line.settle(job.recipe, data, CPU, None)
    with pytest.raises(Killed):
        loop.run(recipe, data, tmp_path, CPU, on_progress=kill_after(6))
    # when it goes on where something else would be chosen, on twice the pictures,
    larger = dataclasses.replace(data, train=data.train.at(np.tile(np.arange(len(data.train)), 20)))
    again, reasons = command_line.settle(job.recipe, larger, CPU, tmp_path)
    # then its settings are what they were, and it says so.
    assert again == recipe
    assert "chosen at its start" in reasons[0]
    fresh, _ = command_line.settle(job.recipe, larger, CPU, None)
    assert fresh != recipe


def test_dry_run_prints_the_resolved_recipe_and_trains_nothing(own_pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert metasaug.main(["train", "folder", "--data", str(own_pictures), "--start", "none", "--dry-run", "--loss",
                          "ldam"]) == 0
    shown = capsys.readouterr().out
    resolved = json.loads(shown[shown.index("{\n"):])
    assert resolved["loss"] == "ldam" and resolved["epochs"] == 200 and resolved["architecture"] == "resnet32"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["cifar10-lt", "cifar100-lt", "imagenet-lt", "inat17", "inat18", "folder", "table"])
def test_help_reads_like_documentation(kind, capsys):
    """What it is, what to expect, what it costs, the most useful flags first, and every flag once, in words."""
    assert metasaug.main(["train", kind, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Cost:" in shown
    assert kind in ("folder", "table") or "% error" in shown
    entries = re.findall(r"^  --(?:no-)?([a-z0-9-]+)", shown, re.MULTILINE)
    job = next(job for job in command_line.JOBS if job.recipe.dataset == kind)
    parts = [job, *(part for part in vars(job).values() if dataclasses.is_dataclass(part))]
    fields = {field.name for part in parts for field in dataclasses.fields(part)} - set(vars(job)) | {
        name for name, value in vars(job).items() if value not in parts}
    assert sorted(entries) == sorted(name.replace("_", "-") for name in fields)
    assert set(entries[:11]) >= {"data", "out", "loss", "augment", "epochs", "resume", "device", "dry-run"}
    assert "Others:" not in shown and not [flag for flag in flags_of(job) if not flag.help]


def test_pictures_that_nobody_looked_at_yet_are_looked_at_to_choose(own_pictures):
    data = TrainFolder(Folder(), RunOptions(data=own_pictures)).load()
    unseen = dataclasses.replace(data, train=dataclasses.replace(data.train, sizes=None))
    # Epochs follow from the time of a step, which is measured.
    seen, looked_at = (dataclasses.replace(choose(Folder(), pictures, "cpu", 2)[0], epochs=1)
                       for pictures in (data, unseen))
    assert seen == looked_at


def test_the_command_on_a_card_names_no_place_of_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["metasaug", "train", "table", "--table", "/home/me/rows.csv", "--loss=ldam",
                                     "--out=/x", "--pretrained=/home/me/w.pth", "--data", "/home/me/p", "--resume"])
    assert run_folder.command_in_words() == (
        "metasaug train table --table FILE --loss=ldam --pretrained FILE --data DIR")


def test_a_tree_that_is_not_installed_still_says_its_version(monkeypatch):
    # Given a Python without the distribution, as on a machine that was lent for minutes,
    def absent(name: str) -> str:
        raise run_folder.PackageNotFoundError(name)

    installed = run_folder.distribution_version()
    monkeypatch.setattr(run_folder, "version", absent)
    # then the version is the one in pyproject.toml, and a model folder can be written.
    assert run_folder.distribution_version() == installed
    assert run_folder.code_version().startswith(installed)



def test_reference_fidelity_on_large_sets_takes_the_same_meta_batch_every_step(tmp_path, monkeypatch):
    # Given the quirk of the authors' code for large sets, and each meta batch that a step gets,
    seen = []
    step = closed_form.frozen_head_step

    def noted(*given, **how):
        seen.append(given[3].clone())
        return step(*given, **how)

    monkeypatch.setattr(closed_form, "frozen_head_step", noted)
    # when it trains with the quirks, then all are one; without them they differ.
    for fidelity in ("reference", "fixed"):
        seen.clear()
        loop.run(dataclasses.replace(FROZEN, fidelity=fidelity), small_data(), tmp_path / fidelity, CPU)
        assert all(torch.equal(batch, seen[0]) for batch in seen) == (fidelity == "reference")


# ---- what cannot be trained on ----


@pytest.mark.parametrize("flags", [
    {"beta": 1.0}, {"momentum": -0.1}, {"strength": float("nan")}, {"crop_pct": 0}, {"seed": -1}, {"input_size": 5000},
    {"stage2_epochs": 201}, {"color_jitter": 0.4}, {"lr_drop": 2}, {"stage2_batch_size": 1}, {"weight_decay": -1}],
    ids=str)
def test_flags_out_of_their_range_are_refused_by_name(flags):
    with pytest.raises(TrainingError, match="--"):
        Cifar10LT(**flags)


def test_data_that_cannot_be_trained_on_is_refused_by_name():
    data = small_data()
    one = dataclasses.replace(data, meta=coloured_stripes([6, 6], 0))
    with pytest.raises(TrainingError, match="no picture in the meta set, which MetaSAug learns from: c"):
        stages.check(Cifar10LT(), one)
    stages.check(Cifar10LT(augment="isda"), one)
    none_spared = dataclasses.replace(data, shared_meta_classes=(0, 1, 2))
    stages.check(Cifar10LT(), none_spared)
    with pytest.raises(TrainingError, match="heldout"):
        stages.check(Cifar10LT(augment="heldout"), none_spared)
    empty = dataclasses.replace(data, train=coloured_stripes([6, 6], 0))
    with pytest.raises(TrainingError, match="no training picture: c"):
        stages.check(Cifar10LT(augment="none"), empty)
    single = dataclasses.replace(data, label_names=("a",), train=dataclasses.replace(
        data.train, labels=np.zeros_like(data.train.labels)))
    with pytest.raises(TrainingError, match="only one class"):
        stages.check(Cifar10LT(), single)


def test_fewer_pictures_than_a_batch_are_one_batch(tmp_path):
    recipe = Cifar10LT(architecture="resnet8", epochs=2, batch_size=5000, lr=0.01)
    state, _ = loop.run(recipe, small_data(), tmp_path, CPU)
    assert state.module.bn1.num_batches_tracked == 2


def test_full_covariances_of_a_large_set_are_refused_before_anything_is_made():
    with pytest.raises(TrainingError, match=r"137 GB.*--covariance diagonal"):
        RunningCovariance(8142, 2048, "full")


def test_a_step_that_does_not_fit_says_what_to_change(tmp_path, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "plain_step", too_large)
    with pytest.raises(TrainingError, match="smaller --batch-size"):
        loop.run(Cifar10LT(epochs=2, batch_size=16), small_data(), tmp_path, CPU)


# ---- start weights ----


def test_training_starts_from_other_weights(tiny_model_folder, tmp_path):
    # Given a model of ten classes, when a network of three starts from it,
    module = create("resnet8", 3)
    fresh = load_pretrained(module, str(tiny_model_folder))
    # then all but the last layer is the model's,
    theirs = zoo.load(tiny_model_folder, backend="torch").module.state_dict()
    assert sorted(fresh) == ["fc.bias", "fc.weight"]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.state_dict().items() if name not in fresh)
    # and the same comes of the weights' file, and of a checkpoint of the usual form.
    for source in ("model.safetensors", "checkpoint.pth"):
        path = tiny_model_folder / source
        if source == "checkpoint.pth":
            path = tmp_path / source
            torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in theirs.items()}, "epoch": 3}, path)
        other = create("resnet8", 3)
        assert load_pretrained(other, str(path)) == fresh
        assert torch.equal(other.conv1.weight, module.conv1.weight)
    # Weights of another network are refused, and a pickle is not run.
    with pytest.raises(TrainingError, match="another --architecture"):
        load_pretrained(create("resnet10", 3), str(tiny_model_folder))
    bad = tmp_path / "bad.pth"
    torch.save({"state_dict": _Canary(tmp_path / "ran")}, bad)
    with pytest.raises(TrainingError, match="tensors and plain values"):
        load_pretrained(create("resnet8", 3), str(bad))
    assert not (tmp_path / "ran").exists()


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_network_that_does_not_take_pictures_of_this_size_is_refused_before_training(tmp_path):
    pytest.importorskip("timm")
    recipe = Cifar10LT(architecture="timm:vit_tiny_patch16_224", epochs=1, batch_size=16)
    with pytest.raises(TrainingError, match=r"does not take pictures of 16 x 16.*--input-size"):
        loop.run(recipe, small_data(), tmp_path, CPU)


@pytest.mark.parametrize("flags", [{flag: value} for value in (float("nan"), float("inf")) for flag in (
    "lr", "stage2_lr", "tau", "strength", "beta", "momentum", "weight_decay", "gamma", "scale", "imbalance")])
def test_a_flag_that_is_no_number_is_refused_before_anything_starts(flags):
    with pytest.raises(TrainingError, match=f"--{next(iter(flags)).replace('_', '-')} (nan|inf)"):
        Cifar10LT(**flags)


@pytest.mark.parametrize("flags", [{"evaluate_every": 0}, {"save_minutes": float("nan")}, {"save_minutes": -1},
                                   {"workers": -1}])
def test_run_options_that_no_run_can_follow_are_refused(flags):
    with pytest.raises(TrainingError, match=f"--{next(iter(flags)).replace('_', '-')} "):
        RunOptions(**flags)


def test_heldout_has_a_first_stage_of_its_own_where_meta_pictures_are_always_trained_on():
    # Given both methods with the meta pictures in training: heldout keeps a fifth of them out, so stage 1 differs.
    keys = {(augment, joined): Cifar10LT(augment=augment, meta_in_training=joined).stage1_key()
            for augment in ("metasaug", "heldout") for joined in ("never", "stage2", "always")}
    assert keys["metasaug", "always"] != keys["heldout", "always"]
    # Elsewhere they share it.
    assert len({keys[a, j] for a in ("metasaug", "heldout") for j in ("never", "stage2")}) == 1


def test_the_prior_that_training_assumes_is_what_its_loss_makes_of_the_counts():
    # Given 5000 pictures against 50, then each loss assumes its own ratio of head to tail, in numbers that sum to 1.
    def ratio(**flags):
        prior = Cifar10LT(**flags).implicit_prior([5000, 50])
        assert sum(prior) == pytest.approx(1, abs=1e-5)
        return prior[0] / prior[1]

    assert ratio(augment="none") == pytest.approx(100, rel=1e-4)
    weights = class_balanced_weights([5000, 50])
    assert ratio(augment="metasaug") == pytest.approx(100 * float(weights[0] / weights[1]), rel=1e-4)  # 1.27
    assert ratio(augment="metasaug", beta=0.0) == pytest.approx(100, rel=1e-4)
    assert ratio(augment="none", loss="balanced-softmax") == pytest.approx(1, rel=1e-4)
    assert ratio(augment="none", loss="logit-adjustment", tau=0.5) == pytest.approx(10, rel=1e-4)
    assert ratio(augment="none", loss="logit-adjustment", tau=2.0) == pytest.approx(0.01, rel=1e-4)


def test_a_weighted_loss_learns_the_prior_that_is_stored():
    # Given features that say nothing, so that a last layer can only learn how frequent classes are,
    counts, recipe = [400, 40], Cifar10LT(augment="isda", beta=0.99)
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], line_search_fn="strong_wolfe", max_iter=100)
    # when trained on the whole set with the recipe's class weights,
    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(bias.expand(len(labels), 2), labels,
                                                  weight=class_balanced_weights(counts, recipe.beta))
        value.backward()
        return value

    optimizer.step(loss)
    # then its probabilities are the prior.
    assert bias.softmax(0).tolist() == pytest.approx(recipe.implicit_prior(counts), abs=1e-4)


WRAPPED = {  # how common trainers save one and the same network: prefix of its names, key of the file's dictionary
    "plain": ("", None), "DDP": ("module.", "state_dict"), "torch.compile": ("_orig_mod.", None),
    "DDP and compile": ("module._orig_mod.", "state_dict"), "Lightning": ("model.", "state_dict"),
    "MMPretrain": ("backbone.", "state_dict"), "MoCo": ("module.encoder_q.", "state_dict"),
    "the tutorial": ("", "model_state_dict"), "kuangliu's": ("module.", "net"), "timm's average": ("", "model_ema"),
}


@pytest.mark.parametrize("trainer", WRAPPED)
def test_weights_open_as_common_trainers_save_them(tmp_path, trainer):
    # Given a network's tensors as a trainer saves them, with other tensors beside them,
    prefix, key = WRAPPED[trainer]
    saved = {prefix + name: tensor for name, tensor in create("resnet32", 3).state_dict().items()}
    saved["queue"] = torch.zeros(5)
    torch.save(saved if key is None else {key: saved, "epoch": 3, "best": np.float64(0.5)}, tmp_path / "saved.pth")
    # when they are start weights or a backbone, then all of them are there.
    module = create("resnet32", 3)
    assert load_pretrained(module, str(tmp_path / "saved.pth")) == []
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, saved[prefix + name]), name


def test_a_dry_run_finds_start_weights_that_do_not_fit(tmp_path, capsys):
    # Given pictures, and start weights of another network,
    for label in "abc":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng([ord(label), i]).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    torch.save(create("resnet10", 3).state_dict(), tmp_path / "other.pth")
    # when only asked what would be done, then it says that they do not fit.
    assert metasaug.main(["train", "folder", "--data", str(tmp_path / "data"), "--architecture", "resnet32",
                          "--input-size", "32", "--pretrained", str(tmp_path / "other.pth"), "--dry-run"]) == 2
    assert "--pretrained" in capsys.readouterr().err
