"""Gated MLPs with a dial for what they keep."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional as F
from ._save import (
    RECOMPUTES_MLP,
    SaveDial,
    apply_norm,
    group_size,
    norm_arguments,
    plain_linear,
    plain_norm,
)


class _GatedMLP(SaveDial):
    """down_proj(act(gate_proj(x)) * up_proj(x)), alone or behind a norm that its block hands over."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        bias: bool,
        save: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(save)
        self.hidden_size, self.intermediate_size, self.activation = hidden_size, intermediate_size, activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._dialled(self.run, x)[0]

    def run(
        self,
        save: str,
        x: Tensor,
        norm: nn.Module | None = None,
        residual: Tensor | None = None,
        gives_normed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(the MLP of n, h) with h = x + residual and n = norm(h); n in place of h with gives_normed."""
        if save == "all":
            normed, h = apply_norm(norm, x, save, residual)
            return self._modules_of(normed), normed if gives_normed else h
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        readable = plain_linear(gate, up) and plain_norm(norm)
        if save in RECOMPUTES_MLP and readable and plain_linear(down):
            weights, biases = (gate.weight, up.weight, down.weight), (gate.bias, up.bias, down.bias)
            options = norm_arguments(norm, x)
            if norm is None:
                return F.norm_mlp(x, *weights, biases, activation=self.activation, **options), x
            options |= {"residual": residual, "normed": gives_normed, "prenorm": not gives_normed}
            return F.norm_mlp(x, *weights, biases, activation=self.activation, **options)
        if save in RECOMPUTES_MLP and torch.is_grad_enabled():
            h = x if residual is None else x + residual.to(x.dtype)
            return checkpoint(self._composed, save, h, norm, None, gives_normed, use_reentrant=False)
        return self._composed(save, x, norm, residual, gives_normed)

    def _composed(
        self, save: str, x: Tensor, norm: nn.Module | None, residual: Tensor | None, gives_normed: bool
    ) -> tuple[Tensor, Tensor]:
        """Two nodes, or as near to them as modules that cannot be read allow."""
        gate_proj, up_proj, down_proj = self.gate_proj, self.up_proj, self.down_proj
        if plain_linear(gate_proj, up_proj) and plain_norm(norm):
            options = norm_arguments(norm, x) | {"group_size": group_size(save)}
            weights, biases = (gate_proj.weight, up_proj.weight), (gate_proj.bias, up_proj.bias)
            if norm is None:
                gate, up = F.norm_linear(x, weights, biases, **options)
                given = x
            else:
                options |= {"residual": residual, "normed": gives_normed, "prenorm": not gives_normed}
                gate, up, given = F.norm_linear(x, weights, biases, **options)
        else:
            normed, h = apply_norm(norm, x, save, residual)
            gate, up = gate_proj(normed), up_proj(normed)
            given = normed if gives_normed else h
        options = {"activation": self.activation, "group_size": group_size(save)}
        if plain_linear(down_proj):
            return F.glu_linear(gate, up, down_proj.weight, down_proj.bias, **options), given
        return down_proj(F.glu_linear(gate, up, None, **options)), given

    def _modules_of(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            return self.down_proj(F.swiglu(gate, up))
        return self.down_proj(F.geglu(gate, up, approximate="tanh" if self.activation == "gelu_tanh" else "none"))

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.intermediate_size}, save={self.save!r}"


class SwiGLUMLP(_GatedMLP):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), Llama's MLP (Shazeer, "GLU Variants Improve Transformer", 2020).

    Args:
        hidden_size, intermediate_size: K and I; x [..., K] -> [..., K].
        save: what is kept for backward, in bytes, with M rows; docs/memory.md has the formulas:
            "all"            M*(K + 3*I)*itemsize: x, gate, up and the product
            "inputs+preact"  M*(K + 2*I)*itemsize: x, gate, up; no matmul is repeated
            "int8"           M*(K + 2*I) and 4*M for each group of 128 columns
            "recompute_mlp", "recompute_qkv", "checkpoint"    M*K*itemsize: x

    The inner linear layers may be replaced or hooked: they are then called as modules and keep what they keep.
    Errors: ValueError for an unknown save.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        save: str = "inputs+preact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, intermediate_size, activation="silu", bias=bias, save=save, device=device, dtype=dtype
        )


class GEGLUMLP(_GatedMLP):
    """down_proj(gelu(gate_proj(x)) * up_proj(x)), Gemma's MLP; approximate: "none" or "tanh". Else as SwiGLUMLP."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        approximate: str = "none",
        bias: bool = False,
        save: str = "inputs+preact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate: got {approximate!r}, accepts 'none', 'tanh'.")
        activation = "gelu" if approximate == "none" else "gelu_tanh"
        super().__init__(
            hidden_size, intermediate_size, activation=activation, bias=bias, save=save, device=device, dtype=dtype
        )
