"""Whether Triton runs in the image, as a script: `python tests/gpu/image_triton.py KIT` prints JSON lines.

Uses the files of tests/gpu/image_triton_kit.py on a GPU as the image does: the image's entrypoint copies
them into Triton's cache, PATH has no compiler, and the job chooses its kernels. For each Triton in the kit: with the
image's files the job's kernels run and agree with torch; without a file, and with one that cannot be loaded, torch's
own operations are used and a log line says so. `--tiny` tries the script itself on a CPU with a fake `nvidia-smi`;
Triton cannot run there, so torch's operations are expected.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDED = "awk bash cat cp date dirname env id mkdir nvidia-smi paste readlink sed sort stat timeout uniq".split()  # noqa: SIM905
NO_GPU = "#!/bin/bash\n[ $# = 0 ] && echo 'CUDA Version: 13.0' || echo '9.0, NVIDIA H200, 143771 MiB, 580.0'\n"


def child(device: str) -> None:
    """Runs in place of the job: chooses the kernels, runs them, and prints their names and their errors to fp32."""
    import torch

    from job import log
    from job.model.fused.kernels import TORCH
    from job.training.gpu_capability import fast_kernels

    log.configure("json", "info")
    compilers = [name for name in ("cc", "gcc", "clang") if shutil.which(name)] + [
        os.environ[x] for x in ["CC"] if x in os.environ
    ]
    began = time.monotonic()
    kernels, name = fast_kernels(torch.device(device), "bfloat16")
    seconds = time.monotonic() - began
    draw = torch.Generator(device).manual_seed(0)
    shape = (1, 300, 32, 128)
    gate, up, seed = (torch.randn(shape, generator=draw, device=device, dtype=torch.bfloat16) for _ in range(3))
    angle = torch.randn((1, 300, 64), generator=draw, device=device)
    cosine, sine = (torch.cat([x, x], -1).bfloat16() for x in (angle.cos(), angle.sin()))

    def results(kernels: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (gate, up)]
        product = kernels.swiglu(*inputs)
        turned = kernels.turn(gate.to(dtype), cosine.to(dtype), sine.to(dtype))
        return [product.detach(), *torch.autograd.grad(product, inputs, seed.to(dtype)), turned]

    pairs = zip(results(kernels, torch.bfloat16), results(TORCH, torch.float32), strict=True)
    worst = max(((a.float() - b).abs() / (1 + b.abs())).max().item() for a, b in pairs)
    version = sys.modules["triton"].__version__ if "triton" in sys.modules else None
    found = {"kernels": name, "triton": version, "off": worst, "compilers": compilers, "seconds": round(seconds, 2)}
    print(json.dumps(found), flush=True)


def start(work: Path, files: Path | None, site: Path | None, kit: Path, *, tiny: bool) -> tuple[dict[str, object], str]:
    """Runs the entrypoint with these files next to it, without a compiler; returns the child's findings and log."""
    image, tools = work / "opt", work / "bin"
    for folder in (image / "triton", tools, work / "home"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "entrypoint.sh", image)
    (image / "cuda").write_text("13.0 7.5\n", encoding="utf-8")
    if files:
        shutil.copytree(files, image / "triton", dirs_exist_ok=True)
    for name in NEEDED:
        if program := shutil.which(name):
            (tools / name).symlink_to(program)
    if tiny:
        (tools / "nvidia-smi").unlink(missing_ok=True)
        (tools / "nvidia-smi").write_text(NO_GPU, encoding="utf-8")
        (tools / "nvidia-smi").chmod(0o755)
    device = "cpu" if tiny else "cuda"
    python = f'#!/bin/bash\nexec "{sys.executable}" "{Path(__file__).resolve()}" --child {device}\n'
    (tools / "python").write_text(python, encoding="utf-8")
    (tools / "python").chmod(0o755)
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in {"CC", "CXX", "TRITON_CACHE_DIR", "TRITON_HOME"}
    }
    sites = [str(x) for x in (site, ROOT, kit / "python") if x]
    places = os.pathsep.join([*sites, *filter(None, [os.environ.get("PYTHONPATH")])])
    environ |= {"PATH": str(tools), "HOME": str(work / "home"), "PYTHONPATH": places, "PYTHONSAFEPATH": "1"}
    if site and (ptxas := bundled_ptxas()):
        environ["TRITON_PTXAS_PATH"] = ptxas
    done = subprocess.run(
        [image / "entrypoint.sh"], env=environ, capture_output=True, text=True, check=False, timeout=120
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = {"kernels": None, "stderr": done.stderr[-2000:]}
    return found, done.stderr


def bundled_ptxas() -> str | None:
    """The assembler of this machine's Triton: the kit does not contain one."""
    from importlib.util import find_spec

    spec = find_spec("triton")
    file = Path(spec.origin).parent / "backends/nvidia/bin/ptxas" if spec and spec.origin else None
    return str(file) if file and file.exists() else None


def main() -> int:
    """All cases for each Triton of the kit."""
    words = sys.argv[1:]
    if words[0] == "--child":
        child(words[1])
        return 0
    tiny = "--tiny" in words
    kit = Path(next(word for word in words if not word.startswith("--"))).resolve()
    good = True
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for folder in sorted(kit.glob("[0-9]*")):
            site = None
            if (folder / "site").exists():
                site = work / f"site-{folder.name}"
                shutil.copytree(folder / "site", site)
                with (
                    lzma.open(folder / "libtriton.so.xz") as packed,
                    (site / "triton/_C/libtriton.so").open("wb") as out,
                ):
                    shutil.copyfileobj(packed, out, 1 << 24)
            broken = work / f"broken-{folder.name}"
            shutil.copytree(folder / "triton", broken)
            for file in broken.rglob("cuda_utils*.so"):
                file.write_bytes(b"no library")
            cases = {"the image's files": folder / "triton", "no file": None, "a file that cannot be loaded": broken}
            for case, files in cases.items():
                began = time.monotonic()
                found, log = start(work / f"{folder.name} {case}".replace(" ", "-"), files, site, kit, tiny=tiny)
                line = next(
                    (json.loads(x) for x in log.splitlines() if x.startswith("{") and "Triton cannot run" in x), None
                )
                expected = "triton" if files == folder / "triton" and not tiny else "torch"
                ours = found.get("triton") in {folder.name, None} or tiny
                ok = found["kernels"] == expected and ours and not found["compilers"] and found["off"] < 0.01  # type: ignore[operator]
                ok = ok and (tiny or (line is None) == (expected == "triton"))
                good &= ok
                spent = round(time.monotonic() - began, 1)
                words = {"case": case, "kit": folder.name, "ok": ok, **found, "log": line, "all_seconds": spent}
                print(json.dumps(words), flush=True)
    print(json.dumps({"what": "Triton with the image's files", "ok": good}), flush=True)
    return 0 if good else 1


sys.exit(main())
