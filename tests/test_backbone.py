"""--backbone: a ready network's own features, never trained; what it is made of and how it saw pictures is kept."""

import dataclasses
import json
import urllib.error

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import metasaug  # noqa: E402
import zoo  # noqa: E402
from training.command_line import settle  # noqa: E402
from training.errors import TrainingError  # noqa: E402
from training.network.derivatives import features_of  # noqa: E402
from training.network.start_weights import find_backbone, load_backbone  # noqa: E402
from training.recipes import Folder, ImageNetLT, INat18  # noqa: E402
from training.run import loop, stages  # noqa: E402
from training.run.defaults import on_backbone  # noqa: E402
from training.run.state import start  # noqa: E402
from zoo import label_names  # noqa: E402
from zoo.architectures import create  # noqa: E402
from zoo.errors import ZooError  # noqa: E402

from .test_datasets import write_class_folders  # noqa: E402
from .test_training import CPU, TINY, small_data  # noqa: E402

DATA = small_data()
A_PICTURE = torch.linspace(-2, 2, 2 * 3 * 64 * 64).sin().view(2, 3, 64, 64)


def mixed(module, seed=1):
    """Batch norm's statistics and the last layer not as any fresh network has them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_mean") or name == "fc.bias":
                tensor += torch.rand_like(tensor) * 0.1
    return module.eval()


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """torch's folder of downloads, and no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(("name", "architecture"), [("resnet18", "resnet18"),
                                                     ("mobilenet_v3_small", "torchvision:mobilenet_v3_small")])
def test_torchvisions_own_weights_give_torchvisions_features(hub_folder, name, architecture):
    from torchvision import models

    # Given weights in torchvision's format where torchvision keeps what it fetches,
    theirs = mixed(models.get_model(name))
    file = hub_folder / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    torch.save(theirs.state_dict(), file)
    for source in (f"torchvision:{name}", str(file)):
        # when it is taken as a backbone, by its name or as a file that somebody has carried here,
        backbone = find_backbone(source)
        assert (backbone.architecture, backbone.num_classes) == (architecture, 1000)
        ours = create(architecture, 1000).eval()
        load_backbone(ours, backbone, last_layer=True)
        # then its logits are torchvision's, and with another number of classes its features are.
        with torch.no_grad():
            torch.testing.assert_close(ours(A_PICTURE), theirs(A_PICTURE))
            other = create(architecture, 3).eval()
            load_backbone(other, backbone, last_layer=False)
            torch.testing.assert_close(features_of(other, A_PICTURE), features_of(ours, A_PICTURE))


def test_offline_the_message_says_what_to_fetch_and_how_to_name_it(hub_folder):
    module = create("resnet18", 3)
    with pytest.raises(TrainingError, match=r"Name or service not known.*get https://\S+/resnet18-\w+\.pth, and name "
                                            r"the file here: --backbone PATH/resnet18-\w+\.pth"):
        load_backbone(module, find_backbone("torchvision:resnet18"), False)


def test_timms_own_weights_give_timms_features(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    # Given weights in timm's format,
    theirs = mixed(timm.create_model("test_resnet"))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    usual = timm.create_model

    def fetched(name, pretrained=False, **how):
        return usual(name, pretrained=pretrained, **how,
                     **({"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}} if pretrained else {}))

    monkeypatch.setattr(timm, "create_model", fetched)
    # when taken as a backbone, then its features are timm's, also from a file whose architecture is named,
    for source in ("timm:test_resnet", str(tmp_path / "weights.pth")):
        ours = create("timm:test_resnet", 3).eval()
        load_backbone(ours, find_backbone(source), last_layer=False)
        with torch.no_grad():
            expected = theirs.forward_head(theirs.forward_features(A_PICTURE), pre_logits=True)
            torch.testing.assert_close(features_of(ours, A_PICTURE), expected)
    # and a run shows it pictures as timm does, of a file as well.
    file = {"backbone": str(tmp_path / "weights.pth"), "architecture": "timm:resnet18"}
    for flags in ({"backbone": "timm:resnet18"}, file):
        recipe, _ = on_backbone(INat18(**flags), DATA)
        shown = stages.view_of(recipe, DATA).pretrained_cfg
        assert (recipe.architecture, shown["interpolation"], shown["crop_pct"]) == ("timm:resnet18", "bicubic", 0.95)
        assert shown["mean"] == [0.485, 0.456, 0.406] != list(DATA.mean)


def test_without_a_network_timm_is_told_too(monkeypatch):
    timm = pytest.importorskip("timm")
    usual = timm.create_model

    def offline(name, pretrained=False, **how):
        if pretrained:
            raise RuntimeError("Cannot reach the Hub")
        return usual(name, **how)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(TrainingError, match=r"Cannot reach.*timm/test_resnet.r160_in1k on the Hugging Face Hub.*"
                                            r"--backbone FILE --architecture timm:test_resnet"):
        load_backbone(create("timm:test_resnet", 3), find_backbone("timm:test_resnet"), False)


def a_stage_1_file(path, classes: int, wrapped=True):
    """As classifier-balancing saves it: two parts, DataParallel's names, numpy's numbers beside."""
    body = {k: v for k, v in mixed(create("resnet10", classes)).state_dict().items() if not k.startswith("fc.")}
    last = {"fc.weight": torch.rand(classes, 512), "fc.bias": torch.rand(classes)}
    prefix = "module." if wrapped else ""
    best = {"feat_model": {prefix + k: v for k, v in body.items()},
            "classifier": {prefix + k: v for k, v in last.items()}}
    torch.save({"state_dict_best": best, "best_acc": np.float64(0.4), "best_epoch": 90}, path)
    return body, last


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("classes", [3, 5])
def test_a_stage_1_of_classifier_balancing_goes_on_with_its_last_layer_where_its_classes_are_these(
    tmp_path, classes, wrapped
):
    # Given a stage-1 file of as many classes as the data's three, or of others,
    body, last = a_stage_1_file(tmp_path / "stage1.pth", classes, wrapped)
    recipe = INat18(architecture="resnet10", backbone=str(tmp_path / "stage1.pth"), input_size=32, crops="shift")
    # when the recipe is settled, then 20 epochs of stage 2 are left in the one case, and the other begins plainly,
    recipe, reasons = settle(recipe, DATA, CPU, None)
    assert (recipe.last_layer, recipe.epochs, recipe.stage2_epoch) == (
        ("ready", 20, 0) if classes == 3 else ("fresh", 30, 10)), reasons
    # on the data's own mean and std, as the file does not say.
    assert stages.view_of(recipe, DATA).mean == DATA.mean
    module = start(recipe, DATA, CPU).module
    weights = module.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in body.items())
    assert torch.equal(weights["fc.weight"], last["fc.weight"]) == (classes == 3)


def test_only_the_last_layer_moves_in_either_stage(tmp_path):
    # Given a backbone for five classes, and data of three,
    a_stage_1_file(tmp_path / "stage1.pth", 5)
    recipe = INat18(architecture="resnet10", backbone=str(tmp_path / "stage1.pth"), input_size=16, crops="shift",
                    epochs=4, stage2_epochs=2, batch_size=16, stage2_batch_size=16)
    recipe, _ = settle(recipe, DATA, CPU, None)
    before = start(recipe, DATA, CPU).module.state_dict()
    # when both stages have trained, then no tensor but the last layer's has moved, batch norm's statistics neither.
    state, _ = loop.run(recipe, DATA, tmp_path / "run", CPU)
    moved = {name for name, tensor in state.module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"fc.weight", "fc.bias"}
    assert [json.loads(line)["stage"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [
        1, 1, 2, 2]
    # A stage 1 on another backbone that goes by the same name is not taken for this one's.
    a_stage_1_file(tmp_path / "stage1.pth", 5)
    changed = torch.load(tmp_path / "stage1.pth", weights_only=False)
    next(iter(changed["state_dict_best"]["feat_model"].values())).mul_(2)
    torch.save(changed, tmp_path / "stage1.pth")
    with pytest.raises(TrainingError, match="on another --backbone"):
        loop.run(recipe, DATA, tmp_path / "other", CPU, stage1=tmp_path / "run")


def test_classes_are_compared_by_name_where_names_are_known(tiny_model_folder):
    ready = find_backbone(str(tiny_model_folder))
    names = ready.label_names
    assert ready.has_last_layer_for(names, None)
    assert not ready.has_last_layer_for(names[::-1], None)
    assert not ready.has_last_layer_for(names[:-1], None)
    assert not ready.has_last_layer_for(names, 30.0)
    # torchvision's ImageNet is ImageNet-LT's, class by class.
    assert find_backbone("torchvision:resnet50").has_last_layer_for(label_names.imagenet(), None)


def test_what_flags_say_stands_and_what_they_leave_open_is_the_backbones(tiny_model_folder):
    # Given a backbone that was shown 32 pixels with a mean of its own,
    source = str(tiny_model_folder)
    # when nothing is said, then that is how pictures are shown, each with its reason;
    recipe, reasons = settle(Folder(backbone=source), DATA, CPU, None)
    assert (recipe.architecture, recipe.input_size, recipe.mean, recipe.stage2_trains) == (
        "resnet8", 32, (0.49, 0.48, 0.45), "classifier")
    assert any(reason.startswith("--mean 0.49 0.48 0.45: ") for reason in reasons)
    # what is said stands.
    said = Folder(backbone=source, input_size=48, mean=(0.5,) * 3, epochs=7, last_layer="fresh")
    recipe, _ = settle(said, DATA, CPU, None)
    assert (recipe.input_size, recipe.mean, recipe.epochs) == (48, (0.5,) * 3, 7)
    # Left to itself, a last layer trains for tens of epochs, on a wide backbone with diagonal covariances.
    recipe, _ = settle(Folder(backbone="torchvision:resnet50"), DATA, CPU, None)
    assert (recipe.architecture, recipe.input_size, recipe.epochs, recipe.covariance) == (
        "resnet50", 224, 50, "diagonal")
    assert ImageNetLT(backbone=source).to_dict()["backbone"] == tiny_model_folder.name


@pytest.mark.parametrize(("flags", "message"), [
    ({"backbone": "torchvision:resnet5"}, "no classifier 'resnet5'"),
    ({"backbone": "torchvision:inception_v3"}, "input format"),
    ({"backbone": "timm:resnet5000"}, "Unknown architecture"),
    ({"backbone": "nowhere.pth"}, "no such file"),
    ({"backbone": "no-such-model"}, "No model is called"),
    ({"backbone": "ce-cifar10-lt", "last_layer": "ready"}, "no last layer for these 3 classes"),
    ({"backbone": "ce-cifar10-lt", "pretrained": "ce-cifar10-lt"}, "not both"),
    ({"last_layer": "ready"}, "needs --backbone"),
    ({"std": (0.5, 0.5, 0.0)}, "at least"),
])  # fmt: skip
def test_what_cannot_be_a_backbone_ends_in_one_sentence(flags, message):
    with pytest.raises(ZooError, match=message) as caught:
        settle(dataclasses.replace(TINY, **flags), DATA, CPU, None)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_network_is_refused_and_says_why(tmp_path):
    a_stage_1_file(tmp_path / "stage1.pth", 3)
    with pytest.raises(TrainingError, match=r"missing.*left over"):
        load_backbone(create("resnet32", 3), find_backbone(str(tmp_path / "stage1.pth")), False)
    # A layer more than ours has would change the features.
    body, _ = a_stage_1_file(tmp_path / "stage1.pth", 3)
    torch.save({"feat_model": {**body, "fc_add.weight": torch.rand(3, 3)}}, tmp_path / "more.pth")
    with pytest.raises(TrainingError, match=r"1 left over \(fc_add.weight\)"):
        load_backbone(create("resnet10", 3), find_backbone(str(tmp_path / "more.pth")), False)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(TrainingError, match=r"text\.pth is not a torch checkpoint"):
        find_backbone(str(tmp_path / "text.pth"))
    # and own pictures need to be told the network of a file.
    with pytest.raises(TrainingError, match="--architecture NAME"):
        on_backbone(Folder(backbone=str(tmp_path / "stage1.pth")), DATA)


# ---- the command line ----


def test_the_command_trains_a_last_layer_on_cached_features_of_a_model_folder(tiny_model_folder, tmp_path, monkeypatch,
                                                                             capsys):
    # Given own pictures in three classes, when a model folder is their backbone, through the command line,
    write_class_folders(tmp_path / "pictures", {"a": 40, "b": 30, "c": 12}, size=(40, 36))
    monkeypatch.setattr("export.to_onnx.export_folder", lambda path: 0.0)
    command = ["train", "folder", "--data", tmp_path / "pictures", "--backbone", tiny_model_folder,
               "--cache-features", "2", "--epochs", "3", "--features", tmp_path / "features"]
    assert metasaug.main([*map(str, command), "--out", str(tmp_path / "run")]) == 0
    # then it says what it takes from the backbone and what the disk will hold,
    said = capsys.readouterr()
    assert "--input-size 32: the backbone was trained so" in said.out
    assert "--cache-features 2: " in said.out + said.err and "of features in" in said.out + said.err
    # and its model folder prepares pictures as the backbone was shown them, names no folder, and predicts.
    model = zoo.load(str(tmp_path / "run" / "model"), backend="torch")
    config = model.folder.config
    assert config["pretrained_cfg"]["mean"] == [0.49, 0.48, 0.45]
    assert config["metasaug"]["recipe"]["backbone"] == tiny_model_folder.name
    assert str(tiny_model_folder.parent) not in (tmp_path / "run" / "model" / "config.json").read_text()
    assert len(model.predict(next((tmp_path / "pictures" / "a").iterdir())).top) == 3
    # A second run with another loss computes no feature again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert metasaug.main([*map(str, command), "--loss", "ldam", "--out", str(tmp_path / "ldam")]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()} == before


def test_the_command_says_that_there_is_no_such_backbone(tmp_path, capsys):
    write_class_folders(tmp_path / "pictures", {"a": 8, "b": 8})
    assert metasaug.main(["train", "folder", "--data", str(tmp_path / "pictures"), "--backbone",
                          "torchvision:resnet81"]) == 2
    assert "Did you mean" in capsys.readouterr().err
