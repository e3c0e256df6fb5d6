"""Import: a released checkpoint gives the logits that its authors' code gives, or one clear error."""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import metasaug
import zoo
from zoo import label_names
from zoo.errors import ZooError
from zoo.model_folder import ModelFolder

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from export import authors_files  # noqa: E402
from export.authors_files import import_file, read_checkpoint  # noqa: E402
from tests import twins_authors as twins  # noqa: E402
from zoo.architectures import create  # noqa: E402


def saved(what, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(what, buffer, **options)
    return buffer.getvalue()


def shapes_of(architecture: str, classes: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in create(architecture, classes).state_dict().items()
                if not name.endswith("num_batches_tracked")}


def released(architecture: str, classes: int, seed: int = 0) -> tuple[dict, dict]:
    """Backbone and classifier of random weights, as a large-scale checkpoint has them."""
    state = twins.random_state(shapes_of(architecture, classes), seed)
    head = {name: state.pop(name) for name in ("fc.weight", "fc.bias")}
    return state, head


def cifar_state(classes: int = 10, seed: int = 0) -> dict:
    state = twins.random_state(shapes_of("resnet32", classes), seed)
    return OrderedDict((name.replace("fc.", "linear."), value) for name, value in state.items())


def module_of(checkpoint) -> torch.nn.Module:
    module = create(checkpoint.architecture, checkpoint.num_classes, checkpoint.cosine_scale)
    module.load_state_dict(checkpoint.weights)
    return module.eval()


def prefixed(state: dict, prefix: str = "module.") -> dict:
    return {prefix + name: value for name, value in state.items()}


# ---- the authors' real files ----


@pytest.fixture(scope="module")
def imported(authors_files, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imported")
    for name, file in authors_files.items():
        assert metasaug.main(["import", str(file), "--as", name, "--out", str(folder / name)]) == 0
    return {name: folder / name for name in authors_files}


@pytest.mark.parametrize("name", ["metasaug-cifar10-lt", "metasaug-ldam-cifar100-lt"])
def test_a_released_file_keeps_its_weights_and_logits_exactly(name, imported, authors_files):
    # Given one of the authors' files, imported, and their forward pass said again over the file's own tensors,
    theirs = torch.load(authors_files[name], map_location="cpu", weights_only=True)["state_dict"]
    folder = ModelFolder(imported[name])
    pictures = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, logits = twins.cifar_resnet32(theirs, pictures)
        # when the folder's network sees the same pictures, then its logits are theirs,
        module = zoo.load(folder.path, backend="torch").module
        torch.testing.assert_close(module(pictures), logits, rtol=0, atol=2e-5 * float(logits.abs().max()))
        torch.testing.assert_close(module.forward_head(module.forward_features(pictures), pre_logits=True), features,
                                   rtol=0, atol=1e-5)
    # every weight is theirs bit for bit,
    ours = folder.weights()
    for key, value in theirs.items():
        assert np.array_equal(ours[key.replace("linear.", "fc.")], value.numpy()), key
    # and the ONNX file gives them too.
    onnx, _, _ = zoo.load(folder.path)._network(pictures.numpy())
    np.testing.assert_allclose(onnx, logits.numpy(), atol=1e-4 * max(1, float(logits.abs().max()) / 10))


@pytest.mark.parametrize("each", [20, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(("name", "pictures", "error"), [
    ("metasaug-cifar10-lt", "cifar10_test", 19.43), ("metasaug-ldam-cifar100-lt", "cifar100_test", 51.98)])
def test_a_released_file_has_the_error_that_it_states(name, pictures, error, each, imported, request, tmp_path):
    """On the original test pictures: everything from decoding to normalisation is as the authors had it."""
    # Given all 10,000 of them, or every 20th, when the imported model is measured on them,
    data, out = tmp_path / "data", tmp_path / "results.json"
    for folder in request.getfixturevalue(pictures).iterdir():
        (data / folder.name).mkdir(parents=True)
        for picture in sorted(folder.iterdir())[::each]:
            (data / folder.name / picture.name).symlink_to(picture)
    assert metasaug.main(["evaluate", str(imported[name]), "--data", str(data), "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    # then the error is the stated one, to the digit on all, within three standard errors on a part.
    assert results["images"] == 10_000 // each
    spread = 0.005 if each == 1 else 300 * (0.25 / results["images"]) ** 0.5
    assert 100 * results["error"] == pytest.approx(error, abs=spread)
    assert error == pytest.approx(100 * ModelFolder(imported[name]).config["metasaug"]["imported"]["stated_error"])


def test_a_released_file_is_recognised_and_one_that_is_nearly_one_is_not(authors_files, tmp_path, capsys, no_onnx):
    # Given a released file, under a name of one's own,
    name, file = "metasaug-cifar10-lt", authors_files["metasaug-cifar10-lt"]
    (tmp_path / "mine.pth").write_bytes(file.read_bytes())
    # when it is imported, then it says which one it is, and so do the folder and its card.
    assert metasaug.main(["import", str(tmp_path / "mine.pth"), "--as", name, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr()
    assert file.name in said.out and "warning" not in said.err
    assert ModelFolder(tmp_path / "whole").config["metasaug"]["imported"]["released_file"] == file.name
    # With one bit of one weight flipped it opens as well as before: there is a warning with both hashes.
    content = bytearray(file.read_bytes())
    weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    largest = max(weights.values(), key=lambda tensor: tensor.numel()).numpy().tobytes()
    content[content.index(largest[:64])] ^= 1
    (tmp_path / "mine.pth").write_bytes(content)
    assert metasaug.main(["import", str(tmp_path / "mine.pth"), "--as", name, "--out", str(tmp_path / "flipped")]) == 0
    said = capsys.readouterr()
    hashes = [hashlib.sha256(one).hexdigest() for one in (bytes(content), file.read_bytes())]
    assert all(digest in said.err for digest in hashes) and file.name in said.err
    assert ModelFolder(tmp_path / "flipped").config["metasaug"]["imported"]["released_file"] is None


def test_the_folder_says_whose_weights_they_are(imported, authors_files):
    folder = ModelFolder(imported["metasaug-cifar10-lt"])
    folder.check()
    ours, card = folder.config["metasaug"], folder.card
    assert folder.config["label_names"] == list(label_names.cifar10())
    # The authors take 10 pictures a class out before they cut the tail.
    assert ours["class_counts"] == [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]
    assert (ours["groups_by"], ours["groups"][0], ours["groups"][-1]) == ("rank", "head", "tail")
    assert ours["imported"]["file"] == authors_files["metasaug-cifar10-lt"].name
    assert len(ours["imported"]["sha256"]) == 64 and ours["imported"]["sha256"] in card
    for said in ("Not trained by us", "19.46%", "19.43%", "licence MIT", "Not measured by us", 'zoo.load("PATH/OF'):
        assert said in card
    hundred = ModelFolder(imported["metasaug-ldam-cifar100-lt"]).config
    assert hundred["metasaug"]["class_counts"][0] == 490 and hundred["metasaug"]["class_counts"][-1] == 4
    assert hundred["label_names"][0] == "apple" and hundred["label_names"][99] == "worm"


def test_a_file_under_another_cells_name_is_refused(authors_files, tmp_path, capsys):
    file = str(authors_files["metasaug-ldam-cifar100-lt"])
    for name in ("metasaug-cifar100-lt", "metasaug-ldam-cifar100-lt-50", "metasaug-ldam-cifar10-lt"):
        assert metasaug.main(["import", file, "--as", name, "--out", str(tmp_path / "m")]) == 2
        assert "Import it --as metasaug-ldam-cifar100-lt." in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


# ---- the large-scale layouts ----


PICTURES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("layout", "architecture", "depths", "groups"), [
    ("MetaSAug", "resnet50", (3, 4, 6, 3), 1), ("classifier-balancing", "resnext50_32x4d", (3, 4, 6, 3), 32),
    ("classifier-balancing", "resnet10", (1, 1, 1, 1), 1)])
def test_large_scale_layouts_give_the_logits_of_their_authors_forward_pass(layout, architecture, depths, groups):
    # Given a checkpoint in one of the two layouts, as released and not,
    backbone, head = released(architecture, 20)
    if layout == "MetaSAug":
        file = {"epoch": 20, "state_dict": {"feature": backbone, "classifier": head},
                "optimizer": {"state": {}, "param_groups": [{"lr": 3e-4}]}}
    else:
        file = {"epoch": 90, "best_epoch": 88, "best_acc": 0.444, "centroids": None,
                "state_dict_best": {"feat_model": prefixed(backbone), "classifier": prefixed(head)}}
    # when it is read, then the network is found by its shapes and its logits are those of the authors' pass.
    checkpoint = read_checkpoint(saved(file), "file.pth")
    assert (checkpoint.architecture, checkpoint.origin, checkpoint.num_classes) == (architecture, layout, 20)
    # In float64: in float32 processors of other kinds add up in another order, which came to 1.7e-5 of a logit.
    head, backbone = ({name: t.double() if t.is_floating_point() else t for name, t in part.items()}
                      for part in (head, backbone))
    with torch.no_grad():
        logits = twins.dot_product(head, twins.imagenet_features(backbone, PICTURES.double(), depths, groups))
        torch.testing.assert_close(module_of(checkpoint).double()(PICTURES.double()), logits, rtol=1e-10, atol=1e-10)


def test_learned_scales_are_part_of_the_logits():
    backbone, head = released("resnet10", 12)
    head["scales"] = torch.rand(12) + 0.5
    file = {"state_dict_best": {"feat_model": prefixed(backbone), "classifier": prefixed(head)}}
    checkpoint = read_checkpoint(saved(file), "lws.pth")
    with torch.no_grad():
        logits = twins.learnable_weight_scaling(head, twins.imagenet_features(backbone, PICTURES, (1, 1, 1, 1)))
        torch.testing.assert_close(module_of(checkpoint)(PICTURES), logits, rtol=1e-5, atol=1e-5)
    assert "LWS" in checkpoint.notes[0]


@pytest.mark.parametrize("transposed", [True, False])
def test_a_cosine_classifier_keeps_its_logits_once_its_scale_is_told(transposed):
    # Given a last layer without bias, (features, classes) as LDAM's code has it or the other way round,
    state = cifar_state(10)
    del state["linear.bias"]
    weight_AC = state["linear.weight"].t().contiguous()
    if transposed:
        state["linear.weight"] = weight_AC
    content = saved({"state_dict": state})
    # then nothing is guessed,
    with pytest.raises(ZooError, match=r"no bias.*--cosine-scale 30"):
        read_checkpoint(content, "ldam.pth")
    # and with the scale the logits are the normalised layer's.
    checkpoint = read_checkpoint(content, "ldam.pth", cosine_scale=30)
    pictures = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features, _ = twins.cifar_resnet32({**state, "linear.weight": weight_AC.t(), "linear.bias": None}, pictures)
        torch.testing.assert_close(module_of(checkpoint)(pictures), twins.norm_linear(weight_AC, features, 30.0))


def test_a_plain_layer_without_bias_is_one_of_zeros():
    state = cifar_state(10)
    del state["linear.bias"]
    checkpoint = read_checkpoint(saved(state), "f.pth", cosine_scale=0)
    pictures = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        _, logits = twins.cifar_resnet32({**state, "linear.bias": None}, pictures)
        torch.testing.assert_close(module_of(checkpoint)(pictures), logits, rtol=1e-5, atol=1e-4)


WRAPPINGS = {
    "alone": lambda s: s, "state_dict": lambda s: {"epoch": 3, "state_dict": s}, "data parallel": prefixed,
    "both": lambda s: {"state_dict": prefixed(s), "args": argparse.Namespace(lr=0.1, data="cifar10"),
                       "best_acc1": np.float64(80.5)},
    "net": lambda s: {"net": s, "acc": 80, "best_prec1": torch.tensor(80.5)},
    "model": lambda s: {"model": prefixed(s), "cls_num_list": np.array([4990, 49])},
    "fc": lambda s: {name.replace("linear.", "fc."): value for name, value in s.items()},
    "counters": lambda s: {**s, "bn1.num_batches_tracked": torch.tensor(7)},
    "half": lambda s: {name: value.half() for name, value in s.items()},
    "double": lambda s: {name: value.double() for name, value in s.items()},
    "bfloat16": lambda s: {name: value.bfloat16() for name, value in s.items()},
    "parameters": lambda s: {name: torch.nn.Parameter(value) for name, value in s.items()},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_same_weights_in_any_wrapping_are_the_same_network(wrapping, zipped):
    """Old torch files and new ones, DataParallel, other number types, plain values beside the weights."""
    state = cifar_state(10)
    content = saved(WRAPPINGS[wrapping](state), _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(content, "file.pth.tar")
    half = {"half": torch.half, "bfloat16": torch.bfloat16}.get(wrapping, torch.float32)
    for name, value in state.items():
        ours = checkpoint.weights[name.replace("linear.", "fc.")]
        assert ours.dtype == torch.float32 and torch.equal(ours, value.to(half).float()), name
    module_of(checkpoint)  # strict: counters that old files lack are there
    assert bool(checkpoint.notes) == (wrapping in ("half", "double", "bfloat16"))
    if wrapping in ("both", "net"):
        assert checkpoint.stated_error == pytest.approx(0.195)


# ---- whole folders of the large benchmarks ----


def as_file(path: Path, what) -> Path:
    path.write_bytes(saved(what))
    return path


@pytest.fixture
def no_onnx(monkeypatch):
    """Export takes long at 224 pixels; that ONNX is held to torch is shown above and in test_export."""
    import export.to_onnx

    monkeypatch.setattr(export.to_onnx, "export_folder", lambda path: 0.0)


def metasaug_file(path: Path, classes: int, architecture: str = "resnet10") -> Path:
    backbone, head = released(architecture, classes)
    return as_file(path, {"epoch": 20, "state_dict": {"feature": backbone, "classifier": head}})


def test_imagenet_lt_comes_with_names_counts_and_groups_and_runs(tmp_path, no_onnx):
    # Given a file of MetaSAug's ImageNet-LT layout, when it is imported by the command line,
    file = metasaug_file(tmp_path / "MetaSAug_ImageNet_LT.tar", 1000)
    assert metasaug.main(["import", str(file), "--as", "metasaug-imagenet-lt", "--out", str(tmp_path / "m")]) == 0
    # then it is a whole model folder that predicts, with the benchmark's classes and counts.
    model = zoo.load(tmp_path / "m", backend="torch")
    config = model.folder.config
    assert config["pretrained_cfg"] | {"input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406], "crop_pct": 0.875,
                                       "std": [0.229, 0.224, 0.225]} == config["pretrained_cfg"]
    assert model.labels == label_names.imagenet() and model.groups_by == "count"
    assert [model.groups.count(g) for g in ("head", "medium", "tail")] == [385, 479, 136]
    picture = model.predict(np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8))
    assert sum(picture.groups.values()) == pytest.approx(1)


def test_classifier_balancings_weights_are_never_called_metasaug(tmp_path, capsys, no_onnx):
    backbone, head = released("resnet10", 1000)
    parts = {"feat_model": prefixed(backbone), "classifier": prefixed(head)}
    file = as_file(tmp_path / "resnet10_uniform_e90.pth", {"best_acc": 0.4, "state_dict_best": parts})
    import_file(file, "metasaug-imagenet-lt", tmp_path / "m")
    ours = ModelFolder(tmp_path / "m").config["metasaug"]
    assert (ours["name"], ours["method"], ours["published_error"], ours["prior"]) == (
        "classifier-balancing-imagenet-lt", "classifier-balancing", None, None)
    assert ours["imported"]["licence"] == "bsd-3-clause"
    assert "not of MetaSAug" in capsys.readouterr().out
    card = ModelFolder(tmp_path / "m").card
    assert "license: bsd-3-clause" in card and "Kang et al. 2020" in card and "52.33" not in card


@pytest.fixture
def inat18_json(tmp_path) -> Path:
    """train2018.json's form, with three pictures of class 0, 25 of class 1, 101 of class 2 and one of each other."""
    counts = [3, 25, 101] + [1] * 8139
    labels = np.repeat(np.arange(8142), counts).tolist()
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    content = {
        "images": [{"id": 10 * i, "file_name": f"train_val2018/x/{i}.jpg"} for i in range(len(labels))],
        "categories": [{"id": c, "name": str(c)} for c in range(8142)],
        "annotations": [{"id": i, "image_id": 10 * i, "category_id": labels[i]} for i in order]}
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    return tmp_path / "train2018.json"


def test_inat18_without_counts_says_unknown_everywhere_and_with_them_groups(tmp_path, capsys, inat18_json, no_onnx):
    file = metasaug_file(tmp_path / "MetaSAug_iNat18.tar", 8142)
    # Given no counts, then nothing is guessed, and it is said.
    import_file(file, "metasaug-inat18", tmp_path / "without")
    config = ModelFolder(tmp_path / "without").config
    assert "--counts FILE" in capsys.readouterr().out
    assert config["metasaug"]["class_counts"] is None and set(config["metasaug"]["groups"]) == {"unknown"}
    assert config["label_names"] == list(label_names.inat18())
    assert config["pretrained_cfg"]["mean"] == [0.466, 0.471, 0.380]
    model = zoo.load(tmp_path / "without", backend="torch")
    answer = model.predict(np.zeros((300, 300, 3), np.uint8))
    assert answer.top[0].group == "unknown" and answer.top[0].train_images is None
    # Given the official JSON, whose annotations are in an order of their own, then images are joined by id.
    import_file(file, "metasaug-inat18", tmp_path / "with", counts=inat18_json)
    ours = ModelFolder(tmp_path / "with").config["metasaug"]
    assert ours["class_counts"][:4] == [3, 25, 101, 1]
    assert ours["groups"][:4] == ["tail", "medium", "head", "tail"] and ours["groups_by"] == "count"
    assert ours["imported"]["counts_from"] == "train2018.json"


def test_counts_may_be_a_list_file_or_numbers(tmp_path, no_onnx):
    file = as_file(tmp_path / "f.pth", cifar_state(10))
    numbers = [10, 20, 30, 40, 50, 60, 70, 80, 90, 200]
    (tmp_path / "n.json").write_text(json.dumps(numbers))
    (tmp_path / "list.txt").write_text("".join(f"a/{c}_{i}.jpg {c}\n" for c, n in enumerate(numbers) for i in range(n)))
    for counts in ("n.json", "list.txt"):
        out = import_file(file, "metasaug-cifar10-lt", tmp_path / counts.replace(".", "-"), counts=tmp_path / counts)
        assert ModelFolder(out).config["metasaug"]["class_counts"] == numbers


@pytest.mark.parametrize(("content", "reason"), [
    ("[1, 2, 3]", "counts 3 classes"), ("[]", "counts 0 classes"), ("[1, 2", "not JSON"), ('["a"]', "whole numbers"),
    ("[0, 1, 1, 1, 1, 1, 1, 1, 1, 1]", "1 classes have no training picture, beginning with airplane"),
    ("{}", "expected images, annotations"), ("no list at all", "not of the form"), ("", "lists no pictures"),
    (None, "cannot be read")])
def test_counts_that_are_none_say_so(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "counts").write_text(content)
    file = as_file(tmp_path / "f.pth", cifar_state(10))
    with pytest.raises(ZooError, match=reason):
        import_file(file, "metasaug-cifar10-lt", tmp_path / "m", counts=tmp_path / "counts")
    assert sorted(os.listdir(tmp_path)) == sorted(["f.pth"] + ["counts"] * (content is not None))


# ---- what is refused ----


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.promise("no code")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "beside the weights", "numpy object"])
def test_a_malicious_pickle_is_refused_by_name_and_runs_nothing(kind, tmp_path, capsys):
    canary = Canary(tmp_path / "canary")
    if kind == "pickle":
        content = pickle.dumps({"state_dict": canary})
    elif kind == "numpy object":
        content = saved({"state_dict": cifar_state(), "best": np.array([canary], dtype=object)})
    else:
        what = {**cifar_state(), "x": canary} if kind == "beside the weights" else {"state_dict": canary}
        content = saved(what, _use_new_zipfile_serialization=kind != "legacy")
    (tmp_path / "evil.pth").write_bytes(content)
    arguments = ["import", str(tmp_path / "evil.pth"), "--as", "metasaug-cifar10-lt", "--out", str(tmp_path / "m")]
    assert metasaug.main(arguments) == 2
    said = capsys.readouterr().err
    assert "evil.pth" in said and ("refused" in said or kind == "pickle") and "Traceback" not in said
    assert not (tmp_path / "canary").exists() and not (tmp_path / "m").exists()


def truncated(share: float) -> bytes:
    content = saved({"state_dict": cifar_state()})
    return content[: int(len(content) * share)]


def legacy_truncated() -> bytes:
    content = saved({"state_dict": cifar_state()}, _use_new_zipfile_serialization=False)
    return content[: len(content) // 2]


def zip_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def with_value(name: str, value: float) -> bytes:
    state = cifar_state()
    state[name].view(-1)[0] = value
    return saved({"state_dict": state})


def without(*names: str) -> bytes:
    return saved({"state_dict": {k: v for k, v in cifar_state().items() if k not in names}})


def large(**changes) -> bytes:
    backbone, head = released("resnet10", 10)
    return saved({"state_dict_best": {"feat_model": {**backbone, **changes.get("feat_model", {})},
                                      "classifier": changes.get("classifier", head)}})


REFUSED = {
    "empty": (lambda: b"", "not a torch checkpoint, or cut off"),
    "text": (lambda: b"<html>Not found</html>", "not a torch checkpoint"),
    "cut zip": (lambda: truncated(0.5), "damaged or cut off"),
    "cut at the end": (lambda: truncated(0.999), "damaged or cut off"),
    "cut old file": (legacy_truncated, "cut off"),
    "zip of pictures": (lambda: zip_of(**{"a.jpg": b"x"}), r"a zip but no checkpoint of torch \(it holds a\.jpg"),
    "zip bomb": (lambda: zip_of(**{"m/data.pkl": b"\x80\x02}.", "m/data/0": bytes(50_000_000)}), "unpack to 50 MB"),
    "no dictionary": (lambda: saved([1, 2]), r"holds a list, not a dictionary"),
    "no weights": (lambda: saved({"epoch": 3, "args": "x"}), r"no weights found(?s:.*)epoch: int(?s:.*)Expected one"),
    "weights of something else": (lambda: saved({"state_dict": {"a.weight": torch.ones(2, 3)}}),
                                  r"no last layer(?s:.*)a\.weight: float32 \(2, 3\)(?s:.*)Expected one of"),
    "another network": (lambda: saved({"features.0.weight": torch.ones(64, 3, 3, 3), "fc.weight": torch.ones(10, 5),
                                       "fc.bias": torch.ones(10)}),
                        r"is not a known network(?s:.*)features\.0\.weight: float32 \(64, 3, 3, 3\)(?s:.*)Nearest"),
    "a part missing": (lambda: without("layer2.3.bn1.weight"),
                       r"Nearest is resnet32(?s:.*)layer2\.3\.bn1\.weight missing, expected \(32,\)"),
    "wrong class count": (lambda: saved({"state_dict": cifar_state(7)}), "tells 7 classes apart, .* has 10"),
    "nan": (lambda: with_value("layer1.0.conv1.weight", float("nan")), r"layer1\.0\.conv1\.weight holds 1 values"),
    "infinite": (lambda: with_value("linear.bias", float("inf")), "1 values that are not numbers"),
    "variance below zero": (lambda: with_value("bn1.running_var", -1.0), r"bn1\.running_var is a variance and below 0"),
    "too large for float32": (lambda: saved({k: v.double() * 1e200 for k, v in cifar_state().items()}), "too large"),
    "integers": (lambda: saved({k: v.int() for k, v in cifar_state().items()}), "expected float numbers"),
    "sparse": (lambda: saved({**cifar_state(), "linear.weight": torch.eye(10, 64).to_sparse()}), "expected float"),
    "bias of another layer": (lambda: saved({**cifar_state(), "linear.bias": torch.ones(3)}), "do not belong together"),
    "two last layers": (lambda: saved({**cifar_state(), "fc.weight": torch.ones(10, 64)}), "two last layers"),
    "OLTR's attention": (lambda: large(feat_model={"modulatedatt.g.weight": torch.ones(3)}), "modulated attention"),
    "an extra layer": (lambda: large(feat_model={"fc_add.weight": torch.ones(3)}), "use_fc"),
    "OLTR's classifier": (lambda: large(classifier={"cosnorm_classifier.weight": torch.ones(10, 512)}), "OLTR's"),
    "cosine, of what scale": (lambda: large(classifier={"weight": torch.ones(10, 512)}), "no bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_gives_one_clear_error_and_no_folder(case, tmp_path, capsys):
    make, reason = REFUSED[case]
    (tmp_path / "file.pth").write_bytes(make())
    arguments = ["import", str(tmp_path / "file.pth"), "--as", "metasaug-cifar10-lt", "--out", str(tmp_path / "m")]
    assert metasaug.main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(reason, said), said
    assert "file.pth" in said and "Traceback" not in said
    assert os.listdir(tmp_path) == ["file.pth"]


def test_a_class_of_ones_own_in_a_checkpoint_is_named(tmp_path):
    """Which global was asked for is what its makers need to hear."""
    import decimal

    with pytest.raises(ZooError, match=r"asks for decimal\.Decimal, which is refused"):
        read_checkpoint(saved({"state_dict": cifar_state(), "lr": decimal.Decimal("0.1")}), "f.pth")


def test_names_folders_and_files_that_do_not_fit_are_told_before_any_work(tmp_path, monkeypatch):
    file = as_file(tmp_path / "f.pth", cifar_state(10))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(authors_files, "read_checkpoint", lambda *_: pytest.fail("it was read first"))
    for arguments, reason in [
            ((file, "metasaug-cifar11-lt", tmp_path / "m"), "no such model"),
            ((file, "heldout-cifar10-lt", tmp_path / "m"), "no files of others are known for it"),
            ((file, "ce-plankton", tmp_path / "m"), "no files of others are known for it"),
            ((file, "metasaug-cifar10-lt", tmp_path / "full"), "there already"),
            ((file, "metasaug-cifar10-lt", file), "there already"),
            ((tmp_path / "absent", "metasaug-cifar10-lt", tmp_path / "m"), "absent cannot be read"),
            ((tmp_path / "full", "metasaug-cifar10-lt", tmp_path / "m"), "cannot be read")]:
        with pytest.raises(ZooError, match=reason):
            import_file(*arguments)
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_an_import_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    import export.to_onnx

    def broken(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.to_onnx, "export_folder", broken)
    file = as_file(tmp_path / "f.pth", cifar_state(10))
    with pytest.raises(KeyboardInterrupt):
        import_file(file, "metasaug-cifar10-lt", tmp_path / "m")
    assert os.listdir(tmp_path) == ["f.pth"]
