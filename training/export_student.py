"""Stage 7: export the tuned student (with few_step.enabled: the few-step student) to ONNX and, where asked for,
ExecuTorch and web pages, verified against eager PyTorch and timed.

    edgedit train export --config training/recipes/digits.yaml

Writes <output_dir>/exported/onnx-fp32, onnx-int8, executorch-…, web-…: pipeline folders that
DiffusionPipeline.from_pretrained loads, with the runtime underneath. `optimum-cli export edgedit` does the same for any
pipeline.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial

from accelerate import Accelerator

from edgedit_hf.estimate import print_estimate
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.files import atomic_write_json, changed_file, file_record
from edgedit_hf.pipelines.loading import load_pipeline
from edgedit_hf.preflight import preflight
from edgedit_hf.records import Listed
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import EXPORT, shipped
from edgedit_hf.run.state import RunState
from edgedit_hf.schema import read_record


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    made_by = shipped(config)
    source = config.folder(made_by.folder)
    load_pipeline(source, made_by.made_by)  # fails now if it is no pipeline
    asked = {"onnx": config.export.dtypes, "executorch": config.export.executorch, "web": config.export.web}
    exports = [(kind, dtype) for kind, dtypes in asked.items() for dtype in dtypes]
    state = RunState(
        config,
        EXPORT,
        len(exports),
        inputs={name: None for name, _ in EXPORT.inputs if name != made_by.folder},
        unit="export",
    )
    if state.finished:
        return
    outputs = [state.folder / f"{kind}-{dtype}" for kind, dtype in exports]
    progress = (
        state.folder / "progress.json"
    )  # the files of every finished export: one that was damaged since is made again
    made = read_record(progress, dict[str, dict[str, Listed]], "this stage") if progress.exists() else {}
    intact = [output.name in made and changed_file(output, made[output.name]) is None for output in outputs]
    state.continue_at((*intact, False).index(False))
    for index in state.steps():
        kind, dtype = exports[index]
        export_pipeline(
            source,
            outputs[index],
            ExportOptions(
                format=kind,
                dtype=dtype,
                tolerance=None if dtype == "fp32" else config.export.tolerance,
                threads=config.export.threads,
                seed=config.seed,
                bench_batches=(1, config.evaluate.latency_batch_size),
                overwrite=True,
            ),
        )
        made[outputs[index].name] = file_record(outputs[index])
        atomic_write_json(progress, made)
    progress.unlink()
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(EXPORT,)))
