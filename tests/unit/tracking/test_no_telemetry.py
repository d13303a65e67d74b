"""No telemetry: no network connection is opened when training and tracking start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.tracking import trackers
from job.tracking.trackers import tracking

ROOT = Path(__file__).parents[3]
CI = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER")
"""Libraries keep quiet where they take the process for one of a test, which would hide what is tested here."""

# Python imports it when it starts: every name that is looked up and every address that is called is written down, and
# fails as without a network.
RECORDER = """
import os, socket

def note(what):
    with open(os.environ["CALLS"], "a") as file:
        file.write(f"{what}\\n")
    raise OSError("there is no network")

socket.getaddrinfo = lambda host, *_, **__: note(host)
connect = socket.socket.connect
socket.socket.connect = lambda self, address: (
    connect(self, address) if self.family == socket.AF_UNIX else note(address)
)
"""

TRAINING = """
import sys, time
from pathlib import Path
from job.cli.library_variables import configure_libraries
configure_libraries(None)
from job.model.tokenizer import load_tokenizer
from job.records import PEFT, ExecutionPlan
from job.training.config import Hooks, Recipe
from job.training.trainer import train
from tests.helpers import make_base, make_examples, make_model
base, examples = Path(sys.argv[1]) / "base", make_examples(4)
make_base(base)
recipe = Recipe(0, 1, 1e-3, "linear", 0, 0.0, 1.0, 4, 1000, "adamw_torch", 10)
plan = ExecutionPlan(False, True, False, "a test", PEFT)
hooks = Hooks(lambda _: None, lambda *_: None, lambda: False)
made = train(
    make_model(base), load_tokenizer(base), examples, recipe=recipe, plan=plan, hooks=hooks, folder=base / "out"
)
assert made.complete
time.sleep(2)  # what tells a maker does so from a thread of its own
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose calls are written down."""
    (tmp_path / "recorder").mkdir()
    (tmp_path / "recorder/sitecustomize.py").write_text(RECORDER, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in {*CI, "HF_HUB_OFFLINE"}}
    path = f"{tmp_path / 'recorder'}:{ROOT}"
    return {**kept, "PYTHONPATH": path, "CALLS": str(tmp_path / "calls"), "HOME": str(tmp_path)}


def calls(environ: dict[str, str]) -> list[str]:
    """What was called, whatever it was."""
    path = Path(environ["CALLS"])
    return path.read_text("utf-8").splitlines() if path.exists() else []


@pytest.mark.long
@pytest.mark.parametrize("allowed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_training_calls_nobody(tmp_path: Path, environ: dict[str, str], *, allowed: bool) -> None:
    """TRL's trainer starts and trains in silence; with the user's own word for it the same start is heard."""
    environ |= {"HF_HUB_DISABLE_TELEMETRY": "0"} if allowed else {}
    subprocess.run([sys.executable, "-c", TRAINING, tmp_path], env=environ, cwd=ROOT, check=True, timeout=300)
    assert ("huggingface.co" in calls(environ)) is allowed
    assert allowed or calls(environ) == []


@pytest.mark.long
@pytest.mark.parametrize("allowed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_mlflow_in_a_folder_calls_nobody(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, allowed: bool
) -> None:
    """A run that is tracked in a local folder tells MLflow's makers nothing, unless the user's own value allows it."""
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 120.0)
    environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    environ |= {"MLFLOW_DISABLE_TELEMETRY": "false"} if allowed else {}
    with tracking({"mlflow": "p"}, "a-run", {}, environ) as found:
        found.start()
    assert (tmp_path / "mlflow.db").exists()
    assert bool(calls(environ)) is allowed, calls(environ)
