"""Which imports a run avoids. If a newer library needs more, a test fails instead of only slowing the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

TRAINING = """
import json, sys
from job.stages.preload import import_libraries
import_libraries()
left_out = sorted({*sys.argv[1:]} & {*sys.modules})
import torch
from scipy.stats import binomtest
own = [module.__name__ for module in (torch._dynamo, sys.modules["torch._dynamo.decorators"])]
print(json.dumps([left_out, own, float(binomtest(1, 2).pvalue)]))
"""
LEFT_OUT = (
    *(
        "torch._inductor.compile_fx",
        "networkx",
        "chardet",
        "scipy",
        "sklearn",
        "wandb",
        "matplotlib",
        "torchvision",
        "tensorboard",
        "onnx",
    ),
    "mlflow",
)


@pytest.mark.long
def test_a_run_imports_no_library_that_it_has_no_use_for() -> None:
    """What is left out is there when it is used, and torch's compiler is its own."""
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, *LEFT_OUT],
        cwd=ROOT,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left_out, own, p_value = json.loads(done.stdout.splitlines()[-1])
    assert not left_out
    assert own == ["torch._dynamo", "torch._dynamo.decorators"]
    assert p_value == 1.0
