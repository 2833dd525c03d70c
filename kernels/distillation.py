"""distillation_rows: one program reads a row of both logits, a block at a time, for statistics, loss and gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import as_rows, narrow

KL, REVERSE_KL, JSD, MSE = 0, 1, 2, 3
BLOCK = 4096


@triton.jit
def _weighted(weight, value):
    """weight * value, 0 where the weight is, even if the value is infinite or NaN."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _grow(top, total, x, scale):
    """Statistics of a softmax of x * scale, with the block x added: its maximum, and the sum of exp((x - top) * scale).

    While all that was seen is -inf the top stands at -inf and the sum at 0.
    """
    above = tl.maximum(top, tl.max(x, axis=0))
    base = tl.where(above == float("-inf"), 0.0, above)
    part = tl.sum(tl.exp((x - base) * scale), axis=0)
    return above, total * tl.exp((top - base) * scale) + part


@triton.jit
def _against_mixture(d, beta):
    """log(p / m) and log(q / m), m = beta p + (1 - beta) q, from d = log(p / q).

    The one of log(m / p) and log(m / q) near 0 comes from exp(-|d|), which cannot overflow and is 1 where p = q.
    """
    up = d > 0.0
    weight = tl.where(up, 1.0 - beta, beta)
    rest = tl.where(up, beta, 1.0 - beta)
    e = tl.exp(-tl.abs(d))
    near = tl.log(tl.where(e < 0.5, weight * e + rest, weight * (e - 1.0) + 1.0))
    far = near + tl.abs(d)
    return -tl.where(up, near, far), -tl.where(up, far, near)


@triton.jit
def _distillation(
    student_ptr,
    teacher_ptr,
    target_ptr,
    scale_ptr,
    loss_ptr,
    grad_ptr,
    student_stride,
    teacher_stride,
    grad_stride,
    V,
    beta,
    inverse,
    soft_weight,
    hard_weight,
    ignore_index,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """soft_weight is (1 - hard_weight) * temperature, inverse 1 / temperature; grad_ptr may be student_ptr."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    cols = tl.arange(0, BLOCK)
    label = tl.zeros((), tl.int64)
    if target_ptr is not None:
        label = tl.load(target_ptr + row)
        if label == ignore_index:
            if loss_ptr is not None:
                tl.store(loss_ptr + row, 0.0)
            if grad_ptr is not None:
                zero = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
                for k in range(0, V, BLOCK):
                    tl.store(grad_ptr + row * grad_stride + k + cols, zero, mask=k + cols < V)
            return

    minus_inf = float("-inf")
    s_top, t_top, h_top = minus_inf, minus_inf, minus_inf
    s_sum, t_sum, h_sum, at_label = 0.0, 0.0, 0.0, 0.0
    for k in range(0, V, BLOCK):
        mask = k + cols < V
        s = tl.load(student_ptr + k + cols, mask=mask, other=minus_inf).to(tl.float32)
        t = tl.load(teacher_ptr + k + cols, mask=mask, other=minus_inf).to(tl.float32)
        if HARD:
            h_top, h_sum = _grow(h_top, h_sum, s, 1.0)
            # A masked sum, not a load: another warp may be writing the gradient there by the time one is done.
            at_label += tl.sum(tl.where(k + cols == label, s, 0.0), axis=0)
        if DIVERGENCE == 1:
            s = tl.where(t == minus_inf, minus_inf, s)
        s_top, s_sum = _grow(s_top, s_sum, s, inverse)
        t_top, t_sum = _grow(t_top, t_sum, t, inverse)
    s_log, t_log, h_log = tl.log(s_sum), tl.log(t_sum), 0.0
    if HARD:
        h_log = tl.log(h_sum)

    first, second = 0.0, 0.0
    for k in range(0, V, BLOCK):
        mask = k + cols < V
        s = tl.load(student_ptr + k + cols, mask=mask, other=minus_inf).to(tl.float32)
        t = tl.load(teacher_ptr + k + cols, mask=mask, other=minus_inf).to(tl.float32)
        if DIVERGENCE == 1:
            s = tl.where(t == minus_inf, minus_inf, s)
        log_q, log_p = (s - s_top) * inverse - s_log, (t - t_top) * inverse - t_log
        q, p = tl.exp(log_q), tl.exp(log_p)
        if DIVERGENCE == 0:
            first += tl.sum(_weighted(p, log_p - log_q), axis=0)
        elif DIVERGENCE == 1:
            first += tl.sum(_weighted(q, log_q - log_p), axis=0)
        elif DIVERGENCE == 2:
            log_p_m, log_q_m = _against_mixture(log_p - log_q, beta)
            first += tl.sum(_weighted(p, log_p_m), axis=0)
            second += tl.sum(_weighted(q, log_q_m), axis=0)
        else:
            first += tl.sum((q - p) * (q - p), axis=0)
            second += tl.sum(2.0 * q * (q - p), axis=0)
    loss = first
    if DIVERGENCE == 2:
        loss = beta * first + (1.0 - beta) * second
    center = second
    if DIVERGENCE == 1:
        center = first
    if loss_ptr is not None:
        value = soft_weight * loss / inverse
        if HARD:
            known = (label >= 0) & (label < V)
            value += hard_weight * tl.where(known, h_log - (at_label - h_top), float("nan"))
        tl.store(loss_ptr + row, value)

    if grad_ptr is not None:
        scale = tl.load(scale_ptr + row)
        soft, hard = soft_weight * scale, hard_weight * scale
        for k in range(0, V, BLOCK):
            mask = k + cols < V
            s = tl.load(student_ptr + k + cols, mask=mask, other=minus_inf).to(tl.float32)
            t = tl.load(teacher_ptr + k + cols, mask=mask, other=minus_inf).to(tl.float32)
            h = s
            if DIVERGENCE == 1:
                s = tl.where(t == minus_inf, minus_inf, s)
            log_q, log_p = (s - s_top) * inverse - s_log, (t - t_top) * inverse - t_log
            q = tl.exp(log_q)
            if DIVERGENCE == 0:
                g = q - tl.exp(log_p)
            elif DIVERGENCE == 1:
                g = _weighted(q, log_q - log_p - center)
            elif DIVERGENCE == 2:
                _, log_q_m = _against_mixture(log_p - log_q, beta)
                g = (1.0 - beta) * _weighted(q, log_q_m - center)
            else:
                g = q * (2.0 * (q - tl.exp(log_p)) - center)
            g = g * soft
            if HARD:
                g += hard * (tl.exp(h - h_top - h_log) - tl.where(k + cols == label, 1.0, 0.0))
            tl.store(grad_ptr + row * grad_stride + k + cols, narrow(g, grad_ptr.dtype.element_ty), mask=mask)


def _launch(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    scale: torch.Tensor | None,
    loss: torch.Tensor | None,
    grad: torch.Tensor | None,
    divergence: int,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
) -> None:
    """student, teacher and grad are rows [M, V]; scale, target and loss have M elements."""
    M, V = student.shape
    if M == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(V))
    with torch.cuda.device_of(student):
        _distillation[(M,)](
            student,
            teacher,
            None if target is None else target.reshape(-1).contiguous(),
            None if scale is None else scale.reshape(-1).contiguous(),
            loss,
            grad,
            student.stride(0),
            teacher.stride(0),
            0 if grad is None else grad.stride(0),
            V,
            beta,
            1.0 / temperature,
            (1.0 - hard_weight) * temperature,
            hard_weight,
            ignore_index,
            DIVERGENCE=divergence,
            HARD=target is not None and hard_weight != 0.0,
            BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )


def distillation_rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    divergence: int,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
) -> torch.Tensor:
    """The loss of each row, float32 [...]; see pykernels.functional.distillation_loss."""
    loss = student.new_empty(student.shape[:-1], dtype=torch.float32)
    spec = (divergence, beta, temperature, hard_weight, ignore_index)
    _launch(as_rows(student), as_rows(teacher), target, None, loss, None, *spec)
    return loss


def distillation_rows_backward(
    grad: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None, *spec: float
) -> torch.Tensor:
    """grad [...] times the gradient of each row's loss, [..., V] in the student's dtype."""
    out = student.new_empty(student.shape)
    _launch(as_rows(student), as_rows(teacher), target, grad, None, as_rows(out), *spec)
    return out


def distillation_rows_grad_(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None, scale: torch.Tensor, *spec: float
) -> torch.Tensor:
    """The losses; scale times the gradient of each row is written over student."""
    rows = as_rows(student)
    loss = student.new_empty(student.shape[:-1], dtype=torch.float32)
    _launch(rows, as_rows(teacher), target, scale, loss, rows, *spec)
    if rows.data_ptr() != student.data_ptr():
        student.copy_(rows.view(student.shape))
    return loss
