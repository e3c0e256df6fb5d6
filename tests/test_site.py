"""The documentation and the examples: every link leads somewhere, the site builds, and the code runs."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import zoo
from zoo.model_folder import ONNX

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub and MkDocs make them of headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"),
                                            flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert "zoo.load" in page and "class_balanced_weights" in page


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the pictures that the pages name."""
    example = ROOT / "zoo/examples/cat.jpg"
    (tmp_path / "pictures").mkdir()
    for name in ("cat.png", "photo.jpg", "pictures/a.jpg"):
        shutil.copy(example, tmp_path / name)
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["index", "onnx", "extending"])
def test_the_code_of_a_page_runs(page, place):
    blocks = BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_the_code_of_readme_and_of_prediction_runs(place):
    shutil.copytree(ROOT / "zoo/examples", place / "examples")
    for page in ("README.md", "docs/predict.md"):
        exec(compile(BLOCK.search((ROOT / page).read_text(encoding="utf-8")).group(1), page, "exec"), {})


# ---- examples ----


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def test_the_example_of_prediction_answers(capsys):
    example("predict_image").main([])
    assert "ship.jpg: ship" in capsys.readouterr().out


def test_the_example_of_training_ends_in_a_model(tmp_path, capsys):
    for c, name in enumerate(("dark", "light")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (32, 32), (90 + 60 * c + i,) * 3).save(tmp_path / "pictures" / name / f"{i}.png")
    example("train_own_pictures").main(tmp_path / "pictures", tmp_path / "run", "--start", "none", "--epochs", "1",
                                       "--architecture", "resnet8", "--input-size", "32", "--device", "cpu")
    assert "as the mean over 2 classes" in capsys.readouterr().out


def test_the_example_of_serving_answers_as_the_zoo_does():
    serving = example("serve_with_onnxruntime")
    model = zoo.load("metasaug-cifar10-lt")
    server = ThreadingHTTPServer(("127.0.0.1", 0), serving.handler(serving.Model(str(model.folder.path / ONNX))))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        for name in ("ship.jpg", "cat.jpg"):
            picture = ROOT / "zoo/examples" / name
            with urllib.request.urlopen(url, data=picture.read_bytes()) as response:
                answer = json.load(response)
            right = {top.label: top.probability for top in model.predict(picture).top}
            assert answer == pytest.approx(right, abs=2e-3)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, data=b"no picture")
        assert refused.value.code == 400 and "error" in json.load(refused.value)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.long
@pytest.mark.browser
def test_the_example_in_a_browser_answers_as_the_zoo_does(chromium, tmp_path):
    """The bundled models in onnxruntime-web, with pictures of several shapes."""
    npm = shutil.which("npm")
    if npm is None or subprocess.run([npm, "install", "--silent", "--prefix", tmp_path, "onnxruntime-web"]).returncode:
        pytest.skip("onnxruntime-web cannot be installed here (npm)")
    shutil.copy(ROOT / "examples/in_the_browser.html", tmp_path)
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("metasaug-cifar10-lt", "finetuned-plankton"):
            model = zoo.load(name)
            shutil.copytree(model.folder.path, tmp_path / name)
            tab = chromium.new_page()
            tab.goto(f"http://127.0.0.1:{server.server_address[1]}/in_the_browser.html?model={name}")
            for picture in ("ship.jpg", "coffee.jpg", "horse_silhouette.png"):
                tab.set_input_files("input:enabled", ROOT / "zoo/examples" / picture)
                tab.get_by_role("status").get_by_text(picture, exact=True).wait_for()
                lines = tab.get_by_role("listitem").all_inner_texts()
                labels, _, shown = zip(*(line.removesuffix(" %").rpartition(" ") for line in lines), strict=True)
                right = model.predict(ROOT / "zoo/examples" / picture).top
                assert list(labels) == [top.label for top in right]
                assert list(map(float, shown)) == pytest.approx([100 * top.probability for top in right], abs=1)
            tab.close()
        server.shutdown()


def test_the_notebook_runs_from_top_to_bottom(monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    names: dict = {}
    cells = json.loads((ROOT / "examples/tour.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    said = capsys.readouterr().out
    assert "seen 83 times in training" in said
    # What the notebook shows is what it says today, and it shows a figure.
    shown = "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", ()))
    assert said.strip() == shown.strip()
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))


# ---- packages ----


def test_the_wheel_predicts_without_the_repository(tmp_path):
    # Given the built wheel, when it is installed elsewhere,
    pip = [sys.executable, "-m", "pip"]
    built = subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], capture_output=True,
                           text=True)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("no package index to build with")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel], check=True,
                   capture_output=True)
    shutil.copy(ROOT / "zoo/examples/ship.jpg", tmp_path)
    # then a bundled model answers from there, and types are declared.
    code = "import zoo; print(zoo.__file__, zoo.load('metasaug-cifar10-lt').predict('ship.jpg').top[0].label)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    file, label = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path / "site") and label == "ship"
    assert all((tmp_path / "site" / package / "py.typed").exists() for package in ("zoo", "training", "export"))
