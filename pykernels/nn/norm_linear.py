"""A norm and the linear layers that read it, as one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ._save import SaveDial, apply_norm, group_size, norm_arguments, plain_linear, plain_norm
from .layer_norm import LayerNorm
from .rms_norm import RMSNorm

_NORMS = {"rms_norm": (RMSNorm, 1e-6), "layer_norm": (LayerNorm, 1e-5)}


class NormLinear(SaveDial):
    """norm(x) and the linear layers that read it (query, key and value; gate and up), the normalised tensor unsaved.

    Args:
        in_features: K.
        out_features: N, or several: then forward returns a tuple.
        norm: "rms_norm" or "layer_norm".
        packed: one weight for all of out_features, whose results are then views of one product.
        eps: None for 1e-6 (rms_norm) or 1e-5 (layer_norm). weight_offset: 1.0 for Gemma.
        save: "all" runs the layers one by one and keeps 2*M*K*itemsize bytes and the rows' statistics; the other values
            are one node of M*K*itemsize (x itself) and 4*M (layer_norm: 8*M), "int8" of M*K + 4*M*ceil(K/128) and the
            same. "checkpoint" keeps x alone. See docs/memory.md.

    x [..., K] -> [..., N]. residual: added to x before the norm; prenorm: also returns the sum. Submodules: norm and
    linears. Where one of those is replaced or hooked, it is called, and keeps what it keeps.
    Errors: ValueError for an unknown norm or save.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        norm: str = "rms_norm",
        bias: bool = False,
        packed: bool = False,
        eps: float | None = None,
        weight_offset: float = 0.0,
        save: str = "inputs+preact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(save)
        if norm not in _NORMS:
            raise ValueError(f"norm: got {norm!r}, accepts {', '.join(map(repr, _NORMS))}.")
        kind, default_eps = _NORMS[norm]
        self.out_features = out_features if isinstance(out_features, int) else tuple(out_features)
        sizes = [out_features] if isinstance(out_features, int) else list(out_features)
        self.packed = packed
        self.norm: nn.Module = kind(
            in_features,
            eps=default_eps if eps is None else eps,
            weight_offset=weight_offset,
            device=device,
            dtype=dtype,
        )
        self.linears = nn.ModuleList(
            nn.Linear(in_features, size, bias, device, dtype) for size in ([sum(sizes)] if packed else sizes)
        )

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False) -> Any:
        *outs, h = self._dialled(self._run, x, residual)
        if self.packed and not isinstance(self.out_features, int):
            outs = list(outs[0].split(self.out_features, -1))
        result = (*outs, h) if prenorm else tuple(outs)
        return result[0] if isinstance(self.out_features, int) and not prenorm else result

    def _run(self, save: str, x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        if save == "all" or not plain_linear(*self.linears) or not plain_norm(self.norm):
            normed, h = apply_norm(self.norm, x, save, residual)
            return *(linear(normed) for linear in self.linears), h
        return F.norm_linear(
            x,
            [linear.weight for linear in self.linears],  # type: ignore[misc]
            [linear.bias for linear in self.linears],  # type: ignore[misc]
            residual=residual,
            prenorm=True,
            group_size=group_size(save),
            **norm_arguments(self.norm, x),
        )
