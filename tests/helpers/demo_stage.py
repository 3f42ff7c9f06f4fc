"""A stage that no table has, in any folder."""

from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.stage import Input, Stage
from edgedit_hf.run.state import RunState


def demo_run(folder, name, values, steps, *, kind=RunState, **options) -> RunState:
    """The state of a stage in `folder` whose result depends on `values`, and on the inputs that are given."""
    stage = Stage(name, "demo.py", ".", "a test", ("seed",), tuple(Input(name) for name in options.get("inputs") or {}))
    return kind(RunConfig(output_dir=str(folder)), stage, steps, also=values, **options)
