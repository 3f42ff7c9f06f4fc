"""Text to image, the whole loop from one YAML: text encoders → elastic supernet → evaluation of every sub-network →
(few steps, judged) → report.

    edgedit train text-to-image --config training/recipes/digits-t2i.yaml [--override key=value] [--dry-run]

All stages run in this process; each can be run alone with the same YAML (train_text_encoders.py, train_elastic.py,
…). Finished stages are skipped, interrupted ones continue.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

import time
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from edgedit_hf.estimate import print_text_to_image_estimate
from edgedit_hf.preflight import preflight
from edgedit_hf.publish.run import push_run
from edgedit_hf.report.card import write_run_card
from edgedit_hf.report.elastic import write_elastic_report
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main, stage_runs
from edgedit_hf.run.stage import ELASTIC, FEW_STEP, TEXT_TO_IMAGE
from edgedit_hf.run.state import STAGE_LABEL


def run(config: RunConfig, accelerator: Accelerator) -> None:
    stages = (stage for stage in TEXT_TO_IMAGE if stage.needed(config))
    started, runs = time.monotonic(), stage_runs(stages, Path(__file__).parent)
    for number, run_stage in enumerate(runs.values(), 1):
        STAGE_LABEL.set(f"[{number}/{len(runs)}] ")
        run_stage(config, accelerator)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report, made = write_elastic_report(config.output_dir), FEW_STEP if FEW_STEP.needed(config) else ELASTIC
        write_run_card(config, made)
        push_run(config, made)
        print(f"{report} (this process: {(time.monotonic() - started) / 60:.1f} min)")


if __name__ == "__main__":
    recipe_main(
        run,
        __doc__,
        {"--teacher": "knowledge.teacher", "--push": "hub.push_to"},
        dry_run=print_text_to_image_estimate,
        check=partial(preflight, stages=TEXT_TO_IMAGE),
    )
