"""Checkpoints: state that round-trips, and damaged ones."""

import pytest
import torch
from small_nets import optimised, train_step

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.checkpoint import load_state, save_state


def assert_equal(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert type(one) is type(other) and len(one) == len(other)
        for a, b in zip(one, other):
            assert_equal(a, b)
    else:
        assert type(one) is type(other) and one == other


def test_optimiser_and_average_round_trip(tmp_path):
    things = optimised()
    state = [thing.state_dict() for thing in things]
    save_state(tmp_path, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    assert_equal(load_state(tmp_path), state)
    fresh = optimised(0)
    for thing, loaded in zip(fresh, load_state(tmp_path)):
        thing.load_state_dict(loaded)
    for step in range(3, 6):
        assert torch.equal(train_step(*things, step), train_step(*fresh, step))
    for one, other in zip(things, fresh):
        assert_equal(one.state_dict(), other.state_dict())


def test_plain_values_and_odd_tensors_round_trip(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {
        "tensors": (
            base,
            base[:, 1:3],
            base.mT,
            torch.tensor(2.5),
            torch.zeros(0, 3),
            torch.ones(2, dtype=torch.bfloat16),
        ),
        "plain": {1: None, "nested": [True, 2, 3.5, "text", ()], "inf": float("inf")},
    }
    save_state(tmp_path, state, "odd")
    assert_equal(load_state(tmp_path, "odd"), state)
    save_state(tmp_path, {"no": "tensors"}, "plain")
    assert load_state(tmp_path, "plain") == {"no": "tensors"}
    with pytest.raises(TypeError, match="cannot checkpoint a set"):
        save_state(tmp_path, {"a": {1, 2}})


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    save_state(tmp_path, {"a": torch.zeros(100)})
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(EdgeDiTError, match="checkpoint .* cannot be read"):
        load_state(tmp_path)
    path.unlink()
    with pytest.raises(EdgeDiTError, match="checkpoint .* cannot be read"):
        load_state(tmp_path)
