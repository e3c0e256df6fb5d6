"""Who may import whom, what `import zoo` may cost, and whose the top-level names are."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"zoo", "training", "export", "app", "metasaug", "benchmarks", "tests"}

# Arrows go one way: training -> model folder (zoo) -> export -> Hub -> zoo -> app. The command line may call all.
ALLOWED = {
    "zoo": set(),
    "training": {"zoo"},
    "export": {"zoo", "training"},  # its readers of data and its measures
    "app": {"zoo"},
    "metasaug": {"zoo", "training", "export", "app"},
    "benchmarks": {"zoo", "training", "export"},
}
# `python -m training` and `python -m export` are the command line under another name.
ENTRY_POINTS = {"training/__main__.py", "export/__main__.py"}


def sources(name: str) -> list[Path]:
    single = ROOT / f"{name}.py"
    return [single] if single.exists() else sorted((ROOT / name).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    assert sources(package)
    for path in sources(package):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED[package] | {package} | ({"metasaug"} if name in ENTRY_POINTS else set())
        assert imports_of(path) & OURS <= allowed, f"{name} imports against the arrows"


def test_no_module_is_named_like_a_dependency():
    dependencies = set(packages_distributions())
    for package in ("zoo", "training", "export"):
        for path in sources(package):
            assert path.stem == "__init__" or path.stem == "__main__" or path.stem not in dependencies - OURS, path


def test_the_top_level_names_are_ours_alone():
    """Other distributions ship a `training` of their own: in one environment one of us would shadow the other."""
    owners = packages_distributions()
    for name in ("zoo", "training", "export", "app", "metasaug"):
        assert set(owners.get(name, ["metasaug"])) == {"metasaug"}, name


def test_importing_the_zoo_is_light():
    # Given Python with numpy loaded, when zoo is imported,
    script = """
import sys, time
import numpy
began = time.perf_counter()
import zoo
print(time.perf_counter() - began)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
            for _ in range(3)]
    # then none of the heavy libraries came with it, and the best of three imports took under 0.2 s.
    loaded = set(runs[0].splitlines()[1].split())
    assert not loaded & {"torch", "torchvision", "gradio", "onnx", "onnxruntime", "matplotlib", "huggingface_hub"}
    assert min(float(run.splitlines()[0]) for run in runs) < 0.2


# What an environment without the training extra looks like: these modules cannot be found.
WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "onnx", "onnxscript", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_prediction_needs_no_torch(tiny_model_folder, pictures):
    # Given an environment without torch, when a model folder is loaded and predicts,
    script = WITHOUT_TORCH + f"""
import zoo
model = zoo.load({str(tiny_model_folder)!r})
print(model.predict({str(pictures / "a.png")!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    # then it prints its answer.
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout


def test_training_without_torch_says_what_to_install(tmp_path):
    script = WITHOUT_TORCH + "import metasaug; sys.exit(metasaug.main(['train', 'cifar10-lt', '--data', 'nowhere']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
