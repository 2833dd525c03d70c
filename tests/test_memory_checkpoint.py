"""checkpoint_: what each policy wraps, that values and gradients stay, and that nothing else of the model changes."""

import copy
import io

import pytest
import torch
from torch import nn

from pykernels.bench.memory import saved_bytes
from pykernels.memory import checkpoint_
from pykernels.nn import SAVE


class Block(nn.Module):
    """Counts its forwards, so that a recomputation is seen; dropout, so that the RNG state matters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(size, 4 * size), nn.Linear(4 * size, size), nn.Dropout(0.3)
        self.runs = 0

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        self.runs += 1
        return x + scale * self.drop(self.down(self.up(x).relu()))


class Model(nn.Module):
    def __init__(self, layers: int = 5, size: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(size, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(layers))
        self.few = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
        self.mixed = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(size, size), nn.ReLU())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.mixed(self.few(x))


class Dial(nn.Module):
    """A layer with the dial, which passes its value on to the part of itself that accepts only some values."""

    class Part(nn.Module):
        accepts = SAVE[:4]

        def __init__(self, save: str) -> None:
            super().__init__()
            self._save = save

        @property
        def save(self) -> str:
            return self._save

        @save.setter
        def save(self, value: str) -> None:
            if value not in self.accepts:
                raise ValueError(f"expected save to be one of {self.accepts}, got {value!r}")
            self._save = value

    def __init__(self, save: str = "all") -> None:
        super().__init__()
        self.part, self.save = Dial.Part("all"), save


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    x = torch.randn(3, 8, requires_grad=True)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y, {name: p.grad.clone() for name, p in model.named_parameters()} | {"x": x.grad}


ALL = [f"layers.{i}" for i in range(5)]
POLICIES = [
    ("checkpoint", ALL),
    ("every 2nd", ["layers.1", "layers.3"]),
    ("every 3rd", ["layers.2"]),
    (("every", 1), ALL),
    (("every", 5), ["layers.4"]),
    (["layers.[03]", "few.0"], ["layers.0", "layers.3", "few.0"]),
    (("layers.*.up", "layers.2"), ["layers.0.up", "layers.1.up", "layers.2", "layers.3.up", "layers.4.up"]),
    (["layers*"], ALL),
]


@pytest.mark.parametrize(("policy", "names"), POLICIES, ids=[str(policy) for policy, _ in POLICIES])
def test_policies(policy, names: list[str]) -> None:
    """The named modules run twice, the others once; values and gradients are those of the plain model, to the bit."""
    model = Model()
    plain_y, plain_grads = run(model)
    keys, text = list(model.state_dict()), repr(model)
    report = checkpoint_(model, policy)
    assert report.checkpointed == report.changed == names and report.policy == policy
    assert list(model.state_dict()) == keys and repr(model) == text
    for layer in model.layers:
        layer.runs = 0
    y, grads = run(model)
    assert torch.equal(y, plain_y) and all(torch.equal(grads[k], plain_grads[k]) for k in plain_grads)
    assert [layer.runs for layer in model.layers] == [2 if name in names else 1 for name in ALL]
    assert checkpoint_(model, policy).changed == []  # idempotent
    assert checkpoint_(model, "none").changed == names
    assert all(type(m) is cls for m, cls in zip(model.layers, [Block] * 5, strict=True))


def test_saves_the_inputs_alone() -> None:
    model = Model().eval()
    x = torch.randn(16, 8, requires_grad=True)
    parameters = list(model.parameters())
    stack = nn.Sequential(*model.layers)
    plain = saved_bytes(lambda: stack(x), parameters)
    checkpoint_(stack, "checkpoint")
    # Five inputs of a block; a checkpoint keeps its own by reference, past the hooks, and the hooks see nothing else.
    assert saved_bytes(lambda: stack(x), parameters) <= 5 * x.nbytes < plain


def test_a_new_policy_replaces_the_old() -> None:
    model = Model()
    checkpoint_(model, "every 2nd")
    report = checkpoint_(model, "every 3rd")
    assert report.checkpointed == ["layers.2"] and report.changed == ["layers.1", "layers.2", "layers.3"]


def test_copies_and_pickles_keep_the_policy() -> None:
    model = Model()
    checkpoint_(model, "every 2nd")
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert isinstance(other.layers[1], Block) and other.layers[1].up is not model.layers[1].up
        for theirs, layer in zip(other.layers, model.layers, strict=True):
            theirs.runs = layer.runs = 0
        y, grads = run(other)
        mine_y, mine = run(model)
        assert torch.equal(y, mine_y) and all(torch.equal(grads[k], mine[k]) for k in mine)
        assert [layer.runs for layer in other.layers] == [layer.runs for layer in model.layers] == [1, 2, 1, 2, 1]
        assert checkpoint_(other, "none").changed == ["layers.1", "layers.3"]
    Model().load_state_dict(model.state_dict())


def test_without_gradients_nothing_is_recomputed() -> None:
    model = Model()
    checkpoint_(model, "checkpoint")
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert [layer.runs for layer in model.layers] == [1] * 5
    model.eval()
    assert not any(layer.training or layer.drop.training for layer in model.layers)


def test_compiles() -> None:
    torch.compiler.reset()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
    plain = run(model)
    checkpoint_(model, "checkpoint")
    y, grads = run(torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(y, plain[0])
    for name, grad in plain[1].items():
        torch.testing.assert_close(grads[name if name == "x" else f"_orig_mod.{name}"], grad)


@pytest.mark.parametrize("value", ["inputs+preact", "int8", "recompute_mlp"])
def test_the_dial_is_set_and_put_back(value: str) -> None:
    model = nn.ModuleDict({"a": Dial("all"), "b": Dial("int8"), "c": nn.Linear(2, 2)})
    report = checkpoint_(model, value)
    assert report.dialled == dict.fromkeys(("a", "a.part", "b", "b.part"), value) and not report.checkpointed
    assert model["a"].save == model["b"].save == model["b"].part.save == value
    assert checkpoint_(model, value).changed == []
    checkpoint_(model, "recompute_mlp")
    assert set(checkpoint_(model, "none").changed) == {"a", "a.part", "b", "b.part"}
    assert (model["a"].save, model["b"].save, model["b"].part.save) == ("all", "int8", "all")


def test_a_part_may_refuse_what_its_layer_accepts() -> None:
    model = nn.ModuleDict({"a": Dial("all")})
    assert checkpoint_(model, "recompute_qkv").dialled == {"a": "recompute_qkv"}
    assert model["a"].part.save == "all"


def test_a_refused_value_leaves_the_model_as_it_was() -> None:
    model = nn.ModuleDict({"a": Dial("all"), "b": Dial.Part("int8"), "layers": nn.ModuleList([nn.ReLU(), nn.ReLU()])})
    checkpoint_(model, "every 2nd")
    with pytest.raises(ValueError, match="checkpoint_: expected save to be one of"):
        checkpoint_(model, "recompute_qkv")
    assert (model["a"].save, model["a"].part.save, model["b"].save) == ("all", "all", "int8")
    assert checkpoint_(model, "every 2nd").changed == []


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("every other", 'got the policy \'every other\', accepts "none", "checkpoint"'),
        ("layers.*", "a list of module name patterns"),
        ("every 6th", "'every 6th' matches nothing: the model has 5 blocks"),
        (("every", 0), "matches nothing"),
        (["nothing.*"], "the pattern 'nothing.*' matches nothing; the model has embed"),
        (["layers"], "the pattern 'layers' matches nothing"),
        (["layers.0", "nothing"], "the pattern 'nothing' matches nothing"),
        ([], "empty list of patterns"),
        ("int8", "no module has the dial"),
        (3, "got the policy 3"),
        (None, "got the policy None"),
    ],
)
def test_bad_policies_are_named_and_change_nothing(policy, message: str) -> None:
    model = Model()
    checkpoint_(model, "every 2nd")
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        checkpoint_(model, policy)
    assert checkpoint_(model, "every 2nd").changed == []


def test_refuses_what_it_cannot_wrap() -> None:
    with pytest.raises(ValueError, match="no ModuleList or Sequential of modules of one class"):
        checkpoint_(nn.Linear(2, 2), "checkpoint")
    with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, got int"):
        checkpoint_(3, "none")
    model = Model()
    model.layers[1].forward = lambda x, scale: x
    with pytest.raises(ValueError, match=r"forward of 'layers\.1' to be that of its class"):
        checkpoint_(model, "checkpoint")


class Experts(nn.Module):
    """A layer with a list of its own, longer than that of the layers or as long."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block(4) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.experts)


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_lists_inside_every_block_are_not_the_blocks(experts: int) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Experts(experts) for _ in range(3))
    assert checkpoint_(model, "every 2nd").checkpointed == ["layers.1"]
    assert checkpoint_(nn.Sequential(*model.layers), "every 2nd").checkpointed == ["1"]


def test_lists_of_equal_claim_are_named() -> None:
    """Neither is taken in silence, and what the message proposes works."""
    model = nn.ModuleDict({name: nn.ModuleList(Block(4) for _ in range(3)) for name in ("encoder", "decoder")})
    for policy in ("checkpoint", "every 2nd"):
        with pytest.raises(ValueError, match=r"got 2 of 3 modules each: 'encoder', 'decoder'; .* \['encoder\.\*'\]"):
            checkpoint_(model, policy)
    assert all(type(block) is Block for blocks in model.values() for block in blocks)
    assert checkpoint_(model, ["encoder.*"]).checkpointed == [f"encoder.{i}" for i in range(3)]
    model["decoder"].append(Block(4))
    assert checkpoint_(model, "every 4th").checkpointed == ["decoder.3"]
