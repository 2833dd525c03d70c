"""What quantisation costs two real pretrained models, held against the limits the project promises.

The text, windows and calibration batches are those of `python -m pykernels demo --full`: these are its numbers.
Nothing here is skipped when a model is absent: `make test` installs both, and a missing one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykernels.demo import data, measure, models
from pykernels.demo.run import FULL as SIZES
from pykernels.demo.variants import VARIANTS

pytestmark = pytest.mark.models

CONVERT = {variant.name: variant for variant in VARIANTS}


@dataclass
class Subject:
    """A float32 model, what it is calibrated with, what it is judged on and its own result on that."""

    model: nn.Module
    calibration: list[Any]
    evaluation: Any
    reference: Any

    def converted(self, variant: str) -> nn.Module:
        return CONVERT[variant].build(self.model, self.calibration)


@pytest.fixture(scope="module")
def language_model() -> Subject:
    loaded = models.load_language_model()
    evaluation, calibration = data.windows(loaded, SIZES.windows, SIZES.calibration, SIZES.tokens)
    reference = measure.language_model_loss(loaded.model, evaluation)
    return Subject(loaded.model, [window[None] for window in calibration], evaluation, reference)


@pytest.fixture(scope="module")
def sentence_encoder() -> models.Encoder:
    return models.load_encoder()


@pytest.fixture(scope="module")
def encoder(sentence_encoder: models.Encoder) -> Subject:
    loaded = sentence_encoder
    sentences = data.sentences(256)
    evaluation = [loaded.tokenize(sentences[i : i + 32]) for i in range(0, 192, 32)]
    calibration = [loaded.tokenize(sentences[i : i + 32]) for i in range(192, 256, 32)]
    return Subject(loaded.model, calibration, evaluation, measure.embed(loaded.model, evaluation))


def test_the_float32_language_model_reads_english(language_model: Subject) -> None:
    # A wrong permutation, scale or tokenizer gives 5 nats or more; guessing gives ln(49152) = 10.8.
    assert 2.0 < language_model.reference < 3.3


@pytest.mark.parametrize(
    ("variant", "limit"),
    [
        ("pykernels W8A8", 0.03),
        ("pykernels W8A8 smoothed", 0.01),
        ("pykernels W8A8 outliers", 0.01),
        ("pykernels W8A16", 0.005),
    ],
)
def test_loss_rises_no_more_than(language_model: Subject, variant: str, limit: float) -> None:
    converted = language_model.converted(variant)
    head = converted.get_submodule("lm_head")
    assert type(head) is nn.Linear and head.weight.dtype == torch.float32
    rest = [name for name, m in converted.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert not rest, f"not converted: {rest}"
    loss = measure.language_model_loss(converted, language_model.evaluation)
    assert loss - language_model.reference <= limit
    assert loss != language_model.reference  # it was quantised


def test_float32_vectors_tell_meaning_apart(sentence_encoder: models.Encoder) -> None:
    # Pooling and normalisation as the encoder was trained: known to rank a paraphrase above an unrelated sentence.
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    with torch.inference_mode():
        vectors = sentence_encoder.model(**sentence_encoder.tokenize(texts))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]


def test_padding_does_not_change_a_sentence(sentence_encoder: models.Encoder) -> None:
    short, long = "It rains.", "This is a much longer sentence, after which the first one has to be padded."
    with torch.inference_mode():
        alone = sentence_encoder.model(**sentence_encoder.tokenize([short]))
        padded = sentence_encoder.model(**sentence_encoder.tokenize([short, long]))[:1]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("variant", "limit"),
    [
        ("pykernels W8A8", 0.997),
        ("pykernels W8A8 smoothed", 0.997),
        ("pykernels W8A8 outliers", 0.997),
        ("pykernels W8A16", 0.9995),
    ],
)
def test_cosine_to_float32_is_at_least(encoder: Subject, variant: str, limit: float) -> None:
    vectors = measure.embed(encoder.converted(variant), encoder.evaluation)
    assert measure.mean_cosine(vectors, encoder.reference) >= limit
    assert not torch.equal(vectors, encoder.reference)  # it was quantised


def test_calibration_and_evaluation_text_do_not_overlap() -> None:
    class Characters:
        def tokenize(self, text: str) -> Tensor:
            return torch.arange(len(text))

    evaluation, calibration = data.windows(Characters(), 12, 6, 64)
    assert evaluation.shape == (12, 64) and calibration.shape == (6, 64)
    assert len(torch.cat([evaluation.flatten(), calibration.flatten()]).unique()) == 18 * 64
    assert calibration[0, 0] > evaluation[0, 0] and calibration[-1, 0] > evaluation[6, 0]  # spread, not at one end
