"""Makes the files for tests/gpu/image_triton.py: `python image_triton_kit.py SITE KIT [--whole]`.

SITE is a folder with an unpacked Triton; this Python's version and libc must be those of the GPU machine. The
Dockerfile's own step is run in other folders. Triton up to 3.6 also compiles a launcher for each kernel at run time,
where the image's (3.7) compiles one file for all: for 3.6 the launchers of the job's kernels are compiled beside it,
linked the same way. With --whole Triton itself goes into the kit (37 MB: stripped, compressed, without profiler and
assembler), for a machine that has another version.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = """
import sys
from unittest.mock import MagicMock
sys.modules["torch"] = sys.modules["torch.nn"] = torch = MagicMock()  # imported with the kernels, which do not need it
torch.autograd.Function = object
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource
from job.model.fused import triton_kernels as ours
TYPES = {"p": "*bf16", "i": "i32", "f": "fp32"}
if hasattr(driver, "make_launcher"):
    # Each parameter's type at image_triton.py's call; a number that is 1, and a constant, are compiled into the kernel.
    for kernel, types, constants in (
        (ours._gated_kernel, "pppi.ii..", {"per_row": 1, "TANH": False, "BLOCK": 1024}),
        (ours._gated_gradient_kernel, "pppppi.ii..", {"per_row": 1, "TANH": False, "BLOCK": 1024}),
        (ours._turn_kernel, "ppppiif...", {"LIMITED": False, "HALF": 64, "BLOCK": 1024}),
    ):
        named = {n: TYPES.get(letter, "constexpr") for n, letter in zip(kernel.arg_names, types, strict=True)}
        assert {name for name, type_ in named.items() if type_ == "constexpr"} == set(constants)
        compiled = triton.compile(ASTSource(kernel, named, constants), target=GPUTarget("cuda", 90, 32))
        driver.CudaLauncher(compiled.src, compiled.metadata)
"""


def step(site: Path, out: Path, build: Path) -> str:
    """The Dockerfile's step that compiles Triton's file, as a shell script with these folders."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (found,) = re.findall(
        r"^RUN (set -e; if \[ -d /opt/torch/site-packages/triton .*?[^\\])$", text, re.DOTALL | re.MULTILINE
    )
    script = re.sub(r"\\\n\s*", " ", found)
    for there, here in (("/opt/torch/site-packages", site), ("/opt/job/triton", out), ("/build", build)):
        assert there in script
        script = script.replace(there, str(here))
    return script


def pack(site: Path, out: Path) -> None:
    """Packs Triton itself, as small as possible: `site` and libtriton.so.xz in OUT."""
    unused = shutil.ignore_patterns(
        "profiler", "cupti", "bin", "hip", "plugins", "FileCheck", "__pycache__", "*.so", "*.a", "*.lib"
    )
    shutil.copytree(site, out / "site", ignore=unused)
    listed = next((out / "site").glob("triton-*.dist-info/entry_points.txt"))
    listed.write_text("[triton.backends]\nnvidia = triton.backends.nvidia\n", encoding="utf-8")
    with tempfile.NamedTemporaryFile() as stripped:
        subprocess.run(["strip", "--strip-unneeded", "-o", stripped.name, site / "triton/_C/libtriton.so"], check=True)
        how = [
            {"id": lzma.FILTER_X86},
            {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 200 << 20},
        ]
        packed = lzma.compress(Path(stripped.name).read_bytes(), format=lzma.FORMAT_XZ, filters=how)
    (out / "libtriton.so.xz").write_bytes(packed)


def main() -> None:
    """Makes KIT/<version of Triton>/triton, and the requested files next to it."""
    site, kit = (Path(argument).resolve() for argument in sys.argv[1:3])
    version = re.search(r"__version__ = '(.+)'", (site / "triton/__init__.py").read_text(encoding="utf-8")).group(1)  # type: ignore[union-attr]
    out = kit / version / "triton"
    shutil.rmtree(kit / version, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        build = Path(name)
        (build / "python").symlink_to(sys.executable)
        (build / "file").write_text(
            "#!/bin/sh\nexit 1\n", encoding="utf-8"
        )  # not in the image; the cache's key depends on it
        (build / "file").chmod(0o755)
        environ = os.environ | {"PATH": f"{build}:{os.environ['PATH']}", "PYTHONPATH": f"{site}:{ROOT}"}
        subprocess.run(["bash", "-c", step(site, out, build)], cwd=build, env=environ, check=True)
        for called in ("cuPointerGetAttribute", "cuFuncSetAttribute", "cuGetErrorString"):  # by a launcher
            with (build / "driver.c").open("a", encoding="utf-8") as file:
                file.write("" if f" {called}(" in (build / "driver.c").read_text() else f"void {called}(void) {{}}\n")
        linked = ["-o", "libcuda.so.1", "-Wl,-soname,libcuda.so.1", "driver.c"]
        subprocess.run(["gcc", "-shared", *linked], cwd=build, check=True)
        (build / "launchers.py").write_text(LAUNCHERS, encoding="utf-8")
        compiled = {
            "TRITON_CACHE_DIR": str(build / "cache"),
            "TRITON_LIBCUDA_PATH": str(build),
            "LD_LIBRARY_PATH": str(build),
        }
        subprocess.run([sys.executable, "launchers.py"], cwd=build, env=environ | compiled, check=True)
        for file in (build / "cache").glob("*/__triton_launcher*.so") if (build / "cache").exists() else ():
            shutil.copytree(file.parent, out / file.parent.name)
    if "--whole" in sys.argv:
        pack(site, kit / version)
    for file in sorted(out.rglob("*.so")):
        print(file.relative_to(kit), file.stat().st_size)


main()
