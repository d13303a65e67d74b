"""A GGUF file in llama.cpp's server: tokens of texts, log-likelihoods of choices. `llama_cpp_process` alone runs it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from http.client import HTTPConnection
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

import numpy as np

MIN_LOG_LIKELIHOOD = math.log(np.finfo(np.float32).smallest_subnormal)
"""llama.cpp computes probabilities in fp32; one that is zero there counts as the smallest positive number of fp32."""
_FORCED = 1e9
"""Added to the logit of the token to be sampled: more than any logit. It is not in the probabilities that are read."""
_ALL_TOKENS = 1 << 24
"""More tokens than any vocabulary has."""
_servers: list[Any] = []
"""Every server of this process. The destructor of one may wait for its own thread forever, so it never runs."""
_TOKENIZE_SECONDS = 60
"""How long llama.cpp may take for the tokens of a text."""


class Refused(Exception):
    """What the libraries cannot do with this model, in words."""


def _llama_cpp() -> Any:
    try:
        return import_module("xllamacpp")
    except ImportError as error:
        raise Refused(
            f"the package xllamacpp is missing ({error}); run pip install '.[export]' in the repository"
        ) from error


class LlamaCppServer:
    """A GGUF file in llama.cpp's server, which answers one request at a time.

    Args:
        file: GGUF file of a model.
        threads: Number of CPU threads.
        context: Most tokens of a question with a choice.

    Raises:
        Refused: llama.cpp does not load it.
    """

    def __init__(self, file: Path, *, threads: int, context: int) -> None:
        xllamacpp = _llama_cpp()
        self._key = token_hex(16)
        self._reported: int | None = None
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.api_keys = [self._key]  # the server listens, if only on this machine
        options.n_ctx = context
        options.n_parallel = 1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        # One request at a time, nothing kept of earlier ones, and attention whose sums do not depend on the number of
        # threads: a question's scores have the same bits regardless of earlier questions.
        options.cache_ram_mib = 0
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.warmup = options.fit_params = False
        options.verbosity = 1
        try:
            self._server = xllamacpp.Server(options)
        except RuntimeError as error:
            raise Refused(f"llama.cpp does not load it: {error}") from error
        _servers.append(self._server)

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, with what llama.cpp adds at its beginning and end."""
        place = urlsplit(self._server.listening_address)
        connection = HTTPConnection(str(place.hostname), place.port, timeout=_TOKENIZE_SECONDS)
        body = json.dumps({"content": text, "add_special": True, "parse_special": True})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        connection.request("POST", "/tokenize", body, headers)
        return [int(token) for token in json.loads(connection.getresponse().read())["tokens"]]

    def score(self, context: Sequence[int], choice: Sequence[int], *, anew: bool) -> tuple[float, bool]:
        """Log-likelihood of a choice after a context (natural logarithm), and whether it is the greedy continuation.

        One request a token: the token is forced by a bias on its logit, and llama.cpp reports its probability before
        any bias, a softmax in fp32 over the logits of the whole vocabulary. It costs one token's forward pass, since
        the tokens before it are in llama.cpp's cache.

        Args:
            context: Token ids.
            choice: Token ids.
            anew: Whether to compute the context again. The first choice of a question does: what remains of another
                question's context would change how many tokens are computed together, and with it the last bits.

        Raises:
            Refused: llama.cpp answered something else.
        """
        total, greedy = 0.0, True
        for number, token in enumerate(choice):
            before = [*context, *choice[:number]]
            log_probabilities = self._probabilities(before, token, most=1, cached=number > 0 or not anew)
            if not log_probabilities:
                # llama.cpp reports no probability of a token that ends within a character: the list of all has it
                log_probabilities = self._probabilities(before, self._reported_token(), most=_ALL_TOKENS, cached=True)
            total += max(log_probabilities[token], MIN_LOG_LIKELIHOOD)
            greedy = greedy and next(iter(log_probabilities)) == token
        return total, greedy

    def _probabilities(self, before: Sequence[int], forced: int, *, most: int, cached: bool) -> dict[int, float]:
        """Log-probabilities after some tokens: of the most probable ones, in that order, and of the one that is forced.

        Empty if llama.cpp reports none, which happens for a forced token that ends within a character.

        Raises:
            Refused: llama.cpp answered something else.
        """
        answer = self._server.handle_completions(
            {
                "prompt": list(before),
                "n_predict": 1,
                "n_probs": most,
                "logit_bias": [[forced, _FORCED]],
                "samplers": ["top_k"],
                "top_k": 1,
                "cache_prompt": cached,
            }
        )
        try:
            logprobs = answer["choices"][0]["logprobs"]
            if answer["usage"]["prompt_tokens"] != len(before):
                raise Refused(f"llama.cpp read {answer['usage']['prompt_tokens']} tokens instead of {len(before)}")
            if logprobs is None:
                return {}
            (sampled,) = logprobs["content"]
            log_probabilities = {int(token["id"]): float(token["logprob"]) for token in sampled["top_logprobs"]}
            if sampled["id"] != forced:
                raise Refused(f"llama.cpp scored token {sampled['id']} instead of token {forced}")
        except (KeyError, IndexError, TypeError, ValueError):
            raise Refused(f"llama.cpp did not score a token: {json.dumps(answer)[:300]}") from None
        return (
            {**log_probabilities, forced: float(sampled["logprob"])}
            if forced not in log_probabilities
            else log_probabilities
        )

    def _reported_token(self) -> int:
        """A token whose probability llama.cpp reports: a complete character."""
        if self._reported is None:
            self._reported = self.tokenize("a")[-1]
        return self._reported


def system_info() -> str:
    """llama.cpp's list of the CPU instructions that it uses: they determine the last bits of a score."""
    return re.sub(r"\s+", " ", str(_llama_cpp().get_system_info())).strip(" |")
