"""Builds every variant of a model and measures all of them: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import data, measure, models
from .progress import Steps
from .variants import BASELINE, VARIANTS, Absent

QUESTION = "Explain in one sentence why the sky is blue."


@dataclass(frozen=True)
class Sizes:
    """How much is measured. ``windows`` of ``tokens`` tokens give the loss, ``calibration`` others the scales."""

    tokens: int = 512
    windows: int = 12
    calibration: int = 6
    prefill_rounds: int = 4
    decode_rounds: int = 10
    decode_calls: int = 3
    new_tokens: int = 28
    sentences: int = 320
    batch: int = 32
    encoder_rounds: int = 8


QUICK = Sizes(
    windows=2, calibration=2, prefill_rounds=1, decode_rounds=3, new_tokens=12, sentences=64, encoder_rounds=3
)


@dataclass
class Row:
    """One variant of one model. ``absent`` is the reason when there is nothing to measure."""

    model: str
    variant: str
    values: dict[str, float] = field(default_factory=dict)
    text: str = ""
    absent: str = ""


def _build(
    name: str, model: nn.Module, calibration: list[Any], steps: Steps
) -> tuple[dict[str, Row], dict[str, nn.Module]]:
    rows, built = {}, {}
    with steps(f"{name}: converting", total=len(VARIANTS)) as advance:
        for variant in VARIANTS:
            rows[variant.name] = row = Row(name, variant.name)
            try:
                built[variant.name] = variant.build(model, calibration)
            except Absent as reason:
                row.absent = str(reason)
            advance()
    for variant_name, converted in built.items():
        rows[variant_name].values["bytes"] = measure.held_bytes(converted)
    return rows, built


def _store(rows: dict[str, Row], key: str, values: dict[str, float]) -> None:
    for variant, value in values.items():
        rows[variant].values[key] = value


def measure_language_model(sizes: Sizes, device: torch.device, steps: Steps) -> list[Row]:
    """Rows of SmolLM2-135M-Instruct.

    Values: bytes, prefill_ms (``sizes.tokens`` tokens), decode_ms (one token after them), loss (nats per token),
    loss_rise (over float32). ``text`` is the greedy answer to ``QUESTION``.
    """
    with steps("SmolLM2-135M: reading"):
        language_model = models.load_language_model(device)
        evaluation, calibration = data.windows(language_model, sizes.windows, sizes.calibration, sizes.tokens)
    evaluation = evaluation.to(device)
    batches = [window[None].to(device) for window in calibration]
    rows, built = _build("SmolLM2-135M", language_model.model, batches, steps)

    with steps("SmolLM2-135M: loss", total=len(built) * len(evaluation)) as advance:
        losses = {name: measure.language_model_loss(model, evaluation, advance) for name, model in built.items()}
    _store(rows, "loss", losses)
    _store(rows, "loss_rise", {name: loss - losses[BASELINE] for name, loss in losses.items()})

    prompt = evaluation[:1]
    with steps("SmolLM2-135M: prefill", total=sizes.prefill_rounds + 1) as advance:
        prefills = {name: measure.prefill(model, prompt) for name, model in built.items()}
        _store(rows, "prefill_ms", measure.interleaved_p50(prefills, device, sizes.prefill_rounds, advance=advance))
    with steps("SmolLM2-135M: decoding", total=sizes.decode_rounds + 1) as advance:
        decoders = {name: measure.decoding_step(model, prompt) for name, model in built.items()}
        decode_ms = measure.interleaved_p50(decoders, device, sizes.decode_rounds, sizes.decode_calls, advance)
        _store(rows, "decode_ms", decode_ms)
    with steps("SmolLM2-135M: generating", total=len(built)) as advance:
        for name, model in built.items():
            rows[name].text = measure.generate(language_model, model, QUESTION, sizes.new_tokens)
            advance()
    return list(rows.values())


def measure_encoder(sizes: Sizes, device: torch.device, steps: Steps) -> list[Row]:
    """Rows of all-MiniLM-L6-v2.

    Values: bytes, one_ms (one sentence), batch_ms (``sizes.batch`` sentences), cosine (mean, with the float32 vector
    of the same sentence), neighbour_agreement (fraction of sentences with the same nearest neighbour as in float32).
    """
    with steps("MiniLM-L6: reading"):
        encoder = models.load_encoder(device)
        sentences = data.sentences(2 * sizes.sentences)

    def batches(texts: list[str]) -> list[dict[str, Tensor]]:
        starts = range(0, len(texts), sizes.batch)
        tokenized = (encoder.tokenize(texts[start : start + sizes.batch]) for start in starts)
        return [{key: value.to(device) for key, value in batch.items()} for batch in tokenized]

    evaluation = batches(sentences[::2])
    rows, built = _build("MiniLM-L6", encoder.model, batches(sentences[1::2][: 2 * sizes.batch]), steps)

    with steps("MiniLM-L6: embedding", total=len(built)) as advance:
        vectors = {}
        for name, model in built.items():
            vectors[name] = measure.embed(model, evaluation)
            advance()
    reference = vectors[BASELINE]
    _store(rows, "cosine", {name: measure.mean_cosine(v, reference) for name, v in vectors.items()})
    agreement = {name: measure.neighbour_agreement(v, reference) for name, v in vectors.items()}
    _store(rows, "neighbour_agreement", agreement)

    for key, count in (("one_ms", 1), ("batch_ms", sizes.batch)):
        batch = {name: value[:count] for name, value in evaluation[0].items()}
        with steps(f"MiniLM-L6: {count} sentence{'s' * (count > 1)}", total=sizes.encoder_rounds + 1) as advance:
            calls = {name: _bound(model, batch) for name, model in built.items()}
            _store(rows, key, measure.interleaved_p50(calls, device, sizes.encoder_rounds, advance=advance))
    return list(rows.values())


def _bound(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: model(**batch)
