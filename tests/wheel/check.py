"""Looks into a wheel, then installs it in empty environments beside each torch named, and uses it there.

python tests/wheel/check.py dist/*.whl --torch 2.13.0 --torch 2.11.0

Checked without installing: the tag, the size, what is inside, what the libraries need (torch, never Python, CUDA or a
C library newer than a manylinux tag promises). Then smoke.py runs in each environment. Exit 1 names what is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_BYTES = 30 * 10**6
NAME = re.compile(r"pykernels-[^-]+-(?P<python>cp3\d+)-(?P<abi>cp3\d+)-(?P<platform>[^-]+)\.whl")
MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)")


class Wrong(Exception):
    """What a wheel fails."""


def needed(library: Path) -> list[str]:
    """DT_NEEDED of a library."""
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    if "RPATH" in dynamic or "RUNPATH" in dynamic:
        raise Wrong(f"{library.name} has a search path of the machine that built it")
    return [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]


def newest_glibc(library: Path) -> tuple[int, int]:
    """The newest GLIBC version among the symbols a library needs."""
    symbols = subprocess.run(["readelf", "-V", "-W", library], capture_output=True, text=True, check=True).stdout
    return max((int(a), int(b)) for a, b in re.findall(r"GLIBC_(\d+)\.(\d+)", symbols))


def inspect(wheel: Path) -> dict:
    """Facts about a wheel; raises Wrong at the first that may not be."""
    name = NAME.fullmatch(wheel.name)
    if not name or name["python"] != name["abi"]:
        raise Wrong(f"{wheel.name}: expected pykernels-<version>-cp3X-cp3X-<platform>.whl")
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        raise Wrong(f"{wheel.name} has {size:,} bytes, accepts {MAX_BYTES:,}")
    facts: dict = {"wheel": wheel.name, "bytes": size, "libraries": {}}
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        members = archive.namelist()
        if strange := [
            m for m in members if m.split("/")[0].split("-")[0] != "pykernels" or m.endswith((".pyc", ".o"))
        ]:
            raise Wrong(f"{wheel.name} holds {', '.join(strange[:5])}")
        libraries = [m for m in members if m.endswith(".so")]
        for required in ("pykernels/_C.so", "pykernels/py.typed"):
            if required not in members:
                raise Wrong(f"{wheel.name} lacks {required}")
        for member in libraries:
            path = Path(archive.extract(member, folder))
            needs, glibc = needed(path), newest_glibc(path)
            if bad := [n for n in needs if re.match(r"lib(python|cuda|cudart|torch_python|c10)", n)]:
                raise Wrong(f"{member} needs {', '.join(bad)}")
            if "_host" not in member and "libtorch.so" not in needs:
                raise Wrong(f"{member} does not need libtorch.so: loaded without torch it would fail at the first call")
            promised = [(int(a), int(b)) for a, b in MANYLINUX.findall(name["platform"])]
            if promised and glibc > min(promised):
                raise Wrong(
                    f"{member} needs GLIBC {glibc[0]}.{glibc[1]}, more than the tag {name['platform']} promises"
                )
            facts["libraries"][member] = {"needed": needs, "glibc": f"{glibc[0]}.{glibc[1]}"}
    return facts


def try_beside(torch: str, wheel: Path, index: str | None) -> str:
    """Installs the wheel beside one version of torch in a new environment and runs smoke.py; returns its last line."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        source = ["--index-url", index] if index else []
        subprocess.run([*pip, *source, f"torch=={torch}"], check=True)
        constraints = HERE.parents[1] / "constraints.txt"
        theirs = ("torch=", "triton=", "setuptools=")  # each torch asks for its own
        rest = [line for line in constraints.read_text().splitlines() if not line.startswith(theirs)]
        pins = Path(folder, "pins.txt")
        pins.write_text("\n".join([*rest, f"torch=={torch}"]))  # or pip may take another
        subprocess.run([*pip, "-c", pins, wheel], check=True)
        smoke = [python, "-I", HERE / "smoke.py"]
        ran = subprocess.run(smoke, cwd=folder, env={"PYKERNELS_REQUIRE_NATIVE": "1"}, capture_output=True, text=True)
        if ran.returncode:
            raise Wrong(f"beside torch {torch}:\n{ran.stderr}")
        said = ran.stdout.splitlines()[-1]
        if f"torch {torch}" not in said:
            raise Wrong(f"asked for torch {torch}, but {said}")
        return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", action="append", default=[], metavar="VERSION", help="try it beside this torch")
    parser.add_argument("--torch-index", metavar="URL", help="where torch comes from; default: pip's own index")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    args = parser.parse_args()
    try:
        facts = inspect(args.wheel)
        facts["works"] = []
        for torch in args.torch:
            print(f"installing beside torch {torch} ...", file=sys.stderr, flush=True)
            facts["works"].append(try_beside(torch, args.wheel.resolve(), args.torch_index))
    except Wrong as wrong:
        print(f"wheel check: {wrong}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"{facts['wheel']}: {facts['bytes'] / 1e6:.1f} MB")
    for library, about in facts["libraries"].items():
        print(f"  {library}: GLIBC {about['glibc']}; needs {', '.join(about['needed'])}")
    print("\n".join(f"  {line}" for line in facts["works"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
