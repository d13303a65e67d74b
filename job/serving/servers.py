"""The servers that can be asked: one table.

How to add a server: an entry in `SERVERS`, with how it reports log-probabilities, what has to be installed and, if
`serve-check` is to start it, its command line. Of the three ways to ask, `echo` and `forced` compare log-likelihoods
with the records, `greedy` only the server's greedy answers.

    echo       one request for the question and one a choice: the server repeats them, with the log-probability of every
               token
    forced     one request a token: a bias on its logit forces it, and the server reports its probability without the
               bias
    greedy     one request a question: the most probable continuation, which may begin with one of the choices
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from job.common.lora_readers import admitted_rank
from job.errors import Problem, SettingsError, Unreachable
from job.serving.client import Client
from job.settings.load import environment

NAME = "run"
"""What a server that is started here calls the model."""
_START_SECONDS = 600
_FORCED = 1e9
"""Added to the logit of the token to be sampled: more than any logit."""
DELIMITER = " "
"""lm-eval's, between a question and a choice."""


@dataclass(frozen=True)
class Model:
    """What is served: the folder with its files, and for an adapter its base and rank."""

    format: str
    folder: Path
    base: str | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Answer:
    """The log-likelihoods of the choices; or of a greedy answer the choice that it begins with, if it does."""

    log_likelihoods: tuple[float, ...] | None
    prediction: int | None


Ask = Callable[[Client, str, str, Sequence[str]], Answer]
"""(server, name of the model there, question, choices) -> its answer."""


@dataclass(frozen=True)
class Server:
    """A kind of server.

    Attributes:
        way: How it reports log-probabilities; see the top of this file.
        serves: Whether it serves a format.
        owner: What it calls itself in `/v1/models`.
        install: What to install, and how, if it is missing.
        needs: Packages of this Python without which it does not start.
        program: What has to be on PATH; None if it is one of those packages.
        command: (model, port) -> its command line; None if it runs in this process.
    """

    way: str
    serves: Callable[[str], bool]
    owner: str
    install: str
    needs: tuple[str, ...] = ()
    program: str | None = None
    command: Callable[[Model, int], list[str]] | None = None

    @property
    def missing(self) -> list[str]:
        """What of it is not installed here."""
        programs = [self.program] if self.program is not None and _program(self.program) is None else []
        return programs + [name for name in self.needs if importlib.util.find_spec(name) is None]


def _vllm(model: Model, port: int) -> list[str]:
    vllm, address = str(_program("vllm")), ["--host", "127.0.0.1", "--port", str(port)]
    if model.format != "adapter":
        return [vllm, "serve", str(model.folder), "--served-model-name", NAME, *address]
    lora = [
        "--enable-lora",
        "--max-lora-rank",
        str(admitted_rank(model.rank or 1)),
        "--lora-modules",
        f"{NAME}={model.folder}",
    ]
    return [vllm, "serve", str(model.base), *lora, *address]


def _transformers(model: Model, port: int) -> list[str]:
    """By this Python's own transformers: the version that scored the model, with the dependencies in `needs`."""
    module = [sys.executable, "-m", "transformers.cli.transformers"]
    return [*module, "serve", str(model.folder), "--host", "127.0.0.1", "--port", str(port)]


def _is_gguf(name: str) -> bool:
    return name.partition(":")[0] == "gguf"


_EXTRA = "pip install '.[export]' in the repository"
SERVERS: Mapping[str, Server] = {
    "vllm": Server(
        "echo",
        lambda name: not _is_gguf(name),
        "vllm",
        "vLLM in a separate environment, with its program on PATH (it needs other versions of packages than the job)",
        program="vllm",
        command=_vllm,
    ),
    "llama.cpp": Server("forced", _is_gguf, "llamacpp", f"xllamacpp: {_EXTRA}", needs=("xllamacpp",)),
    "transformers": Server(
        "greedy",
        lambda name: not _is_gguf(name) and name != "adapter",
        "",
        f"fastapi, openai and uvicorn: {_EXTRA}",
        needs=("fastapi", "openai", "uvicorn"),
        command=_transformers,
    ),
}


def server_kind(client: Client) -> str:
    """The kind of server at an address, from its `/v1/models`; transformers' server does not name itself."""
    models = client.get("/v1/models").get("data") or [{}]
    owner = str(models[0].get("owned_by", ""))
    return next((name for name, server in SERVERS.items() if server.owner and server.owner == owner), "transformers")


def model_name(client: Client, requested: str | None) -> str:
    """The server's name of the model: the requested one, else the last that it lists.

    vLLM lists the base first, and adapters after it.
    """
    if requested is not None:  # the server itself refuses an unknown name
        return requested
    names = [str(model.get("id")) for model in client.get("/v1/models").get("data") or []]
    if not names:
        raise SettingsError([Problem(client.url, "does not serve any model")])
    return names[-1]


def installed_server(model: Model) -> str:
    """The server that is started for a format: the first of the table that is installed here.

    Raises:
        SettingsError: None is; with what to install for each.
    """
    fitting = [name for name, server in SERVERS.items() if server.serves(model.format)]
    for name in fitting:
        if not SERVERS[name].missing:
            return name
    ways = "; or ".join(f"for {name}, install {SERVERS[name].install}" for name in fitting)
    what = f"no server for {model.format} is installed here; give --url of a running one, or {ways}"
    if model.format == "adapter":
        what += "; or check an exported format, such as --served merged"
    raise SettingsError([Problem("--url", what)])


def _program(name: str) -> str | None:
    """On PATH, or next to this Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


@contextmanager
def running_server(name: str, model: Model) -> Iterator[tuple[Client, str]]:
    """A server of this kind, started here and ended after; and the name of the model there.

    Raises:
        SettingsError: It is not installed, or does not serve this format.
        Unreachable: It does not start.
    """
    server = SERVERS[name]
    if not server.serves(model.format):
        raise SettingsError([Problem("--server", f"{name} does not serve {model.format}")])
    if missing := server.missing:
        what = f"{name} cannot be started without {', '.join(missing)}; give --url of a running one, or install"
        raise SettingsError([Problem("--server", f"{what} {server.install}")])
    if server.command is None:
        with _llama(model) as client:
            yield client, model_name(client, None)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}")
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        # No request to the hub: the files are here, and a server that checks for new versions starts late.
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", **({} if model.base else {"HF_HUB_OFFLINE": "1"})}
        process = subprocess.Popen(  # noqa: S603 - a server of the table, with a folder that was made here
            server.command(model, port), stdout=log, stderr=log, env={**environment(), **quiet}
        )
        stack.callback(_end, process)
        until = time.monotonic() + _START_SECONDS
        while not client.is_healthy():
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                tail = log.read()[-1000:].decode(errors="replace")
                raise Unreachable(f"{name} did not start: {tail}")
            time.sleep(0.2)
        yield client, str(model.folder) if name == "transformers" else NAME


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _llama(model: Model) -> Iterator[Client]:
    """llama.cpp's server in this process."""
    import xllamacpp

    files = sorted(model.folder.glob("*.gguf"))
    options = xllamacpp.CommonParams()
    options.model.path = str(files[0]) if files else str(model.folder)
    options.n_parallel, options.verbosity = 1, 1
    options.warmup = options.fit_params = False
    try:
        server = xllamacpp.Server(options)
    except RuntimeError as error:
        raise Unreachable(f"llama.cpp does not load {model.format}: {error}") from error
    yield Client(str(server.listening_address).rstrip("/"))
    del server


def _echo(client: Client, model: str, question: str, choices: Sequence[str]) -> Answer:
    # Tokens are counted, as lm-eval counts them. Offsets in the text are no measure of where the choice begins: the
    # server counts characters of a beginning-of-sequence token, too, and of pieces of a character.
    begin, _ = _echoed(client, model, question)
    scores = []
    for choice in choices:
        end, log_probabilities = _echoed(client, model, f"{question}{DELIMITER}{choice}")
        choice_scores = log_probabilities[begin:end]
        if not choice_scores or None in choice_scores:
            raise SettingsError([Problem(client.url, f"returns no log-probabilities of the choice {choice[:40]!r}")])
        scores.append(math.fsum(score for score in choice_scores if score is not None))
    return Answer(tuple(scores), scores.index(max(scores)))


def _echoed(client: Client, model: str, prompt: str) -> tuple[int, list[float | None]]:
    """How many tokens a prompt has, and the log-probabilities of these and of what is generated after them."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    answer = client.post("/v1/completions", body)
    logprobs, count = answer["choices"][0].get("logprobs") or {}, (answer.get("usage") or {}).get("prompt_tokens")
    if not count or not logprobs.get("token_logprobs"):
        raise SettingsError([Problem(client.url, "returns no log-probabilities; check it with --server transformers")])
    return int(count), logprobs["token_logprobs"]


def _forced(client: Client, model: str, question: str, choices: Sequence[str]) -> Answer:
    context = _tokens(client, question)
    scores = []
    for choice in choices:
        whole = _tokens(client, f"{question}{DELIMITER}{choice}")
        scores.append(
            math.fsum(_forced_token(client, model, whole[:at], whole[at]) for at in range(len(context), len(whole)))
        )
    return Answer(tuple(scores), scores.index(max(scores)))


def _tokens(client: Client, text: str) -> list[int]:
    body = {"content": text, "add_special": True, "parse_special": True}
    return [int(token) for token in client.post("/tokenize", body)["tokens"]]


def _forced_token(client: Client, model: str, before: Sequence[int], token: int) -> float:
    """The log-probability of a token, before the bias that forces it."""
    body = {
        "model": model,
        "prompt": list(before),
        "n_predict": 1,
        "n_probs": 1,
        "logit_bias": [[token, _FORCED]],
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": True,
    }
    answer = client.post("/completion", body)
    probabilities = answer.get("completion_probabilities") or []
    if len(probabilities) != 1 or probabilities[0].get("id") != token:
        what = f"returns no log-probability of token {token}; is it llama.cpp's server?"
        raise SettingsError([Problem(client.url, what)])
    return float(probabilities[0]["logprob"])


def _greedy(client: Client, model: str, question: str, choices: Sequence[str]) -> Answer:
    longest = max(map(len, choices))
    body = {"model": model, "prompt": question, "max_tokens": min(longest + 2, 64), "temperature": 0}
    text = str(client.post("/v1/completions", body)["choices"][0]["text"]).strip()
    matches = [(len(choice), index) for index, choice in enumerate(choices) if text.startswith(choice.strip())]
    return Answer(None, max(matches)[1] if matches else None)


WAYS: Mapping[str, Ask] = {"echo": _echo, "forced": _forced, "greedy": _greedy}
