"""Seconds an image: of whole calls, measured once for models that sample alike, multiplied where a call is long."""

import time

import pytest
from diffusers import AutoencoderTiny

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.export import latencies
from edgedit_hf.export.latencies import Sampled, call_of, seconds_an_image
from edgedit_hf.genotype import Genotype
from edgedit_hf.run.config import RunConfig


@pytest.fixture
def rows(make_transformer):
    pipeline = EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon"))
    again = EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon"))
    return {"a": Sampled(pipeline, 8, 1.5), "like a": Sampled(again, 8, 1.5), "fewer": Sampled(pipeline, 2, 1.0)}


@pytest.fixture
def config():
    config = RunConfig()
    config.evaluate.latency_batch_size, config.evaluate.latency_repeats, config.latency.threads = 2, 5, 1
    return config


def test_forwards_are_counted_as_guidance_takes_them(rows):
    assert [row.forwards for row in rows.values()] == [16, 16, 2]
    images = call_of(rows["fewer"], 3)()
    assert len(images) == 3


def test_calls_are_timed_once_a_kind_and_long_ones_multiplied(rows, config, monkeypatch):
    found = seconds_an_image(rows, {"latency_ms": {}}, config)
    seconds = found["seconds_per_image"]
    assert found["multiplied"] == [] and seconds["a"] == seconds["like a"] > seconds["fewer"] > 0
    monkeypatch.setattr(latencies, "LONGEST_CALL_S", 0.1)
    genotype = Genotype.of(rows["a"].pipeline.transformer.config).hash
    found = seconds_an_image(rows, {"latency_ms": {genotype: {"torch-fp32": 10.0}}}, config)
    assert found["multiplied"] == ["a", "like a"]
    assert found["seconds_per_image"]["a"] == pytest.approx(16 * 0.010 / 2)  # of pixels: nothing is decoded
    assert found["seconds_per_image"]["fewer"] != pytest.approx(2 * 0.010 / 2, rel=1e-9)


def test_a_long_call_is_its_forwards_and_the_decoding_of_an_image(make_transformer, config, monkeypatch):
    """Held against a decoder that waits for a known time."""
    vae = AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=1).eval()
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda *args, **named: time.sleep(0.2) or decode(*args, **named))
    pipeline = EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon"), vae=vae)
    row = Sampled(pipeline, 8, 1.5)
    monkeypatch.setattr(latencies, "LONGEST_CALL_S", 0.0)
    genotype = Genotype.of(pipeline.transformer.config).hash
    of_a_forward = {"latency_ms": {genotype: {"torch-fp32": 1e-3}}}  # as good as none: what is left is the decoder's
    found = seconds_an_image({"a": row, "b": row}, of_a_forward, config)
    assert found["multiplied"] == ["a", "b"] and len(set(found["seconds_per_image"].values())) == 1
    assert 0.2 <= found["seconds_per_image"]["a"] < 8 * 0.2  # once, not once a step


def test_calls_that_take_long_together_are_timed_in_five_rounds(rows, config, monkeypatch):
    monkeypatch.setattr(latencies, "MEASURING_S", 1e-6)
    config.evaluate.latency_repeats = 30
    forwards = []
    row = rows["fewer"]
    row.pipeline.transformer.register_forward_hook(lambda *_: forwards.append(1))
    seconds_an_image({"fewer": row}, {"latency_ms": {}}, config)
    assert len(forwards) == row.forwards * (1 + 5 * 2)  # a warm-up, and rounds of an untimed and a timed call
