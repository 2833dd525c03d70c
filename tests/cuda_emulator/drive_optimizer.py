"""Run in a process of its own by test_cuda_optimizer.py: the CUDA optimizer_update_ on the CPU, by the emulator."""

from __future__ import annotations

import sys
import warnings

import torch

warnings.simplefilter("ignore")
import pykernels  # noqa: E402, F401
from tests.optimizer_lists import RULES, Call, assert_equal, reference  # noqa: E402

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
op = torch.ops.pykernels.optimizer_update_
done = 0


def check(steps: int = 1, ratio=None, found_inf=None, grad_scale=None, **how) -> None:
    global done
    ours, theirs = Call(**how), Call(**how)
    given = {
        "ratio": None if ratio is None else torch.linspace(*ratio, len(ours.params)),
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale),
        "found_inf": None if found_inf is None else torch.tensor(found_inf),
    }
    for _ in range(steps):
        ours.run(op, **given)
        theirs.run(reference(), **given)
    if how.get("param") == F64:  # PyTorch's float64 roots are not correctly rounded
        torch.testing.assert_close(ours.written(), theirs.written(), rtol=4 * torch.finfo(F64).eps, atol=0)
    else:
        assert_equal(ours.written(), theirs.written())
    done += 1


def rules() -> None:
    for (rule, flags, decay), state in ((r, s) for r in RULES for s in ("float32", "codes")):
        ratio = (0.1, 2.0) if rule == "lamb" else None
        check(rule=rule, flags=flags, weight_decay=decay, state=state, ratio=ratio)


def kinds() -> None:
    adamw = {"rule": "adam", "flags": "decoupled", "weight_decay": 0.1}
    for rounding in ("nearest", "stochastic", "kahan", "split_master"):
        for state, grad in (("float32", BF16), ("bfloat16", F32), ("codes", BF16)):
            check(**adamw, param=BF16, grad=grad, state=state, rounding=rounding)
    for param, grad, state, rounding in (
        (F16, F32, "float32", "kahan"), (F16, F16, "codes", "nearest"), (F32, F16, "bfloat16", "stochastic"),
        (F32, F32, "float32", "kahan"), (F64, F64, "float64", "nearest"), (F64, F32, "float64", "nearest"),
        (BF16, F64, "codes", "stochastic"),
    ):  # fmt: skip
        check(**adamw, param=param, grad=grad, state=state, rounding=rounding)


def sizes() -> None:
    """Blocks of more than one chunk and of parts of one; tensors of more than one thread block, and of two launches."""
    for block_size, shapes in ((512, [(2, 1100)]), (256, [(3, 256), (2, 600)]), (100, [(3, 300)]), (1, [(2, 17)])):
        check(rule="adam", state="codes", param=BF16, rounding="stochastic", block_size=block_size, shapes=shapes)
    check(rule="sgd", flags="momentum", shapes=[(9000,), (3,), (8192,)], param=BF16, rounding="stochastic")
    check(rule="lamb", shapes=[(i + 1,) for i in range(25)], ratio=(0.1, 2.0), steps=2)
    check(rule="adam", shapes=[])


def scalars() -> None:
    for step in (1, 999, 123_456):
        check(rule="adam", step=step)
        check(rule="adagrad", step=step)
    check(rule="adam", state="codes", grad_scale=1024.0, found_inf=0.0, steps=2)
    call = Call(rule="adam")
    before = call.written()
    for found in (1.0, float("nan")):
        call.run(op, found_inf=torch.tensor(found, dtype=F64))
    assert_equal(call.written(), before)


def shards() -> None:
    """Rows and columns of a tensor round as the whole does."""
    how = {"rule": "adam", "param": BF16, "rounding": "stochastic", "state": "bfloat16"}
    whole = Call(shapes=[(6, 64)], place=[5, 0, 64], **how)
    cuts = [(slice(2, 6), slice(None), 128), (slice(None), slice(0, 24), 0), (slice(None), slice(24, 63), 24)]
    parts = []
    for rows, columns, start in cuts:
        part = Call(shapes=[(6, 64)], place=[5, start, 64], **how)
        for tensors in (part.params, part.grads, part.states):
            tensors[:] = [t[rows, columns].contiguous() for t in tensors]
        part.run(op)
        parts.append(part)
    whole.run(op)
    for part, (rows, columns, _) in zip(parts, cuts, strict=True):
        assert_equal(part.params + part.states, [t[rows, columns] for t in whole.params + whole.states])


def unusual() -> None:
    for state in ("float32", "bfloat16", "codes"):
        for bad in (float("nan"), float("inf"), 0.0, 1e-25):
            calls = [Call(rule="adam", state=state, param=BF16, rounding="stochastic") for _ in range(2)]
            for call, run in zip(calls, (op, reference()), strict=True):
                for g in call.grads:
                    g[...] = bad if bad in (0.0, 1e-25) else g
                    g.view(-1)[: g.numel() // 3 : 7] = bad
                call.run(run)
            assert_equal(calls[0].written(), calls[1].written())


def refusals() -> None:
    def refused(word: str, change) -> None:
        global done
        call = Call(rule="adam", state="codes", param=BF16, rounding="split_master")
        change(call)
        said = []
        for run in (op, reference()):
            before = call.written()
            try:
                call.run(run)
            except RuntimeError as error:
                said.append(str(error).split("\n")[0].replace("torch.", "").strip())
            assert_equal(call.written(), before)
        assert len(said) == 2 and word in said[1], said
        assert said[1].split(", got")[0] in said[0], said
        done += 1

    def put(name: str, i: int, tensor) -> object:
        return lambda call: getattr(call, name).__setitem__(i, tensor(getattr(call, name)[i]))

    refused("states to have", lambda call: call.states.pop())
    refused("scales to have 0 or", lambda call: call.scales.pop())
    refused("extras to have", lambda call: call.extras.clear())
    refused("params[1]", put("params", 1, lambda t: t.float()))
    refused("grads[0]", put("grads", 0, lambda t: t.int()))
    refused("grads[0]", put("grads", 0, lambda t: t[:2].contiguous()))
    refused("states[2]", put("states", 2, lambda t: t.float()))
    refused("scales[0]", put("scales", 0, lambda t: t[:, :1].contiguous()))
    refused("extras[0]", put("extras", 0, lambda t: t.int()))
    refused("steps[1]", put("steps", 1, lambda t: t.double()))
    refused("place", lambda call: call.place.append(3))
    refused("block_size", lambda call: setattr(call, "block_size", 0))
    refused("scales[0]", lambda call: setattr(call, "block_size", 128))


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    for part in (rules, kinds, sizes, scalars, shards, unusual, refusals):
        part()
    print(f"compared {done}")
