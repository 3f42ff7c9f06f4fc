"""Few steps on a laptop: distil a finished run's student to four steps without guidance, and see what that is worth.

    python examples/own_data.py
    python examples/few_steps.py [--run runs/example] [--steps 60]

The same net in four steps of a standard solver stands beside it, and both are compared with the net's many steps.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

import edgedit_hf  # noqa: F401  lets diffusers find the classes
from edgedit_hf.run.config import load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.training import distill_few_step

CHANGES = (  # matching_weight 0: knowledge alone, which learns where the net's own steps lead from the same noise
    "few_step.batch_size=32 few_step.warmup_steps=5 few_step.rank=8 few_step.knowledge_steps=4 few_step.samples=64 "
    "few_step.learning_rate=0.002 few_step.matching_weight=0 few_step.mean_drift=10 few_step.std_drift=10"
).split()


def main(run: Path, steps: int) -> None:
    # edgedit train few-step --config run.yaml --override few_step.steps=60 …
    config = load_config(
        run / "run.yaml", [*CHANGES, f"few_step.steps={steps}", f"few_step.evaluate_every={steps // 3}"]
    )
    distill_few_step.run(config, make_accelerator(config))

    many = DiffusionPipeline.from_pretrained(run / "student-tuned")
    few = DiffusionPipeline.from_pretrained(run / "few-step")
    forwards = []
    few.transformer.register_forward_hook(lambda *_: forwards.append(1))
    labels = [i % len(many.config.id2label) for i in range(64)]

    def draw(pipeline, **options) -> np.ndarray:
        """Images (64, H, W, C) of the same labels from the same noise."""
        return pipeline(labels, generator=torch.Generator().manual_seed(0), output_type="np", **options).images

    guided = draw(many, num_inference_steps=25)
    ours, plain = draw(few), draw(many, num_inference_steps=4, guidance_scale=1.0)  # ours: no arguments, it knows them
    assert len(forwards) == 4, "four steps without guidance are four forwards"
    away = [float(np.sqrt(((images - guided) ** 2).mean())) for images in (ours, plain)]
    print(f"root mean square distance to 25 guided steps: distilled {away[0]:.3f}, plain four steps {away[1]:.3f}")
    assert away[0] < away[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/example"))
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
