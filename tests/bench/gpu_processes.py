"""How much faster several GPUs train and score than one: `python tests/bench/gpu_processes.py [--tiny]`.

A process for each GPU, with a random model of Mistral-7B's shape and Alpaca's lengths. Each first trains and scores
alone, all at the same time, and then all together. Efficiency is the speed together over the sum of the speeds alone;
steps in which a CUDA graph is recorded are left out. Prints JSON lines. On two H200s `--batches 32` took 122 s and
`--batches 128 --steps 16` 59 s, of which imports and the model take 20 to 40. `--processes N` sets the number of
processes, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))


def say(what: str, **figures: Any) -> None:
    """One finding."""
    print(json.dumps({"what": what, **{k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}}))
    sys.stdout.flush()


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def start(args: argparse.Namespace) -> int:
    """Starts the processes and waits for them; the first code that is not 0."""
    port, folder = free_port(), tempfile.mkdtemp()
    shared = [*(["--tiny"] if args.tiny else []), "--steps", str(args.steps), "--processes", str(args.processes)]
    shared += ["--batches", *map(str, args.batches)]
    command = [sys.executable, __file__, *shared, "--port", str(port), "--out", folder]
    members = [
        subprocess.Popen([*command, "--rank", str(rank)], env={**os.environ, "CUDA_VISIBLE_DEVICES": str(rank)})
        for rank in range(args.processes)
    ]
    return max(abs(member.wait()) for member in members)


def measure(args: argparse.Namespace, began: float) -> None:
    """The work of one process."""
    import gpu  # lies beside this script
    import torch

    from job.distributed.processes import ALONE
    from job.distributed.ranks import Place
    from job.distributed.rendezvous import join
    from job.preemption.stop_flag import StopFlag

    count = args.processes
    place = Place(args.rank, count, args.rank, count, "localhost", args.port)
    bench = gpu.Bench(args.tiny, args.out / str(args.rank), 4, [])
    bench.out.mkdir()
    bench.say = lambda *_, **__: None  # type: ignore[method-assign] # only process 0 prints, and only the comparison
    variant = gpu.BEST
    with join(
        place, "bench", stop=StopFlag(), report_progress=lambda: None, timeout_seconds=120, grace_seconds=10
    ) as processes:
        model = gpu.adapted(bench)
        gpu.prepare(model, variant)
        processes.gather("ready", args.rank)

        def tell(what: str, **figures: Any) -> None:
            if processes.leads:
                say(what, since=time.monotonic() - began, **figures)

        tell("ready", processes=count, device=torch.cuda.get_device_name() if gpu.ON_GPU else "CPU")
        for batch in args.batches if not args.tiny else (8,):
            measurements = [
                gpu.fit(bench, model, variant, total_steps=args.steps, batch=batch, processes=those)
                for those in (ALONE, processes)
            ]
            # What the GPU loses by having only its share of the rows, independently of the others.
            share = gpu.fit(bench, model, variant, total_steps=args.steps, batch=batch // count)
            shares = processes.gather("speeds with a share", share["steady_tokens_per_second"])
            alone, together = (one["steady_tokens_per_second"] for one in measurements)
            speeds = processes.gather("speeds alone", alone)  # GPUs differ in speed
            losses = [one["losses"] for one in measurements]
            tell(
                "training",
                batch=batch,
                alone=speeds,
                together=together,
                efficiency=together / sum(speeds),
                alone_with_its_share=shares,
                efficiency_against_that=together / sum(shares),
                alone_milliseconds=measurements[0]["steady_milliseconds"],
                milliseconds=measurements[1]["steady_milliseconds"],
                worst_loss=max(abs(a / b - 1) for a, b in zip(*losses, strict=True)),
                steps=args.steps,
            )
        flat = torch.zeros(sum(p.numel() for p in gpu.trainable(model).values()), device=gpu.DEVICE)
        tell("sum", bytes=flat.nbytes, milliseconds=timed(lambda: processes.all_reduce(flat), gpu.sync))
        tell("agree", milliseconds=timed(lambda: processes.agree(repeat=False), gpu.sync))
        evaluation(bench, model, args, tell, processes)


def timed(call: Any, sync: Any) -> float:
    """Milliseconds of a call: the median of nine after a warm-up call."""
    times = []
    for _ in range(10):
        sync()
        began = time.perf_counter()
        call()
        sync()
        times.append((time.perf_counter() - began) * 1000)
    return sorted(times[1:])[4]


def evaluation(bench: Any, model: Any, args: argparse.Namespace, tell: Any, processes: Any) -> None:
    """All questions by each process alone, then by all processes together, divided as in a run."""
    import gpu

    from job.evaluation.parallel_scoring import ParallelScoring
    from job.evaluation.scorer import score_questions

    asked = gpu.shapes.questions(bench.shape["vocab_size"], 40 if args.tiny else None)
    tokens = 8192 if not args.tiny else 512
    gpu.prepare(model, replace(gpu.BEST))
    model.eval()
    score_questions(model, asked[:200], tokens)
    scores, seconds = [], []
    for together in (False, True):
        processes.gather("begin", args.rank)
        began = time.perf_counter()
        parallel = ParallelScoring(processes, lambda **_: None)
        if together and not processes.leads:
            parallel.help(model)
            continue
        scores.append(score_questions(model, asked, tokens, score=parallel.score if together else None))
        if together:
            parallel.finish()
        seconds.append(time.perf_counter() - began)
    if processes.leads:
        tell(
            "evaluation",
            questions_per_second=[len(asked) / one for one in seconds],
            efficiency=seconds[0] / seconds[1] / args.processes,
            same_bits=scores[0] == scores[1],
        )


def main() -> int:
    """Starts the processes, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=141, help="default: 3 epochs of 1,500 rows, 32 a step")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128], help="examples of a step")
    parser.add_argument("--processes", type=int, default=0, help="default: as many as there are GPUs")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    began = time.monotonic()
    if args.rank is None:
        if not args.processes:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
            args.processes = len(listed.splitlines())
        return start(args)
    measure(args, began)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
