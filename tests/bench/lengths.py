"""Writes `lengths.json`, the token counts of real rows in Mistral's own tokenizer, for a machine that has neither.

`python tests/bench/lengths.py TOKENIZER_MODEL ALPACA ARC_EASY`: the sentencepiece model of the PyPI package
mistral-common (`data/tokenizer.model.v1`), and the two files of data. Only numbers are written, no text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import sentencepiece

from job.data.formats import Row, read_rows
from job.data.schemas import check_row, render

ROWS = 1500


def main(model: str, alpaca: str, arc_easy: str) -> int:
    """Counts and writes."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    rows = [row for row in read_rows(Path(alpaca), "alpaca") if isinstance(row, Row) and not check_row(row, "alpaca")]
    texts = [render(row, "alpaca", None, turns=None).text for row in rows[:ROWS]]
    questions = []
    for line in Path(arc_easy).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        context = f"Question: {row['question']}\nAnswer:"  # lm-eval's arc_easy
        before = len(tokenizer.encode(context, add_bos=True))
        whole = [len(tokenizer.encode(f"{context} {choice}", add_bos=True)) for choice in row["choices"]["text"]]
        questions.append([before, [length - before for length in whole]])
    counted = {
        "alpaca": [len(tokenizer.encode(text, add_bos=True, add_eos=True)) for text in texts],
        "arc_easy": questions,
    }
    Path(__file__).with_name("lengths.json").write_text(json.dumps(counted, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
