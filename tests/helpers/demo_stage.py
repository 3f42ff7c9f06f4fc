"""A stage that no table has, in any folder."""

import torch
from safetensors.torch import save_file

from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.stage import Input, Stage
from edgedit_hf.run.state import RunState


def demo_run(folder, name, values, steps, *, kind=RunState, **options) -> RunState:
    """The state of a stage in `folder` whose result depends on `values`, and on the inputs that are given."""
    stage = Stage(name, "demo.py", ".", "a test", ("seed",), tuple(Input(name) for name in options.get("inputs") or {}))
    return kind(RunConfig(output_dir=str(folder)), stage, steps, also=values, **options)


def finished_with_results(folder, config=None) -> RunState:
    """One of a step, which published a file of weights."""
    run = demo_run(folder, "demo", config or {}, 1)
    if not run.finished:
        for _ in run.steps():
            pass
        with run.publish() as aside:
            (aside / "model").mkdir()
            save_file({"weight": torch.ones(3)}, aside / "model" / "weights.safetensors")
        run.finish()
    return run
