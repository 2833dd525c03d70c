"""optimizer_update_: one step of an optimizer for many tensors at once, and optimizer_norms, which changes nothing.

    algorithm  beta1     beta2      eps  states (slot order)
    adam       beta1     beta2      eps  exp_avg, exp_avg_sq[, max_exp_avg_sq with AMSGRAD]; AdamW with DECOUPLED
    lamb       beta1     beta2      eps  as adam; weight_decay is part of the direction
    lion       beta1     beta2      -    exp_avg
    sgd        momentum  dampening  -    momentum_buffer with MOMENTUM
    adagrad    lr_decay  -          eps  sum
    rmsprop    momentum  alpha      eps  square_avg[, momentum_buffer with MOMENTUM][, grad_avg with CENTERED]

With n tensors `states` holds n tensors for each slot, slot after slot. A state has the parameter's shape and is float32
(float64 with float64 parameters), bfloat16, or codes: int8 for moments of either sign, uint8 for second moments. Codes
have float32 `scales` [dimension 0, ceil(rest / block_size)] in the same order (none otherwise).
`extras` has one tensor for each parameter under KAHAN (the parameter's dtype, what rounding took away) and SPLIT_MASTER
(int16, the lower half of the float32 master), else none. `steps`: float32 scalars, one for each parameter, not shared;
they are increased first. `lr`, grad_scale and found_inf are scalar tensors, so that nothing is read back from a GPU.
The gradient is divided by grad_scale; where found_inf is not 0 nothing changes at all.
`place`: (stream, start, row_stride) for each tensor, or empty for stream i, start 0, whole tensors: which randomness
the tensor has, and where a shard lies in the tensor it is part of (index = start + row * row_stride + column).
`ratio` [n] float32 multiplies the learning rate of the direction (LAMB's trust ratio), not of decoupled decay.
All parameters of a call share dtype and device, as do all gradients and all states of a slot. With parameters on a GPU
`states`, `scales` and `extras` may lie in pinned host memory, which the kernels of a GPU read and write in place.
"""

import torch
from torch import Tensor

from .. import _library
from . import _optimizer_codes as codes
from . import _optimizer_reference as rules
from ._checks import FLOATS, check, check_dtype, names
from ._optimizer_reference import ADAM, ALGORITHMS, DECOUPLED, LION, ROUNDINGS, Rule

NAME = "optimizer_update_"
SCHEMA = (
    f"{NAME}(int algorithm, int flags, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] scales,"
    " Tensor(d!)[] extras, Tensor(e!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay,"
    " int rounding, int seed, int[] place, int block_size, Tensor? ratio, Tensor? grad_scale, Tensor? found_inf) -> ()"
)
NORMS = "optimizer_norms"
NORMS_SCHEMA = (
    f"{NORMS}(int algorithm, int flags, Tensor[] params, Tensor[] grads, Tensor[] states, Tensor[] scales,"
    " Tensor[] extras, Tensor[] steps, float beta1, float beta2, float eps, float weight_decay, int rounding,"
    " int block_size, Tensor? grad_scale) -> Tensor"
)
STATE_DTYPES = (torch.float32, torch.bfloat16)


def check_lists(
    op: str,
    algorithm: int,
    flags: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    scales: list[Tensor],
    extras: list[Tensor],
    steps: list[Tensor],
    rounding: int,
    block_size: int,
) -> None:
    """Lengths, dtypes, shapes and layout of every list."""
    n = len(params)
    check(algorithm in ALGORITHMS.values(), op, f"expected algorithm to be from 0 to 5, got {algorithm}")
    check(rounding in ROUNDINGS.values(), op, f"expected rounding to be from 0 to 3, got {rounding}")
    check(block_size > 0, op, f"expected block_size to be positive, got {block_size}")
    signs = rules.slots(algorithm, flags)
    for name, tensors, count in (("grads", grads, n), ("states", states, n * len(signs)), ("steps", steps, n)):
        check(len(tensors) == count, op, f"expected {name} to have {count} tensors, got {len(tensors)}")
    check(len(scales) in (0, len(states)), op, f"expected scales to have 0 or {len(states)} tensors, got {len(scales)}")
    wants_extra = rounding in (rules.KAHAN, rules.SPLIT_MASTER)
    check(
        len(extras) == (n if wants_extra else 0),
        op,
        f"expected extras to have {n if wants_extra else 0} tensors, got {len(extras)}",
    )
    for i, p in enumerate(params):
        check_dtype(op, f"params[{i}]", p, *FLOATS, torch.float64)
        for name, tensor in ((f"params[{i}]", p), (f"grads[{i}]", grads[i])):
            check(tensor.is_contiguous(), op, f"expected {name} to be contiguous, got strides {list(tensor.stride())}")
        check(
            p.dtype == params[0].dtype, op, f"expected params[{i}] to be {params[0].dtype} as params[0], got {p.dtype}"
        )
        check_dtype(op, f"grads[{i}]", grads[i], *FLOATS, torch.float64)
        check(grads[i].dtype == grads[0].dtype, op, f"expected grads[{i}] to have the dtype of grads[0]")
        _check_same(op, f"grads[{i}]", grads[i], i, p)
        check_dtype(op, f"steps[{i}]", steps[i], torch.float32)
        check(steps[i].numel() == 1, op, f"expected steps[{i}] to have 1 element, got {steps[i].numel()}")
        if extras:
            check_dtype(op, f"extras[{i}]", extras[i], torch.int16 if rounding == rules.SPLIT_MASTER else p.dtype)
            _check_same(op, f"extras[{i}]", extras[i], i, p, pinned=True)
            check(
                rounding != rules.SPLIT_MASTER or p.dtype == torch.bfloat16,
                op,
                f"expected params[{i}] to be bfloat16 for split_master, got {p.dtype}",
            )
    for j, state in enumerate(states):
        i, sign = j % n, signs[j // n]
        _check_same(op, f"states[{j}]", state, i, params[i], pinned=True)
        code = torch.int8 if sign == "s" else torch.uint8
        plain = (torch.float64,) if params[i].dtype == torch.float64 else STATE_DTYPES
        accepted = (code,) if scales else plain
        check(state.dtype in accepted, op, f"expected states[{j}] to be {names(accepted)}, got {state.dtype}")
        check(state.dtype == states[j - i].dtype, op, f"expected states[{j}] to have the dtype of states[{j - i}]")
        if scales:
            check(params[i].dim() >= 2, op, f"expected params[{i}] with 8-bit state to have at least 2 dimensions")
            shape = codes.scale_shape(params[i].shape, block_size)
            check_dtype(op, f"scales[{j}]", scales[j], torch.float32)
            check(
                list(scales[j].shape) == shape and scales[j].is_contiguous(),
                op,
                f"expected scales[{j}] to be contiguous of shape {shape}, got {list(scales[j].shape)}",
            )
            _check_device(op, f"scales[{j}]", scales[j], i, params[i], pinned=True)


def _check_same(op: str, name: str, tensor: Tensor, i: int, p: Tensor, pinned: bool = False) -> None:
    check(
        tensor.shape == p.shape and tensor.is_contiguous(),
        op,
        f"expected {name} to be contiguous of the shape of params[{i}], {list(p.shape)}, got {list(tensor.shape)}",
    )
    _check_device(op, name, tensor, i, p, pinned)


def _check_device(op: str, name: str, tensor: Tensor, i: int, p: Tensor, pinned: bool) -> None:
    """The parameter's device; what is `pinned` may be in pinned host memory beside a parameter on a GPU."""
    here = tensor.device == p.device or (pinned and p.is_cuda and tensor.is_pinned())
    where = f"{p.device}" + (", or in pinned host memory" if pinned and p.is_cuda else "")
    check(here, op, f"expected {name} on the device of params[{i}], {where}, got {tensor.device}")


def fake(
    algorithm: int,
    flags: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    scales: list[Tensor],
    extras: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: int,
    seed: int,
    place: list[int],
    block_size: int,
    ratio: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    lists = (params, grads, states, scales, extras, steps)
    check_lists(NAME, algorithm, flags, *lists, rounding, block_size)
    for name, scalar in (("lr", lr), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if scalar is not None:
            check_dtype(NAME, name, scalar, torch.float32, torch.float64)
            check(scalar.numel() == 1, NAME, f"expected {name} to have 1 element, got {scalar.numel()}")
    n = len(params)
    check(len(place) in (0, 3 * n), NAME, f"expected place to have 0 or {3 * n} integers, got {len(place)}")
    if ratio is not None:
        check_dtype(NAME, "ratio", ratio, torch.float32)
        check(list(ratio.shape) == [n], NAME, f"expected ratio to have shape [{n}], got {list(ratio.shape)}")


def reference(
    algorithm: int,
    flags: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    scales: list[Tensor],
    extras: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: int,
    seed: int,
    place: list[int],
    block_size: int,
    ratio: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    lists = (params, grads, states, scales, extras, steps)
    fake(algorithm, flags, *lists, lr, beta1, beta2, eps, weight_decay, rounding, seed, place, block_size, ratio,
         grad_scale, found_inf)  # fmt: skip
    if found_inf is not None and found_inf.item() != 0.0:
        return
    rule = Rule(algorithm, flags, beta1, beta2, eps, weight_decay)
    decoupled = weight_decay != 0.0 and (algorithm == LION or (algorithm == ADAM and flags & DECOUPLED))
    n, rate = len(params), float(lr)
    for i, p in enumerate(params):
        stream, start, row_stride = place[3 * i : 3 * i + 3] or (
            i,
            0,
            max(1, p.numel() // max(1, p.shape[0])) if p.dim() else 1,
        )
        steps[i].add_(1.0)
        step = int(steps[i].item())
        kept = [(states[j], scales[j] if scales else None) for j in range(i, len(states), n)]
        extra = extras[i] if extras else None
        master = rules.master_of(p, extra, rounding)
        gradient = _gradient(grads[i], master.dtype, grad_scale)
        old = [rules.read_state(*state, block_size) for state in kept]
        u, new = rules.advance(rule, master, gradient, old, step)
        length = rate * rules.factor(rule, step) * (1.0 if ratio is None else float(ratio[i]))
        value = (master * (1.0 - rate * weight_decay) if decoupled else master) - u * length
        index = rules.global_index(p, start, row_stride)
        for state, moment in zip(kept, new, strict=True):
            rules.write_state(*state, moment, index, step, stream, seed, block_size)
        rules.write_back(p, extra, value, rounding, index, step, stream, seed)


def _gradient(g: Tensor, wide: torch.dtype, grad_scale: Tensor | None) -> Tensor:
    g = g.to(wide)
    return g if grad_scale is None else g / grad_scale.to(g.device, wide)


def norms_fake(
    algorithm: int,
    flags: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    scales: list[Tensor],
    extras: list[Tensor],
    steps: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: int,
    block_size: int,
    grad_scale: Tensor | None,
) -> Tensor:
    check_lists(NORMS, algorithm, flags, params, grads, states, scales, extras, steps, rounding, block_size)
    check(len(params) > 0, NORMS, "expected params to have at least 1 tensor, got 0")
    return params[0].new_empty(len(params), 2, dtype=torch.float32)


def norms_reference(
    algorithm: int,
    flags: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    scales: list[Tensor],
    extras: list[Tensor],
    steps: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: int,
    block_size: int,
    grad_scale: Tensor | None,
) -> Tensor:
    """[n, 2] float32: the sums of squares of each parameter and of the direction the next update would take it in."""
    lists = (params, grads, states, scales, extras, steps)
    result = norms_fake(algorithm, flags, *lists, beta1, beta2, eps, weight_decay, rounding, block_size, grad_scale)
    rule = Rule(algorithm, flags, beta1, beta2, eps, weight_decay)
    for i, p in enumerate(params):
        step = int(steps[i].item()) + 1
        old = [
            rules.read_state(states[j], scales[j] if scales else None, block_size)
            for j in range(i, len(states), len(params))
        ]
        master = rules.master_of(p, extras[i] if extras else None, rounding)
        u, _ = rules.advance(rule, master, _gradient(grads[i], master.dtype, grad_scale), old, step)
        u = u.double() * rules.factor(rule, step)
        result[i, 0] = master.double().square().sum()
        result[i, 1] = u.square().sum()
    return result


_library.define(SCHEMA, reference, fake, triton="optimizer_update")
_library.define(NORMS_SCHEMA, norms_reference, norms_fake, triton="optimizer_update")
