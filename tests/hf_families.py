"""Small random models of the families that the transformers integration serves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, TOKENS = 131, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0, "eos_token_id": 2}
BERT = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
del BERT["num_key_value_heads"]


def _decoder(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**SIZES, **options))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _decoder("LlamaForCausalLM", "LlamaConfig", attention_bias=True),
    "mistral": _decoder("MistralForCausalLM", "MistralConfig", sliding_window=8),
    "qwen2": _decoder("Qwen2ForCausalLM", "Qwen2Config", tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=32),
    "gemma2": _decoder("Gemma2ForCausalLM", "Gemma2Config", final_logit_softcapping=2.0, **GEMMA),
    "gemma3": _decoder("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA),
    "phi3": _decoder("Phi3ForCausalLM", "Phi3Config"),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **GPT2)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
}
CAUSAL = [name for name in FAMILIES if name != "bert"]
WHOLE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]  # fused layer by layer


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in training mode, with norm weights and biases that are not all alike."""
    torch.manual_seed(0)
    model = FAMILIES[family]().to(torch.float32).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def batch(padded: bool = True, side: str = "right") -> dict[str, Tensor]:
    """Two rows of tokens, the first padded on one side, with labels."""
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    mask = torch.ones_like(ids)
    mask[0, slice(3) if side == "left" else slice(-3, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def clone(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    return copy.deepcopy(model) if dtype is None else copy.deepcopy(model).to(dtype)
