"""State: its bytes, when it is taken, and how it is saved and loaded."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import optim
from pykernels.bench.memory import peak_bytes

from .optim_matrix import equal, parameters, snapshot, train

CLASSES = ("AdamW", "Adam", "LAMB", "Lion", "SGD", "Adagrad", "RMSprop")
KINDS: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    *((name, torch.float32, {}) for name in CLASSES),
    *((name, torch.bfloat16, {"state_bits": 8, "rounding": "kahan"}) for name in CLASSES),
    ("AdamW", torch.bfloat16, {"state_bits": 16, "rounding": "split_master", "amsgrad": True}),
    ("AdamW8bit", torch.bfloat16, {"rounding": "stochastic", "block_size": 32}),
    ("Adam8bit", torch.float32, {"amsgrad": True}),
    ("LAMB8bit", torch.float32, {}),
    ("Lion8bit", torch.float16, {"rounding": "kahan"}),
    ("SGD", torch.float32, {"momentum": 0.9, "state_bits": 8}),
    ("RMSprop", torch.float32, {"momentum": 0.9, "centered": True, "state_bits": 8}),
]
IDS = [f"{name}-{str(dtype)[6:]}-{'-'.join(map(str, kwargs.values()))}" for name, dtype, kwargs in KINDS]
SMALL = {"min_8bit_size": 512}


@pytest.mark.parametrize(("name", "dtype", "kwargs"), KINDS, ids=IDS)
def test_bytes_are_the_formula(name: str, dtype: torch.dtype, kwargs: dict) -> None:
    cls = getattr(optim, name)
    params = parameters(dtype)
    optimizer = cls(params, **kwargs, **SMALL)
    optimizer.init_states()
    for p in params:
        held = sum(v.nbytes for v in optimizer.state[p].values())
        assert held == optim.state_bytes(p.shape, dtype, cls, **kwargs, **SMALL)


@pytest.mark.parametrize(
    ("dtype", "kwargs", "bytes_each"),
    [
        (torch.float32, {}, 8.0),
        (torch.bfloat16, {"state_bits": 16}, 4.0),
        (torch.bfloat16, {"state_bits": 8}, 2 + 8 / 256),
        (torch.bfloat16, {"state_bits": 8, "rounding": "split_master"}, 4 + 8 / 256),
        (torch.float32, {"amsgrad": True}, 12.0),
    ],
)
def test_bytes_an_element(dtype: torch.dtype, kwargs: dict, bytes_each: float) -> None:
    """The numbers of docs/optimizers.md, at a shape whose rows are whole blocks; 4 more for the step."""
    assert optim.state_bytes((4096, 4096), dtype, **kwargs) == 4096**2 * bytes_each + 4


@pytest.mark.parametrize("kwargs", [{}, {"state_bits": 8}, {"state_bits": 16}], ids=str)
@pytest.mark.parametrize("early", [False, True])
def test_the_first_step_takes_state_and_at_most_one_tensor(kwargs: dict, early: bool) -> None:
    params = [torch.randn(256, 1024, requires_grad=True) for _ in range(4)]
    optimizer = optim.AdamW(params, **kwargs)
    state = sum(optim.state_bytes(p.shape, **kwargs) for p in params)
    if early:
        assert peak_bytes(optimizer.init_states, torch.device("cpu")) == pytest.approx(state, rel=1e-2)
        state = 0
    for p in params:
        p.grad = torch.randn_like(p)
    assert peak_bytes(optimizer.step, torch.device("cpu")) <= state + params[0].nbytes


def test_init_states_changes_nothing_later() -> None:
    results = []
    for early in (False, True):
        params = parameters()
        optimizer = optim.AdamW8bit(params, **SMALL)
        if early:
            optimizer.init_states()
            assert all(optimizer.state[p]["step"] == 0 for p in params)
        results.append(train(optimizer, params, 3))
    assert equal(*results)


def _through_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("name", "dtype", "kwargs"), KINDS, ids=IDS)
def test_state_dict_round_trip(name: str, dtype: torch.dtype, kwargs: dict) -> None:
    """Saved to a file, loaded into a new optimizer, copied and pickled: each goes on exactly as the first does."""
    cls = getattr(optim, name)
    params = parameters(dtype)
    first = cls(params, **kwargs, **SMALL)
    train(first, params, 2)
    saved = _through_file(first.state_dict())
    twins: list[tuple[Any, list[Tensor]]] = []
    for _ in range(2):
        own = [p.detach().clone().requires_grad_() for p in params]
        twins.append((cls(own, **kwargs, **SMALL), own))
    twins[0][0].load_state_dict(saved)
    twins[1][0].init_states()
    twins[1][0].load_state_dict(first.state_dict())
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        twins.append((copied, copied.param_groups[0]["params"]))
    want = train(first, params, 2, first=2)
    for optimizer, own in twins:
        assert equal(train(optimizer, own, 2, first=2), want)
        for p, q in zip(params, own, strict=True):
            for key, value in first.state[p].items():
                assert optimizer.state[q][key].dtype == value.dtype and torch.equal(optimizer.state[q][key], value)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("AdamW", {"amsgrad": True}),
        ("Adam", {}),
        ("Adagrad", {}),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
        ("SGD", {"momentum": 0.9}),
        ("SGD", {}),
    ],
)
@pytest.mark.parametrize("ours_first", [False, True])
def test_torchs_state_dicts_load_and_ours_load_into_torchs(name: str, kwargs: dict, ours_first: bool) -> None:
    """Training goes on as if the optimizer had never been changed, within the ulps that test_optim_parity allows."""
    classes = [getattr(torch.optim, name), getattr(optim, name)]
    if ours_first:
        classes.reverse()
    params = parameters()
    before = classes[0](params, **kwargs)
    train(before, params, 3)
    own = [p.detach().clone().requires_grad_() for p in params]
    after = classes[1](own, **kwargs)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for got, want in zip(train(after, own, 3, first=3), train(before, params, 3, first=3), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def _broken() -> dict[str, Any]:
    """Ways to spoil a state_dict of AdamW(state_bits=8) over `parameters()`, each with words of the error."""

    def tensor(key: str, value: Tensor) -> Any:
        return lambda sd: sd["state"][2].__setitem__(key, value)

    def group(**values: Any) -> Any:
        return lambda sd: sd["param_groups"][0].update(values)

    return {
        "state_bits": (group(state_bits=32), "state_bits=8, got 32"),
        "block_size": (group(block_size=64), "block_size=256, got 64"),
        "rounding": (group(rounding="kahan"), "rounding='nearest', got 'kahan'"),
        "lr": (group(lr=-1.0), "lr"),
        "codes": (tensor("exp_avg", torch.zeros(129, 33)), "third.* exp_avg in torch.int8, got torch.float32"),
        "shape": (tensor("exp_avg_sq", torch.zeros(3, 33, dtype=torch.uint8)), r"third.*\[129, 33\], got \[3, 33\]"),
        "scale": (tensor("exp_avg_scale", torch.zeros(129, 2)), r"third.*exp_avg_scale of shape \[129, 1\]"),
        "missing": (lambda sd: sd["state"][2].pop("exp_avg_sq_scale"), "third.*exp_avg_sq_scale"),
        "groups": (lambda sd: sd["param_groups"].append({"params": []}), "1 parameter groups"),
        "count": (lambda sd: sd["param_groups"][0]["params"].pop(), "6 parameters"),
    }


@pytest.mark.parametrize("what", _broken())
def test_a_wrong_state_dict_is_refused_and_changes_nothing(what: str) -> None:
    names = ("first", "second", "third", "fourth", "fifth", "sixth")
    params = parameters()
    optimizer = optim.AdamW(zip(names, params, strict=True), state_bits=8, **SMALL)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    change, words = _broken()[what]
    change(saved)
    before, groups = (
        snapshot(optimizer),
        copy.deepcopy({k: v for k, v in optimizer.param_groups[0].items() if k != "params"}),
    )
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert equal(before, snapshot(optimizer))
    assert groups == {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    train(optimizer, params, 1)


def test_loading_copies() -> None:
    """Two optimizers never share a tensor through a state_dict, as torch's do."""
    params = parameters()
    first = optim.AdamW(params)
    train(first, params, 1)
    other = optim.AdamW([p.detach().clone().requires_grad_() for p in params])
    other.load_state_dict(first.state_dict())
    mine = {v.data_ptr() for s in first.state.values() for v in s.values() if v.numel()}
    assert not mine & {v.data_ptr() for s in other.state.values() for v in s.values() if v.numel()}
