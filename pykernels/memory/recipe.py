"""A recipe: everything about how a model is trained that changes what memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import optim
from ..nn import SAVE, CausalLM, CausalLMConfig
from ..quantization import Int8TrainingConfig, quantize_
from .checkpoint import checkpoint_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS = ("AdamW", "Adam", "Lion", "SGD", "Adagrad", "RMSprop", "LAMB", "torch.AdamW")
LOSSES = ("linear_cross_entropy", "logits")
OFFLOADS = (None, "optimizer", "parameters")
ROUNDINGS = ("nearest", "stochastic", "kahan", "split_master")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    dtype: of parameters and activations: "float32", "bfloat16" or "float16".
    eager: plain PyTorch layers, and logits whole (nn.CausalLM(eager=True)).
    save: what each layer keeps for backward: a value of nn.TransformerBlock's dial, or one for each layer. On a module
        that is no CausalLM it is a policy of memory.checkpoint_, and "inputs+preact" leaves it as it is.
    int8_training: the linear layers but lm_head train in INT8 (quantize_(model, Int8TrainingConfig())).
    loss: "linear_cross_entropy", or "logits" for logits [B, S, V] and cross_entropy. With eager always logits.
    optimizer: one of pykernels.optim, or "torch.AdamW", PyTorch's own. state_bits: 32, 16 or 8; rounding: of
        low-precision parameters: "nearest", "stochastic", "kahan" or "split_master".
    stage: of ZeRO over world_size ranks, 0 (nothing is sharded) to 3. offload: "optimizer" leaves the state in host
        memory, "parameters" parameters and gradients too (stages 2 and 3).
    Errors: ValueError for a value outside these, or two that exclude each other.
    """

    dtype: str = "bfloat16"
    eager: bool = False
    save: str | tuple[str, ...] = "inputs+preact"
    int8_training: bool = False
    loss: str = "linear_cross_entropy"
    optimizer: str = "AdamW"
    state_bits: int = 32
    rounding: str = "nearest"
    stage: int = 0
    offload: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.save, list):
            object.__setattr__(self, "save", tuple(self.save))
        known: dict[str, tuple[Any, ...]] = {
            "dtype": tuple(DTYPES),
            "loss": LOSSES,
            "optimizer": OPTIMIZERS,
            "state_bits": (32, 16, 8),
            "rounding": ROUNDINGS,
            "stage": (0, 1, 2, 3),
            "offload": OFFLOADS,
        }
        for name, accepts in known.items():
            if getattr(self, name) not in accepts:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, accepts {', '.join(map(repr, accepts))}.")
        for value in () if isinstance(self.save, str) else self.save:
            if value not in SAVE:
                raise ValueError(f"save: got {value!r}, accepts {', '.join(map(repr, SAVE))}.")
        if self.optimizer == "torch.AdamW" and (self.state_bits, self.rounding) != (32, "nearest"):
            raise ValueError(
                "optimizer: got 'torch.AdamW' with a state_bits or rounding that it lacks, accepts 32 and 'nearest'."
            )
        if self.offload == "parameters" and self.stage < 2:
            raise ValueError(f"offload: got 'parameters' with stage {self.stage}, accepts stages 2 and 3.")

    @classmethod
    def baseline(cls, dtype: str = "bfloat16") -> Recipe:
        """Plain PyTorch: its layers, logits whole, its AdamW."""
        return cls(dtype, eager=True, loss="logits", optimizer="torch.AdamW")

    def differences(self) -> dict[str, Any]:
        """The fields that are not their default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def model(self, config: CausalLMConfig, device: str = "meta") -> CausalLM:
        """The model of a configuration, as this recipe trains it."""
        made = CausalLM(config, save=self.save, eager=self.eager, device=device, dtype=DTYPES[self.dtype])
        if self.int8_training:
            quantize_(made, Int8TrainingConfig())
        return made

    def change_(self, model: nn.Module) -> nn.Module:
        """Any other module, as this recipe trains it; in place."""
        model.to(DTYPES[self.dtype])
        if self.save != "inputs+preact":
            checkpoint_(model, self.save)
        if self.int8_training:
            quantize_(model, Int8TrainingConfig())
        return model

    def make_optimizer(self, parameters: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
        """The optimizer, without state."""
        if self.optimizer == "torch.AdamW":
            return torch.optim.AdamW(parameters, lr)
        return getattr(optim, self.optimizer)(parameters, lr, state_bits=self.state_bits, rounding=self.rounding)

    def loss_of(self, model: nn.Module, input_ids: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        """The forward of a step of a CausalLM."""
        if self.loss == "linear_cross_entropy" or self.eager:
            return lambda: model(input_ids, targets)

        def loss() -> Tensor:
            result = F.cross_entropy(model(input_ids), targets)
            assert isinstance(result, Tensor)
            return result

        return loss
