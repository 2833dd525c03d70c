"""Fused models in training: the loss without logits, Trainer, accelerate, checkpointing, torch.compile and FSDP2."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from pykernels.bench.memory import peak_bytes, saved_bytes
from pykernels.integrations.transformers import _version, fuse_, unfuse_
from tests.hf_families import VOCABULARY, batch, build, clone

ROOT = Path(__file__).resolve().parents[1]


def pair(family: str = "llama", **options: Any) -> tuple[nn.Module, nn.Module]:
    """(eager, fused)."""
    model = build(family)
    fused = clone(model)
    fuse_(fused, **options)
    return model, fused


def assert_same_step(model: nn.Module, fused: nn.Module, *, tolerance: float = 1e-5, **inputs: Any) -> None:
    losses = [m(**inputs).loss for m in (model, fused)]
    torch.testing.assert_close(losses[1], losses[0], atol=tolerance, rtol=tolerance)
    for m, loss in zip((model, fused), losses, strict=True):
        m.zero_grad()
        loss.backward()
    for (name, expected), (other, got) in zip(model.named_parameters(), fused.named_parameters(), strict=True):
        assert name == other
        scale = expected.grad.abs().max().clamp(min=1e-3)
        assert (got.grad - expected.grad).abs().max() <= 20 * tolerance * scale, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(40)], ids=str)
def test_num_items_in_batch(family: str, items: Any) -> None:
    model, fused = pair(family)
    assert_same_step(model, fused, **batch(), num_items_in_batch=items)


def test_shift_labels_and_ignored_labels() -> None:
    model, fused = pair()
    inputs = batch()
    shifted = torch.cat([inputs["labels"][:, 1:], torch.full((2, 1), -100)], 1)
    if "shift_labels" in transformers.loss.loss_utils.ForCausalLMLoss.__code__.co_varnames:
        assert_same_step(model, fused, **inputs, shift_labels=shifted, num_items_in_batch=5)
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    fused.zero_grad()
    loss = fused(**nothing).loss
    loss.backward()
    assert loss == 0 and fused.lm_head.weight.grad.abs().max() == 0  # transformers gives NaN


def test_gradient_accumulation_is_that_of_one_batch() -> None:
    """Two halves with num_items_in_batch of the whole add up to the whole."""
    model, fused = pair()
    inputs = batch()
    items = (inputs["labels"][:, 1:] != -100).sum()
    model(**inputs, num_items_in_batch=items).loss.backward()
    for row in range(2):
        half = {name: value[row : row + 1] for name, value in inputs.items()}
        fused(**half, num_items_in_batch=items).loss.backward()
    for (name, expected), got in zip(model.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_logits_exist_where_they_are_asked_for() -> None:
    model, fused = pair()
    inputs = batch()
    out = fused(**inputs)
    assert out.logits is None and out.loss.requires_grad and "logits" not in out.keys()  # noqa: SIM118
    assert fused(**inputs, return_dict=False)[0] == out.loss
    ids = {name: value for name, value in inputs.items() if name != "labels"}
    torch.testing.assert_close(fused(**ids).logits, model(**ids).logits, atol=1e-5, rtol=1e-5)
    assert fused(**ids, logits_to_keep=3).logits.shape == (2, 3, VOCABULARY)
    last = {**ids, "labels": inputs["labels"][:, -4:]}
    assert_same_step(model, fused, **last, logits_to_keep=4)
    fused.eval(), model.eval()
    out, expected = fused(**inputs), model(**inputs)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss)


def test_a_loss_function_or_a_head_of_the_users_own_is_used() -> None:
    model, fused = pair()
    inputs = batch()
    for m in (model, fused):
        m.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    assert_same_step(model, fused, **inputs)
    assert fused(**inputs).logits is not None
    model, fused = pair()
    seen: list[int] = []
    fused.lm_head.register_forward_hook(lambda *_: seen.append(1))
    assert_same_step(model, fused, **inputs)
    assert seen


def test_the_logits_of_a_large_vocabulary_are_never_made() -> None:
    """A vocabulary of 8192 at 512 positions: 16 MiB of float32 logits, several times over in eager."""
    config = transformers.LlamaConfig(
        vocab_size=40_000, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(40_000, (2, 512))
    logits = ids.numel() * 40_000 * 4

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    eager = peak_bytes(step, torch.device("cpu"))
    fuse_(model)
    assert peak_bytes(step, torch.device("cpu")) < logits < eager / 2
    kept = saved_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, model.parameters())
    assert kept < logits / 10


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_of_transformers(family: str, reentrant: bool) -> None:
    model, fused = pair(family)
    for m in (model, fused):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
    assert_same_step(model, fused, **batch())
    plain = pair(family)[1]
    assert saved_bytes(lambda: fused(**batch()).loss, fused.parameters()) < saved_bytes(
        lambda: plain(**batch()).loss, plain.parameters()
    )


@pytest.mark.parametrize("save", ["inputs+preact", "int8", "recompute_mlp", "recompute_qkv", "checkpoint"])
def test_a_cache_in_training(save: str) -> None:
    """use_cache is on by default: layers that run twice write nothing, and a filled cache is read and kept."""
    model, fused = pair(save=save)
    inputs = batch()
    loose = 0.02 if save == "int8" else 1e-5
    assert_same_step(model, fused, **inputs, use_cache=True, tolerance=loose)
    prefix = torch.randint(3, VOCABULARY, (2, 5))
    for m in (model, fused):
        m.zero_grad()
        with torch.no_grad():
            cache = m.eval()(prefix).past_key_values
        m.train()
        mask = torch.cat([torch.ones(2, 5, dtype=torch.long), inputs["attention_mask"]], 1)
        m(inputs["input_ids"], attention_mask=mask, labels=inputs["labels"], past_key_values=cache).loss.backward()
        assert cache.get_seq_length() == 17
    for (name, expected), got in zip(model.named_parameters(), fused.parameters(), strict=True):
        scale = expected.grad.abs().max()
        assert (got.grad - expected.grad).abs().max() <= 20 * loose * scale.clamp(min=1e-3), name


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gpt2"])
def test_autocast(family: str) -> None:
    model, fused = pair(family)
    exact = clone(model)
    truth = exact(**batch(), use_cache=False).loss
    truth.backward()
    errors = []
    for m in (model, fused):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(**batch(), use_cache=False).loss
        loss.backward()
        pairs = [(p.grad, q.grad) for p, q in zip(m.parameters(), exact.parameters(), strict=True)]
        grads = [(got - want).norm() / want.norm() for got, want in pairs if want.norm() > 1e-6]
        assert all(p.grad.dtype == torch.float32 for p in m.parameters())
        errors.append((abs(loss - truth).item(), max(grads).item()))
    assert errors[1][0] <= 2 * errors[0][0] + 4e-3 and errors[1][1] <= 1.5 * errors[0][1] + 4e-3, errors


def test_lora_on_fused_layers() -> None:
    model = build("llama")
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"], "lora_dropout": 0.0}
    models = []
    for fused in (False, True):
        torch.manual_seed(3)
        other = peft.get_peft_model(clone(model), peft.LoraConfig(**settings, init_lora_weights=False))
        if fused:
            fuse_(other)
        models.append(other.train())
    losses = [m(**batch()).loss for m in models]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    trained = [(n, p) for n, p in models[0].named_parameters() if p.requires_grad]
    assert len(trained) == 12
    for name, parameter in trained:
        torch.testing.assert_close(models[1].get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4)
    merged = models[1].merge_and_unload()
    unfuse_(merged)
    expected = models[0].merge_and_unload()
    assert torch.equal(merged(batch()["input_ids"]).logits, expected(batch()["input_ids"]).logits)


def train(model: nn.Module, folder: Path, **options: Any) -> tuple[list[float], dict[str, float]]:
    rows = [{name: value[row] for name, value in batch().items()} for row in (0, 1)] * 4
    arguments = transformers.TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=1, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda p: {"shape": p.predictions.shape[2]},
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.evaluate()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}], ids=str)
def test_the_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    """Losses and, in evaluation, logits as without fuse_."""
    model, fused = pair()
    (losses, scores), (got, ours) = (train(m, tmp_path, **options) for m in (model, fused))
    assert losses[0] > losses[-1] and got == pytest.approx(losses, abs=2e-4)
    assert ours["eval_loss"] == pytest.approx(scores["eval_loss"], abs=1e-3)
    assert ours["eval_shape"] == scores["eval_shape"] == VOCABULARY


def test_accelerate() -> None:
    model, fused = pair()
    accelerator = accelerate.Accelerator(cpu=True)
    losses: list[list[Tensor]] = [[], []]
    for found, m in zip(losses, (model, fused), strict=True):
        prepared, optimizer = accelerator.prepare(m, torch.optim.SGD(m.parameters(), lr=0.1))
        for _ in range(2):
            loss = prepared(**batch()).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "save"), [("llama", "inputs+preact"), ("gemma2", "int8"), ("gpt2", "recompute_mlp")]
)
def test_compile(family: str, save: str) -> None:
    _, fused = pair(family, save=save)
    compiled = copy.deepcopy(fused)
    torch._dynamo.reset()
    run = torch.compile(compiled, backend="aot_eager", fullgraph=family != "gpt2")
    inputs = batch(padded=False)
    losses = [m(**inputs, use_cache=False).loss for m in (fused, run)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, expected), got in zip(fused.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


FSDP = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from pykernels.integrations.transformers import fuse_
from tests.hf_families import batch, build, clone

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
inputs, model = batch(padded=False), build("llama")
whole = model(**inputs, use_cache=False).loss
whole.backward()
for save in ("inputs+preact", "recompute_qkv"):
    fused = clone(model)
    fused.zero_grad()
    fuse_(fused, save=save)
    for layer in fused.model.layers:
        fully_shard(layer)
    fully_shard(fused)
    row = {name: value[rank : rank + 1] for name, value in inputs.items()}
    out = fused(**row, use_cache=False)
    assert out.logits is None
    out.loss.backward()
    mean = out.loss.detach().clone()
    dist.all_reduce(mean)
    assert abs(mean / 2 - whole) < 1e-5, (mean, whole)
    for (name, expected), got in zip(model.named_parameters(), fused.parameters(), strict=True):
        error = (got.grad.full_tensor() - expected.grad).abs().max()
        assert error <= 1e-4 * expected.grad.abs().max().clamp(min=1e-3), (name, error)
dist.destroy_process_group()
"""


def test_fully_shard_on_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FSDP]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            errors = rank.communicate(timeout=300)[1]
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("4.49.0", "6.0.1", "old"):
        monkeypatch.setattr(_version.metadata, "version", lambda name, found=found: found)
        with pytest.raises(ImportError, match=rf"from 4\.56 on and 5\.x, found {found}: pip install"):
            _version.check_version()
    for found in ("4.56.0", "4.57.6", "5.0.0rc1", "5.23.0"):
        monkeypatch.setattr(_version.metadata, "version", lambda name, found=found: found)
        _version.check_version()

    def absent(name: str) -> str:
        raise _version.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_version.metadata, "version", absent)
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'pykernels\[transformers\]'"):
        _version.check_version()
