#!/bin/sh
# Everything that needs a Hopper GPU: is it right on the device, then how fast is it. Each part takes under ten minutes.
# Needs jax >= 0.11 with its CUDA plugin; torch and transformers for their rows. Writes benchmarks/results/.
#
#     sh benchmarks/on_gpu.sh flash [python]     flash_attention, forward and backward
#     sh benchmarks/on_gpu.sh paged [python]     paged_attention, decode steps, a long prompt
#     sh benchmarks/on_gpu.sh moe [python]       grouped_matmul, products of experts and their gradients
#     sh benchmarks/on_gpu.sh finetune [python]  LoRA steps of 3B and 8B, beside transformers and PEFT where they are
set -eu
cd "$(dirname "$0")/.."
what=${1:-}
python=${2:-python3}
case $what in
flash | paged | moe | finetune) ;;
*)
    echo "usage: sh benchmarks/on_gpu.sh flash|paged|moe|finetune [python]" >&2
    exit 2
    ;;
esac
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # processes share the device, and torch does
name=$("$python" -c "import jax; print(jax.devices()[0].device_kind.replace(' ', '-'))")

# Widths, groups, windows, ragged lengths, pages. Nearly all of it is compiling, so six processes share the cases of a
# script. Nothing is timed where something is wrong; status 124 means that time was up.
right() {
    running=
    for part in 1 2 3 4 5 6; do
        timeout 170 "$python" "$1" --part "$part/6" &
        running="$running $!"
    done
    wrong=0
    for process in $running; do
        wait "$process" || wrong=$?
    done
    if [ "$wrong" -ne 0 ]; then
        echo "not right on this device (status $wrong): the benchmark is left out" >&2
        exit "$wrong"
    fi
}

# Rows are written as they are measured: where time is up, those before it are kept.
case $what in
flash)
    right benchmarks/gpu_correctness.py
    # The kernels and cuDNN come first, and 60 s are left for the last row.
    timeout 420 "$python" benchmarks/attention.py --seconds 0.3 --limit 360 \
        --out "benchmarks/results/attention-$name.json"
    ;;
paged)
    right benchmarks/gpu_paged_correctness.py
    out=benchmarks/results/decode
    timeout 90 "$python" benchmarks/decode.py --parts attention --seconds 0.2 --out "$out-attention-$name.json"
    timeout 90 "$python" benchmarks/decode.py --parts prompt --out "$out-prompt-$name.json" || echo "the prompt: $?"
    timeout 230 "$python" benchmarks/decode.py --parts step --seconds 0.2 --out "$out-step-$name.json" || echo "steps: $?"
    ;;
moe)
    right benchmarks/gpu_grouped_correctness.py
    timeout 300 "$python" benchmarks/grouped.py --limit 240 --out "benchmarks/results/grouped-$name.json"
    ;;
finetune)
    # The losses of both sides are compared in every row that has both. A side that takes too long ends at the limit.
    timeout 590 "$python" benchmarks/finetune.py --limit 560 --out "benchmarks/results/finetune-$name.json"
    ;;
esac
