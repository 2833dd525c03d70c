"""The integers that stand for names in operator schemas: a str argument leaks memory through the stable ABI."""

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def activation_code(op: str, activation: str | None) -> int:
    """The number of an activation's name; ValueError names what is accepted."""
    try:
        return ACTIVATIONS[activation]
    except (KeyError, TypeError):
        accepted = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"{op}: expected activation to be one of {accepted}, got {activation!r}") from None
