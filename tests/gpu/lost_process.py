"""One of two GPUs' processes ends during a step: `python tests/gpu/lost_process.py [--tiny]` prints JSON lines.

    killed            after it has launched its gradient, but not its part of the all-reduce. The other process has then
                      launched its part, and clipping and the optimizer after it, which never begin. It must notice,
                      save the previous step, and end.
    killed in step 1  the same with nothing to save yet: it must notice.
    failed            by an error after it has launched its part of the all-reduce, which may then complete. What the
                      other one saves must be consistent.

A resumed pair must end with the bits of an undisturbed one. `--optimizer NAME` sets another optimizer than adamw_8bit,
`--only` selects some of the three. `--tiny` tries the script itself on a CPU. Each of six pairs takes about 35 s on two
H200s.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path[:0] = [str(Path(__file__).parents[1] / "bench"), str(Path(__file__).parents[2])]

STEPS, ENDS_IN = 8, 6
ENDS = {"killed": ("--kill", ENDS_IN), "failed": ("--fail", ENDS_IN), "killed in step 1": ("--kill", 1)}


def pair(chosen: argparse.Namespace, folder: Path, name: str, *more: str) -> list[int]:
    """Runs two processes to their end; returns their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, *(["--tiny"] if chosen.tiny else []), "--optimizer", chosen.optimizer]
    command += ["--folder", str(folder / name), *more]
    members = [
        subprocess.Popen(
            [*command, "--port", str(port), "--rank", str(rank)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(rank)},
        )
        for rank in range(2)
    ]
    return [member.wait() for member in members]


def train_part(chosen: argparse.Namespace) -> None:
    """One process of a pair; process 0 prints the outcome."""
    import gpu  # is in tests/bench
    import torch

    from job.distributed.process_group import ProcessGroup
    from job.distributed.ranks import Place
    from job.distributed.rendezvous import join
    from job.errors import JobError
    from job.preemption.stop_flag import StopFlag
    from job.training.config import Hooks
    from job.training.trainer import train

    if (chosen.kill or chosen.fail) and chosen.rank == 1:
        launch, calls = ProcessGroup.start_all_reduce, []

        def ends(self: ProcessGroup, tensor: Any) -> Any:
            calls.append(time.monotonic())
            if len(calls) == chosen.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            wait = launch(self, tensor)
            if len(calls) == chosen.fail:
                raise RuntimeError("an error after the sum was launched")
            return wait

        ProcessGroup.start_all_reduce = ends  # type: ignore[method-assign]
    place = Place(chosen.rank, 2, chosen.rank, 2, "localhost", chosen.port)
    bench = gpu.Bench(chosen.tiny, chosen.folder, 4, [])
    bench.say = lambda *_, **__: None  # type: ignore[method-assign]
    saved: list[str] = []
    told: list[float] = []
    began = time.monotonic()
    hooks = Hooks(lambda _: told.append(time.monotonic()), lambda path, _: saved.append(path.name), lambda: False)
    ended = "whole"
    try:
        with join(
            place, "lost", stop=StopFlag(), report_progress=lambda: None, timeout_seconds=120, grace_seconds=10
        ) as processes:
            model = gpu.adapted(bench)
            gpu.prepare(model, gpu.BEST)
            train(
                model,
                gpu.shapes.tokenizer(),
                bench.data,
                recipe=replace(
                    gpu.recipe_of(bench, gpu.BEST, STEPS, 32 if not chosen.tiny else 8), optimizer=chosen.optimizer
                ),
                plan=gpu.plan_of(gpu.BEST),
                hooks=hooks,
                folder=chosen.folder,
                resume=chosen.resume,
                processes=processes,
            )
    except (JobError, RuntimeError) as error:
        ended = f"{type(error).__name__}: {error}"[:200]
    if chosen.rank == 0:
        state = torch.cuda.memory_reserved() if gpu.ON_GPU else None
        figures = {
            "ended": ended,
            "saved": saved,
            "steps": len(told),
            "adapter": gpu.bits_of(model) if ended == "whole" else None,
            "seconds_after_the_last_step": round(time.monotonic() - (told or [began])[-1], 2),
            "reserved": state,
        }
        print(json.dumps({"what": chosen.folder.name, **figures}), flush=True)
    os._exit(0 if ended == "whole" else 1)  # as the job ends: nothing waits for a kernel that never ends


def main() -> int:
    """Runs the pairs, or runs as a process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    for name in ("--rank", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    for name in ("--folder", "--resume"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--optimizer", default="adamw_8bit")
    parser.add_argument("--only", nargs="+", choices=list(ENDS), default=list(ENDS))
    for name in ("--kill", "--fail"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank is not None:
        chosen.folder.mkdir(exist_ok=True)
        train_part(chosen)
        return 0
    folder = Path(tempfile.mkdtemp())
    began = time.monotonic()
    codes = {}
    if chosen.only != ["killed in step 1"]:
        codes["undisturbed"] = pair(chosen, folder, "undisturbed")
    for name in chosen.only:
        how, step = ENDS[name]
        codes[name] = pair(chosen, folder, name, how, str(step))
        if saved := sorted((folder / name).glob("step-*")):
            codes[f"{name}, resumed"] = pair(chosen, folder, f"{name}, resumed", "--resume", str(saved[-1]))
    print(json.dumps({"what": "ends", "codes": codes, "seconds": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
