"""int8_training_linear: its products against the same rounding done in float64, its memory, and its randomness."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pykernels
from pykernels import functional as F
from pykernels.nn import Int8TrainingLinear

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SWITCHES = list(itertools.product((True, False), repeat=3))
# x's leading sizes, N, K: one row, sizes that no vector width divides, 3-D, and a batch larger than a tile.
SHAPES = [((1,), 16, 32), ((5, 7), 33, 65), ((2, 3, 4), 17, 130), ((96,), 128, 192)]


CONFIG = pykernels.Int8TrainingConfig()


def config(output=True, grad_input=True, grad_weight=True, stochastic=True):
    return pykernels.Int8TrainingConfig(output, grad_input, grad_weight, stochastic)


def problem(lead, n, k, dtype=torch.float32, seed=0):
    """x, weight, bias and the gradient of y; rows of very different size, which a scale for the tensor would lose."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, grad = (torch.randn(*s, generator=generator) for s in ((*lead, k), (n, k), (*lead, n)))
    x = x * torch.logspace(-2, 1, k)
    bias = torch.randn(n, generator=generator)
    return [t.to(dtype) for t in (x, weight / k**0.5, bias, grad)]


def run(x, weight, bias, grad, cfg=CONFIG, seed=7):
    """y and the gradients of x, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = F.int8_training_linear(*leaves, cfg, seed)
    y.backward(grad)
    return [y.detach(), *(t.grad for t in leaves)]


def rows(t, stochastic=False, seed=0):
    q, scale = F.quantize_rowwise(t, stochastic=stochastic, seed=seed)
    return q.double() * scale.double()[:, None]


def columns(t, stochastic=False, seed=0):
    q, scale = F.quantize_colwise(t, stochastic=stochastic, seed=seed)
    return q.double() * scale.double()


def truth(x, weight, bias, grad, cfg, seed=7):
    """The same roundings, multiplied in float64: an INT8 product may differ from it by the output's rounding alone."""
    flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    sr = {"stochastic": cfg.stochastic_rounding, "seed": seed}
    row, row_scale, column, column_scale = F.quantize_both(g, **sr)
    g_row, g_column = row.double() * row_scale.double()[:, None], column.T.double() * column_scale.double()
    y = rows(flat) @ rows(weight).T if cfg.output else flat.double() @ weight.double().T
    grad_x = g_row @ columns(weight) if cfg.grad_input else g.double() @ weight.double()
    grad_weight = g_column.T @ columns(flat) if cfg.grad_weight else g.double().T @ flat.double()
    return [(y + bias.double()).view(grad.shape), grad_x.view(x.shape), grad_weight, g.double().sum(0)]


def assert_one_rounding(got, want, dtype, terms):
    """Within one rounding of the output dtype and, for a float product, of its float32 sum of `terms` terms."""
    bound = torch.finfo(dtype).eps * want.abs() + terms * torch.finfo(torch.float32).eps * want.abs().max()
    excess = (got.double() - want).abs() - bound - torch.finfo(dtype).tiny
    assert got.dtype == dtype and got.shape == want.shape
    assert excess.max() <= 0, f"off by {(got.double() - want).abs().max():.3g}, {excess.max():.3g} more than allowed"


@pytest.mark.parametrize("stochastic", (True, False))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("output, grad_input, grad_weight", SWITCHES)
def test_products_are_the_rounded_operands_multiplied_exactly(output, grad_input, grad_weight, dtype, stochastic):
    cfg = config(output, grad_input, grad_weight, stochastic)
    for lead, n, k in SHAPES:
        tensors = problem(lead, n, k, dtype)
        m = tensors[0].numel() // k
        int8 = (output, grad_input, grad_weight, False)
        for got, want, exact, length in zip(run(*tensors, cfg), truth(*tensors, cfg), int8, (k, n, m, m), strict=True):
            assert_one_rounding(got, want, dtype, terms=4 if exact else length)


def rounding_error(t, dim, stochastic):
    """Expected relative error of t rounded along dim: steps of absmax / 127, variance step^2 / 12, or / 6 if
    stochastic (the mean of f * (1 - f) for a fraction f spread evenly over [0, 1])."""
    step = t.double().abs().amax(dim, keepdim=True) / 127
    return (step.square() / (6 if stochastic else 12)).expand_as(t).mean() / t.double().square().mean()


@pytest.mark.parametrize("stochastic", (True, False))
def test_error_is_the_one_quantisation_theory_predicts(stochastic):
    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (torch.randn(*s, generator=generator) for s in ((320, 384), (256, 384), (320, 256)))
    bias = torch.zeros(256)
    got = run(x, weight, bias, grad, config(stochastic=stochastic))
    exact = [x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double()]
    operands = [((x, 1, False), (weight, 1, False))]
    operands += [((grad, 1, stochastic), (weight, 0, False)), ((grad, 0, stochastic), (x, 0, False))]
    for value, want, (a, b) in zip(got, exact, operands, strict=False):
        predicted = (rounding_error(*a) + rounding_error(*b)).sqrt()
        measured = (value.double() - want).norm() / want.norm()
        assert 0.95 * predicted < measured < 1.05 * predicted  # 0.9 % to 1.3 %; 1e5 elements leave no room for luck


def test_stochastic_gradients_are_unbiased():
    """Over 128 seeds, z = (mean - truth) / standard error must look normal: no |z| above 5.5, mean square near 1."""
    x, weight, bias, grad = problem((24,), 20, 40)
    grad[:, ::2] *= 1e-2  # mostly below half a step of their row: rounding to nearest loses them
    want = [grad.double() @ columns(weight), grad.double().T @ columns(x)]
    draws = [run(x, weight, bias, grad, seed=seed)[1:3] for seed in range(128)]
    for expected, samples in zip(want, map(torch.stack, zip(*draws, strict=True)), strict=True):
        samples = samples.double()
        deviation = samples.std(0)
        assert deviation.min() > 0
        z = (samples.mean(0) - expected) / deviation * 128**0.5
        assert z.abs().max() < 5.5 and 0.8 < z.square().mean() < 1.25
    nearest = run(x, weight, bias, grad, config(stochastic=False))[1].double()
    mean = torch.stack([draw[0] for draw in draws]).double().mean(0)
    assert (mean - want[0]).norm() < 0.25 * (nearest - want[0]).norm()


def test_seed_decides_the_result_whatever_the_number_of_threads():
    tensors = problem((200,), 96, 160)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(*tensors, seed=11))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))
    assert not torch.equal(results[0][1], run(*tensors, seed=12)[1])


def test_manual_seed_fixes_the_drawn_seeds():
    tensors = problem((30,), 24, 40)
    torch.manual_seed(5)
    first, second = run(*tensors, seed=None), run(*tensors, seed=None)
    torch.manual_seed(5)
    again = run(*tensors, seed=None)
    assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])
    assert not torch.equal(first[1], second[1])


def saved_bytes(function, parameters):
    """Bytes that backward keeps beyond the parameters themselves, each storage counted once."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return sum(kept.values()), y


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("output, grad_input, grad_weight", SWITCHES)
def test_saved_bytes(output, grad_input, grad_weight, dtype):
    m, n, k = 48, 40, 96
    layer = Int8TrainingLinear(k, n, config=config(output, grad_input, grad_weight), dtype=dtype)
    x = torch.randn(4, m // 4, k, dtype=dtype, requires_grad=True)
    got, y = saved_bytes(lambda: layer(x), layer.parameters())
    seed = 8 if grad_input or grad_weight else 0
    assert got == (m * k + 4 * k if grad_weight else m * k * dtype.itemsize) + seed
    y.sum().backward()

    layer.weight.requires_grad_(False)
    assert saved_bytes(lambda: layer(x), layer.parameters())[0] == (8 if grad_input else 0)


@pytest.mark.parametrize("bias", (True, False))
def test_a_layer_saves_half_of_what_bf16_saves(bias):
    m, n, k = 512, 256, 320
    linear = torch.nn.Linear(k, n, bias, dtype=torch.bfloat16)
    x = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True)
    plain = saved_bytes(lambda: linear(x), linear.parameters())[0]
    ours = Int8TrainingLinear.from_float(linear)
    got = saved_bytes(lambda: ours(x), ours.parameters())[0]
    assert plain == 2 * m * k
    assert got == plain // 2 + 4 * k + 8


def test_layers_that_read_one_activation_share_its_copy():
    m, k = 32, 64
    layers = torch.nn.ModuleList(Int8TrainingLinear(k, n, bias=False) for n in (64, 16, 16))
    leaf = torch.randn(m, k, requires_grad=True)
    x = leaf * 1  # what a norm would return

    def call():
        return [layer(x) for layer in layers]

    got, outputs = saved_bytes(call, layers.parameters())
    assert got == m * k + 4 * k + 3 * 8
    for layer, y in zip(layers, outputs, strict=True):
        y.backward(torch.ones_like(y), retain_graph=True)
        g, expected = torch.ones_like(y), columns(x.detach())
        torch.testing.assert_close(layer.weight.grad.double(), columns(g).T @ expected, rtol=1e-6, atol=1e-6)

    with torch.no_grad():
        x.mul_(2)  # a changed activation is another one
    y = layers[0](x)
    layers[0].weight.grad = None
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(layers[0].weight.grad.double(), torch.ones(64, m).double() @ columns(x.detach()))


def test_nothing_is_saved_or_drawn_without_grad():
    x, weight, bias, _ = problem((6,), 8, 16)
    before = torch.get_rng_state()
    got, y = saved_bytes(lambda: F.int8_training_linear(x, weight, bias), ())
    assert got == 0 and not y.requires_grad and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("cfg", [CONFIG, config(False, False, False)])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(cfg, dtype):
    x, weight, bias, grad = problem((12,), 24, 40)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype):
        y = F.int8_training_linear(*leaves, cfg, 7)
    y.backward(grad.to(dtype))
    want = truth(x.to(dtype), weight, bias, grad.to(dtype), cfg)
    assert y.dtype == dtype and [t.grad.dtype for t in leaves] == [torch.float32] * 3
    for got, expected in zip([y, *(t.grad for t in leaves)], want, strict=True):
        # Float products round the weight, the bias and the result to the autocast dtype; INT8 products only the result.
        tolerance = torch.finfo(dtype).eps * (1 if cfg is CONFIG else 2)
        assert (got.double() - expected).norm() < tolerance * expected.norm()


def test_non_contiguous_and_expanded_inputs():
    x, weight, bias, grad = problem((3, 5), 12, 20)
    want = run(x, weight, bias, grad)
    strided = [t.mT.contiguous().mT for t in (x, weight, grad)]
    assert not any(t.is_contiguous() for t in strided)
    got = run(strided[0], strided[1], bias, strided[2])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    ones = torch.ones((), dtype=grad.dtype).expand(grad.shape)  # what y.sum().backward() sends
    for a, b in zip(run(x, weight, bias, ones), run(x, weight, bias, ones.contiguous()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3)])
def test_vector_and_empty_batch(lead):
    x, weight, bias, grad = problem(lead, 6, 10)
    y, grad_x, grad_weight, grad_bias = run(x, weight, bias, grad)
    assert y.shape == grad.shape and grad_x.shape == x.shape
    if 0 in lead:
        assert not grad_weight.any() and not grad_bias.any() and grad_weight.shape == weight.shape
    else:
        assert all(
            torch.equal(a, b[0]) for a, b in zip((y, grad_x), run(x[None], weight, bias, grad[None])[:2], strict=False)
        )


@pytest.mark.parametrize("long", ("M", "N", "K"))
def test_contractions_that_overflow_int32_are_split(long):
    """Ones are rounded to 127, so 140,000 of them add up to more than 2^31 - 1 in the bare INT8 product."""
    length = 140_000
    assert 127 * 127 * length > 2**31
    m, n, k = (length if name == long else 2 for name in "MNK")
    tensors = torch.ones(m, k), torch.ones(n, k), torch.full((n,), 0.5), torch.ones(m, n)
    y, grad_x, grad_weight, _ = run(*tensors)
    for got, want in ((y, k + 0.5), (grad_x, n), (grad_weight, m)):
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_non_finite_values_are_never_silent(value):
    x, weight, bias, grad = problem((6,), 8, 16)
    x[2, 3], grad[4, 5] = value, value
    y, grad_x, grad_weight, _ = run(x, weight, bias, grad)
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()
    assert grad_x[4].isnan().all() and grad_x[[0, 1, 2, 3, 5]].isfinite().all()
    assert grad_weight[5].isnan().all() and grad_weight[:, 3].isnan().all()


def test_checkpointing_repeats_the_rounding():
    x, weight, bias, grad = problem((9,), 8, 16)
    gradients = []
    for wrapped in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        torch.manual_seed(1)
        call = F.int8_training_linear
        y = checkpoint(call, *leaves, use_reentrant=False) if wrapped else call(*leaves)
        y.backward(grad)
        gradients.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_second_derivative_is_refused():
    x, weight, bias, _ = (t.requires_grad_() for t in problem((3,), 4, 8))
    (grad_x,) = torch.autograd.grad(F.int8_training_linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad_x.sum().backward()


def test_opcheck():
    x, weight, bias, grad = problem((6,), 8, 16)
    seed = torch.tensor(3)
    ops = torch.ops.pykernels
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    none = (None,) * 4
    for quantized, grad_input in ((F.quantize_both(x), True), (none, False)):
        torch.library.opcheck(ops.int8_training_linear.default, (*leaves, *quantized, seed, grad_input))
    _, _, x_column, scale = F.quantize_both(x)
    backward = ops.int8_training_linear_backward.default
    for arguments in (
        (grad, weight, x_column, scale, seed, True, torch.float32),
        (grad, weight, x, None, None, False, torch.bfloat16),
        (grad, None, x_column, scale, None, True, torch.float32),
        (grad, weight, None, None, seed, True, torch.float32),
    ):
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("output, grad_input, grad_weight", [(True, True, True), (False, True, False)])
def test_compiles_to_one_graph_with_the_same_result(output, grad_input, grad_weight):
    tensors = problem((6,), 8, 16)
    cfg = config(output, grad_input, grad_weight)
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    compiled = torch.compile(F.int8_training_linear, fullgraph=True, backend="aot_eager")
    y = compiled(*leaves, cfg, 7)
    y.backward(tensors[3])
    for got, want in zip([y, *(t.grad for t in leaves)], run(*tensors, cfg), strict=True):
        assert torch.equal(got, want)


def test_compiled_layer_draws_a_new_seed_each_step_without_recompiling():
    layer = torch.nn.Sequential(torch.nn.LayerNorm(16), Int8TrainingLinear(16, 8))  # its input has a history
    x = torch.randn(6, 16, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grad = torch.randn(6, 8)
    draws = [torch.autograd.grad(compiled(x), x, grad)[0]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        draws += [torch.autograd.grad(compiled(x), x, grad)[0] for _ in range(3)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 9)}, r"expected weight to have shape \[N, 9\], with the K of x, got \[4, 8\]"),
        ({"weight": torch.ones(8)}, "expected weight to have 2 dimensions, got 1"),
        ({"bias": torch.ones(5)}, r"expected bias to have shape \[4\], got \[5\]"),
        (
            {"x": torch.ones(3, 8, dtype=torch.int8)},
            "expected x to be float32, bfloat16 or float16, got int8",
        ),
        ({"weight": torch.ones(4, 8).double()}, "expected weight to be .* got float64"),
        ({"weight": torch.ones(4, 8, device="meta")}, r"expected weight on the device of x \(cpu\), got meta"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(4, 8), "bias": torch.ones(4)} | change
    with pytest.raises(RuntimeError, match=message):
        F.int8_training_linear(**arguments)


def test_layer_shares_parameters_and_converts_back():
    linear = torch.nn.Linear(12, 6).eval()
    layer = Int8TrainingLinear.from_float(linear, config(grad_weight=False))
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert layer.state_dict().keys() == linear.state_dict().keys()
    assert "grad_weight=False" in repr(layer) and "in_features=12, out_features=6" in repr(layer)
    back = layer.to_float()
    assert type(back) is torch.nn.Linear and back.weight is linear.weight and not back.training
    x = torch.randn(4, 12)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and twin.config == layer.config
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear"):
        Int8TrainingLinear.from_float(torch.nn.Conv1d(1, 1, 1))


def test_quantize_swaps_linears_but_not_the_head():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(8, 8), "lm_head": torch.nn.Linear(8, 4)})
    weight = model.body.weight
    pykernels.quantize_(model, config(output=False))
    assert type(model.body) is Int8TrainingLinear and model.body.weight is weight
    assert not model.body.config.output and type(model.lm_head) is torch.nn.Linear
