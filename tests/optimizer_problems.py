"""Lists of tensors for the optimizers' operators, and how their results are compared."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pykernels.ops import _optimizer_reference as rules
from pykernels.ops._optimizer_codes import scale_shape

NUMBERS = {  # beta1, beta2, eps, weight_decay
    rules.ADAM: (0.9, 0.999, 1e-8, 0.01),
    rules.LAMB: (0.9, 0.999, 1e-6, 0.01),
    rules.LION: (0.9, 0.99, 0.0, 0.1),
    rules.SGD: (0.9, 0.1, 0.0, 0.01),
    rules.ADAGRAD: (0.1, 0.0, 1e-10, 0.01),
    rules.RMSPROP: (0.9, 0.99, 1e-8, 0.01),
}
STATE_KINDS = ("float32", "bfloat16", "codes")
# Blocks of 64 meet the last of a row from below, exactly and from above; a vector is cut at 3, 17 and 65; one tensor is
# long enough for a second thread, one has no elements, one no dimensions where codes do not forbid it.
SHAPES = [(3, 64), (2, 3, 17), (1, 1), (5, 65), (0, 7), (37, 150)]
PLAIN_SHAPES = [*SHAPES, (), (33,)]


@dataclass
class Problem:
    """The arguments of optimizer_update_."""

    algorithm: int
    flags: int
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    scales: list[Tensor]
    extras: list[Tensor]
    steps: list[Tensor]
    rounding: int
    numbers: tuple[float, float, float, float]
    lr: float = 1e-2
    seed: int = 0x1234567890
    place: list[int] = field(default_factory=list)
    block_size: int = 64
    ratio: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.states, self.scales, self.extras, self.steps

    def clone(self, **changes: Any) -> "Problem":
        copies = [[tensor.clone() for tensor in tensors] for tensors in self.lists()]
        names = ("params", "grads", "states", "scales", "extras", "steps")
        return dataclasses.replace(self, **dict(zip(names, copies, strict=True)) | changes)

    def update(self) -> "Problem":
        torch.ops.pykernels.optimizer_update_(
            self.algorithm, self.flags, *self.lists(), torch.tensor(self.lr, dtype=torch.float64), *self.numbers,
            self.rounding, self.seed, self.place, self.block_size, self.ratio, self.grad_scale, self.found_inf,
        )  # fmt: skip
        return self

    def norms(self) -> Tensor:
        return torch.ops.pykernels.optimizer_norms(
            self.algorithm, self.flags, *self.lists(), *self.numbers, self.rounding, self.block_size, self.grad_scale
        )

    def draw_gradients(self, generator: torch.Generator) -> None:
        for grad in self.grads:
            # Magnitudes over several decades, and elements that have no gradient.
            values = torch.randn(grad.shape, generator=generator) * 10.0 ** torch.empty(grad.shape).uniform_(
                -3, 1, generator=generator
            )
            grad.copy_(torch.where(torch.rand(grad.shape, generator=generator) < 0.1, torch.zeros(()), values))


def problem(
    algorithm: int,
    flags: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    state: str = "float32",
    rounding: int = rules.NEAREST,
    shapes: list[tuple[int, ...]] | None = None,
    block_size: int = 64,
    seed: int = 0,
) -> Problem:
    """Fresh parameters and gradients, and states of zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or (SHAPES if state == "codes" else PLAIN_SHAPES)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grads = [torch.empty(shape, dtype=grad_dtype or dtype) for shape in shapes]
    plain = torch.float64 if dtype == torch.float64 else getattr(torch, state) if state != "codes" else None
    states, scales = [], []
    for sign in rules.slots(algorithm, flags):
        kind = plain or (torch.int8 if sign == "s" else torch.uint8)
        states += [torch.zeros(shape, dtype=kind) for shape in shapes]
        if state == "codes":
            scales += [torch.zeros(scale_shape(p.shape, block_size)) for p in params]
    extras = []
    if rounding in (rules.KAHAN, rules.SPLIT_MASTER):
        kind = torch.int16 if rounding == rules.SPLIT_MASTER else dtype
        extras = [torch.zeros(shape, dtype=kind) for shape in shapes]
    steps = [torch.zeros(()) for _ in shapes]
    made = Problem(
        algorithm, flags, params, grads, states, scales, extras, steps, rounding, NUMBERS[algorithm],
        block_size=block_size,
    )  # fmt: skip
    made.draw_gradients(generator)
    return made


def assert_same_bits(got: Problem, wanted: Problem, what: str = "") -> None:
    """Every tensor the operator writes, bit for bit; a NaN equals any other."""
    for name in ("params", "states", "scales", "extras", "steps"):
        for i, (a, b) in enumerate(zip(getattr(got, name), getattr(wanted, name), strict=True)):
            torch.testing.assert_close(
                a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name, j=i: f"{what} {n}[{j}]: {text}"
            )
            if a.is_floating_point():  # 0 and -0 are equal above
                number = ~torch.isnan(a)
                assert torch.equal(torch.signbit(a)[number], torch.signbit(b)[number]), f"{what} {name}[{i}]: signs"
