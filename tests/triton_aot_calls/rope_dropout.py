"""rope and dropout: the head sizes in use, both pairings, a dimension that passes through; each way dropout reads."""

from collections.abc import Iterator


def calls() -> Iterator[tuple]:
    import torch

    from pykernels.kernels.dropout import dropout
    from pykernels.kernels.rope import rope

    every, hopper = (80, 90, 100), (90,)
    bf16, f32 = torch.bfloat16, torch.float32

    def turn(heads, kv_heads, dim, rotary, dtype=bf16, ids=True, **how):
        packed = torch.empty(2, 64, heads + 2 * kv_heads, dim, dtype=dtype)
        k = packed[:, :, heads : heads + kv_heads] if kv_heads else None
        table = torch.empty(128, rotary // 2)
        positions = torch.empty(2, 64, dtype=torch.int64) if ids else None
        return rope(packed[:, :, :heads], k, table, table, positions, **how)

    for interleaved in (False, True):
        name = "rope interleaved" if interleaved else "rope half"
        yield f"{name} 128", every, None, lambda i=interleaved: turn(32, 8, 128, 128, interleaved=i)
        yield (
            f"{name} 64 inverse",
            hopper,
            None,
            lambda i=interleaved: turn(12, 12, 64, 64, interleaved=i, inverse=True),
        )
        yield f"{name} partial float32", hopper, None, lambda i=interleaved: turn(32, 32, 80, 20, f32, interleaved=i)
        yield (
            f"{name} 256 query alone",
            every,
            None,
            lambda i=interleaved: turn(16, 0, 256, 256, f32, False, interleaved=i),
        )

    key = torch.tensor([2**40, 7])
    x, wide = torch.empty(64, 4096, dtype=bf16), torch.empty(64, 4096)
    yield "dropout", every, None, lambda: dropout(x, None, 0.1, key)
    yield "dropout residual float32", every, None, lambda: dropout(x, wide, 0.1, key)
    yield "dropout small key", hopper, None, lambda: dropout(wide, wide, 0.1, torch.tensor([3, 0]))
    yield "dropout rows", hopper, None, lambda: dropout(torch.empty(64, 5000, dtype=bf16)[:, :4096], x, 0.1, key)
    yield "dropout odd rows", every, None, lambda: dropout(torch.empty(64, 5000, dtype=bf16)[:, :4095], None, 0.1, key)
