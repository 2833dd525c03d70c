"""A whole step of an optimizer, from Python. Shape is tensors x rows x columns of each.

Bytes: the gradient read, the parameter and its state read and written, 8-bit state with its scales; LAMB reads
everything once more for its norms. The C loop moves the same bytes and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ... import optim
from .. import peers
from ..case import Absent, Cell, Context, Entry, Provider
from ..ceilings import UpdateLoop

OP = "optimizer_step"
BLOCK = 256
LARGE = (4, 2500, 5000)  # 50 M parameters
SMALL = (300, 16, 64)


@dataclass(frozen=True)
class Step:
    """One row: which optimizer of pykernels.optim with which options, and what torch calls it."""

    optimizer: str
    dtype: torch.dtype = torch.float32
    slots: int = 2
    passes: int = 1  # over parameters, gradients and state
    options: dict[str, Any] = field(default_factory=dict)
    torch_options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [self.optimizer, str(self.dtype).removeprefix("torch.")]
        words += [f"{self.options['state_bits']}-bit state"] if "state_bits" in self.options else []
        return " ".join(words + ([self.options["rounding"]] if "rounding" in self.options else []))

    @property
    def updated(self) -> list[float]:
        """Bytes of an element in each array that is read and written."""
        bits = self.options.get("state_bits", 32)
        state = [bits / 8] * self.slots + ([4 / BLOCK] * self.slots if bits == 8 else [])
        extra = [2.0] if self.options.get("rounding") in ("kahan", "split_master") else []
        return [self.dtype.itemsize, *state, *extra]


STEPS = [
    Step("AdamW"),
    Step("AdamW", options={"state_bits": 8}),
    Step("AdamW", torch.bfloat16),
    Step("AdamW", torch.bfloat16, options={"state_bits": 8, "rounding": "stochastic"}),
    Step("AdamW", torch.bfloat16, options={"state_bits": 8, "rounding": "split_master"}),
    Step("LAMB", passes=2),
    Step("Lion", slots=1),
    Step("SGD", slots=1, options={"lr": 1e-3, "momentum": 0.9}, torch_options={"lr": 1e-3, "momentum": 0.9}),
    Step("Adagrad", slots=1),
    Step("RMSprop", slots=1),
]


def work(tensors: int, rows: int, columns: int, itemsize: int, updated: float, passes: int = 1) -> int:
    """Bytes of one step; updated: bytes of an element that are read and written, its itemsize among them."""
    return int(tensors * rows * columns * (2 * updated + itemsize + (passes - 1) * (updated + itemsize)))


def cells(quick: bool, cuda: bool) -> list[Cell]:
    large = (2, 256, 512) if quick else LARGE
    chosen = [(large, step) for step in (STEPS[:2] if quick else STEPS)]
    chosen += [((30, *SMALL[1:]) if quick else SMALL, step) for step in STEPS[:2]]
    return [
        Cell(
            OP,
            "x".join(map(str, dims)),
            0,
            work(*dims, step.dtype.itemsize, sum(step.updated), step.passes),
            "copy",
            partial(build, step=step),
            variant=step.name,
            seconds=0.4 if quick or cuda else 6.0 if dims == LARGE else 2.0,
        )
        for dims, step in chosen
    ]


def build(cell: Cell, context: Context, step: Step) -> Iterator[Entry]:
    tensors, rows, columns = cell.dims
    grads = [1e-2 * context.randn(rows, columns) for _ in range(tensors)]

    def parameters(dtype: torch.dtype) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for grad in grads:
            found.append(torch.nn.Parameter(torch.ones(rows, columns, dtype=dtype, device=context.device)))
            found[-1].grad = grad.to(dtype)
        return found

    def of(make: Callable[..., Any], dtype: torch.dtype = step.dtype, **options: Any) -> Provider:
        optimizer = make(parameters(dtype), **options)
        return Provider(lambda i: optimizer.step(), str(dtype).removeprefix("torch."))

    def of_dtensors(make: Callable[..., Any], **options: Any) -> Provider:
        """The same parameters as DTensors of a mesh of one rank: what the wrapping alone costs."""
        optimizer = make(_as_dtensors(parameters(step.dtype), context.device), **options)
        return Provider(lambda i: optimizer.step(), str(step.dtype).removeprefix("torch."), note="DTensors, 1 rank")

    def torch_step(dtype: torch.dtype, **how: bool) -> Provider:
        make = getattr(torch.optim, step.optimizer, None)
        if make is None:
            raise Absent(f"torch.optim has no {step.optimizer}")
        try:
            return of(make, dtype, **step.torch_options, **how)
        except TypeError as error:
            raise Absent(f"torch.optim.{step.optimizer}: {error}") from error

    def eight_bit(library: str, name: str) -> Provider:
        module = peers.require(library)
        if not hasattr(module, name):
            raise Absent(f"{library} has no {name}")
        return of(getattr(module, name))

    def loop() -> Provider:
        if context.device.type != "cpu":
            raise Absent("a loop on the CPU")
        count = tensors * rows * columns
        updated = [int(count * size) for size in step.updated]
        run = UpdateLoop(updated, [count * step.dtype.itemsize], torch.get_num_threads())
        reads = [*updated, count * step.dtype.itemsize]
        before = [UpdateLoop([], reads, torch.get_num_threads())] * (step.passes - 1)

        def call(_index: int) -> None:
            for each in (*before, run):
                each()

        return Provider(call, "", note=f"{cell.bytes / count:.2f} bytes a parameter")

    yield "pykernels", lambda: of(getattr(optim, step.optimizer), **step.options)
    yield "torch fused float32", lambda: torch_step(torch.float32, fused=True)
    if step.dtype != torch.float32:
        yield "torch fused bfloat16", lambda: torch_step(step.dtype, fused=True)
    yield "torch foreach", lambda: torch_step(step.dtype, foreach=True)
    if step.options.get("state_bits") == 8 and tensors == LARGE[0]:
        yield "bitsandbytes 8-bit", lambda: eight_bit("bitsandbytes.optim", f"{step.optimizer}8bit")
        yield "torchao 8-bit", lambda: eight_bit("torchao.optim", f"{step.optimizer}8bit")
    if rows != SMALL[1]:
        yield "C loop", loop
    else:
        yield "pykernels DTensor", lambda: of_dtensors(getattr(optim, step.optimizer), **step.options)
        yield "torch fused DTensor", lambda: of_dtensors(getattr(torch.optim, step.optimizer), fused=True)


def _as_dtensors(params: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    if device.type != "cpu" or not dist.is_available():
        raise Absent("a mesh of gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: list[torch.Tensor] = []
    for p in params:
        grad = p.grad
        assert grad is not None
        found.append(torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
        found[-1].grad = distribute_tensor(grad, mesh, [Shard(0)])
    return found
