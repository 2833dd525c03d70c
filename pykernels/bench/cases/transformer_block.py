"""nn.TransformerBlock, forward and backward, for each value of its dial. Shape is tokens x hidden x intermediate size.

Llama 3 8B's ratios: four query heads for one of key and value, an MLP 3.5 times as wide, RMSNorm, rope, causal
attention. Operations: the linear layers' products and the half of attention's that a causal mask leaves. Bytes: each
weight read in both passes and its gradient written, the input, the result and their gradients. Saved bytes count the
input, which each of them keeps, and neither the weights nor rope's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import functional, nn
from ...nn._save import SAVE
from ...ops._chunks import multiplies_bfloat16
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "transformer_block"
HEAD_DIM = 64
GROUPS = 4  # query heads for one of key and value
LENGTH = 512  # positions of a sequence, or all tokens if they are fewer


def work(m: int, k: int, i: int, itemsize: int) -> tuple[int, int]:
    """Operations and bytes of one forward and backward."""
    weights = 2 * k * k + 2 * k * (k // GROUPS) + 3 * k * i
    return 6 * m * (weights + min(m, LENGTH) * k), itemsize * (3 * weights + 4 * m * k)


def cells(quick: bool, cuda: bool) -> list[Cell]:
    m, k, i = (64, 256, 896) if quick else (8192, 4096, 14336) if cuda else (2048, 512, 1792)
    dtypes = [torch.float32, torch.bfloat16]
    if quick or not (cuda or multiplies_bfloat16()):
        dtypes = dtypes[:1]  # plain products of bfloat16 take ten times as long, and say nothing of the dial
    return [
        Cell(
            OP,
            f"{m}x{k}x{i}",
            *work(m, k, i, dtype.itemsize),
            "copy",
            partial(build, dtype=dtype),
            caches=("warm",),
            variant="forward+backward " + str(dtype).removeprefix("torch."),
            seconds=0.4 if quick or cuda else 12.0,
            rounds=3 if quick or cuda else 7,
        )
        for dtype in dtypes
    ]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' LlamaRMSNorm."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def plain(x: Tensor, cos: Tensor, sin: Tensor, *parameters: Tensor) -> Tensor:
    """transformers' LlamaDecoderLayer."""
    first_norm, query, key, value, out, second_norm, gate, up, down = parameters
    linear = torch_functional.linear
    normed = plain_norm(x, first_norm)
    q, k, v = (linear(normed, w).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for w in (query, key, value))
    q, k = plain_rotate(q, cos, sin), plain_rotate(k, cos, sin)
    attended = torch_functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    h = x + linear(attended.transpose(1, 2).flatten(-2), out)
    normed = plain_norm(h, second_norm)
    return h + linear(torch_functional.silu(linear(normed, gate)) * linear(normed, up), down)


def build(cell: Cell, context: Context, dtype: torch.dtype) -> Iterator[Entry]:
    m, k, i = cell.dims
    length, heads = min(m, LENGTH), k // HEAD_DIM
    x, grad = (context.randn(m // length, length, k, dtype=dtype) for _ in range(2))
    tables = functional.rope_tables(HEAD_DIM, length, device=context.device)
    whole = [table.repeat(1, 2).to(dtype) for table in tables]
    kv = k // GROUPS
    shapes = [(k, k), (kv, k), (kv, k), (k, k), (i, k), (i, k), (k, i)]
    held = [(context.randn(*shape) * shape[1] ** -0.5).to(dtype) for shape in shapes]
    held.insert(4, 1 + 0.1 * context.randn(k, dtype=dtype))
    held.insert(0, 1 + 0.1 * context.randn(k, dtype=dtype))
    wide = [table.repeat(1, 2).double() for table in tables]
    context.truth = plain(x[:1].double(), *wide, *(parameter.double() for parameter in held))

    def step(layer: Callable[[Tensor], Tensor], parameters: list[Tensor], *constants: Tensor) -> Provider:
        leaf = x.detach().requires_grad_()

        def call(_index: int) -> Tensor:
            y = layer(leaf)
            y.backward(grad)
            for tensor in (leaf, *parameters):
                tensor.grad = None
            return y.detach()

        name = str(dtype).removeprefix("torch.")
        return Provider(call, name, lambda: layer(leaf), (*parameters, *constants, *tables))

    def ours(save: str) -> Provider:
        block = nn.TransformerBlock(
            k, heads, num_kv_heads=heads // GROUPS, intermediate_size=i, save=save, device=context.device, dtype=dtype
        )
        attention, mlp = block.self_attn, block.mlp
        places = (
            *(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
        for module, value in zip(places, held, strict=True):
            module.weight.data.copy_(value)  # type: ignore[union-attr, operator]
        return step(lambda y: block(y, tables=tables), list(block.parameters()))

    def theirs(function: Callable[..., Tensor]) -> Provider:
        parameters = [parameter.detach().requires_grad_() for parameter in held]
        return step(lambda y: function(y, *whole, *parameters), parameters, *whole)

    for save in SAVE:
        yield f"pykernels {save}", partial(ours, save)
    yield "torch eager", lambda: theirs(plain)
    yield "torch.compile", lambda: theirs(peers.compiled(plain))
    yield "torch checkpoint", lambda: theirs(lambda *tensors: checkpoint(plain, *tensors, use_reentrant=False))
