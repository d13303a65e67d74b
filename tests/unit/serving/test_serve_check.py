"""`serve-check` against servers on this machine that answer in the ways of vLLM, llama.cpp and transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from job.errors import AccessDenied, SettingsError, Unreachable, VerificationError
from job.evaluation.samples import Sample
from job.records import NEAR, ServeCheck
from job.serving.check import Served, as_json, as_lines, require_alike, serve_check
from job.serving.client import Client
from job.serving.servers import SERVERS, Model, installed_server, running_server, server_kind
from tests.unit.storage.test_hub import serving

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


def test_command_lines_of_servers() -> None:
    """VLLM gets the adapter as a LoRA module with the smallest rank limit it knows; the merged model by its folder."""
    vllm = SERVERS["vllm"]
    assert vllm.command is not None
    words = vllm.command(Model("adapter", Path("/runs/a"), "org/base", 24), 8000)
    assert words[1:7] == ["serve", "org/base", "--enable-lora", "--max-lora-rank", "32", "--lora-modules"]
    assert "run=/runs/a" in words
    assert vllm.command(Model("merged", Path("/runs/m")), 8000)[2] == "/runs/m"
    assert [name for name, server in SERVERS.items() if server.serves("gguf:q8_0")] == ["llama.cpp"]


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
