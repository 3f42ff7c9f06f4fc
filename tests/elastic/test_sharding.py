"""FSDP2 on two gloo ranks: the recipe trains to what one process trains to, and continues from sharded checkpoints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded import sharded


@pytest.mark.slow
@pytest.mark.ranks
def test_sharded_training_equals_one_process_and_continues(repository, tmp_path):
    training = repository / "training"
    python, torchrun = (
        [sys.executable],
        [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    )

    def run(command: list, folder: Path, killed: bool = False, **env: str) -> None:
        values = (
            f"output_dir={folder}",
            "threads=1",
            "elastic.steps=4",
            "elastic.sampling=sandwich",
            "elastic.checkpoint_every=2",
        )
        options = [part for value in values for part in ("--override", value)]
        command = [*command, "--config", training / "recipes" / "debug-t2i.yaml", *options]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True, timeout=300
        )
        assert (done.returncode != 0) == killed, done.stderr[-4000:]

    one, two = tmp_path / "one", tmp_path / "two"
    run([*python, training / "train_text_encoders.py"], one)
    shutil.copytree(one / "text", two / "text")
    run([*python, training / "train_elastic.py"], one)
    stage = [*torchrun, sharded("train_elastic", tmp_path)]
    run(stage, two, killed=True, DIE_AT="2")
    assert sorted(path.name for path in (two / "elastic" / "checkpoints" / "step-000000002").glob("*.safetensors")), (
        "no sharded checkpoint"
    )
    run(stage, two)
    a, b = (
        load_file(folder / "elastic" / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (one, two)
    )
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
