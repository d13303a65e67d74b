"""What the Dockerfile removes, tested on a folder instead of an image."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BITSANDBYTES = "venv/lib/python3.12/site-packages/bitsandbytes"


@pytest.mark.parametrize("base", [None, "/opt/amazon/efa/lib"])
def test_the_driver_is_found_where_gke_mounts_it(base: str | None) -> None:
    """Whatever the base image says; an empty entry would mean the folder in which the job runs."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    (line,) = (line for line in text.splitlines() if line.startswith("ENV ") and "LD_LIBRARY_PATH=" in line)
    before = {"PATH": "/opt/venv/bin:/usr/bin:/bin"} | ({} if base is None else {"LD_LIBRARY_PATH": base})
    script = f'export {line.removeprefix("ENV ")}; echo "$PATH"; echo "$LD_LIBRARY_PATH"'
    done = subprocess.run(["sh", "-c", script], env=before, check=True, capture_output=True, text=True)
    programs, libraries = (path.split(":") for path in done.stdout.splitlines())
    assert programs == [*before["PATH"].split(":"), "/usr/local/nvidia/bin"]
    assert libraries == ["/usr/local/nvidia/lib64", *([] if base is None else [base])]


@pytest.mark.parametrize(
    ("built", "kept"),
    [
        ("13.0 7.5", {"cpu", "cuda130"}),
        ("12.9 6.0", {"cpu", "cuda126", "cuda128"}),  # it has none for 12.9, and takes the nearest of 12
        ("none 6.0", {"cpu"}),
    ],
)
def test_the_library_that_bitsandbytes_will_load_is_kept(tmp_path: Path, built: str, kept: set[str]) -> None:
    """Others go, as do tests of packages and static libraries."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    (command,) = (line for line in text.splitlines() if line.startswith("RUN ") and "libbitsandbytes_" in line)
    for name in ("networkx", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "sympy"):
        (tmp_path / BITSANDBYTES).with_name(name).joinpath("core/tests").mkdir(parents=True)
    for folder in (BITSANDBYTES, "torch", "job"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("cpu", "cuda126", "cuda128", "cuda130", "cuda132", "rocm72"):
        (tmp_path / BITSANDBYTES / f"libbitsandbytes_{name}.so").touch()
    (tmp_path / "torch/libx.a").touch()
    (tmp_path / "job/cuda").write_text(f"{built}\n", encoding="ascii")
    subprocess.run(["sh", "-c", command.removeprefix("RUN ").replace("/opt/", f"{tmp_path}/")], check=True)
    assert {path.stem.removeprefix("libbitsandbytes_") for path in tmp_path.rglob("*.so")} == kept
    assert not [*tmp_path.rglob("tests"), *tmp_path.rglob("*.a")]
