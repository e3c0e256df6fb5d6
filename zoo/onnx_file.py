"""Is an ONNX file safe to run? Read off its bytes, without the onnx package.

ONNX Runtime would follow references to other files, and run operators of its own domains. A model of the zoo is one
file of standard operators; anything else is refused before a session sees it.
"""

from collections.abc import Iterator
from typing import Any

from zoo.errors import ModelFolderError

STANDARD_DOMAINS = {"", "ai.onnx"}

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_OPSET_DOMAIN = 1
_GRAPH_NODES, _GRAPH_INITIALIZERS, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTES, _NODE_DOMAIN = 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = 5, 6, 10, 11, (22, 23)
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14


def refuse_unsafe(content: bytes, name: str) -> None:
    """ModelFolderError where the model refers to other files, or to operators outside the ONNX standard."""
    try:
        for field, value in _fields(memoryview(content)):
            if field == _MODEL_FUNCTIONS:
                raise ModelFolderError(f"{name} defines functions of its own, which is refused.")
            if field == _MODEL_TRAINING:
                raise ModelFolderError(f"{name} holds graphs for training, which is refused.")
            if field == _MODEL_OPSETS:
                for opset_field, opset_value in _fields(value):
                    if opset_field == _OPSET_DOMAIN:
                        _standard(opset_value, name)
            if field == _MODEL_GRAPH:
                _check_graph(value, name, depth=0)
    except (ValueError, IndexError, TypeError) as error:
        raise ModelFolderError(f"{name} is no ONNX file: {error}.") from error


def _check_graph(graph: memoryview, name: str, depth: int) -> None:
    if depth > 8:
        raise ModelFolderError(f"{name} nests graphs too deeply.")
    for field, value in _fields(graph):
        if field == _GRAPH_INITIALIZERS:
            _check_tensor(value, name)
        elif field == _GRAPH_SPARSE:
            raise ModelFolderError(f"{name} holds sparse tensors, which no model of the zoo does.")
        elif field == _GRAPH_NODES:
            for node_field, node_value in _fields(value):
                if node_field == _NODE_DOMAIN:
                    _standard(node_value, name)
                elif node_field == _NODE_ATTRIBUTES:
                    _check_attribute(node_value, name, depth)


def _check_attribute(attribute: memoryview, name: str, depth: int) -> None:
    for field, value in _fields(attribute):
        if field in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _check_tensor(value, name)
        elif field in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            _check_graph(value, name, depth + 1)
        elif field in _ATTRIBUTE_SPARSE:
            raise ModelFolderError(f"{name} holds sparse tensors, which no model of the zoo does.")


def _check_tensor(tensor: memoryview, name: str) -> None:
    for field, value in _fields(tensor):
        if field == _TENSOR_EXTERNAL or (field == _TENSOR_LOCATION and value != 0):
            raise ModelFolderError(f"{name} keeps weights in another file, which is refused: one file only.")


def _standard(text: memoryview, name: str) -> None:
    domain = str(text, "utf-8")
    if domain not in STANDARD_DOMAINS:
        raise ModelFolderError(f"{name} uses operators of {domain!r}, outside the ONNX standard, which is refused.")


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: integers for varints, bytes for everything else."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > end:
            raise ValueError("cut off")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number too long")
