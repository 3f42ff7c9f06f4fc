"""What self-distillation tunes and draws."""

import pytest
import torch

from edgedit_hf.diffusion import Diffusion
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.quantization.layers import quantizable_layers
from edgedit_hf.quantization.self_distillation import (
    SamplePool,
    TunedState,
    micro_batch,
    step_draws,
    step_subnet,
    tuned_parameters,
)


def test_of_a_quantised_network_biases_norms_and_modulation_are_tuned(make_transformer):
    model = make_transformer()
    layers = list(quantizable_layers(model))
    tuned = tuned_parameters(model, layers)
    assert set(tuned) == {f"{name}.bias" for name in layers}
    left_out = tuned_parameters(model, [name for name in layers if name != "blocks.1.modulation"])
    assert set(left_out) - set(tuned) == {"blocks.1.modulation.weight"}


def test_of_a_supernet_also_the_norms_and_tables_of_every_width():
    model = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    tuned = tuned_parameters(model, list(quantizable_layers(model)))
    for name in model.subnet_names:
        assert {
            f"modulation.{name}.table",
            f"modulation.{name}.table_out",
            f"down_blocks.0.attn.norm_q.{name}.weight",
        } <= set(tuned)
    assert "text_embedder.norms.0.weight" in tuned
    assert not any(
        name.endswith("to_q.weight") or name.endswith("projection.weight") or name == "text_embedder.tokens"
        for name in tuned
    )


def test_a_checkpoint_of_the_tuned_parameters(make_transformer):
    one, other = make_transformer(0), make_transformer(1)
    layers = list(quantizable_layers(one))
    state = {name: value.clone() for name, value in TunedState(tuned_parameters(one, layers)).state_dict().items()}
    TunedState(tuned_parameters(other, layers)).load_state_dict(state)
    assert all(
        torch.equal(a, b)
        for a, b in zip(tuned_parameters(one, layers).values(), tuned_parameters(other, layers).values())
    )
    assert not torch.equal(one.blocks[0].modulation.weight, other.blocks[0].modulation.weight)


def test_draws_depend_on_seed_step_and_row_alone():
    whole = step_draws(3, 7, range(8), (1, 4, 4), 100)
    parts = [step_draws(3, 7, rows, (1, 4, 4), 100) for rows in (range(0, 4), range(4, 8))]
    for name in whole._fields:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    many = torch.cat([step_draws(3, step, range(64), (1,), 10).samples for step in range(30)])
    assert many.min() == 0 and many.max() == 9 and torch.bincount(many).float().std() < 25
    other = step_draws(3, 8, range(8), (1, 4, 4), 100)
    assert not torch.equal(other.samples, whole.samples) and not torch.equal(other.noise, whole.noise)


def test_every_width_has_its_turn():
    names = ["tiny", "small", "full"]
    drawn = [step_subnet(names, 0, step) for step in range(300)]
    assert all(70 < drawn.count(name) < 130 for name in names) and drawn == [
        step_subnet(names, 0, step) for step in range(300)
    ]
    assert step_subnet([], 0, 3) is None


def test_labels_are_dropped_as_guidance_needs_it():
    pool = SamplePool(torch.zeros(50, 1, 2, 2), torch.arange(50) % 10)
    drawn = step_draws(0, 0, range(2000), (1,), 50)
    labels = pool.condition(drawn, 0.3, 10)["class_labels"]
    dropped = labels == 10
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert torch.equal(labels[~dropped], (drawn.samples % 10)[~dropped])
    assert SamplePool(torch.zeros(5, 1, 2, 2)).condition(drawn, 0.3, 0) == {}


@pytest.mark.parametrize("kind, few", [("epsilon", [800.0, 600.0, 200.0]), ("flow_prediction", [1000.0, 750.0, 500.0])])
def test_of_a_few_step_pipeline_only_its_timesteps_are_drawn(kind, few):
    diffusion, pool = Diffusion(kind), SamplePool(torch.randn(20, 1, 2, 2), torch.arange(20) % 10)
    plain = micro_batch(pool, diffusion, 3, 5, range(600), 0.3, 10)
    found = micro_batch(pool, diffusion, 3, 5, range(600), 0.0, 10, few)
    assert found.t.dtype == plain.t.dtype and sorted(set(found.t.tolist())) == few[::-1]
    assert all(150 < int((found.t == t).sum()) < 250 for t in few)
    drawn = step_draws(3, 5, range(600), (1, 2, 2), 20)
    assert torch.equal(found.noisy, diffusion.noisy(pool.latents[drawn.samples], drawn.noise, found.t))
    assert int((plain.condition["class_labels"] == 10).sum()) > 100
    assert torch.equal(found.condition["class_labels"], pool.labels[drawn.samples])
