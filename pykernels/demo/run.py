"""Builds every variant of a model and measures all of them: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import sub
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor, nn

from . import data, measure, models
from .progress import Steps
from .variants import BASELINE, VARIANTS, Absent

QUESTION = "Explain in one sentence why the sky is blue."


@dataclass(frozen=True)
class Sizes:
    """How much is measured, at most. ``windows`` of ``tokens`` tokens give the loss, ``calibration`` others the scales.

    A form takes no further turn of a latency after ``seconds`` of its own, once one is done; one other than float32
    reads no further window or batch of sentences after ``seconds``, once two are read.
    """

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
    seconds: float = 25.0


FULL = Sizes()
DEMO = Sizes(
    windows=6,
    prefill_rounds=2,
    decode_rounds=5,
    decode_calls=2,
    sentences=192,
    encoder_rounds=4,
    seconds=5.0,
)
QUICK = Sizes(
    windows=2,
    calibration=2,
    prefill_rounds=1,
    decode_rounds=3,
    new_tokens=12,
    sentences=64,
    encoder_rounds=3,
    seconds=2.0,
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
    loss_rise (over float32), loss_windows (of which they are the mean). ``text`` is the greedy answer to ``QUESTION``.
    """
    with steps("SmolLM2-135M: reading"):
        language_model = models.load_language_model(device)
        evaluation, calibration = data.windows(language_model, sizes.windows, sizes.calibration, sizes.tokens)
    evaluation = evaluation.to(device)
    # Logits calibrate nothing.
    batches = [{"input_ids": window[None].to(device), "logits_to_keep": 1} for window in calibration]
    rows, built = _build("SmolLM2-135M", language_model.model, batches, steps)

    with steps("SmolLM2-135M: loss", total=len(built) * len(evaluation)) as advance:
        losses = {}
        for name, model in built.items():
            seconds = float("inf") if name == BASELINE else sizes.seconds
            losses[name] = measure.window_losses(model, evaluation, advance, seconds)
    # Over the windows that a form has read; float32 has read all.
    rises = {name: mean(map(sub, values, losses[BASELINE])) for name, values in losses.items()}
    _store(rows, "loss_rise", rises)
    _store(rows, "loss", {name: mean(losses[BASELINE]) + rise for name, rise in rises.items()})
    _store(rows, "loss_windows", {name: float(len(values)) for name, values in losses.items()})

    readers = {name: measure.PromptReader(model, evaluation[:1]) for name, model in built.items()}
    prefills = {name: reader.prefill for name, reader in readers.items()}
    with steps("SmolLM2-135M: prefill", total=sizes.prefill_rounds) as advance:
        # The losses have warmed everything up.
        prefill_ms = measure.interleaved_p50(
            prefills, device, sizes.prefill_rounds, advance=advance, warm_up=False, seconds=sizes.seconds
        )
        _store(rows, "prefill_ms", prefill_ms)
    decoders = {name: reader.decode for name, reader in readers.items()}
    with steps("SmolLM2-135M: decoding", total=sizes.decode_rounds + 1) as advance:
        decode_ms = measure.interleaved_p50(
            decoders, device, sizes.decode_rounds, sizes.decode_calls, advance, seconds=sizes.seconds
        )
        _store(rows, "decode_ms", decode_ms)
    with steps("SmolLM2-135M: generating", total=len(built)) as advance:
        for name, model in built.items():
            rows[name].text = measure.generate(language_model, model, QUESTION, sizes.new_tokens)
            advance()
    return list(rows.values())


def measure_encoder(sizes: Sizes, device: torch.device, steps: Steps) -> list[Row]:
    """Rows of all-MiniLM-L6-v2.

    Values: bytes, one_ms (one sentence), batch_ms (``sizes.batch`` sentences), cosine (mean, with the float32 vector
    of the same sentence), neighbour_agreement (fraction of sentences with the same nearest neighbour as in float32),
    sentences (over which the two are).
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
            vectors[name] = measure.embed(model, evaluation, float("inf") if name == BASELINE else sizes.seconds)
            advance()
    # A form is compared over the sentences that it has read; float32 has read all.
    references = {name: vectors[BASELINE][: len(v)] for name, v in vectors.items()}
    _store(rows, "cosine", {name: measure.mean_cosine(v, references[name]) for name, v in vectors.items()})
    agreement = {name: measure.neighbour_agreement(v, references[name]) for name, v in vectors.items()}
    _store(rows, "neighbour_agreement", agreement)
    _store(rows, "sentences", {name: float(len(v)) for name, v in vectors.items()})

    for key, count in (("one_ms", 1), ("batch_ms", sizes.batch)):
        batch = {name: value[:count] for name, value in evaluation[0].items()}
        warm_up = count < sizes.batch  # the embedding of whole batches has warmed those up
        rounds = sizes.encoder_rounds
        with steps(f"MiniLM-L6: {count} sentence{'s' * (count > 1)}", total=rounds + warm_up) as advance:
            calls = {name: _bound(model, batch) for name, model in built.items()}
            times = measure.interleaved_p50(
                calls, device, rounds, advance=advance, warm_up=warm_up, seconds=sizes.seconds
            )
            _store(rows, key, times)
    return list(rows.values())


def _bound(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: model(**batch)
