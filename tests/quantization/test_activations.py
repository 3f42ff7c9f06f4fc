"""Static activation scales: against torch's own fake quantisation, buckets against brute force, and what they gain over
one scale.
"""

import itertools
import json

import pytest
import torch

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.activations import (
    ActivationScales,
    activation_scales,
    fake_quantize,
    simulated_activations,
    timestep_buckets,
)
from edgedit_hf.quantization.calibration import CHECK_STREAM, input_ranges, output_error, record, replay

TIMESTEPS = [100.0, 300.0, 500.0, 700.0, 900.0]
RANGES = {
    "a": torch.tensor([[-1.0, 1.0], [-1.1, 1.0], [-1.0, 1.2], [-9.0, 8.0], [-9.5, 9.0]]),
    "b": torch.tensor([[0.0, 2.0], [0.1, 2.0], [0.0, 2.5], [-0.2, 2.0], [0.5, 2.0]]),
}


def test_a_bucket_holds_the_ranges_of_its_timesteps_and_zero():
    scales = activation_scales(TIMESTEPS, RANGES, 2)
    assert scales.edges == [600.0] and scales.num_buckets == 2
    assert [scales.bucket_of(t) for t in (0, 599.9, 600, 1000)] == [0, 0, 1, 1]
    torch.testing.assert_close(scales.scale["a"], torch.tensor([2.3 / 255, 18.5 / 255]))
    torch.testing.assert_close(scales.scale["b"], torch.tensor([2.5 / 255, 2.2 / 255]))
    assert scales.zero_point["b"].tolist() == [0, 23] and scales.zero_point["a"].tolist() == [122, 131]
    one = activation_scales(TIMESTEPS, RANGES)
    assert one.edges == [] and one.bucket_of(3) == 0 and one.zero_point["a"].dtype == torch.int64


def test_rounding_is_torchs():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3
    expected = torch.fake_quantize_per_tensor_affine(values, 0.02, 128, 0, 255)
    torch.testing.assert_close(fake_quantize(values, 0.02, 128), expected)


@pytest.mark.parametrize("buckets", [1, 2, 3, 5])
def test_borders_are_the_best_of_all(buckets):
    ranges = {
        name: bounds + 0.3 * torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
        for name, bounds in RANGES.items()
    }

    def waste(cuts: tuple[int, ...]) -> float:
        total = 0.0
        for first, last in itertools.pairwise((0, *cuts, 5)):
            for bounds in ranges.values():
                low, high = bounds[first:last, 0].clamp(max=0), bounds[first:last, 1].clamp(min=0)
                total += float((((high.max() - low.min()) / (high - low)) ** 2).sum())
        return total

    best = min(itertools.combinations(range(1, 5), buckets - 1), key=waste)
    assert timestep_buckets(TIMESTEPS, ranges, buckets) == [(TIMESTEPS[cut - 1] + TIMESTEPS[cut]) / 2 for cut in best]


def test_files_hold_the_scales_exactly(tmp_path):
    scales = activation_scales(TIMESTEPS, RANGES, 3)
    scales.save(tmp_path / "scales.json")
    again = ActivationScales.load(tmp_path / "scales.json")
    assert again.edges == scales.edges
    for name in RANGES:
        assert torch.equal(again.scale[name], scales.scale[name]) and torch.equal(
            again.zero_point[name], scales.zero_point[name]
        )


def test_static_scales_by_timestep_lose_less_than_one_for_all(make_transformer):
    """A network whose inputs grow tenfold towards the noise, as a flow or ε network's modulated features do."""
    model = make_transformer()
    pipeline = EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=6, default_guidance_scale=2.0)
    calls, checked = record(pipeline, 6).calls, record(pipeline, 6, stream=CHECK_STREAM).calls
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    references = [replay(model, call) for call in checked]
    timesteps, ranges = input_ranges(model, calls, names)
    found = {}
    for buckets in (1, 3, 6):
        with simulated_activations(model, names, activation_scales(timesteps, ranges, buckets)):
            found[buckets] = output_error(model, checked, references)
    with simulated_activations(model, names, None):
        dynamic = output_error(model, checked, references)
    assert found[6].mean_mse < found[1].mean_mse and found[3].mean_mse < found[1].mean_mse
    assert 20 < found[1].sqnr_db < dynamic.sqnr_db < 60
    assert output_error(model, checked, references).sqnr_db == float("inf"), "hooks stay behind"


def test_bad_input(make_transformer, tmp_path):
    scales = activation_scales(TIMESTEPS, RANGES)
    with pytest.raises(EdgeDiTError, match="1 of 1 layers have no activation scales, such as 'blocks.0.modulation'"):
        with simulated_activations(make_transformer(), ["blocks.0.modulation"], scales):
            pass
    with pytest.raises(EdgeDiTError, match="6 buckets were asked for, but there are 5 timesteps"):
        activation_scales(TIMESTEPS, RANGES, 6)
    with pytest.raises(EdgeDiTError, match="inputs of layer c range from inf to -inf"):
        activation_scales(TIMESTEPS, {"c": torch.tensor([[float("inf"), -float("inf")]])})
    with pytest.raises(EdgeDiTError, match="none.json holds no activation scales"):
        ActivationScales.load(tmp_path / "none.json")
    for content in ("[]", '{"edges": 3, "layers": {}}', "{"):
        (tmp_path / "foreign.json").write_text(content)
        with pytest.raises(EdgeDiTError, match="foreign.json holds no activation scales"):
            ActivationScales.load(tmp_path / "foreign.json")
    (tmp_path / "short.json").write_text(
        json.dumps({"edges": [1.0], "layers": {"a": {"scale": [1.0], "zero_point": [0]}}})
    )
    with pytest.raises(EdgeDiTError, match="so 2 buckets, but layer a has 1 scales"):
        ActivationScales.load(tmp_path / "short.json")
