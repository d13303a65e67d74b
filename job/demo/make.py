"""Makes the demo: `python -m job.demo.make [OUT]` writes base model and data, by default in place.

The data takes a second, the base model about two minutes of one CPU core. Two runs on one machine give the same bytes;
other machines may round the weights differently, so the weights are committed and `--check` compares the data only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from job.demo.exercises import Row, make_instructions, make_preferences, make_questions
from job.demo.world import SEED, Person, make_world

HERE = Path(__file__).parent


def draw_all() -> tuple[tuple[Person, ...], list[Row], list[Row], list[Row]]:
    """The world, the questions, the instructions and the preferences, drawn in this order from one seed."""
    draw = Random(SEED)
    world = make_world(draw)
    questions = make_questions(world, draw)
    instructions = make_instructions(world, draw)
    return world, questions, instructions, make_preferences(world, draw)


def render_data() -> dict[str, bytes]:
    """Return the data files by name, as the bytes in the repository."""
    _, questions, instructions, preferences = draw_all()
    files = {"instructions.jsonl": instructions, "preferences.jsonl": preferences, "questions.jsonl": questions}
    return {name: "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in files.items()}


def find_differences(folder: Path) -> list[str]:
    """Name the data files in `folder` that are missing or not, byte for byte, what this script makes."""
    return [
        name
        for name, content in render_data().items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != content
    ]


def write_base(folder: Path) -> None:
    """Train tokenizer and base model and save both to `folder`."""
    from job.demo.pretrain import build_base

    world, _, instructions, _ = draw_all()
    tokenizer, model = build_base(world, instructions)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"  # by the class's older name, which all releases of transformers know
    config.write_text(config.read_text("utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")
    (folder / "model.safetensors").chmod(0o644)  # as git keeps it


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the demo, or compare its data with what is committed; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m job.demo.make", description="Make the demo's base model and data.")
    parser.add_argument("out", nargs="?", type=Path, default=HERE, metavar="OUT", help="folder, default: in place")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="compare the data files in OUT, write nothing")
    choice.add_argument("--data-only", action="store_true", help="write the data files, not the base model")
    parsed = parser.parse_args(arguments)
    if parsed.check:
        different = find_differences(parsed.out)
        if different:
            sys.stderr.write(f"not what this script makes: {', '.join(different)} (in {parsed.out})\n")
        return 1 if different else 0
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name, content in render_data().items():
        (parsed.out / name).write_bytes(content)
    if not parsed.data_only:
        write_base(parsed.out / "base")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
