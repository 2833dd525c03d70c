"""INT8 weights through from_pretrained and save_pretrained, and LoRA on top of them, on small random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import pykernels
from pykernels.integrations.transformers import PykernelsInt8Config, fuse_, int8_lora
from tests.hf_families import batch, build, clone

CONFIGS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W8A16": {"mode": "weight_only"},
    "W8A16 groups": {"mode": "weight_only", "group_size": 32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2")
    build("qwen2").save_pretrained(path)
    return path


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch()["input_ids"]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_load_save_and_reload(config: str, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """What from_pretrained makes is what quantize_ makes, and the saved folder holds it bit for bit."""
    asked = PykernelsInt8Config(**CONFIGS[config])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    pykernels.quantize_(expected, asked.of_layers())
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in state)
    assert isinstance(model.lm_head, nn.Linear) and len(model.hf_quantizer.report.converted) == 14
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert saved[f"{name}.weight"].dtype == torch.int8 and saved[f"{name}.scale"].dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.get_submodule(name)) is type(model.get_submodule(name))
    assert again.get_submodule(name).scale.shape == model.get_submodule(name).scale.shape
    for key, value in again.state_dict().items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key]), key
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.to_dict() == asked.to_dict()


def test_names_that_stay_in_float(folder: Path) -> None:
    asked = PykernelsInt8Config(modules_to_not_convert=["down_proj", "model.layers.0.self_attn"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "proj" in name}
    floats = [name for name, kind in kinds.items() if kind == "Linear"]
    assert len(floats) == 6 and sum(kind == "Int8Linear" for kind in kinds.values()) == 8


def test_dequantize_gives_back_float_layers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PykernelsInt8Config("weight_only"))
    expected = logits(model)
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.dequantized_weight()
    plain = model.dequantize()
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, weight)
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_options_that_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="got mode 'int4', accepts 'dynamic', 'weight_only'"):
        PykernelsInt8Config("int4")
    with pytest.raises(ValueError, match='got group_size 64 with "dynamic"'):
        PykernelsInt8Config(group_size=64)
    with pytest.raises(ValueError, match="group_size: got -1"):
        PykernelsInt8Config("weight_only", group_size=-1)
    with pytest.raises(ValueError, match="got bits, accepts mode, group_size"):
        PykernelsInt8Config(bits=8)
    with pytest.raises(ValueError, match="group_size: got 48, accepts a divisor of in_features = 64"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=PykernelsInt8Config("weight_only", group_size=48)
        )
    with pytest.raises(ValueError, match="got a device_map of several places"):
        AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=PykernelsInt8Config(),
            device_map={"model.embed_tokens": "cpu", "model": "disk", "lm_head": "cpu"},
            offload_folder="unused",
        )


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no torch\.nn\.Linear to convert .* Conv1D"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PykernelsInt8Config())


@pytest.mark.parametrize("damage", ["float weights", "no scale", "other groups", "wrong shape"])
def test_a_wrong_checkpoint_is_named(damage: str, folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PykernelsInt8Config())
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(file)
    if damage == "float weights":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()
    elif damage == "no scale":
        del tensors[f"{name}.scale"]
    elif damage == "wrong shape":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, :32].contiguous()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] |= {"mode": "weight_only", "group_size": 32}
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(pykernels.quantization.CheckpointError, match=r"got .*, Int8.*accepts .* mend config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_float_folder_that_claims_to_be_int8_is_named(folder: Path, tmp_path: Path) -> None:
    build("qwen2").save_pretrained(tmp_path, max_shard_size="100KB")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = PykernelsInt8Config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(pykernels.quantization.CheckpointError, match=r"got F32 .*accepts I8"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", ["W8A8", "W8A16 groups"])
def test_lora_gradients_on_an_int8_base_are_those_of_its_float_copy(config: str, fused: bool, folder: Path) -> None:
    """W8A16 computes with the dequantised weight: equal to float32 rounding. W8A8 rounds activations as well."""
    asked = PykernelsInt8Config(**CONFIGS[config])
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    reference = clone(base).dequantize()
    codes = {name: buffer.clone() for name, buffer in base.named_buffers()}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}

    def with_adapters(model: nn.Module, lora: peft.LoraConfig) -> nn.Module:
        torch.manual_seed(1)
        model = peft.get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at first: no gradient would reach A
                nn.init.normal_(parameter, std=0.1)
        return model.train()

    model = with_adapters(base, int8_lora(peft.LoraConfig(**settings)))
    expected = with_adapters(reference, peft.LoraConfig(**settings))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 16 and all("lora_" in name for name in trainable)
    if fused:
        report = fuse_(model)
        assert {row.what for row in report.converted} >= {"decoder layer", "linear cross entropy"}
    losses = [m(**batch(), use_cache=False).loss for m in (model, expected)]
    for loss in losses:
        loss.backward()
    tolerance = 1e-5 if config == "W8A16 groups" else 0.03
    assert abs(losses[0] - losses[1]) <= tolerance * losses[1]
    theirs = dict(expected.named_parameters())
    for name in trainable:
        grad, wanted = model.get_parameter(name).grad, theirs[name].grad
        assert wanted.norm() > 0 and (grad - wanted).norm() <= 3 * tolerance * wanted.norm(), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(buffer, codes[name.removeprefix("base_model.model.").replace(".base_layer", "")])
               for name, buffer in model.named_buffers())  # fmt: skip


def test_adapters_are_saved_and_loaded_and_not_merged(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PykernelsInt8Config())
    model = peft.get_peft_model(base, int8_lora(peft.LoraConfig(target_modules=["q_proj", "down_proj"])))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match="cannot be merged into INT8 codes"):
        model.merge_and_unload()
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PykernelsInt8Config())
    config = int8_lora(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    assert torch.equal(logits(again), expected)
    with pytest.raises(TypeError, match=r"expected a peft\.LoraConfig, got dict"):
        int8_lora({})


def test_the_trainer_trains_adapters_on_int8(folder: Path, tmp_path: Path) -> None:
    """transformers refuses to train a quantised model, but for its adapters."""
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PykernelsInt8Config())
    rows = [{name: value[0] for name, value in batch().items()}] * 4
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2
    )
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(base, arguments, train_dataset=rows)
    model = peft.get_peft_model(base, int8_lora(peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"])))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fuse_(model)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
