#!/usr/bin/env bash
# Everything that a machine with a GPU is needed for, in one command of at most 10 minutes: tests, kernels, engine. Output and figures go to a
# folder. PYTHON needs torch, triton, transformers, safetensors, numpy and pytest.
#   tests/benchmarks/gpu.sh [FOLDER] [SECONDS for the tests] [for the kernels] [for the engine]
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu} python=${PYTHON:-python3}
mkdir -p "$out"
status=0

run() { # NAME SECONDS COMMAND...: its output in $out/NAME.txt; its last lines here
    local name=$1 limit=$2
    shift 2
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || { status=1; echo "$name: failed or over $limit s"; }
    echo "== $name"
    tail -n 40 "$out/$name.txt"
}

run tests "${2:-200}" "$python" -m pytest -q --maxfail=10 -p no:cacheprovider tests/gpu
run kernels "${3:-200}" "$python" -m tests.benchmarks.kernels --out "$out/kernels.json" --tune "$out/configurations" --within "$((${3:-200} - 20))"
run engine "${4:-200}" "$python" -m tests.benchmarks.gpu_engine --out "$out/gpu_engine.json" --configurations "$out/configurations" \
    --within "$((${4:-200} - 30))"
exit $status
