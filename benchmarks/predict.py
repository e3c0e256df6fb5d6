"""`python -m benchmarks.predict`: the speed of predict against the cores' limit, timm, int8, reduced decoding and Ray.

JPEGs of 500 x 375 pixels, and of 4000 x 3000 for reduced decoding. Weights are random, so nothing is downloaded; the
time does not depend on them.

    python -m benchmarks.predict --out benchmarks/results/predict.jsonl
    python -m benchmarks.predict --page                                     # writes the tables of docs/scale.md
"""

import contextlib
import importlib.util
import io
import json
import logging
import pickle
import statistics
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
from benchmarks.measuring import Row, command, figure_row, filled, ratio_row, side_by_side
from export.quantise import add_int8
from export.to_onnx import export_folder
from zoo import on_ray
from zoo.architectures import create
from zoo.files import write_atomically
from zoo.labels import assign_groups
from zoo.listing import pictures_under
from zoo.machine import cores
from zoo.model_folder import write_model_folder
from zoo.predictor import Predictor
from zoo.rows import Layout
from zoo.rows_file import RowsFile

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "predict.jsonl", ROOT / "docs" / "scale.md"
ONE_CORE = "224 px, ours, for each core"
PICTURES, BATCH, CLASSES = 128, 32, 100
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
    rate = {name: len(paths) / statistics.median(times[name]) for name in ("ours", "int8")}
    rates = [figure_row(f"{size} px, ours, for each core", rate["ours"] / cores(), "pictures/s", note=note),
             figure_row(f"{size} px, int8, for each core", rate["int8"] / cores(), "pictures/s", note=note)]
    return [
        *rates,
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


def of_cameras(folder: Path, scratch: Path, rounds: int) -> list[Row]:
    """Photographs of 12 megapixels, decoded at a part of their size."""
    write_photographs(scratch / "large", 4000, 3000, 32)
    paths = sorted((scratch / "large").glob("*/*.jpg"))
    model = zoo.load(folder, device="cpu")

    def run(reduced: bool) -> Callable[[], object]:
        def step() -> None:
            model.reduced = reduced
            sum(1 for _ in model.predict_each(paths, top_k=1, batch_size=BATCH))

        return step

    times = side_by_side({"reduced": run(True), "whole": run(False)}, rounds)
    note = f"{len(paths)} JPEGs of 4000 x 3000 at 224 px, {cores()} cores"
    rate = len(paths) / statistics.median(times["reduced"])
    return [figure_row("12 megapixels, ours", rate, "pictures/s", note=note),
            ratio_row("12 megapixels, reduced decoding / whole", times["reduced"], times["whole"], None, note)]


def on_workers(folder: Path, paths: list[Path], rounds: int) -> list[Row]:
    """Ray with one worker of one core and with one per core, against no Ray."""
    import ray

    model, many = zoo.load(folder, device="cpu"), paths * 4
    job = on_ray.Job(str(ROOT), str(folder), "onnx", "cpu", "fp32", model.reading, False, model.classes,
                     on_ray.model_files(model), Layout(1), None, BATCH // 4)
    times = {"ours": side_by_side({"ours": lambda: sum(
        1 for _ in model.predict_each(many, top_k=1, batch_size=BATCH))}, rounds)["ours"]}
    for workers in (1, cores()):
        ray.init(num_cpus=workers, logging_level=logging.ERROR, log_to_driver=False)
        with on_ray.cluster():
            times |= side_by_side({str(workers): lambda: sum(1 for _ in on_ray.predict_each(job, many))}, rounds)
    note = f"{len(many)} pictures at 128 px, the workers' start included"
    return [
        ratio_row(f"Ray, {cores()} workers / 1", times[str(cores())], times["1"], None, note),
        ratio_row(f"Ray, {cores()} workers / predict", times[str(cores())], times["ours"], None, note)]


def by_the_command(folder: Path, scratch: Path, rounds: int) -> list[Row]:
    """What one process does for all workers of a cluster: list pictures, and write their rows."""
    names, row = 20_000, zoo.load(folder, device="cpu").predict(np.zeros((8, 8, 3), np.uint8))
    (scratch / "many").mkdir()
    for i in range(names):
        (scratch / "many" / f"{i:06}.jpg").touch()
    sent = pickle.dumps((on_ray.slim(row), Layout().values(row)))

    def write() -> None:
        with RowsFile(scratch / "rows.jsonl", Layout(), {}, overwrite=True) as file:
            for _ in range(names):
                file.add(pickle.loads(sent)[1])

    times = side_by_side({"list": lambda: sum(1 for _ in pictures_under(scratch / "many")), "write": write}, rounds)
    return [figure_row("the command lists", names / statistics.median(times["list"]), "pictures/s"),
            figure_row("the command writes", names / statistics.median(times["write"]), "rows/s")]


def fill_page() -> None:
    """Write the tables of docs/scale.md from the results."""
    rows = {row["name"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}
    speed = [f"{next(iter(rows.values()))['machine']}:", "", "| | |", "|---|---|"]
    for name, row in rows.items():
        figure = f"{row['ratio']:,.0f}" if row["ratio"] > 20 else f"{row['ratio']:.2f}"
        note = row["note"] and f" ({row['note']})"
        speed.append(f"| {name}{note} | {figure} {row['unit']} |")
    number, rate = 100_000_000, rows[ONE_CORE]["ratio"]
    sizes = [f"With a ResNet-50 at 224 pixels, at {rate:.0f} pictures a second and core:", "", "| cores | days |",
             "|---|---|", *(f"| {n:,} | {number / rate / n / 86400:,.1f} |" for n in (1, 16, 256, 1024))]
    for what in ("lists", "writes"):
        each = rows[f"the command {what}"]["ratio"]
        sizes += ["", f"The command {what} {each:,.0f} pictures a second: a hundred million in "
                  f"{number / each / 3600:.1f} hours, as many as {each / rate:,.0f} such cores compute."]
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in (("speed", speed), ("sizes", sizes)):
        page = filled(page, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", "\n".join(lines))
    write_atomically(PAGE, page.encode())


def measure(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_photographs(scratch / "pictures", 500, 375, PICTURES)
        paths = sorted((scratch / "pictures").glob("*/*.jpg"))
        rows = [*at_size(224, scratch, paths, rounds, 1 / 1.5), *at_size(128, scratch, paths, rounds, None)]
        rows += of_cameras(scratch / "model-224", scratch, rounds)
        rows += by_the_command(scratch / "model-224", scratch, rounds)
        if importlib.util.find_spec("ray"):
            rows += on_workers(scratch / "model-128", paths, rounds)
        return [*rows, cold_start(scratch / "model-224", paths[0], rounds)]


if __name__ == "__main__":
    fill_page() if sys.argv[1:] == ["--page"] else command("python -m benchmarks.predict", measure)
