"""Embedding table with INT8 rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from ._int8_module import Int8Module, check_float_weight


class Int8Embedding(Int8Module):
    """Drop-in for ``nn.Embedding``: looks up INT8 rows and dequantises only those. Frozen.

    Buffers:
        weight: int8 [num_embeddings, embedding_dim].
        scale: float32 [num_embeddings]; stays float32 under ``.to(dtype)``.

    Shapes: integer indices [...] -> [..., embedding_dim] in ``dtype``, which ``.to(dtype)`` changes.
    """

    _like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(num_embeddings, dtype=torch.float32, device=device))
        # Holds no element: it follows .to(dtype), so the output dtype does.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output."""
        return self._like.dtype

    @classmethod
    def from_float(cls, embedding: nn.Embedding, *, name: str = "") -> Int8Embedding:
        """Quantise ``embedding`` row by row; it is left as it was.

        Raises:
            TypeError: not an ``nn.Embedding`` of float32, bfloat16 or float16.
            ValueError: the weight is not finite, or ``max_norm`` is set (it rewrites rows at lookup).
        """
        name = name or "embedding"
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"{name}: got a {type(embedding).__name__}, accepts torch.nn.Embedding.")
        if embedding.max_norm is not None:
            raise ValueError(f"{name}.max_norm: got {embedding.max_norm}, accepts None.")
        weight = embedding.weight.detach()
        check_float_weight(weight, f"{name}.weight")
        layer = cls(
            embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta", dtype=weight.dtype
        )
        layer.weight, layer.scale = F.quantize_rowwise(weight)
        layer._like = weight.new_empty(0)
        return layer.train(embedding.training)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An ``nn.Embedding`` with the dequantised rows."""
        weight = F.dequantize_rowwise(self.weight, self.scale, out_dtype=dtype or self.dtype)
        embedding = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=self.padding_idx)
        return embedding.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.dequantize_rowwise(self.weight[input], self.scale[input], out_dtype=self.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"
