"""A small text-to-image pipeline with encoders, and an autoencoder for it."""

import functools

import diffusers
import torch
from flow_pipelines import clip, t5
from flow_pipelines import tokenizer as make_tokenizer

from edgedit_hf import ElasticDiTPipeline, ElasticDiTTransformer2DModel


@functools.cache
def elastic_net(channels: int) -> ElasticDiTTransformer2DModel:
    torch.manual_seed(0)
    net = (
        ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", text_dims=[16, 32], in_channels=channels)
        .extract_subnet("tiny")
        .eval()
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    return net


def elastic(first=True, second=True, vae=None, scheduler=None, channels=1) -> ElasticDiTPipeline:
    net, components = elastic_net(channels), {}
    for suffix, wanted, encoder in (("", first, lambda: clip(projection=False)), ("_2", second, t5)):
        if wanted:
            components |= {f"text_encoder{suffix}": encoder(), f"tokenizer{suffix}": make_tokenizer()}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
    return ElasticDiTPipeline(net, scheduler, vae, **components, default_steps=3, max_sequence_length=12)


def tiny_vae(channels=4):
    torch.manual_seed(0)
    blocks = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")} | {
        f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")
    }
    return diffusers.AutoencoderTiny(latent_channels=channels, scaling_factor=0.7, **blocks).eval()
