"""Judges, which answer a question by A or B: a model in memory, or a server with OpenAI's API.

To add one: a class with `choose`, and its case in `job.stages.principles.open_judge`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from job.common.threads import in_thread
from job.errors import AccessDenied, DataError, JobError, Problem, SettingsError, Unreachable, naming
from job.model.files import (
    MAX_CONFIG_BYTES,
    build_empty,
    check_sizes,
    check_weights,
    quantization_method,
    read_config,
    read_json,
    readable,
    weight_files,
)
from job.model.loading_errors import loading_weights

if TYPE_CHECKING:
    import torch

SETTING = "JOB_EVAL__JUDGE"
Choice = Literal["A", "B"]
SECONDS = 120.0
"""Longest wait for one answer of a server, from the request to the last byte."""
MAX_BYTES = 1 << 20
TRIES = 7
LONGEST_PAUSE = 60.0
"""Maximum seconds between two tries, even if the server's Retry-After is longer."""
_POLL_SECONDS = 0.2
_TRANSIENT = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
_DENIED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_NOT_TAKEN = {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
"""Statuses with which servers refuse a question that is longer than the model's input."""
_TINY = "Reply with one letter, A or B."
_SECONDS = re.compile(r"\d{1,9}", re.ASCII)
"""A Retry-After header in seconds; its other form, a date, is ignored."""
_LETTER = re.compile(r"\W*(?:answer\W+)?([AB])(?:\W*$|\s*[.:,)*])", re.IGNORECASE)
"""A reply that begins with a single letter, such as `B`, `**A**` or `Answer: B.`; not `A better one is B`."""


class Judge(Protocol):
    """Answers questions."""

    def choose(self, text: str, check_stop: Callable[[], None]) -> Choice | None:
        """A or B; None if the judge answers neither, or the question is too long. Calls `check_stop` while waiting."""


class JudgeTokenizer:
    """The tokenizer of a local judge, and its token ids of the letters A and B (`letters`).

    Args:
        folder: The judge's files.

    Raises:
        DataError: The tokenizer cannot be loaded.
        SettingsError: The letters do not end in different tokens.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        with naming(SETTING):
            check_sizes(folder)
            with readable(folder, "has no tokenizer that can be loaded"):
                self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._templated = bool(getattr(self.tokenizer, "chat_template", None))
        ids = [self.tokenizer.encode(f"{'' if self._templated else ' '}{x}", add_special_tokens=False) for x in "AB"]
        if ids[0][-1:] == ids[1][-1:] or not all(ids):
            raise SettingsError([Problem(SETTING, f"the tokenizer of {folder} does not distinguish A from B")])
        self.letters = [one[-1] for one in ids]

    def encode(self, text: str) -> list[int]:
        """The token ids of a question, up to the beginning of the answer.

        Raises:
            DataError: The chat template cannot be used.
        """
        if not self._templated:
            return list(self.tokenizer.encode(f"{text}\nAnswer:"))
        with naming(SETTING), readable(Path(SETTING), "has a chat template that cannot be used"):
            messages = [{"role": "user", "content": text}]
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(rendered, add_special_tokens=False))


def check_folder(folder: Path) -> None:
    """Checks the files of a local judge without loading the weights; single weights may still be missing.

    Raises:
        DataError: The model cannot be read, or lacks weights.
        SettingsError: Its tokenizer does not distinguish the letters A and B.
    """
    with naming(SETTING):
        if quantization_method(read_json(folder / "config.json", MAX_CONFIG_BYTES)) is None:
            config = read_config(folder)
            check_weights(folder, config, build_empty(folder, config))
        else:
            weight_files(folder)  # a judge may have quantization methods that a base cannot have
    JudgeTokenizer(folder).encode(_TINY)


class LocalJudge:
    """A causal language model in memory. It chooses the letter with the higher logit, so its answers are reproducible.

    Args:
        folder: The model's files.
        device: Where the model computes.
        dtype: The compute dtype.

    Raises:
        DataError: The model cannot be loaded, or lacks weights.
        SettingsError: Its tokenizer does not distinguish the letters A and B.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._reads = JudgeTokenizer(folder)
        with naming(SETTING):
            weight_files(folder)
            with loading_weights(folder, "has no language model that can be loaded"):
                model, info = AutoModelForCausalLM.from_pretrained(
                    folder, trust_remote_code=False, use_safetensors=True, dtype=dtype, output_loading_info=True
                )
        if missing := sorted(map(str, info["missing_keys"])):
            raise DataError([Problem(SETTING, f"{folder} lacks {len(missing)} weights, such as {missing[0][:100]}")])
        self._model, self._device = model.eval().to(device), device
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 31
        # Otherwise the logits of all positions would be computed: (tokens, vocabulary).
        has_option = "logits_to_keep" in signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if has_option else {}

    def choose(self, text: str, check_stop: Callable[[], None]) -> Choice | None:
        """A or B; A if both are equally likely. None if the question is longer than the model's input."""
        import torch

        check_stop()
        ids = self._reads.encode(text)
        if len(ids) > self._longest:
            return None
        with torch.inference_mode():
            # One question at a time: padding and the other questions of a batch would change the last bits.
            inputs = torch.tensor([ids], device=self._device)
            logits = self._model(input_ids=inputs, **self._last_only).logits[0, -1].float()
        first, second = logits[self._reads.letters].tolist()
        if not abs(first - second) < float("inf"):
            raise DataError([Problem(SETTING, "the judge's scores are not finite")])
        return "A" if first >= second else "B"


class _Busy(Unreachable):
    """The server's status says to try again later, after `seconds` if it names a time."""

    def __init__(self, message: str, seconds: float | None) -> None:
        super().__init__(message)
        self.seconds = seconds


class _NotTaken(SettingsError):
    """The server does not take this request, but may take a shorter one."""


class _NoRedirects(HTTPRedirectHandler):
    """A redirect would send the key to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class ServedJudge:
    """A server with OpenAI's API. Its answers are untrusted: size and time are limited, and only a letter is read.

    Attributes:
        url: The server's address, with or without `/v1`.
        model: The model's name on the server.
        key: Key for the `Authorization` header; None to send none.
        seconds: Longest wait for one answer.
        pause: Seconds before the second try; it doubles with each further try, unless the server names a time.
    """

    url: str
    model: str
    key: str | None
    seconds: float = SECONDS
    pause: float = 1.0

    def choose(self, text: str, check_stop: Callable[[], None]) -> Choice | None:
        """A or B if the reply begins with it, else None; also None if the question is too long for the server.

        Raises:
            AccessDenied: The server refuses the key.
            SettingsError: The server also refuses a tiny question, for example because it does not have the model.
            Unreachable: After all tries, there is no answer, or not one of OpenAI's API.
        """
        try:
            return _letter(self._replied(text, check_stop))
        except _NotTaken:
            self._replied(_TINY, check_stop)
            return None

    def check(self, check_stop: Callable[[], None]) -> None:
        """Asks a tiny question, once.

        Raises:
            AccessDenied, SettingsError, Unreachable: As `choose`.
        """
        self._reply(_TINY, check_stop)

    def _replied(self, text: str, check_stop: Callable[[], None]) -> str:
        """A reply, after several tries if need be."""
        pause = self.pause
        for _ in range(TRIES - 1):
            try:
                return self._reply(text, check_stop)
            except Unreachable as error:
                retry_after = error.seconds if isinstance(error, _Busy) else None
                _wait(min(LONGEST_PAUSE, pause if retry_after is None else retry_after), check_stop)
                pause *= 2
        return self._reply(text, check_stop)

    def _reply(self, text: str, check_stop: Callable[[], None]) -> str:
        """One reply. A thread reads it and `check_stop` is called meanwhile, so a slow server does not delay a stop."""
        reply = in_thread(lambda: self._ask(text), "judge")
        deadline = time.monotonic() + self.seconds
        while not reply.done():
            if time.monotonic() > deadline:
                raise Unreachable(f"{self.url}: the judge did not answer within {self.seconds:g} s")
            _wait(min(_POLL_SECONDS, self.pause), check_stop)
        return reply.result()

    def _ask(self, text: str) -> str:
        where = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        data = json.dumps({**body, "max_tokens": 16, "seed": 0}).encode()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            opener = build_opener(_NoRedirects)
            with opener.open(Request(where, data, headers), timeout=self.seconds) as answer:  # noqa: S310 - a setting checks the scheme
                content = answer.read(MAX_BYTES + 1)
        except HTTPError as error:
            with error:
                raise self._refusal(where, error.code, error.headers.get("Retry-After")) from None
        except (OSError, ValueError, HTTPException) as error:
            raise Unreachable(f"{where}: no judge answers ({type(error).__name__})") from None
        if len(content) > MAX_BYTES:
            raise Unreachable(f"{where}: the answer has more than {MAX_BYTES:,} bytes")
        try:
            reply = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            reply = None
        if not isinstance(reply, str):
            raise Unreachable(f"{where}: the answer is not one of OpenAI's API")
        return reply

    @staticmethod
    def _refusal(where: str, code: int, retry_after: str | None) -> JobError:
        """The error for a status. The answer's text is not shown, since it could contain the key."""
        if code in _DENIED:
            return AccessDenied(f"{where}: the judge refuses the key (HTTP {code}); set JOB_EVAL__JUDGE_KEY")
        if code in _TRANSIENT or code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            seconds = float(retry_after) if retry_after and _SECONDS.fullmatch(retry_after) else None
            return _Busy(f"{where}: the judge answers with HTTP {code}", seconds)
        what = f"{where} refuses the request (HTTP {code}); correct the address or JOB_EVAL__JUDGE_MODEL"
        return (_NotTaken if code in _NOT_TAKEN else SettingsError)([Problem(SETTING, what)])


def is_encrypted(url: str) -> bool:
    """Whether data sent to an address cannot be read on the way: by https, or to this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in {"localhost", "127.0.0.1", "::1"}


def _wait(seconds: float, check_stop: Callable[[], None]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        check_stop()
        time.sleep(min(_POLL_SECONDS, left))


def _letter(reply: str) -> Choice | None:
    match = _LETTER.match(reply)
    return None if match is None else "A" if match[1].upper() == "A" else "B"
