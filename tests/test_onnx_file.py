"""An ONNX file is one file of standard operators, or it never reaches a session."""

import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest

import zoo
from zoo.errors import ModelFolderError
from zoo.model_folder import ONNX, ModelFolder, add_files
from zoo.onnx_file import refuse_unsafe

BUNDLED = Path(zoo.__file__).parent / "weights" / "ce-cifar10-lt"

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

pytestmark = pytest.mark.promise("onnx")


def model(*nodes, initializers=(), opsets=(("", 20),), **more):
    picture = helper.make_tensor_value_info("pictures", TensorProto.FLOAT, ["batch", 3, 32, 32])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 32, 32])
    nodes = nodes or (helper.make_node("Relu", ["pictures"], ["logits"]),)
    graph = helper.make_graph(list(nodes), "g", [picture], [logits], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in opsets], **more)


def external(name: str = "w", location: str = "../../etc/passwd"):
    tensor = helper.make_tensor(name, TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def branch(tensor):
    """A graph that gives a constant: what an If holds."""
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Identity", ["w"], ["out"])], "branch", [], [output], [tensor])


def sparse():
    return helper.make_sparse_tensor(helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]),
                                     helper.make_tensor("i", TensorProto.INT64, [1], [0]), [4])


def hidden_external():
    """Marked by its entries only, or by its location only: readers of either would follow it."""
    entries, location = external(), external()
    entries.ClearField("data_location")
    location.ClearField("external_data")
    return entries, location


def twice_named_graph() -> bytes:
    """Protobuf joins the parts of a graph that comes twice."""
    content = model().SerializeToString()
    return content + b"\x3a\x00"


def claimed(kind: int = TensorProto.FLOAT, dims: tuple[int, ...] = (10**6, 10**6)):
    """A tensor that says it has more numbers than its bytes hold."""
    tensor = helper.make_tensor("w", kind, [1], [0])
    tensor.dims[:] = dims
    return tensor


def twice_named_opset() -> bytes:
    """Protobuf's last value of a field counts: first the standard domain, then another."""
    content = model(opsets=()).SerializeToString()
    domains = b"\x0a\x07ai.onnx" + b"\x0a\x0dcom.microsoft" + b"\x10\x01"
    return content + b"\x42" + bytes([len(domains)]) + domains


def training_info() -> bytes:
    made = model()
    made.training_info.add().initialization.CopyFrom(branch(external()))
    return made.SerializeToString()


def functions() -> bytes:
    function = helper.make_function("local", "f", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])],
                                    [helper.make_opsetid("", 20)])
    return model(functions=[function]).SerializeToString()


UNSAFE = {
    "external initializer": (lambda: model(initializers=[external()]).SerializeToString(), "another file"),
    "external by entries": (lambda: model(initializers=[hidden_external()[0]]).SerializeToString(), "another file"),
    "external by location": (lambda: model(initializers=[hidden_external()[1]]).SerializeToString(), "another file"),
    "external constant": (lambda: model(helper.make_node("Constant", [], ["c"], value=external())).SerializeToString(),
                          "another file"),
    "branches": (lambda: model(helper.make_node(
        "If", ["pictures"], ["logits"], then_branch=branch(external()), else_branch=branch(external())
        )).SerializeToString(), "graphs inside"),
    "sparse": (lambda: model(helper.make_node("Constant", [], ["c"], sparse_value=sparse())).SerializeToString(),
               "sparse"),
    "custom operator": (lambda: model(helper.make_node("FusedConv", ["pictures"], ["logits"], domain="com.microsoft")
                                      ).SerializeToString(), "com.microsoft"),
    "ml operators": (lambda: model(opsets=(("", 20), ("ai.onnx.ml", 3))).SerializeToString(), "ai.onnx.ml"),
    "opset named twice": (twice_named_opset, "com.microsoft"),
    "functions": (functions, "functions"),
    "graph named twice": (twice_named_graph, "two graphs"),
    "claimed size": (lambda: model(initializers=[claimed()]).SerializeToString(), "1e\\+06"),
    "loop": (lambda: model(helper.make_node("Loop", ["pictures", ""], ["logits"], body=branch(external()))
                           ).SerializeToString(), "another|graphs inside|Loop"),
    "random": (lambda: model(helper.make_node("RandomNormalLike", ["pictures"], ["logits"])).SerializeToString(),
               "RandomNormalLike"),
    "size from pixels": (lambda: model(helper.make_node("Cast", ["pictures"], ["s"], to=TensorProto.INT64),
                                       helper.make_node("Expand", ["pictures", "s"], ["logits"])).SerializeToString(),
                         "from the pictures"),
    "out of order": (lambda: model(helper.make_node("Expand", ["pictures", "s"], ["logits"]),
                                   helper.make_node("Cast", ["pictures"], ["s"], to=TensorProto.INT64)
                                   ).SerializeToString(), "no order"),
    "training graphs": (training_info, "training"),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_what_leaves_the_file_or_the_standard_is_refused(kind):
    make, reason = UNSAFE[kind]
    content = make()
    onnx.load_model_from_string(content)  # Given bytes that the onnx package takes for a model,
    with pytest.raises(ModelFolderError, match=f"model.onnx .*{reason}"):
        refuse_unsafe(content, "model.onnx")


@pytest.mark.parametrize("kind", ["external initializer", "custom operator"])
def test_loading_refuses_it_before_a_session_sees_it(kind, tmp_path, monkeypatch):
    import onnxruntime

    folder = Path(shutil.copytree(BUNDLED, tmp_path / "model"))
    others = {name: entry for name, entry in ModelFolder(folder).files.items() if name != ONNX}
    add_files(folder, {ONNX: UNSAFE[kind][0]()}, others)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("a session saw it"))
    with pytest.raises(ModelFolderError, match=UNSAFE[kind][1]):
        zoo.load(folder)


def test_the_standard_passes():
    refuse_unsafe(model().SerializeToString(), "model.onnx")
    refuse_unsafe(model(opsets=(("ai.onnx", 20),)).SerializeToString(), "model.onnx")
    refuse_unsafe((BUNDLED / ONNX).read_bytes(), "model.onnx")


# ---- graphs that are too much, and pass every check of the bytes ----


def classifier(*nodes, initializers=(), addend: str = "", classes: int = 10):
    """A model that fits the bundled folder's config, and adds `addend` to its logits."""
    rng = np.random.default_rng(0)
    weights = [onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
               for name, shape in (("a", (3, 64)), ("b", (64, classes)))]
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    steps = [helper.make_node("ReduceMean", ["pictures", "axes"], ["means"], keepdims=0),
             helper.make_node("MatMul", ["means", "a"], ["features"]), *nodes,
             helper.make_node("MatMul", ["features", "b"], ["plain" if addend else "logits"]),
             *([helper.make_node("Add", ["plain", addend], ["logits"])] if addend else [])]
    graph = helper.make_graph(
        steps, "g", [helper.make_tensor_value_info("pictures", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None),
         helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 64])],
        [*weights, axes, *initializers])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def numbers(name: str, *values):
    return onnx.numpy_helper.from_array(np.array(values), name)


def filled(size: int):
    """A constant of `size` numbers, of which the mean is added."""
    value = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "value")
    return classifier(helper.make_node("ConstantOfShape", ["size"], ["much"], value=value),
                      helper.make_node("ReduceMean", ["much"], ["mean"], keepdims=0),
                      initializers=[numbers("size", size)], addend="mean")


def expanded(size: int):
    """The same from Expand, for each picture."""
    return classifier(helper.make_node("Expand", ["means", "size"], ["much"]),
                      helper.make_node("ReduceMean", ["much"], ["mean"], keepdims=0),
                      initializers=[numbers("size", size, 1, 1)], addend="mean")


def endless(side: int = 3000, times: int = 3000):
    """Products of matrices, one after another: small, and slow."""
    square = helper.make_node("ConstantOfShape", ["size"], ["m0"],
                              value=onnx.numpy_helper.from_array(np.full(1, 1e-9, np.float32), "value"))
    first = helper.make_node("Add", ["m0", "one"], ["p0"])
    return classifier(square, helper.make_node("ReduceMean", ["means"], ["one"], keepdims=0), first,
                      *(helper.make_node("MatMul", [f"p{i}", "m0"], [f"p{i + 1}"]) for i in range(times)),
                      helper.make_node("ReduceMean", [f"p{times}"], ["mean"], keepdims=0),
                      initializers=[numbers("size", side, side)], addend="mean")


def not_finite():
    return classifier(initializers=[numbers("nan", np.float32("nan"))], addend="nan")


HOSTILE = {
    "4 GB constant": (lambda: filled(10**9), "memory"), "4 TB constant": (lambda: filled(10**12), "memory"),
    "4 GB expanded": (lambda: expanded(3 * 10**8), "memory"),
    "4 TB expanded": (lambda: expanded(3 * 10**11), "memory"),
    "endless": (endless, "no answer"), "wrong width": (lambda: classifier(classes=11), r"\(1, 11\)"),
    "nan": (not_finite, "finite"),
}


def with_onnx(folder: Path, content: bytes) -> Path:
    """A model folder with another ONNX file, and a manifest that vouches for it."""
    add_files(folder, {ONNX: content}, {n: e for n, e in ModelFolder(folder).files.items() if n != ONNX})
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_is_too_much_ends_its_trial_and_not_this_process(kind, tmp_path, monkeypatch):
    # Given a folder of a stranger, its manifest right, with a graph that takes all memory, all time, or gives nonsense,
    make, reason = HOSTILE[kind]
    folder = with_onnx(Path(shutil.copytree(BUNDLED, tmp_path / "model")), make())
    monkeypatch.setattr("zoo.trial.SECONDS", 4.0)
    # when it is loaded, then one error says why, soon, and this process has not grown.
    before, began = resident(), time.monotonic()
    with pytest.raises(ModelFolderError, match=rf"(?s)model\.onnx.*({reason})"):
        zoo.load(folder)
    assert time.monotonic() - began < 15
    assert resident() - before < 300_000_000


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_a_harmless_stranger_passes_its_trial_once(tmp_path, monkeypatch):
    # Given a folder of a stranger that was loaded, when it is loaded again, then there is no second trial in this
    # process and in later ones;
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = with_onnx(Path(shutil.copytree(BUNDLED, tmp_path / "model")), classifier())
    assert len(zoo.load(folder).predict(np.zeros((9, 9), np.uint8)).top) == 5
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a second trial"))
    zoo.load(folder)
    monkeypatch.setattr("zoo.trial._PASSED", set())
    zoo.load(folder)
    # with another onnxruntime, or without the mark, there is.
    with monkeypatch.context() as other, pytest.raises(pytest.fail.Exception):
        other.setattr("onnxruntime.__version__", "0")
        zoo.load(folder)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr("zoo.trial._PASSED", set())
    with pytest.raises(pytest.fail.Exception):
        zoo.load(folder)


def test_what_goes_wrong_after_the_trial_is_one_error_too():
    # Given a loaded model whose network gives nonsense for some pictures only,
    model, good = zoo.load(BUNDLED), np.full((9, 9), 200, np.uint8)
    network = model._network
    model._network = lambda x: (np.where(x.mean((1, 2, 3))[:, None] < 0, np.float32("nan"), network(x)[0]),
                                *network(x)[1:])
    # then a single picture raises, a batch says so in its row.
    with pytest.raises(ModelFolderError, match="not finite"):
        model.predict(np.zeros((9, 9), np.uint8))
    bad, fine = model.predict_batch([np.zeros((9, 9), np.uint8), good])
    assert "not finite" in bad.error and fine.error is None
    # An error of ONNX Runtime is the zoo's.
    model._network = network
    with pytest.raises(ModelFolderError, match=r"model\.onnx failed on a batch of 2"):
        network(np.zeros((2, 3, 5, 5), np.float32))


@pytest.mark.parametrize("content", [
    b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05\x0a\xff", b"\x3b", b"\x38\x01", b"\x40\x01",
    # an operator's domain as a number, for which bytes(number) would ask for that much memory
    b"\x3a\x09\x0a\x07\x38\xff\xff\xff\xff\xff\x3f", struct.pack("<BBB", 0x3A, 2, 0x28) + b"\xff"])
def test_bytes_that_are_no_protobuf_are_refused(content):
    with pytest.raises(ModelFolderError, match="not an ONNX file"):
        refuse_unsafe(content, "model.onnx")


def test_truncated_and_mutated_models_raise_one_error_or_are_seen_as_safe():
    """Never another exception: the bytes are checked against the manifest anyway."""
    content, rng = (BUNDLED / ONNX).read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(60):
        changed = bytearray(content if i % 2 else content[: int(rng.integers(len(content)))])
        for at in rng.integers(min(len(changed), 3000), size=3) if i % 2 else ():
            changed[at] ^= 1 << int(rng.integers(8))
        try:
            refuse_unsafe(bytes(changed), "model.onnx")
        except ModelFolderError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("change", ["cut", "garbage", "fixed batch", "other input", "other outputs"])
def test_a_vouched_file_that_does_not_fit_is_one_clear_error(change, tmp_path):
    # Given a folder whose manifest is right and whose ONNX is not what config.json says,
    folder = Path(shutil.copytree(BUNDLED, tmp_path / "model"))
    content = (folder / ONNX).read_bytes()
    if change in ("cut", "garbage"):
        content = content[:-1000] if change == "cut" else b"garbage" * 100
    else:
        made = onnx.load_model_from_string(content)
        if change == "fixed batch":
            made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        elif change == "other input":
            made.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64
            made.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 64
        else:
            del made.graph.output[1:]
        content = made.SerializeToString()
    add_files(folder, {ONNX: content}, {n: e for n, e in ModelFolder(folder).files.items() if n != ONNX})
    # then loading says so.
    with pytest.raises(ModelFolderError, match=r"model\.onnx"):
        zoo.load(folder)


def test_it_works_through_symlinks(tmp_path):
    """The Hub's cache links each file to a blob elsewhere; ONNX Runtime refuses such paths, bytes it takes."""
    for path in BUNDLED.rglob("*"):
        if path.is_file():
            link = tmp_path / "snapshot" / path.relative_to(BUNDLED)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    grey = np.full((32, 32), 99, np.uint8)
    linked, direct = (zoo.load(folder).predict(grey) for folder in (tmp_path / "snapshot", BUNDLED))
    assert (linked.logits == direct.logits).all()
