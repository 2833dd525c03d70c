"""What an installed wheel must do, away from the source tree: a little of every part, each against its reference."""

import importlib.metadata
import subprocess
import sys

import torch

import pykernels
import pykernels.functional as F
from pykernels.optim import AdamW


def against_reference(call, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """The compiled kernel and the reference in plain PyTorch give the same."""
    with pykernels.backend("reference"):
        expected = call()
    torch.testing.assert_close(call(), expected, rtol=rtol, atol=atol)


def main() -> None:
    torch.manual_seed(0)
    for op in ("int8_linear", "rms_norm", "cross_entropy", "optimizer_update_"):
        serving = pykernels._library.serving(op, "cpu")
        assert serving[0] == "native", f"{op}: {serving}"

    weight, x = torch.randn(96, 130), torch.randn(5, 130)
    quantised = F.quantize_rowwise(weight)
    against_reference(lambda: F.int8_linear(x, quantised, activation="silu"))
    against_reference(lambda: F.int8_weight_only_linear(x, quantised), atol=1e-3)
    against_reference(lambda: F.rms_norm(x, torch.ones(130)))
    against_reference(lambda: F.linear_cross_entropy(x, weight, torch.arange(5)))
    leaf = x.clone().requires_grad_()
    against_reference(lambda: torch.autograd.grad(F.norm_linear(leaf, [weight, weight])[1].square().mean(), leaf)[0])

    model = torch.nn.Sequential(torch.nn.Linear(130, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    before = model(x)
    print(pykernels.quantize_(model, pykernels.Int8DynamicConfig()))
    assert (model(x) - before).abs().max() < 0.1

    block = pykernels.nn.TransformerBlock(64, 4, num_kv_heads=2, intermediate_size=176, save="int8")
    optimizer = AdamW(block.parameters(), lr=1e-3, state_bits=8)
    tokens, losses = torch.randn(2, 16, 64), []
    for _ in range(8):
        losses.append(block(tokens).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    installed = importlib.metadata.version("pykernels")
    assert installed == pykernels.__version__
    for command in (("info",), ("plan", "--params", "7.5e9", "--world-size", "64")):
        subprocess.run([sys.executable, "-m", "pykernels", *command], check=True, stdout=subprocess.DEVNULL)
    print(f"pykernels {installed} works beside torch {torch.__version__}")


if __name__ == "__main__":
    main()
