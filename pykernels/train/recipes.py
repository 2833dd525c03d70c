"""The ways to train that are compared: which layers, what they keep, which optimizer, how many ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import optim
from ..distributed import zero
from ..nn import CausalLM, CausalLMConfig
from ..quantization import Int8TrainingConfig, quantize_

BETAS, DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Recipe:
    """One way to train. save: None for the plain PyTorch model, else the dial of CausalLM."""

    name: str
    about: str
    save: str | None
    optimizer: type[torch.optim.Optimizer]
    int8: bool = False
    ranks: bool = False


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("baseline", "plain PyTorch, torch.optim.AdamW", None, torch.optim.AdamW),
        Recipe("fused", "fused blocks and loss, fused AdamW", "inputs+preact", optim.AdamW),
        Recipe("fused-int8", "fused, with INT8 copies for backward", "int8", optim.AdamW),
        Recipe("int8-8bit", "INT8 products, 8-bit AdamW", "int8", optim.AdamW8bit, int8=True),
        Recipe("zero2", "fused, gradients and state sharded over ranks", "inputs+preact", optim.AdamW, ranks=True),
    )
}


def make_model(recipe: Recipe, config: CausalLMConfig, seed: int, device: str) -> CausalLM:
    """The model; its weights are a function of the config and the seed, the same for every recipe."""
    model = CausalLM(config, save=recipe.save or "all", eager=recipe.save is None)
    torch.manual_seed(seed)
    model.reset_parameters()
    if recipe.int8:
        quantize_(model, Int8TrainingConfig())
    return model.to(device)


def make_optimizer(recipe: Recipe, model: nn.Module, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The optimizer, with the model it belongs to: that of a recipe with ranks is sharded, in place."""
    options: dict[str, Any] = {"lr": lr, "betas": BETAS, "weight_decay": DECAY}
    if recipe.ranks:
        return zero(model, recipe.optimizer, stage=2, **options)
    return model, recipe.optimizer(model.parameters(), **options)


def clipper(recipe: Recipe) -> Callable[..., object]:
    """What clips the gradients' norm."""
    return nn.utils.clip_grad_norm_ if recipe.save is None else optim.clip_grad_norm_
