"""`serve-check` with servers on this machine that answer like vLLM, llama.cpp and transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import AccessDenied, SettingsError, Unreachable, VerificationError
from job.evaluation.samples import Sample
from job.records import NEAR, Asked, ServeCheck
from job.serving.check import Served, as_json, as_lines, require_alike, serve_check
from job.serving.client import Client
from job.serving.servers import (
    SERVERS,
    WAYS,
    Answer,
    Model,
    _end,
    installed_server,
    model_name,
    running_server,
    server_kind,
)
from tests.dataset_hub import serving

CHOICES = ("Sorrowby", "Gulholm", "Dunmarsh")
QUESTIONS = tuple(f"Question: Where is the home of number {n}?\nAnswer:" for n in range(6))


def likelihood(question: str, choice: str) -> float:
    """What the model of these tests gives to a choice: the sum over its tokens, which are words of three letters."""
    return sum(token_likelihood(question, token) for token in tokens(f" {choice}"))


def token_likelihood(question: str, token: str) -> float:
    """Of one token, the same wherever it stands."""
    return -hashlib.sha256(f"{question[-20:]}{token}".encode()).digest()[0] / 64


def tokens(text: str) -> list[str]:
    """A text in tokens."""
    return re.findall(r"(?s).{1,3}", text)


def record(question: str) -> Sample:
    """The record that belongs to this model."""
    scores = [likelihood(question, choice) for choice in CHOICES]
    best = scores.index(max(scores))
    return Sample(
        id=question[-10:],
        doc_hash="0" * 64,
        prompt_hash=hashlib.sha256(question.encode()).hexdigest(),
        target_hash="0" * 64,
        question=question,
        choices=list(CHOICES),
        log_likelihoods=scores,
        choice_lengths=[len(choice) for choice in CHOICES],
        prediction=best,
        prediction_norm=best,
        gold=0,
        acc=float(best == 0),
        acc_norm=None,
    )


SAMPLES = [("quiz", record(question)) for question in QUESTIONS]


class OpenAI(BaseHTTPRequestHandler):
    """A server; derived classes are of one kind each, and may be wrong."""

    owner = "vllm"
    wrong = 0.0
    """Added to the log-likelihood of the last choice's first token."""
    key: str | None = None

    def do_GET(self) -> None:
        """Lists the model."""
        self._answer({"data": [{"id": "base", "owned_by": self.owner}, {"id": "run", "owned_by": self.owner}]})

    def do_POST(self) -> None:
        """Completes, or makes tokens."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
            self._answer({}, 401)
        elif body.get("stream"):
            lines = [f'data: {{"choices": [{{"text": "{word}"}}]}}\n\n' for word in ("one", "two", "")]
            self._send("".join([*lines, "data: [DONE]\n\n"]).encode(), 200)
        elif self.path == "/tokenize":
            self._answer({"tokens": self._ids(body["content"])})
        else:
            assert body["model"] == "run"
            self._answer(self.complete(body))

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM does with `echo`: log-probabilities of the prompt, and of one token more.

        The prompt begins with a token that is not in it, as a server of Llama or Mistral puts it there.
        """
        prompt = body["prompt"]
        question = next(question for question in QUESTIONS if prompt.startswith(question))
        parts = ["<s>", *tokens(question), *tokens(prompt.removeprefix(question)), "."]
        offsets = [sum(map(len, parts[:at])) for at in range(len(parts))]
        scores = [None, *(self.score(question, part) for part in parts[1:])]
        return {
            "choices": [{"text": f"{prompt}.", "logprobs": {"token_logprobs": scores, "text_offset": offsets}}],
            "usage": {"prompt_tokens": len(parts) - 1},
        }

    def score(self, question: str, token: str) -> float:
        """The log-probability of a token."""
        return token_likelihood(question, token) + self.wrong * (token == f" {CHOICES[2][:2]}")

    def _ids(self, text: str) -> list[int]:
        question = next(question for question in QUESTIONS if text.startswith(question))
        known = self.server.__dict__.setdefault("known", [])
        found = [f"{question}|{part}" for part in (*tokens(question), *tokens(text.removeprefix(question)))]
        known += [one for one in found if one not in known]
        return [known.index(one) for one in found]

    def _answer(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status)

    def _send(self, data: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        """Keeps quiet."""


class Llama(OpenAI):
    """llama.cpp's server: tells the probability of the token that a bias forces."""

    owner = "llamacpp"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One token."""
        ((token, bias),) = body["logit_bias"]
        assert bias > 1e6
        question, _, part = self.server.__dict__["known"][token].partition("|")
        return {"completion_probabilities": [{"id": token, "logprob": self.score(question, part)}]}


class Transformers(OpenAI):
    """transformers' server: says what it says."""

    owner = "somebody"
    said: dict[str, str]

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A greedy answer."""
        return {"choices": [{"text": self.said[body["prompt"]]}]}


@contextmanager
def listening(kind: type[OpenAI], **how: Any) -> Iterator[Served]:
    """A server of a kind that is started here, as it is recognized."""
    with serving(type("Server", (kind,), how)) as address:
        client = Client(address)
        yield Served(client, server_kind(client), "run", "merged")


def check(served: Served, count: int = 50) -> ServeCheck:
    """Asks it."""
    return serve_check(served, SAMPLES, count)


@pytest.mark.parametrize(("kind", "name"), [(OpenAI, "vllm"), (Llama, "llama.cpp")])
def test_log_likelihoods_are_those_of_the_records(kind: type[OpenAI], name: str) -> None:
    """Of the right model every log-likelihood is the same: of the choice all tokens count, of the question none."""
    with listening(kind) as served:
        found = check(served, 5)
    assert (found.server, len(found.asked), found.holds) == (name, 5, True)
    assert max(one.difference or 0 for one in found.asked) < 1e-9
    assert found.tokens_per_second is not None
    assert as_json(found)["alike"] == 5
    assert as_lines(found)[-1] == "holds"
    assert as_lines(found)[2].endswith("5 compared")


@pytest.mark.parametrize("kind", [OpenAI, Llama])
def test_another_model_is_found_out(kind: type[OpenAI]) -> None:
    """A server that likes the last choice more than the record says: exit code 4, with the questions."""
    with listening(kind, wrong=20.0) as served:
        found = check(served)
    assert all(one.served == 2 for one in found.asked)
    with pytest.raises(VerificationError, match=r"recorded choice \d, .* predicts 2"):
        require_alike(found)


def test_a_near_tie_may_go_either_way() -> None:
    """A prediction may differ where the record's two best choices are closer than rounding."""
    near = SAMPLES[0][1].model_copy(update={"log_likelihoods": [-1.0, -1.0 - NEAR / 2, -9.0], "prediction": 0})
    far = near.model_copy(update={"log_likelihoods": [-1.0, -1.0 - 2 * NEAR, -9.0]})
    with listening(OpenAI, wrong=20.0) as served:
        assert serve_check(served, [("quiz", near)], 1).holds
        assert not serve_check(served, [("quiz", far)], 1).holds


def test_greedy_answers_are_compared_where_they_are_a_choice() -> None:
    """A server without log-probabilities: what begins with no choice is not compared, and nothing at all is no pass."""
    right = {sample.question: f" {CHOICES[sample.prediction]}\nand more" for _, sample in SAMPLES}
    with listening(Transformers, said={**right, QUESTIONS[0]: "I do not know"}) as served:
        found = check(served)
    assert (found.way, found.holds, len(found.compared)) == ("greedy", True, 5)
    assert "5 compared; the answers to 1 begin with none of the choices" in as_lines(found)[2]
    others = {sample.question: CHOICES[(sample.prediction + 1) % 3] for _, sample in SAMPLES}
    with listening(Transformers, said=others) as served, pytest.raises(VerificationError, match="recorded choice"):
        require_alike(check(served))
    silent = dict.fromkeys(QUESTIONS, "")
    with listening(Transformers, said=silent) as served, pytest.raises(VerificationError, match="nothing could be"):
        require_alike(check(served))


def test_what_goes_wrong_has_its_code() -> None:
    """No server, one that wants a key, an address that is none, records without a prompt, no server for a format."""
    with pytest.raises(Unreachable):
        server_kind(Client("http://127.0.0.1:9"))
    with pytest.raises(SettingsError, match="--url"):
        server_kind(Client("file:///etc"))
    with listening(OpenAI, key="secret-key-of-a-server") as served:
        with pytest.raises(AccessDenied, match="OPENAI_API_KEY"):
            check(served)
        keyed = Served(Client(served.client.url, "secret-key-of-a-server"), "vllm", "run", "adapter")
        assert check(keyed).holds
        with pytest.raises(SettingsError, match="whole prompt"):
            serve_check(served, [("quiz", SAMPLES[0][1].model_copy(update={"question": "the end"}))], 1)
    with pytest.raises(
        SettingsError, match=r"no server for adapter.*or check an exported format, such as --served merged"
    ):
        installed_server(Model("adapter", Path("/tmp"), "org/base", 16))


def test_command_lines_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM gets the adapter as a LoRA module with the smallest rank limit it knows; the merged model by its folder.

    Every server answers this machine only, at the port that it is told.
    """
    monkeypatch.setattr("shutil.which", lambda name, **_given: f"/bin/{name}")
    vllm, address = SERVERS["vllm"], ["--host", "127.0.0.1", "--port", "8000"]
    assert vllm.command is not None
    lora = ["--enable-lora", "--max-lora-rank", "32", "--lora-modules", "run=/runs/a"]
    adapter = Model("adapter", Path("/runs/a"), "org/base", 24)
    assert vllm.command(adapter, 8000) == ["/bin/vllm", "serve", "org/base", *lora, *address]
    merged = Model("merged", Path("/runs/m"))
    assert vllm.command(merged, 8000) == ["/bin/vllm", "serve", "/runs/m", "--served-model-name", "run", *address]
    unranked = vllm.command(Model("adapter", Path("/runs/a"), "org/base"), 8000)
    assert unranked[unranked.index("--max-lora-rank") + 1] == "8"
    transformers = SERVERS["transformers"]
    assert transformers.command is not None
    module = [sys.executable, "-m", "transformers.cli.transformers"]
    assert transformers.command(merged, 8000) == [*module, "serve", "/runs/m", *address]
    assert [name for name, server in SERVERS.items() if server.serves("gguf:q8_0")] == ["llama.cpp"]


def test_where_the_program_of_a_server_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PATH, which comes first, or next to this Python, whose environment may not be on PATH."""
    for folder in ("path", "environment"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vllm").touch(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "environment/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    command = SERVERS["vllm"].command
    assert command is not None
    for folder in ("path", "environment"):
        assert command(Model("merged", tmp_path), 1)[0] == str(tmp_path / folder / "vllm")
        (tmp_path / folder / "vllm").unlink()
    assert SERVERS["vllm"].missing == ["vllm"]


PROGRAM = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

Path(sys.argv[2]).write_text(json.dumps({"pid": os.getpid(), **os.environ}))
HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""
"""A server that says that it is ready, and writes its environment to a file."""


def as_server(monkeypatch: pytest.MonkeyPatch, program: str, *words: str, name: str = "vllm") -> None:
    """Has a server of the table be this program of Python."""

    def command(_model: Model, port: int) -> list[str]:
        return [sys.executable, "-c", program, str(port), *words]

    server = replace(SERVERS[name], program=None, needs=(), command=command)
    monkeypatch.setattr("job.serving.servers.SERVERS", {**SERVERS, name: server})


@pytest.mark.parametrize(("name", "base"), [("vllm", None), ("vllm", "org/base"), ("transformers", None)])
def test_a_server_that_is_started_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, base: str | None
) -> None:
    """It asks the hub for nothing, unless the base is to come from there; when it is done with, its process is gone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("OF_THIS_MACHINE", "kept")
    as_server(monkeypatch, PROGRAM, str(tmp_path / "environment"), name=name)
    with running_server(name, Model("adapter" if base else "merged", tmp_path, base, 8)) as (client, served):
        assert client.is_healthy()
    assert served == (str(tmp_path) if name == "transformers" else "run")
    found = json.loads((tmp_path / "environment").read_text())
    assert found["HF_HUB_OFFLINE"] == ("0" if base else "1")
    assert (found["HF_HUB_DISABLE_TELEMETRY"], found["OF_THIS_MACHINE"]) == ("1", "kept")
    with pytest.raises(ProcessLookupError):
        os.kill(found["pid"], 0)


def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of what it said is in the error, at once if its process ends, and after a time limit if not."""
    monkeypatch.setattr("job.serving.servers._START_SECONDS", 60)
    says = "import sys; sys.stderr.buffer.write(b'the beginning ' + 2000 * b'\\xe4' + b' the end')"
    as_server(monkeypatch, says)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"^vllm did not start: \ufffd+ the end$"):
        running_server("vllm", Model("merged", tmp_path)).__enter__()
    assert time.monotonic() - began < 50
    monkeypatch.setattr("job.serving.servers._START_SECONDS", 0.3)
    as_server(monkeypatch, "import signal; signal.pause()")
    with pytest.raises(Unreachable, match="vllm did not start"):
        running_server("vllm", Model("merged", tmp_path)).__enter__()


def test_a_server_that_does_not_end_is_killed() -> None:
    """One that ignores the first signal would keep the GPU's memory."""
    calls = list[str]()

    class Process:
        def terminate(self) -> None:
            calls.append("terminate")

        def wait(self, seconds: float | None = None) -> None:
            calls.append(f"wait {seconds}")
            if seconds is not None:
                raise subprocess.TimeoutExpired("it", seconds)

        def kill(self) -> None:
            calls.append("kill")

    _end(Process())  # type: ignore[arg-type]
    assert calls == ["terminate", "wait 20", "kill", "wait None"]


def test_a_format_that_a_server_does_not_serve(tmp_path: Path) -> None:
    """It is refused before anything is started."""
    for name, model in (("llama.cpp", "merged"), ("vllm", "gguf:q8_0"), ("transformers", "adapter")):
        with pytest.raises(SettingsError, match=f"--server: {name} does not serve {model}"):
            running_server(name, Model(model, tmp_path)).__enter__()


def test_llama_cpp_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads the first of the files of a model, answers one request at once, and may not load a file that is none."""
    asked = list[SimpleNamespace]()

    def made(options: SimpleNamespace) -> SimpleNamespace:
        asked.append(options)
        if "broken" in options.model.path:
            raise RuntimeError("no magic")
        return SimpleNamespace(listening_address=f"{address}/")

    library = SimpleNamespace(CommonParams=lambda: SimpleNamespace(model=SimpleNamespace(path=None)), Server=made)
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: True)
    for number in (2, 1, 3):
        (tmp_path / f"model-0000{number}-of-00003.gguf").touch()
    (tmp_path / "broken").touch()
    with serving(Llama) as address:
        with running_server("llama.cpp", Model("gguf:q8_0", tmp_path)) as (client, name):
            assert (client.url, name) == (address, "run")
        with pytest.raises(Unreachable, match=r"llama\.cpp does not load gguf:q4_0: no magic"):
            running_server("llama.cpp", Model("gguf:q4_0", tmp_path / "broken")).__enter__()
    assert [Path(options.model.path).name for options in asked] == ["model-00001-of-00003.gguf", "broken"]
    assert (asked[0].n_parallel, asked[0].warmup, asked[0].fit_params) == (1, False, False)


def test_what_is_missing_is_named_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages of `transformers serve`: exit code 2 with what to install, no traceback of a server."""
    found = importlib.util.find_spec
    absent = {"fastapi", "openai", "uvicorn", "xllamacpp"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else found(name))
    monkeypatch.setattr("shutil.which", lambda *_args, **_given: None)
    merged, gguf = Model("merged", Path("/runs/m")), Model("gguf:q8_0", Path("/runs/g"))
    with pytest.raises(SettingsError, match=r"no server for merged .*fastapi, openai and uvicorn: pip install"):
        installed_server(merged)
    with pytest.raises(SettingsError, match=r"without fastapi, openai, uvicorn; .*pip install '.\[export\]'"):
        running_server("transformers", merged).__enter__()
    with pytest.raises(SettingsError, match=r"no server for gguf:q8_0 .*xllamacpp: pip install"):
        installed_server(gguf)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: True)
    assert (installed_server(merged), installed_server(gguf)) == ("transformers", "llama.cpp")


def test_the_extra_has_what_transformers_serve_imports() -> None:
    """Every package that `transformers` asks for before it serves is one that the table asks for, or our dependency."""
    import inspect

    from transformers.utils import import_utils

    asked = set(re.findall(r"is_(\w+)_available\(\)", inspect.getsource(import_utils.is_serve_available))) - {"serve"}
    assert asked == {*SERVERS["transformers"].needs, "pydantic"}
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = {re.match(r"[\w-]+", name)[0] for name in project["optional-dependencies"]["export"]}  # type: ignore[index]
    assert {need for server in SERVERS.values() for need in server.needs} <= extra


def checked(*asked: Asked, way: str = "echo", tokens_per_second: float | None = 87.54) -> ServeCheck:
    """A result of these questions."""
    return ServeCheck("vllm", way, "merged", asked, 1.26, 0.0214, tokens_per_second, "2026-11-29T06:00:00.000000Z")


SAME, TIE = Asked("quiz", "a", 1, 1, 2.0, 0.25), Asked("quiz", "b", 1, 0, NEAR / 2, 0.5)
OTHER, UNCLEAR = Asked("quiz", "c", 1, 2, 2.0, 1.5), Asked("quiz", "d", 1, None, 2.0, None)


def test_a_result_as_lines_and_as_json() -> None:
    """Median and largest difference, near ties apart from real differences, what could not be compared."""
    assert as_lines(checked(SAME, TIE, OTHER)) == [
        "server             vllm, asked for log-likelihoods",
        "served             merged",
        "questions          3 in 1.3 s, 3 compared",
        "same predictions   1 of 3; 1 differ in a near tie (below 0.2 nats)",
        "log-likelihoods    differ by 0.5000 nats (median), 1.5000 (most)",
        "first token        after 21 ms (median), 87.5 tokens/s after it, one request at a time",
        "  quiz c: recorded choice 1, served 2",
        "differs",
    ]
    unclear = as_lines(checked(UNCLEAR, way="greedy", tokens_per_second=None))
    assert unclear == [
        "server             vllm, asked for greedy answers",
        "served             merged",
        "questions          1 in 1.3 s, 0 compared; the answers to 1 begin with none of the choices",
        "same predictions   0 of 0; 0 differ in a near tie (below 0.2 nats)",
        "first token        after 21 ms (median), one request at a time",
        "not compared",
    ]
    assert as_lines(checked(SAME, TIE, way="forced"))[0].endswith("log-likelihoods")
    assert [line for line in as_lines(checked(*[OTHER] * 21)) if line.startswith("  ")] == [
        "  quiz c: recorded choice 1, served 2"
    ] * 20
    facts = as_json(checked(SAME, TIE, OTHER, UNCLEAR))
    questions = facts.pop("questions")
    assert facts == {
        "server": "vllm",
        "way": "echo",
        "format": "merged",
        "when": "2026-11-29T06:00:00.000000Z",
        "seconds": 1.26,
        "first_token": 0.0214,
        "tokens_per_second": 87.54,
        "holds": False,
        "alike": 1,
        "compared": 3,
        "different": ["c"],
    }
    assert questions[1] == {
        "task": "quiz",
        "id": "b",
        "recorded": 1,
        "served": 0,
        "margin": NEAR / 2,
        "difference": 0.5,
    }
    with pytest.raises(VerificationError) as raised:
        require_alike(checked(SAME, TIE, OTHER))
    assert [(one.where, one.what) for one in raised.value.problems] == [
        ("quiz b", "recorded choice 1, vllm predicts 0"),
        ("quiz c", "recorded choice 1, vllm predicts 2"),
    ]
    require_alike(checked(SAME, TIE))


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, AccessDenied, "requires a key \\(HTTP 401\\); set OPENAI_API_KEY"),
        (403, AccessDenied, "requires a key \\(HTTP 403\\)"),
        (400, SettingsError, "the server refuses \\(HTTP 400\\): {}"),
        (404, SettingsError, "the server refuses \\(HTTP 404\\)"),
        (408, Unreachable, "answered with HTTP 408"),
        (429, Unreachable, "answered with HTTP 429"),
        (500, Unreachable, "answered with HTTP 500: {}"),
        (503, Unreachable, "answered with HTTP 503"),
        (200, Unreachable, "the server's answer is not JSON"),
    ],
)
def test_answers_of_a_server_have_their_codes(status: int, kind: type[Exception], words: str) -> None:
    """A key that is refused, a request that is, and a server that cannot answer now, or is none."""

    def answers(self: OpenAI) -> None:
        self._send(b"{}" if status != 200 else b"<html>", status)

    with serving(type("Server", (OpenAI,), {"do_POST": answers, "do_GET": answers})) as address:
        client = Client(address)
        assert client.is_healthy() == (status == 200)
        for ask in (lambda: client.post("/v1/completions", {}), lambda: client.get("/v1/models")):
            with pytest.raises(kind, match=words):
                ask()


@pytest.mark.parametrize(
    ("texts", "rate"),
    [
        (["{'text': 'a'}", "{'text': 'b'}", "{'text': ''}"], 0.25),  # the last token ends the answer, and has no text
        (["{'text': 'a'}"], None),
        (["{'role': 'x'}", "{'text': 'a'}", "{'text': 'b'}", "{}"], 0.25),  # what has no text is no token
    ],
)
def test_the_speed_of_a_streamed_answer(texts: list[str], rate: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds to the first token, and how many follow it in the time up to the last; the clock goes on by 4 s."""
    lines = [f'data: {{"choices": [{text}]}}\n\n'.replace("'", '"') for text in texts]
    sent = "".join([": a comment\n\n", 'data: {"choices": []}\n\n', *lines, "data: [DONE]\n\n"]).encode()
    seconds = iter(range(0, 100, 4))
    with serving(type("Server", (OpenAI,), {"do_POST": lambda self: self._send(sent, 200)})) as address:
        monkeypatch.setattr("job.serving.client.time", SimpleNamespace(monotonic=lambda: next(seconds)))
        speed = Client(address).stream("/v1/completions", {})
    assert (speed.first_token, speed.tokens_per_second) == (4, rate)


def test_a_stream_without_a_token() -> None:
    """Only its end came."""
    server = type("Server", (OpenAI,), {"do_POST": lambda self: self._send(b"data: [DONE]\n\n", 200)})
    with serving(server) as address, pytest.raises(Unreachable, match="the server sent no token"):
        Client(address).stream("/v1/completions", {})


def test_a_server_of_this_table_is_found_by_its_owner() -> None:
    """The last model is the one of the run; a server without models, and one of another kind."""
    for owner, kind in (
        ("vllm", "vllm"),
        ("llamacpp", "llama.cpp"),
        ("somebody", "transformers"),
        ("", "transformers"),
    ):
        with serving(type("Server", (OpenAI,), {"owner": owner})) as address:
            assert server_kind(Client(address)) == kind
            assert model_name(Client(address), None) == "run"
            assert model_name(Client(address), "another") == "another"
    for nothing in ({}, {"data": None}, {"data": []}):
        with serving(type("Server", (OpenAI,), {"do_GET": lambda self, what=nothing: self._answer(what)})) as address:
            assert server_kind(Client(address)) == "transformers"
            with pytest.raises(SettingsError, match="does not serve any model"):
                model_name(Client(address), None)


@pytest.mark.parametrize(
    ("server", "answer", "words"),
    [
        ("vllm", {"choices": [{"logprobs": None}], "usage": {"prompt_tokens": 3}}, "returns no log-probabilities; "),
        ("vllm", {"choices": [{"logprobs": {"token_logprobs": [-1.0]}}]}, "returns no log-probabilities; "),
        (
            "vllm",  # of as many tokens as the question: of the choice there is none
            {"choices": [{"logprobs": {"token_logprobs": [-1.0, -2.0]}}], "usage": {"prompt_tokens": 2}},
            "returns no log-probabilities of the choice 'Sorrowby'",
        ),
        ("llama.cpp", {"tokens": []}, None),
        ("llama.cpp", {"completion_probabilities": [{"id": 7, "logprob": -1.0}]}, "no log-probability of token 1"),
        ("llama.cpp", {"completion_probabilities": []}, "returns no log-probability of token 1; is it llama.cpp's"),
    ],
)
def test_answers_without_log_probabilities(server: str, answer: dict[str, Any], words: str | None) -> None:
    """A server that ignores what it was asked for is not the one that it was taken for."""

    def answers(self: OpenAI) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = {"tokens": list(range(1 + len(body["content"]) // 50))} if self.path == "/tokenize" else answer
        self._answer(answer if "tokens" in answer else found)

    with serving(type("Server", (OpenAI,), {"do_POST": answers})) as address:
        client = Client(address)
        ask = WAYS[SERVERS[server].way]
        if words is None:  # choices without tokens have the probability 1
            assert ask(client, "run", "q", CHOICES) == Answer((0.0, 0.0, 0.0), 0)
            return
        with pytest.raises(SettingsError, match=words):
            ask(client, "run", "q" * 45, CHOICES)


def test_a_choice_with_a_token_of_unknown_probability() -> None:
    """Its sum would be too large: it is not compared."""

    class Partly(OpenAI):
        def complete(self, body: dict[str, Any]) -> dict[str, Any]:
            answer = super().complete(body)
            answer["choices"][0]["logprobs"]["token_logprobs"][-2] = None
            return answer

    with (
        listening(Partly) as served,
        pytest.raises(SettingsError, match="returns no log-probabilities of the choice 'Sorrowby'"),
    ):
        check(served)


def test_what_servers_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vLLM the prompt's own tokens, of llama.cpp one token a request, forced past every other sampler."""
    post, asked = Client.post, list[tuple[str, dict[str, Any]]]()

    def spy(client: Client, path: str, body: dict[str, Any]) -> Any:
        asked.append((path, body))
        return post(client, path, body)

    monkeypatch.setattr(Client, "post", spy)
    question = QUESTIONS[0]
    with listening(OpenAI) as served:
        WAYS["echo"](served.client, "run", question, CHOICES[:1])
    same = {"model": "run", "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    prompts = (question, f"{question} {CHOICES[0]}")
    assert asked == [("/v1/completions", {**same, "prompt": prompt}) for prompt in prompts]
    asked.clear()
    with listening(Llama) as served:
        WAYS["forced"](served.client, "run", question, CHOICES[:1])
    special = {"add_special": True, "parse_special": True}
    assert asked[:2] == [("/tokenize", {"content": prompt, **special}) for prompt in prompts]
    begin, count = len(tokens(question)), len(tokens(f" {CHOICES[0]}"))
    same = {
        "model": "run",
        "n_predict": 1,
        "n_probs": 1,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": True,
    }
    assert len(asked) == 2 + count
    for at, (path, body) in enumerate(asked[2:], begin):
        ((token, bias),) = body.pop("logit_bias")
        assert bias >= 1e9
        prompt = body.pop("prompt")
        assert (path, body, len(prompt)) == ("/completion", same, at)
        assert token not in prompt


@pytest.mark.parametrize(
    ("text", "choices", "prediction"),
    [
        (" yes, but", ["no", "yes"], 1),
        ("yes sir", ["yes", "yes sir", "y"], 1),  # the longest that it begins with
        ("Yes", ["no", "yes"], None),
        ("", ["no", "yes"], None),
        ("no", [" no ", "yes"], 0),
    ],
)
def test_the_choice_that_a_greedy_answer_begins_with(text: str, choices: list[str], prediction: int | None) -> None:
    """Whatever white space is around both; no more tokens are asked for than the longest choice may have."""
    bodies = []

    def answers(self: OpenAI) -> None:
        bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer({"choices": [{"text": text}]})

    with serving(type("Server", (OpenAI,), {"do_POST": answers})) as address:
        assert WAYS["greedy"](Client(address), "run", "q", choices) == Answer(None, prediction)
        WAYS["greedy"](Client(address), "run", "q", ["x" * 100])
    longest = max(map(len, choices))
    expected = {"model": "run", "prompt": "q", "max_tokens": longest + 2, "temperature": 0}
    assert bodies == [expected, {**expected, "max_tokens": 64}]
