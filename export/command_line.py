"""`metasaug export`, and what ends every training: ONNX and the card."""

from pathlib import Path

import tyro

from export.errors import ExportError


def export(folder: tyro.conf.Positional[Path]) -> None:
    """ONNX and the model card beside the weights of a model folder; the ONNX is held to torch first.

    Args:
        folder: A model folder, or a run of `metasaug train` with a model in it.
    """
    if not (folder / "manifest.json").exists() and (folder / "model" / "manifest.json").exists():
        folder = folder / "model"
    finish(folder)


def finish(folder: Path | None) -> None:
    """Adds ONNX and card to a model folder; nothing where training made none (a dry run)."""
    if folder is None:
        return
    from export.card import write_card

    try:
        from export.to_onnx import export_folder
    except ModuleNotFoundError as error:
        raise ExportError(f"The weights are in {folder}; for ONNX {error.name} is missing: pip install "
                          "'metasaug[export]', then `metasaug export` of that folder.") from error

    difference = export_folder(folder)
    write_card(folder)
    print(f"{folder}: weights, ONNX (within {difference:.1e} of torch) and card")
