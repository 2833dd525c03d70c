"""The others who can do it, each at its best setting. A peer that cannot serve raises Absent with the reason."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TypeVar

import torch
import torch.nn.functional as torch_functional
from torch import nn

from .case import Absent, Context, Entry, Provider

T = TypeVar("T")
OPTIONAL = ("torchao", "bitsandbytes")
ENGINES = ("x86", "fbgemm", "onednn")


def require(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} does not import: {error}") from error


def versions() -> dict[str, str]:
    """The optional peers' versions, or why they are absent."""
    found = {}
    for name in OPTIONAL:
        try:
            found[name] = str(require(name).__version__)
        except Absent as absent:
            found[name] = f"absent ({absent})"
    return found


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compile for the cell's shapes alone: no cell runs code made for another cell's shapes."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def quantize_plain(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of quantize_rowwise in plain PyTorch."""
    absmax = x.abs().amax(-1, keepdim=True).float()
    codes = (x * (127.0 / absmax)).round().clamp(-127, 127).to(torch.int8)
    return codes, absmax / 127.0


def int_mm_linear(x: torch.Tensor, weight_t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """INT8 linear in plain PyTorch around torch._int_mm; weight_t is int8 [K, N]."""
    codes, x_scale = quantize_plain(x)
    return (torch._int_mm(codes, weight_t).float() * x_scale * scale).to(x.dtype)


@contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Selects the engine torch.ao packs weights for."""
    if name not in torch.backends.quantized.supported_engines:
        raise Absent(f"torch.backends.quantized.supported_engines lacks {name}")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def linear(x: torch.Tensor, weights: list[torch.Tensor], context: Context) -> Iterator[Entry]:
    """Peers of int8_linear: x [M, K] float32 or bfloat16, weights: copies of a float [N, K]."""
    copies = len(weights)
    name = str(x.dtype).removeprefix("torch.")

    def plain(dtype: torch.dtype) -> Provider:
        inputs, held = x.to(dtype), [w.to(dtype) for w in weights]
        return Provider(lambda i: torch_functional.linear(inputs, held[i % copies]), str(dtype).removeprefix("torch."))

    def int_mm(wrap: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> Provider:
        if x.is_cuda and x.shape[0] <= 16:
            raise Absent("torch._int_mm on CUDA accepts only more than 16 rows")
        pairs = [quantize_plain(w) for w in weights]
        # On the CPU a contiguous [K, N] is the faster layout by up to 1.7 times; cuBLAS wants the transposed view.
        held = [(q.t() if x.is_cuda else q.t().contiguous(), s[:, 0]) for q, s in pairs]
        function = wrap(int_mm_linear)
        return Provider(lambda i: function(x, *held[i % copies]), name)

    def torchao() -> Provider:
        api = require("torchao.quantization")
        layers = [sequential(w) for w in weights]
        for layer in layers:
            api.quantize_(layer, api.Int8DynamicActivationInt8WeightConfig())
        held = [layer[0].weight for layer in layers]
        function = compiled(lambda inputs, weight: torch_functional.linear(inputs, weight))
        return Provider(lambda i: function(x, held[i % copies]), name)

    yield "torch float32", lambda: plain(torch.float32)
    yield "torch bfloat16", lambda: plain(torch.bfloat16)
    if not x.is_cuda:
        for engine in ENGINES:
            yield f"torch.ao {engine}", partial(dynamic, x, weights, engine)
    yield "torch._int_mm", lambda: int_mm(lambda function: function)
    yield "torch._int_mm compiled", lambda: int_mm(compiled)
    yield "torchao compiled", torchao
    yield "bitsandbytes", lambda: bitsandbytes(x, weights)


def dynamic(x: torch.Tensor, weights: list[torch.Tensor], engine: str) -> Provider:
    """torch.ao's quantize_dynamic: unsigned activations with one scale for the whole tensor."""
    if x.dtype != torch.float32:
        raise Absent(f"quantize_dynamic takes float32 inputs, not {x.dtype}")
    with quantized_engine(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [torch.ao.quantization.quantize_dynamic(sequential(w), {nn.Linear}) for w in weights]
    return Provider(lambda i: layers[i % len(layers)](x), "float32", note="one scale per tensor")


def bitsandbytes(x: torch.Tensor, weights: list[torch.Tensor]) -> Provider:
    """Linear8bitLt without outlier columns: its fastest setting."""
    library = require("bitsandbytes")
    layers = []
    for w in weights:
        layer = library.nn.Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, threshold=0.0)
        layer.weight = library.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
        layers.append(layer.to(x.device))
    for layer in layers:
        layer(x[:1])  # the first call quantises where moving to the device did not
    if layers[0].weight.dtype != torch.int8:
        raise Absent(f"its weight stayed {layers[0].weight.dtype} on {x.device.type}")
    return Provider(lambda i: layers[i % len(layers)](x), str(x.dtype).removeprefix("torch."))


def sequential(weight: torch.Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)
