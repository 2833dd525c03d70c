"""How linear_cross_entropy runs: torch's matrix products and the kernels of cross_entropy, a tile at a time."""

import torch
from torch import Tensor

from ._checks import FLOATS, check, check_device, check_dim, check_dtype
from ._chunks import Tiles, accumulate, linear, pieces, product_dtype, rows_a_chunk, wide_dtype
from ._cross_entropy import check_rows, check_target, check_target_range, denominator
from .cross_entropy_tiles import finish, new_state

NAME = "linear_cross_entropy"
BACKWARD = f"{NAME}_backward"
GRADIENTS = f"{NAME}_gradients"
_ops = torch.ops.pykernels
Three = tuple[Tensor, Tensor, Tensor]


def check_arguments(op: str, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """input [N, H], weight [V, H] and bias [V] of one float dtype, target [N]."""
    check_dtype(op, "input", input, *FLOATS, torch.float64)
    check_dim(op, "input", input, 2)
    check_dim(op, "weight", weight, 2)
    check_dtype(op, "weight", weight, input.dtype)
    check_device(op, "weight", weight, "input", input)
    (classes, k), last = weight.shape, input.shape[1]
    check(
        k == last and classes >= 1,
        op,
        f"expected weight to have shape [V, {last}] with V at least 1 and the H of input, got {list(weight.shape)}",
    )
    check_target(op, target, input.shape[:1], "input", input)
    if bias is not None:
        check_dtype(op, "bias", bias, input.dtype)
        check_device(op, "bias", bias, "input", input)
        check(bias.shape == (classes,), op, f"expected bias to have shape [{classes}], got {list(bias.shape)}")


def counted(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that count, when they are not all; None on a GPU, where to ask is to wait."""
    if target.device.type != "cpu":
        return None
    picked = (target != ignore_index).nonzero().squeeze(1)
    return None if picked.shape[0] == target.shape[0] else picked


def spread(values: Tensor, picked: Tensor | None, rows: int) -> Tensor:
    """The values of the picked rows in their places among `rows`, and zeros elsewhere."""
    if picked is None:
        return values
    return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, picked, values)


def forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Three:
    check_arguments(NAME, input, weight, target, bias)
    check_target_range(NAME, target, weight.shape[0], ignore_index)
    picked = counted(target, ignore_index)
    kept = target if picked is None else target[picked]
    state = new_state(kept.shape[0], input, wide_dtype(input))
    tiles = Tiles(input, weight, bias, picked)
    for columns, tile in tiles.weight_tiles():
        for rows in tiles.rows:
            logits = tiles.logits(tiles.input_block(rows), tile, columns)
            _ops.cross_entropy_update_.default(
                state[rows], logits, kept[rows], None, ignore_index, softcap, columns.start
            )
    results = finish(state, kept, None, ignore_index, label_smoothing, z_loss, weight.shape[0])
    loss, lse, correct = (spread(result, picked, target.shape[0]) for result in results)
    return loss, lse, correct


def recompute(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Three:
    """The gradients, from logits made again; each sum over tiles is held in float32 and rounded once."""
    check_arguments(BACKWARD, input, weight, target, bias)
    for name, values in (("grad", grad), ("lse", lse)):
        check_rows(BACKWARD, name, values, target, input)
    picked = counted(target, ignore_index)
    kept, grad, lse = (t if picked is None else t[picked] for t in (target, grad, lse))
    tiles, wide, classes = Tiles(input, weight, bias, picked), wide_dtype(input), weight.shape[0]
    options = (ignore_index, label_smoothing, z_loss, softcap)
    grad_input = input.new_empty((kept.shape[0], input.shape[1]) if needs_input else 0, dtype=wide)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    grad_bias = weight.new_zeros(classes if needs_bias else 0, dtype=wide)
    if not tiles.rows:
        grad_weight.zero_()
    exact = weight.dtype == wide
    for columns, tile in tiles.weight_tiles():
        total = grad_weight[columns] if exact else grad_weight.new_empty(tile.shape if needs_weight else 0, dtype=wide)
        for rows in tiles.rows:
            block = tiles.input_block(rows)
            logits = tiles.logits(block, tile, columns)
            _ops.cross_entropy_backward_.default(
                grad[rows], None, logits, kept[rows], None, lse[rows], *options, columns.start, classes
            )
            if needs_input:
                accumulate(grad_input[rows], logits, tile, first=columns.start == 0)
            if needs_weight:
                accumulate(total, logits.t(), block, first=rows.start == 0)
            if needs_bias:
                grad_bias[columns] += logits.sum(0, dtype=wide)
        if needs_weight and not exact and tiles.rows:
            grad_weight[columns] = total
        del total
    del tiles
    if needs_input:
        grad_input = spread(grad_input.to(input.dtype), picked, input.shape[0])
    return grad_input.to(input.dtype), grad_weight, grad_bias.to(weight.dtype)


def gradients(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    mean: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum or mean of the losses, and its gradients, a chunk of rows at a time against every class."""
    check_arguments(GRADIENTS, input, weight, target, bias)
    check_target_range(GRADIENTS, target, weight.shape[0], ignore_index)
    picked = counted(target, ignore_index)
    kept = target if picked is None else target[picked]
    wide, product, classes = wide_dtype(input), product_dtype(input), weight.shape[0]
    options = (ignore_index, label_smoothing, z_loss, softcap)
    share = input.new_ones((), dtype=wide)
    if mean:
        share = share / denominator(target, None, ignore_index, wide)
    count = kept.shape[0]
    loss, lse = input.new_empty(count, dtype=wide), input.new_empty(count, dtype=wide)
    correct = input.new_empty(count, dtype=torch.bool)
    copies = not weight.dtype == product == wide
    chunks = pieces(count, rows_a_chunk(classes, product, copies))
    grad_input = input.new_empty((count, input.shape[1]) if needs_input else 0)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0, dtype=wide)
    grad_bias = weight.new_zeros(classes if needs_bias else 0, dtype=wide)
    if not chunks:
        grad_weight.zero_()
    matrix, scratch = weight.to(product), input.new_empty((chunks[0].stop if chunks else 0, classes), dtype=product)
    for rows in chunks:
        block = (input[rows] if picked is None else input.index_select(0, picked[rows])).to(product)
        logits = linear(block, matrix, bias, scratch[: block.shape[0]])
        loss[rows], lse[rows], correct[rows] = _ops.cross_entropy.default(logits, kept[rows], None, *options)
        _ops.cross_entropy_backward_.default(
            share.expand(block.shape[0]), None, logits, kept[rows], None, lse[rows], *options, 0, classes
        )
        if needs_input:
            accumulate(grad_input[rows], logits, matrix, first=True)
        if needs_weight:
            accumulate(grad_weight, logits.t(), block, first=rows.start == 0)
        if needs_bias:
            grad_bias += logits.sum(0, dtype=wide)
    del scratch, matrix
    loss, lse, correct, grad_input = (
        result if needs is False else spread(result, picked, target.shape[0])
        for result, needs in ((loss, True), (lse, True), (correct, True), (grad_input, needs_input))
    )
    return loss.sum() * share, lse, correct, grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
