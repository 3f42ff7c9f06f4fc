"""The best student so far: kept whole while the parameters move on, and given back as a model."""

import copy
from types import SimpleNamespace

import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.few_step.best import Best, Trained
from edgedit_hf.few_step.networks import CRITIC, STUDENT, Networks

ALONE = SimpleNamespace(is_fsdp2=False)


@pytest.fixture(params=[True, False], ids=["adapters", "full"])
def networks(request, families):
    return Networks(families["edgedit"].model, request.param, True, rank=4, alpha=8.0)


def test_the_lowest_is_kept_and_given_back(networks, disturb):
    student = networks.trained(STUDENT)
    best = Best(student)
    disturb([p for _, p in student], 0)
    assert best.take(5.0, 10, {"full": 5.0})
    disturb([p for _, p in student], 1)
    wanted = copy.deepcopy(networks).finished().state_dict()
    assert best.take(3.0, 20, {"full": 3.0})
    disturb([p for _, p in student], 2)
    assert not best.take(3.0, 30, {"full": 3.0}) and not best.take(4.0, 40, {"full": 4.0})
    assert not best.take(float("nan"), 50, {"full": float("nan")})
    again = Best(student)
    again.load_state_dict(best.state_dict())
    assert again.facts == {"distance": 3.0, "step": 20, "widths": {"full": 3.0}}
    found = again.finished(networks, ALONE).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_checkpoint_holds_what_learns_and_nothing_else(networks, disturb):
    roles = {role: networks.trained(role) for role in (STUDENT, CRITIC)}
    trained = Trained(roles)
    names = {name for named in roles.values() for name, _ in named}
    saved = {name: value.clone() for name, value in trained.state_dict().items()}
    assert saved.keys() == names and names < networks.state_dict().keys()
    disturb([p for named in roles.values() for _, p in named])
    trained.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in trained.state_dict().items())
    with pytest.raises(EdgeDiTError, match="trained weights of the checkpoint is of another model"):
        Trained({STUDENT: roles[STUDENT]}).load_state_dict(saved)
