"""Splits an optimizer's state into named tensors and plain values, joins them again, and checks that they fit.

A name is a tensor's place in `state_dict()["state"]`: `3/state1` is the tensor `state1` of parameter 3. The table in
`job/common/optimizers.py` lists the tensors of each optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from job.common.optimizers import LEVELS, OPTIMIZERS, StateTensor


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits an optimizer's `state_dict()` into tensors by name and the rest, which JSON can hold.

    The rest lists the tensors' names, so that a missing tensor is noticed.
    """
    import torch

    tensors: dict[str, Any] = {}

    def part(value: Any, place: str) -> Any:
        if isinstance(value, torch.Tensor):
            # A copy, because 8-bit optimizers share one quantization map between all parameters; in the host's memory,
            # for a GPU may have none left.
            tensors[place] = value.detach().to("cpu", copy=True).contiguous()
            return None
        if isinstance(value, dict):  # bitsandbytes nests a parameter's quantized state
            return {str(key): part(item, f"{place}/{key}") for key, item in value.items()}
        return value

    plain = {str(index): part(values, str(index)) for index, values in state["state"].items()}
    return tensors, {"state": plain, "param_groups": state["param_groups"], "tensors": sorted(tensors)}


def join(tensors: Mapping[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split`; it changes `plain`."""
    for place, tensor in tensors.items():
        *parents, name = place.split("/")
        target = plain["state"]
        for parent in parents:
            target = target[parent]
        target[name] = tensor
    state = {int(index): values for index, values in plain["state"].items()}
    return {"state": state, "param_groups": plain["param_groups"]}


def check_places(names: Sequence[str], plain: Mapping[str, Any]) -> None:
    """Checks that the tensors are exactly those that `plain` lists, and that each belongs to a parameter.

    Raises:
        ValueError: They are not, or cannot.
    """
    if different := sorted(set(names) ^ set(plain["tensors"])):
        raise ValueError(f"the optimizer's tensors differ from the saved ones: {', '.join(different[:3])}")
    for name in names:
        index, *path = name.split("/")
        value: Any = plain["state"].get(index)
        for part in path:
            value = value.get(part, "") if isinstance(value, dict) else ""
        if not (index.isdecimal() and path and value is None):
            raise ValueError(f"the optimizer's tensor {name} is not part of its state")


def check_fit(
    tensors: Mapping[str, Any], plain: Mapping[str, Any], shapes: Sequence[Sequence[int]], optimizer: str | None = None
) -> None:
    """Checks that a state is one of this optimizer for parameters of these shapes; None for any of `OPTIMIZERS`.

    The optimizers' kernels take tensors by address and the sizes from the parameter, so a tensor that is too small
    would have them read and write beyond its end.

    Raises:
        ValueError: It is not.
    """
    if [index for group in plain["param_groups"] for index in group["params"]] != list(range(len(shapes))):
        raise ValueError(f"the optimizer's state is not of {len(shapes)} parameters in their order")
    for name, tensor in tensors.items():
        index, leaf = int(name.split("/")[0]), name.rpartition("/")[2]
        shape = tuple(shapes[index]) if index < len(shapes) else ()
        specs = OPTIMIZERS.values() if optimizer is None else [OPTIMIZERS[optimizer]]
        known = [(spec.block, spec.state[leaf]) for spec in specs if leaf in spec.state]
        if not known or index >= len(shapes):
            raise ValueError(f"the optimizer's tensor {name} belongs to no known optimizer")
        expected_shapes = {_shape(kind, block, shape) for block, kind in known if str(tensor.dtype) in kind.dtypes}
        if tuple(tensor.shape) not in expected_shapes:
            listed = " or ".join(map(str, sorted(expected_shapes))) or "of a known dtype"
            raise ValueError(f"the optimizer's tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not {listed}")


def _shape(tensor: StateTensor, block: int, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor of an optimizer's state for a parameter of this shape."""
    blocks = (-(-prod(parameter) // block),)
    shapes: dict[str, tuple[int, ...]] = {
        "parameter": parameter,
        "parameter_pair": (2, *parameter),
        "blocks": blocks,
        "block_pair": (2, *blocks),
        "levels": (LEVELS,),
        "scalar": (),
    }
    return shapes[tensor.shape]
