"""``fuse_``: give the modules of a transformers model the forwards of this package, in place, on it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...memory.checkpoint import _Checkpointed
from ...nn._save import check_save
from ...quantization.report import Skipped
from . import _attention, _gated_mlp, _layer, _loss, _masked_loss, _norms, _plain_mlp
from ._swap import Fused, is_swapped, swap, swap_back
from .report import Converted, FusionReport

_UNTRIED = (TypeError, RuntimeError, AttributeError, LookupError, AssertionError)
Found = tuple[type[Fused], Any, str]


def fuse_(
    model: nn.Module,
    *,
    rms_norm: bool = True,
    rope: bool = True,
    mlp: bool = True,
    loss: bool = True,
    save: str = "inputs+preact",
) -> FusionReport:
    """Run a transformers model through the kernels and the memory-saving nodes of this package, in place.

    Modules stay the same objects with the same parameters, names, isinstance and state dict; each gets another forward
    by a class of its own, and no class of transformers is touched. What a module is, is found by its parts and its
    configuration, and then checked: its own forward must give on made-up numbers what the new one gives. So Llama,
    Mistral, Qwen 2 and 3, Gemma 2 and 3 (text), Phi-3, GPT-2 and BERT are served, and as much of other families as is
    alike; the report says what was left alone, and why.

    Args:
        model: a transformers model, or a module that holds one (PEFT's).
        rms_norm: RMSNorm and LayerNorm.
        rope: rotary attention: query, key and value, and their rotation. Masks, cache and the attention implementation
            stay transformers'.
        mlp: gated MLPs, and those of GPT-2 and BERT.
        loss: in training (``model.training``) and with ``labels``, a causal language model computes its loss by
            linear_cross_entropy, with transformers' num_items_in_batch and shift_labels, and ``output.logits`` is
            None. In evaluation mode, and without labels, logits are computed as before.
        save: what is kept for backward, the values of pykernels.nn.TransformerBlock: "all", "inputs+preact", "int8",
            "recompute_mlp", "recompute_qkv", "checkpoint". Decoder layers that are recognised as a whole (rms_norm,
            rope and mlp on) follow it as TransformerBlock does; in others it rules the MLP. Change it later through
            pykernels.memory.checkpoint_ or ``layer.save``.

    Layers or heads that are wrapped (LoRA), hooked or quantised are called as modules, and keep what they keep.
    "recompute_qkv" does so only for causal SDPA without a mask or attention dropout; otherwise query, key and value are
    kept. With it and with "checkpoint", training fills no cache.

    Returns:
        A FusionReport; ``print`` it. ``unfuse_`` restores the model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown save, one that no layer of the model can follow, a model that is fused already, or one
            under checkpoint_. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_: expected model to be a torch.nn.Module, got {type(model).__name__}")
    check_save(save)
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            raise ValueError(f"fuse_: {name or 'the model'!r} is fused already: call unfuse_ first")
        if isinstance(module, _Checkpointed):
            raise ValueError(f'fuse_: {name!r} is checkpointed: call checkpoint_(model, "none") first, and again after')
    report = FusionReport(save)
    found: dict[nn.Module, Found] = {}
    whole = rms_norm and rope and mlp
    for name, module in model.named_modules():
        for recognise in _recognisers(rms_norm, rope, mlp, whole, loss, save):
            try:
                got = recognise(module)
            except ValueError as error:
                report.skipped.append(Skipped(name, type(module).__name__, str(error)))
                continue
            except _UNTRIED as error:  # a forward that does not take what those of its kind take
                reason = f"its forward could not be tried: {type(error).__name__}: {str(error).splitlines()[0]}"
                report.skipped.append(Skipped(name, type(module).__name__, reason))
                continue
            if got is not None:
                found[module] = got
                report.converted.append(Converted(name, type(module).__name__, got[2]))
                break
    _check_dial(model, save, found, report)
    for module, (mixin, state, _) in found.items():
        swap(module, mixin, state)
    return report


def unfuse_(model: nn.Module) -> list[str]:
    """Undo fuse_, bit for bit; returns the names of the modules that have their own forward again.

    Raises ValueError, and changes nothing, where another tool has wrapped a fused module since: undo that first.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
    for name, module in fused.items():
        if not is_swapped(module):
            how = 'checkpoint_(model, "none")' if isinstance(module, _Checkpointed) else "what has wrapped it"
            raise ValueError(f"unfuse_: {name or 'the model'!r} has changed its class since fuse_: undo {how} first")
    for module in fused.values():
        swap_back(module)
    return list(fused)


def _recognisers(
    rms_norm: bool, rope: bool, mlp: bool, whole: bool, loss: bool, save: str
) -> Iterator[Callable[[nn.Module], Found | None]]:
    def as_found(mixin: type[Fused], what: str, recognise: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        def run(module: nn.Module) -> Found | None:
            state = recognise(module, *args)
            return None if state is None else (mixin, state, what)

        return run

    if loss:
        yield as_found(_masked_loss.FusedMaskedLM, "linear cross entropy", _masked_loss.recognise)
        yield as_found(_loss.FusedCausalLM, "linear cross entropy", _loss.recognise)
    if whole:
        yield as_found(_layer.FusedDecoderLayer, "decoder layer", _layer.recognise, save)
    if rope:
        yield as_found(_attention.FusedAttention, "attention", _attention.recognise)
    if mlp:
        yield as_found(_gated_mlp.FusedGatedMLP, "gated MLP", _gated_mlp.recognise, save)
        yield as_found(_plain_mlp.FusedMLP, "MLP", _plain_mlp.recognise, save)
        yield as_found(_plain_mlp.FusedBertLayer, "MLP", _plain_mlp.recognise_bert, save)
    if rms_norm:
        yield as_found(_norms.FusedNorm, "norm", _norms.recognise)


def _check_dial(model: nn.Module, save: str, found: dict[nn.Module, Found], report: FusionReport) -> None:
    """ValueError where nothing could follow the dial."""
    layers = {module: state for module, (mixin, state, _) in found.items() if mixin is _layer.FusedDecoderLayer}
    dials = [state for _, state, _ in found.values() if hasattr(state, "save")]
    if save in ("all", "inputs+preact"):
        return
    possible = '"all", "inputs+preact"' + (', "int8", "recompute_mlp", "checkpoint"' if dials else "")
    if save != "recompute_qkv":
        if not dials:
            raise ValueError(f'fuse_: no layer or MLP of this model can follow save="{save}"; possible: {possible}')
        return
    reason = "no decoder layer is fused as a whole" if not layers else None
    for layer in layers:
        attention: Any = layer.self_attn
        state = found[attention][1] if attention in found else None
        reason = reason or _layer.refuse_recompute_qkv(attention, state)
    if reason is not None:
        raise ValueError(f'fuse_: this model cannot follow save="recompute_qkv": {reason}; possible: {possible}')
