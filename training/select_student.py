"""Stage 5: choose a point of the front (by budget, or the knee point) and assemble its student from the bank.

    edgedit train student --config training/recipes/digits.yaml [--override student.genotype=EdgeDiT-1]

Writes <output_dir>/student, a pipeline folder, with choice.json. `edgedit select` picks another point later. A given
genotype needs no search.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

import dataclasses
from functools import partial

from accelerate import Accelerator

from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import load_teacher, read_genotype
from edgedit_hf.estimate import print_estimate
from edgedit_hf.preflight import preflight
from edgedit_hf.records import BankIndex, Front
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import BANK, SEARCH, STUDENT
from edgedit_hf.run.state import RunState
from edgedit_hf.schema import read_record
from edgedit_hf.search.selection import select, write_student


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    limits = dataclasses.asdict(config.student)
    if limits.pop("genotype") is not None:
        build(config)
        return
    front = config.folder("search", "front.json")
    read_record(front, Front, SEARCH.made_by)
    state = RunState(config, STUDENT, 1, inputs={"genotype": None})
    if state.finished:
        return
    for _ in state.steps():
        select(config.output_dir, **limits, accept_other=config.latency.accept_other, output=state.folder)
    state.finish()


def build(config: RunConfig) -> None:
    """Assemble the genotype that the recipe gives."""
    name, index = config.student.genotype, config.folder("bank", "index.json")
    genotype = read_genotype(name, "student.genotype")
    read_record(index, BankIndex, BANK.made_by, "a proxy bank")
    state = RunState(config, STUDENT, 1, inputs={"genotype": genotype.hash, "front": None})
    if state.finished:
        return
    teacher = load_teacher(config)
    bank = ProxyBank(config.folder("bank"), teacher.transformer)
    for _ in state.steps():
        write_student(teacher, bank, genotype, state.folder, {"reason": f"student.genotype is {name}"})
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(STUDENT,)))
