"""`edgedit report` and `edgedit select` import what they need, and nothing of training."""

import shutil

COMMANDS = """
import sys
from edgedit_hf.commands.cli import main

def loaded(*names):
    return sorted(set(names) & set(sys.modules))

TRAINING = ("accelerate", "botorch", "datasets", "diffusers", "evaluate", "gpytorch", "onnx", "optimum", "peft",
            "sklearn", "torchmetrics", "transformers")
assert main(["report", sys.argv[1]]) == 0
assert not (found := loaded("torch", *TRAINING)), found
assert main(["report", sys.argv[2]]) == 0  # torch is in the module that reads the captions
assert not (found := loaded(*TRAINING)), found
assert main(["select", sys.argv[1]]) == 0  # assembles a network: torch and diffusers, with what diffusers imports
assert not (found := loaded("botorch", "datasets", "evaluate", "gpytorch", "onnx", "optimum", "sklearn",
                            "torchmetrics", "edgedit_hf.run.launch")), found
"""


def test_report_and_select_import_nothing_of_training(debug_run, debug_t2i_run, run_python, tmp_path):
    copies = [shutil.copytree(run, tmp_path / run.name, symlinks=True) for run in (debug_run, debug_t2i_run)]
    run_python(COMMANDS, *copies, quiet=True)
