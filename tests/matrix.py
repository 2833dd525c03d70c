"""What the operator tests share: the backends of this machine, the shape grid, and errors measured against truth."""

import contextlib
import os
from collections.abc import Iterator

import torch

import pykernels
from pykernels import _library

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# "native:<isa>" for each instruction set this CPU has. Triton's interpreter takes milliseconds a program, so it gets
# the shapes marked small only.
ISAS = [
    f"native:{isa}"
    for isa in _library.CPU_ISAS[: _library.CPU_ISAS.index(_library.current_cpu_isa() or "portable") + 1]
]
BACKENDS = ["reference", *ISAS, "triton"]
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Forces one of BACKENDS."""
    name, _, isa = backend.partition(":")
    if name == "native":
        with pykernels.cpu_isa(isa):
            yield
    else:
        with pykernels.backend(name):
            yield


# (M, N, K) of a product. The kernels have 64-byte steps along K, panels of 64 or 16 columns, tiles of 6 or 4 rows, and
# another path for few rows: each edge is met from below, exactly and from above, alone and together; 1 and 0 too.
PRODUCTS_SMALL = [
    (1, 1, 1),
    (1, 64, 64),
    (2, 3, 5),
    (5, 17, 33),
    (7, 65, 63),
    (16, 33, 128),
    (3, 4, 0),
    (0, 8, 16),
    (4, 0, 16),
]
PRODUCTS = [
    *PRODUCTS_SMALL,
    (6, 64, 64),
    (13, 129, 127),
    (32, 63, 65),
    (33, 64, 260),
    (64, 128, 192),
    (65, 200, 1000),
    (130, 70, 515),
    (1, 1000, 4099),
]


def products(backend: str) -> list[tuple[int, int, int]]:
    """The grid a backend is fast enough for."""
    return PRODUCTS_SMALL if backend == "triton" else PRODUCTS


def assert_within_roundings(got: torch.Tensor, truth: torch.Tensor, slack: float, magnitude: torch.Tensor) -> None:
    """|got - truth| is at most one rounding of the output plus `slack` float32 roundings of the terms' magnitude.

    magnitude: float64, the sum of the absolute values that the float32 epilogue adds up, so that cancellation is
    allowed for and nothing else is.
    """
    truth = truth.double()
    ulp = EPS[got.dtype] * truth.abs().clamp(min=torch.finfo(got.dtype).tiny)
    bound = (0.5 * ulp if got.dtype != torch.float32 else 0.0) + slack * EPS[torch.float32] * magnitude
    error = (got.double() - truth).abs()
    worst = (error - bound).argmax() if error.numel() else 0
    assert bool((error <= bound).all()), (
        f"error {error.flatten()[worst].item():.3e} over the bound {bound.flatten()[worst].item():.3e}, "
        f"truth {truth.flatten()[worst].item():.6e}"
    )
