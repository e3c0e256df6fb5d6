"""The folder of a Hugging Face Space: `python -m zoo.demo.space FOLDER` (or `make space`).

A Space installs requirements.txt, reads the header of README.md, and runs app.py. Push this folder to it.
"""

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import zoo

HERE = Path(zoo.__file__).resolve().parent
PYTHON = "3.11"

README = """---
title: MetaSAug, the long tail side by side
emoji: 🐾
colorFrom: green
colorTo: gray
sdk: gradio
sdk_version: {gradio}
app_file: app.py
python_version: "{python}"
license: mit
short_description: How well do image models recognise rare classes?
{models}---

# MetaSAug: the long tail, side by side

A demo of [MetaSAug](https://arxiv.org/abs/2103.12579) (CVPR 2021). Show several models the same picture. Each card
has a model's answer, how rare that class was in training, and the model's accuracy on classes this rare. Uploads are
deleted within two hours. `make space` of metasaug {version} built this folder; it needs no torch.
"""


def build(folder: Path) -> Path:
    """Write the Space into `folder`, which must be empty or an older Space. Raises ZooError."""
    app = HERE.parent / "app.py"
    if not app.is_file():
        raise zoo.ZooError(f"{app} is missing: build the Space from a checkout, or an installed metasaug.")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "app.py").is_file() or not (folder / "requirements.txt").is_file():
            raise zoo.ZooError(f"{folder} holds something other than a Space: choose an empty folder.")
        shutil.rmtree(folder / "zoo", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(HERE, folder / "zoo", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy(app, folder / "app.py")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(), encoding="utf-8")
    return folder


def requirements() -> list[str]:
    """The libraries that the demo needs, at the versions installed here.

    A Space has no GPU: the CPU build of ONNX Runtime, and no torch.
    """
    names = {"onnxruntime"}
    for requirement in metadata.requires("metasaug") or []:
        name, marker = re.match(r"[A-Za-z0-9_.-]+", requirement), requirement.partition(";")[2]
        if name and ("extra ==" not in marker or re.search(r"""extra == ['"]demo['"]""", marker)):
            names.add(name[0].lower().replace("-", "_"))
    names.discard("onnxruntime_gpu")
    return [f"{name}=={_version(name)}" for name in sorted(names)]


def readme() -> str:
    hub = sorted({entry.hub.repo for entry in zoo.list_models() if entry.hub})
    models = "".join(["models:\n", *(f"- {repo}\n" for repo in hub)]) if hub else ""
    return README.format(gradio=_version("gradio"), python=PYTHON, models=models, version=_version("metasaug"))


def _version(name: str) -> str:
    for installed in (name, "onnxruntime_gpu") if name == "onnxruntime" else (name,):
        try:
            return metadata.version(installed)
        except metadata.PackageNotFoundError:
            continue
    raise zoo.ZooError(f"{name} is not installed here, so its version is not known: pip install 'metasaug[demo]'")


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m zoo.demo.space FOLDER", file=sys.stderr)
        return 2
    try:
        folder = build(Path(sys.argv[1]))
    except (zoo.ZooError, OSError) as error:
        print(f"space: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: a Space. Push it with: hf upload OWNER/NAME {folder} . --repo-type space")
    return 0


if __name__ == "__main__":
    sys.exit(main())
