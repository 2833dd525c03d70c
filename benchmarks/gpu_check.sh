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
step timeout 200 "$python" -m pytest -q -m gpu --junitxml "$out/$name-tests.xml"
step timeout 220 "$python" -m pykernels bench --gpu --csv "$out/$name.csv"
echo "== results in $out/$name.csv; note the date and the commit in docs/gpu_status.md"
exit $status
