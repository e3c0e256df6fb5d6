"""`python -m benchmarks.predict`: time predict against the cores' limit and timm, int8 against fp32, and a cold start.

JPEGs of 500 x 375 pixels. Weights are random, so nothing is downloaded; the time does not depend on them.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import zoo
from benchmarks.loader import write_photographs
from benchmarks.measuring import Row, command, ratio_row, side_by_side
from export.quantise import add_int8
from export.to_onnx import export_folder
from zoo.architectures import create
from zoo.labels import assign_groups
from zoo.machine import cores
from zoo.model_folder import write_model_folder
from zoo.predictor import Predictor

PICTURES, BATCH, CLASSES = 256, 32, 100
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model_folder(folder: Path, size: int, calibrate: Path, architecture: str = "resnet50") -> Path:
    """Make a complete model folder with random weights, including int8."""
    counts = np.linspace(500, 5, CLASSES).astype(int).tolist()
    groups, groups_by = assign_groups(counts)
    labels = ["class0", "class1", *(f"c{c}" for c in range(2, CLASSES))]
    torch.manual_seed(0)
    module = create(architecture, CLASSES)
    config = {
        "architecture": architecture, "num_classes": CLASSES, "num_features": module.get_classifier().in_features,
        "label_names": labels,
        "pretrained_cfg": {"input_size": [3, size, size], "mean": list(MEAN), "std": list(STD),
                           "interpolation": "bicubic", "crop_pct": 0.875, "num_classes": CLASSES, "classifier": "fc"},
        "metasaug": {"format": 1, "name": f"{architecture}-{size}", "method": "none", "dataset": "nothing",
                     "class_counts": counts, "groups": list(groups), "groups_by": groups_by},
    }
    write_model_folder(folder, config, {name: each.numpy() for name, each in module.state_dict().items()})
    export_folder(folder)
    add_int8(folder, calibrate)
    return folder


class _Files(Dataset):
    """The pictures as timm users read them."""

    def __init__(self, paths: list[Path], transform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self.paths[i]) as picture:
            return self.transform(picture.convert("RGB"))


def by_timm(folder: Path, paths: list[Path]) -> Callable[[], object]:
    """A step that predicts as timm's documentation shows: create_model, create_transform, a DataLoader."""
    import timm

    module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=module))
    loader = DataLoader(_Files(paths, transform), BATCH, num_workers=cores())

    def step() -> None:
        with torch.inference_mode():
            for pictures in loader:
                module(pictures).softmax(1)

    return step


def could_do(model: Predictor, paths: list[Path]) -> float:
    """Seconds if every core worked all the time: CPU time of decoding and session, divided by the cores."""
    began = time.process_time()
    arrays = [model.preprocess(path) for path in paths]
    for at in range(0, len(arrays), BATCH):
        model._network(np.stack(arrays[at : at + BATCH]))
    return (time.process_time() - began) / cores()


def started(script: str) -> Callable[[], object]:
    """A step that starts a new Python process."""
    return lambda: subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def at_size(size: int, scratch: Path, paths: list[Path], rounds: int, timm_target: float | None) -> list[Row]:
    with contextlib.redirect_stdout(io.StringIO()):
        folder = model_folder(scratch / f"model-{size}", size, scratch / "pictures")
    ours, int8 = zoo.load(folder, device="cpu"), zoo.load(folder, precision="int8")
    best: list[float] = []

    def run(model: Predictor) -> Callable[[], object]:
        return lambda: sum(1 for _ in model.predict_each(paths, top_k=1, batch_size=BATCH))

    times = side_by_side({"ours": run(ours), "timm": by_timm(folder, paths), "int8": run(int8),
                          "best": lambda: best.append(could_do(ours, paths))}, rounds)
    note = f"{len(paths)} pictures at {size} px, {cores()} cores"
    return [
        ratio_row(f"{size} px, predict / what the cores could do", times["ours"], best[1:], 1 / 0.9, note),
        ratio_row(f"{size} px, predict / timm with a DataLoader", times["ours"], times["timm"], timm_target, note),
        ratio_row(f"{size} px, int8 / fp32", times["int8"], times["ours"], 1 / 1.7, note),
    ]


def cold_start(folder: Path, picture: Path, rounds: int) -> Row:
    ours = f"import zoo; print(zoo.load({str(folder)!r}).predict({str(picture)!r}).top[0].label)"
    theirs = (f"import timm, torch; from PIL import Image; m = timm.create_model('local-dir:{folder}', pretrained=True)"
              f".eval(); t = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=m)); "
              f"print(m(t(Image.open({str(picture)!r}).convert('RGB'))[None]).argmax())")
    times = side_by_side({"ours": started(ours), "timm": started(theirs)}, rounds)
    return ratio_row("cold start to the first answer, zoo / timm", times["ours"], times["timm"], 0.2, "new processes")


def measure(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_photographs(scratch / "pictures", 500, 375, PICTURES)
        paths = sorted((scratch / "pictures").glob("*/*.jpg"))
        rows = [*at_size(224, scratch, paths, rounds, 1 / 1.5), *at_size(128, scratch, paths, rounds, None)]
        return [*rows, cold_start(scratch / "model-224", paths[0], rounds)]


if __name__ == "__main__":
    command("python -m benchmarks.predict", measure)
