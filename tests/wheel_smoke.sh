#!/usr/bin/env bash
# Installs a wheel into a second, empty environment and uses it there, away from the source tree.
set -euo pipefail
python=$1
wheel=$(realpath "$2")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q -c "$constraints" "$wheel"
cd "$folder"
PYKERNELS_REQUIRE_NATIVE=1 "$folder/venv/bin/python" - <<'PY'
import torch

import pykernels
import pykernels.functional as F

assert pykernels._library.serving("int8_linear", "cpu")[0] == "native", pykernels._library.serving("int8_linear", "cpu")
weight, x = torch.randn(96, 130), torch.randn(5, 130)
quantised = F.quantize_rowwise(weight)
with pykernels.backend("reference"):
    expected = F.int8_linear(x, quantised, activation="silu")
torch.testing.assert_close(F.int8_linear(x, quantised, activation="silu"), expected, rtol=1e-5, atol=1e-5)
model = torch.nn.Sequential(torch.nn.Linear(130, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
before = model(x)
print(pykernels.quantize_(model, pykernels.Int8DynamicConfig()))
assert (model(x) - before).abs().max() < 0.1
PY
"$folder/venv/bin/python" -m pykernels info
echo "wheel smoke test: passed"
