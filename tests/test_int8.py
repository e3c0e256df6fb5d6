"""int8: a third of the size or less, right almost as often, each group's accuracy told; and as safe as fp32."""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metasaug
import zoo
from zoo.errors import BackendError, ModelFolderError, ZooError
from zoo.model_folder import CARD, ONNX, ONNX_INT8, ModelFolder, add_files
from zoo.onnx_file import refuse_unsafe

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from export import quantise  # noqa: E402


def labelled(folder: Path, names, each: int, seed: int) -> Path:
    """Class folders of drawn pictures: a colour a class, with noise."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            colour = np.random.default_rng(c).integers(0, 256, 3)
            array = (colour + rng.normal(0, 40, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(array).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures_of_classes(tiny_model_folder, tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled") / "train", zoo.load(tiny_model_folder).labels, 4, seed=0)


@pytest.fixture(scope="module")
def int8_folder(tiny_model_folder, pictures_of_classes, tmp_path_factory) -> Path:
    """By the command line: the tiny model with both files, measured."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("int8") / "model"))
    assert metasaug.main(["export", str(folder), "--int8", "--calibrate", str(pictures_of_classes),
                          "--data", str(pictures_of_classes)]) == 0
    return folder


def test_int8_is_small_standard_and_close_to_fp32(int8_folder, pictures_of_classes):
    # Given a folder with both files, when pictures go through each,
    fp32, int8 = zoo.load(int8_folder, device="cpu"), zoo.load(int8_folder, precision="int8")
    paths = sorted(pictures_of_classes.rglob("*.png"))
    both = list(zip(*(model.predict_each(paths, feature_maps=True) for model in (fp32, int8)), strict=True))
    # then int8 gives nearly the same logits, features and map, over any batch,
    spread = np.std([a.logits for a, _ in both])
    assert np.mean([np.abs(a.logits - b.logits).mean() for a, b in both]) < 0.15 * spread
    assert np.mean([a.top[0].index == b.top[0].index for a, b in both]) >= 0.8
    assert {b.features.shape for _, b in both} == {(64,)} and both[0][1].feature_map.shape == (64, 8, 8)
    assert (int8.precision, int8.device, repr(int8)) == ("int8", "cpu", "<tiny: 10 classes, onnx int8 on cpu>")
    # its weights are int8 by channel, in standard operators, and the file is a third of the other.
    content = ModelFolder(int8_folder).read(ONNX_INT8)
    refuse_unsafe(content, ONNX_INT8)
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    convolutions = Counter(node.op_type for node in model.graph.node)
    assert convolutions["QuantizeLinear"] and {o.domain for o in model.opset_import} == {""}
    by_channel = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    assert len(by_channel) == convolutions["Conv"] == 7
    scales = {t.name: t.dims for t in model.graph.initializer if t.name.endswith("scale")}
    assert sum(len(dims) == 1 and dims[0] >= 16 for dims in scales.values()) >= 7
    assert len(content) < 0.4 * len(ModelFolder(int8_folder).read(ONNX))


def test_the_card_shows_both_per_group_as_evaluate_measures_them(int8_folder, pictures_of_classes, tmp_path, capsys):
    # Given the measured folder, when each variant is evaluated by the command line,
    folder = ModelFolder(int8_folder)
    folder.check()
    variants = folder.config["metasaug"]["variants"]
    results = {}
    for precision in ("fp32", "int8"):
        out = tmp_path / f"{precision}.json"
        assert metasaug.main(["evaluate", str(int8_folder), "--data", str(pictures_of_classes), "--out", str(out),
                              "--precision", precision]) == 0
        results[precision] = json.loads(out.read_text())
        # then config.json has these figures,
        for key in ("images", "error", "macro_error", "groups"):
            assert variants[precision][key] == results[precision][key], (precision, key)
        assert variants[precision]["correct_per_class"] == [r["correct"] for r in results[precision]["per_class"]]
    # and the card both side by side, group by group, with what int8 was calibrated on.
    table = folder.card.split("## Variants")[1].split("\n## ")[0]
    for group in ("head", "medium", "tail"):
        both = [f"{results[p]['groups'][group]['accuracy']:.2%}" for p in ("fp32", "int8")]
        assert f"| {group}, accuracy | {both[0]} | {both[1]} |" in table
    assert "ranges from 40 calibration pictures" in table and "on 40 test pictures" in table
    assert variants["int8"]["calibration_pictures"] == 40
    # Both ONNX files carry that config, and nothing of this machine.
    for name in (ONNX, ONNX_INT8):
        props = {p.key: p.value for p in onnx.load_from_string(folder.read(name)).metadata_props}
        assert json.loads(props["config.json"]) == folder.config
        assert str(int8_folder.parent).encode() not in folder.read(name)


def test_int8_that_was_not_measured_says_so(tiny_model_folder, pictures_of_classes, tmp_path, monkeypatch):
    monkeypatch.setattr("export.to_onnx.export_folder", lambda path: 0.0)
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    assert metasaug.main(["export", str(folder), "--int8", "--calibrate", str(pictures_of_classes)]) == 0
    assert "Its accuracy was not measured." in ModelFolder(folder).card
    # Exporting again leaves it be, and the same pictures give the same bytes.
    before = ModelFolder(folder).files
    assert metasaug.main(["export", str(folder), "--int8", "--calibrate", str(pictures_of_classes)]) == 0
    assert ModelFolder(folder).files == before


def test_predict_takes_the_precision(int8_folder, tiny_model_folder, pictures, tmp_path, capsys):
    for folder, code in ((int8_folder, 0), (tiny_model_folder, 2)):
        assert metasaug.main(["predict", str(folder), str(pictures), "--precision", "int8"]) == code
    assert "--int8 --calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "reason"), [
    ({"precision": "int4"}, "fp32 or int8"), ({"precision": "int8", "backend": "torch"}, "ONNX Runtime on the CPU"),
    ({"precision": "int8", "device": "cuda"}, "ONNX Runtime on the CPU")])
def test_a_precision_that_does_not_go_says_why(int8_folder, options, reason):
    with pytest.raises(BackendError, match=reason):
        zoo.load(int8_folder, **options)


def test_a_model_without_int8_says_how_to_make_it(tiny_model_folder):
    with pytest.raises(ModelFolderError, match=r"no onnx/model_int8\.onnx .*--int8 --calibrate"):
        zoo.load(tiny_model_folder, precision="int8")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "swapped with fp32"])
def test_a_damaged_int8_file_never_loads(int8_folder, tmp_path, damage):
    folder = Path(shutil.copytree(int8_folder, tmp_path / "model"))
    content = (folder / ONNX_INT8).read_bytes()
    (folder / ONNX_INT8).unlink()
    if damage != "missing":
        (folder / ONNX_INT8).write_bytes({
            "flip": content[:999] + bytes([content[999] ^ 4]) + content[1000:], "cut": content[:-1], "empty": b"",
            "swapped with fp32": (folder / ONNX).read_bytes()}[damage])
    with pytest.raises(ModelFolderError, match="model_int8"):
        zoo.load(folder, precision="int8")


@pytest.mark.parametrize("evil", ["external", "domain", "function", "other outputs", "no onnx"])
def test_an_int8_file_that_is_unsafe_or_another_models_is_refused_though_vouched_for(int8_folder, tmp_path, evil):
    # Given a folder whose manifest vouches for an int8 file that reaches outside, or is of another shape,
    folder = Path(shutil.copytree(int8_folder, tmp_path / "model"))
    model = onnx.load(folder / ONNX_INT8)
    if evil == "external":
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../secret")
    elif evil == "domain":
        model.graph.node[0].domain = "com.microsoft"
    elif evil == "function":
        model.functions.add(name="f", domain="mine")
    elif evil == "other outputs":
        del model.graph.output[1]
    content = b"int8" if evil == "no onnx" else model.SerializeToString()
    add_files(folder, {ONNX_INT8: content}, ModelFolder(folder).files)
    # then it is refused, and fp32 of the same folder still works.
    with pytest.raises(ModelFolderError, match="model_int8"):
        zoo.load(folder, precision="int8")
    zoo.load(folder)


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--int8"], "--int8 needs --calibrate DIR"), (["--calibrate", "x"], "--calibrate is for --int8"),
    (["--int8", "--calibrate", "{tmp}/absent"], "absent"), (["--int8", "--calibrate", "{tmp}/empty"], "empty"),
    (["--data", "{tmp}/others"], "unknown to")])
def test_calibration_without_pictures_is_one_error(arguments, reason, tiny_model_folder, tmp_path, capsys, monkeypatch):
    import export.to_onnx

    monkeypatch.setattr(export.to_onnx, "export_folder", lambda path: 0.0)
    labelled(tmp_path / "others", ["lamp", "sofa"], 1, 0)
    (tmp_path / "empty").mkdir()
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    before = {name: (folder / name).read_bytes() for name in (ONNX, "config.json")}
    assert metasaug.main(["export", str(folder), *(a.replace("{tmp}", str(tmp_path)) for a in arguments)]) == 2
    said = capsys.readouterr().err
    assert reason in said and "Traceback" not in said
    assert {name: (folder / name).read_bytes() for name in before} == before
    ModelFolder(folder).check()


def test_a_damaged_calibration_picture_is_named(tiny_model_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    data = labelled(tmp_path / "data", ["ant", "bee"], 2, 0)
    (data / "bee" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ZooError, match=r"bee.1\.png"):
        quantise.add_int8(folder, data)
    assert ONNX_INT8 not in ModelFolder(folder)


def test_every_class_sets_ranges_the_rare_ones_first():
    """Of 1,000 pictures of which 990 are of one class, the first hundred hold every one of the others."""
    labels = np.array([0] * 990 + [1] * 6 + [2] * 4)
    order = quantise.class_by_class(labels)
    assert sorted(order) == list(range(1000)) and order == quantise.class_by_class(labels)
    assert sorted(labels[order[:3]]) == [0, 1, 2]
    assert Counter(labels[order[:20]].tolist()) == {0: 10, 1: 6, 2: 4}


def test_the_root_logger_is_left_as_it_was(int8_folder):
    assert logging.getLogger().level == logging.WARNING
    assert CARD in ModelFolder(int8_folder) and not [n for n in os.listdir(int8_folder) if n.endswith(".tmp")]
