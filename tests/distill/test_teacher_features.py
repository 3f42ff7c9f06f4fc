"""Features that proxies are distilled from: a hook's view of the teacher's layers, and functions of seed and step."""

import pytest
import torch

from edgedit_hf.data.batches import batch_indices
from edgedit_hf.data.images import load_images
from edgedit_hf.diffusion import Diffusion, draws, drop_labels
from edgedit_hf.distill.teacher_features import TEST_STREAM, TRAIN_STREAM, FeatureSource, features_at


@pytest.fixture(scope="module")
def teacher(make_transformer):
    return make_transformer()


def source(teacher, **changes) -> FeatureSource:
    options = {"batch_size": 4, "fixed": 6, "class_dropout": 0.5, "seed": 3, "device": torch.device("cpu"), **changes}
    return FeatureSource(teacher, load_images(), **options)


def test_features_are_what_the_layers_are_given_and_give(teacher):
    """The teacher runs on what its own features were made of; hooks see what goes in and out of its layers."""
    features = source(teacher).training(5, depth=3)
    seen = {}
    hooks = [
        block.register_forward_hook(lambda _, given, out, i=i: seen.__setitem__(i, (given[0], given[1], out)))
        for i, block in enumerate(teacher.blocks[:3])
    ]
    batch = load_images().batch(batch_indices(len(load_images()), 4, 3, 5))
    drawn, diffusion = draws(3, 5, range(4), (1, 8, 8)), Diffusion.for_config(teacher.config)
    t = diffusion.timesteps(drawn.time)
    labels = drop_labels(batch["labels"], drawn.drop, 0.5, 10)
    with torch.no_grad():
        teacher(diffusion.noisy(batch["images"], drawn.noise, t), t, labels)
    for hook in hooks:
        hook.remove()
    assert len(features.inputs) >= 3
    for layer in range(3):
        torch.testing.assert_close(features.inputs[layer], seen[layer][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.outputs[layer], seen[layer][2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.conditioning, seen[0][1], rtol=1e-5, atol=1e-5)


def test_features_are_a_function_of_seed_stream_and_step(teacher):
    data = load_images()

    def at(seed: int, step: int, stream: int, rows: int = 4) -> torch.Tensor:
        return features_at(teacher, data, rows, 0.5, seed, step, stream, torch.device("cpu"), "no", 2).inputs[1]

    assert torch.equal(at(0, 1, TRAIN_STREAM), at(0, 1, TRAIN_STREAM))
    others = (at(1, 1, TRAIN_STREAM), at(0, 2, TRAIN_STREAM), at(0, 1, TEST_STREAM))
    assert not any(torch.equal(at(0, 1, TRAIN_STREAM), other) for other in others)


def test_fixed_sets_have_at_least_what_is_asked_for_in_batches(teacher):
    feature_source = source(teacher)
    calibration = [features.inputs[0] for features in feature_source.calibration(2)]
    assert [len(part) for part in calibration] == [4, 4]  # 6 images, in batches of 4
    assert [len(features.inputs[0]) for features in source(teacher, fixed=2).held_out(2)] == [2]
    again = [features.inputs[0] for features in feature_source.calibration(2)]
    held_out = [features.inputs[0] for features in feature_source.held_out(2)]
    assert all(map(torch.equal, calibration, again)) and not any(map(torch.equal, calibration, held_out))
