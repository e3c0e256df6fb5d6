"""The model folder: what was written is what is read, and wrong bytes never load."""

import copy
import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zoo
from zoo.errors import ModelFolderError
from zoo.model_folder import (
    CARD,
    CONFIG,
    COVARIANCE,
    FIGURE,
    FILES,
    MANIFEST,
    ONNX,
    ONNX_INT8,
    WEIGHTS,
    ModelFolder,
    add_files,
    check_config,
    json_bytes,
    write_model_folder,
)

EVERY_FILE = (*FILES, MANIFEST)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_model_folder) -> Path:
    """A folder with every kind of file, a few hundred bytes each: opening it is quick, ten thousand times too."""
    config = ModelFolder(tiny_model_folder).config
    folder = tmp_path_factory.mktemp("small") / "small"
    rng = np.random.default_rng(0)
    opened = write_model_folder(folder, config, {"fc.weight": rng.normal(size=(10, 8)).astype(np.float32)},
                                {"running": np.ones((10, 8), np.float32)})
    add_files(folder, {ONNX: rng.bytes(300), ONNX_INT8: rng.bytes(100), CARD: b"# small\n", FIGURE: rng.bytes(50)},
              opened.files)
    return folder


@pytest.fixture
def folder(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def vouch(folder: Path, name: str, content: bytes) -> None:
    """Put a file in with a manifest that vouches for it: what an attacker, not an accident, would do."""
    add_files(folder, {name: content}, {n: entry for n, entry in ModelFolder(folder).files.items() if n != name})


def read_all(folder: Path) -> None:
    opened = ModelFolder(folder)
    opened.check()
    _ = opened.config, opened.weights(), opened.covariance(), opened.card


# ---- round trip ----


def test_what_was_written_is_what_is_read(tiny_model_folder, tmp_path):
    # Given a config and arrays of several types,
    config = ModelFolder(tiny_model_folder).config
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.array([1, 2**40]),
               "half": np.ones(3, np.float16), "none": np.zeros((0, 4), np.float32), "one": np.array(3.0)}
    covariance = {"running": np.eye(4, dtype=np.float32)[None], "learned": np.zeros((1, 4, 4), np.float32)}
    # when they are written and read, then they are the same, and only these files are there.
    opened = write_model_folder(tmp_path / "new" / "model", config, weights, covariance)
    assert opened.config == config
    for mine, theirs in ((opened.weights(), weights), (opened.covariance(), covariance)):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert mine[key].dtype == theirs[key].dtype and np.array_equal(mine[key], theirs[key])
    assert sorted(os.listdir(opened.path)) == sorted([CONFIG, WEIGHTS, COVARIANCE, MANIFEST])
    assert COVARIANCE in opened and ONNX not in opened


def test_the_manifest_holds_sha256_and_size_of_every_file(small):
    listed = json.loads((small / MANIFEST).read_text())["files"]
    assert list(listed) == list(FILES)
    for name, entry in listed.items():
        content = (small / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_equal_models_give_equal_bytes(small, tmp_path):
    """Nothing of the time or the machine is in a folder: the same training gives the same sha256."""
    opened = ModelFolder(small)
    again = write_model_folder(tmp_path / "again", opened.config, opened.weights(), opened.covariance())
    for name in (CONFIG, WEIGHTS, COVARIANCE):
        assert again.read(name) == opened.read(name)


def test_an_older_model_at_the_same_place_is_replaced_whole(folder):
    opened = ModelFolder(folder)
    write_model_folder(folder, opened.config, {"w": np.ones(2, np.float32)})
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == sorted([CONFIG, WEIGHTS, MANIFEST])


# ---- wrong bytes ----


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "missing", "folder", "endless", "pipe"])
def test_a_damaged_file_is_named_in_one_error(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "endless":
        path.symlink_to("/dev/zero")
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage != "missing":
        path.write_bytes({"flip": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "empty": b"",
                          "longer": content + b"\n"}[damage])
    if (name, damage) == (COVARIANCE, "missing"):
        ModelFolder(folder).check()  # covariances may be left behind, until somebody asks for them
    with pytest.raises(ModelFolderError, match=Path(name).name):
        read_all(folder)


@pytest.mark.parametrize(("one", "other"), [(CONFIG, CARD), (WEIGHTS, COVARIANCE), (ONNX, WEIGHTS), (MANIFEST, CONFIG)])
def test_swapped_files_are_noticed(folder, one, other):
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / one).write_bytes(second)
    (folder / other).write_bytes(first)
    with pytest.raises(ModelFolderError):
        read_all(folder)


def test_weights_of_another_model_are_noticed(folder, tmp_path):
    """Both whole, both of this format, of the same size: only the manifest tells."""
    opened = ModelFolder(folder)
    other = write_model_folder(tmp_path / "other", opened.config, {"fc.weight": np.zeros((10, 8), np.float32)})
    shutil.copy(other.path / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(ModelFolderError, match=WEIGHTS):
        read_all(folder)


def flipped_bits_that_load(folder: Path, count: int, seed: int) -> list[tuple[str, int]]:
    """Flips `count` single bits, one after another, in every file in turn; those that went unnoticed."""
    rng = np.random.default_rng(seed)
    contents = {name: (folder / name).read_bytes() for name in EVERY_FILE}
    expected = hashlib.sha256(contents[MANIFEST]).hexdigest()
    loaded = []
    for i in range(count):
        name = EVERY_FILE[i % len(EVERY_FILE)]
        bit = int(rng.integers(8 * len(contents[name])))
        changed = bytearray(contents[name])
        changed[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(changed)
        for sha256 in (None, expected):
            try:
                ModelFolder(folder, sha256).check()
                loaded.append((name, bit))
            except ModelFolderError:
                pass
        (folder / name).write_bytes(contents[name])
    return loaded


def test_no_flipped_bit_loads(folder):
    assert flipped_bits_that_load(folder, 600, seed=0) == []
    read_all(folder)


@pytest.mark.promise("wrong bytes")
@pytest.mark.long
def test_no_flipped_bit_of_ten_thousand_loads(folder, figure):
    assert flipped_bits_that_load(folder, 10_000, seed=1) == []
    figure("0 of 10,000 folders with a flipped bit load")


@pytest.mark.promise("wrong bytes")
@pytest.mark.long
def test_no_flipped_bit_in_real_weights_loads(tiny_model_folder, tmp_path, figure):
    """Where safetensors alone would load each, with another number in it."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))
    content = bytearray((folder / WEIGHTS).read_bytes())
    opened, rng = ModelFolder(folder), np.random.default_rng(2)
    for bit in rng.integers(8 * len(content), size=3000):
        content[bit // 8] ^= 1 << bit % 8
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(ModelFolderError):
            opened.read(WEIGHTS)
        content[bit // 8] ^= 1 << bit % 8
    figure("0 of 3,000 with a flipped bit in the weights load")


def test_the_registrys_sha256_is_that_of_the_manifest(folder):
    right = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    ModelFolder(folder, right).check()
    # Given a folder changed together with its manifest, then the registry's sha256 still tells.
    vouch(folder, CARD, b"# another card\n")
    ModelFolder(folder).check()
    with pytest.raises(ModelFolderError, match=r"manifest\.json is not the one"):
        ModelFolder(folder, right)


@pytest.mark.parametrize("manifest", [
    b"", b"[]", b"null", b"{}", b"\xff\xfe", b"{" * 100_000, b'{"files": 3}', b'{"files": []}', b'{"files": {"a": 1}}',
    b'{"files": {"config.json": {"size": 1, "sha256": "\\ud800"}}}',
    b'{"files": {"config.json": {"size": [], "sha256": {}}}}',
    b'{"files": {"../../etc/passwd": {"size": 1, "sha256": ""}}}',
    b'{"files": {"config.json": {"size": -1, "sha256": ""}}}',
    b'{"files": {"config.json": {"size": 1e999, "sha256": ""}}}', b'{"a": ' + b"9" * 5000 + b"}", b"[" * 99_999,
    b'{"files": {"config.json": {"size": 1, "sha256": ' + b"[" * 900 + b"]" * 900 + b"}}}"], ids=range(17))
def test_no_manifest_however_odd_is_more_than_a_model_folder_error(folder, manifest):
    (folder / MANIFEST).write_bytes(manifest)
    with pytest.raises(ModelFolderError, match=r"manifest\.json"):
        ModelFolder(folder)


def test_a_manifest_may_name_no_file_outside_the_folder(folder):
    """Even one whose digest is right."""
    listed = {"../outside": {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}}
    digest = hashlib.sha256((json.dumps(listed, indent=1) + "\n").encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": listed, "digest": digest}, indent=1) + "\n")
    with pytest.raises(ModelFolderError, match="damaged"):
        ModelFolder(folder)


@pytest.mark.parametrize("size", [10**6, 10**9, 10**15, 2**63, 10**30, 10**400])
@pytest.mark.parametrize("name", [CONFIG, ONNX, WEIGHTS, COVARIANCE])
def test_a_manifest_that_claims_any_size_asks_for_no_memory(folder, name, size):
    # Given a manifest that is right but for the size of one file, which says more than any disk holds,
    listed = {n: {"sha256": digest, "size": size if n == name else real}
              for n, (real, digest) in ModelFolder(folder).files.items()}
    digest = hashlib.sha256(json_bytes(listed)).hexdigest()
    (folder / MANIFEST).write_bytes(json_bytes({"format": 1, "files": listed, "digest": digest}))
    # then it is a damaged folder, and no memory is asked for.
    with pytest.raises(ModelFolderError, match=re.escape(name)):
        read_all(folder)


def test_a_file_that_the_manifest_does_not_name_is_not_read(folder):
    opened = ModelFolder(folder)
    add_files(folder, {}, {name: entry for name, entry in opened.files.items() if name != ONNX})
    with pytest.raises(ModelFolderError, match=r"no onnx/model.onnx .* `metasaug export` adds it"):
        ModelFolder(folder).read(ONNX)


def test_a_folder_that_is_no_model_says_what_one_is(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, reason in [(tmp_path, "no manifest.json"), (tmp_path / "absent", "is not a folder"),
                         (tmp_path / "file", "is not a folder")]:
        with pytest.raises(ModelFolderError, match=reason) as caught:
            ModelFolder(path)
        assert "metasaug train" in str(caught.value)


def test_a_symlinked_folder_and_symlinked_files_work(small, tmp_path):
    """As in the Hub's cache, where each file is a link to a blob."""
    (tmp_path / "link").symlink_to(small)
    read_all(tmp_path / "link")
    cache = tmp_path / "cache"
    for name in EVERY_FILE:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(small / name)
    read_all(cache)


# ---- nothing is ever unpickled ----


class _Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.promise("no code")
@pytest.mark.parametrize("name", [WEIGHTS, COVARIANCE, ONNX, CONFIG, CARD])
@pytest.mark.parametrize("kind", ["pickle", "torch zip", "torch legacy", "numpy"])
def test_a_malicious_pickle_named_like_a_file_runs_nothing(tiny_model_folder, tmp_path, name, kind):
    # Given a model folder whose manifest vouches for a pickle that would touch a file on loading,
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    canary = _Canary(tmp_path / "canary")
    if kind == "pickle":
        content = pickle.dumps(canary)
    elif kind == "numpy":
        np.save(tmp_path / "evil.npy", np.array([canary], dtype=object), allow_pickle=True)
        content = (tmp_path / "evil.npy").read_bytes()
    else:
        torch = pytest.importorskip("torch")
        torch.save({"w": canary}, tmp_path / "evil.pt", _use_new_zipfile_serialization=kind == "torch zip")
        content = (tmp_path / "evil.pt").read_bytes()
    vouch(folder, name, content)
    # when everything that reads the folder tries, then it is refused (the card is only shown), the canary untouched.
    opened = ModelFolder(folder)
    tries = {WEIGHTS: [opened.weights, lambda: zoo.load(folder, backend="torch")], COVARIANCE: [opened.covariance],
             ONNX: [lambda: zoo.load(folder)], CONFIG: [lambda: zoo.load(folder), lambda: opened.config],
             CARD: []}[name]
    for attempt in tries:
        with pytest.raises(ModelFolderError, match=Path(name).name):
            attempt()
    assert isinstance(opened.card if name == CARD else "", str)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "U16", "F4"])
def test_weights_of_a_type_that_numpy_lacks_load_or_are_refused(folder, kind):
    size = 4 if kind in ("BF16", "U16") else 2
    header = json.dumps({"w": {"dtype": kind, "shape": [2], "data_offsets": [0, size]}}).encode()
    vouch(folder, WEIGHTS, len(header).to_bytes(8, "little") + header + bytes(size))
    try:
        assert set(ModelFolder(folder).weights()) == {"w"}
    except ModelFolderError as error:
        assert WEIGHTS in str(error)  # noqa: PT017


def test_weights_that_do_not_fit_the_architecture_are_refused(folder):
    pytest.importorskip("torch")
    with pytest.raises(ModelFolderError, match="do not fit resnet8"):
        zoo.load(folder, backend="torch")


# ---- writing ----


@pytest.mark.parametrize("writes", range(4))
def test_an_interrupted_write_leaves_no_valid_folder_and_no_temporary_file(folder, monkeypatch, writes):
    # Given a whole folder that is being replaced, and a disk that is full at one of the writes,
    opened = ModelFolder(folder)
    config, weights, covariance = opened.config, opened.weights(), opened.covariance()
    replace, done = os.replace, []

    def full(*args):
        if len(done) == writes:
            raise OSError(28, "No space left on device")
        done.append(replace(*args))

    monkeypatch.setattr(os, "replace", full)
    # then the error says so, and neither the old nor half of the new model can be taken for one.
    with pytest.raises(ModelFolderError, match="No space left on device"):
        write_model_folder(folder, config, weights, covariance)
    with pytest.raises(ModelFolderError, match=r"no manifest\.json"):
        ModelFolder(folder)
    assert not list(folder.rglob("*.tmp"))
    # And once there is room, the same call makes it whole.
    monkeypatch.undo()
    write_model_folder(folder, config, weights, covariance).check()


def test_an_interrupted_addition_never_gives_wrong_bytes(folder, monkeypatch):
    """Killed between file and manifest: the folder says so, and adding again mends it."""
    opened = ModelFolder(folder)
    others = {name: entry for name, entry in opened.files.items() if name != CARD}

    def killed(path, content):
        if Path(path).name == MANIFEST:
            raise KeyboardInterrupt
        Path(path).write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr("zoo.model_folder.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            add_files(folder, {CARD: b"# new\n"}, others)
    with pytest.raises(ModelFolderError, match=CARD):
        ModelFolder(folder).check()
    add_files(folder, {CARD: b"# new\n"}, others)
    assert ModelFolder(folder).card == "# new\n"


def test_writing_where_a_file_stands_is_an_error_of_ours(small, tmp_path):
    (tmp_path / "taken").write_text("x")
    opened = ModelFolder(small)
    with pytest.raises(ModelFolderError, match="taken"):
        write_model_folder(tmp_path / "taken", opened.config, opened.weights())


def test_a_config_that_makes_no_sense_is_refused_before_anything_is_removed(folder):
    opened = ModelFolder(folder)
    with pytest.raises(ModelFolderError, match="num_classes"):
        write_model_folder(folder, {**opened.config, "num_classes": "ten"}, opened.weights())
    read_all(folder)


# ---- the schema ----

NONSENSE = [
    ("architecture", 3), ("num_classes", 1), ("num_classes", 10.0), ("num_classes", True), ("num_classes", 11),
    ("num_features", 0), ("label_names", ["a"] * 10), ("label_names", "abcdefghij"), ("label_names", [[1]] * 10),
    ("label_names", [*"abcdefghi", "caf\udce9"]), ("pretrained_cfg", []), ("metasaug", None),
    ("pretrained_cfg.input_size", [32, 32]), ("pretrained_cfg.input_size", [1, 32, 32]),
    ("pretrained_cfg.input_size", [3, 0, 32]), ("pretrained_cfg.input_size", [3, 10**6, 32]),
    ("pretrained_cfg.mean", [0, 0]), ("pretrained_cfg.mean", [0, 0, float("nan")]),
    ("pretrained_cfg.mean", [0, 0, True]), ("pretrained_cfg.mean", [0, 0, 10**400]),
    ("pretrained_cfg.std", [1, 1, 0]), ("pretrained_cfg.std", [1, 1, float("inf")]),
    ("pretrained_cfg.interpolation", "box"), ("pretrained_cfg.interpolation", ["bilinear"]),
    ("pretrained_cfg.crop_pct", 0), ("pretrained_cfg.crop_pct", 1.5), ("pretrained_cfg.crop_pct", 1e-320),
    ("pretrained_cfg.crop_pct", float("nan")), ("pretrained_cfg.crop_pct", "1"), ("metasaug.class_counts", [1] * 9),
    ("metasaug.class_counts", [-1] * 10), ("metasaug.class_counts", [1.0] * 10), ("metasaug.groups", ["head"] * 9),
    ("metasaug.groups", ["few"] * 10), ("metasaug.groups", [["head"]] * 10), ("metasaug.groups_by", "hand"),
    ("metasaug.groups_by", ["count"]), ("metasaug.name", 3), ("metasaug.method", None), ("metasaug.dataset", "\ud800"),
    ("metasaug.prior", "flat"), ("metasaug.prior", [0.1]), ("metasaug.prior", [0.0] * 10),
    ("metasaug.cosine_scale", -1),
    ("metasaug.cosine_scale", float("inf")), ("metasaug.cosine_scale", "30"), ("metasaug.results", []),
    ("metasaug.results.error", "low"), ("metasaug.results.groups", []), ("metasaug.results.per_class", [{}] * 9)]


def changed(config: dict, key: str, value) -> dict:
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    inner = config
    for part in path:
        inner = inner[part]
    inner[last] = value
    return config


@pytest.mark.parametrize(("key", "value"), NONSENSE, ids=lambda x: str(x)[:40].encode("ascii", "replace").decode())
def test_a_config_that_makes_no_sense_is_named_by_its_key(small, key, value):
    with pytest.raises(ModelFolderError) as caught:
        check_config(changed(ModelFolder(small).config, key, value), "config.json")
    assert "config.json: " in str(caught.value)
    assert key.split(".")[-1] in str(caught.value) or key == "num_classes"


REQUIRED = ["architecture", "num_classes", "num_features", "label_names", "pretrained_cfg", "metasaug",
            "pretrained_cfg.input_size", "pretrained_cfg.mean", "pretrained_cfg.std", "pretrained_cfg.interpolation",
            "pretrained_cfg.crop_pct", "metasaug.groups", "metasaug.groups_by", "metasaug.name", "metasaug.method",
            "metasaug.dataset"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(folder, key):
    config = copy.deepcopy(ModelFolder(folder).config)
    *path, last = key.split(".")
    inner = config
    for part in path:
        inner = inner[part]
    del inner[last]
    vouch(folder, CONFIG, json.dumps(config).encode())
    with pytest.raises(ModelFolderError, match=rf"config\.json: .*{last}"):
        _ = ModelFolder(folder).config


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@given(st.sampled_from([*REQUIRED, *(key for key, _ in NONSENSE)]), ANY_JSON)
def test_no_config_raises_anything_but_a_model_folder_error(small, key, value):
    try:
        check_config(changed(ModelFolder(small).config, key, value), "config.json")
    except ModelFolderError as error:
        assert str(error).startswith("config.json: ")  # noqa: PT017
