"""Check an ONNX file before ONNX Runtime opens it, byte by byte, without the onnx package.

A model of the zoo is one file, with operators that classifiers use. ONNX Runtime would follow references to other
files, run endless loops, and request as much memory as a tensor claims. A trial run (zoo.trial) finds what a check of
the bytes cannot.
"""

from collections.abc import Iterator
from typing import Any

from zoo.errors import ModelFolderError

STANDARD_DOMAINS = {"", "ai.onnx"}

# What torch's exporters, ONNX Runtime's quantiser and other common exporters write for image classifiers. Left out on
# purpose: control flow (If, Loop, Scan), random numbers, strings, sequences, outputs whose size the values decide.
_NAMES = """
    Abs Add And ArgMax Attention AveragePool BatchNormalization Cast CastLike Ceil Clip Concat Constant ConstantOfShape
    Conv ConvInteger Cos CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp
    Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual
    GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu
    Less LessOrEqual Log LogSoftmax LpNormalization MatMul MatMulInteger Max MaxPool Mean Min Mish Mod Mul Neg Not
    OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear RMSNormalization Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    RotaryEmbedding Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus SpaceToDepth
    Split Sqrt Squeeze Sub Sum Swish Tanh Tile Transpose Trilu Unsqueeze Where
"""
OPERATORS = frozenset(_NAMES.split())
# Inputs (by position) that set the size of an output. They may depend on the number of pictures, not on their content.
SIZES = {"ConstantOfShape": (0,), "Expand": (1,), "OneHot": (1,), "Pad": (1,), "Range": (0, 1, 2), "Resize": (2, 3),
         "Tile": (1,)}
MOST_FIELDS = 2_000_000  # a large network has a tenth of this; each takes a microsecond

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_OPSET_DOMAIN = 1
_GRAPH_NODES, _GRAPH_INITIALIZERS, _GRAPH_INPUTS, _GRAPH_SPARSE = 1, 5, 11, 15
_NODE_INPUTS, _NODE_OUTPUTS, _NODE_OPERATOR, _NODE_ATTRIBUTES, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = 5, 6, 10, 11, (22, 23)
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 8, 13, 14
_VALUE_NAME = 1


def refuse_unsafe(content: bytes, name: str) -> None:
    """Raises ModelFolderError for an ONNX file that could reach other files or run without bounds.

    Refused: references to other files, domains and operators that are not on the list, functions and graphs inside
    graphs, sparse tensors, tensors larger than their bytes, sizes computed from the pictures.
    """
    try:
        _Check(name).model(memoryview(content))
    except (ValueError, IndexError, TypeError) as error:
        raise ModelFolderError(f"{name} is not an ONNX file: {error}.") from error


class _Check:
    def __init__(self, name: str):
        self.name, self.left = name, MOST_FIELDS

    def refuse(self, what: str) -> None:
        raise ModelFolderError(f"{self.name} {what}, which is refused. Use a model folder that `metasaug export` made.")

    def model(self, model: memoryview) -> None:
        graphs = 0
        for field, value in self.fields(model):
            if field == _MODEL_FUNCTIONS:
                self.refuse("defines functions of its own")
            elif field == _MODEL_TRAINING:
                self.refuse("holds graphs for training")
            elif field == _MODEL_OPSETS:
                for opset_field, opset_value in self.fields(value):
                    if opset_field == _OPSET_DOMAIN:
                        self.standard(_text(opset_value))
            elif field == _MODEL_GRAPH:
                graphs += 1
                if graphs > 1:  # a reader would merge them
                    self.refuse("holds two graphs")
                self.graph(value)

    def graph(self, graph: memoryview) -> None:
        nodes, inputs, constants = [], set(), set()
        for field, value in self.fields(graph):
            if field == _GRAPH_NODES:
                nodes.append(value)
            elif field == _GRAPH_INITIALIZERS:
                constants.add(self.tensor(value))
            elif field == _GRAPH_INPUTS:
                inputs |= {_text(v) for f, v in self.fields(value) if f == _VALUE_NAME}
            elif field == _GRAPH_SPARSE:
                self.refuse("holds sparse tensors")
        # Names that are known so far, and whether the values depend on the pictures.
        known = dict.fromkeys(constants | {""}, False) | dict.fromkeys(inputs - constants, True)
        for node in nodes:
            self.node(node, known)

    def node(self, node: memoryview, known: dict[str, bool]) -> None:
        operator, takes, gives = "", [], []
        for field, value in self.fields(node):
            if field == _NODE_INPUTS:
                takes.append(_text(value))
            elif field == _NODE_OUTPUTS:
                gives.append(_text(value))
            elif field == _NODE_OPERATOR:
                operator = _text(value)
            elif field == _NODE_DOMAIN:
                self.standard(_text(value))
            elif field == _NODE_ATTRIBUTES:
                self.attribute(value)
        if operator not in OPERATORS:
            self.refuse(f"uses the operator {operator[:60]!r}, which is not on the list for classifiers")
        if not known.keys() >= set(takes):
            self.refuse("has its operators in no order that can run")
        if any(known[takes[at]] for at in SIZES.get(operator, ()) if at < len(takes)):
            self.refuse(f"computes the size of an output of {operator} from the pictures")
        depends = operator not in ("Shape", "Size") and any(known[name] for name in takes)
        known.update(dict.fromkeys(gives, depends))

    def attribute(self, attribute: memoryview) -> None:
        tensors = 0
        for field, value in self.fields(attribute):
            if field in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                tensors += 1
                if tensors > 1:  # a reader would merge them
                    self.refuse("holds an attribute of several tensors")
                self.tensor(value)
            elif field in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                self.refuse("holds graphs inside its graph")
            elif field in _ATTRIBUTE_SPARSE:
                self.refuse("holds sparse tensors")

    def tensor(self, tensor: memoryview) -> str:
        """Checks a tensor; returns its name."""
        numbers, name = 1, ""
        for field, value in self.fields(tensor):
            if field == _TENSOR_EXTERNAL or (field == _TENSOR_LOCATION and value != 0):
                self.refuse("keeps weights in another file")
            elif field == _TENSOR_NAME:
                name = _text(value)
            elif field == _TENSOR_DIMS:
                for dim in [value] if isinstance(value, int) else _packed(value):
                    numbers *= max(dim, 1)
                    if numbers > 2 * len(tensor):  # the smallest type has 4 bits
                        self.refuse(f"claims a tensor of {numbers:.0e} numbers in {len(tensor):,} bytes")
        return name

    def standard(self, domain: str) -> None:
        if domain not in STANDARD_DOMAINS:
            self.refuse(f"uses operators of {domain[:60]!r}, outside the ONNX standard")

    def fields(self, message: memoryview) -> Iterator[tuple[int, Any]]:
        """(number, value) of a protobuf message: integers for varints, bytes for everything else."""
        at, end = 0, len(message)
        while at < end:
            self.left -= 1
            if self.left < 0:
                self.refuse(f"has more than {MOST_FIELDS:,} parts")
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


def _packed(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _text(value: memoryview) -> str:
    return str(value, "utf-8")


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
