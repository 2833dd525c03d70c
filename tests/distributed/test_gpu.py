"""One NCCL rank on a GPU: every stage and every way to offload trains as the plain optimizer does there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pykernels import optim
from pykernels.distributed import OffloadedOptimizer, load_checkpoint, save_checkpoint, zero

from .models import Mlp, values

pytestmark = pytest.mark.gpu
OFFLOADS = [None, "optimizer", "optimizer_zero_copy", "parameters"]


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    numbers = torch.Generator().manual_seed(3)
    for _ in range(steps):
        tokens = torch.randint(31, (8, 9), generator=numbers).cuda()
        logits = model(tokens[:, :-1]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_near(ours: torch.nn.Module, expected: torch.nn.Module) -> None:
    """The embedding's gradient is summed in no fixed order: 5 steps of Adam keep that below 1e-5."""
    for (name, a), b in zip(values(ours).items(), values(expected).values(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("cls", [optim.AdamW, torch.optim.AdamW])
def test_stages(cls: Any, stage: int, offload: str | None, tmp_path: Any) -> None:
    if stage == 1 and offload == "parameters":
        with pytest.raises(ValueError, match="got stage 1"):
            zero(Mlp().cuda(), cls, stage, offload=offload)
        return
    plain = Mlp().cuda()
    reference = cls(plain.parameters(), lr=1e-2)
    model, optimizer = zero(Mlp().cuda(), cls, stage, offload=offload, lr=1e-2)
    train(plain, reference, 3)
    train(model, optimizer, 3)
    save_checkpoint(tmp_path / "here", model, optimizer)
    load_checkpoint(tmp_path / "here", model, optimizer)
    train(plain, reference, 2)
    train(model, optimizer, 2)
    assert_near(model, plain)
    if offload == "optimizer":
        for state in optimizer.state.values():
            assert all(value.device.type == "cpu" for value in state.values())


def test_without_ranks() -> None:
    plain, ours = Mlp().cuda(), Mlp().cuda()
    reference = optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(ours.parameters(), optim.AdamW, lr=1e-2, bucket_bytes=1)
    train(plain, reference, 5)
    train(ours, optimizer, 5)
    assert_near(ours, plain)
