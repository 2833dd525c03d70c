"""optimizer_update_ on every backend: bit for bit what the reference says, whatever the dtypes, threads and shards."""

import itertools

import pytest
import torch

from pykernels.ops import _optimizer_reference as rules
from pykernels.ops._optimizer_codes import as_rows, random_bits
from tests.matrix import DEVICE, ISAS, use
from tests.optimizer_problems import NUMBERS, STATE_KINDS, Problem, assert_same_bits, problem

FLAGS = {
    rules.ADAM: (0, rules.DECOUPLED, rules.AMSGRAD, rules.MAXIMIZE | rules.DECOUPLED, rules.UNCORRECTED),
    rules.LAMB: (0, rules.AMSGRAD | rules.MAXIMIZE, rules.UNCORRECTED),
    rules.LION: (0, rules.MAXIMIZE),
    rules.SGD: (0, rules.MOMENTUM, rules.MOMENTUM | rules.NESTEROV, rules.MAXIMIZE),
    rules.ADAGRAD: (0, rules.MAXIMIZE),
    rules.RMSPROP: (0, rules.MOMENTUM, rules.CENTERED, rules.MOMENTUM | rules.CENTERED | rules.MAXIMIZE),
}
RULES = [(algorithm, flags) for algorithm, each in FLAGS.items() for flags in each]
# (parameters, gradients, rounding)
STORES = [
    (torch.float32, torch.float32, rules.NEAREST),
    (torch.bfloat16, torch.bfloat16, rules.STOCHASTIC),
    (torch.bfloat16, torch.bfloat16, rules.NEAREST),
    (torch.bfloat16, torch.float32, rules.STOCHASTIC),
    (torch.bfloat16, torch.bfloat16, rules.KAHAN),
    (torch.bfloat16, torch.bfloat16, rules.SPLIT_MASTER),
    (torch.float16, torch.float16, rules.NEAREST),
    (torch.float16, torch.float32, rules.KAHAN),
    (torch.float32, torch.bfloat16, rules.KAHAN),
    (torch.float32, torch.float64, rules.STOCHASTIC),
]

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU kernels")


def steps_of(backend: str, start: Problem, steps: int) -> list[Problem]:
    """The problem after each step, with fresh gradients for each."""
    generator = torch.Generator().manual_seed(1)
    state, found = start.clone(), []
    with use(backend):
        for _ in range(steps):
            found.append(state.update().clone())
            state.draw_gradients(generator)
    return found


def compare(start: Problem, steps: int = 2, backends: list[str] = ISAS) -> list[Problem]:
    wanted = steps_of("reference", start, steps)
    for backend in backends:
        for step, (got, truth) in enumerate(zip(steps_of(backend, start, steps), wanted, strict=True)):
            assert_same_bits(got, truth, f"{backend}, step {step + 1}:")
    return wanted


@pytest.mark.parametrize("state", STATE_KINDS)
@pytest.mark.parametrize(("algorithm", "flags"), RULES)
def test_every_rule(algorithm: int, flags: int, state: str) -> None:
    for dtype, rounding in ((torch.float32, rules.NEAREST), (torch.bfloat16, rules.STOCHASTIC)):
        start = problem(algorithm, flags, dtype=dtype, state=state, rounding=rounding)
        last = compare(start)[-1]
        changed = [not torch.equal(a, b) for a, b in zip(last.params, start.params, strict=True) if a.numel() > 1]
        assert all(changed)


@pytest.mark.parametrize("state", STATE_KINDS)
@pytest.mark.parametrize(("dtype", "grad_dtype", "rounding"), STORES)
def test_every_way_to_store(dtype: torch.dtype, grad_dtype: torch.dtype, rounding: int, state: str) -> None:
    compare(problem(rules.ADAM, rules.DECOUPLED, dtype=dtype, grad_dtype=grad_dtype, state=state, rounding=rounding))


@pytest.mark.parametrize(("algorithm", "flags"), [(a, f[-1]) for a, f in FLAGS.items()])
def test_float64(algorithm: int, flags: int) -> None:
    """Within a few ulps of float64: PyTorch's own roots of float64 are an ulp off for some values."""
    makes = [{"grad_dtype": dtype} for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    for options in (*makes, {"rounding": rules.KAHAN}):
        start = problem(algorithm, flags, dtype=torch.float64, state="float64", **options)
        wanted = steps_of("reference", start, 2)[-1]
        for backend in ISAS:
            got = steps_of(backend, start, 2)[-1]
            for name in ("params", "states", "steps"):
                torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-14, atol=1e-15)
        if got.extras:
            for p, lost in zip(got.params, got.extras, strict=True):
                assert torch.equal(lost, p - p.float().double())


@pytest.mark.parametrize("block_size", [1, 7, 256, 1000])
def test_block_sizes(block_size: int) -> None:
    """One element, ragged, of the default size, and longer than the buffers; a row of several blocks and a rest."""
    shapes = [(3, 520), (2, 7), (1, 2001)]
    for dtype, rounding in ((torch.float32, rules.NEAREST), (torch.bfloat16, rules.STOCHASTIC)):
        compare(
            problem(rules.ADAM, state="codes", dtype=dtype, rounding=rounding, shapes=shapes, block_size=block_size)
        )


@pytest.mark.parametrize("state", STATE_KINDS)
def test_any_number_of_threads(state: str) -> None:
    """More work than a thread takes alone, in large tensors and small ones."""
    shapes = [(40, 900), (1, 3), (7, 64), (300, 130), *[(2, 5)] * 20]
    start = problem(
        rules.ADAM, rules.DECOUPLED, dtype=torch.bfloat16, state=state, rounding=rules.STOCHASTIC, shapes=shapes
    )
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(steps_of(ISAS[-1], start, 2)[-1])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[1], found[0], "2 threads:")
    assert_same_bits(found[2], found[0], "3 threads:")
    assert_same_bits(found[0], steps_of("reference", start, 2)[-1], "1 thread:")


@pytest.mark.parametrize("state", STATE_KINDS)
def test_scaled_gradients_and_ratio(state: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        start = problem(rules.LAMB, dtype=dtype, state=state)
        ratio = torch.linspace(0.1, 2.0, len(start.params))
        compare(start.clone(grad_scale=torch.tensor(3.0), ratio=ratio, found_inf=torch.zeros(())))
        compare(start.clone(grad_scale=torch.tensor(65536.0, dtype=torch.float64)), steps=1)


@pytest.mark.parametrize("backend", ["reference", *ISAS])
@pytest.mark.parametrize("found", [1.0, float("nan")])
def test_found_inf_changes_nothing(backend: str, found: float) -> None:
    start = problem(rules.ADAM, dtype=torch.bfloat16, state="codes", rounding=rules.KAHAN)
    start = steps_of("reference", start, 1)[0]
    with use(backend):
        assert_same_bits(start.clone(found_inf=torch.tensor(found)).update(), start)


@pytest.mark.parametrize("state", STATE_KINDS)
@pytest.mark.parametrize("rounding", list(rules.ROUNDINGS.values()))
def test_gradients_that_are_not_finite(rounding: int, state: str) -> None:
    """NaN and infinity of either sign, a payload that must not round to infinity, and the block's scale after it."""
    start = problem(rules.ADAM, rules.DECOUPLED, dtype=torch.bfloat16, state=state, rounding=rounding)
    bits = torch.tensor([0x7FFF, 0x7FC0, 0x7F81, -1, 0x7F80, -0x80], dtype=torch.int16)
    for i, grad in enumerate(start.grads):
        if grad.numel() > 200:
            grad.view(-1)[torch.arange(6) * 29 + i] = bits.view(torch.bfloat16)
    wanted = compare(start)[-1]
    assert any(torch.isnan(p).any() for p in wanted.params)
    assert not any(torch.isinf(p).any() for p in wanted.params)


def test_random_bits_of_parameters() -> None:
    """Their mean, each bit's, and correlations along indices, steps, streams and seeds, within 5 standard errors."""
    n, where = 1 << 18, torch.arange(1 << 18) + 12345
    base = random_bits(where, 7, 3, 11)
    assert base.min() >= 0 and base.max() < 1 << 16
    fields = [base] + [random_bits(where, *key) for key in ((8, 3, 11), (1007, 3, 11), (7, 4, 11), (7, 3, 12))]
    centred = [(field.double() + 0.5) / 65536 - 0.5 for field in fields]
    bound = 5 / n**0.5
    for field, values in zip(fields, centred, strict=True):
        assert abs(values.mean()) < bound / 12**0.5
        for bit in range(16):
            assert abs((field >> bit & 1).double().mean() - 0.5) < bound / 2
        counts = torch.bincount(field >> 8, minlength=256).double()
        assert (counts - n / 256).square().sum() / (n / 256) < 255 + 5 * 510**0.5
    for lag in (1, 2, 3, 7, 8, 16, 64, 255, 256, 1000, 4096):
        assert abs((centred[0][lag:] * centred[0][:-lag]).mean() * 12) < bound * 1.1
    for other in centred[1:]:
        assert abs((centred[0] * other).mean() * 12) < bound
    along = torch.stack([random_bits(where[:64], step, 3, 11) for step in range(4096)]).double() / 65536 - 0.5
    for lag in (1, 2, 5, 100):
        assert abs((along[lag:] * along[:-lag]).mean() * 12) < bound * 1.1


@pytest.mark.parametrize("algorithm", list(NUMBERS))
def test_blocks_of_zeros(algorithm: int) -> None:
    """No gradient at all, and then one: a zero block has scale 0, and tiny gradients vanish from it."""
    start = problem(algorithm, rules.MOMENTUM if algorithm == rules.SGD else 0, state="codes")
    start = start.clone(numbers=(*start.numbers[:3], 0.0))
    for grad in start.grads:
        grad.zero_()
    assert all(not scale.any() for scale in compare(start, 1)[0].scales)
    for grad in start.grads:
        grad.fill_(1e-25)
    compare(start)


def shards(whole: Problem, cuts: list[slice]) -> list[Problem]:
    """The parts of a one-tensor problem that lie in these slices of (rows, columns), and where they lie."""
    found = []
    columns = as_rows(whole.params[0]).shape[1]
    for rows, cols in zip(cuts[::2], cuts[1::2], strict=True):
        parts = [[tensor[rows, cols].clone(memory_format=torch.contiguous_format) for tensor in tensors] for tensors in
                 (whole.params, whole.grads, whole.states, whole.extras)]  # fmt: skip
        blocks = slice(None if cols.start is None else cols.start // whole.block_size,
                       None if cols.stop is None else -(-cols.stop // whole.block_size))  # fmt: skip
        scales = [scale[rows, blocks].clone(memory_format=torch.contiguous_format) for scale in whole.scales]
        start = (rows.start or 0) * columns + (cols.start or 0)
        params, grads, states, extras = parts
        found.append(
            whole.clone(
                params=params, grads=grads, states=states, extras=extras, scales=scales, place=[5, start, columns]
            )
        )
    return found


@pytest.mark.parametrize("backend", ["reference", *ISAS])
@pytest.mark.parametrize("state", STATE_KINDS)
def test_shards_round_as_the_whole_does(backend: str, state: str) -> None:
    """Rows cut unevenly, one shard of them empty; columns cut at blocks."""
    every = slice(None)
    for cuts in (
        [slice(0, 11), every, slice(11, 12), every, slice(12, 12), every, slice(12, 29), every],
        [every, slice(0, 64), every, slice(64, 192), every, slice(192, 210)],
    ):
        for rounding in (rules.STOCHASTIC, rules.KAHAN):
            whole = problem(rules.ADAM, dtype=torch.bfloat16, state=state, rounding=rounding, shapes=[(29, 210)]).clone(
                place=[5, 0, 210]
            )
            with use(backend):
                parts = [part.update().update() for part in shards(whole, cuts)]
                whole.update().update()
            for part, wanted in zip(parts, shards(whole, cuts), strict=True):
                assert_same_bits(part, wanted)


def test_far_indices_and_large_seeds() -> None:
    """Indices beyond 2^32 that do not begin at a multiple of 8, a stream of 31 bits, a negative seed."""
    for state, seed in itertools.product(STATE_KINDS, (-1, 2**62 + 12345)):
        start = problem(rules.ADAM, dtype=torch.bfloat16, state=state, rounding=rules.STOCHASTIC, shapes=[(5, 70)])
        compare(start.clone(place=[2**31 - 1, 2**34 + 5, 2**33 + 3], seed=seed))
