"""`metasaug evaluate`: what any model of the zoo gets right in a labelled folder. Needs no torch."""

import json
from pathlib import Path
from typing import Literal

import numpy as np

import zoo
from training.datasets import list_class_folders
from training.errors import DataError
from training.metrics import results_table, test_results


def evaluate(
    model: str,
    /,
    data: Path,
    backend: Literal["onnx", "torch"] = "onnx",
    per_class: bool = False,
    skip_bad: bool = False,
    out: Path | None = None,
) -> dict:
    """Measure a model on labelled pictures: overall, per group and per class.

    The groups are those of the model's own training set. A class of the model without pictures here counts in no
    average; a folder whose name is no class of the model is an error.

    Args:
        model: A name from `metasaug list`, or a model folder.
        data: Folder of class folders: DATA/CLASS/picture.jpg.
        backend: ONNX Runtime, or torch.
        per_class: Print a line for each class as well.
        skip_bad: Leave unreadable pictures out (they are named) instead of stopping.
        out: Write the results as JSON here.
    """
    predictor = zoo.load(model, backend=backend)
    paths, folder_labels, folder_names = list_class_folders(data)
    unknown = sorted(set(folder_names) - set(predictor.labels))
    if unknown:
        raise DataError(f"{data} has class folders that {model} does not know: {', '.join(unknown[:10])}. Its classes: "
                        f"{', '.join(predictor.labels[:10])}{' …' if len(predictor.labels) > 10 else ''}")
    place = {name: c for c, name in enumerate(predictor.labels)}
    labels = np.array([place[name] for name in folder_names])[folder_labels]
    rows: list[np.ndarray] = []  # logits of the readable pictures
    good: list[int] = []
    bad: list[str] = []
    for i, prediction in enumerate(predictor.predict_each(paths)):
        if prediction.logits is None:
            bad.append(str(prediction.error))  # it names the file
        else:
            rows.append(prediction.logits)
            good.append(i)
    if bad:
        listed = "\n  ".join(bad[:10]) + (f"\n  … and {len(bad) - 10} more" if len(bad) > 10 else "")
        if not skip_bad or len(bad) == len(paths):
            raise DataError(f"{len(bad)} of {len(paths)} pictures cannot be read (--skip-bad leaves them out):\n"
                            f"  {listed}")
        print(f"left out, unreadable:\n  {listed}")
    results = {"split": str(data), **test_results(np.stack(rows), labels[good], predictor.labels,
                                                  predictor.class_counts, predictor.groups)}
    print(results_table(results))
    if per_class:
        print(per_class_table(results))
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def per_class_table(results: dict) -> str:
    """A line a class, in the model's order."""
    width = max(len(row["label"]) for row in results["per_class"])
    lines = [f"  {'class':<{width}} {'trained on':>10} {'right':>7} {'of':>6}"]
    for row in results["per_class"]:
        trained = "?" if row["train_images"] is None else f"{row['train_images']:,}"
        lines.append(f"  {row['label']:<{width}} {trained:>10} {row['correct']:>7,} {row['test_images']:>6,}")
    return "\n".join(lines)
