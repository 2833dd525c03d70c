"""Every Triton kernel, in every configuration it may be launched with, compiled ahead of time without a GPU.

The launchers run on CPU tensors in subprocesses (this file as a script) in which launching a kernel compiles it for
each architecture instead, so what is checked is what a user's call compiles: same constants, same argument
specialisation. A spill, a stack frame or too much shared memory in any of them fails the test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2  # a compile keeps one core busy
# Shared memory a block may have, by architecture (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def _calls():
    """(label, architectures, configuration or None, launch) for every kernel and every configuration in its lists."""
    import torch

    from pykernels.kernels import int8_linear, int8_matmul, int8_weight_only_linear
    from pykernels.kernels.dequantize import dequantize
    from pykernels.kernels.quantize_asymmetric import quantize_asymmetric
    from pykernels.kernels.quantize_blockwise import quantize_blockwise
    from pykernels.kernels.quantize_both import quantize_both
    from pykernels.kernels.quantize_colwise import quantize_colwise
    from pykernels.kernels.quantize_rowwise import quantize_rowwise

    every, hopper = (80, 90, 100), (90,)
    bf16, f32, f16 = torch.bfloat16, torch.float32, torch.float16

    def x(M, K, dtype=bf16):
        return torch.empty(M, K, dtype=dtype)

    def codes(M, K):
        return torch.empty(M, K, dtype=torch.int8)

    def scale(*shape):
        return torch.empty(shape)

    # The longest row in registers, the row in a loop, a short row; stochastic with whole Philox blocks and without.
    yield "rowwise 4096", every, None, lambda: quantize_rowwise(x(64, 4096))
    yield "rowwise loop", hopper, None, lambda: quantize_rowwise(x(8, 20000), scale=scale(1))
    yield "rowwise short", hopper, None, lambda: quantize_rowwise(x(100, 37, f16), scale=scale(100))
    yield "rowwise stochastic 16384", every, None, lambda: quantize_rowwise(x(64, 16384, f32), True, 2**40)
    yield "rowwise stochastic odd", hopper, None, lambda: quantize_rowwise(x(64, 4095), True, 3)
    yield "rowwise stochastic loop", hopper, None, lambda: quantize_rowwise(x(64, 20000), True, 3)
    yield "colwise", every, None, lambda: quantize_colwise(x(512, 1024))
    yield "colwise stochastic odd", hopper, None, lambda: quantize_colwise(x(512, 1023, f32), True)
    yield "both stochastic", every, None, lambda: quantize_both(x(512, 1024), True)
    yield "both odd", hopper, None, lambda: quantize_both(x(511, 1023))
    yield "blockwise 128", every, None, lambda: quantize_blockwise(x(64, 4096), [128])
    yield "blockwise 48", hopper, None, lambda: quantize_blockwise(x(64, 1000, f32), [48])
    yield "asymmetric", every, None, lambda: quantize_asymmetric(x(64, 4096))
    yield "asymmetric 16384", hopper, None, lambda: quantize_asymmetric(x(64, 16384, f32))
    yield "asymmetric loop", hopper, None, lambda: quantize_asymmetric(x(64, 20000))
    yield "dequantize", every, None, lambda: dequantize(codes(64, 4096), scale(64, 1), [4096], None, bf16)
    yield (
        "dequantize zero point",
        hopper,
        None,
        lambda: dequantize(codes(512, 512), scale(4, 4), [128, 128], torch.empty(4, 4, dtype=torch.int32)),
    )

    b, s = codes(4096, 4096), scale(4096)

    def matmul(M, K, **epilogue):
        return int8_matmul.int8_matmul(codes(M, K), codes(4096, K), scale(M), s, s.to(bf16), out_dtype=bf16, **epilogue)

    for M, configs in int8_matmul.CONFIGS.items():
        for config in configs:  # each with the fullest epilogue
            yield (
                f"matmul M <= {M}",
                every,
                config,
                lambda M=M: matmul(
                    M,
                    4096,
                    residual=x(M, 4096),
                    activation=2,
                    a_zero_point=torch.empty(M, dtype=torch.int32),
                    b_sum=torch.empty(4096, dtype=torch.int32),
                ),
            )
    (_, large), (_, wide) = int8_matmul.LARGE
    yield "matmul large", every, large, lambda: matmul(8192, 4096, residual=x(8192, 4096), activation=2)
    yield "matmul wide", every, wide, lambda: matmul(8192, 4096, activation=1)
    yield "matmul wide, last K masked", hopper, wide, lambda: matmul(8192, 4112)
    yield "matmul unaligned", every, int8_matmul.UNALIGNED, lambda: matmul(64, 1001, residual=x(64, 4096), activation=2)
    for config in int8_linear.ROW_CONFIGS:
        yield "linear row", every, config, lambda: int8_linear.int8_linear(x(1, 4096), b, s, s, activation=4)
    yield (
        "linear row odd",
        hopper,
        int8_linear.ROW_CONFIGS[0],
        lambda: int8_linear.int8_linear(x(1, 1001, f32), codes(999, 1001), scale(999), x_scale=scale(1)),
    )

    weight_only = int8_weight_only_linear.int8_weight_only_linear
    for config in int8_weight_only_linear.ROW_CONFIGS:
        yield "weight only row", every, config, lambda: weight_only(x(1, 4096), b, s)
    yield (
        "weight only row groups",
        hopper,
        int8_weight_only_linear.ROW_CONFIGS[0],
        lambda: weight_only(x(1, 4096, f32), b, scale(4096, 32)),
    )
    for M, configs in int8_weight_only_linear.CONFIGS.items():
        for config in configs:
            yield (
                f"weight only groups M <= {M}",
                every,
                config,
                lambda M=M: weight_only(x(M, 4096), b, scale(4096, 32), s, 2),
            )
        yield f"weight only M <= {M}", hopper, configs[0], lambda M=M: weight_only(x(M, 4096, f16), b, s)
    for config in int8_weight_only_linear.FLOAT32_CONFIGS:
        yield "weight only float32", every, config, lambda: weight_only(x(64, 4096, f32), b, scale(4096, 32), s, 2)
    yield (
        "weight only unaligned",
        every,
        int8_weight_only_linear.UNALIGNED,
        lambda: weight_only(x(16, 1000, f32), codes(99, 1000), scale(99, 40), scale(99), 2),
    )
    from tests import triton_aot_calls

    yield from triton_aot_calls.collect()


def _resources(cubin: bytes, tools: Path) -> dict[str, int | list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout + dump.stderr))
    tensor_cores = re.findall(r"\b(?:IGMMA|HGMMA|IMMA|HMMA|UTCIMMA|UTCHMMA)\b", dump.stdout)
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "local": int(found["LOCAL"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", dump.stdout)),
        "tensor_cores": sorted(set(tensor_cores)),
    }


def _worker() -> None:
    from contextlib import nullcontext

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from pykernels.kernels import _tuning

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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
            report = {
                "call": label,
                "kernel": self.fn.__name__,
                "arch": arch,
                "constants": {k: v for k, v in kwargs.items() if not k.startswith("enable")},
                "shared": kernel.metadata.shared,
                "fused": len(re.findall(r"\bfma\.", kernel.asm["ptx"])),
                "fusion": options.enable_fp_fusion,
            }
            reports.append((report, disassemblers.submit(_resources, kernel.asm["cubin"], tools)))

    JITFunction.run = compile_instead
    for number, call in enumerate(_calls()):
        if number % WORKERS != int(sys.argv[1]):
            continue
        label, architectures, config, launch = call
        with _tuning.force_config(config) if config else nullcontext():
            launch()
    print(json.dumps([{**report, **resources.result()} for report, resources in reports], default=str))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("triton.backends.nvidia")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(number)],
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
    found = [report for output, _ in results for report in json.loads(output)]
    path = os.environ.get("PYKERNELS_AOT_REPORT") or tmp_path_factory.mktemp("aot") / "triton_aot.json"
    Path(path).write_text(json.dumps(found, indent=1))
    return found


def test_nothing_spills(reports: list[dict]) -> None:
    bad = [r for r in reports if r["stack"] or r["local"] or r["spills"]]
    assert reports and not bad, bad


def test_shared_memory_fits(reports: list[dict]) -> None:
    bad = [r for r in reports if r["shared"] > SHARED_LIMIT[r["arch"]]]
    assert not bad, bad


def test_products_use_tensor_cores(reports: list[dict]) -> None:
    """IGMMA on Hopper wherever a tile has the 64 rows it needs, the warp-wide instruction below that."""
    products = [r for r in reports if r["kernel"] == "_int8_matmul"]
    assert {r["arch"] for r in products} == {80, 90, 100}
    for r in products:
        wide = r["arch"] == 90 and r["constants"]["BLOCK_M"] >= 64
        assert ("IGMMA" if wide else "IMMA") in r["tensor_cores"], r
    halves = [r for r in reports if r["kernel"] == "_weight_only" and "unaligned" not in r["call"] and r["arch"] != 100]
    assert halves
    for r in halves:
        assert ("HGMMA" if r["arch"] == 90 else "HMMA") in r["tensor_cores"], r


def test_rounding_kernels_are_not_contracted(reports: list[dict]) -> None:
    """x * inverse + u must round twice: no fused multiply-add in the PTX of a quantiser, and ptxas told to add none."""
    quantisers = [r for r in reports if r["kernel"].startswith("_quantize")]
    assert quantisers
    assert all(not r["fused"] and not r["fusion"] for r in quantisers), quantisers


if __name__ == "__main__":
    _worker()
