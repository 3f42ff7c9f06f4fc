"""Stage 7: export the tuned student to ONNX, verified against eager PyTorch and timed.

    accelerate launch training/export_student.py --config training/recipes/digits.yaml

Writes <output_dir>/exported/onnx-fp32 and onnx-int8: pipeline folders that DiffusionPipeline.from_pretrained loads, with ONNX Runtime
underneath. `optimum-cli export edgedit` does the same for any pipeline.
"""

from accelerate import Accelerator

from edgedit_hf.export.onnx import export_pipeline
from edgedit_hf.launch import load_pipeline, recipe_main
from edgedit_hf.recipes import RunConfig
from edgedit_hf.run_state import RunState, weights_hash


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    source = config.folder("student-tuned")
    pipeline = load_pipeline(source, "stage tune (training/finetune.py)")
    state = RunState(
        config.folder("exported"),
        "export",
        config.section("export"),
        len(config.export.dtypes),
        seed=config.seed,
        inputs={"student-tuned": weights_hash(pipeline.transformer.state_dict())},
        unit="export",
    )
    if state.finished:
        return
    dtypes = config.export.dtypes
    done = sum((state.folder / f"onnx-{dtype}" / "verify.json").exists() for dtype in dtypes)
    state.continue_at(done)
    for index in state.steps():
        output = state.folder / f"onnx-{dtypes[index]}"
        export_pipeline(
            source,
            output,
            dtype=dtypes[index],
            threads=config.export.threads,
            seed=config.seed,
            bench_batches=(1, config.evaluate.latency_batch_size),
            overwrite=True,
        )
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__)
