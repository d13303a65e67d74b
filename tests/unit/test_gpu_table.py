"""The table of `make bench-gpu`: every cell comes from a finding of a section, and missing ones are shown as such."""

from __future__ import annotations

from pathlib import Path

from tests.bench import gpu_table

ROOT = Path(__file__).parents[2]


def test_every_finding_is_in_the_table() -> None:
    """Each figure once; a dash where a section did not run; why a peer has no column."""
    findings = [
        {"what": "machine", "gpu": "NVIDIA H200", "transformers": "5.17.0"},
        {"what": "buyers", "rows": "alpaca", "steady_tokens_per_second": 16001.0, "whole_tokens_per_second": 9002.0},
        {"what": "buyers", "rows": "4096", "steady_tokens_per_second": 15003.0},
        {"what": "long row", "full_attention": True, "tokens": 64000, "tokens_per_second": 2104.0},
        {"what": "long row", "tokens": 64000, "tokens_per_second": 9602.0},
        {"what": "score", "questions_per_second": 705.0},
        {"what": "HFLM", "questions_per_second": 106.0},
        {"what": "score", "questions_per_second": 604.0, "text": True},
        {
            "what": "HFLM",
            "questions_per_second": 97.0,
            "text": True,
            "batch_size": 512,
            "questions": 400,
            "same_predictions": 387,
        },
        {"what": "plain TRL", "tokens_per_second": 807.0, "peak_gib": 14.8},
        {"what": "unsloth", "way": "packed", "tokens_per_second": 4308.0, "peak_gib": 6.1},
        {"what": "restart", "attempt": "restarted", "first_step_seconds": 9.9},
    ]
    text = "\n".join(gpu_table.lines(findings))
    for figure in (
        "16,001",
        "9,002",
        "15,003",
        "2,104",
        "604",
        "97",
        "807",
        "14.8",
        "4,308",
        "6.1",
        "9.9",
        "of 512",
        "13 of 400",
    ):
        assert figure in text
    # Of random tokens, where there are real questions; of attention with a window.
    assert not any(figure in text for figure in ("705", "106", "9,602"))
    assert "nemo_automodel 0.7.0 requires transformers 5.18.0 exactly, and this machine has 5.17.0" in text
    written = (ROOT / "tests/bench/gpu.py").read_text(encoding="utf-8")
    for what in {str(one["what"]) for one in findings} - {"unsloth"}:  # which its own script writes
        assert f'"{what}"' in written
    row = next(line for line in gpu_table.lines(findings[:1]) if "a row of 64,000" in line)
    assert row.split()[-3:] == ["-", "-", "-"]
