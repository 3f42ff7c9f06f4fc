"""What a step sees of the data, and the pipeline that is made of a distilled net."""

import pytest
import torch

from edgedit_hf.data.text_table import text_table
from edgedit_hf.diffusion import draws
from edgedit_hf.few_step.networks import predict
from edgedit_hf.few_step.source import START_STREAM, Conditions, step_choice


def batch_of(labels: list[int]) -> dict[str, torch.Tensor]:
    return {"images": torch.zeros(len(labels), 1, 8, 8), "labels": torch.tensor(labels)}


def test_pieces_are_the_batch_in_order_with_noise_of_their_rows(families):
    conditions = Conditions(families["edgedit"].source(), None)
    batch, rows, device = batch_of([3, 1, 4, 1]), torch.tensor([2, 3, 6, 7]), torch.device("cpu")
    (one,) = conditions.pieces(batch, rows, 1, 5, 9, device)
    two = conditions.pieces(batch, rows, 2, 5, 9, device)
    assert [piece.rows for piece in two] == [[2, 3], [6, 7]] and one.rows == [2, 3, 6, 7]
    assert torch.equal(torch.cat([piece.noise for piece in two]), one.noise)
    assert torch.equal(one.noise, draws(5, 9, [2, 3, 6, 7], (1, 8, 8), stream=START_STREAM).noise)
    assert torch.cat([piece.condition["class_labels"] for piece in two]).tolist() == [3, 1, 4, 1]
    assert one.null["class_labels"].tolist() == [10] * 4
    parts = [piece.draws(5, 9, 32) for piece in two]
    assert torch.equal(torch.cat([part.time for part in parts]), one.draws(5, 9, 32).time)


def test_a_net_without_classes_has_no_condition(make_transformer, families):
    source = families["edgedit"].source()
    source.pipeline.register_modules(transformer=make_transformer(num_layers=1, num_classes=0))
    (piece,) = Conditions(source, None).pieces(batch_of([0, 1]), torch.arange(2), 1, 0, 0, torch.device("cpu"))
    assert piece.condition == {"class_labels": None} and piece.null is None


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_the_pipeline_of_the_distilled_net_knows_its_steps(family, sampler):
    source = family.source()
    pipeline = source.few_step_pipeline(family.model, sampler)
    config = pipeline.config
    assert list(config.few_step_timesteps) == family.timesteps and config.default_steps == 4
    assert config.default_guidance_scale == 1.0 and type(pipeline) is type(family.pipeline)
    assert type(pipeline.scheduler).__name__ == {
        ("edgedit", "ode"): "DPMSolverMultistepScheduler",
        ("edgedit", "sde"): "LCMScheduler",
    }.get((family.name, sampler), "FlowMatchEulerDiscreteScheduler")
    assert pipeline.scheduler.config.get("stochastic_sampling", sampler == "sde") == (sampler == "sde")


def test_a_step_is_about_one_place_and_one_width():
    widths = ["tiny", "small", "full"]
    choices = [step_choice(0, step, 4, widths) for step in range(600)]
    assert choices == [step_choice(0, step, 4, widths) for step in range(600)]
    assert choices != [step_choice(1, step, 4, widths) for step in range(600)]
    counts = [sum(k == place for k, _ in choices) for place in range(4)]
    assert min(counts) > 110 and max(counts) < 190  # 150 each, ± 4 standard deviations
    assert all(150 < sum(w == width for _, w in choices) < 250 for width in widths)
    assert {step_choice(0, step, 1, [None]) for step in range(50)} == {(0, None)}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_conditions_are_what_the_pipeline_gives_its_net(family, guidance, tmp_path):
    """The prediction of a guided call of the many-step pipeline, of which its one step tells."""
    source, diffusion, device = family.source(), family.source().diffusion, torch.device("cpu")
    pipeline, start = source.pipeline, family.piece([0, 1]).noise
    pipeline.set_progress_bar_config(disable=True)
    if source.elastic:
        what = ["a cat", "a much longer prompt"]
        condition, null = Conditions.of_texts(text_table(pipeline, what, tmp_path / "texts"), torch.arange(2), device)
    else:
        what = [3, 5]
        condition, null = Conditions(source, None).of_labels(torch.tensor(what), device)
    times = torch.full((2,), 1000 if source.elastic else 999)  # of the only step
    found, _ = predict(pipeline.transformer, start, times, condition, null, guidance)
    asked = {"latents": start, "num_inference_steps": 1, "guidance_scale": guidance, "output_type": "latent"}
    x0 = pipeline(what, **asked).images
    assert (diffusion.predict_x0(found, start, times) - x0).norm() < 1e-3 * x0.norm()
