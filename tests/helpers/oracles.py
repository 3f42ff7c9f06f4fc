"""What the original implementations computed (models/oracles), and diffusers' own class with random weights."""

from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

from edgedit_hf import load_original

ORACLES = Path(__file__).parents[1] / "models" / "oracles"
HEADS = 4  # of the oracles


def oracle(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights under their original keys, and the calls' inputs and outputs."""
    tensors = load_file(ORACLES / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return weights, {key: value for key, value in tensors.items() if not key.startswith("weights.")}


def relative(name: str, folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    """A network of the original's weights, inputs of it, and the prediction that the original's output amounts to
    (SiT's time runs the other way, and so does its velocity).
    """
    weights, calls = oracle(name)
    torch.save(weights, folder / f"{name}.pt")
    x, t, y, expected = (calls[f"call0.{key}"] for key in ("x", "t", "y", "out"))
    if name == "sit":
        t, expected = 1000 * (1 - t), -expected
    model = load_original(folder / f"{name}.pt", num_attention_heads=HEADS)
    return model, {"sample": x, "timestep": t.float(), "class_labels": y}, expected


def random_diffusers_model(seed: int = 0, copies_equal: bool = True, **config) -> DiTTransformer2DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 3}
    model = DiTTransformer2DModel(**{**sizes, "sample_size": 8, "num_embeds_ada_norm": 10, **config}).eval()
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for value in state.values():
        value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    if copies_equal:
        for key in (k for k in state if ".norm1.emb." in k):
            state[key].copy_(state["transformer_blocks.0." + key.split(".", 2)[2]])
    return model
