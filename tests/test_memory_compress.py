"""compress_activations: what is held and in how many bytes, and how far and which way gradients are off."""

import gc

import pytest
import torch
from torch import nn

import pykernels.functional as F
from pykernels.memory import compress, compress_activations
from tests.matrix import FLOATS


def held() -> list[compress._Compressed]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is compress._Compressed]


def nbytes(entry: compress._Compressed) -> int:
    return sum(part.nbytes for pair in entry.parts for part in pair)


@pytest.fixture(autouse=True)
def nothing_left_over():
    assert not held()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("size", "group"), [(1, 128), (128, 128), (1000, 128), (1000, 7), (4096, 64)])
def test_bytes_held(dtype: torch.dtype, size: int, group: int) -> None:
    x = torch.randn(size).to(dtype).requires_grad_()
    with compress_activations(min_bytes=0, group_size=group):
        y = x.exp()
    (entry,) = held()
    assert nbytes(entry) == size + 4 * -(-size // group)
    del entry
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == dtype and not held()  # freed with the graph


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_below_a_step_of_its_group(stochastic: bool, dtype: torch.dtype) -> None:
    """The gradient of a product is the saved tensor itself: off by under one step (half a step to nearest)."""
    h = (torch.randn(37, 100) * torch.logspace(-3, 3, 3700).view(37, 100)).to(dtype)
    w = torch.ones(37, 100, dtype=dtype, requires_grad=True)
    with compress_activations(min_bytes=0, stochastic=stochastic):
        y = h * w
    (grad,) = torch.autograd.grad(y.sum(), w)
    groups = torch.cat([h.flatten().float(), torch.zeros(12)]).view(-1, 128)
    step = (groups.abs().amax(1, keepdim=True) / 127).expand(-1, 128).flatten()[:3700].view(37, 100)
    error = (grad.float() - h.float()).abs()
    rounding = torch.finfo(dtype).eps / 2 * grad.float().abs()
    assert (error <= (1.0 if stochastic else 0.5) * step * (1 + 1e-5) + rounding).all()
    assert error.max() > 0


def test_gradients_are_right_on_average() -> None:
    """400 draws of a linear layer's weight gradient: their mean is within 5 of its own standard deviations."""
    torch.manual_seed(0)
    x, layer = torch.randn(16, 64), nn.Linear(64, 8)
    grad_y = torch.randn(16, 8)
    truth = grad_y.t().double() @ x.double()

    def draw(stochastic: bool = True) -> torch.Tensor:
        with compress_activations(min_bytes=0, stochastic=stochastic):
            y = layer(x)
        return torch.autograd.grad(y, layer.weight, grad_y)[0].double()

    draws = torch.stack([draw() for _ in range(400)])
    deviation = draws.std(0) / 20
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - truth).abs() < 5 * deviation).all()
    # The test can tell: rounding to nearest is off by more than that somewhere, always the same way.
    assert ((draw(stochastic=False) - truth).abs() > 5 * deviation).any()


def test_a_tensor_saved_by_several_nodes_is_held_once() -> None:
    """Three linear layers on one input, seen flat and transposed: one entry, one set of codes, one value for all."""
    x = torch.randn(4, 8, 16)
    layers = [nn.Linear(16, 16) for _ in range(3)]
    w = torch.randn(16, 32, requires_grad=True)
    with compress_activations(min_bytes=0):
        ys = [layer(x) for layer in layers]
        z = x.view(32, 16).t() * w
    assert len(held()) == 1
    grads = [torch.autograd.grad(y.sum(), layer.weight)[0] for y, layer in zip(ys, layers, strict=True)]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    seen = torch.autograd.grad(z.sum(), w)[0]
    torch.testing.assert_close(seen.t().sum(0), grads[0][0])


def test_after_a_change_in_place_it_is_another_tensor() -> None:
    h, w = torch.ones(64), torch.ones(64, requires_grad=True)
    with compress_activations(min_bytes=0):
        a = h * w
        h.mul_(3)
        b = h * w
    assert torch.equal(torch.autograd.grad(a.sum(), w)[0], torch.ones(64))
    assert torch.equal(torch.autograd.grad(b.sum(), w)[0], torch.full((64,), 3.0))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_layouts(layout: str) -> None:
    base = torch.randn(24, 40)
    h = {"transposed": base.t(), "sliced": base[:, 3:30], "expanded": base[:1].expand(24, 40)}[layout]
    w = torch.ones(h.shape, requires_grad=True)
    with compress_activations(min_bytes=0, group_size=1):  # a group of one: exact, but for the last bit
        y = h * w
    assert len(held()) == (0 if layout == "expanded" else 1)  # codes of every element would be more than it holds
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], h, rtol=1e-6, atol=0)


def test_left_alone() -> None:
    """Integers, booleans, float64, small tensors, parameters, their views and their detached copies."""
    layer, table = nn.Linear(64, 64), nn.Embedding(64, 64)
    index = torch.randint(64, (64, 64))
    x = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)
    small = torch.randn(63, 64, requires_grad=True)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, g: torch.Tensor) -> torch.Tensor:
            weight = self.layer.weight
            return g * weight + g * weight.t() + g * weight.detach() + g * weight.data[:] + g * layer.weight

    g = torch.zeros((), requires_grad=True)
    with compress_activations(min_bytes=64 * 64 * 4):
        kept = [x.gather(1, index), x.exp(), small.exp(), table(index[0]), torch.where(index > 3, x, 0), Uses()(g)]
    assert not held()
    with compress_activations(min_bytes=64 * 64 * 4):
        kept.append((torch.randn(64, 64) * torch.ones(64, 64, requires_grad=True)).exp())
    assert len(held()) == 2  # the factor that is no parameter, and the result: just as large as the rest


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_kept_exactly(bad: float) -> None:
    h, w = torch.randn(300), torch.ones(300, requires_grad=True)
    h[130] = bad
    with compress_activations(min_bytes=0):
        y = h * w
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], h, rtol=0, atol=0, equal_nan=True)


def test_seeds() -> None:
    h, w = torch.randn(1000), torch.ones(1000, requires_grad=True)

    def draw(seed: int | None) -> torch.Tensor:
        with compress_activations(min_bytes=0, seed=seed):
            y, z = h * w, h.clone() * w
        first, second = (torch.autograd.grad(v.sum(), w)[0] for v in (y, z))
        assert not torch.equal(first, second)  # every tensor has its own stream
        return first

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    torch.manual_seed(1)
    first, second = draw(None), draw(None)
    torch.manual_seed(1)
    assert torch.equal(first, draw(None)) and not torch.equal(first, second)


def test_a_second_backward_sees_the_same() -> None:
    x = torch.randn(500, requires_grad=True)
    with compress_activations(min_bytes=0):
        y = x.exp()
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])


def test_a_model_learns_the_same() -> None:
    """A small network fitted with and without: the losses agree where both have fallen a hundredfold."""
    x, target = torch.randn(256, 16), torch.randn(256, 1) * 0.01 + 1
    losses = {}
    for name in ("plain", "compressed"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(150):
            optimizer.zero_grad()
            if name == "plain":
                loss = (model(x) - target).square().mean()
            else:
                with compress_activations(min_bytes=0, seed=step):
                    loss = (model(x) - target).square().mean()
            losses.setdefault(name, []).append(loss.item())
            loss.backward()
            optimizer.step()
    plain, compressed = losses["plain"], losses["compressed"]
    assert plain[-1] < 0.01 * plain[0] and abs(compressed[-1] - plain[-1]) < 0.005 * plain[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"bits": 4}, "bits to be 8, got 4"),
        ({"min_bytes": -1}, "min_bytes to be 0 or more, got -1"),
        ({"group_size": 0}, "group_size to be 1 or more, got 0"),
    ],
)
def test_bad_values_are_named(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), compress_activations(**how):
        pass


def test_codes_are_those_of_quantize_rowwise() -> None:
    h, w = torch.randn(256), torch.ones(256, requires_grad=True)
    with compress_activations(min_bytes=0, group_size=64, stochastic=False):
        y = h * w
    (entry,) = held()
    q, scale = F.quantize_rowwise(h.view(4, 64))
    assert torch.equal(entry.parts[0][0], q) and torch.equal(entry.parts[0][1], scale)
    assert torch.equal(torch.autograd.grad(y.sum(), w)[0], F.dequantize_rowwise(q, scale).flatten())
