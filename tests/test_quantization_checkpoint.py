"""`python -m pykernels quantize`: the file it writes, its memory, its refusals, and that it leaves no half file."""

import copy
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pykernels.functional as F
from pykernels import Int8DynamicConfig, Int8WeightOnlyConfig, quantize_
from pykernels.quantization import (
    CheckpointError,
    Selection,
    convert,
    load_checkpoint_,
    quantize_checkpoint,
    quantize_folder,
)
from pykernels.quantization.checkpoint import main


class Tiny(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 16)
        self.proj = nn.Linear(16, 24)
        self.final_norm = nn.LayerNorm(24)
        self.back = nn.Linear(24, 16, bias=False)
        self.lm_head = nn.Linear(16, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("steps", torch.arange(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.back(self.final_norm(self.proj(self.embed_tokens(tokens)))))


TOKENS = torch.tensor([[1, 2, 9]])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    save_file(Tiny().state_dict(), path, metadata={"format": "pt"})
    return path


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("group_size", [None, 8])
def test_the_result_loads_into_a_quantised_model(source: Path, tmp_path: Path, group_size: int | None) -> None:
    target = tmp_path / "out.safetensors"
    arguments = [] if group_size is None else ["--group-size", str(group_size)]
    assert main([str(source), str(target), *arguments]) == 0
    config = Int8DynamicConfig() if group_size is None else Int8WeightOnlyConfig(group_size)
    expected = Tiny()
    expected.load_state_dict(load_file(source))
    quantize_(expected, config)
    model = Tiny()
    quantize_(model, config)
    model.load_state_dict(load_file(target))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    other = Tiny()
    quantize_(other, config)
    load_checkpoint_(other, target)
    assert torch.equal(other(TOKENS), expected(TOKENS))


def test_what_is_not_quantised_is_copied_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.randn(5, 7).bfloat16(),
        "a.bias": torch.randn(5).half(),
        "b.weight": torch.randn(3, 4, 2),
        "c.weight": torch.randn(4, 4).double(),
        "d.weight": torch.randint(-9, 9, (4, 4), dtype=torch.int8),
        "e.weight": torch.randn(0, 4),
        "flag": torch.tensor(True),
        "odd": torch.arange(3, dtype=torch.uint8),
        "lm_head.weight": torch.randn(6, 4),
        "x.word_embeddings.weight": torch.randn(6, 4),
        "layer_norm.weight": torch.randn(2, 4),
    }
    save_file(state, tmp_path / "in.safetensors", metadata={"author": "me"})
    report = quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert report.quantized == ["a.weight", "e.weight"] or set(report.quantized) == {"a.weight", "e.weight"}
    result = load_file(tmp_path / "out.safetensors")
    codes, scale = F.quantize_rowwise(state["a.weight"])
    assert torch.equal(result.pop("a.weight"), codes) and torch.equal(result.pop("a.scale"), scale)
    assert result.pop("e.weight").shape == (0, 4) and result.pop("e.scale").shape == (0,)
    assert result.keys() == state.keys() - {"a.weight", "e.weight"}
    for name, value in result.items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"author": "me", "pykernels": '{"group_size": null}'}
    assert report.bytes_after == sum(
        v.numel() * v.element_size() for v in load_file(tmp_path / "out.safetensors").values()
    )


def test_blocks_of_rows_make_the_same_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_checkpoint(source, tmp_path / "one.safetensors")
    monkeypatch.setattr(convert, "_BLOCK_BYTES", 100)
    quantize_checkpoint(source, tmp_path / "many.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "many.safetensors").read_bytes()


def test_patterns(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def quantized(*arguments: str) -> set[str]:
        target = tmp_path / "out.safetensors"
        assert main([str(source), str(target), "--json", *arguments]) == 0
        report = json.loads(capsys.readouterr().out)
        assert {name for name, value in load_file(target).items() if value.dtype == torch.int8} == set(
            report["quantized"]
        )
        return set(report["quantized"])

    assert quantized() == {"proj.weight", "back.weight"}
    assert quantized("--include", "^pr") == {"proj.weight"}
    assert quantized("--exclude", "proj") == {"back.weight", "embed_tokens.weight", "lm_head.weight"}
    assert quantized("--exclude", "") == {"back.weight", "proj.weight", "embed_tokens.weight", "lm_head.weight"}


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rows, columns = 8_192, 4_096  # 128 MiB of float32 zeros, a hole in the file
    header = json.dumps(
        {"a.weight": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}}
    )
    path = tmp_path / "in.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + 4 * rows * columns)
    program = (
        "import resource, sys\n"
        "from pykernels.quantization import quantize_checkpoint\n"
        "import pykernels.functional as F, torch\n"
        "F.quantize_rowwise(torch.zeros(1024, 4096))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "quantize_checkpoint(*sys.argv[1:])\n"
        "print(peak() - before)\n"
    )
    target = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(path), str(target)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert int(done.stdout) < 64 * 1024  # KiB: a few blocks of 16 MiB, not 128 MiB
    with safe_open(target, "pt") as file:
        assert file.get_slice("a.weight").get_shape() == [rows, columns]


@pytest.fixture
def usual_handlers() -> Iterator[None]:
    """The handlers of a program run by hand: under a shell's `&`, Python starts with SIGINT ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestNothingHalfDone:
    @pytest.mark.usefixtures("usual_handlers")
    @pytest.mark.parametrize(
        ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
    )
    def test_signals(self, source, tmp_path, monkeypatch, capsys, number, code, word) -> None:
        target = tmp_path / "out.safetensors"
        target.write_bytes(b"older")
        seen = []

        def interrupt(values: torch.Tensor) -> memoryview:
            seen.append(only(tmp_path))
            signal.raise_signal(number)
            return original(values)

        original = convert._bytes
        monkeypatch.setattr(convert, "_bytes", interrupt)
        previous = signal.getsignal(number)
        assert main([str(source), str(target)]) == code
        assert len(seen) == 1 and any(name.endswith(".tmp") for name in seen[0])  # it was in the middle of writing
        assert only(tmp_path) == ["in.safetensors", "out.safetensors"]
        assert target.read_bytes() == b"older"
        assert word in capsys.readouterr().err
        assert signal.getsignal(number) is previous

    def test_non_finite_weights(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        state = {"a.weight": torch.ones(3, 4), "b.weight": torch.tensor([[1.0, float("nan")]])}
        save_file(state, tmp_path / "in.safetensors")
        assert main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]) == 2
        assert "b.weight: got NaN or infinite weights" in capsys.readouterr().err
        assert only(tmp_path) == ["in.safetensors"]

    def test_a_full_disk(self, source, tmp_path, monkeypatch, capsys) -> None:
        def full(*arguments: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(convert, "write_header", full)
        assert main([str(source), str(tmp_path / "out.safetensors")]) == 2
        assert "No space left" in capsys.readouterr().err
        assert only(tmp_path) == ["in.safetensors"]


class TestBadFiles:
    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda data: data[:-5], "cut short: the header promises .* Download or copy it again"),
            (lambda data: data[:60], "cut short"),
            (lambda data: data[:4], "not a safetensors file"),
            (lambda data: b"", "not a safetensors file"),
            (lambda data: data + b"more", "longer than its header says"),
            (lambda data: b"PK\x03\x04" + data, "not a safetensors file"),
            (lambda data: data[:8] + b"x" * (len(data) - 8), "not a safetensors file"),
            (lambda data: data.replace(b"[24,16]", b"[24,17]"), "offsets of proj.weight do not fit its shape"),
            (lambda data: data.replace(b'"dtype"', b'"dtipe"'), "not a safetensors file"),
        ],
    )
    def test_damaged(self, source: Path, tmp_path: Path, damage, words: str) -> None:
        path = tmp_path / "bad.safetensors"
        path.write_bytes(damage(source.read_bytes()))
        with pytest.raises(CheckpointError, match=f"bad.safetensors: .*{words}"):
            quantize_checkpoint(path, tmp_path / "out.safetensors")
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint_(Tiny(), path)
        assert not (tmp_path / "out.safetensors").exists()

    def test_paths_and_settings(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such file"):
            quantize_checkpoint(tmp_path / "absent.safetensors", tmp_path / "out.safetensors")
        with pytest.raises(ValueError, match="the source itself"):
            quantize_checkpoint(source, source)
        with pytest.raises(CheckpointError, match="no such folder"):
            quantize_checkpoint(source, tmp_path / "absent" / "out.safetensors")
        with pytest.raises(ValueError, match=r"group_size: got 5, .* 24 columns of back\.weight"):
            quantize_checkpoint(source, tmp_path / "out.safetensors", Selection(group_size=5, include="back"))
        with pytest.raises(ValueError, match=r"include: got '\(', accepts a regular expression"):
            Selection(include="(")
        assert only(tmp_path) == ["in.safetensors"]


class TestLoadIsAllOrNothing:
    def check(self, model: nn.Module, path: Path, *words: str) -> None:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match="does not match the model, which was left as it was") as error:
            load_checkpoint_(model, path)
        for word in words:
            assert word in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def quantised(self, tied: bool = False) -> nn.Module:
        model = Tiny(tied)
        quantize_(model, Int8DynamicConfig())
        return model

    def test_float_file_into_int8_model(self, source: Path) -> None:
        self.check(self.quantised(), source, "proj.weight: got torch.float32 [24, 16]", "proj.scale: missing")

    def test_int8_file_into_float_model(self, source: Path, tmp_path: Path) -> None:
        quantize_checkpoint(source, tmp_path / "out.safetensors")
        self.check(Tiny(), tmp_path / "out.safetensors", "proj.weight: got torch.int8", "Call quantize_ first")

    def test_other_keys_and_shapes(self, source: Path, tmp_path: Path) -> None:
        quantize_checkpoint(source, tmp_path / "out.safetensors")
        good = load_file(tmp_path / "out.safetensors")
        for change, words in (
            ({"back.scale": good["back.scale"] * float("inf")}, "back.scale: got NaN or infinite"),
            ({"final_norm.bias": torch.zeros(5)}, "final_norm.bias: got torch.float32 [5]"),
            ({"extra": torch.zeros(5)}, "extra: got torch.float32 [5], the model has no such tensor"),
            ({"steps": None}, "steps: missing; the model accepts torch.int64 [3]"),
        ):
            state = {name: value for name, value in (good | change).items() if value is not None}
            save_file(state, tmp_path / "bad.safetensors")
            self.check(self.quantised(), tmp_path / "bad.safetensors", words)

    def test_a_tied_head_may_be_absent(self, tmp_path: Path) -> None:
        model = self.quantised(tied=True)
        state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, tmp_path / "tied.safetensors")
        other = self.quantised(tied=True)
        load_checkpoint_(other, tmp_path / "tied.safetensors")
        assert torch.equal(other(TOKENS), model(TOKENS))


def test_folders_with_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    state = Tiny().state_dict()
    names = sorted(state)
    shards = {"model-1.safetensors": names[:4], "model-2.safetensors": names[4:]}
    for file, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    assert main([str(folder), str(tmp_path / "out")]) == 0
    assert only(tmp_path / "out") == only(folder)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for key, file in index["weight_map"].items():
        assert key in load_file(tmp_path / "out" / file)
    assert "proj.scale" in index["weight_map"] and set(state) <= set(index["weight_map"])
    assert main([str(folder), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    (folder / "model-2.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="not a safetensors"):
        quantize_folder(folder, tmp_path / "other")
    assert only(tmp_path) == ["model", "out"]
