"""Optimizer updates: each rule, each way state is kept and parameters are rounded, with vector loads and without."""

from collections.abc import Iterator

import torch

from pykernels.kernels._optimizer_kernel import prepare_step
from pykernels.kernels.optimizer_update import PREPARED, optimizer_norms, optimizer_update_
from pykernels.kernels.tensor_norms import scale_tensors_, squared_norms

ADAM, LAMB, LION, SGD, ADAGRAD, RMSPROP = range(6)
DECOUPLED, AMSGRAD, NESTEROV, MOMENTUM, CENTERED = 2, 4, 8, 16, 32
NEAREST, STOCHASTIC, KAHAN, SPLIT_MASTER = range(4)
F32, BF16 = torch.float32, torch.bfloat16


def calls() -> Iterator[tuple]:
    every, hopper = (80, 90, 100), (90,)

    def lists(slots: str, p: torch.dtype, g: torch.dtype, state, rounding: int, shape=(64, 1024), block=256) -> list:
        kinds = {"s": torch.int8, "u": torch.uint8}
        states = [torch.empty(shape, dtype=kinds[slot] if state == "codes" else state) for slot in slots]
        scales = [torch.empty(shape[0], -(-shape[1] // block)) for _ in slots] if state == "codes" else []
        extra = {KAHAN: p, SPLIT_MASTER: torch.int16}.get(rounding)
        extras = [torch.empty(shape, dtype=extra)] if extra else []
        param, grad = torch.empty(shape, dtype=p), torch.empty(shape, dtype=g)
        return [[param], [grad], states, scales, extras, [torch.zeros(())]]

    def step(rule, flags, slots, p, g, state, rounding, decay=0.1, scaler=False, **shape) -> None:
        given = lists(slots, p, g, state, rounding, **shape)
        one = torch.ones(()) if scaler else None
        ratio = torch.ones(1) if rule == LAMB else None
        numbers = (0.9, 0.999, 1e-8, decay)
        block = shape.get("block", 256)
        optimizer_update_(rule, flags, *given, torch.ones(()), *numbers, rounding, 7, [], block, ratio, one, one)

    def norms(state, p, rounding) -> None:
        optimizer_norms(
            LAMB, 0, *lists("su", p, p, state, rounding), 0.9, 0.999, 1e-8, 0.1, rounding, 256, torch.ones(())
        )

    for label, archs, *given in (
        ("adamw float32", every, ADAM, DECOUPLED, "su", F32, F32, F32, NEAREST),
        ("adamw codes", every, ADAM, DECOUPLED, "su", F32, F32, "codes", NEAREST),
        ("adamw bf16 stochastic codes", every, ADAM, DECOUPLED, "su", BF16, BF16, "codes", STOCHASTIC),
        ("adamw bf16 split master codes", every, ADAM, DECOUPLED, "su", BF16, BF16, "codes", SPLIT_MASTER),
        ("adamw bf16 kahan bf16 state", every, ADAM, DECOUPLED, "su", BF16, BF16, BF16, KAHAN),
        ("adam amsgrad codes", every, ADAM, AMSGRAD, "suu", F32, BF16, "codes", NEAREST),
        ("lamb codes", hopper, LAMB, 0, "su", F32, F32, "codes", NEAREST),
        ("lion codes stochastic", every, LION, 0, "s", BF16, BF16, "codes", STOCHASTIC),
        ("sgd nesterov", hopper, SGD, MOMENTUM | NESTEROV, "s", F32, F32, F32, NEAREST),
        ("sgd plain bf16", hopper, SGD, 0, "", BF16, F32, F32, STOCHASTIC),
        ("adagrad codes", hopper, ADAGRAD, 0, "u", F32, F32, "codes", NEAREST),
        ("rmsprop centered momentum codes", every, RMSPROP, MOMENTUM | CENTERED, "uss", F32, F32, "codes", NEAREST),
    ):
        yield label, archs, None, lambda given=given: step(*given)
    adamw = (ADAM, DECOUPLED, "su")
    yield "adamw scaler", hopper, None, lambda: step(*adamw, BF16, BF16, F32, SPLIT_MASTER, scaler=True)
    yield (
        "adamw unaligned stochastic codes",
        every,
        None,
        lambda: step(*adamw, BF16, BF16, "codes", STOCHASTIC, shape=(63, 999)),
    )
    yield (
        "adamw blocks of 4096",
        every,
        None,
        lambda: step(*adamw, BF16, BF16, "codes", STOCHASTIC, shape=(8, 8192), block=4096),
    )
    yield "adamw blocks of 100", hopper, None, lambda: step(*adamw, F32, F32, "codes", NEAREST, block=100)
    yield "adamw float64", hopper, None, lambda: step(*adamw, torch.float64, torch.float64, torch.float64, NEAREST)
    one = torch.ones(4)
    yield (
        "rate and steps of the host",
        hopper,
        None,
        lambda: prepare_step[(1,)](
            torch.ones(64, dtype=torch.int64), one.double(), one, None, 1e-3, None, None, 1,
            ALGORITHM=ADAM, FLAGS=DECOUPLED, UPDATE=True, BLOCK=PREPARED, num_warps=4, enable_fp_fusion=False,
        ),
    )  # fmt: skip
    yield "norms codes", every, None, lambda: norms("codes", BF16, SPLIT_MASTER)
    yield "norms float32", hopper, None, lambda: norms(F32, F32, NEAREST)
    many = [torch.empty(64, 1024), torch.empty(77, dtype=BF16)]
    yield "squared norms", every, None, lambda: squared_norms(many)
    yield "scale tensors", every, None, lambda: scale_tensors_(many, torch.ones(()))
