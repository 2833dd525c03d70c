"""cross_entropy, its tiles and linear_cross_entropy at the blocks they are launched with."""

import torch

EVERY, HOPPER = (80, 90, 100), (90,)


def calls():
    from pykernels.kernels.cross_entropy import cross_entropy, cross_entropy_update_
    from pykernels.kernels.cross_entropy_backward import cross_entropy_backward, cross_entropy_backward_
    from pykernels.kernels.linear_cross_entropy import linear_cross_entropy

    bf16, f32, f16 = torch.bfloat16, torch.float32, torch.float16
    target, rows = torch.zeros(8, dtype=torch.int64), torch.empty(8)
    plain, full = (-100, 0.0, 0.0, 0.0), (-100, 0.1, 1e-4, 30.0)

    def x(columns, dtype=bf16):
        return torch.empty(8, columns, dtype=dtype)

    # The largest block, a small one, and a vocabulary that ends inside a block; every option on and every option off.
    for V, dtype in ((32000, bf16), (50257, f32), (1000, f16)):
        arch = EVERY if dtype == bf16 else HOPPER
        weight = torch.empty(V)
        yield f"cross_entropy {V}", arch, None, lambda V=V, d=dtype: cross_entropy(x(V, d), target, None, *plain)
        yield (
            f"cross_entropy {V}, all options",
            arch,
            None,
            lambda V=V, d=dtype, w=weight: cross_entropy(x(V, d), target, w, *full),
        )
        yield (
            f"cross_entropy_backward {V}",
            arch,
            None,
            lambda V=V, d=dtype: cross_entropy_backward(rows, None, x(V, d), target, None, rows, *plain),
        )
        yield (
            f"cross_entropy_backward {V}, all options",
            arch,
            None,
            lambda V=V, d=dtype, w=weight: cross_entropy_backward(rows, rows, x(V, d), target, w, rows, *full),
        )
    state, one = torch.empty(8, 4), torch.empty(())
    yield (
        "cross_entropy_backward_ of a tile",
        EVERY,
        None,
        lambda: cross_entropy_backward_(one.expand(8), None, x(4096), target, None, rows, *full, 4096, 32000),
    )
    yield (
        "cross_entropy_update_",
        EVERY,
        None,
        lambda: cross_entropy_update_(state, x(4096), target, None, -100, 30.0, 4096),
    )
    yield (
        "cross_entropy_update_ with weights",
        HOPPER,
        None,
        lambda: cross_entropy_update_(state, x(333, f32), target, torch.empty(999), -100, 0.0, 333),
    )
    for dtype, H in ((bf16, 4096), (f16, 4096), (f32, 1024), (bf16, 1001), (f32, 1001)):
        yield (
            f"linear_cross_entropy {dtype} {H}",
            EVERY if dtype != f16 else HOPPER,
            None,
            lambda d=dtype, H=H: linear_cross_entropy(x(H, d), torch.empty(32000, H, dtype=d), target, None, *plain),
        )
        yield (
            f"linear_cross_entropy {dtype} {H}, all options",
            EVERY if dtype == bf16 else HOPPER,
            None,
            lambda d=dtype, H=H: linear_cross_entropy(
                x(H, d), torch.empty(50257, H, dtype=d), target, torch.empty(50257, dtype=d), *full
            ),
        )
