"""Text to image, the whole loop from one YAML: text encoders → elastic supernet → evaluation of every sub-network →
report.

    edgedit train text-to-image --config training/recipes/digits-t2i.yaml [--override key=value] [--dry-run]

All stages run in this process; each can be run alone with the same YAML (train_text_encoders.py, train_elastic.py,
evaluate_elastic.py). Finished stages are skipped, interrupted ones continue.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

import time
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from edgedit_hf.elastic.cost import print_elastic_estimate
from edgedit_hf.preflight import preflight
from edgedit_hf.report.elastic import write_elastic_report
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main, stage_runs
from edgedit_hf.run.stage import TEXT_TO_IMAGE
from edgedit_hf.run.state import STAGE_LABEL


def run(config: RunConfig, accelerator: Accelerator) -> None:
    started, runs = time.monotonic(), stage_runs(TEXT_TO_IMAGE, Path(__file__).parent)
    for number, run_stage in enumerate(runs.values(), 1):
        STAGE_LABEL.set(f"[{number}/{len(runs)}] ")
        run_stage(config, accelerator)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{write_elastic_report(config.output_dir)} (this process: {(time.monotonic() - started) / 60:.1f} min)")


if __name__ == "__main__":
    recipe_main(
        run,
        __doc__,
        {"--teacher": "knowledge.teacher"},
        dry_run=print_elastic_estimate,
        check=partial(preflight, stages=TEXT_TO_IMAGE),
    )
