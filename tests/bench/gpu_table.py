"""The table of the main figures, from the findings of `gpu.py`: one column for each library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from job.common import tables
from job.planning.gpu_prices import GPUS, Gpu

Finding = Mapping[str, Any]
MISSING = "-"
NEMO, NEMO_TRANSFORMERS = "nemo_automodel 0.7.0", "5.18.0"
"""NeMo AutoModel's newest release when this was written, and the transformers version that its metadata requires."""


def lines(findings: Sequence[Finding]) -> list[str]:
    """The table as plain text; a dash where nothing was measured."""
    machine = _last(findings, "machine")
    name = "an unknown device" if machine is None else machine["gpu"]
    gpu = gpu_of(name)
    seller = None if gpu is None else gpu.machine(1)
    price = "no list price"
    if seller is not None:
        price = f"{seller.usd_per_gpu:.2f} dollars an hour ({seller.name_for(1)}, on demand)"
    alpaca, full = (_last(findings, "buyers", rows=rows) for rows in ("alpaca", "4096"))
    scores, hflm = (_best(_of_text(findings, what), what, "questions_per_second") for what in ("score", "HFLM"))
    asked = "questions" if scores is not None and scores.get("text") else "lengths"
    batch = "" if hflm is None or "batch_size" not in hflm else f", batches of {hflm['batch_size']}"
    plain, unsloth = _last(findings, "plain TRL"), _best(findings, "unsloth", "tokens_per_second")
    long = _last(findings, "long row", full_attention=True)
    length = 64_000 if long is None else long["tokens"]
    speed = None if alpaca is None else alpaca["steady_tokens_per_second"]
    rows = [
        (
            "training, Alpaca's lengths",
            "tokens/s",
            _of(speed),
            _get(plain, "tokens_per_second"),
            _get(unsloth, "tokens_per_second"),
        ),
        (
            "the same, 14 steps with recordings",
            "tokens/s",
            _get(alpaca, "whole_tokens_per_second"),
            MISSING,
            MISSING,
        ),
        ("training, rows of 4,096", "tokens/s", _get(full, "steady_tokens_per_second"), MISSING, MISSING),
        (
            f"training, a row of {length:,}, full attention",
            "tokens/s",
            _get(long, "tokens_per_second"),
            MISSING,
            MISSING,
        ),
        (
            "memory, Alpaca's lengths",
            "GiB",
            _get(alpaca, "peak_gib", 1),
            _get(plain, "peak_gib", 1),
            _get(unsloth, "peak_gib", 1),
        ),
        (
            f"evaluation, ARC-Easy's {asked} (peer: HFLM{batch})",
            "questions/s",
            _get(scores, "questions_per_second"),
            _get(hflm, "questions_per_second"),
            MISSING,
        ),
        ("HFLM's predictions that differ from this job's", "share", MISSING, _differing(hflm), MISSING),
        (
            "from a process's start to its next step, the demo after a kill",
            "s",
            _get(_last(findings, "restart", attempt="restarted"), "first_step_seconds", 1),
            MISSING,
            MISSING,
        ),
        (
            "a million target tokens, Alpaca's lengths",
            "dollars",
            _dollars(gpu, speed),
            _dollars(gpu, None if plain is None else plain["tokens_per_second"]),
            _dollars(gpu, None if unsloth is None else unsloth["tokens_per_second"]),
        ),
    ]
    head = ("Mistral-7B's shape, NF4, rank 16", "unit", "this job", "plain TRL", "Unsloth")
    return [f"{name}: {price}", *tables.plain(head, rows), nemo(None if machine is None else machine["transformers"])]


def nemo(transformers: str | None) -> str:
    """Why NeMo AutoModel has no column.

    Args:
        transformers: The installed version; None if unknown.
    """
    here = f"and this machine has {transformers or 'another'}"
    if transformers == NEMO_TRANSFORMERS:
        here = "which this machine has, but there is no script for it here"
    return f"NeMo AutoModel is not measured: {NEMO} requires transformers {NEMO_TRANSFORMERS} exactly, {here}"


def gpu_of(name: str) -> Gpu | None:
    """The entry of `GPUS` for a device's name as reported by the driver; None if there is none."""
    words = name.upper().replace("-", " ").split()
    matching = [
        gpu for gpu in GPUS if gpu.name.split()[0] in words and all(w in words for w in gpu.name.upper().split())
    ]
    return (matching or [gpu for gpu in GPUS if gpu.name in words] or [None])[0]


def _of_text(findings: Sequence[Finding], what: str) -> Sequence[Finding]:
    """The findings for real questions, if there are any: random tokens of their lengths have no common prefixes."""
    return [one for one in findings if one["what"] == what and one.get("text")] or findings


def _last(findings: Sequence[Finding], what: str, **equal: Any) -> Finding | None:
    fitting = [one for one in findings if one["what"] == what and all(one.get(k) == v for k, v in equal.items())]
    return fitting[-1] if fitting else None


def _best(findings: Sequence[Finding], what: str, by: str) -> Finding | None:
    return max((one for one in findings if one["what"] == what), key=lambda one: one[by], default=None)


def _get(finding: Finding | None, name: str, digits: int = 0) -> str:
    return MISSING if finding is None else _of(finding.get(name), digits)


def _differing(hflm: Finding | None) -> str:
    if hflm is None or "same_predictions" not in hflm:
        return MISSING
    return f"{hflm['questions'] - hflm['same_predictions']} of {hflm['questions']}"


def _of(number: float | None, digits: int = 0) -> str:
    return MISSING if not number else f"{number:,.{digits}f}"


def _dollars(gpu: Gpu | None, speed: float | None) -> str:
    seller = None if gpu is None else gpu.machine(1)
    return MISSING if seller is None or not speed else f"{seller.usd_per_gpu / 3600 / speed * 1e6:.3f}"
