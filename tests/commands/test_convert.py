"""`edgedit convert`: an original checkpoint becomes a pipeline that samples."""

from pathlib import Path

from edgedit_hf.commands.cli import main


def test_convert_writes_a_pipeline_that_samples(tmp_path, capsys):
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    oracle = load_file(Path(__file__).parents[1] / "models" / "oracles" / "sit.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in oracle.items() if key.startswith("weights.")}
    source, output = tmp_path / "SiT-tiny.pt", tmp_path / "pipeline"
    torch.save(weights, source)
    arguments = ["convert", str(source), str(output), "--heads", "4"]
    assert main(arguments) == 0
    assert "2 layers of width 48" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline([1], num_inference_steps=2, output_type="latent").images.isfinite().all()
    assert main(arguments) == 2 and "holds a pipeline already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--image-size", "256"]) == 2
    assert "sample size 8 (64² images" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--image-size", "128", "--allow-resize"]) == 0
    assert "sample size 16" in capsys.readouterr().out
    assert main(["info", str(source)]) == 2 and "edgedit convert" in capsys.readouterr().err
