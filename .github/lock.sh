#!/bin/sh
# Writes requirements.lock: every package with the hashes of all its files, but for torch and what comes with its build
# (CUDA libraries, triton): those are the machine's choice, and torch itself pins their versions.
set -eu
torch=2.13.0
uv=$(command -v uv || echo .venv/bin/uv)
{
    echo "# Made by .github/lock.sh; do not edit."
    echo "# torch==$torch"
    echo "torch==$torch" | "$uv" pip compile pyproject.toml --extra dev --quiet --universal --python-version 3.11 \
        --generate-hashes --no-annotate --no-header --override - |
        awk '/^[a-z]/ { keep = (!/^(torch|triton|nvidia-|cuda-)/ || /^nvidia-ml-py=/) && !/emscripten.$|sys_platform == .win32/ } keep'
} >requirements.lock.new
mv requirements.lock.new requirements.lock
