"""Stage 1: train a diffusion transformer, the teacher that the later stages compress.

    edgedit train teacher --config training/recipes/digits.yaml [--override teacher.steps=2000]

Writes <output_dir>/teacher, a pipeline folder with the averaged (EMA) weights. With `teacher.path` set there is nothing
to do. Interrupted or killed, run it again: it continues from the last checkpoint to the same final weights.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial

import torch
from accelerate import Accelerator

from edgedit_hf.data.loading import load_training_set
from edgedit_hf.distill.denoiser import train_denoiser
from edgedit_hf.distill.teacher import new_pipeline, new_teacher
from edgedit_hf.estimate import print_estimate
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import TEACHER
from edgedit_hf.run.state import RunState


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options = config.teacher
    if options.path is not None:
        accelerator.print(f"teacher: {options.path} is used as it is")
        return
    dataset, vae = load_training_set(config, accelerator)
    state = RunState(
        config,
        TEACHER,
        options.steps,
        inputs={"data": dataset.fingerprint},
        accelerator=accelerator,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
    )
    if state.finished:
        return
    torch.manual_seed(config.seed)
    model = new_teacher(config, dataset.shape, dataset.num_classes)
    model = train_denoiser(model, dataset, options, state, accelerator, num_workers=config.data.num_workers)
    if accelerator.is_main_process:
        with state.publish() as folder:
            new_pipeline(model.cpu(), vae, dataset.label_names, config).save_pretrained(folder)
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(TEACHER,)))
