"""Stage 6: fine-tune the assembled student; train the teacher on for the same steps, which is the fair thing to compare
with.

    edgedit train tune --config training/recipes/digits.yaml

Writes <output_dir>/student-tuned, and (tune.teacher_more_steps) teacher-more-steps, (tune.random_proxies)
student-random-proxies. The student learns the diffusion objective plus `tune.output_kd` times the distance to the
teacher's output.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial

from accelerate import Accelerator

from edgedit_hf import EdgeDiTTransformer2DModel
from edgedit_hf.data.loading import load_training_set
from edgedit_hf.distill.denoiser import train_denoiser
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import check_fits_data, load_teacher
from edgedit_hf.estimate import print_estimate
from edgedit_hf.genotype import Genotype
from edgedit_hf.pipelines.loading import load_pipeline, with_transformer
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import STUDENT, TUNE
from edgedit_hf.run.state import RunState

READ = {
    "student-tuned": ("student",),
    "student-random-proxies": ("student", "bank", "teacher"),
    "teacher-more-steps": ("teacher",),
}
"""What each of the stage's folders starts from."""


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options = config.tune
    dataset, _ = load_training_set(config, accelerator)
    student = load_pipeline(config.folder("student"), STUDENT.made_by)
    # At the size of DiT-XL/2 the teacher is 2.7 GB a process, which most fine-tuning has no use for.
    teacher = (
        load_teacher(config).transformer
        if options.output_kd or options.random_proxies or options.teacher_more_steps
        else None
    )

    def random_student() -> EdgeDiTTransformer2DModel:
        genotype = Genotype.of(student.transformer.config)
        return ProxyBank(config.folder("bank"), teacher).assemble(genotype, random_seed=config.seed)

    starts = {"student-tuned": lambda: student.transformer}
    if options.random_proxies:
        starts["student-random-proxies"] = random_student
    if options.teacher_more_steps:
        starts["teacher-more-steps"] = lambda: teacher  # last: it changes the teacher itself, not a copy
    for name, start in starts.items():
        model = start()
        check_fits_data(model.config, dataset)
        # The teacher's distance to itself starts at zero and would only hold it back: it trains on the data alone.
        kd = 0.0 if name == "teacher-more-steps" else options.output_kd
        read = (*READ[name], "teacher") if kd else READ[name]
        state = RunState(
            config,
            TUNE,
            options.steps,
            folder=name,
            seed=config.seed + 1,  # other batches and noise than the teacher saw
            inputs={"data": dataset.fingerprint, **{name: None for name, at in TUNE.inputs if at and name not in read}},
            accelerator=accelerator,
            checkpoint_every=options.checkpoint_every,
            log_every=options.log_every,
        )
        if state.finished:
            continue
        model = train_denoiser(
            model,
            dataset,
            options,
            state,
            accelerator,
            teacher if kd else None,
            kd,
            num_workers=config.data.num_workers,
        ).cpu()
        if accelerator.is_main_process:
            with state.publish() as folder:
                with_transformer(student, model).save_pretrained(folder)
        state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(TUNE,)))
