"""fuse_ and INT8 folders on the real pretrained models, and the example that fine-tunes one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykernels.bench.memory import saved_bytes
from pykernels.demo import data, models
from pykernels.integrations.transformers import PykernelsInt8Config, fuse_, unfuse_

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def language_model() -> models.LanguageModel:
    return models.load_language_model()


@pytest.fixture(scope="module")
def ids(language_model: models.LanguageModel) -> Tensor:
    return data.windows(language_model, 1, 1, 64)[0]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.models
def test_smollm2(language_model: models.LanguageModel, ids: Tensor) -> None:
    """30 layers in float32: logits, every gradient, generated tokens; and at most 35 % of the layers' bytes with int8.

    Its activations reach thousands in a few columns, and float32 rounding grows on the way back through them: up to
    1.4e-3 of the gradient of a norm's weight. The random models hold every gradient against float64.
    """
    model = language_model.model
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
        answer = model.generate(ids[:, :16], attention_mask=torch.ones(1, 16), max_new_tokens=4, do_sample=False)
    model.train()
    loss = model(**inputs, labels=ids).loss
    eager = saved_bytes(lambda: model.model(**inputs), model.parameters())
    wanted = gradients(model, loss)
    report = fuse_(model)
    assert len(report.converted) == 1 + 3 * 30 + 61 and not report.skipped
    fused = model(**inputs, labels=ids).loss
    assert abs(fused - loss) <= 1e-5 * loss
    got = gradients(model, fused)
    assert got.keys() == wanted.keys()
    assert all(distance(got[name], grad) <= 4e-3 for name, grad in wanted.items())
    squares = sum((got[name] - grad).square().sum() for name, grad in wanted.items())
    assert squares <= 3e-4**2 * sum(grad.square().sum() for grad in wanted.values())
    del got, wanted
    for layer in model.model.layers:
        layer.save = "int8"
    assert saved_bytes(lambda: model.model(**inputs), model.parameters()) <= 0.35 * eager
    model.eval()
    with torch.no_grad():
        assert distance(model(**inputs).logits, expected) <= 2e-5
        again = model.generate(ids[:, :16], attention_mask=torch.ones(1, 16), max_new_tokens=4, do_sample=False)
    assert torch.equal(again, answer)
    unfuse_(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.models
def test_smollm2_in_an_int8_folder(language_model: models.LanguageModel, ids: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = language_model.model(ids, labels=ids).loss
    language_model.model.save_pretrained(tmp_path / "float")
    asked = PykernelsInt8Config("weight_only", group_size=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=asked)
    assert len(model.hf_quantizer.report.converted) == 7 * 30
    model.save_pretrained(tmp_path / "int8")
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("float", "int8")]
    assert sizes[1] < 0.45 * sizes[0]  # the embedding, which is the head too, stays float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        losses = [m(ids, labels=ids).loss for m in (model, again)]
    assert losses[0] == losses[1]
    assert 0 < abs(losses[0] - expected) <= 0.02  # of 64 tokens; tests/test_accuracy.py holds the mean over many


@pytest.mark.models
def test_minilm() -> None:
    encoder = models.load_encoder()
    batch, model = encoder.tokenize(data.sentences(8)), encoder.model.eval()
    expected = model(**batch)
    weights = torch.linspace(-1, 1, expected.shape[1])
    wanted = gradients(model, (expected * weights).sum())
    report = fuse_(model)
    assert {row.what for row in report.converted} == {"MLP", "norm"} and len(report.converted) == 6 + 13
    vectors = model(**batch)
    assert distance(vectors, expected) <= 1e-5
    largest = max(grad.norm() for grad in wanted.values())
    for name, grad in gradients(model, (vectors * weights).sum()).items():
        error = (grad - wanted.pop(name)).norm()
        assert error <= 1e-4 * max(grad.norm(), 1e-3 * largest), name  # a key's bias has no gradient but rounding
    assert not wanted
    unfuse_(model)
    assert torch.equal(model(**batch), expected)


@pytest.mark.parametrize("save", ["inputs+preact", "int8"])
def test_the_fine_tuning_example(save: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = (EXAMPLES / "finetune_hf.py").read_text()
    assert len(source.splitlines()) < 60
    sys.path.insert(0, str(EXAMPLES))
    try:
        import finetune_hf
    finally:
        sys.path.remove(str(EXAMPLES))
    losses = finetune_hf.main(["--tiny", "--steps", "3", "--save", save])
    assert len(losses) == 3 and 5.8 > losses[0] > losses[2] > 4
    assert f'fuse_(save="{save}"): 1 linear cross entropy, 2 decoder layer' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        finetune_hf.main(["--steps", "0"])
