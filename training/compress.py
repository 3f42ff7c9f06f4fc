"""The whole loop from one YAML: teacher → proxy bank → latency table → search → student → fine-tuning → (few steps)
→ (about four bits) → export → evaluation → report.

    edgedit train compress --config training/recipes/digits.yaml [--override key=value] [--dry-run]

All stages run in this process, which spares nine imports of torch and diffusers; each can be run alone with the same
YAML (train_teacher.py, distill_proxies.py, …). Finished stages are skipped, interrupted ones continue.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

import time
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from edgedit_hf.estimate import estimate, print_estimate
from edgedit_hf.preflight import preflight
from edgedit_hf.publish.run import push_run
from edgedit_hf.report.card import write_run_card
from edgedit_hf.report.edgedit import write_report
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main, stage_runs
from edgedit_hf.run.stage import EDGEDIT, shipped
from edgedit_hf.run.state import STAGE_LABEL


def run(config: RunConfig, accelerator: Accelerator) -> None:
    runs = stage_runs((stage for stage in EDGEDIT if stage.needed(config)), Path(__file__).parent)
    stages = list(runs)
    on_gpus = accelerator.num_processes if accelerator.device.type == "cuda" else 0
    started, taken, planned = time.monotonic(), 0.0, 0.0
    expected = {row.stage: row.seconds for row in estimate(config, on_gpus=on_gpus)}
    for number, stage in enumerate(stages, 1):
        # What the machine took is a better guide than the estimate before the start, of what was not begun before it.
        correction = taken / planned if planned > 10 else 1.0
        left = correction * sum(expected[later.name] for later in stages[number - 1 :])
        STAGE_LABEL.set(f"[{number}/{len(stages)}, about {left / 60:.0f} min left in all] ")
        whole, stage_started = not (config.folder(stage.folder) / "run.json").exists(), time.monotonic()
        runs[stage](config, accelerator)
        accelerator.wait_for_everyone()
        if whole:
            taken += time.monotonic() - stage_started
            planned += expected[stage.name]
    if accelerator.is_main_process:
        report = write_report(config.output_dir)
        write_run_card(config, shipped(config))
        push_run(config, shipped(config))
        print(f"{report} (this process: {(time.monotonic() - started) / 60:.1f} min)")


if __name__ == "__main__":
    recipe_main(
        run,
        __doc__,
        {"--push": "hub.push_to"},
        dry_run=print_estimate,
        check=partial(preflight, stages=EDGEDIT),
    )
