"""Export: the ONNX is the torch module or nothing, speaks for itself, and the card says what config.json says."""

import copy
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo
from zoo.errors import ModelFolderError
from zoo.model_folder import CARD, CONFIG, ONNX, ModelFolder, add_files, check_config, write_model_folder

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from export import to_onnx  # noqa: E402
from export.card import card, write_card  # noqa: E402
from export.command_line import finish  # noqa: E402
from export.errors import ExportError  # noqa: E402
from training.report.metrics import wilson_interval  # noqa: E402
from zoo.architectures import create  # noqa: E402


def state(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def made(folder: Path, architecture: str, cosine_scale: float | None, size: int, config: dict) -> Path:
    """A model folder around random weights, batch norm's statistics included."""
    torch.manual_seed(0)
    module = create(architecture, 10, cosine_scale)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    config = copy.deepcopy(config)
    config.update(architecture=architecture, num_features=module.num_features)
    config["pretrained_cfg"].update(input_size=[3, size, size], crop_pct=0.875, interpolation="bicubic")
    config["metasaug"].update(name=architecture, cosine_scale=cosine_scale)
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    return write_model_folder(folder, config, weights).path


@pytest.fixture(scope="module")
def config(tiny_model_folder) -> dict:
    return ModelFolder(tiny_model_folder).config


# ---- parity or nothing ----


@pytest.mark.parametrize("what", ["logits", "features", "feature_map", "nan"])
def test_an_onnx_that_differs_is_refused_and_the_folder_stays(what, tiny_model_folder, tmp_path, monkeypatch):
    # Given an exported folder, and a module that answers otherwise than its export,
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    before = state(folder)
    monkeypatch.setattr(to_onnx, "onnx_bytes", lambda module, config: (folder / ONNX).read_bytes())
    honest = to_onnx.all_outputs

    def wrong(module, pictures):
        outputs = dict(zip(to_onnx.OUTPUTS, honest(module, pictures), strict=True))
        if what == "nan":
            outputs["logits"] = outputs["logits"] * float("nan")
        else:
            outputs[what] = outputs[what] * 1.001
        return tuple(outputs.values())

    monkeypatch.setattr(to_onnx, "all_outputs", wrong)
    # when it is exported again, then that is refused, and every byte of the folder is as it was.
    with pytest.raises(ExportError, match="nothing was written"):
        to_onnx.export_folder(folder)
    assert state(folder) == before


def test_weights_that_are_not_numbers_are_refused(tiny_model_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    monkeypatch.setattr(to_onnx, "_made_up", lambda config: np.full((33, 3, 32, 32), np.nan, np.float32))
    monkeypatch.setattr(to_onnx, "onnx_bytes", lambda module, config: (folder / ONNX).read_bytes())
    with pytest.raises(ExportError):
        to_onnx.export_folder(folder)


def test_a_network_that_has_exploded_is_refused(tiny_model_folder, tmp_path):
    """Its ONNX was within 8e+11 of torch, and written."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    opened = ModelFolder(folder)
    weights = {name: array * 1e12 if name.startswith("fc") else array for name, array in opened.weights().items()}
    write_model_folder(folder, opened.config, weights)
    with pytest.raises(ExportError, match=r"as large as \S+e\+1.*exploded"):
        to_onnx.export_folder(folder)
    assert ONNX not in ModelFolder(folder)


@pytest.mark.parametrize(("correct", "is_said"), [(52, True), (90, False)])
def test_a_model_that_guesses_says_so_in_its_last_line(tiny_model_folder, tmp_path, capsys, correct, is_said):
    # Given a model whose classes are right so often (of 520 pictures, in 10 classes),
    folder, opened = Path(shutil.copytree(tiny_model_folder, tmp_path / "model")), ModelFolder(tiny_model_folder)
    low, high = wilson_interval(correct, 520)
    results = {**opened.results, "macro_error": 1 - correct / 520, "macro_accuracy_interval": [low, high]}
    write_model_folder(folder, {**opened.config, "metasaug": {**opened.config["metasaug"], "results": results}},
                       opened.weights())
    # when training ends with its export, then the last line tells.
    finish(folder)
    assert ("no better than guessing" in capsys.readouterr().out.splitlines()[-1]) == is_said


def test_parity_holds_on_pictures_of_ones_own(tiny_model_folder, config):
    module = zoo.load(tiny_model_folder).module
    pictures = np.random.default_rng(3).normal(size=(25, 3, 32, 32)).astype(np.float32)
    difference = to_onnx.check_parity((tiny_model_folder / ONNX).read_bytes(), module, config, pictures)
    assert 0 <= difference < 0.1


@pytest.mark.parametrize(("architecture", "cosine_scale", "size"), [
    ("resnet8", 30.0, 32), pytest.param("resnet18", None, 64, marks=pytest.mark.long)])
def test_other_heads_and_networks_export_and_predict_alike(architecture, cosine_scale, size, config, tmp_path):
    # Given LDAM's cosine classifier, and a network of the ImageNet kind, when they are exported,
    folder = made(tmp_path / "model", architecture, cosine_scale, size, config)
    assert to_onnx.export_folder(folder) <= to_onnx.MAX_DIFFERENCE * (3 if cosine_scale else 1)
    # then both backends agree on pictures.
    pictures = list(np.random.default_rng(0).integers(0, 256, (7, 70, 90, 3), dtype=np.uint8))
    onnx, torch_ = (zoo.load(folder, backend=b, device="cpu").predict_batch(pictures) for b in ("onnx", "torch"))
    for mine, theirs in zip(onnx, torch_, strict=True):
        assert np.abs(mine.logits - theirs.logits).max() <= 1e-4 * max(1, np.abs(theirs.logits).max() / 10)
        assert mine.top[0].index == theirs.top[0].index
        if cosine_scale:
            assert np.abs(mine.logits).max() <= cosine_scale * 1.0001
    # And nothing stands in the folder that its manifest does not name.
    assert set(state(folder)) == {*ModelFolder(folder).files, "manifest.json"}


def test_exporting_again_gives_the_same_bytes(tiny_model_folder, tmp_path, config):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    before = state(folder)
    to_onnx.export_folder(folder)
    write_card(folder)
    assert state(folder) == before


def test_a_folder_with_a_damaged_onnx_is_mended_by_exporting_again(tiny_model_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    whole = (folder / ONNX).read_bytes()
    (folder / ONNX).write_bytes(b"half")
    with pytest.raises(ModelFolderError):
        zoo.load(folder)
    monkeypatch.setattr(to_onnx, "onnx_bytes", lambda module, config: whole)
    to_onnx.export_folder(folder)
    ModelFolder(folder).check()


# ---- what others need to run it ----


def test_metadata_is_all_that_plain_onnxruntime_needs(tiny_model_folder, pictures):
    # Given the ONNX file alone, with onnxruntime, PIL and numpy,
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tiny_model_folder / ONNX), providers=["CPUExecutionProvider"])
    meta = session.get_modelmeta().custom_metadata_map
    mean, std, (_, height, width) = (json.loads(meta[key]) for key in ("mean", "std", "input_size"))
    assert "RGB" in meta["preprocessing"] and "32 pixels (bilinear)" in meta["preprocessing"]
    model = zoo.load(tiny_model_folder)
    for name in ("a.png", "b.jpg", "d.jpg"):
        # when a picture is prepared as the metadata says, in a few lines,
        picture = Image.open(pictures / name).convert("RGB")
        short = min(picture.size)
        picture = picture.resize([side * width // short for side in picture.size], Image.Resampling.BILINEAR)
        left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
        array = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 255
        array = ((array - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)[None]
        logits, features, feature_map = session.run(["logits", "features", "feature_map"], {"pictures": array})
        # then the answer is the zoo's, under the same labels.
        ours = model.predict(pictures / name)
        assert np.abs(logits[0] - ours.logits).max() <= 1e-4 * max(1, np.abs(ours.logits).max() / 10)
        assert json.loads(meta["labels"])[logits[0].argmax()] == ours.top[0].label
        assert features.shape == (1, 64) and feature_map.shape == (1, 64, 8, 8)
    assert json.loads(meta["config.json"]) == model.folder.config


def test_the_batch_is_free_and_the_file_stands_alone(tiny_model_folder):
    onnx = pytest.importorskip("onnx")
    loaded = onnx.load(tiny_model_folder / ONNX, load_external_data=False)
    onnx.checker.check_model(loaded, full_check=True)
    assert [i.name for i in loaded.graph.input] == ["pictures"]
    assert [o.name for o in loaded.graph.output] == list(to_onnx.OUTPUTS)
    for value in (*loaded.graph.input, *loaded.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param, value.name
    assert not list(tiny_model_folder.rglob("*.data"))


def test_nothing_of_this_machine_is_in_any_file(tiny_model_folder):
    traces = {str(Path(to_onnx.__file__).parent.parent), str(Path(torch.__file__).parent), str(Path.home()),
              os.getcwd(), str(tiny_model_folder.parent), "site-packages", ".py\"", "Traceback"}
    traces |= {socket.gethostname()} if len(socket.gethostname()) > 5 else set()
    for name in state(tiny_model_folder):
        content = (tiny_model_folder / name).read_bytes()
        for trace in traces:
            assert len(trace) < 4 or trace.encode() not in content, (name, trace)


# ---- the card ----


def loaded_card(text: str, tmp_path: Path):
    from huggingface_hub import ModelCard

    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return ModelCard.load(tmp_path / "README.md")


def test_the_hub_reads_the_cards_yaml_and_its_numbers_are_the_configs(tiny_model_folder, config, tmp_path):
    data = loaded_card((tiny_model_folder / CARD).read_text(encoding="utf-8"), tmp_path).data
    results = config["metasaug"]["results"]
    assert (data.model_name, data.license, data.library_name, data.pipeline_tag) == (
        "tiny", "mit", "metasaug", "image-classification")
    measured = {r.metric_name: r.metric_value for r in data.eval_results}
    assert measured == {
        "accuracy": round(1 - results["error"], 4), "macro accuracy": round(1 - results["macro_error"], 4),
        **{f"accuracy ({g} classes)": round(r["accuracy"], 4) for g, r in results["groups"].items()}}
    assert {r.dataset_name for r in data.eval_results} == {"Made-up animals, imbalance 100"}
    assert "model-index" in data.to_dict()


def test_every_result_per_group_and_class_stands_in_the_card(tiny_model_folder, config):
    text = (tiny_model_folder / CARD).read_text(encoding="utf-8")
    ours = config["metasaug"]
    results = ours["results"]
    assert f"**error {results['error']:.2%}**" in text and f"worst class {results['worst_class_error']:.2%}" in text
    for group, r in results["groups"].items():
        low, high = r["interval"]
        assert (f"| {group} | {r['classes']} | {r['correct']} | {r['images']} | {r['accuracy']:.1%} | "
                f"{low:.1%} to {high:.1%} |") in text
    for row, group in zip(results["per_class"], ours["groups"], strict=True):
        assert f"| {row['label']} | {group} | {row['train_images']} | {row['correct']} | {row['test_images']} |" in text
    for told in (ours["dataset"], ours["command"], ours["schedule"], f"seed {ours['seed']}", "MIT", "@inproceedings"):
        assert told in text
    assert str(config["pretrained_cfg"]["mean"]) in text


def test_odd_names_neither_break_the_table_nor_the_yaml(config, tmp_path):
    odd = copy.deepcopy(config)
    names = ["a|b", "new\nline", "---", "ü", "x: y", "'q\"", "# h", "*b*", "`c`", "<b>"]
    odd["label_names"] = names
    for row, name in zip(odd["metasaug"]["results"]["per_class"], names, strict=True):
        row["label"] = name
    odd["metasaug"].update(name="a: b # c", dataset="Data: \"own\" | set", command="metasaug train | tee log")
    text = card(odd)
    assert loaded_card(text, tmp_path).data.model_name == "a: b # c"
    table = text.split("### Per class")[1].split("## ")[0].strip().splitlines()
    assert len(table) == 12 and all(line.replace("\\|", "").count("|") == 6 for line in table)


@pytest.mark.parametrize("missing", [
    ["results"], ["recipe"], ["seed"], ["loss"], ["command"], ["class_counts"], ["schedule"],
    ["versions"],
    ["imbalance"], ["published_error"], ["seconds"],
    ["results", "recipe", "seed", "loss", "command", "class_counts", "schedule", "versions", "imbalance"]],
    ids="+".join)
def test_whatever_config_is_a_model_folders_has_a_card(config, missing, tmp_path):
    """A folder that other code wrote, by the schema: what is not known is not said."""
    less = copy.deepcopy(config)
    for key in missing:
        del less["metasaug"][key]
    check_config(less, CONFIG)
    text = card(less)
    assert loaded_card(text, tmp_path).data.model_name == "tiny"
    assert "None" not in text
    if "results" in missing:
        assert "Not measured by us" in text


def test_a_group_without_test_pictures_has_no_accuracy(config, tmp_path):
    less = copy.deepcopy(config)
    less["metasaug"]["results"]["groups"]["tail"].update(images=0, correct=0, accuracy=None, interval=[0.0, 1.0])
    text = card(less)
    assert "| tail | 3 | 0 | 0 | – | 0.0% to 100.0% |" in text
    assert "accuracy (tail classes)" not in text
    loaded_card(text, tmp_path)


def test_unknown_counts_are_said_to_be_unknown(config, tmp_path):
    less = copy.deepcopy(config)
    total = {"classes": 10, "images": 200, "correct": 126, "accuracy": 0.63, "interval": [0.5, 0.7]}
    less["metasaug"].update(class_counts=None, groups=["unknown"] * 10, groups_by="unknown")
    less["metasaug"]["results"]["groups"] = {"unknown": total}
    for row in less["metasaug"]["results"]["per_class"]:
        row["train_images"] = None
    text = card(less)
    assert "unknown: training pictures not known" in text and "| ant | unknown | ? | 19 | 20 |" in text
    loaded_card(text, tmp_path)


def test_a_new_card_takes_the_place_of_the_old(tiny_model_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    opened = ModelFolder(folder)
    add_files(folder, {CARD: b"old"}, {n: e for n, e in opened.files.items() if n != CARD})
    write_card(folder)
    assert state(folder) == state(tiny_model_folder)
