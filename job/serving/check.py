"""`serve-check`: whether a server answers the run's questions as the run's records say."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from job.common.formatting import timestamp
from job.errors import Problem, SettingsError, VerificationError
from job.evaluation.samples import Sample
from job.records import NEAR, Asked, ServeCheck, margin
from job.serving.client import Client
from job.serving.servers import SERVERS, WAYS

_TIMED_QUESTIONS = 5
_TIMED_TOKENS = 32


@dataclass(frozen=True)
class Served:
    """A server, its kind of `SERVERS`, its name of the model, and what that is: `adapter`, or an exported format."""

    client: Client
    server: str
    model: str
    format: str


def serve_check(served: Served, samples: Sequence[tuple[str, Sample]], count: int) -> ServeCheck:
    """Asks a server the first `count` questions of a run.

    Args:
        served: The server.
        samples: (task, record) of what is served, in their order.
        count: How many to ask.

    Raises:
        SettingsError: No record has its prompt, or the server cannot be asked like this.
        AccessDenied, Unreachable: As the server answers.
    """
    client, way = served.client, SERVERS[served.server].way
    questions = [(task, sample) for task, sample in samples if _has_its_prompt(sample)][:count]
    if not questions:
        what = "has no task whose records contain the whole prompt; tasks with several contexts cannot be checked"
        raise SettingsError([Problem("RUN", what)])
    began = time.monotonic()
    compared = []
    for task, sample in questions:
        question, choices = str(sample.question), list(sample.choices or ())
        answer = WAYS[way](client, served.model, question, choices)
        pairs = zip(answer.log_likelihoods or (), sample.log_likelihoods, strict=False)
        difference = max((abs(a - b) for a, b in pairs), default=None)
        margin_of_record = margin(sample.log_likelihoods)
        compared.append(Asked(task, sample.id, sample.prediction, answer.prediction, margin_of_record, difference))
    seconds = time.monotonic() - began
    speeds = [
        client.stream(
            "/v1/completions",
            {"model": served.model, "prompt": sample.question, "max_tokens": _TIMED_TOKENS, "temperature": 0},
        )
        for _, sample in questions[:_TIMED_QUESTIONS]
    ]
    rates = [speed.tokens_per_second for speed in speeds if speed.tokens_per_second is not None]
    return ServeCheck(
        server=served.server,
        way=way,
        format=served.format,
        asked=tuple(compared),
        seconds=seconds,
        first_token=statistics.median(speed.first_token for speed in speeds),
        tokens_per_second=statistics.median(rates) if rates else None,
        when=timestamp(to="microseconds"),
    )


def _has_its_prompt(sample: Sample) -> bool:
    if sample.question is None or not sample.choices:
        return False
    return hashlib.sha256(sample.question.encode()).hexdigest() == sample.prompt_hash


def as_json(result: ServeCheck) -> dict[str, Any]:
    """The result as JSON-able values."""
    fields = {name: getattr(result, name) for name in ("server", "way", "format", "when", "seconds", "first_token")}
    return {
        **fields,
        "tokens_per_second": result.tokens_per_second,
        "holds": result.holds,
        "alike": result.alike,
        "compared": len(result.compared),
        "different": [answer.id for answer in result.different],
        "questions": [asdict(answer) for answer in result.asked],
    }


def as_lines(result: ServeCheck) -> list[str]:
    """The result as a table for people."""
    ties = len(result.compared) - result.alike - len(result.different)
    gaps = [answer.difference for answer in result.asked if answer.difference is not None]
    how = {"echo": "log-likelihoods", "forced": "log-likelihoods", "greedy": "greedy answers"}[result.way]
    unclear = len(result.asked) - len(result.compared)
    left_out = f"; the answers to {unclear} begin with none of the choices" if unclear else ""
    rate = "" if result.tokens_per_second is None else f", {result.tokens_per_second:.1f} tokens/s after it"
    lines = [
        f"server             {result.server}, asked for {how}",
        f"served             {result.format}",
        f"questions          {len(result.asked)} in {result.seconds:.1f} s, {len(result.compared)} compared{left_out}",
        f"same predictions   {result.alike} of {len(result.compared)}; {ties} differ in a near tie (below {NEAR} nats)",
    ]
    if gaps:
        lines.append(
            f"log-likelihoods    differ by {statistics.median(gaps):.4f} nats (median), {max(gaps):.4f} (most)"
        )
    lines.append(f"first token        after {result.first_token * 1000:.0f} ms (median){rate}, one request at a time")
    lines += [
        f"  {answer.task} {answer.id}: recorded choice {answer.recorded}, served {answer.served}"
        for answer in result.different[:20]
    ]
    lines.append("holds" if result.holds else "differs" if result.compared else "not compared")
    return lines


def require_alike(result: ServeCheck) -> None:
    """Raises an error unless the server answers as the records say.

    Raises:
        VerificationError: It does not.
    """
    if result.holds:
        return
    if not result.compared:
        what = "no greedy answer begins with one of the choices, so nothing could be compared"
        raise VerificationError([Problem(result.server, what)])
    raise VerificationError(
        [
            Problem(
                f"{answer.task} {answer.id}",
                f"recorded choice {answer.recorded}, {result.server} predicts {answer.served}",
            )
            for answer in result.compared
            if not answer.alike
        ]
    )
