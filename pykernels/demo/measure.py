"""What the demo measures on a model: loss, agreement, latency, bytes and a generated sentence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .models import LanguageModel


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that the model holds, shared storage counted once.

    torch's dynamically quantised layers keep their weight in an opaque packed object, so it is unpacked and counted.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.Linear | torch.ao.nn.quantized.dynamic.Linear):
            weight, bias = module._weight_bias()
            tensors += [weight] if bias is None else [weight, bias]
    sizes = {(t.device, t.data_ptr()): t.numel() * t.element_size() for t in tensors if t.numel()}
    return sum(sizes.values())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def interleaved_p50(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    calls: int = 1,
    advance: Callable[[], object] = lambda: None,
    *,
    warm_up: bool = True,
    seconds: float = float("inf"),
) -> dict[str, float]:
    """Median milliseconds of one call of each function.

    All functions take turns in every round, so that a machine that slows down slows them alike.

    Args:
        rounds: rounds that are counted.
        calls: calls timed together in a round, for functions that are short.
        advance: called after every round.
        warm_up: begin with a round that is not counted.
        seconds: a function sits out the rest once its own counted turns took this long, so that one which is slow
            here does not make all the others wait.
    """
    seen: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(0 if warm_up else 1, rounds + 1):
        for name, function in functions.items():
            if seen[name] and sum(seen[name]) * calls >= 1000 * seconds:
                continue
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            _synchronize(device)
            if round_number:
                seen[name].append((time.perf_counter() - start) * 1000 / calls)
        advance()
    return {name: statistics.median(times) for name, times in seen.items()}


@torch.inference_mode()
def window_losses(
    model: nn.Module,
    windows: Tensor,
    advance: Callable[[], object] = lambda: None,
    seconds: float = float("inf"),
) -> list[float]:
    """Mean next-token cross entropy in nats of each of windows int64 [windows, tokens]; logits compared in float32.

    No window is begun after ``seconds`` once 2 are done, so the list may be shorter.
    """
    losses: list[float] = []
    begin = time.perf_counter()
    for window in windows:
        if len(losses) >= 2 and time.perf_counter() - begin > seconds:
            break
        logits = model(window[None]).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, window[1:]).item())
        advance()
    return losses


def language_model_loss(model: nn.Module, windows: Tensor) -> float:
    """The mean of ``window_losses`` over all windows."""
    return statistics.fmean(window_losses(model, windows))


class PromptReader:
    """Reads prompt int64 [1, tokens] and decodes after it; the two are timed one after the other."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self._model, self._prompt = model, prompt
        self._cache: Any = None

    def prefill(self) -> None:
        """Read the prompt into a new cache and compute the logits of the last token."""
        self._cache = self._model(self._prompt, use_cache=True, logits_to_keep=1).past_key_values

    def decode(self) -> object:
        """Decode one token after the prompt that ``prefill`` has read; the cache is cut back to the prompt."""
        output = self._model(self._prompt[:, -1:], past_key_values=self._cache, use_cache=True)
        self._cache.crop(-1)  # drop the token that this step added
        return output


@torch.inference_mode()
def generate(language_model: LanguageModel, model: nn.Module, question: str, max_new_tokens: int) -> str:
    """The greedy answer of ``model`` to ``question``, as one line."""
    tokenizer = language_model.tokenizer
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    device = next(model.parameters()).device
    tokens = prompt["input_ids"].to(device)
    length = tokens.shape[1]
    output = cast(Any, model).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    return " ".join(tokenizer.decode(output[0, length:], skip_special_tokens=True).split())


@torch.inference_mode()
def embed(model: nn.Module, batches: Iterable[dict[str, Tensor]], seconds: float = float("inf")) -> Tensor:
    """Unit vectors float32 [sentences, features]. No batch is begun after ``seconds`` once 2 are done."""
    vectors: list[Tensor] = []
    begin = time.perf_counter()
    for batch in batches:
        if len(vectors) >= 2 and time.perf_counter() - begin > seconds:
            break
        vectors.append(model(**batch))
    return torch.cat(vectors).float()


def mean_cosine(vectors: Tensor, reference: Tensor) -> float:
    """Mean cosine of each row with the same row of ``reference``, both [sentences, features] of unit length."""
    return (vectors.double() * reference.double()).sum(-1).mean().item()


def neighbour_agreement(vectors: Tensor, reference: Tensor) -> float:
    """Fraction of rows whose nearest other row is the same in both sets of unit vectors."""

    def nearest(x: Tensor) -> Tensor:
        return (x @ x.T).fill_diagonal_(-2.0).argmax(-1)

    return (nearest(vectors) == nearest(reference)).float().mean().item()
