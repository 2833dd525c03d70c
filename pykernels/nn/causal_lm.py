"""A causal language model of TransformerBlocks, and its twin in plain PyTorch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .causal_lm_config import CausalLMConfig
from .eager import EagerBlock, EagerRMSNorm
from .rms_norm import RMSNorm
from .transformer_block import TransformerBlock


class Decoder(nn.Module):
    """Embedding, layers and, in the pre-norm form, the last norm: input_ids [B, S] -> [B, S, hidden_size]."""

    def __init__(self, config: CausalLMConfig, save: Sequence[str], eager: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _layer(config, intermediate_size, dial, eager)
            for intermediate_size, dial in zip(config.intermediate_sizes, save, strict=True)
        )
        self.norm: nn.Module | None = None
        if config.norm == "pre":
            eps = 1e-6 if config.rms_norm_eps is None else config.rms_norm_eps
            self.norm = EagerRMSNorm(config.hidden_size, eps) if eager else RMSNorm(config.hidden_size, eps=eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None else self.norm(x)


class CausalLM(nn.Module):
    """A Llama-style language model whose layers have the dial `save`, and whose loss never holds the logits.

    Args:
        config: a CausalLMConfig, or the dictionary of a config.json of a Llama, Mistral or Qwen2.
        save: what the layers keep for backward: a value of TransformerBlock's dial, or one for each layer. It may be
            changed later on each of model.layers, or by memory.checkpoint_.
        eager: the twin in plain PyTorch, the baseline to compare with: layers as transformers writes them, one
            operation a node, and logits and cross_entropy whole. It has no dial.
        device, dtype: of the parameters. On "meta" none is allocated.

    forward(input_ids [B, S]) gives logits [B, S, vocab_size]; forward(input_ids, targets), both int64 [B, S], the mean
    loss, float32, over positions whose target is not -100: targets[:, t] is the token after input_ids[:, t].
    The state dict has the keys of transformers' LlamaForCausalLM. Weights start normal with deviation 0.02, those of
    o_proj and down_proj divided by sqrt(2 * layers), as in GPT-2.
    Errors: ValueError names the field of the configuration or the value of save.
    """

    def __init__(
        self,
        config: CausalLMConfig | dict,
        *,
        save: str | Sequence[str] = "inputs+preact",
        eager: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config if isinstance(config, CausalLMConfig) else CausalLMConfig.from_dict(config)
        self.eager = eager
        dial = [save] * config.num_hidden_layers if isinstance(save, str) else list(save)
        if len(dial) != config.num_hidden_layers:
            raise ValueError(
                f"save: got {len(dial)} values, accepts one, or one for each of the {config.num_hidden_layers} layers."
            )
        with _place(device, dtype):
            self.model = Decoder(config, dial, eager)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew; biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        hidden = self.model(input_ids)
        if targets is None:
            return self.lm_head(hidden)
        if self.eager:
            return nn.functional.cross_entropy(self.lm_head(hidden).float().flatten(0, -2), targets.flatten())
        loss = F.linear_cross_entropy(hidden, self.lm_head.weight, targets)
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        return "eager=True" if self.eager else ""


def _layer(config: CausalLMConfig, intermediate_size: int, save: str, eager: bool) -> nn.Module:
    sizes: dict[str, Any] = {
        "num_kv_heads": config.kv_heads,
        "intermediate_size": intermediate_size,
        "head_dim": config.head_dim,
        "norm": config.norm,
        "activation": config.hidden_act,
        "eps": config.rms_norm_eps,
        "bias": config.attention_bias,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
    }
    if eager:
        return EagerBlock(config.hidden_size, config.num_attention_heads, **sizes)
    return TransformerBlock(config.hidden_size, config.num_attention_heads, save=save, **sizes)


@contextlib.contextmanager
def _place(device: torch.device | str | None, dtype: torch.dtype | None) -> Iterator[None]:
    """Modules made within have their parameters there."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or default)
        with contextlib.nullcontext() if device is None else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)
