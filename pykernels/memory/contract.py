"""The memory contract in numbers: bytes that a transformer layer keeps for backward, for each token, by what they are.

docs/memory.md is written from these functions, tests measure that a layer keeps exactly so much, and a planner may
trust them. Parameters, and tables that live on anyway (rope's), are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checkpoint import DIAL

SAVE = DIAL
GROUP = 128  # columns that share a float32 scale in an INT8 copy
STATISTIC = 4  # bytes of a float32: rstd or mean of a row, lse of a head, scale of a group


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer. stream_itemsize: of the residual stream, where autocast leaves it wider than the rest."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    itemsize: int = 2
    norm: str = "pre"
    dropout: bool = False
    head_dim: int | None = None
    stream_itemsize: int | None = None

    @property
    def queries(self) -> int:
        """Columns of the query and of the attention's result."""
        return self.num_heads * (self.head_dim or self.hidden_size // self.num_heads)

    @property
    def keys(self) -> int:
        """Columns of the key, and of the value."""
        return self.queries // self.num_heads * self.num_kv_heads

    @property
    def stream(self) -> int:
        """Bytes of a row of the residual stream."""
        return self.hidden_size * (self.stream_itemsize or self.itemsize)

    @property
    def unit(self) -> int:
        """u: hidden_size * itemsize, the bytes of a token's activations between layers."""
        return self.hidden_size * self.itemsize


LLAMA_3_8B = LayerShape(4096, 32, 8, 14336)


def int8_row(columns: int) -> int:
    """A row in INT8 with a scale for each group."""
    return columns + STATISTIC * -(-columns // GROUP)


def saved_pieces(shape: LayerShape, save: str) -> dict[str, int]:
    """Bytes a token that pykernels.nn.TransformerBlock keeps, by what they are. ValueError for an unknown save."""
    if save not in SAVE:
        raise ValueError(f"save: got {save!r}, accepts {', '.join(map(repr, SAVE))}.")
    if save == "checkpoint":
        return {"x": shape.stream}
    item, post = shape.itemsize, shape.norm == "post"
    int8 = save == "int8"
    stream = int8_row(shape.hidden_size) if int8 else shape.stream
    gate = int8_row(shape.intermediate_size) if int8 else shape.intermediate_size * item
    pieces = {"x": stream}
    if save != "recompute_qkv":
        pieces |= {"q": shape.queries * item, "k": shape.keys * item, "v": shape.keys * item}
    pieces |= {"attention out": shape.queries * item, "lse": STATISTIC * shape.num_heads, "residual": stream}
    if post:
        pieces["second residual"] = stream
    if save in ("all", "inputs+preact", "int8"):
        pieces |= {"gate": gate, "up": gate}
    if save == "all":
        # What the linear layers keep of their own; in the post-norm form x itself is what the first ones read.
        pieces |= {"normed, to gate and up": shape.stream, "product": shape.intermediate_size * item}
        if not post:
            pieces["normed, to q, k and v"] = shape.stream
    pieces["rstd and mean"] = STATISTIC * 2 * (2 if post else 1)
    return pieces


def saved_bytes_per_token(shape: LayerShape, save: str) -> int:
    """The sum of saved_pieces. Dropout adds 32 bytes a layer whatever its size: two keys."""
    return sum(saved_pieces(shape, save).values())


def mlp_bytes_per_token(shape: LayerShape, save: str) -> int:
    """Of pykernels.nn.SwiGLUMLP and GEGLUMLP on their own."""
    if save in ("recompute_mlp", "recompute_qkv", "checkpoint"):
        return shape.unit
    if save == "int8":
        return int8_row(shape.hidden_size) + 2 * int8_row(shape.intermediate_size)
    return shape.unit + (3 if save == "all" else 2) * shape.intermediate_size * shape.itemsize


def attention_bytes_per_token(shape: LayerShape, save: str) -> int:
    """Of pykernels.nn.Attention on its own."""
    if save == "checkpoint":
        return shape.unit
    kept = int8_row(shape.hidden_size) if save == "int8" else shape.unit
    columns = shape.queries if save == "recompute_qkv" else 2 * (shape.queries + shape.keys)
    return kept + columns * shape.itemsize + STATISTIC * shape.num_heads


def norm_linear_bytes_per_token(hidden_size: int, itemsize: int, save: str, norm: str = "rms_norm") -> int:
    """Of pykernels.nn.NormLinear, however many linear layers read the norm."""
    if save == "checkpoint":
        return hidden_size * itemsize
    statistics = STATISTIC * (2 if norm == "layer_norm" else 1)
    if save == "int8":
        return int8_row(hidden_size) + statistics
    return (2 if save == "all" else 1) * hidden_size * itemsize + statistics


def eager_bytes_per_token(shape: LayerShape) -> int:
    """Of a Llama layer in plain PyTorch in a 16-bit dtype, as transformers' LlamaDecoderLayer is written.

    Each norm keeps its input in float32, rstd, the normalised rows before the weight and after it; the MLP keeps gate,
    silu(gate), up and the product. k and v are unexpanded, as enable_gqa=True keeps them in PyTorch 2.13.
    """
    norm = 4 * shape.hidden_size + STATISTIC + 2 * shape.unit
    attention = 2 * (shape.queries + shape.keys) * shape.itemsize + STATISTIC * shape.num_heads
    return 2 * norm + attention + 4 * shape.intermediate_size * shape.itemsize


def liger_bytes_per_token(shape: LayerShape) -> int:
    """Of the same layer with Liger Kernel's modules, as derived from their public code, not measured.

    LigerRMSNormFunction keeps X and RSTD (float32), LigerRopeFunction cos and sin, LigerSiLUMulFunction gate and up;
    the linear layers are PyTorch's and keep what they read: the normalised rows, the attention's result, the product.
    """
    return saved_bytes_per_token(shape, "all")


def forward_flops_per_token(shape: LayerShape) -> dict[str, int]:
    """Operations of the forward matrix products of a token (a multiply-add is two), without attention's own."""
    hidden, rows = shape.hidden_size, shape.queries
    return {
        "qkv": 2 * hidden * (rows + 2 * shape.keys),
        "o": 2 * hidden * rows,
        "gate and up": 4 * hidden * shape.intermediate_size,
        "down": 2 * hidden * shape.intermediate_size,
    }


def recomputed_fraction(shape: LayerShape, save: str) -> float:
    """Matrix products that are computed again, as a fraction of those of forward and backward."""
    products = forward_flops_per_token(shape)
    again = {
        "recompute_mlp": products["gate and up"],
        "recompute_qkv": products["gate and up"] + products["qkv"],
        "checkpoint": sum(products.values()),
    }.get(save, 0)
    return again / (3 * sum(products.values()))
