"""English text that comes with Python: the prose of ``pydoc_data.topics``, the language reference."""

from __future__ import annotations

import pydoc_data.topics
import re

import torch
from torch import Tensor

from .models import LanguageModel

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def paragraphs() -> list[str]:
    """The paragraphs that are running text: grammar rules, tables, code and headings are left out."""
    found = []
    for topic in sorted(pydoc_data.topics.topics):
        for block in pydoc_data.topics.topics[topic].split("\n\n"):
            is_prose = not block.startswith((" ", "\t", "*", "=", "-", "+", "|", "~"))
            text = " ".join(block.split())
            if is_prose and len(text) > 200 and text.endswith((".", ":", "!", "?", ")")):
                found.append(text)
    return list(dict.fromkeys(found))  # some topics quote one another


def sentences(count: int) -> list[str]:
    """``count`` different sentences of 40 to 240 characters, spread evenly over the text."""
    pool = [s for paragraph in paragraphs() for s in _SENTENCE.split(paragraph) if 40 <= len(s) <= 240]
    pool = list(dict.fromkeys(pool))
    if not 0 < count <= len(pool):
        raise ValueError(f"count: got {count}, accepts 1 to {len(pool)}.")
    return [pool[i * len(pool) // count] for i in range(count)]


def windows(
    language_model: LanguageModel, evaluation: int, calibration: int, length: int = 512
) -> tuple[Tensor, Tensor]:
    """Windows of the tokenised prose, spread evenly over it; the two sets do not overlap.

    Returns:
        int64 [evaluation, length] and int64 [calibration, length].
    """
    tokens = language_model.tokenize("\n\n".join(paragraphs()))
    total = evaluation + calibration
    stride = len(tokens) // total
    if stride < length:
        raise ValueError(f"evaluation + calibration: got {total}, accepts up to {len(tokens) // length}.")
    cut = torch.stack([tokens[i * stride : i * stride + length] for i in range(total)])
    held_out = torch.zeros(total, dtype=torch.bool)
    held_out[[(2 * i + 1) * total // (2 * calibration) for i in range(calibration)]] = True
    return cut[~held_out], cut[held_out]
