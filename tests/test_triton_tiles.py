"""Which tiles the Triton products are offered, by the alignment of what they write."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pykernels.kernels import (
    _tuning,
    int8_block_scaled_matmul,
    int8_grouped_matmul,
    int8_matmul,
    int8_weight_only_linear,
)

pytestmark = pytest.mark.skipif(not _tuning.interpreted(), reason="with a GPU the launchers take CUDA tensors")


def codes(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.int8)


@pytest.mark.parametrize("N", [4096, 4104, 4097])
def test_an_output_off_its_alignment_gets_the_tiles_that_fit(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that tests/triton_aot_calls compiles as ragged: no launch of a larger tile with an address an element."""
    offered: dict[str, list[_tuning.Config]] = {}

    def record(op: str, key: tuple, configs: list[_tuning.Config], *_: object) -> _tuning.Config:
        offered[op] = configs
        raise StopIteration

    grouped, scaled, weighted = int8_grouped_matmul, int8_block_scaled_matmul, int8_weight_only_linear
    for module in (int8_matmul, grouped, scaled, weighted):
        monkeypatch.setattr(module, "tuned", record)
    a, b, residual = codes(512, 16).repeat(8, 1), codes(N, 16), torch.zeros(4096, N + 1)[:, :N]
    for call in (
        lambda: int8_matmul.int8_matmul(a, b),
        lambda: grouped.int8_grouped_matmul(a, b[None], torch.tensor([4096])),
        lambda: scaled.int8_block_scaled_matmul(a, b, torch.ones(4096, 1), torch.ones(-(-N // 128), 1)),
        lambda: weighted.int8_weight_only_linear(a.to(torch.bfloat16), b, torch.ones(N)),
    ):
        with pytest.raises(StopIteration):
            call()
    limit = 8192 if N == 4096 else 64
    plain = [config for _, config in int8_matmul.LARGE] + int8_matmul.CONFIGS[8192]
    assert offered["int8_matmul"] == (plain if N == 4096 else int8_matmul.RAGGED)
    assert offered["int8_grouped_matmul"] == grouped.CONFIGS[limit]
    assert offered["int8_block_scaled_matmul"] == scaled.CONFIGS[limit]
    assert offered["int8_weight_only_linear"] == weighted.CONFIGS[limit]
    with pytest.raises(StopIteration):  # an aligned output, and a residual whose rows are not
        int8_matmul.int8_matmul(a, b, residual=residual)
    assert offered["int8_matmul"] == int8_matmul.RAGGED
