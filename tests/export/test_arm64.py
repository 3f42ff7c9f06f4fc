"""An export's files on the instruction set of phones: what ONNX Runtime computes on (emulated) arm64 is what it
computed here.
"""

import json
import re

import numpy as np
import pytest
import torch
from arm64 import arm64_python
from safetensors.numpy import load_file
from text_pipelines import elastic, tiny_vae

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.export import sample_min
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.export]
SEED = 2**33 + 7
# The loop of sample_min.py with the reference's noise; its numbers, and the noise of a seed.
LOOP = f"""
import platform, sys
from pathlib import Path
import numpy
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
import sample_min
contract = sample_min.read_contract(folder)
reference, record = sample_min.read_safetensors(folder / contract["reference"]["file"]), {{}}
def opener(key):
    entry = contract["artefacts"][key]
    names = [[tensor["name"] for tensor in entry[side]] for side in ("inputs", "outputs")]
    return sample_min.open_file(folder / entry["file"], contract["format"], *names)
run = sample_min.Artefacts(contract, opener)
what = sample_min.conditioning(contract, run, reference.get("label"), sample_min.reference_windows(contract, reference))
sample_min.sample(contract, run, reference["noise"], what, record)
numpy.savez(sys.argv[2], noise=sample_min.standard_normal({SEED}, (1001,)), **record)
print(platform.machine())
"""


def edgedit(make_transformer) -> EdgeDiTPipeline:
    """Of smooth weights: a network that amplifies rounding says nothing about low precision."""
    model = make_transformer(num_layers=2, hidden_size=64, num_attention_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.25)
    return EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=4, default_guidance_scale=1.5)


def check_on_arm64(folder, tmp_path, image_db, tolerance):
    """`sample_min.py --check` passes on arm64, and the latents and the image are those of x86.

    Args:
        image_db: least PSNR of the image. tolerance: largest relative error of the latents after the loop.

    Returns:
        What --check says of the image, in dB.
    """
    arm64 = arm64_python()
    printed = arm64.run(folder / "sample_min.py", "--check")
    contract = json.loads((folder / "contract.json").read_text())
    outputs = sum(len(entry["outputs"]) for entry in contract["artefacts"].values())
    assert printed.count("ok  ") == outputs + 4 and "FAIL" not in printed
    (said,) = re.findall(r"loop.image .* PSNR ([\d.]+) dB", printed)
    (tmp_path / "loop.py").write_text(LOOP)
    assert arm64.run(tmp_path / "loop.py", folder, tmp_path / "found.npz").strip() == "aarch64"
    found, reference = np.load(tmp_path / "found.npz"), load_file(folder / "reference.safetensors")
    expected, latents = reference["loop.latents"].astype(np.float64), found["loop.latents"]
    error = np.linalg.norm(latents - expected) / np.linalg.norm(expected)
    squared = np.mean((found["loop.image"].astype(np.float64) - reference["loop.image"]) ** 2)
    psnr = 10 * np.log10(255**2 / max(squared, 1e-10))
    print(f"{folder.name}: latents within {error:.1e}, image {psnr:.1f} dB")
    assert error <= tolerance and psnr >= image_db and abs(psnr - float(said)) < 0.1
    assert reference["loop.image"].std() > 5  # a blank image would prove nothing
    noise = sample_min.standard_normal(SEED, (1001,))
    assert np.allclose(found["noise"], noise, rtol=0, atol=1e-6) and noise.std() > 0.9
    return psnr


@pytest.mark.parametrize("dtype, image_db, tolerance", [("fp32", 60, 1e-5), ("int8", 25, 0.1), ("int4", 20, 0.2)])
def test_a_class_conditional_export(make_transformer, tmp_path, dtype, image_db, tolerance):
    options = ExportOptions(dtype=dtype, split_conditioner=True, threads=1, bench_batches=(2,), bench_repeats=2)
    folder = export_pipeline(edgedit(make_transformer), tmp_path / dtype, options)
    check_on_arm64(folder, tmp_path, image_db, tolerance)
    contract = json.loads((folder / "contract.json").read_text())
    contract["guidance"]["scale"] *= 10
    (folder / "contract.json").write_text(json.dumps(contract))
    assert "FAIL" in arm64_python().run(folder / "sample_min.py", "--check", expect=1)  # it does compare


def test_a_text_to_image_export(tmp_path):
    """A text encoder, a denoiser and a VAE in int8."""
    pipeline = elastic(second=False, vae=tiny_vae(), channels=4)
    options = ExportOptions(
        dtype="int8", threads=1, bench_batches=(2,), bench_repeats=2, num_images=2, prompts=["a 3", "a"]
    )
    folder = export_pipeline(pipeline, tmp_path / "t2i", options)
    check_on_arm64(folder, tmp_path, 25, 0.1)
