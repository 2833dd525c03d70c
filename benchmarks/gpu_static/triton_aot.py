"""Every Triton kernel, in every configuration it may be launched with, compiled ahead of time without a GPU.

The launchers of tests/triton_aot_calls run on CPU tensors in subprocesses (this file as a script) in which launching a
kernel compiles it for each architecture instead, so what is examined is what a user's call compiles: same constants,
same argument specialisation.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2  # a compile keeps one core busy


def reports() -> list[dict]:
    """What each compiled kernel uses, in the order of the calls."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_static.triton_aot", str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for number in range(WORKERS)
    ]
    try:
        with ThreadPoolExecutor(WORKERS) as pool:  # a pipe that nobody reads would fill and stop its writer
            results = list(pool.map(subprocess.Popen.communicate, workers))
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), "".join(errors for _, errors in results)
    return [report for output, _ in results for report in json.loads(output)]


def _resources(cubin: bytes, tools: Path, seen: Path) -> dict[str, int | list[str]]:
    """What the SASS uses, kept in `seen` by the binary's hash: a disassembly costs more than most compiles."""
    known = seen / f"{hashlib.sha256(cubin).hexdigest()}.json"
    if known.is_file():
        return json.loads(known.read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout + dump.stderr))
    tensor_cores = re.findall(r"\b(?:IGMMA|HGMMA|IMMA|HMMA|UTCIMMA|UTCHMMA)\b", dump.stdout)
    resources = {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "local": int(found["LOCAL"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", dump.stdout)),
        "tensor_cores": sorted(set(tensor_cores)),
        "tma_loads": len(re.findall(r"\bUTMALDG\b", dump.stdout)),
        "unordered_loads": _unordered_loads(dump.stdout),
    }
    with tempfile.NamedTemporaryFile("w", dir=seen, delete=False) as file:
        file.write(json.dumps(resources))
    os.replace(file.name, known)
    return resources


def _unordered_loads(sass: str) -> int:
    """TMA loads that follow a wait for a warpgroup's products with no barrier between, in the order of the code.

    The wait is for the products of the warpgroup that waits. Where there are more, another may still read what the load
    overwrites (https://github.com/triton-lang/triton/pull/11056).
    """
    steps = re.findall(r"WARPGROUP\.DEPBAR|BAR\.SYNC|UTMALDG", sass)
    waited, found = False, 0
    for step in steps:
        if step == "UTMALDG":
            found += waited
        else:
            waited = step == "WARPGROUP.DEPBAR"
    return found


def _worker() -> None:
    from contextlib import nullcontext

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from benchmarks.gpu_static import traffic
    from pykernels.kernels import _tuning

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # Beside Triton's own cache; what is read out of a disassembly changes with this file.
    edition = hashlib.sha256(triton.__version__.encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    cache = Path(triton.knobs.cache.dir) / f"pykernels-sass-{edition}"
    cache.mkdir(parents=True, exist_ok=True)
    disassemblers = ThreadPoolExecutor(2)  # beside the next compile
    reports, seen = [], set()
    label, architectures = "", ()

    def compile_instead(self, *args, grid, warmup, **kwargs):
        for arch in architectures:
            target = GPUTarget("cuda", arch, 32)
            backend = make_backend(target)
            binder = create_function_from_signature(self.signature, self.params, backend)
            options = {"debug": False, **kwargs}
            bound, specialization, _ = binder(*args, **options)
            options, signature, constexprs, attributes = self._pack_args(backend, options, bound, specialization, None)
            source = ASTSource(self, signature, constexprs, attributes)
            key = (source.hash(), arch, str(options))
            if key in seen:
                continue
            seen.add(key)
            kernel = triton.compile(source, target=target, options=options.__dict__)
            tensors = {
                param.name: [argument.numel(), argument.element_size()]
                for param, argument in zip(self.params, args, strict=False)
                if hasattr(argument, "element_size")
            }
            report = {
                "call": label,
                "kernel": self.fn.__name__,
                "arch": arch,
                "constants": {k: v for k, v in kwargs.items() if not k.startswith("enable")},
                "tensors": tensors,
                "shared": kernel.metadata.shared,
                "threads": 32 * kernel.metadata.num_warps,
                "traffic": traffic.of_launch(self.fn.__name__, tensors, prod(grid), kernel.asm["ttir"]),
                "fused": len(re.findall(r"\bfma\.", kernel.asm["ptx"])),
                "fusion": options.enable_fp_fusion,
            }
            reports.append((report, disassemblers.submit(_resources, kernel.asm["cubin"], tools, cache)))

    JITFunction.run = compile_instead
    from tests import triton_aot_calls

    for number, call in enumerate(triton_aot_calls.collect()):
        if number % WORKERS != int(sys.argv[1]):
            continue
        label, architectures, config, launch = call
        with _tuning.force_config(config) if config else nullcontext():
            launch()
    print(json.dumps([{**report, **resources.result()} for report, resources in reports], default=str))


if __name__ == "__main__":
    _worker()
