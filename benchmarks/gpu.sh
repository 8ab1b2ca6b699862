#!/usr/bin/env bash
# What only a CUDA GPU can show, without a network, in a time that it keeps.
#
#   bash benchmarks/gpu.sh quick [OUTPUT_DIR]   150 seconds: is it right, and is it faster?
#   bash benchmarks/gpu.sh full [OUTPUT_DIR]    400 seconds: what is fast, and how near to the peak?
#
# Writes gpu.json, gpu.md and gpu.log to OUTPUT_DIR (default: $OUT, else benchmarks/results/<device>),
# after each part. The package need not be installed: PYTHON chooses an interpreter that has torch, and
# what else is needed (diffusers, datasets, xformers, ...) may lie unpacked on PYTHONPATH.
# Exit status: 0 all is well or there is no GPU, 1 a part failed or overran its time.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; fi
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
tier="${1:-quick}"
output="${2:-${OUT:-}}"
exec "$PYTHON" -m benchmarks.gpu "$tier" --device cuda ${output:+--output_dir "$output"}
