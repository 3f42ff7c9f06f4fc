"""Stage 3: the latency table. Every distinct block shape is lowered once and timed in whole networks, in the runtime
and precision that will ship.

    edgedit train latency --config training/recipes/digits.yaml

Writes <output_dir>/latency/table.json, or copies what latency.table names (several devices: their tables together). It
states how well it predicts networks that it was not fitted to. It is an input of the search, told apart by its hash:
measured once, never in passing. A killed stage finds its lowered networks again.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

import os
from functools import partial

from accelerate import Accelerator

from edgedit_hf.distill.teacher import load_teacher, search_space_of
from edgedit_hf.estimate import print_estimate
from edgedit_hf.files import atomic_write_text
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import LATENCY
from edgedit_hf.run.state import RunState
from edgedit_hf.runtimes.timing import governors, load, pinned
from edgedit_hf.search.device_tables import files_hash, given_files, given_tables
from edgedit_hf.search.latency_measurement import TableMeasurement
from edgedit_hf.search.latency_table import LatencyTable, trunk_of


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options = config.latency
    teacher = load_teacher(config).transformer.config
    space = search_space_of(config, teacher)
    table = None if options.table is None else given_tables(options, teacher, space, check_run=False)
    given = given_files(options.table)
    state = RunState(
        config,
        LATENCY,
        options.repeats,
        inputs={"table": files_hash(given)},
        also={"space": space.to_dict(), "trunk": trunk_of(teacher)},
        unit="round",
    )
    if state.finished:
        return
    if table is not None:
        table.check_run(options)
        if isinstance(table, LatencyTable):
            atomic_write_text(state.folder / "table.json", given[0].read_text(encoding="utf-8"))
        else:
            table.to_json(state.folder / "table.json")
        state.finish()
        return
    measurement = TableMeasurement(
        teacher,
        space,
        batch=options.batch_size,
        threads=options.threads,
        runtime=options.runtime,
        precision=options.precision,
    )
    with pinned(options.threads) as processors:
        before = load()
        for done in state.steps():
            if done == 0:
                measurement.lower(state.folder / "checkpoints" / "networks")
            if measurement.long_enough():
                break  # a big network: its rounds so far give a median
            measurement.round()
        while measurement.unsettled(options.repeats):
            measurement.round()
        protocol = {
            "processors": processors,  # that the process was kept on
            "governors": governors(processors or range(os.cpu_count() or 1)),
            "load": [before, load()],
        }
    table = measurement.table(protocol)
    for remark in table.remarks:
        print(f"latency: {remark}.")
    table.to_json(state.folder / "table.json")
    state.finish(prediction=table.to_dict()["prediction"])


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(LATENCY,)))
