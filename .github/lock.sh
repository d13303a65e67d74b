#!/bin/sh
# Writes the locks: every package with the hashes of all its files.
#   requirements.lock       what the job needs, except torch and the packages of its build
#   requirements-cuda.lock  torch from PyPI with the CUDA libraries and triton that it pins, for the image.
#                           A checkout takes only torch's version from here; the build depends on the machine.
#   requirements-dev.lock   what checks and tests need in addition
# All are resolved together first, so that no package gets two versions.
set -eu
torch=2.13.0
uv=$(command -v uv || echo .venv/bin/uv)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

resolve() {
    echo "torch==$torch" | "$uv" pip compile pyproject.toml "$@" --quiet --universal --python-version 3.11 \
        --generate-hashes --no-annotate --no-header --override - |
        awk '/^[a-z]/ { keep = !/emscripten.$|sys_platform == .win32/ } keep'
}

# The blocks of file $3 whose first line matches the pattern $1 and is none of file $2's.
pick() {
    echo "# Made by .github/lock.sh; do not edit."
    awk -v pattern="$1" 'FILENAME == ARGV[1] { known[$0]; next } /^[a-z]/ { keep = $0 ~ pattern && !($0 in known) } keep' "$2" "$3"
}

# The image includes the extras but for dev, see .github/decisions/0010-image.md.
extras=$(python3 -c 'import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(f"--extra {name}" for name in extras if name != "dev"))')
resolve --all-extras >"$work/all"
# shellcheck disable=SC2086 # several words
resolve $extras --constraint "$work/all" >"$work/job"
cuda='^(torch|triton|nvidia-[a-ln-z]|cuda-)' # but nvidia-ml-py, which is no part of torch
pick "$cuda" /dev/null "$work/job" >requirements-cuda.lock
pick . requirements-cuda.lock "$work/job" >requirements.lock
pick . "$work/job" "$work/all" >requirements-dev.lock
