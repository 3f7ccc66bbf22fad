#!/usr/bin/env bash
# Collects wheels for a machine that has PyTorch, torchvision, h5py, jinja2 and typer, and no network:
#   benchmarks/gpu_wheels.sh [FOLDER]      (wheels/ by default; for Python 3.12 on x86-64 Linux)
# The wheel of tspipe is only for its version: benchmarks/gpu.sh runs the code beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-wheels} python=${PYTHON:-python3}
rm -rf "$folder"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" .
"$python" -m pip download --quiet --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$folder" pydantic
du -sh "$folder"
