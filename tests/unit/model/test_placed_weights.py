"""Weights that are not all on the device: the bits are the same whatever computes, also after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from job.distributed.processes import ALONE
from job.distributed.ranks import Place
from job.errors import SettingsError
from job.model import placed_weights
from job.model.adapter_options import AdapterOptions
from job.model.free_model import free_model
from job.model.fused.frozen_weights import dequantized, dequantizer, fuse_layers
from job.model.fused.kernels import TORCH
from job.model.gradient_checkpointing import recompute_activations
from job.model.lora import add_adapter, trainable
from job.model.model_record import held
from job.model.packed_layout import Segment, build_layout
from job.model.placed_loading import save_quantized
from job.model.placed_weights import AllGather, placement_of, taking_part
from tests.helpers import LINEAR, deepened, fill_adapter, load_plain

LAYERS = 5


@pytest.fixture(scope="module")
def folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with more layers than slots, and an odd number of them: the first and the last share a slot."""
    return deepened(base_folder, tmp_path_factory.mktemp("deep") / "base", LAYERS)


def load(folder: Path, place: str = "gpu", group: AllGather = ALONE, **changes: Any) -> Any:
    """The base in NF4, there."""
    return load_plain(folder, **{"quantization": "nf4", "placement": place, "group": group} | changes)


def adapted(base: Any, init: str = "default", **options: Any) -> Any:
    """With an adapter on all linear layers."""
    how: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": LINEAR, "seed": 1}
    return add_adapter(base, **how, options=AdapterOptions(init=init, **options))


def run(model: Any, length: int = 24) -> torch.Tensor:
    """(length, vocabulary) logits of one sequence."""
    ids, layout = torch.arange(length)[None] + 5, build_layout([Segment(0, length)], torch.device("cpu"))
    found: torch.Tensor = model(
        input_ids=ids, position_ids=torch.arange(length)[None], layout=layout, use_cache=False
    ).logits[0]
    return found


def trained(model: Any, *lengths: int) -> list[torch.Tensor]:
    """Logits of sequences, without and with a gradient, and then the adapter's gradient."""
    with torch.no_grad():
        found = [run(model)]
    found += [run(model, length) for length in lengths]
    for logits in found[1:]:
        logits.square().mean().backward()  # type: ignore[no-untyped-call]
    return [*(logits.detach() for logits in found), *(p.grad for p in trainable(model).values())]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """All bits are the same."""
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("place", ["host", "sharded"])
@pytest.mark.parametrize("way", ["peft", "recomputed", "fused", "fp8", "bf16"])
def test_the_bits_do_not_depend_on_the_place(folder: Path, place: str, way: str) -> None:
    """Forward and backward, several at once, by PEFT's layers and the fused ones; what is recorded is the same too."""
    found = []
    for where in ("gpu", place):
        changes = {"double_quantization": False, "dtype": torch.bfloat16} if way == "bf16" else {}
        base = load(folder, where, **changes)
        model = fill_adapter(adapted(base))
        if way in {"fused", "fp8"}:
            assert fuse_layers(model, keep_dequantized=False, kernels=TORCH, fp8=way == "fp8") == "all"
            model.train(way == "fp8")  # without it nothing is computed in FP8
        if way == "recomputed":
            recompute_activations(model, on=True)
            model.train()
        assert placement_of(model) == where
        with taking_part(model), torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
            lengths = (24,) if way in {"fused", "fp8"} else (24, 9)  # the fused layers compute one sequence at a time
            found.append((trained(model, *lengths), held(model), model.get_base_model().num_parameters()))
    assert_same(found[1][0], found[0][0])
    assert found[1][1:] == found[0][1:]


@pytest.mark.parametrize(("init", "options"), [("pissa", {}), ("default", {"use_dora": True})])
def test_what_begins_with_the_weights(folder: Path, init: str, options: dict[str, Any]) -> None:
    """First values that are computed from the base, by PEFT's code, and an adapter that needs the weights' norms."""
    found = []
    for place in ("gpu", "host"):
        model = adapted(load(folder, place), init, **options)
        found.append([*(p.detach().clone() for p in trainable(model).values()), *trained(model, 24)])
    assert_same(found[1], found[0])


def test_each_weight_dequantizes_alike(folder: Path) -> None:
    """In any order of layers; the bytes on the device are those of two layers."""
    whole, placed = load(folder), load(folder, "host")
    layers = dict(placed.named_modules())
    names = [name for name, module in whole.named_modules() if hasattr(module, "quant_state")]
    assert len(names) == 7 * LAYERS
    for name in [*names[::-1], *names[::3]]:
        expected = dequantized(whole.get_submodule(name), torch.float32)
        assert torch.equal(dequantized(layers[name], torch.float32), expected), name
    precise = [
        (dequantizer(whole.get_submodule(n), torch.float16), dequantizer(layers[n], torch.float16)) for n in names
    ]
    assert all(torch.equal(expected(), found()) for expected, found in precise)
    slots = {layers[name].weight.untyped_storage().data_ptr() for name in names}
    assert len(slots) == 2
    free_model(placed)
    assert all(layers[name].quant_state.constants.untyped_storage().nbytes() == 0 for name in names)


@pytest.mark.parametrize("place", ["host", "sharded"])
def test_a_kept_base_has_the_same_files(folder: Path, tmp_path: Path, place: str) -> None:
    """The quantized cache gets the same bytes from every place, in several files, and loads into every place."""
    for where in ("gpu", place):
        (tmp_path / where).mkdir()
        base = load(folder, where)
        with taking_part(base):
            save_quantized(base, tmp_path / where, shard="200KB")
    files = [{file.name: file.read_bytes() for file in (tmp_path / where).iterdir()} for where in ("gpu", place)]
    assert files[0] == files[1]
    assert sum(name.endswith(".safetensors") for name in files[0]) > 1
    model = load(tmp_path / place, place, quantized=True)
    with taking_part(model):
        assert torch.equal(run(model), run(load(folder)))


def test_a_base_without_4_bit_layers_is_refused(folder: Path) -> None:
    """In words, with the setting."""
    with pytest.raises(SettingsError, match=r"JOB_MODEL__PLACEMENT.*no decoder layers with 4-bit weights"):
        load(folder, "host", quantization="none")


class Threads:
    """A process of several, each in a thread of its own, as `placed_weights` uses them."""

    def __init__(self, rank: int, board: list[Any], barrier: Barrier) -> None:
        self.place, self._board, self._barrier = Place(rank, len(board)), board, barrier
        self.rounds = 0

    def exchange(self, number: int) -> list[int]:
        """The numbers of all."""
        self.rounds += 1
        return self._posted(number)

    def gather_into(self, whole: torch.Tensor, own: torch.Tensor) -> Callable[[], None]:
        """Fills `whole` at once."""
        whole.copy_(torch.cat(self._posted(own)))
        return lambda: None

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """Takes this one's part of what each of the others sends."""
        parts = [part[self.place.rank] for part in self._posted(sent.split_with_sizes(sent_sizes))]
        assert [part.numel() for part in parts] == received_sizes
        received.copy_(torch.cat(parts))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums in the order of the ranks."""
        tensor.copy_(torch.stack(self._posted(tensor.clone())).sum(0))

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Sums at once."""
        self.all_reduce(tensor)
        return lambda: None

    def agree(self, *, repeat: bool) -> bool:
        """Whether any repeats."""
        return any(self._posted(repeat))

    def _posted(self, value: Any) -> list[Any]:
        self._board[self.place.rank] = value
        self._barrier.wait(timeout=60)
        found = list(self._board)
        self._barrier.wait(timeout=60)
        return found


@contextmanager
def team(folder: Path, count: int) -> Iterator[Callable[[Callable[[Any, int], Any]], list[Any]]]:
    """Gives what lets each of several processes do something with its model, within `taking_part`."""
    board, barrier = [None] * count, Barrier(count)
    groups = [Threads(rank, board, barrier) for rank in range(count)]
    models = [fill_adapter(adapted(load(folder, "sharded", group))) for group in groups]

    def together(work: Callable[[Any, int], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            try:
                with taking_part(models[rank]):
                    return work(models[rank], rank)
            except torch.OutOfMemoryError:
                return "out of memory"

        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(one, range(count)))
        assert len({group.rounds for group in groups}) == 1
        return found

    yield together


def test_processes_that_compute_different_amounts(folder: Path) -> None:
    """Three processes: one computes nothing, one forward passes only, one both; each gets the bits of one alone."""
    expected = trained(fill_adapter(adapted(load(folder))), 24, 9)
    with team(folder, 3) as together:

        def work(model: Any, rank: int) -> Any:
            if rank == 1:
                return None
            if rank == 2:
                with torch.no_grad():
                    return [run(model), run(model, 24), run(model, 9), run(model, 24)]
            return trained(model, 24, 9)

        found = together(work)
    assert_same(found[0], expected)
    assert found[1] is None
    assert_same(found[2], [*expected[:3], expected[1]])


def test_memory_that_runs_out_in_the_middle_of_a_pass(folder: Path) -> None:
    """The other process finishes its pass, and afterwards both begin anew, with the bits of one alone."""
    expected = trained(fill_adapter(adapted(load(folder))), 24)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("a test")

    with team(folder, 2) as together:

        def work(model: Any, rank: int) -> Any:
            if rank == 0:
                return trained(model, 24)
            hook = model.get_base_model().model.layers[2].mlp.register_forward_hook(full)
            try:
                return trained(model, 24)
            finally:
                hook.remove()

        found = together(work)
        assert found[1] == "out of memory"
        assert_same(found[0], expected)
        for again in together(lambda model, rank: [model.zero_grad(), *trained(model, 24)][1:]):
            assert_same(again, expected)


def test_computing_outside_is_an_error(folder: Path) -> None:
    """Not a process that waits for others for ever."""
    model = load(folder, "sharded")
    with pytest.raises(RuntimeError, match="outside of `taking_part`"):
        run(model)


def test_pinned_memory_that_nobody_releases_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is unpinned before it is freed: otherwise its next owner could not copy between it and the GPU."""
    given_back: list[int] = []
    monkeypatch.setattr(placed_weights, "unpin", lambda memories, _: given_back.extend(map(len, memories)))
    for released in (False, True):
        given_back.clear()
        host = placed_weights._Host(torch.device("cpu"))
        host._pinned.append(torch.zeros(3))
        if released:
            host.release()
        del host
        assert given_back == [3]
