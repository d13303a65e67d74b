"""How fast rows are read, checked and tokenized, and in how much memory: synthetic Alpaca rows, the demo's tokenizer.

`python -m tests.bench.reading [ROWS]` prints rows a second, and by how much the peak of memory grew.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from job.data.dataset import load_examples
from job.model.base import load_tokenizer

ROWS = 200_000
WORDS = 60
"""In an output, on average; Alpaca's have 45."""
MAX_LENGTH = 2048
KIB = 1024


def main() -> None:
    """Writes the rows, reads them, and prints what that took."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9))) for _ in range(5000)]
    tokenizer = load_tokenizer(Path("job/demo/base"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        with path.open("w", encoding="utf-8") as file:
            for _ in range(count):
                asked, answer = (" ".join(random.choices(words, k=random.randint(1, 2 * k))) for k in (12, WORDS))
                file.write(json.dumps({"instruction": asked, "input": "", "output": answer}) + "\n")
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        _, record = load_examples(
            str(path),
            revision=None,
            split="train",
            limit=None,
            schema=None,
            on_bad_row="error",
            loss_on="all",
            max_length=MAX_LENGTH,
            tokenizer=tokenizer,
        )
        seconds = time.monotonic() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KIB
    speed = f"{record.rows / seconds:,.0f} rows/s, {record.tokens / seconds:,.0f} tokens/s"
    memory = f"{grown / 1e6:,.0f} MB more at the peak, {grown / record.tokens:.1f} bytes a token"
    sys.stdout.write(f"{record.rows:,} rows, {record.tokens:,} tokens: {seconds:.1f} s, {speed}, {memory}\n")


if __name__ == "__main__":
    main()
