#!/bin/sh
# Everything that needs a Hopper GPU, in under ten minutes: is it right on the device, then how fast is it.
# Needs jax >= 0.11 with its CUDA plugin; torch for its two peers. Writes benchmarks/results/attention-<device>.json.
#
#     sh benchmarks/on_gpu.sh [python]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # torch shares the device
name=$("$python" -c "import jax; print(jax.devices()[0].device_kind.replace(' ', '-'))")

# Right first: widths, groups, windows, ragged lengths, offsets, packed segments, both directions. About two minutes.
timeout 240 "$python" benchmarks/gpu_correctness.py

# Then fast. The long shapes come last, and rows are written as they are measured.
timeout 330 "$python" benchmarks/attention.py --seconds 0.3 --out "benchmarks/results/attention-$name.json" || {
    status=$?
    [ "$status" -eq 124 ] || exit "$status"
    echo "time is up: the rows measured until now are in benchmarks/results/attention-$name.json"
}
