"""A finished run exported on a GPU: `python tests/gpu/exported.py [--gguf FILE --alpaca FILE --arc FILE]`.

The demo, or with files a slice of the reference recipe on the real small model of tests/bench/real_model.py, is trained
without exports, and trained with them; then the first run is exported into a third, which is killed while it copies,
when it begins to export, and while it publishes. The second and the third have the same artifacts, bit by bit. Prints
JSON lines; ends with 1 if they differ or a run fails. On one H200 73 s, with files 126 s.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.real_model import make_base
from tests.gpu.options import DEMO, run

KILLS = "kill@upload=5,kill@stage=export,kill@upload=30"


def settings(args: argparse.Namespace, folder: Path) -> Mapping[str, str]:
    """What is trained and scored: the demo, or the real model."""
    if args.gguf is None:
        return DEMO
    return {
        "JOB_MODEL__ID": str(make_base(folder / "base", args.gguf)),
        "JOB_DATA__SOURCE": str(args.alpaca.resolve()),
        "JOB_DATA__LIMIT": "200",
        "JOB_DATA__ON_BAD_ROW": "skip",
        "JOB_EVAL__DATA": f"arc_easy={args.arc.resolve()}",
        "JOB_EVAL__LIMIT": "200",
        "JOB_STORAGE__CACHE": str(folder / "cache"),
    }


def main() -> int:
    """Trains, trains with exports, exports, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct in GGUF")
    parser.add_argument("--alpaca", type=Path, help="training rows in Alpaca's schema")
    parser.add_argument("--arc", type=Path, help="questions of ARC-Easy")
    parser.add_argument("--formats", default="adapter:bf16,merged,fp8")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, formats = Path(place), {"JOB_EXPORT__FORMATS": args.formats}
        trained = settings(args, folder)
        source = {"JOB_EXPORT__RUN": str(folder / "trained")}
        artifacts: dict[str, Mapping[str, str]] = {}
        for name, changes in {
            "trained": trained | {"JOB_FAULT": "kill@step=7"},
            "at once": trained | formats,
            "exported": source | formats | {"JOB_FAULT": KILLS, "JOB_STORAGE__CACHE": str(folder / "cache")},
        }.items():
            began = time.monotonic()
            try:
                artifacts[name], codes = run(folder, name.replace(" ", "-"), changes)
            except ChildProcessError as error:
                print(json.dumps({"name": name, "failed": str(error)}), flush=True)
                return 1
            seconds = round(time.monotonic() - began, 1)
            print(json.dumps({"name": name, "exit codes": codes, "seconds": seconds}), flush=True)
        differ = sorted({path for path, _ in artifacts["at once"].items() ^ artifacts["exported"].items()})
        results = json.loads((folder / "exported/results.json").read_text(encoding="utf-8"))
        exports = {
            export["format"]: {
                candidate: {task: score["scores"]["acc"] for task, score in tasks.items()}
                for candidate, tasks in export["candidates"].items()
            }
            for export in results["exports"]
        }
        found = {"artifacts": len(artifacts["exported"]), "differ": differ, "accuracies": exports}
        print(json.dumps({"hardware": results["hardware"], **found}), flush=True)
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
