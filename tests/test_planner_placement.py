"""The planner's dynamic programming against every choice there is."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_host = pytest.importorskip("pykernels._host", reason="the optional host module is not built")

option = st.tuples(*[st.integers(0, 40)] * 3, st.integers(0, 20).map(float))
layers = st.lists(st.lists(option, min_size=1, max_size=4), min_size=0, max_size=5)


def brute(layers: list, gradients: list[int], head: int, budget: int, unit: int) -> float | None:
    """The lowest cost of all combinations that fit, sizes in whole units."""
    best = None
    for choice in itertools.product(*layers):
        held, fits = 0, True
        for (saved, forward, backward, _), later in zip(choice, gradients, strict=True):
            held += math.ceil(saved / unit) * unit
            fits &= held + forward <= budget and held + later + backward <= budget
        if fits and held + head <= budget:
            cost = sum(option[3] for option in choice)
            best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=300, deadline=None)
@given(layers, st.integers(0, 40), st.integers(-5, 260), st.sampled_from([1, 3, 16]), st.data())
def test_finds_the_cheapest_of_all_choices(layers, head, budget, unit, data):
    gradients = data.draw(st.lists(st.integers(0, 40), min_size=len(layers), max_size=len(layers)))
    expected = brute(layers, gradients, head, budget, unit)
    found = _host.place_layers(layers, gradients, head, budget, unit)
    assert (found is None) == (expected is None)
    if found is None:
        return
    choices, saved, cost = found
    chosen = [layers[i][choice] for i, choice in enumerate(choices)]
    assert cost == expected == sum(option[3] for option in chosen)
    assert saved == sum(math.ceil(option[0] / unit) * unit for option in chosen)
    # What it chose fits by itself: a single option for each layer.
    assert brute([[option] for option in chosen], gradients, head, budget, unit) == cost


def test_a_hundred_unequal_layers_at_the_default_unit():
    """The size of a real search: 126 layers of six options, a budget of 32,768 units."""
    sizes = [(17, 0, 1, 0.0), (11, 0, 2, 1.0), (7, 0, 2, 2.0), (4, 1, 5, 18.0), (1, 1, 9, 33.0)]
    layers = [
        [(saved * u, forward * u, backward * u, cost + u / 1e4) for saved, forward, backward, cost in sizes]
        for u in range(1000, 1126)
    ]
    budget = 700_000
    choices, saved, cost = _host.place_layers(layers, [0] * 126, 9000, budget, max(1, budget // 32768))
    assert saved + 9000 <= budget and len(choices) == 126
    everything = _host.place_layers(layers, [0] * 126, 9000, 10**9, 10**4)
    assert everything[0] == [0] * 126 and everything[2] < cost < 126 * 34


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[(1, 1, 1, 1.0)]], [], 0, 10, 1), "gradients: expected one number for each layer"),
        (([[]], [0], 0, 10, 1), "options: expected at least one"),
        (([[(-1, 0, 0, 0.0)]], [0], 0, 10, 1), "options: expected 0 bytes or more"),
        (([], [], -1, 10, 1), "head: expected 0 bytes or more"),
        (([], [], 0, 10, 0), "unit: expected 1 byte or more"),
    ],
)
def test_refuses_what_no_layer_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        _host.place_layers(*arguments)
