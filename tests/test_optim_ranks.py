"""DTensors on three gloo ranks: the result of one rank, bit for bit, norms and randomness included."""

import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pykernels import optim

RANKS = 3
# 257 rows do not divide by 3; one row leaves two ranks without any; a matrix cut along its columns in whole blocks.
SHAPES = {"uneven": ((257, 40), 0), "empty": ((1, 70), 0), "bias": ((100,), 0), "columns": ((9, 3 * 64), 1)}
LOW = {"min_8bit_size": 16, "block_size": 32}
RUNS: list[tuple[Any, torch.dtype, dict[str, Any]]] = [
    (optim.AdamW, torch.float32, {}),
    (optim.AdamW, torch.bfloat16, {"state_bits": 8, "rounding": "stochastic", **LOW}),
    (optim.SGD, torch.bfloat16, {"momentum": 0.9, "state_bits": 16, "rounding": "split_master"}),
    (optim.Lion, torch.bfloat16, {"state_bits": 8, "rounding": "kahan", **LOW}),
]


def _gradient(shape: tuple[int, ...], dtype: torch.dtype, step: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)


def _rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))

    def both(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
        whole = {name: _gradient(shape, dtype, 99).requires_grad_() for name, (shape, _) in SHAPES.items()}
        cut = {
            name: distribute_tensor(p.detach(), mesh, [Shard(SHAPES[name][1])]).requires_grad_()
            for name, p in whole.items()
        }
        return whole, cut

    def set_gradients(whole: dict[str, Any], cut: dict[str, Any], step: int) -> None:
        for name, p in whole.items():
            p.grad = _gradient(p.shape, p.dtype, step)
            cut[name].grad = distribute_tensor(p.grad, mesh, cut[name].placements)

    for cls, dtype, kwargs in RUNS:
        whole, cut = both(dtype)
        a, b = cls(whole.items(), lr=1e-2, **kwargs), cls(cut.items(), lr=1e-2, **kwargs)
        for step in range(3):
            set_gradients(whole, cut, step)
            a.step()
            b.step()
        for name, p in whole.items():
            assert torch.equal(p.detach(), cut[name].full_tensor().detach()), (name, kwargs)
            for key, value in a.state[p].items():
                other = b.state[cut[name]][key]
                if key != "step":
                    pieces = value.chunk(RANKS, SHAPES[name][1])
                    want = pieces[rank] if rank < len(pieces) else value[:0]
                    assert torch.equal(other.to_local(), want) and other.shape == value.shape, (name, key)

    # Norms are sums in another order: a few float32 ulps.
    whole, cut = both(torch.float32)
    a, b = (optim.LAMB(p.items(), lr=1e-2, max_grad_norm=1.0, max_unorm=0.5) for p in (whole, cut))
    for step in range(3):
        set_gradients(whole, cut, step)
        a.step()
        b.step()
    for name, p in whole.items():
        torch.testing.assert_close(cut[name].full_tensor().detach(), p.detach(), rtol=1e-6, atol=1e-6)

    for norm_type in (2.0, 1.0, float("inf")):
        set_gradients(whole, cut, 7)
        plain = [whole["bias"].detach().clone().requires_grad_() for _ in range(2)]
        for p in plain:
            p.grad = whole["bias"].grad.clone()
        mixed, everything = {**cut, "plain": plain[0]}, {**whole, "plain": plain[1]}
        got = optim.clip_grad_norm_(mixed.items(), 0.5, norm_type)
        want = optim.clip_grad_norm_(everything.items(), 0.5, norm_type)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)
        for name in whole:
            torch.testing.assert_close(cut[name].grad.full_tensor(), everything[name].grad, rtol=1e-6, atol=0.0)

    # Each rank's own gradient is the small batch, the mean over ranks the large one.
    w = torch.zeros(400, requires_grad=True)
    noise = optim.GradientNoiseScale([w], batch_size=8, decay=0.998, group=dist.group.WORLD)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(200):
        ((0.2 + 2.0 * torch.randn(8, 400, generator=generator)) @ w).mean().backward()
        dist.all_reduce(w.grad)
        w.grad /= RANKS
        noise.update()
        w.grad = None
    assert abs(noise.value / 100.0 - 1.0) < 0.25, noise.value
    dist.destroy_process_group()


def test_three_ranks_do_what_one_does() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (port,), nprocs=RANKS)
