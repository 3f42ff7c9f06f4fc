"""Stage 5: choose a point of the front (by budget, or the knee point) and assemble its student from the bank.

    accelerate launch training/select_student.py --config training/recipes/digits.yaml

Writes <output_dir>/student, a pipeline folder, with choice.json. `edgedit select` picks another point later.
"""

import dataclasses

from accelerate import Accelerator

from edgedit_hf.launch import recipe_main
from edgedit_hf.recipes import RunConfig
from edgedit_hf.run_state import RunState, file_sha256, read_json
from edgedit_hf.search.selection import select


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    front = config.folder("search", "front.json")
    read_json(front, "stage search (training/search_architecture.py)")
    state = RunState(config.folder("student"), "student", config.section("student"), 1, inputs={"front": file_sha256(front)})
    if state.finished:
        return
    for _ in state.steps():
        select(config.output_dir, **dataclasses.asdict(config.student), output=state.folder)
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__)
