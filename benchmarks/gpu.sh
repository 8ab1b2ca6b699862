#!/usr/bin/env bash
# Everything that only a CUDA GPU can show, in below nine minutes and without a network.
#
#   bash benchmarks/gpu.sh [OUTPUT_DIR]
#
# Writes gpu.json, gpu.md and gpu.log to OUTPUT_DIR (default: $OUT, else benchmarks/results/<device>).
# The package need not be installed, only its dependencies; PYTHON chooses the interpreter.
# Exit status: 0 all is well or there is no GPU, 1 a part failed or overran its time.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; fi
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
output="${1:-${OUT:-}}"
exec "$PYTHON" -m benchmarks.gpu --device cuda ${output:+--output_dir "$output"}
