#!/usr/bin/env bash
# Checks and measures tspipe on a GPU: benchmarks/gpu.sh [STAGE…] [OPTION…], for example
#   benchmarks/gpu.sh works stage1 stage2 --seconds 400 --out results
#   benchmarks/gpu.sh tables --seconds 500 --out results --images data
# benchmarks/gpu.py lists stages and options. PYTHON names the interpreter. Wheels in wheels/ (benchmarks/gpu_wheels.sh)
# are installed into a temporary folder first, for a machine without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -d wheels ]; then
    site=${TMPDIR:-/tmp}/tspipe-wheels
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" wheels/*.whl
    export PYTHONPATH=$PWD/pipeline:$site
fi
exec "$python" benchmarks/gpu.py "$@"
