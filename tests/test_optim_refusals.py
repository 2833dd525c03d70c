"""Bad input: a clear error that names the parameter or the argument, and nothing changed."""

import pytest
import torch

from pykernels import optim

from .optim_matrix import equal, snapshot, train

ALL = (optim.AdamW, optim.Adam, optim.LAMB, optim.Lion, optim.SGD, optim.Adagrad, optim.RMSprop, optim.AdamW8bit)
ARGUMENTS = [
    (optim.AdamW, {"betas": (1.0, 0.9)}, r"betas\[0\] to be in \[0, 1\), got 1.0"),
    (optim.Lion, {"betas": (0.9, -0.1)}, r"betas\[1\] to be in \[0, 1\), got -0.1"),
    (optim.LAMB, {"eps": -1e-8}, "eps to be at least 0, got -1e-08"),
    (optim.LAMB, {"max_grad_norm": -1.0}, "max_grad_norm to be at least 0"),
    (optim.SGD, {"nesterov": True}, "momentum and dampening"),
    (optim.SGD, {"momentum": -0.5}, "momentum to be at least 0, got -0.5"),
    (optim.Adagrad, {"lr_decay": -0.5}, "lr_decay to be at least 0"),
    (optim.Adagrad, {"initial_accumulator_value": -1}, "initial_accumulator_value to be at least 0"),
    (optim.RMSprop, {"alpha": 1.5}, r"alpha to be in \[0, 1\], got 1.5"),
    *((cls, {"lr": -0.1}, "lr to be at least 0, got -0.1") for cls in ALL),
    *((cls, {"lr": float("nan")}, "lr to be at least 0, got nan") for cls in ALL),
    *((cls, {"lr": torch.tensor([0.1, 0.1])}, "lr to be one number") for cls in ALL),
    *((cls, {"weight_decay": -1.0}, "weight_decay to be at least 0") for cls in ALL),
    *((cls, {"differentiable": True}, "differentiable to be False") for cls in ALL),
    *((cls, {"max_unorm": -1.0}, "max_unorm") for cls in ALL),
    (optim.AdamW, {"state_bits": 4}, "state_bits to be one of 32, 16 and 8, got 4"),
    (optim.AdamW, {"rounding": "up"}, "rounding to be one of nearest, stochastic, kahan, split_master, got 'up'"),
    (optim.AdamW, {"block_size": 0}, "block_size"),
    (optim.AdamW, {"min_8bit_size": -1}, "min_8bit_size"),
]


@pytest.mark.parametrize(("cls", "kwargs", "words"), ARGUMENTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_arguments(cls: type, kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}: .*{words}"):
        cls([torch.zeros(4, requires_grad=True)], **kwargs)
    optimizer = cls([torch.zeros(4, requires_grad=True)])
    with pytest.raises(ValueError, match=words.replace(" to be", ".* of group 1 to be")):
        optimizer.add_param_group({"params": [torch.zeros(4, requires_grad=True)], **kwargs})
    assert len(optimizer.param_groups) == 1


def test_lamb_has_one_max_grad_norm() -> None:
    """Groups that differ in it are refused as they are added, and in the step where one was changed since."""
    first, second = (torch.ones(4, requires_grad=True) for _ in range(2))
    words = r"LAMB: expected max_grad_norm of group 1 to be 1.0 as of group 0.*, got 2.0"
    with pytest.raises(ValueError, match=words):
        optim.LAMB([{"params": [first]}, {"params": [second], "max_grad_norm": 2.0}], max_grad_norm=1.0)
    optimizer = optim.LAMB([{"params": [first]}], max_grad_norm=1.0)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [second], "max_grad_norm": 2.0})
    optimizer.add_param_group({"params": [second], "max_grad_norm": 1.0})
    first.grad, second.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[1]["max_grad_norm"] = 2.0
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    assert equal(before, snapshot(optimizer))


PARAMETERS = [
    (torch.zeros(4, dtype=torch.int32), {}, "torch.int32"),
    (torch.zeros(4, dtype=torch.complex64), {}, "torch.complex64"),
    (torch.zeros(4, dtype=torch.float16), {"rounding": "stochastic"}, "bfloat16 or float32"),
    (torch.zeros(4, dtype=torch.float16), {"rounding": "split_master"}, "bfloat16 or float32"),
    (torch.zeros(1).expand(4), {}, "do not share memory"),
]


@pytest.mark.parametrize(("param", "kwargs", "words"), PARAMETERS, ids=str)
def test_parameters(param: torch.Tensor, kwargs: dict, words: str) -> None:
    good = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=f"parameter 1 of group 0 .*{words}"):
        optim.AdamW([good, param], **kwargs)
    with pytest.raises(ValueError, match=f"parameter 'bad' .*{words}"):
        optim.AdamW([("good", good), ("bad", param)], **kwargs)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_sparse_gradients(cls: type) -> None:
    """Refused in the first step and in a later one; the dense parameter before it is not changed either."""
    dense, table = torch.ones(4, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    optimizer = cls([("dense", dense), ("table", table)], lr=0.1)
    for _ in range(2):
        before = snapshot(optimizer)
        dense.grad = torch.ones(4)
        table.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (5, 3))
        with pytest.raises(RuntimeError, match=r"the gradient of parameter 'table' to be dense.*sparse"):
            optimizer.step()
        assert equal(before, snapshot(optimizer))
        table.grad = torch.ones(5, 3)
        optimizer.step()


def test_names_are_optional() -> None:
    params = [torch.ones(5, 3, requires_grad=True) for _ in range(3)]
    optimizer = optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, 1)
    params[2].grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (5, 3))
    with pytest.raises(RuntimeError, match="parameter 1 of group 1"):
        optimizer.step()


def test_8bit_names_take_no_other_width() -> None:
    with pytest.raises(TypeError, match="state_bits"):
        optim.AdamW8bit([torch.zeros(4, requires_grad=True)], state_bits=32)
