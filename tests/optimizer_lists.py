"""Calls of optimizer_update_ to compare backends with: tensors of awkward shapes with every kind of state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pykernels import _library
from pykernels.ops import _optimizer_codes as codes
from pykernels.ops import _optimizer_reference as rules
from pykernels.ops._optimizer_reference import ALGORITHMS, FLAGS, ROUNDINGS

# (algorithm, flags, weight_decay): every branch of every rule.
RULES = [
    ("adam", "decoupled", 0.1),
    ("adam", "maximize", 0.01),
    ("adam", "amsgrad decoupled", 0.0),
    ("adam", "uncorrected amsgrad", 0.0),
    ("lamb", "", 0.1),
    ("lamb", "uncorrected maximize", 0.0),
    ("lion", "", 0.1),
    ("lion", "maximize", 0.0),
    ("sgd", "", 0.01),
    ("sgd", "momentum", 0.0),
    ("sgd", "momentum nesterov maximize", 0.01),
    ("adagrad", "", 0.01),
    ("rmsprop", "", 0.0),
    ("rmsprop", "momentum", 0.01),
    ("rmsprop", "centered", 0.0),
    ("rmsprop", "momentum centered maximize", 0.0),
]
# What a program, a block, a vector and a thread do not divide; a long row, one column, nothing, and what all divide.
SHAPES = [(3, 300), (0, 8), (5, 1), (2, 2, 256)]
FLAT = [(7,), ()]


@dataclass
class Call:
    """The arguments of one call; `run` makes it with an implementation of the operator."""

    rule: str
    flags: str = ""
    weight_decay: float = 0.0
    state: str = "float32"
    rounding: str = "nearest"
    param: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    block_size: int = 64
    shapes: list = field(default_factory=lambda: [*SHAPES, *FLAT])
    step: int = 0
    seed: int = 2**40 + 3
    place: list = field(default_factory=list)
    device: str = "cpu"  # where everything goes once it is made

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(17)
        if self.state == "codes":
            self.shapes = [s for s in self.shapes if len(s) > 1]
        self.number = ALGORITHMS[self.rule]
        self.bits = sum(FLAGS[f] for f in self.flags.split())

        def draw(size: float) -> list[torch.Tensor]:
            return [torch.randn(s, generator=generator, dtype=torch.float64) * size for s in self.shapes]

        masters = [m.to(torch.float64 if self.param == torch.float64 else torch.float32) for m in draw(1)]
        self.params = [m.to(self.param) for m in masters]
        self.grads = [g.to(self.grad) for g in draw(1e-2)]
        self.states, self.scales, self.extras = [], [], []
        for slot in rules.slots(self.number, self.bits):
            for value in draw(1e-2):
                self._add_state(slot, value if slot == "s" else value.square())
        for i, master in enumerate(masters if self.rounding in ("kahan", "split_master") else []):
            if self.rounding == "split_master":
                self.params[i], low = codes.split_master(master)
                self.extras.append(low)
            else:
                self.extras.append((master - self.params[i].to(master.dtype)).to(self.param))
        self.steps = [torch.full((), float(self.step)) for _ in self.shapes]
        for tensors in self.lists():
            tensors[:] = [t.to(self.device) for t in tensors]

    def _add_state(self, slot: str, value: torch.Tensor) -> None:
        if self.state != "codes":
            self.states.append(value.to(getattr(torch, self.state)))
            return
        like = torch.empty((), dtype=torch.int8 if slot == "s" else torch.uint8)
        code, scale = codes.encode(value.float(), like, torch.zeros_like(value, dtype=torch.int64), self.block_size)
        self.states.append(code)
        self.scales.append(scale)

    def lists(self) -> list[list[torch.Tensor]]:
        return [self.params, self.grads, self.states, self.scales, self.extras, self.steps]

    def numbers(self) -> tuple[float, ...]:
        # Adagrad's first is its decay of the learning rate, SGD's second its dampening.
        beta1, beta2 = {"adagrad": (0.01, 0.0), "sgd": (0.9, 0.1)}.get(self.rule, (0.9, 0.99))
        return beta1, beta2, 1e-8, self.weight_decay

    def run(self, op, lr=1e-2, ratio=None, grad_scale=None, found_inf=None) -> None:
        lr = torch.tensor(lr, dtype=torch.float64, device=self.device) if isinstance(lr, float) else lr
        rest = (ROUNDINGS[self.rounding], self.seed, self.place, self.block_size, ratio, grad_scale, found_inf)
        op(self.number, self.bits, *self.lists(), lr, *self.numbers(), *rest)

    def norms(self, op, grad_scale=None) -> torch.Tensor:
        rest = (ROUNDINGS[self.rounding], self.block_size, grad_scale)
        return op(self.number, self.bits, *self.lists(), *self.numbers(), *rest)

    def written(self) -> list[torch.Tensor]:
        """What the operator may change, on the CPU."""
        found = [t.cpu() for part in (self.params, self.states, self.scales, self.extras, self.steps) for t in part]
        return [t.clone() for t in found]


def reference(name: str = "optimizer_update_"):
    return _library.OPS[name].reference


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Bit for bit, but for the payload of a NaN and the sign of a zero."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype and g.shape == w.shape
        same = torch.equal(g, w) or torch.equal(g.double().nan_to_num(7e9), w.double().nan_to_num(7e9))
        assert same, f"tensor {i}: {int((g != w).sum())} of {g.numel()} differ, {g[g != w][:3]} for {w[g != w][:3]}"
