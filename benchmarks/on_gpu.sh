#!/bin/sh
# Everything that needs a Hopper GPU, in under ten minutes: is it right on the device, then how fast is it.
# Needs jax >= 0.11 with its CUDA plugin; torch for its two peers. Writes benchmarks/results/attention-<device>.json.
#
#     sh benchmarks/on_gpu.sh [python]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # processes share the device, and torch does
name=$("$python" -c "import jax; print(jax.devices()[0].device_kind.replace(' ', '-'))")

# Right first: widths, groups, windows, ragged lengths, offsets, packed segments, both directions. Nearly all of it is
# compiling, so six processes share it.
parts=6
running=
for part in $(seq "$parts"); do
    timeout 170 "$python" benchmarks/gpu_correctness.py --part "$part/$parts" &
    running="$running $!"
done
wrong=0
for process in $running; do
    wait "$process" || wrong=$?
done
if [ "$wrong" -ne 0 ]; then
    echo "not right on this device (status $wrong; 124 means that time was up): the benchmark is left out" >&2
    exit "$wrong"
fi

# Then fast. The kernels and cuDNN come first, rows are written as they are measured, and 60 s are left for the last one.
timeout 420 "$python" benchmarks/attention.py --seconds 0.3 --limit 360 --out "benchmarks/results/attention-$name.json"
