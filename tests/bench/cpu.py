"""`make bench`: all benchmarks that run on a CPU, one after the other, and one table of all results.

Each can be run alone, with more options: `python tests/bench/cpu_training.py --help`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.common import FAMILIES, Row, arguments, conditions, finish

SCRIPTS = ("cpu_training", "cpu_evaluation", "recovery", "commands")


def main() -> int:
    """Runs them, each in a separate process. Exit code 1 if one failed; a missed goal is not an error."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--full", action="store_true", help="all questions of ARC-Easy")
    parser.add_argument("--family", choices=FAMILIES, default="mistral", help="of training and evaluation")
    parser.add_argument("--unsloth", metavar="PYTHON", help="an interpreter with Unsloth: another peer of training")
    args = parser.parse_args()
    where = conditions()
    rows, details, failed = [], {}, []
    with tempfile.TemporaryDirectory() as name:
        for script in args.only:
            print(f"== {script}", flush=True)
            file = Path(name) / f"{script}.json"
            command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), "--json", str(file)]
            command += ["--family", args.family] if script in {"cpu_training", "cpu_evaluation"} else []
            command += ["--full"] if args.full and script == "cpu_evaluation" else []
            command += ["--unsloth", args.unsloth] if args.unsloth and script == "cpu_training" else []
            if subprocess.run(command, check=False).returncode or not file.exists():
                failed.append(script)
                continue
            content = json.loads(file.read_text(encoding="utf-8"))
            rows += [Row(**row) for row in content["rows"]]
            details[script] = content["details"]
    print(f"== all, {where['date']}, {where['machine']}")
    finish(rows, details, where, args.json)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
