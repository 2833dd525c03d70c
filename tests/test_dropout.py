"""dropout on every backend: one mask for a key whatever runs it, the same in backward, and the chances it promises."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pykernels
import pykernels.functional as F
from pykernels import nn
from pykernels.bench.memory import saved_bytes
from tests.matrix import BACKENDS, DEVICE, FLOATS, use

# No elements; one; a scalar; rows that end inside a Philox block and inside every vector; more than one chunk of 256
# numbers and one block of 1024; whole blocks.
SHAPES = [(0, 3), (1,), (), (5, 17), (3, 1027), (2, 4, 64)]
KEY = torch.tensor([-(2**40) - 3, 2**32 - 1])  # the key has two halves and a sign, and the counter carries


def kept_by_hand(index: int, p: float, key: torch.Tensor) -> bool:
    """One element, in Python's integers, from the definition in Salmon et al. and nothing of ours."""
    seed, offset = (int(word) % 2**64 for word in key)
    counter = (offset + index // 4) % 2**64
    c = [counter % 2**32, counter >> 32, 0, 0]
    k = [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return (c[index % 4] >> 8) / 2**24 >= p


def mask(p: float, key: torch.Tensor, *shape: int) -> torch.Tensor:
    return F.dropout(torch.ones(shape, device=DEVICE), p, seed=key) != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_is_the_one_documented(backend: str, p: float) -> None:
    with use(backend):
        ours = mask(p, KEY, 5, 23).flatten().tolist()
    assert ours == [kept_by_hand(i, p, KEY) for i in range(5 * 23)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [2.0**-24, 0.1, 1.0])
def test_every_backend_gives_the_bits_of_the_formula(backend: str, dtype: torch.dtype, p: float) -> None:
    """A product and a sum in float32, one rounding at the end; the gradient the same product under the same mask."""
    for shape in SHAPES if backend != "triton" else SHAPES[:4]:
        for wide in (None, dtype, torch.float32):
            x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
            residual = None if wide is None else torch.randn(shape, device=DEVICE).to(wide).requires_grad_()
            inputs = (x,) if residual is None else (x, residual)
            with use(backend):
                y = F.dropout(x, p, seed=KEY, residual=residual)
                grad = torch.randn(shape, device=DEVICE).to(y.dtype)
                grads = torch.autograd.grad(y, inputs, grad)
            kept = (
                torch.tensor([kept_by_hand(i, p, KEY) for i in range(x.numel())], device=DEVICE).reshape(shape).bool()
            )
            factor = torch.tensor(0.0 if p == 1.0 else 1 / (1 - p), dtype=torch.float32)
            dropped = torch.zeros((), device=DEVICE)
            want = torch.where(kept, x.detach().float() * factor, dropped)
            want = want if residual is None else residual.detach().float() + want
            assert torch.equal(y, want.to(wide or dtype)) and y.dtype == (wide or dtype)
            assert torch.equal(grads[0], torch.where(kept, grad.float() * factor, dropped).to(dtype))
            assert residual is None or torch.equal(grads[1], grad)
            assert all(g.dtype == t.dtype for g, t in zip(grads, inputs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    """Rows of a wider tensor (odd, so that no row starts a Philox block), columns, and an expanded row."""
    rows, columns = torch.randn(6, 40, device=DEVICE)[:, 3:30], torch.randn(27, 6, device=DEVICE).t()
    expanded = torch.randn(1, 27, device=DEVICE).expand(6, 27)
    with use(backend):
        for x in (rows, columns, expanded):
            for residual in (None, rows, columns, expanded):
                whole = None if residual is None else residual.contiguous()
                ours = F.dropout(x, 0.3, seed=KEY, residual=residual)
                assert torch.equal(ours, F.dropout(x.contiguous(), 0.3, seed=KEY, residual=whole))
                assert ours.is_contiguous()


def test_threads_do_not_matter() -> None:
    x = torch.randn(300_001)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(F.dropout(x, 0.3, seed=KEY))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_move_the_stream_by_whole_counters(backend: str) -> None:
    """Also past 2^32 counters: the element 4 * n further on, and an offset n larger, are one thing."""
    with use(backend):
        for first in (0, 2**30 - 3, 2**32 - 3, 2**61):
            long, late = mask(0.4, torch.tensor([7, first]), 64), mask(0.4, torch.tensor([7, first + 5]), 44)
            assert torch.equal(long[20:], late) and not torch.equal(long[:44], late)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_past_two_to_the_31(backend: str) -> None:
    """Rows 2^31 elements apart, in 4 GiB of which two pages are touched."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = base.as_strided((2, 24), (2**31, 1))
    x.copy_(torch.randn(x.shape))
    with use(backend):
        assert torch.equal(F.dropout(x, 0.3, seed=KEY), F.dropout(x.contiguous(), 0.3, seed=KEY))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_chances(p: float) -> None:
    """Five standard deviations: of the share kept, and of how often neighbours agree, if they are independent."""
    n = 1_000_000
    kept = mask(p, F.dropout_key(11), n).double()
    assert abs(kept.mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    centred = (kept - (1 - p)) / (p * (1 - p)) ** 0.5
    for lag in (1, 2, 4, 1024):
        assert abs((centred[lag:] * centred[:-lag]).mean().item()) < 5 / n**0.5
    y = F.dropout(torch.ones(n), p, seed=11).double()
    assert abs(y.mean().item() - 1) < 5 * (p / (1 - p) / n) ** 0.5


def test_keys_differ() -> None:
    """Different seeds, and successive draws from torch's generator, share no more than chance does."""
    torch.manual_seed(3)
    x = torch.ones(10_000)
    masks = [F.dropout(x, 0.5, seed=seed) != 0 for seed in (0, 1, -1, 2**40, None, None)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs((one == other).float().mean().item() - 0.5) < 5 * 0.5 / 100
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x, 0.5, seed=None) != 0, masks[4])
    assert torch.equal(F.dropout(x, 0.5, seed=F.dropout_key(2**40)) != 0, masks[3])


def test_backward_draws_the_mask_of_forward() -> None:
    """Nothing ties the two but the key: the gradient of a sum is the output for ones."""
    x = torch.ones(1000, requires_grad=True)
    for _ in range(3):
        y = F.dropout(x, 0.3)
        torch.rand(5)  # the generator moves on in between
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


def test_checkpoint_draws_the_same_again() -> None:
    x = torch.randn(40, 40, requires_grad=True)
    states = []

    def block(x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(x.sin(), 0.4)
        states.append(y.detach())
        return y.square()

    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(states) == 2 and torch.equal(states[0], states[1])
    kept = states[0] != 0
    torch.testing.assert_close(x.grad, 2 * states[0] * kept / 0.6 * x.detach().cos())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [10, 10_000])
def test_saves_sixteen_bytes(residual: bool, size: int) -> None:
    x, other = torch.randn(size, requires_grad=True), torch.randn(size, requires_grad=True)
    assert saved_bytes(lambda: F.dropout(x, 0.3, residual=other if residual else None), ()) == 16


@pytest.mark.parametrize("how", [{"p": 0.0}, {"p": 0.7, "training": False}])
def test_nothing_to_do(how: dict) -> None:
    x, residual = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    assert F.dropout(x, **how) is x
    assert torch.equal(F.dropout(x, residual=residual, **how), x + residual)
    assert saved_bytes(lambda: F.dropout(x, residual=residual, **how), ()) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_element_is_zero_whatever_it_held(backend: str) -> None:
    x = torch.full((300,), float("nan"), device=DEVICE)
    x[::2] = float("inf")
    with use(backend):
        y = F.dropout(x, 0.5, seed=KEY)
        kept = mask(0.5, KEY, 300)
        assert torch.equal(y[~kept], torch.zeros_like(y[~kept])) and not y[kept].isfinite().any()
        assert torch.equal(F.dropout(x, 1.0, seed=KEY, residual=torch.ones_like(x)), torch.ones_like(x))


def test_gradcheck() -> None:
    x, residual = (torch.randn(3, 7, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    with pykernels.backend("reference"):
        for call in (
            lambda x, residual: F.dropout(x, 0.3, seed=5, residual=residual),
            lambda x, residual: F.dropout(x, 0.3, seed=5) * residual,
        ):
            assert torch.autograd.gradcheck(call, (x, residual))
            assert torch.autograd.gradgradcheck(call, (x, residual))


def test_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    x, residual = (torch.randn(6, 40, device=DEVICE, requires_grad=True) for _ in range(2))

    def call(x: torch.Tensor, residual: torch.Tensor, seed: int | None = 5) -> torch.Tensor:
        return F.dropout(x.sin(), 0.3, seed=seed, residual=residual).cos()

    compiled = torch.compile(call, fullgraph=True)
    plain, ours = call(x, residual), compiled(x, residual)
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, residual), weight) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)
    drawn = torch.compile(lambda x: F.dropout(x, 0.5), fullgraph=True)
    ones = torch.ones(1000, device=DEVICE, requires_grad=True)
    first, second = drawn(ones), drawn(ones)
    assert not torch.equal(first, second) and torch.equal(torch.autograd.grad(first.sum(), ones)[0], first)


def test_layer_is_a_drop_in() -> None:
    layer = nn.Dropout(0.25)
    assert isinstance(layer, torch.nn.Dropout) and repr(layer) == repr(torch.nn.Dropout(0.25))
    x, residual = torch.ones(400), torch.randn(400)
    torch.manual_seed(1)
    y = layer(x)
    assert set(y.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    torch.manual_seed(1)
    assert torch.equal(layer(x, residual), residual + y)
    assert layer.eval()(x) is x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.Dropout(1.5), "p to be from 0 to 1, got 1.5"),
        (lambda: nn.Dropout(0.5, inplace=True), "inplace to be False"),
        (lambda: F.dropout(torch.ones(3), -0.1), "p to be from 0 to 1, got -0.1"),
        (lambda: F.dropout(torch.ones(3), float("nan"), training=False), "p to be from 0 to 1, got nan"),
    ],
)
def test_bad_values_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


X = torch.ones(2, 3)
BAD = [
    (lambda: F.dropout(X.int(), seed=1), "x to be float32"),
    (lambda: F.dropout(X, seed=1, residual=torch.ones(3)), r"residual to have the shape of x, \[2, 3\], got \[3\]"),
    (lambda: F.dropout(X, seed=1, residual=X.half()), "residual to be float32, got float16"),
    (lambda: F.dropout(X.half(), seed=1, residual=X.bfloat16()), "residual to be float16 or float32, got bfloat16"),
    (lambda: F.dropout(X, seed=torch.tensor([1])), r"key to have shape \[2\]"),
    (lambda: F.dropout(X, seed=torch.tensor([1.0, 2.0])), "key to be int64, got float32"),
    (lambda: torch.ops.pykernels.dropout(X, None, 2.0, KEY), "p to be from 0 to 1, got 2"),
]


@pytest.mark.parametrize("backend", ["reference", "native:portable"])
@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(call, message: str, backend: str) -> None:
    with use(backend), pytest.raises(RuntimeError, match="dropout: expected " + message):
        call()
