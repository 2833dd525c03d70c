"""The loss of a causal language model from its last hidden states: its logits never exist as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ...nn._save import plain_linear
from . import _probe as probe
from ._swap import Fused, takes

_PASSED_ON = ("past_key_values", "hidden_states", "attentions", "cross_attentions")


@dataclass
class LossState:
    """base, head: names of the model without a head and of the linear layer that makes logits. output: the result's
    class."""

    base: str
    head: str
    softcap: float | None
    output: type


class FusedCausalLM(Fused):
    """The model, which in training gives the loss of labels and no logits."""

    training: bool
    config: Any

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None or len(args) > 1 or not self.training or "_loss_function" in self.__dict__:
            return self.own_forward(*args, **kwargs)
        head = getattr(self, self._pykernels.head)
        if not plain_linear(head):  # LoRA, INT8, a hook: it is called
            return self.own_forward(*args, **kwargs)
        rest = {
            name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep", "return_dict")
        }
        outputs = getattr(self, self._pykernels.base)(*args, **rest, return_dict=True)
        hidden = outputs.last_hidden_state
        keep = kwargs.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep:
            hidden = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
        loss = linear_loss(hidden, head, softcap=self._pykernels.softcap, **kwargs)
        cls = self._pykernels.output
        passed = {name: outputs.get(name) for name in _PASSED_ON if name in cls.__dataclass_fields__}
        result = cls(loss=loss, logits=None, **passed)
        return as_asked(result, self.config, kwargs.get("return_dict"))


def as_asked(result: Any, config: Any, return_dict: bool | None) -> Any:
    """The result as it is, or as a tuple where the call or the configuration asks for one."""
    if return_dict is None:
        return_dict = getattr(config, "return_dict", True)
    return result if return_dict else result.to_tuple()


def linear_loss(
    hidden: Tensor,
    head: Any,
    *,
    labels: Tensor,
    softcap: float | None,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss(softcap(head(hidden)), labels, ...), through functional.linear_cross_entropy."""
    target = labels if shift_labels is None else shift_labels
    loss = F.linear_cross_entropy(
        hidden,
        head.weight,
        target.to(hidden.device),
        head.bias,
        ignore_index=ignore_index,
        softcap=softcap,
        reduction="mean" if num_items_in_batch is None else "sum",
        shift=shift_labels is None,
    )
    assert isinstance(loss, Tensor)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


class Base(nn.Module):
    """Stands for the model without a head."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


def recognise(module: nn.Module) -> LossState | None:
    """What the loss of a model is made of, or None for a module that is not a model with a head.

    ValueError says why the loss of one cannot be served.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return None
    head = module.get_output_embeddings()
    if head is None:
        return None
    base, name = module.base_model_prefix, next((n for n, m in module._modules.items() if m is head), None)
    if name is None or base not in module._modules or module._modules.keys() != {base, name}:
        raise ValueError("it is not a model and one linear layer that makes logits")
    softcap = getattr(module.config, "final_logit_softcapping", None)
    problem = ValueError("it computes something else than the cross entropy of shifted labels and one linear layer")
    vocabulary, width = 7, probe.SIZE
    hidden, labels = probe.numbers(1, 4, width), torch.tensor([[0, 3, -100, 6]])
    small_head = probe.linear(width, vocabulary, bias=head.bias is not None, seed=8)
    config = probe.eager_config(module.config, vocab_size=vocabulary)
    small = probe.skeleton(module, {base: Base(hidden), name: small_head}, config=config, vocab_size=vocabulary)
    with torch.no_grad():
        try:
            out = type(module).forward(small, input_ids=labels.abs(), labels=labels, num_items_in_batch=3)
        except (TypeError, RuntimeError, ValueError, AttributeError) as error:
            raise problem from error
        logits = small_head(hidden)
        expected = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = linear_loss(hidden, small_head, labels=labels, softcap=softcap, num_items_in_batch=3)
    if not probe.same(out.logits, expected) or not probe.same(out.loss, loss):
        raise problem
    if "_loss_function" in module.__dict__ or not takes(hidden):
        raise ValueError("it was given a loss function of its own")
    return LossState(base, name, softcap, type(out))
