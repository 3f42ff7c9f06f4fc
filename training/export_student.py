"""Stage 7: export the tuned student to ONNX and, where asked for, ExecuTorch, verified against eager PyTorch and timed.

    accelerate launch training/export_student.py --config training/recipes/digits.yaml

Writes <output_dir>/exported/onnx-fp32, onnx-int8, executorch-…: pipeline folders that DiffusionPipeline.from_pretrained loads, with the runtime
underneath. `optimum-cli export edgedit` does the same for any pipeline.
"""

from accelerate import Accelerator

from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.files import weights_hash
from edgedit_hf.launch import load_pipeline, recipe_main
from edgedit_hf.recipes import RunConfig
from edgedit_hf.run_state import RunState


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    source = config.folder("student-tuned")
    pipeline = load_pipeline(source, "stage tune (training/finetune.py)")
    exports = [("onnx", dtype) for dtype in config.export.dtypes] + [("executorch", dtype) for dtype in config.export.executorch]
    state = RunState(
        config.folder("exported"),
        "export",
        config.section("export"),
        len(exports),
        seed=config.seed,
        inputs={"student-tuned": weights_hash(pipeline.transformer.state_dict())},
        unit="export",
    )
    if state.finished:
        return
    outputs = [state.folder / f"{kind}-{dtype}" for kind, dtype in exports]
    state.continue_at(sum((output / "verify.json").exists() for output in outputs))
    for index in state.steps():
        kind, dtype = exports[index]
        export_pipeline(
            source,
            outputs[index],
            format=kind,
            dtype=dtype,
            threads=config.export.threads,
            seed=config.seed,
            bench_batches=(1, config.evaluate.latency_batch_size),
            overwrite=True,
        )
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__)
