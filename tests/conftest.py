"""Fixtures that every area shares: real data (skipped, or failed in CI, where absent) and a small model folder."""

import fcntl
import os
import pickle
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from zoo import label_names

# A shell ignores SIGINT in background jobs, nohup SIGHUP; the processes that tests stop by them would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# CI tries the same examples each time, so that a failure there is one of the change; by hand, new ones are tried.
settings.register_profile("ci", derandomize=True)
if os.environ.get("METASAUG_REQUIRE_DATA") == "1":
    settings.load_profile("ci")

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("METASAUG_DATA", ROOT.parent / "shared" / "data"))


def _need(there: bool, reason: str) -> None:
    if not there:
        (pytest.fail if os.environ.get("METASAUG_REQUIRE_DATA") == "1" else pytest.skip)(reason)


def _made_once(name: str, archive: str, make) -> Path:
    """An ignored folder that `make(tar, folder)` fills once; two test processes wait for each other."""
    path = DATA / f"{archive}.tar"
    _need(path.is_file(), f"the real data is not here: {path.name} in ../shared/data (or METASAUG_DATA)")
    folder = ROOT / ".test-data" / name
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / ".whole"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            with tarfile.open(path) as tar:
                make(tar, folder)
            done.touch()
    return folder


def _unpacked(archive: str, part: str = "") -> Path:
    """The archive's folder, or one of the folders in it."""
    def unpack(tar: tarfile.TarFile, folder: Path) -> None:
        tar.extractall(folder, [entry for entry in tar if entry.name.startswith(part)], filter="data")

    return _made_once(f"{archive}-{part}" if part else archive, archive, unpack) / part


def _as_original_files(tar: tarfile.TarFile, folder: Path) -> None:
    """60,000 pictures in the layout of the original files, in their order within each class: far fewer files."""
    names = label_names.cifar10()
    pictures: dict[str, list[tuple[int, bytes]]] = {"train": [], "test": []}
    for entry in sorted((entry for entry in tar if entry.isfile()), key=lambda entry: entry.name):
        part, name, _ = entry.name.split("/")
        rgb = Image.open(tar.extractfile(entry)).convert("RGB")
        pictures[part].append((names.index(name), np.asarray(rgb).transpose(2, 0, 1).tobytes()))
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(exist_ok=True)
    files = {"test_batch": pictures["test"],
             **{f"data_batch_{i + 1}": pictures["train"][10_000 * i : 10_000 * (i + 1)] for i in range(5)}}
    for name, rows in files.items():
        data = np.frombuffer(b"".join(pixels for _, pixels in rows), np.uint8).reshape(-1, 3072)
        (batches / name).write_bytes(pickle.dumps({"data": data, "labels": [label for label, _ in rows]}))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list(names)}))


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """CIFAR-10, the original pictures: cifar-10-batches-py, by class."""
    return _made_once("cifar10", "cifar10", _as_original_files)


@pytest.fixture(scope="session")
def cifar10_test() -> Path:
    """CIFAR-10's original test pictures: CLASS/NNNN.png."""
    return _unpacked("cifar10", "test")


@pytest.fixture(scope="session")
def cifar100_test() -> Path:
    """CIFAR-100's original test pictures: CLASS/NAME.png."""
    return _unpacked("cifar100-test", "test")


@pytest.fixture(scope="session")
def cifar10_jpeg() -> Path:
    """CIFAR-10 as JPEG copies, only for the bundled models that were trained on them."""
    return _unpacked("cifar10-jpeg")


@pytest.fixture(scope="session")
def plankton() -> Path:
    """A natural long tail: train/CLASS/*.jpg."""
    return _unpacked("plankton")


@pytest.fixture(scope="session")
def authors_files() -> dict[str, Path]:
    """Two of the authors' released checkpoints, by the name that imports them."""
    files = {"metasaug-cifar10-lt": "MetaSAug_cifar10_CE_imb0.01_ckpt.pth.tar",
             "metasaug-ldam-cifar100-lt": "MetaSAug_cifar100_LDAM_imb0.01_ckpt.pth.tar"}
    found = {name: DATA.parent / "reference" / file for name, file in files.items()}
    _need(all(path.is_file() for path in found.values()), "the authors' files are not here: ../shared/reference")
    return found


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A whole model folder, ONNX and card included, around random weights: it knows nothing, and is fast."""
    torch = pytest.importorskip("torch")
    from export.card import write_card
    from export.to_onnx import export_folder
    from zoo.architectures import create
    from zoo.labels import assign_groups
    from zoo.model_folder import write_model_folder

    folder = tmp_path_factory.mktemp("models") / "tiny"
    counts = [400, 220, 120, 90, 60, 30, 22, 12, 8, 4]
    names = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    groups, groups_by = assign_groups(counts)
    tested, right = [20] * 10, [19, 18, 18, 16, 15, 12, 11, 8, 6, 3]

    def share(group: str) -> dict:
        from training.report.metrics import wilson_interval

        members = [c for c in range(10) if groups[c] == group]
        correct, images = sum(right[c] for c in members), sum(tested[c] for c in members)
        return {"classes": len(members), "images": images, "correct": correct, "accuracy": correct / images,
                "interval": list(wilson_interval(correct, images))}

    by_group = {group: share(group) for group in ("head", "medium", "tail")}
    config = {
        "architecture": "resnet8", "num_classes": 10, "num_features": 64, "label_names": names,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26],
                           "interpolation": "bilinear", "crop_pct": 1.0, "num_classes": 10, "classifier": "fc"},
        "metasaug": {
            "format": 1, "name": "tiny", "method": "metasaug", "loss": "ce", "augment": "metasaug",
            "recipe": {"dataset": "animals", "epochs": 1, "seed": 0}, "dataset": "Made-up animals", "imbalance": 100.0,
            "class_counts": counts, "groups": list(groups), "groups_by": groups_by,
            "group_accuracy": {group: figures["accuracy"] for group, figures in by_group.items()}, "seed": 0,
            "schedule": "no training: random weights for tests", "command": "pytest", "code_version": "test",
            "versions": {"torch": torch.__version__}, "hardware": "none", "seconds": 0, "published_error": None,
            "results": {
                "split": "test", "epoch": 1, "images": 200, "error": 1 - sum(right) / 200, "top5_error": 0.1,
                "macro_error": 1 - sum(right) / 200, "worst_class_error": 0.85, "groups": by_group,
                "per_class": [{"label": names[c], "train_images": counts[c], "test_images": tested[c],
                               "correct": right[c]} for c in range(10)],
            },
        },
    }
    torch.manual_seed(0)
    weights = {name: tensor.numpy() for name, tensor in create("resnet8", 10).state_dict().items()}
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(10, 64, 64)).astype(np.float32) / 8
    covariance = {"running": spread @ spread.transpose(0, 2, 1), "learned": np.zeros((10, 64, 64), np.float32)}
    write_model_folder(folder, config, weights, covariance)
    export_folder(folder)
    write_card(folder)
    return folder


@pytest.fixture(scope="module")
def chromium():
    """A headless browser that asks nobody for anything."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here ({', '.join(names)}): the browser tests were skipped")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-first-run",
            "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"])
        yield browser
        browser.close()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of five small drawn pictures, of several modes, formats and sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for mode, size, name in [("RGB", (32, 32), "a.png"), ("L", (64, 48), "b.jpg"), ("RGBA", (20, 90), "c.png"),
                             ("RGB", (200, 100), "d.jpg"), ("P", (33, 31), "e.gif")]:
        noise = rng.integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def files(tiny_model_folder) -> dict[str, bytes]:
    """What a repository on the Hub holds: every file of a model folder, by name."""
    from zoo.model_folder import MANIFEST, ModelFolder

    folder = ModelFolder(tiny_model_folder)
    return {**{name: folder.read(name) for name in folder.files}, MANIFEST: (folder.path / MANIFEST).read_bytes()}


@pytest.fixture
def hub(tmp_path, monkeypatch, files):
    """A Hub with the repository owner/tiny, and this process's huggingface_hub pointed to it with an empty cache."""
    from huggingface_hub import constants

    from tests.hub_server import Hub

    with Hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "METASAUG_HUB_OWNER"):
            monkeypatch.delenv(name, raising=False)
        served.add("owner/tiny", files)
        yield served


@pytest.fixture
def impatient(monkeypatch):
    """Seconds of waiting made short: huggingface_hub's between its tries, and ours for an answer."""
    import time
    from types import SimpleNamespace

    from huggingface_hub import constants

    def hurry(patience: float) -> None:
        quick = SimpleNamespace(sleep=lambda _: time.sleep(0.01), monotonic=time.monotonic, time=time.time)
        monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
        monkeypatch.setattr("huggingface_hub.file_download.time", quick)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr("zoo.hub.PATIENCE", patience)
        monkeypatch.setattr("zoo.hub.SLOWEST", 1e9)
        monkeypatch.setattr("zoo.hub.PAUSES", (0.01, 0.01))

    return hurry


# ---- promises (docs/robustness.md) ----


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("promise", mark.args[0]) for mark in item.iter_markers("promise")]


@pytest.fixture
def figure(record_property):
    """Keeps a sentence on what a test measured, for the table of benchmarks.robustness."""
    return lambda text: record_property("figure", text)
