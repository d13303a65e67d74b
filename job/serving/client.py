"""Requests to a server with OpenAI's API: HTTP, JSON, and an error of the job for everything that goes wrong."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from job.errors import AccessDenied, JobError, Problem, SettingsError, Unreachable

ANSWER_SECONDS = 300.0
"""Longest wait for an answer: a server may load the model when it is first asked."""
_TRANSIENT = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT}


@dataclass(frozen=True)
class Speed:
    """Of one streamed answer: seconds to its first token, and tokens a second after that; None for a single token."""

    first_token: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Client:
    """A server.

    Attributes:
        url: Its address, without `/v1`.
        key: For its `Authorization` header; None without one.
    """

    url: str
    key: str | None = None

    def get(self, path: str) -> Any:
        """The JSON at a path. Raises as `post`."""
        with self._open(path, None) as answer:
            return self._parsed(answer.read())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers a request.

        Raises:
            AccessDenied: The server refuses the key.
            SettingsError: The server does not support the request.
            Unreachable: It does not answer, or with something else.
        """
        with self._open(path, body) as answer:
            return self._parsed(answer.read())

    def is_healthy(self) -> bool:
        """Whether it says at `/health` that it is ready; transformers' server lists no models where no cache is."""
        try:
            with self._open("/health", None):
                return True
        except JobError:
            return False

    def stream(self, path: str, body: dict[str, Any]) -> Speed:
        """Measures a streamed answer. Raises as `post`."""
        began = time.monotonic()
        times = []
        with self._open(path, {**body, "stream": True}) as answer:
            for line in answer:
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    choices = self._parsed(line.removeprefix(b"data:")).get("choices") or [{}]
                    # The token that ends an answer comes as an empty text, and may be the first.
                    if "text" in choices[0]:
                        times.append(time.monotonic())
        if not times:
            raise Unreachable(f"{self.url}{path}: the server sent no token")
        rate = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else None
        return Speed(times[0] - began, rate)

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        where = f"{self.url}{path}"
        if not where.startswith(("http://", "https://")):
            raise SettingsError([Problem("--url", "must be http(s)://host[:port]")])
        try:
            return urlopen(Request(where, data, headers), timeout=ANSWER_SECONDS)  # noqa: S310 - see above
        except HTTPError as error:
            text = error.read(300).decode(errors="replace")
            if error.code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
                raise AccessDenied(
                    f"{where}: the server requires a key (HTTP {error.code}); set OPENAI_API_KEY"
                ) from None
            if error.code in _TRANSIENT or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise Unreachable(f"{where}: the server answered with HTTP {error.code}: {text}") from None
            raise SettingsError([Problem(where, f"the server refuses (HTTP {error.code}): {text}")]) from None
        except (URLError, OSError, ValueError) as error:
            raise Unreachable(f"{where}: no server answers ({error})") from error

    def _parsed(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError:
            raise Unreachable(f"{self.url}: the server's answer is not JSON") from None
