"""A base whose 4-bit weights do not all lie on the device: sharded over processes, or held in main memory.

    on the device   slot 0: layer 0, 2, 4, ...      slot 1: layer 1, 3, 5, ...      (the packed bytes of one layer each)
    elsewhere       `host`: all layers in main memory.      `sharded`: 1/N of each layer on the device of each process.

The bytes of a layer are those that bitsandbytes made: packed weights, and the constants of their blocks. They are only
copied, so a layer computes the same bits wherever they came from. The tensors of a weight are views into its layer's
slot, at addresses that never change; what changes is which layer's bytes are there.

Every use of a weight reads the constants of its quantization state, and reading these first copies the layer's bytes
into the slot (`_placed_state`). So it does not matter what computes: bitsandbytes' layers, those of `fused`,
PEFT's initializations, a merge; forward, recomputed, backward, in any order. After a layer the next one in the same
direction is fetched while the layer computes: its slot is that of the layer before, which is done. A GPU orders this by
streams: a copy begins after what was launched before it, and what is launched after it waits.

Sharded, all processes have to take part in every gather. They compute different numbers of sequences, and may run out
of memory in the middle of one. So they work in rounds, within `taking_part`: in each round every process says which
layer it needs, or none, and each layer that any of them needs is gathered by all. A process that has finished or
failed takes part in further rounds, without asking for a layer, until no process asks for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.modules import module as torch_module

from job.common.out_of_memory import out_of_memory
from job.common.pinned_memory import pin, unpin
from job.errors import Problem, SettingsError
from job.log import get_logger

ALIGNMENT = 256
"""Bytes to which every tensor in a slot is aligned, as torch's allocator aligns them on a GPU: kernels may choose how
they load by the address."""
_NONE = -1
"""In place of the number of a layer: no need."""
_MEETING = -2
"""The same of a process that waits until all others have come as far."""
_PLACED = "placed_weights"
"""Attribute of the base."""

Wait = Callable[[], None]
"""Makes what follows on the current stream wait until bytes are there."""


class Group(Protocol):
    """The part of `distributed.Processes` that sharding uses."""

    place: Any

    def exchange(self, number: int) -> list[int]:
        """The numbers of all processes."""

    def gather_into(self, whole: torch.Tensor, own: torch.Tensor) -> Wait:
        """Starts to fill `whole` with every process's `own`."""


class OtherOutOfMemory(RuntimeError):
    """Memory ran out in another process, with which this one computes something together."""

    def __init__(self) -> None:
        super().__init__("another process, which computes a part of the same row, is out of memory")


class _Source(Protocol):
    """Where layers are kept while they are not in a slot."""

    def keep(self, layer: torch.Tensor) -> int:
        """Takes the next layer, (bytes,) uint8 on the device; returns the bytes of a slot that it is fetched into."""

    def ready(self, size: int) -> None:
        """All layers are there, the largest of so many bytes."""

    def fetch(self, number: int, slot: torch.Tensor) -> Wait:
        """Starts to fill a slot with a layer, after what was launched before."""

    def serve(self) -> None:
        """Takes part in the gathers of others until no process needs any more."""

    def release(self) -> None:
        """Frees the memory."""


class _Host:
    """All layers in main memory, pinned where there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: list[torch.Tensor] = []
        self._pinned: list[torch.Tensor] = []
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def keep(self, layer: torch.Tensor) -> int:
        kept = torch.empty(layer.shape, dtype=layer.dtype, device="cpu")
        if self._stream is not None:  # before it is filled: that is faster, too
            if pin(kept, self._device):
                self._pinned.append(kept)
            elif not self._layers:
                get_logger().warning("main memory cannot be pinned (ulimit -l): layers come to the GPU slowly")
        self._layers.append(kept.copy_(layer))
        return kept.numel()

    def ready(self, size: int) -> None:
        """Nothing is left to do."""

    def fetch(self, number: int, slot: torch.Tensor) -> Wait:
        layer = self._layers[number]
        if self._stream is None:
            slot[: layer.numel()].copy_(layer)
            return _nothing
        self._stream.wait_stream(torch.cuda.current_stream())  # what reads the slot's last layer was launched there
        with torch.cuda.stream(self._stream):
            slot[: layer.numel()].copy_(layer, non_blocking=True)
            copied = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(copied)

    def serve(self) -> None:
        """No other process needs anything of this one."""

    def release(self) -> None:
        unpin(self._pinned, self._device)
        self._layers, self._pinned = [], []


class _Shares:
    """This process's share of every layer, on its device; the others have the rest."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank, self._count = group.place.rank, group.place.world_size
        self._own: list[torch.Tensor] = []
        self._aside: torch.Tensor | None = None
        self._aside_filled: Wait = _nothing
        self.opened = 0
        """How many `taking_part` are open, one within the other."""

    def keep(self, layer: torch.Tensor) -> int:
        share = -(-layer.numel() // (self._count * ALIGNMENT)) * ALIGNMENT
        padded = layer.new_zeros(share * self._count)
        padded[: layer.numel()] = layer
        self._own.append(padded[share * self._rank : share * (self._rank + 1)].clone())
        return padded.numel()

    def ready(self, size: int) -> None:
        # Now, not when another process needs a layer that this one does not: memory may have run out by then.
        self._aside = torch.empty(size, dtype=torch.uint8, device=self._device)

    def fetch(self, number: int, slot: torch.Tensor) -> Wait:
        if not self.opened:
            raise RuntimeError("a sharded model computes outside of `taking_part`: no other process would answer")
        return self._round(number, slot)[1]

    def serve(self) -> None:
        while self._round(_NONE, None)[0] != {_NONE}:
            pass

    def meet(self) -> None:
        """See `meet`."""
        while (numbers := self._round(_MEETING, None)[0]) != {_MEETING}:
            if _NONE in numbers:  # it serves, since its memory ran out
                raise OtherOutOfMemory

    def release(self) -> None:
        self._aside_filled()
        self._own, self._aside = [], None

    def _round(self, needed: int, slot: torch.Tensor | None) -> tuple[set[int], Wait]:
        """Gathers what any process needs; returns what all say, and how to wait for this one's layer."""
        filled: Wait = _nothing
        numbers = set(self._group.exchange(needed))
        for number in sorted(numbers - {_NONE, _MEETING}):
            own = self._own[number]
            into = slot if number == needed else self._aside
            if into is self._aside:
                self._aside_filled()  # before it is filled again
            wait = self._group.gather_into(into[: own.numel() * self._count], own)  # type: ignore[index]
            if number == needed:
                filled = wait
            else:
                self._aside_filled = wait
        return numbers, filled


def _nothing() -> None:
    """There is nothing to wait for."""


class PlacedWeights:
    """The layers of a base in two slots of the device, filled from a source as they are needed."""

    def __init__(self, source: _Source, device: torch.device, sizes: Sequence[int]) -> None:
        self.source, self._count = source, len(sizes)
        source.ready(size := max(sizes))
        self.slots = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(min(2, self._count))]
        self._holds: list[int | None] = [None] * len(self.slots)
        self._filling: list[Wait] = [_nothing] * len(self.slots)
        self._current: int | None = None

    def slot(self, number: int) -> int:
        """The one that a layer's bytes are in when it is needed."""
        return number % len(self.slots)

    def need(self, number: int) -> None:
        """Has the layer's bytes in its slot for what is launched from now on, and starts to fetch the one after it."""
        if number == self._current:
            return
        before, self._current = self._current, None
        self._fetch(number)
        self._wait(self.slot(number))
        following = self._following(before, number)
        if following is not None and self.slot(following) != self.slot(number):
            self._fetch(following)
        self._current = number

    def _fetch(self, number: int) -> None:
        slot = self.slot(number)
        if self._holds[slot] == number:
            return
        self._wait(slot)  # where it was fetched in vain, it must not be written twice at once
        self._holds[slot] = None
        self._filling[slot] = self.source.fetch(number, self.slots[slot])
        self._holds[slot] = number

    def _wait(self, slot: int) -> None:
        filling, self._filling[slot] = self._filling[slot], _nothing
        filling()

    def _following(self, before: int | None, number: int) -> int | None:
        """Which layer will be needed next: one further in the direction of the last two; only a guess, for speed."""
        if before == number + 1:
            return number - 1 if number else None
        if number + 1 < self._count:
            return number + 1
        return None if torch.is_grad_enabled() else 0  # where a backward pass follows, it begins with this one

    def release(self) -> None:
        """Frees the memory of all layers."""
        for number in range(len(self.slots)):
            self._wait(number)  # nothing may be on its way into memory that is freed
        self.source.release()
        for slot in self.slots:
            slot.untyped_storage().resize_(0)  # the weights' tensors are views of it, and may live on


@contextmanager
def taking_part(model: Any) -> Iterator[None]:
    """A sharded model may compute only inside this `with` block, which all processes enter and leave together.

    Each may compute a different amount in it, or run out of memory. No effect on a model whose weights are not sharded.

    Raises:
        JobError: Another process has ended.
    """
    placed = getattr(model, _PLACED, None)
    shares = None if placed is None else placed.source
    if not isinstance(shares, _Shares):
        yield
        return
    shares.opened += 1
    try:
        yield
    except RuntimeError as error:
        if shares.opened == 1 and out_of_memory(error):  # all of them will repeat it, with less memory
            shares.serve()
        raise
    else:
        if shares.opened == 1:
            shares.serve()
    finally:
        shares.opened -= 1


@contextmanager
def computing_together(model: Any, group: Group) -> Iterator[Callable[[], None]]:
    """For what all processes compute together, so that each `meet`s the others equally often in it.

    Yields `meet`, which waits until all have come as far, and is to be called before a process waits for tensors of
    others: from then on none is missing because its memory has run out. At the end all meet once more.

    Args:
        model: With weights of any place. Within `taking_part`.
        group: The processes.

    Raises:
        OtherOutOfMemory: Memory ran out in another process. It counts as an error of this one's memory.
        JobError: Another process has ended.
    """
    placed = getattr(model, _PLACED, None)
    shares = placed.source if placed is not None and isinstance(placed.source, _Shares) else None
    missing = False

    def meet() -> None:
        nonlocal missing
        if shares is not None:
            shares.meet()  # layers are gathered meanwhile for those that are not there yet
        elif _NONE in group.exchange(_MEETING):
            missing = True
            raise OtherOutOfMemory

    try:
        yield meet
        meet()
    except RuntimeError as error:
        # `taking_part` says so to the others where weights are sharded. Here it is said in place of the next meeting.
        if shares is None and not missing and out_of_memory(error):
            group.exchange(_NONE)
        raise


def release(model: Any) -> None:
    """Frees the memory of a model's placed weights, if it has any; nothing can be computed with it any more."""
    if (placed := getattr(model, _PLACED, None)) is not None:
        placed.release()


def place_of(model: Any) -> str:
    """Where the 4-bit weights of a model's layers lie: `gpu` for its device, `sharded` or `host`."""
    if (placed := getattr(model, _PLACED, None)) is None:
        return "gpu"
    return "sharded" if isinstance(placed.source, _Shares) else "host"


def layer_of(weight: Any) -> Callable[[], None] | None:
    """A function that copies a placed weight's layer to the device; None for a weight that always lies there."""
    found: Callable[[], None] | None = getattr(getattr(weight, "quant_state", None), "bring", None)
    return found


@dataclass
class _Layer:
    """The quantized modules of a layer as they are loaded: how many there will be, and those that are here."""

    expected: int
    modules: list[Any]


class Placing:
    """Takes the quantized weights of layers off the device while a model is loaded; see `placing`."""

    def __init__(self, source: _Source, device: torch.device) -> None:
        self._source, self._device = source, device
        self._parents: dict[Any, tuple[Any, str]] = {}
        self._layers: dict[Any, _Layer] = {}
        self._placed: list[tuple[list[Any], list[list[_Piece]], int]] = []

    def module_registered(self, parent: Any, name: str, module: Any) -> None:
        """For torch's hook: notes where a module is."""
        if module is not None:
            self._parents[module] = (parent, name)

    def parameter_registered(self, module: Any, name: str, weight: Any) -> None:
        """For torch's hook: places a layer when its last quantized weight is there."""
        state = getattr(weight, "quant_state", None)
        if name != "weight" or state is None or weight.device.type == "meta":
            return
        if (layer := self._layer_of(module)) is None:
            return
        found = self._layers.get(layer)
        if found is None:
            count = sum(type(one) is type(module) for one in layer.modules())
            found = self._layers[layer] = _Layer(count, [])
        found.modules.append((module, weight))
        if len(found.modules) == found.expected:
            self._place([weight for _, weight in found.modules], [module for module, _ in found.modules])

    def finish(self, model: Any) -> None:
        """Gives the model its slots, once all weights are loaded.

        Raises:
            SettingsError: It has no layers of 4-bit weights.
        """
        if not self._placed or any(len(layer.modules) < layer.expected for layer in self._layers.values()):
            what = "must be gpu: the base has no decoder layers of 4-bit weights"
            raise SettingsError([Problem("JOB_MODEL__PLACEMENT", what)])
        placed = PlacedWeights(self._source, self._device, [size for _, _, size in self._placed])
        for number, (modules, pieces, _) in enumerate(self._placed):
            slot = placed.slots[placed.slot(number)]
            for module, (packed, *constants) in zip(modules, pieces, strict=True):
                module.weight.data = packed.view(slot)
                state = _placed_state(module.weight.quant_state, partial(placed.need, number))
                state.constants = constants[0].view(slot)
                if len(constants) > 1:
                    state.state2.absmax = constants[1].view(slot)
                module.weight.quant_state = module.quant_state = state
        setattr(model, _PLACED, placed)

    def _layer_of(self, module: Any) -> Any:
        """The outermost element of a list of modules that it is in, such as a decoder's layer; None if in none."""
        found = None
        while module in self._parents:
            parent, _ = self._parents[module]
            if isinstance(parent, torch.nn.ModuleList):
                found = module
            module = parent
        return found

    def _place(self, weights: Sequence[Any], modules: Sequence[Any]) -> None:
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
    """Tensors one behind the other, each aligned, and the bytes that they take."""
    at, found = 0, []
    for tensors in parts:
        pieces = []
        for tensor in tensors:
            pieces.append(_Piece(at, tensor.shape, tensor.dtype))
            at += -(-pieces[-1].bytes // ALIGNMENT) * ALIGNMENT
        found.append(pieces)
    return found, at


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
        bring, state.bring = state.bring, _nothing
        try:
            return kind.as_dict(state, *args, **options)
        finally:
            state.bring = bring

    def to(state: Any, device: Any) -> None:
        if torch.device(device).type != state.constants.device.type:
            raise RuntimeError(f"weights that come to {state.constants.device} layer by layer cannot move to {device}")

    def copied(state: Any, memo: dict[int, Any]) -> Any:
        # PEFT copies a layer for DoRA's norms. The copy stays as it is; its weight is copied after its state.
        plain = kind.__new__(kind)
        plain.absmax = state.absmax.clone()
        for name in vars(state).keys() - {"bring", "constants"}:
            setattr(plain, name, deepcopy(getattr(state, name), memo))
        return plain

    own = {"absmax": property(read, write), "as_dict": as_dict, "to": to, "__deepcopy__": copied}
    return type(f"Placed{kind.__name__}", (kind,), own)


@contextmanager
def placing(place: str, device: torch.device, group: Group | None) -> Iterator[Placing]:
    """A context for loading a model: each quantized layer is moved to its place once loaded. Call `finish` afterwards.

    Args:
        place: `host` or `sharded`.
        device: Where the model computes.
        group: The processes of the run, all of which load the same model now.
    """
    from transformers import core_model_loading, modeling_utils

    if place == "sharded" and group is None:
        raise ValueError("a sharded base needs the processes that share it")
    source: _Source = _Host(device) if group is None or place == "host" else _Shares(group, device)
    made = Placing(source, device)
    with ExitStack() as stack:
        # transformers loads with several threads, ahead of what is placed: weights would gather on the device.
        in_turn = partial(_without_threads, core_model_loading.spawn_materialize)
        stack.enter_context(_replaced(core_model_loading, "spawn_materialize", in_turn))
        # Before that, it allocates the memory of the whole model on the device at once, to be faster.
        stack.enter_context(_replaced(modeling_utils, "caching_allocator_warmup", lambda *_, **__: None))
        for hook, register in (
            (made.module_registered, torch_module.register_module_module_registration_hook),
            (made.parameter_registered, torch_module.register_module_parameter_registration_hook),
        ):
            stack.callback(register(hook).remove)
        yield made


def _without_threads(load: Callable[..., Any], _pool: Any, *args: Any, **options: Any) -> Any:
    return load(None, *args, **options)


def save_quantized(model: Any, folder: Path, *, shard: str) -> None:
    """Writes a quantized base as transformers does, of which only one file is in memory at a time.

    Args:
        model: transformers' model, with placed weights or without.
        folder: Exists.
        shard: The largest size of a file, as transformers takes it.
    """
    if getattr(model, _PLACED, None) is None:
        model.save_pretrained(folder, max_shard_size=shard)
        return
    from transformers import modeling_utils

    state, whole = model.state_dict(), modeling_utils.safe_save_file
    bring = {
        name: found
        for path, module in model.named_modules()
        if (found := layer_of(getattr(module, "weight", None))) is not None
        for name in (f"{path}.weight", f"{path}.weight.absmax", f"{path}.weight.nested_absmax")
    }
    # What a slot holds is there when it is needed. Until then a tensor of the same size, whose memory nobody touches.
    names = {name: torch.empty_like(one, device="cpu") if name in bring else one for name, one in state.items()}

    def save_file(tensors: dict[str, torch.Tensor], *args: Any, **options: Any) -> None:
        for name in sorted(tensors, key=list(names).index):
            if name in bring:
                bring[name]()
                tensors[name] = state[name].to("cpu", copy=True)
        whole(tensors, *args, **options)

    with (
        _replaced(model, "state_dict", lambda *_, **__: dict(names)),
        _replaced(modeling_utils, "safe_save_file", save_file),
    ):
        model.save_pretrained(folder, max_shard_size=shard)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
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
