"""rope on every backend: bits against the reference, errors against a float64 truth, layouts, positions, gradients."""

import itertools
import math

import pytest
import torch

import pykernels
import pykernels.functional as F
from pykernels.bench.memory import saved_bytes
from tests.matrix import BACKENDS, DEVICE, FLOATS, use

# B, S, H, Hkv, D, R: one pair; whole vectors with grouped queries; a rotary part of 10 pairs, which ends inside a
# vector; an odd head dimension with 5 pairs; one query head for many; nothing at all, by two ways.
SHAPES = [
    (1, 1, 1, 1, 2, 2),
    (2, 5, 4, 2, 64, 64),
    (2, 3, 3, 3, 80, 20),
    (1, 4, 2, 1, 17, 10),
    (1, 2, 1, 5, 8, 8),
    (0, 3, 2, 2, 8, 8),
    (2, 0, 2, 2, 8, 4),
]
ROWS = 40


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """As models write it: rotate_half of Llama, rotate_every_two of GPT-J. cos, sin [..., S, 1, R / 2]."""
    R = 2 * cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        other = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), -1)
    return torch.cat((turned * cos + other * sin, rest), -1)


def case(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "packed") -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, K, D, _ = shape
    packed = torch.randn(B, S, H + 2 * K, D, device=DEVICE).to(dtype)
    q, k = packed[:, :, :H], packed[:, :, H : H + K]
    if layout == "heads first":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    return q, k


def tables(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = F.rope_tables(shape[4], ROWS, rotary_dim=shape[5], device=DEVICE)
    return cos.to(dtype), sin.to(dtype)


def positions(shape: tuple[int, ...], kind: str) -> torch.Tensor | None:
    B, S = shape[:2]
    if kind == "none":
        return None
    return torch.randint(0, ROWS, (S,) if kind == "shared" else (B, S), device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_backend_gives_the_bits_of_the_formula(backend: str, interleaved: bool, dtype: torch.dtype) -> None:
    """float32 products and sums, one rounding at the end: there is one right answer, and the gradient has one too."""
    layouts, kinds = ("packed", "heads first"), ("none", "shared", "each")
    if backend == "triton":  # slow: one layout, and the two ways of finding a row
        layouts, kinds = layouts[:1], kinds[::2]
    for shape, layout, ids in itertools.product(SHAPES, layouts, kinds):
        q, k = (x.requires_grad_() for x in case(shape, dtype, layout))
        cos, sin = tables(shape, dtype if ids == "each" else torch.float32)
        where = positions(shape, ids)
        grads = [torch.randn(x.shape, device=DEVICE).to(dtype) for x in (q, k)]
        with use(backend):
            ours = F.rope(q, k, cos, sin, position_ids=where, interleaved=interleaved)
            ours_grads = torch.autograd.grad(ours, (q, k), grads)
        rows = torch.arange(shape[1], device=DEVICE) if where is None else where
        rows = rows if rows.dim() == 2 else rows.unsqueeze(0)
        c, s = cos.float()[rows].unsqueeze(2), sin.float()[rows].unsqueeze(2)
        for x, y, grad, ours_grad in zip((q, k), ours, grads, ours_grads, strict=True):
            assert y.is_contiguous() and y.dtype == dtype
            torch.testing.assert_close(y, rotate(x.detach().float(), c, s, interleaved).to(dtype), rtol=0, atol=0)
            torch.testing.assert_close(ours_grad, rotate(grad.float(), c, -s, interleaved).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_no_worse_than_plain_torch(dtype: torch.dtype, interleaved: bool) -> None:
    """Root mean square error against float64. In float32 both round three times; below, we round once instead."""
    q, _ = case((2, 64, 8, 1, 128, 128), dtype)
    cos, sin = F.rope_tables(128, 64, device=DEVICE)
    c, s = cos[None, :, None], sin[None, :, None]
    truth = rotate(q.double(), c.double(), s.double(), interleaved)
    plain = rotate(q, c.to(dtype), s.to(dtype), interleaved)
    ours, _ = F.rope(q, None, cos, sin, interleaved=interleaved)
    error, theirs = ((x.double() - truth).square().mean().sqrt() for x in (ours, plain))
    assert error <= (1.0 if dtype == torch.float32 else 0.7) * theirs


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("native")])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["packed", "heads first"])
def test_results_larger_than_the_caches(backend: str, interleaved: bool, layout: str) -> None:
    """16 MiB and more are written past the caches, which is another store."""
    shape = (2, 515, 16, 16, 128, 96)
    q, k = case(shape, torch.float32, layout)
    cos, sin = F.rope_tables(128, 515, rotary_dim=96)
    with use(backend):
        ours = F.rope(q, k, cos, sin, interleaved=interleaved)
    assert sum(y.nbytes for y in ours) >= 16 << 20
    for x, y in zip((q, k), ours, strict=True):
        assert torch.equal(y, rotate(x, cos[None, :, None], sin[None, :, None], interleaved))


def test_key_may_be_absent() -> None:
    shape = (2, 5, 4, 2, 8, 8)
    (q, k), (cos, sin) = case(shape, torch.float32), tables(shape)
    both, alone = F.rope(q, k, cos, sin), F.rope(q, None, cos, sin)
    assert alone[1] is None and torch.equal(alone[0], both[0])


@pytest.mark.parametrize("used", ["q", "k"])
def test_gradient_of_one_output_alone(used: str) -> None:
    shape = (2, 5, 4, 2, 8, 8)
    (q, k), (cos, sin) = case(shape, torch.float32), tables(shape)
    q, k = q.requires_grad_(), k.requires_grad_()
    turned_q, turned_k = F.rope(q, k, cos, sin)
    mine, other = (q, k) if used == "q" else (k, q)
    got, none = torch.autograd.grad(
        (turned_q if used == "q" else turned_k).square().sum(), (mine, other), allow_unused=True
    )
    assert none is None
    torch.testing.assert_close(got, 2 * mine)  # a rotation keeps the norm


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool) -> None:
    q = torch.randn(2, 3, 2, 10, dtype=torch.float64, device=DEVICE, requires_grad=True)
    k = torch.randn(2, 3, 1, 10, dtype=torch.float64, device=DEVICE, requires_grad=True)
    cos, sin = (t.double() for t in F.rope_tables(10, ROWS, rotary_dim=6, device=DEVICE))
    ids = torch.tensor([39, 0, 7], device=DEVICE)

    def call(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return F.rope(q, k, cos, sin, position_ids=ids, interleaved=interleaved)

    with pykernels.backend("reference"):
        assert torch.autograd.gradcheck(call, (q, k))
        assert torch.autograd.gradgradcheck(call, (q, k))


def test_saves_nothing() -> None:
    shape = (2, 5, 4, 2, 8, 8)
    (q, k), (cos, sin), ids = case(shape, torch.bfloat16), tables(shape), positions(shape, "each")
    q, k = q.requires_grad_(), k.requires_grad_()
    assert saved_bytes(lambda: F.rope(q, k, cos, sin, position_ids=ids), (cos, sin, ids)) == 0


def test_inputs_are_read_where_they_lie() -> None:
    """The peak of a call on strided views is its two results: a copy of an input would come on top."""
    from pykernels.bench.memory import peak_bytes

    shape = (2, 64, 8, 2, 64, 64)
    cos, sin = F.rope_tables(64, 64, device=DEVICE)
    for layout in ("packed", "heads first"):
        q, k = case(shape, torch.bfloat16, layout)
        assert not q.is_contiguous()
        peak = peak_bytes(lambda q=q, k=k: F.rope(q, k, cos, sin), q.device)
        assert peak == q.numel() * 2 + k.numel() * 2


@pytest.mark.parametrize("how", ["last stride", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_give_the_same(how: str, backend: str) -> None:
    shape = (2, 5, 4, 2, 8, 8)
    q, k = case(shape, torch.float32)
    cos, sin = tables(shape)
    if how == "last stride":
        q, k, cos, sin = (x.transpose(0, -1).contiguous().transpose(0, -1) for x in (q, k, cos, sin))
    else:
        q, k = q[:1, :1].expand(2, 5, 4, 8), k[:, :, :1].expand(2, 5, 2, 8)
    with use(backend):
        ours = F.rope(q, k, cos, sin)
        theirs = F.rope(q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous())
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_two_to_the_31(backend: str) -> None:
    """Positions 2^31 elements apart, in 4 GiB of which two pages are touched."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    q = base.as_strided((1, 2, 2, 8), (0, 2**31, 8, 1))
    q.copy_(torch.randn(q.shape))
    cos, sin = F.rope_tables(8, 2, device=DEVICE)
    with use(backend):
        assert torch.equal(F.rope(q, None, cos, sin)[0], F.rope(q.contiguous(), None, cos, sin)[0])


def test_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    shape = (2, 5, 4, 2, 16, 8)
    (q, k), (cos, sin), ids = case(shape, torch.float32), tables(shape), positions(shape, "each")
    q, k = q.requires_grad_(), k.requires_grad_()

    def call(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        a, b = F.rope(q, k, cos, sin, position_ids=ids, interleaved=True)
        return (a.sin().sum() + b.cos().sum()) * 2

    plain, compiled = call(q, k), torch.compile(call, fullgraph=True)(q, k)
    torch.testing.assert_close(compiled, plain)
    for mine, theirs in zip(torch.autograd.grad(compiled, (q, k)), torch.autograd.grad(plain, (q, k)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_autocast_leaves_it_alone() -> None:
    shape = (1, 3, 2, 1, 8, 8)
    (q, k), (cos, sin) = case(shape, torch.float32), tables(shape)
    plain = F.rope(q, k, cos, sin)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = F.rope(q, k, cos, sin)
    assert torch.equal(cast[0], plain[0]) and torch.equal(cast[1], plain[1])


def test_tables_are_exact_far_out() -> None:
    """Every entry is the float32 nearest to the true cosine: computed here with Python's own float64."""
    cos, sin = F.rope_tables(8, 131072, theta=500000.0, rotary_dim=6)
    assert cos.shape == sin.shape == (131072, 3) and cos.dtype == torch.float32
    for position, pair in ((0, 0), (1, 2), (100_000, 0), (131_071, 1)):
        angle = position * 500000.0 ** (-2 * pair / 6)
        assert abs(cos[position, pair].item() - math.cos(angle)) < 2.0**-24
        assert abs(sin[position, pair].item() - math.sin(angle)) < 2.0**-24


def test_attention_scores_depend_on_the_distance_alone() -> None:
    """What rope is for: moving query and key by 17 positions leaves their product as it was."""
    q, k = torch.randn(1, 1, 1, 64, device=DEVICE), torch.randn(1, 1, 1, 64, device=DEVICE)
    cos, sin = F.rope_tables(64, ROWS, device=DEVICE)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        a, _ = F.rope(q, None, cos, sin, position_ids=torch.tensor([at_q], device=DEVICE))
        b, _ = F.rope(k, None, cos, sin, position_ids=torch.tensor([at_k], device=DEVICE))
        return (a * b).sum()

    torch.testing.assert_close(score(9, 4), score(26, 21), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(score(9, 4), score(9, 5), rtol=1e-3)


Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8)
TABLE = torch.zeros(5, 4)
BAD = [
    (lambda: F.rope(Q[0], K, TABLE, TABLE), "q to have 4 dimensions"),
    (lambda: F.rope(Q.int(), K, TABLE, TABLE), "q to be float32"),
    (lambda: F.rope(Q, K.bfloat16(), TABLE, TABLE), "k to be float32, got bfloat16"),
    (lambda: F.rope(Q, K[:, :2], TABLE, TABLE), r"k to have shape \[2, 3, heads, 8\]"),
    (lambda: F.rope(Q, K, TABLE[0], TABLE), "cos to have 2 dimensions"),
    (lambda: F.rope(Q, K, TABLE.int(), TABLE), "cos to be float32"),
    (lambda: F.rope(Q, K, torch.zeros(5, 5), torch.zeros(5, 5)), "cos to have at most 4 columns"),
    (lambda: F.rope(Q, K, TABLE, TABLE[:, :3]), "sin to have the shape and dtype of cos"),
    (lambda: F.rope(Q, K, TABLE, TABLE.bfloat16()), "sin to have the shape and dtype of cos"),
    (lambda: F.rope(Q, K, TABLE[:2], TABLE[:2]), "cos to have a row for each of the 3 positions of q, got 2"),
    (lambda: F.rope(Q, K, TABLE, TABLE, position_ids=torch.zeros(3)), "position_ids to be int64"),
    (lambda: F.rope(Q, K, TABLE, TABLE, position_ids=torch.zeros(2, dtype=torch.int64)), "position_ids to have shape"),
    (
        lambda: F.rope(Q, K, TABLE, TABLE, position_ids=torch.tensor([0, 5, 1])),
        "position_ids to be from 0 to 4, the rows of cos, got 5",
    ),
    (
        lambda: F.rope(Q, K, TABLE, TABLE, position_ids=torch.tensor([0, -1, 1])),
        "position_ids to be from 0 to 4, the rows of cos, got -1",
    ),
]


@pytest.mark.parametrize("backend", ["reference", "native:portable"])
@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(call, message: str, backend: str) -> None:
    with use(backend), pytest.raises(RuntimeError, match="rope: expected " + message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.rope_tables(8, 4, rotary_dim=3), "rotary_dim to be even"),
        (lambda: F.rope_tables(8, 4, rotary_dim=10), "at most the head_dim 8, got 10"),
        (lambda: F.rope_tables(8, -1), "max_seq to be 0 or more"),
        (lambda: F.rope_tables(8, 4, theta=0.0), "theta to be above 0"),
    ],
)
def test_bad_tables_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
