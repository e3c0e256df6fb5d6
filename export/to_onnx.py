"""ONNX beside the weights: one file for plain onnxruntime, compared with the torch module before it is written."""

import json
import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from export.errors import ExportError
from zoo.model_folder import CONFIG, ONNX, ONNX_INT8, ModelFolder, add_files, json_bytes
from zoo.onnx_file import refuse_unsafe
from zoo.predictor import OUTPUTS, all_outputs, torch_module

OPSET = 20
# The oldest ONNX Runtime that we promise, and what it reads.
OLD_OPSET, OLD_IR, OLD_RUNTIME = 18, 8, "1.16"
MOST_LOGIT = 1e4  # above it the network is broken, and a relative difference says nothing
MAX_DIFFERENCE = 1e-4  # of a logit, for logits up to 10; in proportion for larger ones


class _AllOutputs(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, pictures):
        return all_outputs(self.module, pictures)


def export_folder(path: str | Path) -> float:
    """Add onnx/model.onnx to a model folder. Returns the largest difference of a logit from torch.

    Input `pictures`: float32 (batch, 3, H, W), RGB, (x / 255 - mean) / std. Outputs: `logits` (batch, C), `features`
    (batch, A) and, if `features` is its mean, `feature_map` (batch, A, h, w). The metadata holds config.json and,
    separately, labels, mean, std and the preprocessing in words. Raises ExportError and adds nothing if ONNX Runtime
    and torch differ.
    """
    folder = ModelFolder(path)
    module = torch_module(folder)
    model = onnx.load_from_string(onnx_bytes(module, folder.config))
    for_old_runtimes(model)
    content = model.SerializeToString(deterministic=True)
    refuse_unsafe(content, ONNX)
    difference = check_parity(content, module, folder.config)
    add_files(folder.path, {ONNX: content}, folder.files)
    record(folder.path)
    return difference


def onnx_bytes(module: nn.Module, config: dict[str, Any]) -> bytes:
    size = config["pretrained_cfg"]["input_size"]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _AllOutputs(module).eval(), (torch.zeros(2, *size),), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["pictures"], output_names=list(OUTPUTS if module.has_feature_map else OUTPUTS[:2]),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    finally:
        logger.setLevel(level)
    if program is None:
        raise ExportError(f"torch.onnx could not export {config['architecture']}.")
    # Removes the source files and lines that the exporter notes on each node: paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props.update(metadata(config))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        program.save(str(file), external_data=False)
        return file.read_bytes()


def record(path: Path, **ours: Any) -> None:
    """Write values under `metasaug` into a model folder's config, and the new config into each ONNX file's metadata.

    `metasaug.onnxruntime` becomes the oldest version that reads the files, if known.
    """
    folder = ModelFolder(path)
    models = {name: onnx.load_from_string(folder.read(name)) for name in (ONNX, ONNX_INT8) if name in folder}
    old = [for_old_runtimes(model) for model in models.values()]
    config = {**folder.config, "metasaug": {**folder.config["metasaug"], **ours,
                                            "onnxruntime": OLD_RUNTIME if old and all(old) else None}}
    contents = {CONFIG: json_bytes(config)}
    for name, model in models.items():
        onnx.helper.set_model_props(model, metadata(config))
        contents[name] = model.SerializeToString(deterministic=True)
    add_files(folder.path, contents, folder.files)


def for_old_runtimes(model: onnx.ModelProto) -> bool:
    """Declare the file for OLD_RUNTIME if onnx's own check finds nothing newer in it. Returns whether it did."""
    older = onnx.ModelProto()
    older.CopyFrom(model)
    older.ir_version = min(older.ir_version, OLD_IR)
    for each in older.opset_import:
        each.version = min(each.version, OLD_OPSET)
    try:
        onnx.checker.check_model(older, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    model.CopyFrom(older)
    return True


def metadata(config: dict[str, Any]) -> dict[str, str]:
    """What readers of only the ONNX file need, as strings."""
    cfg = config["pretrained_cfg"]
    return {
        "config.json": json.dumps(config, ensure_ascii=False),
        "labels": json.dumps(config["label_names"], ensure_ascii=False),
        "mean": json.dumps(cfg["mean"]),
        "std": json.dumps(cfg["std"]),
        "input_size": json.dumps(cfg["input_size"]),
        "preprocessing": f"RGB{reading_in_words(config)}; {fitting_in_words(cfg)}; float32, (x / 255 - mean) / std per "
                         "channel; (batch, 3, H, W)",
    }


def reading_in_words(config: dict[str, Any]) -> str:
    """How 16-bit and multi-page files are read, in words; empty for ordinary pictures."""
    kept = config["metasaug"].get("reading") or {}
    words = {"white": "16-bit grey divided by {}", "page": "TIFF page {} (max, mean: over all pages)"}
    return "".join(f", {words[key].format(value)}" for key, value in kept.items())


def fitting_in_words(cfg: dict[str, Any]) -> str:
    """What zoo.images.fitted does, in words."""
    height, width = cfg["input_size"][1:]
    full_height, full_width = (math.floor(side / cfg["crop_pct"]) for side in (height, width))
    resized = {"squash": f"to {full_height} x {full_width} pixels, whatever its shape",
               "border": f"to fit into {full_height} x {full_width} pixels, the rest filled with the mean"}.get(
        cfg.get("crop_mode") or "center", f"shorter side to {min(full_height, full_width)} pixels")
    return f"{resized} ({cfg['interpolation']}), centre crop {height} x {width}"


def check_parity(
    content: bytes, module: nn.Module, config: dict[str, Any], pictures: np.ndarray | None = None
) -> float:
    """The largest difference of a logit between ONNX Runtime and torch. Raises ExportError if it is too large.

    pictures  float32 (N, 3, H, W) as the network takes them; by default 33 made-up ones, from flat to noise.
              They run in batches of 1, 3, 7 and the rest
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    pictures = _made_up(config) if pictures is None else pictures
    worst = 0.0
    names = [output.name for output in session.get_outputs()]
    for part in np.split(pictures, [1, 4, 11]):
        ours = dict(zip(names, session.run(names, {"pictures": part}), strict=True))
        with torch.inference_mode():
            theirs = dict(zip(names, (t.numpy() for t in all_outputs(module, torch.from_numpy(part))), strict=True))
        largest = float(np.abs(theirs["logits"]).max())
        if not largest <= MOST_LOGIT:
            raise ExportError(f"The network's logits are as large as {largest:.2g}: its weights have exploded; "
                              "nothing was written. Train again with a smaller --lr.")
        for name in names:
            allowed = MAX_DIFFERENCE * max(1.0, float(np.abs(theirs[name]).max()) / 10)
            difference = float(np.abs(ours[name] - theirs[name]).max())
            if not difference <= allowed:
                raise ExportError(f"ONNX and torch differ by {difference:.2g} in {name} (allowed {allowed:.2g}); "
                                  "nothing was written. Please report the architecture and torch's version.")
        worst = max(worst, float(np.abs(ours["logits"] - theirs["logits"]).max()))
        best_two = np.sort(theirs["logits"], axis=1)[:, -2:]
        clear = best_two[:, 1] - best_two[:, 0] > 2 * MAX_DIFFERENCE
        if (ours["logits"].argmax(1) != theirs["logits"].argmax(1))[clear].any():
            raise ExportError("ONNX and torch name different classes; nothing was written.")
    return worst


def _made_up(config: dict[str, Any]) -> np.ndarray:
    _, height, width = config["pretrained_cfg"]["input_size"]
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(33, 3, height, width)).astype(np.float32)
    flat = rng.normal(size=(33, 3, 1, 1)).astype(np.float32)
    share = np.linspace(0, 1, 33, dtype=np.float32)[:, None, None, None]
    return flat + share * noise
