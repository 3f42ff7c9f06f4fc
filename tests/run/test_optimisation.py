"""Optimiser, moving average and scaler in a checkpoint: by name, whatever the order; refused where they are of another
model.
"""

import copy
import math

import pytest
import torch
from demo_stage import demo_run
from diffusers.training_utils import EMAModel

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.checkpoint import load_state, save_state
from edgedit_hf.run.optimisation import Optimisation, learning_rate_at, set_learning_rate
from edgedit_hf.run.state import RunState


def make_net(order=("one", "two", "three"), width: int = 3) -> torch.nn.ModuleDict:
    """Layers of one shape: a state by position loads onto any of them."""
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(width, width) for name in ("one", "two", "three", "other")}
    return torch.nn.ModuleDict({name: layers[name] for name in order})


def loop(net: torch.nn.Module, decayed: bool = False, **parts) -> tuple[torch.optim.Optimizer, EMAModel, Optimisation]:
    groups = (
        [
            {"params": [p for n, p in net.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
            {"params": [p for n, p in net.named_parameters() if n.endswith("weight")]},
        ]
        if decayed
        else net.parameters()
    )
    optimizer, ema = torch.optim.AdamW(groups, lr=0.1), EMAModel(net.parameters(), decay=0.5)
    return optimizer, ema, Optimisation(optimizer, net.named_parameters(), ema, **parts)


def gradient(name: str, step: int) -> torch.Tensor:
    return torch.randn(
        3 if name.endswith("bias") else (3, 3),
        generator=torch.Generator().manual_seed(100 * step + sum(map(ord, name))),
    )


def train(net, optimizer, ema, step: int) -> None:
    for name, parameter in net.named_parameters():
        parameter.grad = gradient(name, step)
    optimizer.step()
    ema.step(net.parameters())


@pytest.mark.parametrize("decayed", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
def test_a_state_finds_its_parameters_in_another_order(decayed, scaled, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    net = make_net()
    optimizer, ema, optimisation = loop(net, decayed, scaler=scaler)
    train(net, optimizer, ema, 0)
    save_state(tmp_path, optimisation.state_dict())
    other = make_net(("three", "one", "two"))
    other.load_state_dict(net.state_dict())
    again = torch.amp.GradScaler("cpu") if scaled else None
    optimizer_2, ema_2, optimisation_2 = loop(other, decayed, scaler=again)
    optimisation_2.load_state_dict(load_state(tmp_path))
    for model, parts in ((net, (optimizer, ema)), (other, (optimizer_2, ema_2))):
        train(model, *parts, 1)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in net.state_dict().items())
    averages = dict(zip(dict(net.named_parameters()), ema.shadow_params))
    assert all(
        torch.equal(averages[name], average)
        for name, average in zip(dict(other.named_parameters()), ema_2.shadow_params)
    )
    assert ema_2.optimization_step == 2 and (again is None or again.get_scale() == scaler.get_scale())
    by_position = loop(other)[0]
    by_position.load_state_dict(copy.deepcopy(loop(net)[0].state_dict()))  # PyTorch sees no fault


def test_it_loads_what_the_parts_themselves_would(tmp_path):
    net = make_net()
    optimizer, ema, optimisation = loop(net)
    net.three.requires_grad_(False)  # has no state
    for step in range(3):
        train(net, optimizer, ema, step)
    saved = copy.deepcopy((optimizer.state_dict(), ema.state_dict()))
    optimizer_2, ema_2, optimisation_2 = loop(net)
    optimisation_2.load_state_dict(copy.deepcopy(optimisation.state_dict()))
    torch.testing.assert_close(optimizer_2.state_dict(), saved[0], rtol=0, atol=0)
    torch.testing.assert_close(ema_2.state_dict(), saved[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"order": ("one", "two")}, "of 4 parameters 2 unknown .three.bias."),
        ({"order": ("one", "two", "three", "other")}, "2 missing .other.bias."),
        ({"order": ("one", "two", "other")}, "2 missing .other.bias., 2 unknown .three.bias."),
        ({"width": 4}, r"6 unequal .one.weight of shape \[3, 3\], but here \[4, 4\]."),
        ({"decayed": True}, r"groups its parameters by \[6\], this one by \[3, 3\]"),
        (
            {"scaler": torch.amp.GradScaler("cpu")},
            "holds ema, groups, optimizer, shapes, but .*scaler.* are needed.*mixed precision",
        ),
    ],
    ids=["more", "fewer", "others", "shape", "groups", "parts"],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(change, said):
    net = make_net()
    optimizer, ema, optimisation = loop(net)
    train(net, optimizer, ema, 0)
    state = optimisation.state_dict()
    other = make_net(**{key: value for key, value in change.items() if key in ("order", "width")})
    optimizer, ema, fresh = loop(
        other, **{key: value for key, value in change.items() if key not in ("order", "width")}
    )
    with pytest.raises(EdgeDiTError, match=said):
        fresh.load_state_dict(state)
    assert not optimizer.state and ema.optimization_step == 0


def test_a_checkpoint_by_position_of_an_earlier_version_is_refused(tmp_path):
    net = make_net()
    optimizer, ema, optimisation = loop(net)

    def new_run() -> RunState:
        return demo_run(tmp_path / "run", "stage", {}, 4, checkpoint_every=1)

    run = new_run()
    run.track(model=net, optimizer=optimizer, ema=ema)
    for step in run.steps():
        train(net, optimizer, ema, step)
        if step == 1:
            break
    run = new_run()
    with pytest.raises(
        EdgeDiTError, match="holds model, optimizer, ema, but model, optimisation are needed.*delete the checkpoint"
    ):
        run.track(model=net, optimisation=optimisation)
    with pytest.raises(EdgeDiTError, match="another version"):
        optimisation.load_state_dict(optimizer.state_dict())


def test_the_learning_rate_warms_up_and_decays_to_its_final_share():
    rates = [learning_rate_at(step, 2.0, 10, 110, 0.05) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]) and rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.05 + 0.95 / 2)) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, rel=1e-2) and min(rates[10:]) >= 0.1
    assert learning_rate_at(110, 2.0, 10, 110, 0.05) == pytest.approx(0.1)
    assert learning_rate_at(0, 2.0, 0, 1, 0.05) == 2.0
    assert all(
        math.isfinite(learning_rate_at(step, 1.0, 50, 20, 0.0)) for step in range(20)
    )  # a warm-up longer than the run


def test_every_group_gets_the_learning_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(parameters)])
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
