"""An ONNX file is one file of standard operators, or it never reaches a session."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import zoo
from zoo.errors import ModelFolderError
from zoo.model_folder import ONNX, ModelFolder, add_files
from zoo.onnx_file import refuse_unsafe

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402


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
    "external in a branch": (lambda: model(helper.make_node(
        "If", ["c"], ["logits"], then_branch=branch(external()), else_branch=branch(external()))).SerializeToString(),
        "another file"),
    "sparse": (lambda: model(helper.make_node("Constant", [], ["c"], sparse_value=sparse())).SerializeToString(),
               "sparse"),
    "custom operator": (lambda: model(helper.make_node("FusedConv", ["pictures"], ["logits"], domain="com.microsoft")
                                      ).SerializeToString(), "com.microsoft"),
    "ml operators": (lambda: model(opsets=(("", 20), ("ai.onnx.ml", 3))).SerializeToString(), "ai.onnx.ml"),
    "opset named twice": (twice_named_opset, "com.microsoft"),
    "functions": (functions, "functions"),
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
def test_loading_refuses_it_before_a_session_sees_it(kind, tiny_model_folder, tmp_path, monkeypatch):
    import onnxruntime

    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    others = {name: entry for name, entry in ModelFolder(folder).files.items() if name != ONNX}
    add_files(folder, {ONNX: UNSAFE[kind][0]()}, others)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("a session saw it"))
    with pytest.raises(ModelFolderError, match=UNSAFE[kind][1]):
        zoo.load(folder)


def test_the_standard_passes(tiny_model_folder):
    refuse_unsafe(model().SerializeToString(), "model.onnx")
    refuse_unsafe(model(opsets=(("ai.onnx", 20),)).SerializeToString(), "model.onnx")
    refuse_unsafe((tiny_model_folder / ONNX).read_bytes(), "model.onnx")


def test_branches_nested_without_end_are_refused():
    inner = branch(helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0]))
    for _ in range(15):
        inner = helper.make_graph([helper.make_node("Loop", ["a", "b"], ["out"], body=inner)], "g", [], [])
    with pytest.raises(ModelFolderError, match="deeply"):
        refuse_unsafe(model(*inner.node).SerializeToString(), "model.onnx")


@pytest.mark.parametrize("content", [
    b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05\x0a\xff", b"\x3b", b"\x38\x01", b"\x40\x01",
    # an operator's domain as a number, for which bytes(number) would ask for that much memory
    b"\x3a\x09\x0a\x07\x38\xff\xff\xff\xff\xff\x3f", struct.pack("<BBB", 0x3A, 2, 0x28) + b"\xff"])
def test_bytes_that_are_no_protobuf_are_refused(content):
    with pytest.raises(ModelFolderError, match="no ONNX file"):
        refuse_unsafe(content, "model.onnx")


def test_truncated_and_mutated_models_raise_one_error_or_are_seen_as_safe(tiny_model_folder):
    """Never another exception: the bytes are checked against the manifest anyway."""
    content, rng = (tiny_model_folder / ONNX).read_bytes(), np.random.default_rng(0)
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
def test_a_vouched_file_that_does_not_fit_is_one_clear_error(change, tiny_model_folder, tmp_path):
    # Given a folder whose manifest is right and whose ONNX is not what config.json says,
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
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


def test_it_works_through_symlinks(tiny_model_folder, tmp_path):
    """The Hub's cache links each file to a blob elsewhere; ONNX Runtime refuses such paths, bytes it takes."""
    for path in tiny_model_folder.rglob("*"):
        if path.is_file():
            link = tmp_path / "snapshot" / path.relative_to(tiny_model_folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    grey = np.full((32, 32), 99, np.uint8)
    linked, direct = (zoo.load(folder).predict(grey) for folder in (tmp_path / "snapshot", tiny_model_folder))
    assert (linked.logits == direct.logits).all()
