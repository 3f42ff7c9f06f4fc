"""Student, critic and real score in one module: who says what, who learns, what it takes of memory."""

import copy

import pytest
import torch

from edgedit_hf import EdgeDiTTransformer2DModel, ElasticDiTTransformer2DModel
from edgedit_hf.few_step.cost import memory_lines
from edgedit_hf.few_step.networks import (
    CRITIC,
    REAL,
    STUDENT,
    Networks,
    guide,
    is_elastic,
    joined,
    predict,
    separate_bytes,
)

ROLES = (STUDENT, CRITIC, REAL)
T = {"edgedit": torch.tensor([10, 300, 700, 900]), "elastic": torch.tensor([10.0, 300.5, 700.0, 1000.0])}


@pytest.fixture(params=[True, False], ids=["adapters", "full"])
def shared(request) -> bool:
    return request.param


def networks_of(family, shared: bool, critic: bool = True) -> Networks:
    return Networks(family.model, shared, critic, rank=4, alpha=8.0)


@torch.no_grad()
def said(networks, family, role: str, subnet=None) -> torch.Tensor:
    piece = family.piece([0, 1, 2, 3])
    return networks(role, piece.noise, T[family.name], piece.condition, subnet=subnet)[0]


@torch.no_grad()
def plainly(model, family, subnet=None) -> torch.Tensor:
    """Without anything of ours around the net."""
    piece = family.piece([0, 1, 2, 3])
    asked = {} if subnet is None else {"subnet": subnet}
    return model(piece.noise, T[family.name], **piece.condition, **asked).sample[:, :1]


def test_all_begin_as_the_many_step_net(family, shared):
    networks = networks_of(family, shared)
    for width in family.widths:
        wanted = plainly(family.pipeline.transformer, family, width)
        for role in ROLES:
            torch.testing.assert_close(said(networks, family, role, width), wanted, rtol=1e-5, atol=1e-5)
    assert is_elastic(networks.net(STUDENT)) == (family.name == "elastic")


@pytest.mark.parametrize("shared", [True, False], ids=["adapters", "full"])
@pytest.mark.parametrize("role", [STUDENT, CRITIC])
def test_what_one_learns_changes_no_other(families, shared, role):
    family = families["edgedit"]
    networks = networks_of(family, shared)
    before = {one: said(networks, family, one) for one in ROLES}
    frozen = {name: value.clone() for name, value in networks.state_dict().items()}
    piece = family.piece([0, 1, 2, 3])
    optimizer = torch.optim.AdamW([p for _, p in networks.trained(role)], lr=1e-2)
    for _ in range(2):  # an adapter's A moves only once B is not zero
        networks(role, piece.noise, T[family.name], piece.condition)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {name for name, p in networks.named_parameters() if p.grad is not None} == set()
    assert (said(networks, family, role) - before[role]).abs().max() > 1e-3
    for other in set(ROLES) - {role}:
        assert torch.equal(said(networks, family, other), before[other])
    changed = {name for name, value in networks.state_dict().items() if not torch.equal(value, frozen[name])}
    assert changed and changed <= {name for name, _ in networks.trained(role)}
    assert [name for name, _ in networks.trained(role)] == [
        name for name, p in networks.named_parameters() if any(p is q for _, q in networks.trained(role))
    ]


def test_the_finished_net_is_the_student_and_knows_no_adapters(family, shared, disturb):
    networks = networks_of(family, shared)
    for seed, role in enumerate((STUDENT, CRITIC)):
        disturb([p for _, p in networks.trained(role)], seed)
    model = copy.deepcopy(networks).finished()
    assert model.state_dict().keys() == family.pipeline.transformer.state_dict().keys()
    assert type(model) is type(family.pipeline.transformer) and all(p.requires_grad for p in model.parameters())
    for width in family.widths:
        wanted = said(networks, family, STUDENT, width)
        torch.testing.assert_close(plainly(model, family, width), wanted, rtol=1e-4, atol=1e-4)
        if width not in (None, family.widths[-1]):
            alone = model.extract_subnet(width)
            torch.testing.assert_close(plainly(alone, family), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - said(networks, family, REAL, width)).abs().max() > 1e-2


def test_a_twin_takes_over_everything(families, shared, disturb):
    family = families["elastic"]
    networks = networks_of(family, shared)
    disturb([p for role in (STUDENT, CRITIC) for _, p in networks.trained(role)])
    twin = networks.twin()
    twin.load_state_dict(networks.state_dict())
    for role in ROLES:
        torch.testing.assert_close(said(twin, family, role), said(networks, family, role))


@pytest.mark.parametrize("critic", [True, False])
def test_memory_is_what_the_optimiser_holds(family, shared, critic):
    networks = networks_of(family, shared, critic)
    piece, roles = family.piece([0, 1, 2, 3]), networks.roles
    assert roles == ((STUDENT, CRITIC) if critic else (STUDENT,))
    memory = networks.memory()
    optimizers = {role: torch.optim.AdamW([p for _, p in networks.trained(role)]) for role in roles}
    for width in family.widths:
        for role in roles:
            networks(role, piece.noise, T[family.name], piece.condition, subnet=width)[0].sum().backward()
    held = 0
    for role, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)  # those of a text that none of these calls has, too
        optimizer.step()
        moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        assert memory[f"{role}: optimiser"] == sum(value.nbytes for value in moments)
        assert memory[f"{role}: weights"] == sum(p.nbytes for _, p in networks.trained(role))
        held += memory[f"{role}: weights"]
    whole = sum(p.nbytes for p in networks.parameters())
    assert memory["frozen weights"] == whole - held
    assert memory["student: moving average"] == memory["student: weights"]
    weights = sum(p.numel() for p in family.pipeline.transformer.parameters())
    if not shared:
        assert sum(memory.values()) == separate_bytes(weights, critic)


@pytest.mark.parametrize("preset", ["DiT-XL/2", pytest.param("elastic-dit-1.6b", marks=pytest.mark.slow)])
def test_adapters_take_a_quarter_of_nets_of_their_own(preset):
    """Of the rank that is the default, on the meta device: the issue's bar."""
    kind = EdgeDiTTransformer2DModel if preset.startswith("DiT") else ElasticDiTTransformer2DModel
    with torch.device("meta"):
        model = kind.from_preset(preset)
        weights = sum(p.numel() for p in model.parameters())
        networks = Networks(model, True, True)
    separate = 4 * weights * (3 + 2 * 2 + 1)  # three nets, two moments each of two, the student's average
    assert separate_bytes(weights) == separate
    assert sum(networks.memory().values()) <= 0.25 * separate
    *_, last = memory_lines(networks, weights)
    assert float(last.split(":")[1].split()[0]) <= 0.25 and f" {separate / 1e9:.3g} GB:" in last


# -------------------------------------------------------------------- a call


def test_guidance_is_of_the_first_channels():
    generator = torch.Generator().manual_seed(0)
    with_, without = torch.randn(2, 3, 4, 8, 8, generator=generator)
    torch.testing.assert_close(guide(with_, without, 3.0), without + 3 * (with_ - without))
    some = guide(with_, without, 3.0, 3)
    torch.testing.assert_close(some[:, :3], guide(with_, without, 3.0)[:, :3])
    assert torch.equal(some[:, 3:], with_[:, 3:])


def test_a_guided_call_is_two_calls(family):
    model, piece, t = family.pipeline.transformer, family.piece([0, 1]), T[family.name][:2]
    with torch.no_grad():
        guided, tokens = predict(model, piece.noise, t, piece.condition, piece.null, 3.0, features=True)
        with_, alone = predict(model, piece.noise, t, piece.condition, features=True)
        without, none = predict(model, piece.noise, t, piece.null)
        unguided, _ = predict(model, piece.noise, t, piece.condition, piece.null, 1.0)
    torch.testing.assert_close(guided, guide(with_, without, 3.0), rtol=1e-4, atol=1e-5)
    assert (tokens - alone).norm() < 1e-4 * alone.norm()
    assert torch.equal(unguided, with_) and none is None


def test_absent_texts_stay_absent():
    first = {"a": [torch.zeros(2, 3), None], "b": torch.zeros(2), "c": None}
    both = joined(first, {"a": [torch.ones(2, 3), None], "b": torch.ones(2), "c": None})
    assert both["a"][0].shape == (4, 3) and both["a"][1] is None and both["c"] is None
    assert both["b"].tolist() == [0, 0, 1, 1]
