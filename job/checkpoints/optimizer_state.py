"""An optimizer's state as tensors with names and plain values around them, and back.

A name is a tensor's place in `state_dict()["state"]`: `3/state1` is that of parameter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

# 8-bit optimizers quantize their state in blocks of so many numbers, each by one map of as many levels.
_BLOCK = _LEVELS = 256


def check_places(names: Sequence[str], plain: Mapping[str, Any]) -> None:
    """Checks that the tensors are those that the rest lists, and that each can be put back.

    Raises:
        ValueError: They are not, or cannot.
    """
    if different := sorted(set(names) ^ set(plain["tensors"])):
        raise ValueError(f"the optimizer's tensors are not those that were saved: {', '.join(different[:3])}")
    for name in names:
        index, *path = name.split("/")
        value: Any = plain["state"].get(index)
        for part in path:
            value = value.get(part, "") if isinstance(value, dict) else ""
        if not (index.isdecimal() and path and value is None):
            raise ValueError(f"the optimizer's tensor {name} has no place in its state")


def check_fit(tensors: Mapping[str, Any], plain: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> None:
    """Checks that a state belongs to parameters of these shapes.

    The optimizers' kernels take tensors by address and the sizes from the parameter, so a tensor that is too small
    would have them read and write beyond its end.

    Raises:
        ValueError: It does not.
    """
    if [index for group in plain["param_groups"] for index in group["params"]] != list(range(len(shapes))):
        raise ValueError(f"the optimizer's state is not of {len(shapes)} parameters in their order")
    for name, tensor in tensors.items():
        index, leaf = int(name.split("/")[0]), name.rpartition("/")[2]
        shape = tuple(shapes[index]) if index < len(shapes) else ()
        expected: dict[str, tuple[tuple[int, ...], set[str]]] = {
            **dict.fromkeys(("state1", "state2"), (shape, {"torch.float32", "torch.uint8"})),
            **dict.fromkeys(("exp_avg", "exp_avg_sq"), (shape, {"torch.float32"})),
            **dict.fromkeys(("absmax1", "absmax2"), ((-(-prod(shape) // _BLOCK),), {"torch.float32"})),
            **dict.fromkeys(("qmap1", "qmap2"), ((_LEVELS,), {"torch.float32"})),
            "step": ((), {"torch.float32"}),
        }
        if leaf not in expected or index >= len(shapes):
            raise ValueError(f"the optimizer's tensor {name} is none of a known optimizer's")
        right, dtypes = expected[leaf]
        if tuple(tensor.shape) != right or str(tensor.dtype) not in dtypes:
            raise ValueError(f"the optimizer's tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not {right}")
