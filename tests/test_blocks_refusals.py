"""What the fused blocks refuse, on every backend of the CPU: a ValueError that names the operation and the argument."""

from collections.abc import Callable

import pytest
import torch

import pykernels.functional as F
from pykernels.nn import Attention, NormLinear, SwiGLUMLP, TransformerBlock
from tests.matrix import BACKENDS, use


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


TARGET = torch.zeros(3, dtype=torch.int64)
# A wrong shape, a wrong dtype and a value out of range of each kind of operation.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "rms_norm weight": (lambda: F.rms_norm(x(3, 4), x(5)), r"expected weight .*\[4\].*got \[5\]"),
    "rms_norm dtype": (lambda: F.rms_norm(x(3, 4, dtype=torch.int32)), "expected x to be .*got int32"),
    "rms_norm residual": (lambda: F.rms_norm(x(3, 4), residual=x(2, 4)), "expected residual"),
    "rms_norm eps": (lambda: F.rms_norm(x(3, 4), eps=-1.0), "expected eps to be 0 or more, got -1.0"),
    "layer_norm bias": (lambda: F.layer_norm(x(3, 4), x(4), x(3)), r"expected bias .*got \[3\]"),
    "swiglu up": (lambda: F.swiglu(x(3, 4), x(3, 5)), "expected up"),
    "geglu approximate": (lambda: F.geglu(x(3, 4), approximate="erf"), "approximate"),
    "relu2 dtype": (lambda: F.relu2(x(3, 4, dtype=torch.int64)), "got int64"),
    "rope tables": (lambda: F.rope(x(1, 5, 2, 8), None, x(3, 4), x(3, 4)), "cos"),
    "dropout p": (lambda: F.dropout(x(3, 4), 1.5), r"p .*got 1\.5"),
    "cross_entropy target": (lambda: F.cross_entropy(x(3, 4), TARGET + 4), r"expected target .*got 4"),
    "cross_entropy shape": (lambda: F.cross_entropy(x(3, 4), TARGET[:2]), "expected target"),
    "cross_entropy smoothing": (lambda: F.cross_entropy(x(3, 4), TARGET, label_smoothing=2.0), "label_smoothing"),
    "linear_cross_entropy weight": (lambda: F.linear_cross_entropy(x(3, 4), x(7, 5), TARGET), "expected weight"),
    "linear_cross_entropy strategy": (
        lambda: F.linear_cross_entropy(x(3, 4), x(7, 4), TARGET, strategy="backward"),
        "expected strategy .*got 'backward'",
    ),
    "linear_kl_div teacher": (lambda: F.linear_kl_div(x(3, 4), x(7, 4), x(3, 4), x(6, 4)), "teacher"),
    "linear_jsd beta": (lambda: F.linear_jsd(x(3, 4), x(7, 4), x(3, 4), x(7, 4), beta=2.0), r"beta .*got 2\.0"),
    "attention heads": (lambda: F.attention(x(1, 5, 3, 8), x(1, 5, 2, 8), x(1, 5, 2, 8)), "heads"),
    "norm_linear weight": (lambda: F.norm_linear(x(3, 4), [x(7, 5)]), "expected weights"),
    "TransformerBlock save": (lambda: TransformerBlock(8, 2, intermediate_size=8, save="none"), "save: got 'none'"),
    "Attention save": (lambda: Attention(8, 2, save="some"), "save: got 'some'"),
    "SwiGLUMLP save": (lambda: SwiGLUMLP(8, 16, save=""), "save: got ''"),
    "NormLinear save": (lambda: NormLinear(8, 16, save=None), "save: got None"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_value_error_names_the_argument(name: str, backend: str) -> None:
    call, words = REFUSED[name]
    with use(backend), pytest.raises((ValueError, TypeError), match=words) as refused:
        call()
    assert "csrc" not in str(refused.value)
