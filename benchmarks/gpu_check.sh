#!/usr/bin/env bash
# On a machine with a GPU and its own torch: build for it, run the GPU half of the tests, measure. Nothing is fetched.
# OUT (default benchmarks/results) receives <gpu>.csv and the logs. DRY_RUN=1 rehearses it without a GPU: it builds, asks
# what serves, collects the tests, plans every cell and writes the table's skeleton to OUT (default build/gpu-check).
set -uo pipefail
python=${1:-python3}
cd "$(dirname "$0")/.."
dry=${DRY_RUN:-}
out=${OUT:-$([ -n "$dry" ] && echo build/gpu-check || echo benchmarks/results)}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
status=0
step() {
  echo "== $*"
  "$@" || { status=1; echo "== FAILED: $*"; }
}
# What a rehearsal can do of a step stands after --, where it is another command.
step_or() {
  local real=()
  while [ "$1" != -- ]; do real+=("$1"); shift; done
  shift
  if [ -n "$dry" ]; then echo "== would run: ${real[*]}"; step "$@"; else step "${real[@]}"; fi
}
"$python" -c 'import torch' 2>/dev/null || { echo "gpu-check: $python has no torch; name one that has: make gpu-check GPU_PYTHON=.venv/bin/python"; exit 2; }
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$name" ]; then
  [ -n "$dry" ] || { echo "gpu-check: this torch sees no CUDA device; DRY_RUN=1 rehearses the steps"; exit 1; }
  name=gpu
fi
step "$python" setup.py -q build_ext --inplace
step "$python" -m pykernels info
step_or timeout 300 "$python" -m pytest -q -m gpu --junitxml "$out/$name-tests.xml" -- \
  "$python" -m pytest -q -m gpu --collect-only -p no:cacheprovider -o addopts=
# The CUDA kernels on small shapes under the sanitizer: stray accesses, and shared memory that is read too early.
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    step_or timeout 200 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -m gpu -k small_grid \
      tests/test_hopper_gpu.py tests/test_cuda_gpu.py -- "$sanitizer" --version
  done
else
  echo "== compute-sanitizer is absent: it comes with the CUDA toolkit"
fi
# The INT8 products first: compiling the peers of the blocks takes most of what time there is.
int8="int8_linear int8_matmul int8_weight_only_linear quantize_rowwise quantize_both int8_training_linear"
int8="$int8 int8_grouped_linear int8_block_scaled_linear"
blocks="linear_cross_entropy rms_norm swiglu cross_entropy rope dropout layer_norm geglu linear_kl_div"
step_or timeout 150 "$python" -m pykernels bench $int8 --gpu --limit 110 --csv "$out/$name.csv" -- \
  "$python" -m pykernels bench $int8 --gpu --dry-run --csv "$out/$name.csv"
step_or timeout 120 "$python" -m pykernels bench $blocks --gpu --limit 70 --csv "$out/$name.csv" --resume -- \
  "$python" -m pykernels bench $blocks --gpu --dry-run
# The layers of Llama-3, 72 cells: what the limit leaves out is measured by running this again. PYKERNELS_TMA=0 and
# another OUT give the Triton rows without the persistent kernel.
step_or timeout "${LLAMA_SECONDS:-300}" "$python" -m pykernels bench int8_llama --gpu \
  --limit "$((${LLAMA_SECONDS:-300} - 60))" --csv "$out/$name-llama.csv" --resume -- \
  "$python" -m pykernels bench int8_llama --gpu --dry-run --csv "$out/$name-llama.csv"
echo "== results in $out/$name.csv and $out/$name-llama.csv; note the date and the commit in docs/gpu_status.md"
exit $status
