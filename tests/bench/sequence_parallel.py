"""One long row on one GPU and on several together: `python tests/bench/sequence_parallel.py [--tiny] [--layers N]`.

A random model of Mistral-7B's shape in NF4, as in `long_rows.py`, with one process for each GPU. One JSON line per
finding:

- exchange: milliseconds of the two exchanges around attention, forward, of 64,000 tokens;
- exact: the gradient of 20,001 tokens through 2 layers on one GPU and on all together, twice: their difference, and
  whether both runs have the same bits; and by one GPU in tiles of half the size, which shows the effect of rounding
  to bf16;
- row64k: 64,000 tokens through N layers (8), by each GPU alone at the same time, then by all GPUs together;
- whole64k: 64,000 tokens through all layers by all GPUs;
- cap24: 140,000 tokens through 2 layers with 24 GB of each GPU, by a limit on the allocator, and without it on one.

Budget: 90 s on two H200s, of which imports and the model take 25. --tiny tries the script itself on a CPU, by gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink's multicast, which GPUs that are assigned singly do not have
sys.path.insert(0, str(Path(__file__).parents[2]))

TIMEOUT = 150
"""Seconds after which the processes are killed."""
LATEST = 65
"""Seconds from the start after which no section begins."""


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def start(args: argparse.Namespace) -> int:
    """Starts the processes and waits for them; the first code that is not 0."""
    shared = [*(["--tiny"] if args.tiny else []), "--layers", str(args.layers)]
    shared += ["--processes", str(args.processes), "--port", str(free_port())]
    members = [
        subprocess.Popen(
            [sys.executable, __file__, *shared, "--rank", str(rank)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(rank)},
        )
        for rank in range(args.processes)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        return max(abs(member.wait(max(1, deadline - time.monotonic()))) for member in members)
    finally:
        for member in members:
            member.kill()


class Both:
    """One process's part.

    Args:
        chosen: The arguments.
        group: All processes.
        began: When this process began.
    """

    def __init__(self, args: argparse.Namespace, group: Any, began: float) -> None:
        import long_rows  # lies beside this script

        self.rows, self.group, self.began = long_rows, group, began
        self.bench = long_rows.Bench(args.tiny, args.layers)
        self.say("start", processes=group.place.world_size)
        say, long_rows.say = long_rows.say, self.say
        try:
            long_rows.build(self.bench)
        finally:
            long_rows.say = say

    def say(self, what: str, **figures: Any) -> None:
        """One finding, by process 0."""
        if self.group.leads:
            rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
            print(json.dumps({"what": what, "since": round(time.monotonic() - self.began, 1), **rounded}), flush=True)

    def run(self, what: str, tokens: int, layers: int | None, *, together: bool, **plan: Any) -> Any:
        """One optimizer step of one row, timed: by this process alone, or by all. Returns the gradient."""
        import torch

        from job.data.batch_plan import Steps
        from job.distributed.processes import ALONE
        from job.model.gradient_checkpointing import recompute_activations
        from job.model.lora import trainable
        from job.training.config import Hooks, Recipe
        from job.training.flat_parameters import FlatParameters
        from job.training.step import StepGradient

        rows, model = self.rows, self.bench.model
        rows.clean()
        count = min(layers or len(self.bench.all_layers), len(self.bench.all_layers))
        model.get_base_model().model.layers = torch.nn.ModuleList(self.bench.all_layers[:count])
        recompute_activations(model, on=True, random=False)
        group = self.group if together else ALONE
        place = group.place
        divided = {"sequence_parallel": place.world_size, "divided_above": 1} if together else {}
        step = StepGradient(
            model,
            Steps([rows.example(self.bench, tokens)], 0, 1, 4, place.rank, place.world_size),
            parameters := FlatParameters(trainable(model).values(), 256),
            recipe=Recipe(
                seed=0,
                total_steps=4,
                learning_rate=1e-4,
                scheduler="linear",
                warmup_steps=0,
                weight_decay=0.0,
                max_grad_norm=1.0,
                global_batch_size=1,
                micro_batch_tokens=16_384,
                optimizer="adamw_torch",
                save_every_steps=100,
            ),
            plan=replace(rows.NOW, **plan, **divided),
            hooks=Hooks(lambda _: None, lambda *_: None, lambda: False),
            processes=group,
            packed_gradient=lambda *_: torch.zeros(()),
        )
        self.group.gather("begin", 0)
        rows.sync()
        began = time.perf_counter()
        try:
            loss = float(step(0))
            rows.sync()
            seconds = time.perf_counter() - began
            gradient = parameters.gradient.clone()
        finally:
            step.micro_batch.release()
        peaks = self.group.gather("peaks", [rows.peak(), rows.reserved()])
        self.say(
            what,
            by="all together" if together else "one",
            tokens=tokens,
            layers=count,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            tokens_per_second_of_all_layers=tokens / seconds * count / len(self.bench.all_layers),
            peak_gib=[one[0] for one in peaks],
            reserved_gib=[one[1] for one in peaks],
            loss=loss,
            **plan,
        )
        return gradient

    def compare(self, what: str, one: Any, other: Any) -> None:
        """The difference of two gradients."""
        self.say(
            what, relative_difference=float((one - other).norm() / other.norm()), same_bits=bool((one == other).all())
        )


def exchange(both: Both) -> None:
    """The exchanges alone."""
    import torch

    from job.model.fused.sequence_parallel import SequenceParallelGroup, parts, share_heads, to_heads, to_tokens

    rows, place = both.rows, both.group.place
    heads, kv = both.bench.shape["num_attention_heads"], both.bench.shape["num_key_value_heads"]
    tokens, size = both.bench.size(64_000), both.bench.shape["hidden_size"] // heads
    shared = share_heads(heads, kv, place.world_size)
    own = parts(tokens, place.world_size)[place.rank]
    dtype = torch.bfloat16 if rows.ON_GPU else torch.float32
    query, key = (torch.randn(own.stop - own.start, n, size, dtype=dtype, device=rows.DEVICE) for n in (heads, kv))
    sp_group = SequenceParallelGroup(both.group, lambda: both.group.exchange(0))
    times = []
    for _ in range(4):
        both.group.gather("begin", 0)
        rows.sync()
        began = time.perf_counter()
        sent = [[query[:, q], key[:, k], key[:, k]] for q, k in zip(shared.queries, shared.keys, strict=True)]
        whole = to_heads(sp_group, tokens, sent)
        out = whole[:, : shared.counts(place.rank)[0]].contiguous()
        back = torch.cat(to_tokens(sp_group, out, [q.stop - q.start for q in shared.queries]), 1)
        rows.sync()
        times.append(1000 * (time.perf_counter() - began))
        assert torch.equal(back, query)
    moved = (query.nbytes * 2 + 2 * key.nbytes) * (place.world_size - 1) / place.world_size
    both.say("exchange", tokens=tokens, milliseconds=min(times[1:]), gigabytes_sent=moved / 1e9)


def exact(both: Both) -> None:
    """Gradients of one GPU and of all."""
    tokens = both.bench.size(20_001)
    alone = both.run("exact", tokens, 2, together=False, kept_attention=True)
    first, again = (both.run("exact", tokens, 2, together=True, kept_attention=kept) for kept in (True, False))
    both.compare("exact: all together against one", first, alone)
    both.compare("exact: all together again, attention computed again", again, first)
    tile = both.rows.NOW.tile_tokens // 2
    other = both.run("exact: half the tile", tokens, 2, together=False, kept_attention=True, tile_tokens=tile)
    both.compare("exact: one with half the tile against one", other, alone)


def row64k(both: Both) -> None:
    """64,000 tokens."""
    tokens, layers = both.bench.size(64_000), both.bench.layers
    alone = both.run("row64k", tokens, layers, together=False, kept_attention=True)
    for _ in range(2):
        shared = both.run("row64k", tokens, layers, together=True, kept_attention=True)
    both.compare("row64k: all together against one", shared, alone)


def whole64k(both: Both) -> None:
    """64,000 tokens through all layers."""
    both.run("whole64k", both.bench.size(64_000), None, together=True, kept_attention=True)


def cap24(both: Both) -> None:
    """140,000 tokens; the limit does not count the CUDA context."""
    import torch

    tokens, how = both.bench.size(140_000), {"offloaded": True, "kept_attention": False}
    if both.rows.ON_GPU:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / total))
    shared = both.run("cap24", tokens, 2, together=True, **how)
    if both.rows.ON_GPU:
        torch.cuda.set_per_process_memory_fraction(1.0)
    both.compare("cap24: all together against one", shared, both.run("cap24", tokens, 2, together=False, **how))


SECTIONS: tuple[Callable[[Both], None], ...] = (exchange, exact, row64k, whole64k, cap24)


def measure(args: argparse.Namespace, began: float) -> None:
    """One process's part."""
    from job.distributed.ranks import Place
    from job.distributed.rendezvous import join
    from job.model.device import make_deterministic
    from job.preemption.stop_flag import StopFlag
    from job.training import long_rows, memory_model, micro_batch, step

    if args.tiny:
        for module in (long_rows, memory_model, micro_batch, step):
            module.LONG_ROW = 200
    else:
        make_deterministic()
    place = Place(args.rank, args.processes, args.rank, args.processes, "localhost", args.port)
    joining: dict[str, Any] = {"timeout_seconds": 120, "grace_seconds": 10}
    with join(place, "bench", stop=StopFlag(), report_progress=lambda: None, **joining) as group:
        both = Both(args, group, began)
        for section in SECTIONS:
            if group.broadcast("late", lambda: time.monotonic() - began > LATEST):
                both.say("skipped", section=section.__name__)
                continue
            section(both)


def main() -> int:
    """Starts the processes, or runs as one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is None:
        return start(args)
    measure(args, time.monotonic())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
