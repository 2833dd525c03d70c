"""What a kernel that multiplies no matrices moves and computes: bytes and operations of one tile of elements.

Of a Triton kernel both are counted. Bytes are the launch's tensors, each read or written once, shared out by elements;
kernels that find their tensors in a table of addresses are counted by the tile's own loads and stores. Operations are
those of Triton's first intermediate code, before anything is unrolled, with the body of a loop taken once for its tile:
an addition, a multiplication, a comparison or a fused pair is one, an operation on float64 two; an exponential, a
logarithm, a root, a quotient and an erf are special. Integer arithmetic, conversions and addresses are not counted.

Of a CUDA kernel they are modelled by what its source says.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from math import prod

ARITHMETIC = re.compile(
    r"= (arith\.(?:addf|subf|mulf|negf|cmpf|maxnumf|minnumf|maximumf|minimumf)|math\.(?:fma|absf|floor)|tt\.clampf)\b"
)
SPECIAL = re.compile(
    r"= (arith\.divf|math\.(?:exp2?|log2?|sqrt|rsqrt|erf|sin|cos|tanh)"
    r"|tt\.(?:precise_divf|precise_sqrt|extern_elementwise))\b"
)
INTEGER = re.compile(r"= arith\.(?:addi|muli)\b")
# Whose sums are integers.
INTEGER_PRODUCTS = ("_int8_linear_row",)
# Read and written. All other tensors of a launch are one or the other.
IN_PLACE = {("_cross_entropy_update", "state_ptr")}
# The tensor whose elements are counted, where it is not the largest.
COUNTED = {"_reduce": "out_ptr", "_finish": "loss_ptr"}


@dataclass(frozen=True)
class Traffic:
    """Of one tile: its elements, the bytes they move, and operations on them of both kinds."""

    elements: float
    bytes: float
    operations: float
    special: float


def _type_at_the_end(line: str) -> tuple[int, str]:
    """(elements, type of one) of what a line of code works on: its last type, of `(operands) -> result` the first."""
    types = line.rpartition(" : ")[2].partition(" -> ")[0]
    tensor = re.search(r"tensor<((?:\d+x)*)(!tt\.ptr<\w+>|\w+)", types)
    if tensor:
        return prod(int(size) for size in tensor[1].split("x")[:-1]), tensor[2]
    scalar = re.search(r"(!tt\.ptr<\w+>|\w+)", types)
    return 1, scalar[1] if scalar else ""


def _element_bytes(kind: str) -> int:
    width = re.search(r"(\d+)", kind.removeprefix("!tt.ptr<"))
    return max(1, int(width[1]) // 8) if width else 1


def _weight(kind: str) -> int:
    return 2 if kind == "f64" else 1


def of_code(kernel: str, code: str) -> tuple[int, float, float, float]:
    """(elements of the largest access, bytes of all of them, operations, special ones) of Triton's first code."""
    largest, moved, operations, special = 1, 0.0, 0.0, 0.0
    inside: list[float] = []  # of each reduction that a line lies in, the operations a step of it takes
    for line in re.sub(r" loc\(.*", "", code, flags=re.M).splitlines():
        if re.search(r"tt\.(load|store|atomic_rmw)\b", line):
            count, kind = _type_at_the_end(line)
            largest = max(largest, count)
            moved += count * _element_bytes(kind)
        elif re.search(r"\"tt\.(reduce|scan)\"", line):
            inside.append(0.0)
        elif inside and line.lstrip().startswith("})"):
            operations += inside.pop() * _type_at_the_end(line)[0]
        elif ARITHMETIC.search(line) or (kernel in INTEGER_PRODUCTS and INTEGER.search(line) and "xi32>" in line):
            count, kind = _type_at_the_end(line)
            if inside:
                inside[-1] += _weight(kind)
            else:
                operations += count * _weight(kind)
        elif SPECIAL.search(line):
            count, kind = _type_at_the_end(line)
            special += count * _weight(kind)
    return largest, moved, operations, special


def of_launch(kernel: str, tensors: dict[str, list[int]], programs: int, code: str) -> dict[str, float]:
    """The tile of a launch: a program where no loop is in its code, else what the largest access takes at a time."""
    largest, moved, operations, special = of_code(kernel, code)
    if "table_ptr" in tensors:
        return asdict(Traffic(largest, moved, operations, special))
    name = COUNTED.get(kernel) or max(tensors, key=lambda name: tensors[name][0])
    whole = tensors[name][0]
    # The rotation takes either half of its pairs by itself.
    elements = largest * (2 if kernel == "_rope" else 1) if "scf.for" in code else whole / programs
    launch = sum(n * size * (2 if (kernel, name) in IN_PLACE else 1) for name, (n, size) in tensors.items())
    return asdict(Traffic(elements, launch * elements / whole, operations, special))


def _arguments(name: str) -> tuple[str, list[str]]:
    kernel, _, rest = name.partition("<")
    return kernel, [part.strip() for part in rest.rstrip(">").split(",")] if rest else []


BYTES = {"float": 4, "double": 8, "Half": 2, "BFloat16": 2}
VECTOR = 16  # bytes a thread reads at a time


def of_cuda(name: str, threads: int) -> dict[str, float] | None:
    """The tile of a kernel of csrc/cuda by its short name, and by the threads of a block; None of a product."""
    kernel, arguments = _arguments(name)
    found: Traffic | None = None
    if kernel in ("quantize_resident", "quantize_two_reads"):
        size = BYTES[arguments[0]]
        resident = kernel == "quantize_resident"
        vectors = int(arguments[1]) if resident else 1
        aligned = resident or arguments[1] == "true"
        elements = threads * vectors * (VECTOR // size if aligned else 1)
        stochastic = arguments[-1] == "true"
        # Scaled, clamped from both sides, rounded by adding; the uniform is scaled and added. x once: a second read of
        # a row finds it in L2. A scale a row adds less than a thousandth.
        found = Traffic(elements, elements * (size + 1), elements * (4 + 2 * stochastic), 0)
    elif kernel == "int8_row_sum_kernel":
        found = Traffic(threads, threads, threads, 0)
    elif kernel == "weight_only_fma":
        # A step: a warp's 32 lanes take 16 weights each, by kM rows of x, which all blocks share.
        weights = threads * VECTOR
        found = Traffic(weights, weights, weights * (1 + int(arguments[1])), 0)
    elif kernel == "optimizer_kernel":
        found = _adam(threads, arguments[0], arguments[1] == "true")
    elif kernel == "optimizer_prepare":
        # A tensor's step read and written and its six coefficients, by a power each for two of them.
        found = Traffic(threads, threads * (4 + 4 + 6 * 8), threads * 2 * 8, threads * 2 * 4)
    return None if found is None else asdict(found)


def _adam(threads: int, kind: str, codes: bool) -> Traffic:
    """Adam, whose two states are the most that a rule with one pass keeps. The types are known at run time only: float
    parameters and gradients, and states of the same type, or of one byte and a float32 scale for 256.

    p and both states are read and written, g read. Two running means are 2 operations each and a square, the update a
    quotient, a root and 3; a code costs a comparison with its block's largest, a product either way and a rounding.
    """
    size, elements = BYTES[kind], threads * 8
    weight = 2 if kind == "double" else 1
    states = 2 * 2 * (1 + 4 / 256 if codes else size)
    operations = (2 * 2 + 1 + 3) * weight + (2 * 4 if codes else 0)
    return Traffic(elements, elements * (3 * size + states), elements * operations, elements * 2 * weight)
