"""What the imports of a run leave out. A newer library that needs more of it is noticed here, not as a slower start."""

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
import torch
compile_ = torch.compile
from job.stages.preload import import_libraries
import_libraries()
from accelerate.utils.other import is_compiled_module
from bitsandbytes.optim import AdamW8bit
from torch.utils.checkpoint import checkpoint
from job.common.near_duplicates import row_hash
row_hash(["one two three four"])
layer = torch.nn.Linear(8, 8)
assert not is_compiled_module(layer)
for kind in (torch.optim.AdamW, AdamW8bit):
    optimizer = kind(layer.parameters())
    checkpoint(layer, torch.ones(1, 8), use_reentrant=False).sum().backward()
    if kind is torch.optim.AdamW:
        optimizer.step()
    optimizer.zero_grad()
left_out = sorted({*sys.argv[1:]} & {*sys.modules})
own = torch.compile is compile_
import torch._dynamo.utils
dynamo = torch._dynamo
whole = (dynamo.disable.__module__, dynamo.config.cache_size_limit > 0, hasattr(dynamo, "__path__"))
twice = torch.compile(lambda x: 2 * x)(torch.ones(1)).item()
from scipy.integrate import quad
from datasketch import MinHashLSH
index = MinHashLSH(threshold=0.5, num_perm=16)
print(json.dumps([left_out, own, *whole, twice, quad(lambda x: x, 0, 2)[0], index.b * index.r <= 16]))
"""
LEFT_OUT = (
    *("torch._dynamo.convert_frame", "torch._inductor", "networkx", "chardet", "scipy.integrate"),
    *("scipy.stats", "sklearn", "wandb", "matplotlib", "torchvision", "tensorboard", "onnx", "mlflow"),
)


@pytest.mark.long
def test_a_run_imports_no_compiler() -> None:
    """Optimizers, checkpointing and the audit work without what is left out, and all of it is there when it is used."""
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, *LEFT_OUT],
        cwd=ROOT,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left_out, own, disable, *works = json.loads(done.stdout.splitlines()[-1])
    assert not left_out
    assert own
    assert disable == "torch._dynamo.decorators"
    assert works == [True, True, 2.0, 2.0, True]
