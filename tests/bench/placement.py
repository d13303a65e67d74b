"""Training with a base larger than the GPU's memory: `python tests/bench/placement.py [--tiny] [SECTION ...]`.

Llama-70B's shape with random NF4 bytes, Alpaca's real lengths, a few steps by the job's own trainer with the plan that
it chooses. A limit on torch's allocator simulates a smaller GPU.

    load       a base from files: bits of its weights, and peak memory, by placement
    exact      a small model: losses and adapter with its weights on the GPU, in main memory and, on two GPUs or more,
               sharded; killed and resumed in each placement
    host       weights in main memory, 24 GB of the GPU
    gpu        weights on the GPU, 80 GB of it
    sharded    weights sharded over two GPUs, 30 GB of each

Each section runs in separate processes that this script starts; every finding is a line of JSON. Without sections:
those that the GPUs here allow. --tiny tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink's multicast, which GPUs that are assigned singly do not have
sys.path.insert(0, str(Path(__file__).parents[2]))

from job.training.gpu_memory import limit_memory
from job.training.setup_of_model import setup_of

SMALL = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 7}
SMALL |= {"num_attention_heads": 16, "num_key_value_heads": 4}
LLAMA_70B = {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B |= {"num_attention_heads": 64, "num_key_value_heads": 8}
TINY = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
STEPS, KILLED_AT, SAVED_EVERY = 6, 4, 3
WARMUP = 2
"""Steps that are not timed."""
TIMEOUT = 200
"""Seconds of a group of processes."""


@dataclass(frozen=True)
class Way:
    """One training. `killed`: process 0 kills itself after step `KILLED_AT`; `resumed`: from its checkpoint."""

    name: str
    place: str
    gigabytes: float | None = None
    budget: int = 4096
    killed: bool = False
    resumed: bool = False
    large: bool = False
    loaded: bool = False
    """The base is only loaded, from files."""


SECTIONS: dict[str, tuple[int, list[list[Way]]]] = {
    "load": (1, [[Way(f"load, {place}", place, loaded=True) for place in ("gpu", "host", "sharded")]]),
    "exact": (
        1,
        [
            [Way("gpu", "gpu"), Way("host", "host"), Way("host, killed", "host", killed=True)],
            [Way("host, resumed", "host", resumed=True)],
        ],
    ),
    "exact sharded": (
        2,
        [
            [Way("gpu, 2", "gpu"), Way("sharded", "sharded"), Way("sharded, killed", "sharded", killed=True)],
            [Way("sharded, resumed", "sharded", resumed=True)],
        ],
    ),
    "host": (1, [[Way("70B, host, 24 GB", "host", 24, large=True)]]),
    "gpu": (1, [[Way("70B, gpu, 80 GB", "gpu", 80, large=True)]]),
    "sharded": (2, [[Way("70B, sharded, 2 x 30 GB", "sharded", 30, budget=2048, large=True)]]),
}
"""Number of processes, and the groups that are started one after the other, each for some trainings."""


def say(what: str, **figures: Any) -> None:
    """One finding."""
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps({"what": what, **rounded}), flush=True)


# The processes that train.


def random_base(shape: dict[str, int], place: str, device: Any, processes: Any) -> Any:
    """A random Llama in bf16 with layers of random NF4 bytes, made layer by layer in their placement."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import LlamaConfig, LlamaForCausalLM

    from job.model import packed_attention
    from job.model.placed_loading import placing

    packed_attention.register()
    how = {"attn_implementation": packed_attention.NAME, "use_cache": False, "max_position_embeddings": 4096}
    random = torch.Generator(device).manual_seed(0)
    templates: dict[tuple[int, int], Any] = {}

    def weight(outputs: int, inputs: int) -> Any:
        """A weight with the constants of a real quantization, and random packed values."""
        if (outputs, inputs) not in templates:
            real = 0.02 * torch.randn(outputs, inputs, generator=random, device=device, dtype=torch.bfloat16)
            templates[outputs, inputs] = quantize_4bit(real, compress_statistics=True, quant_type="nf4")[1]
        state = templates[outputs, inputs]
        packed = torch.randint(0, 256, (outputs * inputs // 2, 1), generator=random, device=device, dtype=torch.uint8)
        own = Params4bit.from_prequantized(
            packed, {name: one.clone() for name, one in state.as_dict(packed=True).items()}, device=device
        )
        own.requires_grad_(requires_grad=False)
        return own

    with ExitStack() as stack:
        placed = None if place == "gpu" else stack.enter_context(placing(place, device, processes))
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                model = LlamaForCausalLM(LlamaConfig(**shape, **how))
        finally:
            torch.set_default_dtype(torch.float32)
        for name, parameter in list(model.named_parameters()):
            parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if ".layers." in name and parameter.ndim == 2:
                continue
            value = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
            if parameter.ndim == 2:
                value.normal_(0, 0.02, generator=random)
            setattr(parent, leaf, torch.nn.Parameter(value, requires_grad=False))
        with device:
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        for layer in model.model.layers:
            linears = [
                (parent, name, linear)
                for parent in (layer.self_attn, layer.mlp)
                for name, linear in parent.named_children()
                if isinstance(linear, torch.nn.Linear)
            ]
            for parent, name, linear in linears:
                with torch.device("meta"):
                    small = Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16
                    )
                small.support_avx512bf16_for_cpu = False
                setattr(parent, name, small)
            for parent, name, linear in linears:
                small = getattr(parent, name)
                small.weight = weight(linear.out_features, linear.in_features)
                small.quant_state = small.weight.quant_state
                small.weight.module = small
        if placed is not None:
            placed.finish(model)
    model.is_loaded_in_4bit = True
    return model.eval()


def work(args: argparse.Namespace, ways: list[Way]) -> None:
    """The work of one of a section's processes."""
    import torch

    from job.distributed.ranks import Place
    from job.distributed.rendezvous import join
    from job.model.device import make_deterministic
    from job.preemption.stop_flag import StopFlag

    if torch.cuda.is_available():
        torch.cuda.set_device(0)
        make_deterministic()
    place = Place(args.rank, args.world, args.rank, args.world, "127.0.0.1", args.port)
    with join(
        place, "bench", stop=StopFlag(), report_progress=lambda: None, timeout_seconds=60, grace_seconds=5
    ) as processes:
        for way in ways:
            (load_one if way.loaded else train_one)(args, way, processes)


def load_one(args: argparse.Namespace, way: Way, processes: Any) -> None:
    """Loads a base from its files, and prints the peak memory of the GPU, and a hash of the weights."""
    import hashlib

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from job.model.fused.frozen_weights import dequantized
    from job.model.load_base import load_base
    from job.model.placed_weights import release, taking_part

    on_gpu, folder = torch.cuda.is_available(), args.folder / "base"
    if not folder.is_dir():
        torch.manual_seed(0)
        shape = TINY if args.tiny else {**SMALL, "num_hidden_layers": 24}
        LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    how: dict[str, Any] = {"quantization": "nf4", "double_quantization": True, "dtype": torch.bfloat16}
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    model = load_base(folder, **how, device=device, max_length=512, placement=way.place, group=processes)
    seconds, total = time.perf_counter() - began, hashlib.sha256()
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    held = torch.cuda.memory_allocated() / 2**20 if on_gpu else None
    with taking_part(model):
        for module in model.modules():
            if hasattr(module, "quant_state"):
                total.update(dequantized(module, torch.float32).cpu().numpy().tobytes())
    say("loaded", place=way.place, seconds=seconds, peak_mib=peak, held_mib=held, weights=total.hexdigest()[:16])
    release(model)


def train_one(args: argparse.Namespace, way: Way, processes: Any) -> None:
    """Builds the model, chooses the plan, trains, and prints speed and memory."""
    import shapes
    import torch

    from job.model.lora import add_adapter, trainable
    from job.model.placed_weights import release, taking_part
    from job.training.config import Hooks, Recipe
    from job.training.memory_model import packed_bytes
    from job.training.prepare import prepare
    from job.training.trainer import train

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    shape = TINY if args.tiny else LLAMA_70B if way.large else SMALL
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0)
        limit_memory(way.gigabytes)
    free = torch.cuda.mem_get_info()[0] if on_gpu else 0
    began = time.perf_counter()
    model = random_base(shape, way.place, device, processes)
    with taking_part(model):
        model = add_adapter(model, rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0)
    if on_gpu:
        torch.cuda.synchronize()
    built = time.perf_counter() - began
    held = torch.cuda.memory_allocated() / 2**30 if on_gpu else None
    # The small model has few rows a step, so that the processes have different numbers of micro-batches.
    rows, budget = (32, way.budget) if way.large and not args.tiny else (7, 256)
    examples = shapes.examples(shape["vocab_size"], 60 if args.tiny else 400)
    lengths = [len(example.input_ids) for example in examples]
    setup = setup_of(model, "nf4", "adamw_8bit")
    how: dict[str, Any] = {"global_batch_size": rows, "budget": budget, "gigabytes": way.gigabytes}
    placement = None
    if on_gpu and way.large and setup is not None:
        # What the job would have chosen with the whole GPU free; the base is already loaded.
        limit = min(free, int((way.gigabytes or 1e9) * 1e9))
        placement = chosen_place(setup, budget, limit, processes.place.world_size)
    plan = prepare(
        model,
        lengths,
        quantization="nf4",
        optimizer="adamw_8bit",
        keep_base="auto",
        recompute="auto",
        processes=processes.place.world_size,
        **how,
    )
    recipe = Recipe(
        seed=0,
        total_steps=STEPS - way.large,
        learning_rate=2e-4,
        scheduler="linear",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        global_batch_size=rows,
        micro_batch_tokens=budget,
        optimizer="adamw_8bit",
        save_every_steps=SAVED_EVERY,
    )
    ended: list[float] = []

    def on_metrics(metrics: Any) -> None:
        ended.append(time.perf_counter())
        if way.killed and metrics.step == KILLED_AT and processes.leads:
            os.kill(os.getpid(), signal.SIGKILL)

    folder = args.folder / way.place
    resume = folder / f"step-{SAVED_EVERY:08d}" if way.resumed else None
    trained = train(
        model,
        shapes.tokenizer(),
        examples,
        recipe=recipe,
        plan=plan,
        hooks=Hooks(on_metrics, lambda *_: None, lambda: False),
        folder=folder if way.killed else Path(tempfile.mkdtemp(dir=args.folder)),
        resume=resume,
        processes=processes,
    )
    spent = [after - before for before, after in pairwise(ended)][WARMUP - 1 :]
    targets = [step.target_tokens for step in trained.history[-len(spent) :]] if spent else []
    if processes.leads:
        say(
            "trained",
            way=way.name,
            processes=processes.place.world_size,
            place=way.place,
            chosen=placement,
            cap_gb=way.gigabytes,
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
            held_gib=held,
            packed_gib=packed_bytes(setup) / 2**30 if setup is not None else None,
            build_seconds=built,
            step_seconds=[round(one, 3) for one in spent],
            tokens_per_second=sum(targets) / sum(spent) if spent else None,
            plan=plan.reason,
            kept_activations=trained.plan.kept_activations,
            recorded=trained.plan.recorded,
            budget=trained.micro_batch_tokens,
            losses=[step.loss for step in trained.history],
            adapter=bits(trainable(model).values()),
        )
    release(model)


def chosen_place(setup: Any, tokens: int, limit: int, processes: int) -> str:
    """The placement that the job would choose, with so many bytes of GPU memory."""
    from dataclasses import replace

    from job.common.gpu_context import CONTEXT_BYTES
    from job.training.execution_plan import choose_placement
    from job.training.memory_model import PLACEMENTS, evaluation_bytes, training_memory

    def needs(there: Any) -> int:
        return max(training_memory(there, tokens).total, evaluation_bytes(there, 8192, 4096))

    places = [place for place in PLACEMENTS if place != "sharded" or processes > 1]
    there = replace(setup, processes=processes)
    return choose_placement(there, memory_bytes=limit + CONTEXT_BYTES, placements=places, needs=needs)


def bits(parameters: Any) -> str:
    """A short hash of the adapter."""
    import hashlib

    total = hashlib.sha256()
    for parameter in parameters:
        total.update(parameter.detach().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


# The process that starts them.


def run_group(args: argparse.Namespace, section: str, number: int, world: int, folder: Path) -> list[dict[str, Any]]:
    """Starts a group of processes; prints and returns their findings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began, members = time.monotonic(), []
    for rank in range(world):
        command = [sys.executable, __file__, "--group", section, str(number), "--rank", str(rank)]
        command += ["--world", str(world), "--port", str(port), "--folder", str(folder), *["--tiny"] * args.tiny]
        visible = {} if args.tiny else {"CUDA_VISIBLE_DEVICES": str(rank)}
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        members.append(subprocess.Popen(command, env={**os.environ, **visible}, stdout=out, text=True))
    lines = []
    try:
        text, _ = members[0].communicate(timeout=TIMEOUT)
        codes = [member.wait(timeout=30) for member in members]
    except subprocess.TimeoutExpired:
        text, codes = "", []
        say("failed", where=section, error=f"took more than {TIMEOUT} s")
    finally:
        for member in members:
            member.kill()
    for line in text.splitlines():
        if line.startswith('{"what"'):
            print(line, flush=True)
            lines.append(json.loads(line))
    say("ended", section=section, group=number, codes=codes, seconds=time.monotonic() - began)
    return lines


def compare(lines: list[dict[str, Any]]) -> None:
    """Whether placements, and a killed and resumed run, gave the same bits; else how close their losses are."""
    trained = {line["way"]: line for line in lines if line["what"] == "trained"}
    for name, line in trained.items():
        first = trained.get("gpu, 2" if line["processes"] > 1 else "gpu")
        if first is None or line is first:
            continue
        pairs = list(zip(line["losses"], first["losses"], strict=True))
        say(
            "exact",
            way=name,
            against=first["way"],
            same_losses=line["losses"] == first["losses"],
            same_adapter=line["adapter"] == first["adapter"],
            largest_relative_difference=max(abs(a - b) / abs(b) for a, b in pairs),
        )


def main() -> int:
    """Starts sections, or runs as one of their processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sections", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--group", nargs=2, metavar=("SECTION", "NUMBER"), help=argparse.SUPPRESS)
    for name in ("--rank", "--world", "--port"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group:
        section, number = args.group
        work(args, SECTIONS[section][1][int(number)])
        return 0
    import torch

    gpus = 2 if args.tiny else torch.cuda.device_count()
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        say("machine", gpu=gpu.name, gpus=gpus, memory=gpu.total_memory, torch=torch.__version__)
    default = ["exact sharded", "sharded"] if gpus > 1 and not args.tiny else list(SECTIONS)
    for section in args.sections or [name for name in default if SECTIONS[name][0] <= gpus]:
        world, groups = SECTIONS[section]
        lines: list[dict[str, Any]] = []
        try:
            with tempfile.TemporaryDirectory() as folder:
                for number in range(len(groups)):
                    lines += run_group(args, section, number, world, Path(folder))
                if section.startswith("exact"):
                    compare(lines)
        except Exception as error:  # noqa: BLE001 - the next section shall have its turn
            say("failed", where=section, error=f"{type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc(limit=-6)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
