"""Architectures: a name alone rebuilds a network, ours or timm's, and a folder of it is timm's too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo
from zoo.errors import ZooError
from zoo.model_folder import ModelFolder, write_model_folder

torch = pytest.importorskip("torch")

from zoo.architectures import ARCHITECTURES, classifier_name, create  # noqa: E402


def folder_of(path: Path, architecture: str, config: dict, size: int, cosine_scale: float | None = None) -> Path:
    """A model folder around random weights, batch norm's statistics included."""
    torch.manual_seed(0)
    module = create(architecture, 10, cosine_scale)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    config = json.loads(json.dumps(config))
    config |= {"architecture": architecture.removeprefix("timm:"), "num_features": module.num_features}
    config["pretrained_cfg"] |= {"input_size": [3, size, size], "crop_pct": 0.875,
                                 "classifier": classifier_name(module)}
    config["metasaug"] |= {"name": architecture, "cosine_scale": cosine_scale}
    return write_model_folder(path, config, {n: t.numpy() for n, t in module.state_dict().items()}).path


@pytest.fixture(scope="module")
def config(tiny_model_folder) -> dict:
    return ModelFolder(tiny_model_folder).config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_name_is_a_network_of_features_and_one_linear_layer(architecture):
    # Given a network by its name, when it sees pictures of an odd size,
    module = create(architecture, 7).eval()
    pictures = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        feature_map = module.forward_features(pictures)
        features = module.forward_head(feature_map, pre_logits=True)
        # then features are the map's mean, logits one linear layer over them, and that layer has a name.
        assert features.shape == (2, module.num_features)
        torch.testing.assert_close(features, feature_map.mean((2, 3)))
        torch.testing.assert_close(module.get_classifier()(features), module(pictures))
    assert module.has_feature_map and classifier_name(module) == "fc" and module.num_classes == 7


def test_small_stems_keep_the_pixels_of_small_pictures():
    """A usual stem leaves a 32 x 32 picture 8 x 8 before the first block, a small one 32 x 32."""
    pictures = torch.zeros(1, 3, 32, 32)
    for name in ("resnet18", "resnet50"):
        usual, small = create(name, 10).eval(), create(f"{name}-small", 10).eval()
        assert usual.forward_features(pictures).shape[2:] == (1, 1)
        assert small.forward_features(pictures).shape[2:] == (4, 4)
        # Everything behind the stem is the same network.
        shapes = [{k: v.shape for k, v in m.state_dict().items() if k != "conv1.weight"} for m in (usual, small)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("architecture", "size", "has_map"), [
    ("timm:convnext_atto", 64, False), ("resnet10-small", 32, True),
    pytest.param("timm:regnetx_002", 64, True, marks=pytest.mark.long),
    pytest.param("timm:mobilenetv3_small_050", 64, False, marks=pytest.mark.long)])
def test_a_folder_of_any_network_is_rebuilt_from_its_name_and_runs_in_onnx(architecture, size, has_map, config,
                                                                           tmp_path):
    pytest.importorskip("timm")
    from export.to_onnx import export_folder

    # Given a folder of a network of timm, or one with a small stem, when it is exported and loaded by both backends,
    folder = folder_of(tmp_path / "model", architecture, config, size)
    export_folder(folder)
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8))
    onnx, torch_ = (zoo.load(folder, backend=b, device="cpu").predict_batch(pictures, feature_maps=True)
                    for b in ("onnx", "torch"))
    # then they agree; where features are no mean of a map there is none, and nothing pretends otherwise.
    for mine, theirs in zip(onnx, torch_, strict=True):
        np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-4)
        np.testing.assert_allclose(mine.features, theirs.features, atol=1e-4)
        assert (mine.feature_map is not None) == (theirs.feature_map is not None) == has_map
        if has_map:
            np.testing.assert_allclose(mine.feature_map.mean((1, 2)), mine.features, atol=1e-4)


def test_a_cosine_classifier_stands_wherever_the_last_layer_is():
    pytest.importorskip("timm")
    for architecture, name in (("resnet18", "fc"), ("timm:convnext_atto", "head.fc"),
                               ("timm:efficientnet_b0", "classifier")):
        module = create(architecture, 5, cosine_scale=20.0).eval()
        assert classifier_name(module) == name and module.get_classifier().bias is None
        with torch.no_grad():
            assert module(torch.randn(2, 3, 64, 64)).abs().max() <= 20


@pytest.mark.parametrize(("name", "reason"), [
    ("resnet51", "Unknown architecture 'resnet51'. Did you mean .*resnet50"), ("timm:nothing-like-it", "timm:NAME"),
    ("timm:hf-hub:timm/resnet18.a1_in1k", "Unknown"), ("timm:local-dir:/tmp", "Unknown"), ("", "Unknown"),
    ("timm:resnetv2_50", "does not end in one linear layer"),
    ("timm:deit_tiny_distilled_patch16_224", "does not end in one linear layer")])
def test_a_name_that_cannot_be_used_says_why(name, reason):
    """And none makes timm read a folder or ask the network."""
    pytest.importorskip("timm")
    with pytest.raises(ZooError, match=reason):
        create(name, 10)


def test_without_timm_our_own_networks_work_and_others_say_what_to_install():
    code = ("import sys; sys.modules['timm'] = None\n"
            "from zoo.architectures import create; from zoo.errors import ZooError\n"
            "create('resnet10-small', 3)\n"
            "try: create('timm:convnext_atto', 3)\n"
            "except ZooError as error: print(error)")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'metasaug[timm]'" in shown


# ---- timm opens our folders ----


@pytest.mark.parametrize(("architecture", "size"), [("resnet50", 64), ("timm:convnext_atto", 64)])
def test_timm_opens_a_model_folder_unchanged(architecture, size, config, tmp_path):
    timm = pytest.importorskip("timm")
    # Given a model folder as the zoo writes it,
    folder = folder_of(tmp_path / "model", architecture, config, size)
    # when timm opens it by its own means,
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    # then the network, its weights and its logits are ours, and so is what it says about pictures and classes.
    pictures = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert torch.equal(theirs(pictures), zoo.load(folder, backend="torch").module(pictures))
    data = timm.data.resolve_model_data_config(theirs)
    cfg = config["pretrained_cfg"]
    for key, value in {**cfg, "input_size": [3, size, size], "crop_pct": 0.875}.items():
        if key in data:
            assert (list(data[key]) if isinstance(value, list) else data[key]) == value, key
    assert theirs.num_classes == 10 and theirs.pretrained_cfg["label_names"] == config["label_names"]


def test_timm_opens_it_from_the_hub(config, hub, tmp_path):
    """As `hf-hub:owner/name`, by timm's own download, in a process that has none of our code."""
    pytest.importorskip("timm")
    # Given a model folder published as it is,
    folder = folder_of(tmp_path / "model", "resnet18", config, 64)
    hub.add("owner/r18", {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    # when timm loads it, then its logits are ours.
    code = ("import sys, timm, torch\n"
            "model = timm.create_model('hf-hub:owner/r18', pretrained=True).eval()\n"
            "with torch.no_grad(): torch.save(model(torch.ones(1, 3, 64, 64)), sys.argv[1])")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "logits")], cwd=tmp_path, check=True, timeout=300, env={
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"})
    with torch.no_grad():
        ours = zoo.load(folder, backend="torch").module(torch.ones(1, 3, 64, 64))
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), ours)


def test_timm_refuses_a_folder_whose_classifier_it_has_not(config, tmp_path):
    """A cosine classifier would be a linear one there: an error, never other logits."""
    timm = pytest.importorskip("timm")
    folder = folder_of(tmp_path / "model", "resnet18", config, 64, cosine_scale=30.0)
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_timms_pictures_are_prepared_as_ours(config, tmp_path, pictures):
    """timm's own transform of the folder's config gives the zoo's pixels: same resize, crop, mean and std."""
    timm = pytest.importorskip("timm")

    folder = folder_of(tmp_path / "model", "resnet10-small", config, 64)
    cfg = ModelFolder(folder).config["pretrained_cfg"]
    transform = timm.data.create_transform(**{k: cfg[k] for k in ("input_size", "mean", "std", "crop_pct",
                                                                  "interpolation")})
    ours = zoo.load(folder, backend="torch")
    for name in ("a.png", "d.jpg"):
        theirs = transform(Image.open(pictures / name).convert("RGB")).numpy()
        np.testing.assert_allclose(ours.preprocess(pictures / name), theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_classifier_of_torchvision_trains_as_any_network(name):
    # Given a classifier of torchvision by its name,
    module = create(f"torchvision:{name}", 5).eval()
    pictures = torch.randn(2, 3, 64, 64)
    # then its logits are one linear layer over its features, which is all that training asks of a network,
    features = module.forward_head(module.forward_features(pictures), pre_logits=True)
    assert features.shape == (2, module.num_features)
    torch.testing.assert_close(module.get_classifier()(features), module(pictures))
    assert classifier_name(module) == "fc" and not module.has_feature_map


@pytest.mark.parametrize(("name", "says"), [("squeezenet1_0", "does not end in one linear layer"),
                                            ("resnet5", "Did you mean resnet50")])
def test_what_torchvision_has_not_or_ends_otherwise_is_named(name, says):
    with pytest.raises(ZooError, match=says):
        create(f"torchvision:{name}", 5)


def test_a_network_of_timm_trained_here_is_timms_too(config, tmp_path, monkeypatch):
    """From training to timm: own pictures, a network whose last layer is not called fc."""
    timm = pytest.importorskip("timm")
    import metasaug
    from zoo.directions import last_layer

    # Given own pictures, when a network of timm is trained on them for an epoch,
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("export.to_onnx.export_folder", lambda path: 0.0)
    rng = np.random.default_rng(0)
    for name, count in (("ash", 30), ("birch", 16)):
        (tmp_path / "trees" / name).mkdir(parents=True)
        for i in range(count):
            noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            noise.save(tmp_path / "trees" / name / f"{i}.png")
    assert metasaug.main(["train", "folder", "--data", "trees", "--architecture", "timm:regnetx_002", "--epochs", "1",
                          "--input-size", "32", "--out", "run"]) == 0
    # then timm opens the folder, with our logits, and the demo finds its last layer.
    folder = ModelFolder(tmp_path / "run" / "model")
    theirs = timm.create_model(f"local-dir:{folder.path}", pretrained=True).eval()
    with torch.no_grad():
        pictures = torch.randn(2, 3, 32, 32)
        assert torch.equal(theirs(pictures), zoo.load(folder.path, backend="torch").module(pictures))
    assert folder.config["pretrained_cfg"]["classifier"] == "head.fc"
    assert last_layer(folder).shape == (2, theirs.num_features)
