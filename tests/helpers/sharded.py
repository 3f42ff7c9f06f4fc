"""A stage of the elastic network with sharded weights (FSDP2) on the CPU, where PyTorch has it; accelerate offers it on
accelerators alone.
"""

from pathlib import Path

_SCRIPT = """
import os
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from edgedit_hf.run import launch
from edgedit_hf.run.state import RunState

def make_accelerator(config, make=launch.make_accelerator):
    accelerator = make(config)
    wrapped = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["ElasticDiTBlock"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **wrapped)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator

launch.make_accelerator = make_accelerator
if os.environ.get("DIE_AT"):
    def checkpoint(self, whole=RunState.checkpoint):
        whole(self)
        if self.step == int(os.environ["DIE_AT"]):
            os._exit(9)
    RunState.checkpoint = checkpoint
from edgedit_hf.training import STAGE
launch.recipe_main(STAGE.run, "", dry_run=print)
"""


def sharded(stage: str, folder: Path) -> Path:
    """A script that runs a stage sharded, to be started by torchrun. DIE_AT=N in its environment ends every process
    with 9 once checkpoint N is kept.
    """
    script = folder / f"sharded_{stage}.py"
    script.write_text(_SCRIPT.replace("STAGE", stage))
    return script
