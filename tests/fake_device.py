"""A device for machines that have none: its tensors are CPU tensors with a mark, which do not mix with unmarked ones.

`with FakeDevice() as device:` gives a torch.device. What is moved or made there is marked, and so is all that is
computed from it. An operation on marked and unmarked tensors raises what CUDA raises, and so does `.numpy()`. As on
CUDA, copies go anywhere, and a number (a tensor without dimensions) and indices mix.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

DEVICE = torch.device("privateuseone", 0)
MAY_MIX = {Tensor.copy_, torch._foreach_copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type,
           Tensor.__getitem__, Tensor.__setitem__}
MARKS = WeakIdKeyDictionary()  # beside the tensors: an attribute of theirs would be saved with them
LEAVES = {Tensor.cpu, Tensor.tolist, Tensor.item}


def marked(value: object) -> bool:
    return isinstance(value, Tensor) and MARKS.get(value, False)


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in tensors_in(one)] if isinstance(value, (list, tuple)) else []


class FakeDevice(TorchFunctionMode):
    def __enter__(self) -> torch.device:
        super().__enter__()
        return DEVICE

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):  # which read a device's name, and move nothing
            return func(*args, **kwargs)
        given = tensors_in([args, kwargs])
        if func == Tensor.device.__get__:
            return DEVICE if marked(args[0]) else func(*args)
        if func is Tensor.numpy and marked(args[0]):
            raise TypeError("can't convert a fake device's tensor to numpy. Use Tensor.cpu() first.")
        named, arguments = None, list(args)
        for place, value in [*enumerate(arguments), *kwargs.items()]:
            is_name = value in ("cpu", "privateuseone:0") if isinstance(value, str) else False
            if isinstance(value, torch.device) or (is_name and place == "device"):
                named = torch.device(value)
                (kwargs if isinstance(place, str) else arguments)[place] = torch.device("cpu")  # type: ignore[index]
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):  # to where the other one is
            named = DEVICE if marked(args[1]) else torch.device("cpu")
        large = {marked(t) for t in given if t.dim()}
        if len(large) > 1 and named is None and func not in MAY_MIX:
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                               f"privateuseone:0 and cpu! (when checking {getattr(func, '__name__', func)})")
        there = any(map(marked, given)) if named is None else named.type == DEVICE.type
        there = there and func not in LEAVES
        if func is Tensor.copy_ or func is Tensor.__setitem__:
            there = marked(args[0])
        elif func == Tensor.data.__set__:
            there = marked(args[1])
        elif func is Tensor.cpu and marked(args[0]):
            return args[0].clone()  # another tensor, as from a device
        result = func(*arguments, **kwargs)
        moved = named is not None and given and any(marked(t) != there for t in given)
        if moved and any(result is t for t in given):
            result = result.clone()
        for tensor in [*tensors_in(result), *(args[:1] if func == Tensor.data.__set__ else ())]:
            if not (func == Tensor.data.__set__ and tensor is not args[0]):
                MARKS[tensor] = there
        return result
