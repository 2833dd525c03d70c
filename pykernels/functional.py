"""The functions people call: each binds its operator in pykernels/ops, under the field's names and arguments.

Quantised tensors are plain pairs (int8 codes, float32 scale). Everything accepts float32, bfloat16 and float16, any
number of rows (none too) and any row stride; nothing is done in place.
"""

import torch

from .ops._autocast import autocast
from .ops._enums import activation_code
from .ops.attention import attention as attention
from .ops.cross_entropy import cross_entropy as cross_entropy
from .ops.distillation import distillation_loss as distillation_loss
from .ops.dropout import dropout as dropout
from .ops.dropout import dropout_key as dropout_key
from .ops.gated_activation import geglu as geglu
from .ops.gated_activation import reglu as reglu
from .ops.gated_activation import relu2 as relu2
from .ops.gated_activation import swiglu as swiglu
from .ops.glu_linear import glu_linear as glu_linear
from .ops.int8_block_scaled_linear import int8_block_scaled_linear as int8_block_scaled_linear
from .ops.int8_block_scaled_matmul import int8_block_scaled_matmul as int8_block_scaled_matmul
from .ops.int8_grouped_linear import int8_grouped_linear as int8_grouped_linear
from .ops.int8_grouped_matmul import int8_grouped_matmul as int8_grouped_matmul
from .ops.int8_linear_outliers import MODES
from .ops.int8_training import Int8TrainingConfig as Int8TrainingConfig
from .ops.int8_training import int8_training_linear as int8_training_linear
from .ops.layer_norm import layer_norm as layer_norm
from .ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .ops.linear_kl_div import linear_jsd as linear_jsd
from .ops.linear_kl_div import linear_kl_div as linear_kl_div
from .ops.norm_attention import norm_attention as norm_attention
from .ops.norm_linear import norm_linear as norm_linear
from .ops.norm_mlp import norm_mlp as norm_mlp
from .ops.rms_norm import rms_norm as rms_norm
from .ops.rope import rope as rope
from .ops.rope import rope_tables as rope_tables

__all__ = [
    "Int8TrainingConfig",
    "attention",
    "cross_entropy",
    "dequantize_asymmetric",
    "dequantize_blockwise",
    "dequantize_colwise",
    "dequantize_rowwise",
    "distillation_loss",
    "dropout",
    "dropout_key",
    "geglu",
    "glu_linear",
    "int8_block_scaled_linear",
    "int8_block_scaled_matmul",
    "int8_grouped_linear",
    "int8_grouped_matmul",
    "int8_linear",
    "int8_linear_outliers",
    "int8_matmul",
    "int8_training_linear",
    "int8_weight_only_linear",
    "layer_norm",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl_div",
    "norm_attention",
    "norm_linear",
    "norm_mlp",
    "quantize_asymmetric",
    "quantize_blockwise",
    "quantize_both",
    "quantize_colwise",
    "quantize_rowwise",
    "quantize_transposed",
    "reglu",
    "relu2",
    "rms_norm",
    "rope",
    "rope_tables",
    "swiglu",
]

_ops = torch.ops.pykernels
QWeight = tuple[torch.Tensor, torch.Tensor]


def quantize_rowwise(
    x: torch.Tensor, *, stochastic: bool = False, seed: int = 0, scale: torch.Tensor | None = None
) -> QWeight:
    """Symmetric int8 with one scale for each row: scale = absmax / 127, codes = round(x / scale).

    x: [..., K] float -> (int8 [..., K], float32 scale [...]). A row of zeros has scale 0; a row that holds NaN or
    infinity has scale NaN and codes 0, so that it stays visible after dequantisation.
    stochastic: rounds up with the probability of the fraction (unbiased); a function of seed and element index alone.
    scale: a static scale, one element or one for each row; larger values saturate at 127.
    Saves nothing for backward (not differentiable). Errors: RuntimeError names a wrong dtype, shape or device.
    """
    return _ops.quantize_rowwise.default(x, stochastic, seed, scale)


def quantize_colwise(x: torch.Tensor, *, stochastic: bool = False, seed: int = 0) -> QWeight:
    """As quantize_rowwise with one scale for each column: [M, K] float -> (int8 [M, K], float32 [K])."""
    return _ops.quantize_colwise.default(x, stochastic, seed)


def quantize_both(
    x: torch.Tensor, *, stochastic: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both orders in one pass: [M, K] -> (int8 [M, K], scale [M], column-quantised int8 TRANSPOSED [K, M], scale [K]).

    INT8 training needs both: each of its three products wants both operands contiguous along the summed dimension.
    """
    return _ops.quantize_both.default(x, stochastic, seed)


def quantize_transposed(x: torch.Tensor, *, stochastic: bool = False, seed: int = 0) -> QWeight:
    """The second half of quantize_both alone: [M, K] float -> (int8 TRANSPOSED [K, M], float32 [K]), the same bits."""
    return _ops.quantize_transposed.default(x, stochastic, seed)


def quantize_blockwise(x: torch.Tensor, block_size: int | tuple[int, int]) -> QWeight:
    """One scale for each block: an int blocks the last dimension, a pair tiles a matrix; last blocks may be ragged.

    [..., K], b -> (int8 [..., K], float32 [..., ceil(K / b)]); [M, K], (bm, bk) -> scale [ceil(M / bm), ceil(K / bk)].
    """
    return _ops.quantize_blockwise.default(x, _blocks(block_size))


def quantize_asymmetric(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 with a zero point for each row: [..., K] -> (int8, float32 scale [...], int32 zero_point [...]).

    x ~ (codes - zero_point) * scale; zero is represented exactly. For activations that lie on one side of zero.
    """
    return _ops.quantize_asymmetric.default(x)


def dequantize_rowwise(q: torch.Tensor, scale: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """codes [..., K] * scale [...] -> [..., K] in out_dtype."""
    return _ops.dequantize.default(q, _per_row(q, scale), [max(q.shape[-1], 1)], None, out_dtype)


def dequantize_colwise(q: torch.Tensor, scale: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """codes [M, K] * scale [K] -> [M, K] in out_dtype."""
    grid = scale.unsqueeze(0) if q.shape[0] else scale.unsqueeze(0)[:0]
    return _ops.dequantize.default(q, grid, [max(q.shape[0], 1), 1], None, out_dtype)


def dequantize_blockwise(
    q: torch.Tensor, scale: torch.Tensor, block_size: int | tuple[int, int], out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The inverse of quantize_blockwise with the same block_size."""
    return _ops.dequantize.default(q, scale, _blocks(block_size), None, out_dtype)


def dequantize_asymmetric(
    q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(codes [..., K] - zero_point [...]) * scale [...] -> [..., K] in out_dtype."""
    block = [max(q.shape[-1], 1)]
    return _ops.dequantize.default(q, _per_row(q, scale), block, _per_row(q, zero_point), out_dtype)


def int8_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    a_zero_point: torch.Tensor | None = None,
    b_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """act((a @ b.T - a_zero_point * b_sum) * a_scale * b_scale + bias) + residual, in one kernel.

    a int8 [M, K], b int8 [N, K] -> [M, N] in out_dtype: float32 (default), bfloat16, float16, or int32 for the bare
    accumulator. a_scale: one element or [M]; b_scale: one element or [N]; bias [N]; residual [M, N]; a_zero_point:
    int32, one element or [M]; b_sum: int32 [N], b.sum(1) computed ahead. activation: None, "relu", "gelu",
    "gelu_tanh" or "silu".
    Accumulation is exact (int32, K at most 131,071); the result is within one rounding of out_dtype.
    Saves nothing for backward (not differentiable). Errors: RuntimeError names the argument, before anything runs.
    """
    code = activation_code("int8_matmul", activation)
    return _ops.int8_matmul.default(a, b, a_scale, b_scale, bias, residual, code, a_zero_point, b_sum, out_dtype)


def int8_linear(
    x: torch.Tensor,
    qweight: QWeight,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """act(x @ W.T + bias) + residual with x quantised row by row on the fly (W8A8), without a float intermediate.

    x [..., K] float; qweight (int8 [N, K], float32 [N]), as quantize_rowwise(W) returns -> [..., N] in out_dtype
    (default: that of x). x_scale: a static scale for x instead of the dynamic one.
    Differentiable in x, bias and residual (the weight is frozen). Saved for backward: nothing beyond the weight, which
    is kept by reference; with an activation x too, by reference. Under autocast x is cast as linear would cast it.
    K is at most 131,071.
    """
    weight, scale = qweight
    code = 0 if activation is None else activation_code("int8_linear", activation)
    x = autocast(x)
    if _wants_no_gradient(x, bias, residual):
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.int8_linear.default(x, weight, scale, bias, residual, code, x_scale, out_dtype)
    return _ops.int8_linear.default(x, weight, scale, bias, residual, code, x_scale, out_dtype)


def int8_weight_only_linear(
    x: torch.Tensor, qweight: QWeight, bias: torch.Tensor | None = None, *, activation: str | None = None
) -> torch.Tensor:
    """act(x @ W.T + bias) with an int8 weight dequantised in registers (W8A16): x is not quantised.

    x [..., K] float; qweight (int8 [N, K], float32 scale [N] or [N, K / group_size]) -> [..., N] in the dtype of x.
    Accumulates in float32. Differentiable in x and bias; saves nothing beyond the weight (with an activation x too).
    """
    weight, scale = qweight
    code = 0 if activation is None else activation_code("int8_weight_only_linear", activation)
    x = autocast(x)
    if _wants_no_gradient(x, bias):
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.int8_weight_only_linear.default(x, weight, scale, bias, code)
    return _ops.int8_weight_only_linear.default(x, weight, scale, bias, code)


def int8_linear_outliers(
    x: torch.Tensor,
    qweight: QWeight,
    weight_fp: torch.Tensor | None = None,
    threshold: float = 6.0,
    *,
    columns: torch.Tensor | None = None,
    mode: str | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T + bias with outliers of x in float and the rest in INT8: LLM.int8() (Dettmers et al., 2022).

    mode "columns" (default when columns are given): the columns [C] int64 found by calibration, with their float
    weights weight_fp [N, C]; "row" (default otherwise): every |x| > threshold, so that a row's result does not depend
    on its neighbours in the batch; "batch": every column in which any row passes the threshold, as bitsandbytes does.
    No mode reads anything back to the host. Differentiable in x and bias; saves nothing beyond the weights.
    """
    mode = mode or ("row" if columns is None else "columns")
    if mode not in MODES:
        raise ValueError(f"int8_linear_outliers: expected mode to be one of {', '.join(MODES)}, got {mode!r}")
    weight, scale = qweight
    return _ops.int8_linear_outliers.default(
        autocast(x), weight, scale, bias, threshold, MODES[mode], columns, weight_fp
    )


def _wants_no_gradient(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> bool:
    """Whether an eager call may step past autograd: its Python entry costs more than a small decoding product."""
    if torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled():
        return True
    rest = (bias is not None and bias.requires_grad) or (residual is not None and residual.requires_grad)
    return not (x.requires_grad or rest)


def _per_row(q: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[...] -> [..., 1], the block grid of one block for each row; without columns there is no block."""
    return values.unsqueeze(-1) if q.shape[-1] else values.unsqueeze(-1)[..., :0]


def _blocks(block_size: int | tuple[int, int]) -> list[int]:
    return [block_size] if isinstance(block_size, int) else list(block_size)
