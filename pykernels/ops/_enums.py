"""The integers that stand for names in operator schemas: a str argument leaks memory through the stable ABI."""

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def activation_code(op: str, activation: str | None) -> int:
    """The number of an activation's name; ValueError names what is accepted."""
    try:
        return ACTIVATIONS[activation]
    except (KeyError, TypeError):
        accepted = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"{op}: expected activation to be one of {accepted}, got {activation!r}") from None


# The first four as above; relu2 is relu squared, which has no second factor.
GATED_ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "relu2": 5}
_GELU_APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


def gelu_code(op: str, approximate: str) -> int:
    """The number of torch's name for a form of GELU; ValueError names what is accepted."""
    try:
        return GATED_ACTIVATIONS[_GELU_APPROXIMATIONS[approximate]]
    except (KeyError, TypeError):
        accepted = ", ".join(repr(name) for name in _GELU_APPROXIMATIONS)
        raise ValueError(f"{op}: expected approximate to be one of {accepted}, got {approximate!r}") from None
