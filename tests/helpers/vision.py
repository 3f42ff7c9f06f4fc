"""Tiny random vision models of transformers in folders, with the configs of their image processors."""

import json
from pathlib import Path

import torch
from flow_pipelines import VOCABULARY, tokenizer

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSOR = {  # as DINOv2's, at a small size
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    **IMAGENET,
}


def dinov2(folder: Path, **processor) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return with_processor(folder, **processor)


def resnet(folder: Path) -> Path:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return with_processor(folder, do_center_crop=False, size={"height": 32, "width": 32})


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
    tokens = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "image_size": 28, "patch_size": 14, "projection_dim": 8}
    config = CLIPConfig(
        text_config={**sizes, **text, **tokens, "projection_dim": 8}, vision_config=vision, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return with_processor(folder)


def siglip(folder: Path) -> Path:
    """Its tokenizer gives no mask, as published ones do not."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(4)  # cosines above zero
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "projection_size": 16}
    tokens = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    SiglipModel(SiglipConfig(text_config={**text, **tokens}, vision_config=vision)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "model_input_names": ["input_ids"]}))
    return with_processor(folder)


def with_processor(folder: Path, **changed) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **changed}))
    return folder
