"""What goes around an optimizer: clipping, updates inside backward, schedules, the gradient noise scale."""

import math

import pytest
import torch
from torch import Tensor

from pykernels import optim
from pykernels.bench.memory import peak_bytes

from .optim_matrix import equal, gradients, parameters


def _with_gradients() -> list[Tensor]:
    params = [*parameters(), *parameters(torch.bfloat16, ((40, 30),)), torch.randn(8, 6, 3, 3).requires_grad_()]
    for p, g in zip(params, gradients(0, params), strict=True):
        p.grad = g
    params[-1].grad = torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last)
    params[1].grad = torch.randn(7, 1034)[:, ::2]
    return params


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [1e-2, 1e9])
def test_clip_grad_norm(norm_type: float, max_norm: float) -> None:
    """As torch's on float64 copies; where nothing is clipped nothing is written."""
    torch.manual_seed(1)
    params = _with_gradients()
    before = [p.grad.clone() for p in params]  # type: ignore[union-attr]
    wide = [g.double().requires_grad_() for g in before if g.numel() or norm_type != math.inf]  # torch's fails there
    for w in wide:
        w.grad = w.detach().clone()
    want = torch.nn.utils.clip_grad_norm_(wide, max_norm, norm_type)
    got = optim.clip_grad_norm_((p for p in params), max_norm, norm_type)
    assert got.dtype == torch.float32 and got.dim() == 0
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0.0)
    kept = [(p, b) for p, b in zip(params, before, strict=True) if b.numel() or norm_type != math.inf]
    for (p, b), w in zip(kept, wide, strict=True):
        eps = 2.0**-8 if p.dtype == torch.bfloat16 else 2.0**-23
        torch.testing.assert_close(p.grad.double(), w.grad, rtol=2 * eps, atol=0.0)  # type: ignore[union-attr]
        assert max_norm < 1 or torch.equal(p.grad, b)  # type: ignore[arg-type]


def test_clip_grad_norm_of_one_none_and_no_gradient() -> None:
    p = torch.ones(3, requires_grad=True)
    assert optim.clip_grad_norm_([p], 1.0) == 0.0
    p.grad = torch.full((3,), 2.0)
    assert optim.clip_grad_norm_(p, 1.0) == pytest.approx(12**0.5)
    with pytest.raises(ValueError, match="max_norm to be at least 0, got -1"):
        optim.clip_grad_norm_(p, -1.0)
    with pytest.raises(ValueError, match="norm_type to be above 0, got 0"):
        optim.clip_grad_norm_(p, 1.0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_clip_grad_norm_names_what_is_not_finite(bad: float, norm_type: float) -> None:
    named = {f"layer.{i}": p for i, p in enumerate(_with_gradients())}
    for i in (1, 3):
        named[f"layer.{i}"].grad.view(-1)[2:3].fill_(bad) if i != 1 else named["layer.1"].grad[0, 0].fill_(bad)
    before = [p.grad.clone() for p in named.values()]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"in parameter 'layer.1', 'layer.3'$"):
        optim.clip_grad_norm_(named.items(), 1.0, norm_type, error_if_nonfinite=True)
    for p, b in zip(named.values(), before, strict=True):
        torch.testing.assert_close(p.grad, b, rtol=0, atol=0, equal_nan=True)


def _mlp(width: int = 64, depth: int = 6, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(depth))).to(dtype)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("clip", [None, 1e-4])
def test_in_backward_is_the_same_training(steps: int, clip: float | None) -> None:
    """Bit for bit what one optimizer for the whole model does, its randomness included."""
    options = {"lr": 1e-2, "state_bits": 8, "rounding": "stochastic", "min_8bit_size": 256}
    a, b = _mlp(dtype=torch.bfloat16), _mlp(dtype=torch.bfloat16)
    inside = optim.optimizer_in_backward(
        a, lambda params: optim.AdamW(params, **options), accumulation_steps=steps, clip_value=clip
    )
    outside = optim.AdamW(b.parameters(), **options)
    for step in range(2 * steps):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        for model in (a, b):
            model(x).square().mean().backward()
        inside.step()
        inside.zero_grad()
        assert all((p.grad is None) == ((step + 1) % steps == 0) for p in a.parameters())
        if (step + 1) % steps == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_value_(b.parameters(), clip)
            outside.step()
            outside.zero_grad()
    assert equal(list(a.parameters()), list(b.parameters()))
    saved = inside.state_dict()
    assert list(saved) == [name for name, _ in a.named_parameters()]
    inside.load_state_dict(saved)
    saved["0.weight"]["param_groups"][0]["block_size"] = 64
    with pytest.raises(ValueError, match="block_size"):
        inside.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"got none for \['1.weight'\]"):
        inside.load_state_dict({k: v for k, v in saved.items() if k != "1.weight"})
    inside.remove()
    a(x).sum().backward()
    assert all(p.grad is not None for p in a.parameters())


def test_in_backward_holds_one_gradient() -> None:
    """Eight layers of 256 KB: the peak of backward is one or two of them, not eight."""
    model, x = _mlp(256, 8), torch.randn(2, 256)
    weight = model[0].weight.nbytes
    optim.optimizer_in_backward(model, lambda params: optim.SGD(params, lr=1e-3)).init_states()
    loss = model(x).sum()
    assert peak_bytes(loss.backward, torch.device("cpu")) < 2.5 * weight
    plain = _mlp(256, 8)
    loss = plain(x).sum()
    assert peak_bytes(loss.backward, torch.device("cpu")) > 7.5 * weight


def test_in_backward_refuses() -> None:
    for kwargs, words in (({"accumulation_steps": 0}, "accumulation_steps"), ({"clip_value": -1.0}, "clip_value")):
        with pytest.raises(ValueError, match=words):
            optim.optimizer_in_backward(_mlp(), optim.AdamW, **kwargs)  # type: ignore[arg-type]
    model = _mlp()
    with pytest.raises(ValueError, match="max_grad_norm to be None or 0"):
        optim.optimizer_in_backward(model, lambda params: optim.LAMB(params, max_grad_norm=1.0))
    model(torch.randn(8, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


SCHEDULES = [
    (lambda o: optim.linear(o, 4, 12), {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.5, 12: 0.0, 20: 0.0}),
    (lambda o: optim.linear(o, 0, 10, final=0.5), {0: 1.0, 5: 0.75, 10: 0.5}),
    (
        lambda o: optim.cosine(o, 4, 12, final=0.1),
        {0: 0.25, 4: 1.0, 6: 0.55 + 0.45 * 0.5**0.5, 8: 0.55, 12: 0.1, 20: 0.1},
    ),
    (lambda o: optim.wsd(o, 4, 20, decay_steps=8), {0: 0.25, 4: 1.0, 12: 1.0, 16: 0.5, 20: 0.0}),
    (lambda o: optim.wsd(o, 0, 20, decay_steps=0, final=0.1), {0: 1.0, 19: 1.0, 20: 0.1}),
]


@pytest.mark.parametrize(("make", "want"), SCHEDULES)
def test_schedules(make: object, want: dict) -> None:
    optimizer = optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    seen = {}
    for step in range(21):
        seen[step] = optimizer.param_groups[0]["lr"] / 2.0
        optimizer.step()
        scheduler.step()
        if step == 10:  # saved and loaded halfway
            again = make(optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0))  # type: ignore[operator]
            again.load_state_dict(scheduler.state_dict())
            assert again.get_last_lr() == scheduler.get_last_lr()
    assert {step: pytest.approx(seen[step]) for step in want} == want


@pytest.mark.parametrize(
    "make",
    [
        lambda o: optim.linear(o, 5, 4),
        lambda o: optim.cosine(o, -1, 4),
        lambda o: optim.wsd(o, 2, 10, decay_steps=9),
        lambda o: optim.linear(o, 0, 10, final=-1.0),
    ],
)
def test_schedules_refuse(make: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        make(optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0))  # type: ignore[operator]


@pytest.mark.parametrize("averaged", [True, False])
def test_noise_scale_of_a_known_problem(averaged: bool) -> None:
    """Examples x ~ N(G, s^2 I) in d dimensions with the loss x . w: each gradient is x, so B_simple = d s^2 / |G|^2.

    d = 400, s = 2, |G|^2 = 16: 100 examples. Over 400 steps of 4 micro-batches of 8 the estimate's spread is about 5 %.
    """
    generator = torch.Generator().manual_seed(0)
    w = [torch.zeros(300, requires_grad=True), torch.zeros(10, 10, requires_grad=True)]
    noise = optim.GradientNoiseScale(w, batch_size=8, decay=0.998, averaged=averaged)
    assert math.isnan(noise.value)
    for _ in range(400):
        for _ in range(4):
            x = 0.2 + 2.0 * torch.randn(8, 400, generator=generator)
            loss = (x[:, :300] @ w[0]).mean() + (x[:, 300:] @ w[1].flatten()).mean()
            (loss / 4 if averaged else loss).backward()
        noise.update()
        for p in w:
            p.grad = None
    assert noise.value == pytest.approx(100.0, rel=0.15)
    noise.remove()


def test_noise_scale_needs_two_batch_sizes() -> None:
    p = torch.zeros(3, requires_grad=True)
    noise = optim.GradientNoiseScale([p], batch_size=4)
    with pytest.raises(RuntimeError, match="expected a backward"):
        noise.update()
    p.sum().backward()
    with pytest.raises(ValueError, match="more than 4 examples"):
        noise.update()
    noise.update_from(3.0, 1.5, 1, 4)  # |G|^2 + S = 3 and |G|^2 + S / 4 = 1.5
    assert noise.value == pytest.approx(2.0)
