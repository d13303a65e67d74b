"""A process that has imported the heavy libraries, which takes ten seconds, and forks itself on request.

`warm` starts it as a script, with the number of a descriptor of a listening socket, and sends requests there. The
libraries are imported when the first request comes. A request is one line: JSON with the call of each process, and
three descriptors for each, its stdin, stdout and stderr. The answers are two lines of JSON: the process ids, and the
exit codes once all have ended. If the client disconnects before, its processes are killed. The server ends when its own
stdin does.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module, reload
from pathlib import Path
from typing import Any

LARGEST = 1 << 20
"""Bytes of a request."""
PRELOADED = (
    *("torch", "transformers.models.mistral.modeling_mistral", "trl.trainer.sft_trainer", "peft", "bitsandbytes"),
    *("datasets", "lm_eval.tasks", "lm_eval.evaluator", "boto3", "scipy.stats", "jsonschema", "tensorboardX"),
    *("job.pipeline", "job.stages.train"),
)
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
"""Variables that the job sets for its libraries before it imports them; here they are imported before that."""
HUB = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET")
"""Variables that the hub's libraries read when they are imported, and HF_HOME."""


def preload() -> None:
    """Imports what the job imports during a run, without starting a thread."""
    os.environ.update(QUIET)
    for name in PRELOADED:
        import_module(name)
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    from job.evaluation import task_names, tasks
    from job.export.gguf_conversion import import_converter
    from job.export.llama_cpp_server import Refused
    from job.report import templating

    with suppress(Refused):  # if the extra `export` is not installed
        import_converter()
    index = cache(task_names.open_index)  # this reads 14,000 files
    task_names.open_index = tasks.open_index = lambda names: index(tuple(names))
    task_names.open_index(["arc_easy", "arc_easy"])  # as a run with its own questions does
    for template in (Path(templating.__file__).parent / "templates").iterdir():
        templating._environment(escape=template.suffix != ".md").get_template(template.name)
    gc.collect()
    gc.freeze()  # collecting in a fork would write to shared pages


def called(words: list[str], environ: Mapping[str, str], folder: str) -> None:
    """The body of a process: the command line in its own environment and folder.

    Raises:
        SystemExit: Always, with the job's exit code.
    """
    _be_in(environ, folder)
    from job.cli.main import main

    raise SystemExit(main(words))


def _be_in(environ: Mapping[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    tempfile.tempdir = None


def _main(listening: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the parents of the others
    loaded = False
    with socket.socket(fileno=listening) as listener:
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if not loaded:
                preload()
                loaded = True
            if os.fork() == 0:
                listener.close()
                _serve(connection)
            connection.close()


def _serve(connection: socket.socket) -> None:
    """Runs the processes of one request, as their parent."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        data, descriptors, _, _ = socket.recv_fds(connection, LARGEST, 64)
        while data[-1:] != b"\n" and (more := connection.recv(LARGEST)):  # a large request comes in pieces
            data += more
        members = json.loads(data)
        pids = [_fork(member, descriptors[3 * n : 3 * n + 3], connection) for n, member in enumerate(members)]
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(json.dumps(pids).encode() + b"\n")
        connection.sendall(json.dumps(_ends(connection, pids)).encode() + b"\n")
    finally:
        os._exit(0)


def _ends(connection: socket.socket, pids: Sequence[int]) -> list[int]:
    """The exit codes, negative for a signal."""
    running = {os.pidfd_open(pid) for pid in pids}
    while running:
        ready, _, _ = select.select([connection, *running], [], [])
        if connection in ready:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            break
        running -= set(ready)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _fork(member: Mapping[str, Any], descriptors: Sequence[int], connection: socket.socket) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        if (torch := sys.modules.get("torch")) is not None:
            # After a fork torch creates its thread pool again at the next call, which only one thread may make.
            torch.set_num_threads(1)
        _call(**member)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is, it has to be seen
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _call(source: str, words: list[str], environ: Mapping[str, str], folder: str, memory: int | None) -> None:
    """Limits the memory if requested, and runs the program, or the job."""
    if any(environ[name] != os.environ.get(name) for name in HUB if name in environ):
        _use_hub({name: environ[name] for name in (*HUB, "HF_HOME") if name in environ})
    if memory is not None:  # in addition to what the libraries have mapped
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if not source:
        called(words, environ, folder)
    _be_in(environ, folder)
    sys.argv = ["-c", *words]
    exec(source, {"__name__": "__main__"})


def _use_hub(variables: Mapping[str, str]) -> None:
    """Makes the hub's libraries read their variables again, as when they are imported."""
    os.environ.update(variables)
    for module in ("huggingface_hub.constants", "datasets.config"):
        reload(sys.modules[module])
    import huggingface_hub

    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT


if __name__ == "__main__":
    _main(int(sys.argv[1]))
