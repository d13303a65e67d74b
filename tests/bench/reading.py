"""How fast rows are read, checked and tokenized, and in how much memory: synthetic Alpaca rows, the demo's tokenizer.

`python -m tests.bench.reading [ROWS ...]` prints for each number of rows: the simplest implementation, row by row (on
at most `PLAIN_ROWS` of them); one process (on at most `SINGLE_ROWS`); as many as there are processors; the tokens read
again from the cache; and the ratio of each speed to that of row by row. Seconds of processor time are those of all
processes. Each is measured in a separate process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil

from job.common.resources import usable_cpus
from job.data.token_cache import load_tokens
from job.model.tokenizer import load_tokenizer
from tests.reading_reference import read_plainly

ROWS = 100_000
PLAIN_ROWS = 5_000
SINGLE_ROWS = 100_000
WORDS = 60
"""Words in an output, on average; Alpaca's have 45."""
MAX_LENGTH = 2048
KIB = 1024
PLAIN, CACHED = "row by row", "from the cache"


def write_rows(path: Path, count: int) -> None:
    """Rows in Alpaca's schema, of made-up words."""
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, answer = (" ".join(random.choices(words, k=random.randint(1, 2 * k))) for k in (12, WORDS))
            file.write(json.dumps({"instruction": asked, "input": "", "output": answer}) + "\n")


def measure(how: str, path: Path, processes: int) -> str:
    """Reads the rows in one way, and returns time and memory."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the job
    tokenizer = load_tokenizer(Path("job/demo/base"))
    tokenizer(["warm"])
    largest = 0

    def check_stop(**_: object) -> None:
        nonlocal largest
        with suppress(psutil.Error):
            largest = max([largest, *(child.memory_info().rss for child in psutil.Process().children())])

    peak, began, worked = _peak(), time.monotonic(), _worked()
    if how == PLAIN:
        lengths = [len(example.input_ids) for example in read_plainly(path, tokenizer, "alpaca")[0]]
    else:
        lengths = load_tokens(
            str(path),
            None,
            root=path.parent / str(processes),
            keep=True,
            revision=None,
            split="train",
            limit=None,
            schema=None,
            on_bad_row="error",
            loss_on="all",
            max_length=MAX_LENGTH,
            tokenizer=tokenizer,
            processes=processes,
            check_stop=check_stop,
        ).examples.lengths
    seconds, grown = time.monotonic() - began, (_peak() - peak) / 1e6
    own, others = (now - before for now, before in zip(_worked(), worked, strict=True))
    speed = f"{len(lengths) / seconds:,.0f} rows/s, {len(lengths) / (own + others):,.0f} a second of processor time"
    work = f"{own:.1f} s of it here, {others:.1f} s elsewhere"
    memory = f"{grown:,.0f} MB more here, {largest / 1e6:,.0f} MB in the largest other"
    return f"{how}: {len(lengths):,} rows, {sum(lengths):,} tokens, {seconds:.1f} s, {speed} ({work}), {memory}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def _worked() -> list[float]:
    """Processor seconds of this process and of its ended child processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return [one.ru_utime + one.ru_stime for one in used]


def main() -> None:
    """Writes the rows, reads them in each way, and prints time and memory."""
    if len(sys.argv) > 1 and not sys.argv[1].isdecimal():
        sys.stdout.write(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])) + "\n")
        return
    cpus = usable_cpus()
    sys.stdout.write(f"{cpus} processors, load {', '.join(f'{load:.1f}' for load in os.getloadavg())}\n")
    for count in map(int, sys.argv[1:] or [ROWS]):
        with tempfile.TemporaryDirectory() as folder:
            path, few, some = (Path(folder, f"{name}.jsonl") for name in ("rows", "few", "some"))
            for file, rows in ((path, count), (few, min(count, PLAIN_ROWS)), (some, min(count, SINGLE_ROWS))):
                write_rows(file, rows)
            ways = [(PLAIN, few, 1), ("one process", some, 1), (f"{cpus} processes", path, cpus), (CACHED, path, cpus)]
            plain = 0.0
            for how, file, processes in ways:
                words = [sys.executable, "-m", "tests.bench.reading", how, str(file), str(processes)]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                said = done.stdout.splitlines()[-1]
                speed = _rows_a_second(said)
                plain = plain or speed
                sys.stdout.write(f"{said}, {speed / plain:.1f} times row by row\n")
                sys.stdout.flush()


def _rows_a_second(said: str) -> float:
    """The speed in a line of `measure`."""
    return float(said.split(" rows/s", maxsplit=1)[0].rsplit(" ", 1)[1].replace(",", ""))


if __name__ == "__main__":
    main()
