#!/usr/bin/env bash
# First contact with a GPU, in bounded stages:  benchmarks/gpu/campaign.sh check|bench|study|rest
#
#   check  the device, the tests that need one, code compiled for what follows      about 75 s
#   bench  iterations of every method, what bounds them: OUT/bench/bench.parquet     LIMIT seconds, 170
#   study  K x p0 of M-EBM on CIFAR-10, with FID: OUT/cifar10_gpu/*.parquet        LIMIT seconds, 300
#   rest   the rows of Table 6 that bench leaves out, many trials at once against one   LIMIT seconds, 300
#
# OUT is where results go (results/gpu), DATA the folder of CIFAR-10, PYTHON the interpreter.
# FID needs Inception's weights: set MEBM_INCEPTION_WEIGHTS where they cannot be downloaded.
set -u
cd "$(dirname "$0")/../.."
OUT=${OUT:-results/gpu} PYTHON=${PYTHON:-python3}
FAST=${FAST:-fused_norm=true,flipped_backward=true,parallel_branches=true}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
say() { echo "[$SECONDS s] $*"; }
# What takes longer than so many seconds is interrupted: its rows so far are written.
timed() {
    local seconds=$1; shift
    timeout -s INT -k 10 "$seconds" "$PYTHON" -m study.cli bench ${NETWORK:+--network "$NETWORK"} --out "$OUT/bench" "$@" 2>&1 | cut -c1-230
}

case ${1:-} in
check)
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,temperature.gpu --format=csv,noheader
    # Compile what the bench will use, while the tests run; these rows are thrown away.
    for job in "m-ebm:1 compiled" "m-jem:1 compiled" "m-ebm:1 eager,compiled $FAST" "m-jem:1 compiled $FAST"; do
        read -r method execution fields <<<"$job"
        # shellcheck disable=SC2086
        timeout "${LIMIT:-75}" "$PYTHON" -m study.cli bench --methods $method --precision bf16 --no-baseline --rounds 1 \
            --execution $execution ${fields:+--set ${fields//,/ --set }} --out "$OUT/warm" >>"$OUT/warm.log" 2>&1 &
    done
    parallel=$("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 6")
    # shellcheck disable=SC2086
    timeout "${LIMIT:-75}" "$PYTHON" -m pytest -q -p no:cacheprovider $parallel -m "gpu and not slow" --tb=short \
        tests/trainables/training/test_gpu.py tests/trainables/training/test_trainer.py tests/trainables/trial/test_gpu_energy.py \
        tests/trainables/training/test_drawing.py >"$OUT/pytest.log" 2>&1
    say tests; grep -E "^(FAILED|ERROR|E  )|passed|failed" "$OUT/pytest.log" | cut -c1-260 | tail -40
    wait; grep -E "^(m-|failed|mebm)" "$OUT/warm.log" | cut -c1-200; rm -rf "$OUT"/warm*; say end ;;
bench)
    share() { awk "BEGIN {printf \"%d\", ${LIMIT:-170} * $1}"; }
    timed "$(share 0.36)" --methods m-ebm:5,m-jem:5 --precision bf16 --execution eager,graphed,compiled-graphed \
        --also "$FAST" --profile --rounds 5 --seconds 0.4
    say loop
    timed "$(share 0.34)" --methods m-ebm:2,m-ebm:10,m-ebm:1,m-ebm:20,jem:20,m-jem:2,m-jem:10,m-jem:1,softmax,jem++:5,jem++:10,m-jem:20 \
        --precision bf16 --execution graphed --also "$FAST" --no-baseline --rounds 3 --seconds 0.25
    say methods
    timed "$(share 0.17)" --methods m-ebm:5 --precision bf16 --execution graphed --no-baseline --rounds 3 --seconds 0.25 \
        --also fused_norm=true --also fused_norm=true,flipped_backward=true --also fused_norm=true,parallel_branches=true \
        --also merge_bias=true --also frozen_copies=false --also "$FAST,cudnn_benchmark=true"
    say options
    timed "$(share 0.13)" --methods m-ebm:5,jem:20,m-jem:5,softmax,vera,jem++:10 --precision tf32,bf16 \
        --execution graphed,eager --no-baseline --rounds 3 --seconds 0.2
    say end ;;
study)
    # The budget ends it in order; a minute of start-up is not in it, and an interrupt still leaves every row.
    # Eight trials share the GPU: without MPS one waits for the other.
    export CUDA_MPS_PIPE_DIRECTORY=${TMPDIR:-/tmp}/mebm-mps CUDA_MPS_LOG_DIRECTORY=${TMPDIR:-/tmp}/mebm-mps
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY"
    nvidia-cuda-mps-control -d || unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    timeout -s INT -k 60 "${LIMIT:-300}" "$PYTHON" -m study.cli sweep cifar10_gpu --results "$OUT" \
        ${DATA:+--set data_dir="$DATA"} --set "budget.hours=$(awk "BEGIN {print (${LIMIT:-300} - 60) / 3600}")"
    [ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ] || echo quit | nvidia-cuda-mps-control
    say end ;;
rest)
    timed "$((${LIMIT:-300} / 2))" --methods m-jem:5,m-jem:20,jem++:10,vera,softmax,m-jem:10,jem++:5 --precision bf16,tf32 \
        --execution graphed,eager --no-baseline --rounds 3 --seconds 0.2
    timeout -s INT -k 10 "$((${LIMIT:-300} / 2))" "$PYTHON" -m benchmarks.overhead --suite packing --out "$OUT/bench" 2>&1 | cut -c1-230
    say end ;;
*)
    sed -n '2,10p' "$0"; exit 2 ;;
esac
