"""Every Python block of the README and the docs runs, alone, and the files they link to exist."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 6


# Runs each block alone, as __main__ of a process that has the imports behind it: they take longer than most blocks.
RUNNER = """
import json, os, sys, tempfile, traceback
import torch, pykernels
codes = []
for block in json.load(sys.stdin):
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.chdir(folder)
                os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
                exec(compile(block, "block", "exec"), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        said.seek(0)
        codes.append((status, said.read().decode(errors="replace")))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[int, str]]:
    """The exit status and the output of each block."""
    blocks = [block for (block,) in (parameter.values for parameter in BLOCKS)]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(blocks), capture_output=True, text=True, env=_environment()
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(blocks, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, runs: dict[str, tuple[int, str]]) -> None:
    status, said = runs[block]
    assert status == 0, said


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_module_has_a_reference_page() -> None:
    """And it names everything: mkdocstrings shows what `__all__` lists, and only that."""
    import pykernels

    for name in ("functional", "nn", "quantization", "memory", "optim", "distributed"):
        assert f"::: pykernels.{name}\n" in (ROOT / "docs" / "api" / f"{name}.md").read_text()
        module = getattr(pykernels, name)
        assert sorted(module.__all__) == sorted(set(module.__all__)), name
        for member in module.__all__:
            assert callable(value := getattr(module, member)) is False or value.__doc__, f"{name}.{member}"
    functional = pykernels.functional
    public = {name for name, value in vars(functional).items() if callable(value) and name[0] != "_"}
    internal = {"QWeight", "activation_code", "autocast"}
    assert public - internal == set(functional.__all__)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_gallery_shows_the_committed_results() -> None:
    from pykernels.bench.gallery import render

    page = render(ROOT / "benchmarks" / "results", ROOT / "docs" / "plots")
    assert page == (ROOT / "docs" / "gallery.md").read_text(), "the results have changed: make gallery"
    for path in (ROOT / "benchmarks" / "results").glob("*.csv"):
        assert f"benchmarks/results/{path.name}" in page
    for path in (ROOT / "docs" / "plots").glob("*.png"):
        assert f"](plots/{path.name})" in page, f"{path.name} belongs to no CSV"


def demo_table(model: str, columns: dict[str, tuple[str, str]]) -> str:
    """The Markdown table of one model's rows in benchmarks/results/accuracy-cpu.csv."""
    with (ROOT / "benchmarks" / "results" / "accuracy-cpu.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    lines = [
        "| |" + "|".join(f" {heading} " for heading, _ in columns.values()) + "|",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = [format(float(row[key]) / (1e6 if key == "bytes" else 1), how) for key, (_, how) in columns.items()]
        lines.append(f"| {row['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


LANGUAGE = {
    "bytes": ("MB", ".0f"),
    "prefill_ms": ("prefill 512, ms", ".0f"),
    "decode_ms": ("decode 1, ms", ".1f"),
    "loss": ("loss", ".4f"),
    "loss_rise": ("rise", "+.4f"),
}
ENCODER = {
    "bytes": ("MB", ".0f"),
    "one_ms": ("1 sentence, ms", ".1f"),
    "batch_ms": ("32 sentences, ms", ".0f"),
    "cosine": ("cosine to float32", ".5f"),
    "neighbour_agreement": ("same nearest neighbour", ".1%"),
}


@pytest.mark.parametrize(("model", "columns"), [("SmolLM2-135M", LANGUAGE), ("MiniLM-L6", ENCODER)])
def test_the_readme_shows_the_committed_figures(model: str, columns: dict[str, tuple[str, str]]) -> None:
    table = demo_table(model, columns)
    assert len(table.splitlines()) >= 8
    assert table in (ROOT / "README.md").read_text(), f"paste this into README.md:\n{table}"
