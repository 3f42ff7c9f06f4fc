"""Stage 6: fine-tune the assembled student; train the teacher on for the same steps, which is the fair thing to compare with.

    accelerate launch training/finetune.py --config training/recipes/digits.yaml

Writes <output_dir>/student-tuned, and (tune.teacher_more_steps) teacher-more-steps, (tune.random_proxies) student-random-proxies.
The student learns the diffusion objective plus `tune.output_kd` times the distance to the teacher's output.
"""

import copy

from accelerate import Accelerator
from train_teacher import train_denoiser

from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.genotype import Genotype
from edgedit_hf.launch import check_fits_data, load_pipeline, load_teacher, load_training_set, recipe_main, with_transformer
from edgedit_hf.recipes import RunConfig
from edgedit_hf.run_state import RunState, weights_hash


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options = config.tune
    dataset, _ = load_training_set(config, accelerator)
    teacher = load_teacher(config)
    student = load_pipeline(config.folder("student"), "stage student (training/select_student.py)")
    starts = {"student-tuned": student.transformer}
    if options.random_proxies:
        genotype = Genotype.from_layers(student.transformer.config.layers, student.transformer.config.hidden_size)
        bank = ProxyBank(config.folder("bank"), teacher.transformer)
        starts["student-random-proxies"] = bank.assemble(genotype, random_seed=config.seed)
    if options.teacher_more_steps:
        starts["teacher-more-steps"] = copy.deepcopy(teacher.transformer)
    for name, model in starts.items():
        check_fits_data(model.config, dataset)
        state = RunState(
            config.folder(name),
            name,
            config.section("data", "tune"),
            options.steps,
            seed=config.seed + 1,  # other batches and noise than the teacher saw
            inputs={"start": weights_hash(model.state_dict()), "data": dataset.fingerprint},
            accelerator=accelerator,
            checkpoint_every=options.checkpoint_every,
            log_every=options.log_every,
        )
        if state.finished:
            continue
        # The teacher's distance to itself starts at zero and would only hold it back: it trains on the data alone.
        kd = 0.0 if name == "teacher-more-steps" else options.output_kd
        model = train_denoiser(model, dataset, options, state, accelerator, teacher.transformer if kd else None, kd, num_workers=config.data.num_workers)
        if accelerator.is_main_process:
            with state.publish() as folder:
                with_transformer(teacher, model.cpu()).save_pretrained(folder)
        state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__)
