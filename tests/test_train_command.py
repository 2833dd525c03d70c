"""`python -m pykernels train`: killed and resumed to the same bits, on two ranks, with its table, with bad input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pykernels.memory.contract import LayerShape, saved_bytes_per_token
from pykernels.train import main
from pykernels.train.batches import Batches, windows
from pykernels.train.settings import SIZES
from pykernels.train.tokenizer import encode

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TEXT = "In the beginning was the word, and the word was números.\n" * 200


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL))
    return path


def options(corpus: Path, config: Path, output: Path, *more: str) -> list[str]:
    shape = ["--config", str(config), "--tokenizer", "bytes", "--batch", "4", "--context", "16", "--validation", "2"]
    return ["--corpus", str(corpus), *shape, "--output", str(output), "--device", "cpu", *more]


def command(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    called = [sys.executable, "-m", "pykernels", "train", *arguments]
    return subprocess.Popen(called, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/")


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)["recipes"]


def test_a_killed_run_goes_on_to_the_same_bits_on_one_process_and_on_two_ranks(corpus, config, tmp_path):
    """kill -9 behind the first checkpoint; data, seeds of stochastic rounding, schedule and every kind of state."""
    names = ("baseline", "fused-int8", "int8-8bit", "zero2")
    training = ["--recipes", ",".join(names), "--steps", "24", "--every", "6", "--save-every", "5", "--lr", "0.01"]
    whole = command(options(corpus, config, tmp_path / "whole", *training, "--json"))
    cut = command(options(corpus, config, tmp_path / "cut", *training, "--json"))
    kill_behind(tmp_path / "cut" / "int8-8bit" / "checkpoint", cut)
    assert not (tmp_path / "cut" / "train.csv").exists()
    again = command(["--resume", "--output", str(tmp_path / "cut"), "--json"])
    kill_behind(tmp_path / "cut" / "zero2" / "checkpoint", again)
    last = command(["--resume", "--output", str(tmp_path / "cut"), "--json"])
    expected, got = finished(whole), finished(last)
    assert list(got) == list(names)
    for name in names:
        assert len(got[name]["losses"]) == 24
        assert got[name]["losses"] == expected[name]["losses"], name
        assert got[name]["validation"] == expected[name]["validation"], name
        assert got[name]["memory"] == expected[name]["memory"], name
    # Two ranks see the batch of one process, half each.
    assert got["zero2"]["ranks"] == 2
    for ours, theirs in zip(got["zero2"]["losses"], got["baseline"]["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    memory = got["zero2"]["memory"]
    assert memory["state"] < 0.52 * got["baseline"]["memory"]["state"]
    assert memory["gradients"] * 2 == got["baseline"]["memory"]["gradients"]
    assert memory["parameters"] * 2 == got["baseline"]["memory"]["parameters"]
    # The ranks' errors come through torchrun as the command's own.
    file = next((tmp_path / "cut" / "zero2" / "checkpoint").glob("*.distcp"))
    file.write_bytes(b"not this")
    broken = command(["--resume", "--output", str(tmp_path / "cut"), "--recipes", "zero2"])
    out, err = broken.communicate()
    assert broken.returncode == 2 and out == "" and err.count("\n") == 1 and "damaged" in err, err


def kill_behind(checkpoint: Path, process: subprocess.Popen[str]) -> None:
    """kill -9 as soon as the checkpoint is there; the process must not have ended by itself."""
    end = time.monotonic() + 240
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()


def test_the_table_the_curves_and_the_picture(corpus, tmp_path, capsys):
    """And the bytes in them: exact where a formula is known."""
    size = SIZES["tiny"]
    arguments = ["--size", "tiny", "--tokenizer", "bpe", "--vocab", "300", "--steps", "3", "--every", "2"]
    arguments += ["--recipes", "baseline,fused,int8-8bit", "--corpus", str(corpus), "--output", str(tmp_path / "run")]
    assert (
        main([*arguments, "--device", "cpu", "--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")]) == 0
    )
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120 and "int8-8bit" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "tokenizer.json").exists()
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in rows] == [
        (name, step) for name in ("baseline", "fused", "int8-8bit") for step in ("2", "3")
    ]
    last = {row["run"]: {key: int(row[key]) for key in row if key.endswith("_bytes")} for row in rows}
    parameters = last["fused"]["parameter_bytes"]
    assert (
        last["fused"]["gradient_bytes"] == parameters
        and 2 * parameters < last["fused"]["state_bytes"] < 2.01 * parameters
    )
    assert last["int8-8bit"]["state_bytes"] < 0.7 * parameters  # vectors and small matrices keep float32
    layer = LayerShape(size.hidden_size, size.heads, size.kv_heads, size.intermediate_size, itemsize=4)
    tokens = size.batch * size.context
    layers = size.layers * tokens * saved_bytes_per_token(layer, "inputs+preact")
    # Beside the layers: ids and targets, the last norm's input and rstd, and what the loss keeps.
    assert layers < last["fused"]["saved_bytes"] < layers + tokens * (3 * size.hidden_size * 4 + 64) + 2 * parameters
    for row in last.values():
        assert row["peak_bytes"] > row["parameter_bytes"] + row["state_bytes"] + row["saved_bytes"]
    assert last["int8-8bit"]["peak_bytes"] < last["fused"]["peak_bytes"] < last["baseline"]["peak_bytes"]


def test_recipes_start_from_the_same_weights_and_may_be_added_later(corpus, config, tmp_path, capsys):
    output = tmp_path / "run"
    given = options(corpus, config, output, "--steps", "2", "--json")
    assert main([*given, "--recipes", "baseline"]) == 0
    alone = json.loads(capsys.readouterr().out)["recipes"]["baseline"]
    assert main(["--resume", "--output", str(output), "--recipes", "baseline,fused,int8-8bit", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)["recipes"]
    assert both["baseline"] == alone
    first = both["baseline"]["losses"][0]
    assert both["fused"]["losses"][0] == pytest.approx(first, rel=1e-6)
    assert both["int8-8bit"]["losses"][0] == pytest.approx(first, rel=1e-3)


def test_batches_are_a_function_of_seed_and_step():
    tokens = torch.arange(4000, dtype=torch.int32)
    first, other = Batches(tokens, 4, 8, 0, 2), Batches(tokens, 4, 8, 1, 2)
    assert torch.equal(first(7), Batches(tokens, 4, 8, 0, 2)(7))
    assert not torch.equal(first(7), first(8)) and not torch.equal(first(7), other(7))
    halves = [Batches(tokens, 4, 8, 0, 2, rank, 2)(7) for rank in range(2)]
    assert torch.equal(torch.cat(halves), first(7))
    train, held_out = torch.cat([first(step) for step in range(200)]), torch.cat(first.held_out)
    assert train.max() < 3800 <= held_out.min(), "the held-out tokens are never trained on"
    assert torch.equal(windows(tokens, 2, 8, 1, 5)[0, :, 1:] - 1, windows(tokens, 2, 8, 1, 5)[0, :, :-1])


def test_a_bpe_gives_the_text_back_and_is_kept(tmp_path):
    from tokenizers import Tokenizer

    ids, count = encode(TEXT, "bpe", 280, tmp_path)
    assert ids.dtype == torch.int32 and ids.max() < count <= 280 and len(ids) < 0.7 * len(TEXT.encode())
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(ids.tolist()) == TEXT
    again, _ = encode(TEXT, "bpe", 999, tmp_path)
    assert torch.equal(again, ids), "the tokenizer that is there is used"
    raw, count = encode(TEXT, "bytes", 0, tmp_path)
    assert count == 256 and bytes(raw.tolist()).decode() == TEXT


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command that ends with 2."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("pykernels train: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--recipes", "baseline,fp4"], ["'fp4'", "choose from baseline, fused,"]),
        (["--recipes", "zero2", "--nproc", "3"], ["--nproc", "3", "--batch 4"]),
        (
            ["--recipes", "zero2", "--nproc", "16", "--batch", "16", "--config", "odd.json"],
            ["--nproc", "hidden_size 24"],
        ),
        (["--corpus", "nowhere"], ["nowhere", "no such file"]),
        (["--corpus", "empty.txt"], ["empty.txt", "is empty"]),
        (["--corpus", "folder"], ["folder", "holds no text"]),
        (["--corpus", "latin.txt"], ["latin.txt", "not UTF-8", "byte 12"]),
        (["--corpus", "mixed"], ["latin.txt", "not UTF-8", "byte 12"]),
        (["--corpus", "short.txt"], ["tokens", "--context 16"]),
        (["--config", "lacking.json"], ["lacking.json", "lacks 'hidden_size'"]),
        (["--config", "broken.json"], ["broken.json", "not JSON"]),
        (["--config", "gpt2.json"], ["model_type", "'gpt2'"]),
        (["--tokenizer", "bpe", "--vocab", "999"], ["vocab_size is 256", "999"]),
        (["--tokenizer", "bpe", "--vocab", "20"], ["--vocab", "20"]),
        (["--context", "9000"], ["--context", "8192"]),
        (["--output", "empty.txt/run"], ["empty.txt/run", "cannot write"]),
        (["--resume", "--output", "fresh"], ["fresh", "holds no run"]),
    ],
)
def test_bad_input_is_one_sentence(change, words, corpus, config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "mixed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Too short.")
    for path in ("latin.txt", "mixed/latin.txt"):
        (tmp_path / path).write_bytes("Twelve bytesé".encode("latin-1"))
    (tmp_path / "mixed" / "a.txt").write_text(TEXT)
    (tmp_path / "lacking.json").write_text(json.dumps({k: v for k, v in MODEL.items() if k != "hidden_size"}))
    (tmp_path / "odd.json").write_text(json.dumps({**MODEL, "hidden_size": 24}))
    (tmp_path / "gpt2.json").write_text(json.dumps({**MODEL, "model_type": "gpt2"}))
    (tmp_path / "broken.json").write_text("{")
    given = options(corpus, config, tmp_path / "run", "--recipes", "fused", "--steps", "2", *change)
    said = refused(given, capsys)
    assert all(word in said for word in words), said


def test_a_run_of_another_model_is_refused_and_left_as_it_was(corpus, config, tmp_path, capsys):
    output = tmp_path / "run"
    given = options(corpus, config, output, "--recipes", "fused", "--steps", "2")
    assert main(given) == 0
    capsys.readouterr()
    assert "--resume" in refused(given, capsys), "a run that is there is not written over"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**MODEL, "hidden_size": 64}))
    said = refused(["--resume", "--output", str(output), "--config", str(other)], capsys)
    assert "hidden_size 32, not 64" in said
    said = refused(["--resume", "--output", str(output), "--batch", "8"], capsys)
    assert "--batch 4, not 8" in said
    # A checkpoint that someone copied here.
    elsewhere = tmp_path / "elsewhere"
    assert main(options(corpus, other, elsewhere, "--recipes", "fused", "--steps", "2")) == 0
    (output / "fused").rename(tmp_path / "old")
    (elsewhere / "fused").rename(output / "fused")
    capsys.readouterr()
    said = refused(["--resume", "--output", str(output), "--recipes", "fused"], capsys)
    assert "does not fit" in said and "has shape" in said
    # A damaged one.
    file = next((output / "fused" / "checkpoint").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in refused(["--resume", "--output", str(output), "--recipes", "fused"], capsys)
    assert main([*given, "--overwrite"]) == 0
