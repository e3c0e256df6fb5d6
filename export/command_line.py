"""`metasaug export`, and the last step of every training: ONNX and the card."""

from pathlib import Path

import tyro

from export.errors import ExportError
from training.report.metrics import results_table
from zoo.model_folder import ModelFolder


def export(
    folder: tyro.conf.Positional[Path], int8: bool = False, calibrate: Path | None = None, data: Path | None = None
) -> None:
    """Write ONNX and the model card beside the weights of a model folder. ONNX must agree with torch first.

    Args:
        folder: A model folder, or a run of `metasaug train` with a model in it.
        int8: Also write an int8 ONNX file, a third of the size or less. Needs --calibrate.
        calibrate: Training pictures of the model in class folders (CALIBRATE/CLASS/picture.jpg). 512 of them give the
            range of each activation.
        data: Labelled test pictures in class folders. Each ONNX file is measured on them, and the card shows accuracies
            per group. Without it the card says that int8 was not measured.
    """
    if int8 and calibrate is None:
        raise ExportError("--int8 needs --calibrate DIR: pictures that the model was trained on, in class folders.")
    if calibrate is not None and not int8:
        raise ExportError("--calibrate is for --int8.")
    if not (folder / "manifest.json").exists() and (folder / "model" / "manifest.json").exists():
        folder = folder / "model"
    finish(folder)
    if not int8 and data is None:
        return
    from export import quantise
    from export.card import write_card

    if calibrate is not None:
        print(f"{folder}: int8 ONNX, calibrated on {quantise.add_int8(folder, calibrate)} pictures")
    if data is not None:
        for precision, results in quantise.measure_variants(folder, data).items():
            print(f"\n{precision}: {results_table(results)}")
    write_card(folder)


def finish(folder: Path | None) -> None:
    """Add ONNX and the card to a model folder. Does nothing if training made none (a dry run)."""
    if folder is None:
        return
    from export.card import write_card

    try:
        from export.to_onnx import export_folder
    except ModuleNotFoundError as error:
        raise ExportError(f"The weights are in {folder}, but ONNX needs {error.name}: pip install 'metasaug[export]', "
                          f"then `metasaug export {folder}`.") from error

    difference = export_folder(folder)
    write_card(folder)
    print(f"{folder}: weights, ONNX (within {difference:.1e} of torch) and card")
    opened = ModelFolder(folder)
    results, classes = opened.results or {}, opened.config["num_classes"]
    if results.get("macro_accuracy_interval", [1])[0] <= 1 / classes:
        print(f"Warning: this model may be no better than guessing: mean accuracy of its classes "
              f"{1 - results['macro_error']:.1%}, by chance {1 / classes:.1%}.")
