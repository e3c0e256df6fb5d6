"""int8 ONNX beside fp32: quantised statically and per channel, with ranges from training pictures.

Quantisation may cost rare classes more than frequent ones. So each variant's accuracy per group is measured, kept in
config.json (`metasaug.variants`) and shown on the card.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.to_onnx import record
from training.data.tables import list_class_folders
from training.report.evaluate import labelled_pictures, measure
from zoo.model_folder import ONNX, ONNX_INT8, ModelFolder, add_files
from zoo.onnx_file import refuse_unsafe
from zoo.predictor import Predictor

CALIBRATION_PICTURES = 512
BATCH = 32
VARIANTS = {"fp32": ONNX, "int8": ONNX_INT8}


def add_int8(path: str | Path, calibrate: Path) -> int:
    """Add onnx/model_int8.onnx to a model folder that has ONNX. Returns how many pictures set its ranges.

    calibrate  class folders of training pictures; 512 of them, with classes in turn and the same each time, set the
               range of each activation
    Raises ModelFolderError, PictureError or DataError; the folder is then unchanged.
    """
    folder = ModelFolder(path)
    predictor = Predictor(folder, device="cpu")
    paths, labels, _ = list_class_folders(calibrate)
    pictures = np.stack([predictor.preprocess(paths[i]) for i in class_by_class(labels)[:CALIBRATION_PICTURES]])
    content = int8_bytes(folder.read(ONNX), pictures)
    refuse_unsafe(content, ONNX_INT8)
    add_files(folder.path, {ONNX_INT8: content}, folder.files)
    record(folder.path, variants={**_variants(folder), "int8": {"calibration_pictures": len(pictures)}})
    return len(pictures)


def measure_variants(path: str | Path, data: Path) -> dict[str, Any]:
    """Measure each ONNX file of a model folder on labelled pictures, and keep the results in its config.

    data  class folders of test pictures, as `metasaug evaluate` takes them
    Returns results by variant. Raises DataError.
    """
    folder = ModelFolder(path)
    measured = {}
    for precision, file in VARIANTS.items():
        if file in folder:
            predictor = Predictor(folder, device="cpu", precision=precision)  # type: ignore[arg-type]
            measured[precision], _ = measure(predictor, *labelled_pictures(data, predictor, str(path)), None, False)
    variants = _variants(folder)
    for precision, results in measured.items():
        kept = {key: results[key] for key in ("images", "error", "macro_error", "worst_class_error", "groups")}
        kept["correct_per_class"] = [row["correct"] for row in results["per_class"]]
        variants[precision] = {**variants.get(precision, {}), **kept}
    record(folder.path, variants=variants)
    return measured


def _variants(folder: ModelFolder) -> dict[str, Any]:
    return dict(folder.config["metasaug"].get("variants") or {})


def class_by_class(labels_N: np.ndarray) -> list[int]:
    """Places of all pictures with classes in turn: the first of each class, then the second of each, and so on.

    So rare classes set ranges too. The order is random, but the same each time.
    """
    order = np.random.default_rng(0).permutation(len(labels_N)).tolist()
    seen: dict[int, int] = {}
    turn = {}
    for i in order:
        turn[i] = seen[labels_N[i]] = seen.get(labels_N[i], -1) + 1
    return sorted(order, key=lambda i: (turn[i], labels_N[i]))


def int8_bytes(content: bytes, pictures: np.ndarray) -> bytes:
    """Quantise an ONNX file to int8: weights per channel, activations in the range that the pictures reach.

    pictures  float32 (N, 3, H, W) as the network takes them
    """
    model = onnx.load_from_string(content)
    del model.graph.value_info[:]  # the quantiser fails on the exporter's shapes
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # hides the quantiser's advice to pre-process, which is done here
    try:
        with tempfile.TemporaryDirectory() as scratch:
            whole, ready, small = (str(Path(scratch) / f"{name}.onnx") for name in ("whole", "ready", "small"))
            onnx.save(model, whole)
            quant_pre_process(whole, ready)
            quantize_static(ready, small, _Batches(pictures), quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
            quantised = onnx.load(small)
    finally:
        root.setLevel(level)
    # ONNX Runtime's optimiser lists every domain that it knows, but the file uses only one.
    standard = [each for each in quantised.opset_import if each.domain == ""]
    del quantised.opset_import[:]
    quantised.opset_import.extend(standard)
    onnx.helper.set_model_props(quantised, {each.key: each.value for each in model.metadata_props})
    onnx.checker.check_model(quantised)
    return quantised.SerializeToString(deterministic=True)


class _Batches(CalibrationDataReader):
    def __init__(self, pictures: np.ndarray):
        self.parts = iter(np.split(pictures, range(BATCH, len(pictures), BATCH)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self.parts, None)
        return None if part is None else {"pictures": part}
