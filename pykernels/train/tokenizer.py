"""Text to token ids: its bytes, or a byte-level BPE trained on the corpus itself (Sennrich et al., 2016)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import TrainingError

KINDS = ("bytes", "bpe")
FILE = "tokenizer.json"


def encode(text: str, kind: str, vocab: int, folder: Path) -> tuple[Tensor, int]:
    """(ids of the text, int32 [N]; number of ids there are).

    kind "bpe": the tokenizer in `folder` if one is there, else a new one of at most `vocab` ids, which is left there
    in the format of the tokenizers package. Every byte has an id of its own, so that any text can be encoded.
    """
    if kind == "bytes":
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).int(), 256
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        raise TrainingError(
            "--tokenizer bpe needs the package tokenizers: pip install tokenizers, or give --tokenizer bytes."
        ) from None
    lines = text.splitlines(keepends=True)
    file = folder / FILE
    if file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises Exception itself
            raise TrainingError(f"{file}: not a tokenizer ({error}): remove it to have one trained.") from None
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        tokenizer.save(str(file))
    ids = [torch.tensor(line.ids, dtype=torch.int32) for line in tokenizer.encode_batch(lines)]
    return torch.cat(ids), tokenizer.get_vocab_size()
