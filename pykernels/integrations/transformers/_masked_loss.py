"""The loss of a masked language model (BERT) from what its head's transform makes: logits never exist as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ...nn._hooks import HOOKS
from ...nn._save import plain_linear
from . import _probe as probe
from ._loss import Base, as_asked
from ._swap import Fused


@dataclass
class MaskedLossState:
    """base: the name of the model without a head. path: the names from the model down to the module whose children
    `transform` and `decoder` make logits, one after the other. output: the result's class."""

    base: str
    path: tuple[str, ...]
    transform: str
    decoder: str
    output: type


class FusedMaskedLM(Fused):
    """The model, which in training gives the loss of labels and no logits."""

    training: bool
    config: Any

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        labels, state = kwargs.get("labels"), self._pykernels
        if labels is None or not self.training:
            return self.own_forward(*args, **kwargs)
        on_the_way: list[nn.Module] = []
        for name in state.path:
            on_the_way.append(getattr(on_the_way[-1] if on_the_way else self, name))
        transform, decoder = getattr(on_the_way[-1], state.transform), getattr(on_the_way[-1], state.decoder)
        if not plain_linear(decoder) or any(getattr(module, hooks) for module in on_the_way for hooks in HOOKS):
            return self.own_forward(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in ("labels", "return_dict")}
        outputs = getattr(self, state.base)(*args, **rest, return_dict=True)
        loss = unshifted_loss(transform(outputs.last_hidden_state), decoder, labels)
        passed = {name: outputs.get(name) for name in ("hidden_states", "attentions")}
        result = state.output(loss=loss, logits=None, **passed)
        return as_asked(result, self.config, kwargs.get("return_dict"))


def unshifted_loss(hidden: Tensor, decoder: Any, labels: Tensor) -> Tensor:
    """torch.nn.CrossEntropyLoss()(decoder(hidden), labels), through functional.linear_cross_entropy."""
    loss = F.linear_cross_entropy(hidden, decoder.weight, labels.to(hidden.device), decoder.bias)
    assert isinstance(loss, Tensor)
    return loss


class _Double(nn.Module):
    """Stands for the transform."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * hidden


def recognise(module: nn.Module) -> MaskedLossState | None:
    """What the loss of a model is made of; None for one whose head is not of this kind."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return None
    decoder, base = module.get_output_embeddings(), module.base_model_prefix
    heads = module._modules.keys() - {base}
    if decoder is None or base not in module._modules or len(heads) != 1 or decoder in module._modules.values():
        return None
    path = [heads.pop()]
    chain = [getattr(module, path[0])]
    while chain[-1] is not None and decoder not in chain[-1]._modules.values() and len(chain[-1]._modules) == 1:
        path.append(next(iter(chain[-1]._modules)))
        chain.append(getattr(chain[-1], path[-1]))
    owner = chain[-1]
    if owner is None or decoder not in owner._modules.values() or len(owner._modules) != 2:
        return None
    name = next(n for n, m in owner._modules.items() if m is decoder)
    transform = next(n for n in owner._modules if n != name)
    vocabulary, width = 7, probe.SIZE
    hidden, labels = probe.numbers(1, 4, width), torch.tensor([[0, 3, -100, 6]])
    small_decoder = probe.linear(width, vocabulary, bias=getattr(decoder, "bias", None) is not None, seed=8)
    small: Any = probe.skeleton(owner, {transform: _Double(), name: small_decoder})
    for parent, step in zip(chain[-2::-1], path[:0:-1], strict=True):
        small = probe.skeleton(parent, {step: small})
    config = probe.eager_config(module.config, vocab_size=vocabulary)
    small = probe.skeleton(module, {base: Base(hidden), path[0]: small}, config=config, vocab_size=vocabulary)
    with torch.no_grad():
        try:
            out = type(module).forward(small, input_ids=labels.abs(), labels=labels)
        except (TypeError, RuntimeError, ValueError, AttributeError):
            return None
        if not hasattr(out, "loss") or not hasattr(out, "logits") or out.loss is None:
            return None
        expected = unshifted_loss(2 * hidden, small_decoder, labels)
    if not probe.same(out.logits, small_decoder(2 * hidden)) or not probe.same(out.loss, expected):
        return None
    if set(type(out).__dataclass_fields__) != {"loss", "logits", "hidden_states", "attentions"}:
        return None
    return MaskedLossState(base, tuple(path), transform, name, type(out))
