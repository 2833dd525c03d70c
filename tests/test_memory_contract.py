"""The memory contract: what each layer keeps is measured and is its formula, to the byte; what it recomputes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pykernels.functional as F
from pykernels import Int8TrainingConfig, _library, quantize_
from pykernels import nn as pnn
from pykernels.bench.memory import saved_bytes
from pykernels.memory import contract
from pykernels.memory.contract import LayerShape
from pykernels.nn import _save
from pykernels.nn.attention import _tables

# Llama 3 8B's ratios: four query heads for one of key and value, an MLP 3.5 times as wide. 320 is no multiple of the
# group of 128 columns, so that ragged groups are counted too.
HIDDEN = 320
SHAPE = LayerShape(HIDDEN, 32, 8, int(3.5 * HIDDEN))
BATCH, LENGTH = 2, 24
TOKENS = BATCH * LENGTH
SAVE = contract.SAVE


def block(shape: LayerShape, dtype: torch.dtype, **options: object) -> pnn.TransformerBlock:
    torch.manual_seed(0)
    sizes = {"num_kv_heads": shape.num_kv_heads, "intermediate_size": shape.intermediate_size, "norm": shape.norm}
    return pnn.TransformerBlock(shape.hidden_size, shape.num_heads, **sizes, **options).to(dtype)


def measured(module: nn.Module, x: Tensor) -> int:
    """Bytes saved by a forward, the parameters and rope's tables excluded: those live on anyway."""
    x = x.requires_grad_()
    module(x)  # makes the tables
    held = [*module.parameters(), *[table for pair in _tables.values() for table in pair]]
    return saved_bytes(lambda: module(x), held)


def test_the_dial_is_the_one_of_the_layers() -> None:
    assert contract.SAVE == _save.SAVE and contract.GROUP == _save.GROUP


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_keeps_what_its_formula_says(save: str, norm: str, dtype: torch.dtype) -> None:
    shape = LayerShape(HIDDEN, 32, 8, int(3.5 * HIDDEN), dtype.itemsize, norm)
    layer = block(shape, dtype, save=save)
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype)
    assert measured(layer, x) == TOKENS * contract.saved_bytes_per_token(shape, save)


@pytest.mark.parametrize("save", SAVE[1:])
def test_under_autocast_no_copy_of_a_weight_is_kept(save: str) -> None:
    """float32 stream and weights, everything between them in bf16. "all" keeps bf16 weights too, as PyTorch does."""
    shape = LayerShape(HIDDEN, 32, 8, int(3.5 * HIDDEN), 2, stream_itemsize=4)
    layer = block(shape, torch.float32, save=save)
    with torch.autocast("cpu", torch.bfloat16):
        got = measured(layer, torch.randn(BATCH, LENGTH, HIDDEN))
    assert got == TOKENS * contract.saved_bytes_per_token(shape, save)


@pytest.mark.parametrize("save", SAVE)
def test_dropout_keeps_two_keys(save: str) -> None:
    layer = block(SHAPE, torch.bfloat16, save=save, dropout=0.1)
    keys = 0 if save == "checkpoint" else 32
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.bfloat16)
    assert measured(layer, x) == TOKENS * contract.saved_bytes_per_token(SHAPE, save) + keys


@pytest.mark.parametrize("save", SAVE)
def test_the_parts_keep_what_their_formulas_say(save: str) -> None:
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.bfloat16)
    for kind in (pnn.SwiGLUMLP, pnn.GEGLUMLP):
        mlp = kind(HIDDEN, SHAPE.intermediate_size, save=save, dtype=torch.bfloat16)
        assert measured(mlp, x) == TOKENS * contract.mlp_bytes_per_token(SHAPE, save)
    attention = pnn.Attention(HIDDEN, 32, num_kv_heads=8, save=save, dtype=torch.bfloat16)
    assert measured(attention, x) == TOKENS * contract.attention_bytes_per_token(SHAPE, save)
    for norm in ("rms_norm", "layer_norm"):
        layer = pnn.NormLinear(HIDDEN, (64, 16, 16), norm=norm, save=save, dtype=torch.bfloat16)
        assert measured(layer, x) == TOKENS * contract.norm_linear_bytes_per_token(HIDDEN, 2, save, norm)


@pytest.mark.parametrize("save", SAVE)
def test_without_gradient_nothing_is_kept(save: str) -> None:
    layer = block(SHAPE, torch.bfloat16, save=save)
    with torch.no_grad():
        assert measured(layer, torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.bfloat16)) == 0


def test_compiled_blocks_keep_the_same() -> None:
    """The nodes are operators, which the compiler's own choice of what to keep cannot open."""
    for save in SAVE[1:]:
        torch.compiler.reset()
        layer = block(SHAPE, torch.float32, save=save, max_position_embeddings=LENGTH)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
        shape = LayerShape(HIDDEN, 32, 8, SHAPE.intermediate_size, 4)
        tables = 0 if save == "checkpoint" else LENGTH * (HIDDEN // 32) * 4  # cos and sin are made in the graph
        got = saved_bytes(lambda compiled=compiled, x=x: compiled(x), layer.parameters())
        assert got == TOKENS * contract.saved_bytes_per_token(shape, save) + tables, save


def test_int8_training_layers_keep_the_int8_activation_of_their_product() -> None:
    """Each group of layers that reads one activation keeps one column-quantised copy: M*K + 4*K, and a seed a layer."""
    layer = block(SHAPE, torch.bfloat16, save="inputs+preact")
    quantize_(layer, Int8TrainingConfig())
    hidden, wide = HIDDEN, SHAPE.intermediate_size
    columns = [hidden, hidden, hidden, wide]  # read by qkv, o, gate and up, down
    copies = sum(TOKENS * k + 4 * k for k in columns) + 7 * 8
    expected = TOKENS * contract.saved_bytes_per_token(SHAPE, "inputs+preact") + copies
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.bfloat16)
    assert measured(layer, x) == expected
    layer.save = "int8"
    expected = TOKENS * contract.saved_bytes_per_token(SHAPE, "int8") + copies
    assert measured(layer, x) == expected


class EagerNorm(nn.Module):
    """transformers' LlamaRMSNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class EagerLayer(nn.Module):
    """transformers' LlamaDecoderLayer, with the modules of a block of ours but in plain PyTorch."""

    def __init__(self, layer: pnn.TransformerBlock) -> None:
        super().__init__()
        self.layer = layer
        self.norms = nn.ModuleList(EagerNorm(HIDDEN) for _ in range(2)).to(torch.bfloat16)
        self.tables = [t[:LENGTH].repeat(1, 2).to(torch.bfloat16) for t in F.rope_tables(HIDDEN // 32, LENGTH)]

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.tables
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = self.layer.self_attn, self.layer.mlp
        normed = self.norms[0](x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(normed).unflatten(-1, (-1, HIDDEN // 32)).transpose(1, 2) for p in projections)
        q, k = self.rotate(q), self.rotate(k)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        h = x + attention.o_proj(out.transpose(1, 2).flatten(-2))
        normed = self.norms[1](h)
        return h + mlp.down_proj(nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def test_plain_pytorch_keeps_what_the_page_says() -> None:
    layer = EagerLayer(block(SHAPE, torch.bfloat16))
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    got = saved_bytes(lambda: layer(x), [*layer.parameters(), *layer.tables])
    assert got == TOKENS * contract.eager_bytes_per_token(SHAPE)


def test_the_headline_figures() -> None:
    """Without the small terms (statistics, lse, scales) the multiples of u are round numbers."""
    shape = contract.LLAMA_3_8B
    small = {"lse", "rstd and mean"}
    for save, units in {
        "all": 17,
        "inputs+preact": 11.5,
        "int8": 7.14,
        "recompute_mlp": 4.5,
        "recompute_qkv": 3,
        "checkpoint": 1,
    }.items():
        pieces = contract.saved_pieces(shape, save)
        large = sum(size for name, size in pieces.items() if name not in small)
        assert large / shape.unit == pytest.approx(units, abs=0.03 if save == "int8" else 0), save
        assert contract.saved_bytes_per_token(shape, save) / shape.unit < units + 0.06
    assert contract.eager_bytes_per_token(shape) / shape.unit == pytest.approx(24.5, abs=0.02)


class _Inside(TorchDispatchMode):
    """Runs our composite operators as the PyTorch calls they are made of, so that a counter below sees those."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = _library.OPS.get(func._opname) if func.namespace == "pykernels" else None
        if op is None or not op.composite:
            return func(*args, **(kwargs or {}))
        with self:
            return op.reference(*args, **(kwargs or {}))


def matmul_flops(layer: nn.Module) -> int:
    """Of the linear layers, forward and backward: twice, from PyTorch's products and from our operators' formulas."""
    x = torch.randn(1, 16, HIDDEN, dtype=torch.float32, requires_grad=True)
    with FlopCounterMode(display=False) as inside, _Inside():
        layer(x).sum().backward()
    counts = inside.get_flop_counts()["Global"]
    run = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    with FlopCounterMode(display=False) as outside:
        layer(x).sum().backward()
    scores = (
        2 * 16 * 16 * HIDDEN
    )  # one product of attention: two in forward, five in backward, forward twice if repeated
    assert outside.get_total_flops() - run in (7 * scores, 9 * scores)
    return run


@pytest.mark.parametrize(
    ("save", "limit"),
    [("inputs+preact", 0), ("int8", 0), ("recompute_mlp", 0.18), ("recompute_qkv", 0.22), ("checkpoint", 1 / 3)],
)
def test_recomputed_products(save: str, limit: float) -> None:
    """Counted where they run: within the limit, exactly as the formula says, and all of them with "all"."""
    base = matmul_flops(block(SHAPE, torch.float32, save="all"))
    assert base == 16 * 3 * sum(contract.forward_flops_per_token(SHAPE).values())
    extra = matmul_flops(block(SHAPE, torch.float32, save=save)) / base - 1
    assert extra <= limit
    assert extra == pytest.approx(contract.recomputed_fraction(SHAPE, save), abs=1e-9)


def test_the_page_shows_the_figures_of_the_formulas() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "memory.md").read_text()
    shape = contract.LLAMA_3_8B
    post = LayerShape(4096, 32, 8, 14336, norm="post")
    for save in SAVE:
        sizes = [contract.saved_bytes_per_token(s, save) for s in (shape, post)]
        again = contract.recomputed_fraction(shape, save)
        cells = " | ".join(f"{size:,} | {size / shape.unit:.2f} u" for size in sizes)
        row = f'| `"{save}"` | {cells} | {again:.1%} |'
        assert row in page, f"docs/memory.md should have the row\n{row}"
    for size in (contract.eager_bytes_per_token(shape), contract.liger_bytes_per_token(shape)):
        assert re.search(rf"{size:,} \| {size / shape.unit:.2f} u", page), f"{size:,}"
