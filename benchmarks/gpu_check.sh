#!/usr/bin/env bash
# On a machine with a GPU and its own torch: build for it, run the GPU half of the tests, measure. Nothing is fetched.
# OUT (default benchmarks/results) receives <gpu>.csv and the logs. DRY_RUN=1 prints the steps and builds, runs nothing else.
set -uo pipefail
python=${1:-python3}
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
status=0
step() {
  echo "== $*"
  [ -n "${DRY_RUN:-}" ] || "$@" || { status=1; echo "== FAILED: $*"; }
}
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$name" ]; then
  [ -n "${DRY_RUN:-}" ] || { echo "gpu-check: this torch sees no CUDA device; DRY_RUN=1 shows the steps"; exit 1; }
  name=gpu
fi
step "$python" setup.py -q build_ext --inplace
step "$python" -m pykernels info
step timeout 300 "$python" -m pytest -q -m gpu --junitxml "$out/$name-tests.xml"
# The INT8 products first: compiling the peers of the blocks takes most of what time there is.
int8="int8_linear int8_matmul int8_weight_only_linear quantize_rowwise quantize_both int8_training_linear"
blocks="linear_cross_entropy rms_norm swiglu cross_entropy rope dropout layer_norm geglu linear_kl_div"
step timeout 150 "$python" -m pykernels bench $int8 --gpu --limit 110 --csv "$out/$name.csv"
step timeout 120 "$python" -m pykernels bench $blocks --gpu --limit 70 --csv "$out/$name.csv" --resume
echo "== results in $out/$name.csv; note the date and the commit in docs/gpu_status.md"
exit $status
