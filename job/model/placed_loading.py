"""Loads and saves a base whose 4-bit weights are not all on the device: see `placed_weights` for where they are kept.

While transformers and bitsandbytes load and quantize, hooks see each weight as it is registered. When a decoder layer
is complete, its bytes move to their source and leave the device. At the end each weight becomes a view into a slot of
the device, with a quantization state that brings the layer when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from job.errors import Problem, SettingsError
from job.model.experts import Kinds, save_experts, without_experts
from job.model.placed_weights import ALIGNMENT, PLACED, AllGather, LayerSource, PlacedWeights, layer_of, open_source


@dataclass
class _Layer:
    """The quantized weights of a layer as they are loaded: how many there will be, and those loaded so far."""

    expected: int
    weights: list[tuple[Any, str, Any]]
    """(module, name of the parameter, the weight)."""


class Placing:
    """Takes the quantized weights of layers off the device while a model is loaded; see `placing`."""

    def __init__(self, source: LayerSource, device: torch.device, experts: Kinds) -> None:
        self._source, self._device, self._experts = source, device, experts
        self._parents: dict[Any, tuple[Any, str]] = {}
        self._layers: dict[Any, _Layer] = {}
        self._placed: list[tuple[list[tuple[Any, str]], list[list[_Piece]], int]] = []

    def module_registered(self, parent: Any, name: str, module: Any) -> None:
        """For torch's hook: notes where a module is."""
        if module is not None:
            self._parents[module] = (parent, name)

    def parameter_registered(self, module: Any, name: str, weight: Any) -> None:
        """For torch's hook: places a layer when its last quantized weight is there."""
        if getattr(weight, "quant_state", None) is None or weight.device.type == "meta":
            return
        if (layer := self._layer_of(module)) is None:
            return
        loading = self._layers.get(layer)
        if loading is None:
            loading = self._layers[layer] = _Layer(self._count(layer), [])
        loading.weights.append((module, name, weight))
        if len(loading.weights) == loading.expected:
            self._place(
                [weight for *_, weight in loading.weights], [(module, name) for module, name, _ in loading.weights]
            )

    def _count(self, layer: Any) -> int:
        """How many quantized weights a layer will have: its linear layers', and those of experts."""
        modules = list(layer.modules())
        linear = sum(type(module).__module__.startswith("bitsandbytes.") for module in modules)
        own = (
            (type(module).__name__, name) for module in modules for name, _ in module.named_parameters(recurse=False)
        )
        return linear + sum(kind in self._experts for kind in own)

    def finish(self, model: Any) -> None:
        """Gives the model its slots, once all weights are loaded.

        Raises:
            SettingsError: It has no layers of 4-bit weights.
        """
        if not self._placed or any(len(layer.weights) < layer.expected for layer in self._layers.values()):
            what = "must be gpu: the base has no decoder layers with 4-bit weights"
            raise SettingsError([Problem("JOB_MODEL__PLACEMENT", what)])
        placed = PlacedWeights(self._source, self._device, [size for _, _, size in self._placed])
        for number, (modules, pieces, _) in enumerate(self._placed):
            slot = placed.slots[placed.slot(number)]
            for (module, name), (packed, *constants) in zip(modules, pieces, strict=True):
                weight = getattr(module, name)
                weight.data = packed.view(slot)
                state = _placed_state(weight.quant_state, partial(placed.need, number))
                state.constants = constants[0].view(slot)
                if len(constants) > 1:
                    state.state2.absmax = constants[1].view(slot)
                weight.quant_state = state
                if name == "weight":
                    module.quant_state = state
        setattr(model, PLACED, placed)

    def _layer_of(self, module: Any) -> Any:
        """The outermost element of a list of modules that it is in, such as a decoder's layer; None if in none."""
        outermost = None
        while module in self._parents:
            parent, _ = self._parents[module]
            if isinstance(parent, torch.nn.ModuleList):
                outermost = module
            module = parent
        return outermost

    def _place(self, weights: Sequence[Any], modules: Sequence[tuple[Any, str]]) -> None:
        parts = [_parts(weight) for weight in weights]
        pieces, size = _laid_out(parts)
        layer = torch.zeros(size, dtype=torch.uint8, device=self._device)
        for of_weight, tensors in zip(pieces, parts, strict=True):
            for piece, tensor in zip(of_weight, tensors, strict=True):
                piece.view(layer).copy_(tensor)
        self._placed.append((list(modules), pieces, self._source.keep(layer)))
        for weight, (packed, *_) in zip(weights, parts, strict=True):
            # Its shape on its device, without its memory, until the slots are there.
            weight.data = packed.new_zeros(1).expand(packed.shape)
            weight.quant_state.absmax = weight.quant_state.absmax.new_zeros(1)
            if weight.quant_state.nested:
                weight.quant_state.state2.absmax = weight.quant_state.state2.absmax.new_zeros(1)


@dataclass(frozen=True)
class _Piece:
    """Where a tensor is in the bytes of its layer."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, layer: torch.Tensor) -> torch.Tensor:
        """The tensor, in a layer's bytes."""
        return layer[self.start : self.start + self.bytes].view(self.dtype).view(self.shape)


def _parts(weight: Any) -> list[torch.Tensor]:
    """The tensors of a 4-bit weight whose size depends on its shape: packed values, and the constants of two levels."""
    state = weight.quant_state
    return [weight.data, state.absmax, *([state.state2.absmax] if state.nested else [])]


def _laid_out(parts: Sequence[Sequence[torch.Tensor]]) -> tuple[list[list[_Piece]], int]:
    """Tensors laid out contiguously, each aligned, and the bytes that they take."""
    at, layout = 0, []
    for tensors in parts:
        pieces = []
        for tensor in tensors:
            pieces.append(_Piece(at, tensor.shape, tensor.dtype))
            at += -(-pieces[-1].bytes // ALIGNMENT) * ALIGNMENT
        layout.append(pieces)
    return layout, at


def _placed_state(state: Any, bring: Callable[[], None]) -> Any:
    """A quantization state that brings its layer to the device when its constants are read."""
    kind: Any = type(state)
    placed = _placed_kind(kind).__new__(_placed_kind(kind))
    placed.bring = bring
    for name, value in vars(state).items():
        setattr(placed, name, value)
    return placed


@lru_cache
def _placed_kind(kind: Any) -> Any:
    """The class of such states: bitsandbytes' `QuantState`, whose `absmax` is a property."""

    def read(state: Any) -> torch.Tensor:
        state.bring()
        constants: torch.Tensor = state.constants
        return constants

    def write(state: Any, constants: torch.Tensor) -> None:
        state.constants = constants

    def as_dict(state: Any, *args: Any, **options: Any) -> Any:
        # For a `state_dict`, which PEFT makes of the whole model to find the adapter in it: names, and views of slots.
        bring, state.bring = state.bring, lambda: None
        try:
            return kind.as_dict(state, *args, **options)
        finally:
            state.bring = bring

    def to(state: Any, device: Any) -> None:
        if torch.device(device).type != state.constants.device.type:
            raise RuntimeError(f"weights loaded layer by layer to {state.constants.device} cannot move to {device}")

    def copied(state: Any, memo: dict[int, Any]) -> Any:
        # PEFT copies a layer for DoRA's norms. The copy is not placed; its weight is copied after its state.
        plain = kind.__new__(kind)
        plain.absmax = state.absmax.clone()
        for name in vars(state).keys() - {"bring", "constants"}:
            setattr(plain, name, deepcopy(getattr(state, name), memo))
        return plain

    own = {"absmax": property(read, write), "as_dict": as_dict, "to": to, "__deepcopy__": copied}
    return type(f"Placed{kind.__name__}", (kind,), own)


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """A context for loading a model, in which no more is on the device than what is just loaded."""
    from transformers import core_model_loading, modeling_utils

    with ExitStack() as stack:
        # transformers loads with several threads, ahead of what is placed: weights would gather on the device.
        in_turn = partial(_without_threads, core_model_loading.spawn_materialize)
        stack.enter_context(replaced(core_model_loading, "spawn_materialize", in_turn))
        # Before that, it allocates the memory of the whole model on the device at once, to be faster.
        stack.enter_context(replaced(modeling_utils, "caching_allocator_warmup", lambda *_, **__: None))
        yield


@contextmanager
def placing(
    placement: str,
    device: torch.device,
    group: AllGather | None,
    experts: Kinds = Kinds(),  # noqa: B008 - it cannot be changed
) -> Iterator[Placing]:
    """A context for loading a model: each quantized layer is moved to its place once loaded. Call `finish` afterwards.

    Args:
        placement: `host` or `sharded`.
        device: Where the model computes.
        group: The processes of the run, all of which load the same model now.
        experts: Parameters besides linear layers' that will be quantized.
    """
    placing_hooks = Placing(open_source(placement, device, group), device, experts)
    with ExitStack() as stack:
        stack.enter_context(layer_by_layer())
        for hook, register in (
            (placing_hooks.module_registered, torch_module.register_module_module_registration_hook),
            (placing_hooks.parameter_registered, torch_module.register_module_parameter_registration_hook),
        ):
            stack.callback(register(hook).remove)
        yield placing_hooks


def _without_threads(load: Callable[..., Any], _pool: Any, *args: Any, **options: Any) -> Any:
    return load(None, *args, **options)


def save_quantized(model: Any, folder: Path, *, shard: str) -> None:
    """Writes a quantized base as transformers does, with only one file in memory at a time.

    Args:
        model: transformers' model, with placed weights or without.
        folder: Exists.
        shard: The largest size of a file, as transformers takes it.
    """
    # transformers would cut them into single experts, which packed tensors cannot be; nor is the rest renamed then.
    mixture = save_experts(model, folder)
    save_options, state = {"max_shard_size": shard, "save_original_format": not mixture}, without_experts(model)
    if getattr(model, PLACED, None) is None:
        with replaced(model, "state_dict", lambda *_, **__: dict(state)):
            model.save_pretrained(folder, **save_options)
        return
    from transformers import modeling_utils

    write_file = modeling_utils.safe_save_file
    bring = {
        name: layer
        for path, module in model.named_modules()
        if (layer := layer_of(getattr(module, "weight", None))) is not None
        for name in (f"{path}.weight", f"{path}.weight.absmax", f"{path}.weight.nested_absmax")
    }
    # What a slot holds is there when it is needed. Until then a tensor of the same size whose memory is never touched.
    names = {name: torch.empty_like(one, device="cpu") if name in bring else one for name, one in state.items()}

    def save_file(tensors: dict[str, torch.Tensor], *args: Any, **options: Any) -> None:
        for name in sorted(tensors, key=list(names).index):
            if name in bring:
                bring[name]()
                tensors[name] = state[name].to("cpu", copy=True)
        write_file(tensors, *args, **options)

    with (
        replaced(model, "state_dict", lambda *_, **__: dict(names)),
        replaced(modeling_utils, "safe_save_file", save_file),
    ):
        model.save_pretrained(folder, **save_options)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute is another within."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
