"""Optional study: what does every single change of a layer cost? Nothing else in a run reads its results.

    edgedit train sensitivity --config training/recipes/digits.yaml

For every place of the teacher: MLP ratio 1, 2, 3; two narrower attentions; two or three neighbours merged into one.
Each change starts in closed form and is then tuned for a few steps on the teacher's features. Measured before and
after: the layer's own normalised feature loss on held-out features, and the whole model's relative output error with
that one change, and with the same change everywhere at once. Works change by change, one teacher forward a step for all
its places. Needs the teacher alone; the main process does all the work. Writes <output_dir>/sensitivity: table.json,
table.csv, table.md, plot.png.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial

from accelerate import Accelerator

from edgedit_hf.data.loading import load_training_set
from edgedit_hf.distill.bank_group import group_step, group_steps
from edgedit_hf.distill.feature_loss import rate_scale
from edgedit_hf.distill.proxy_group import train_step
from edgedit_hf.distill.sensitivity import ChangeGroup, OutputErrors, single_changes
from edgedit_hf.distill.teacher import check_fits_data, load_teacher
from edgedit_hf.distill.teacher_features import FeatureSource
from edgedit_hf.estimate import print_estimate
from edgedit_hf.files import atomic_write_json, atomic_write_text, weights_hash
from edgedit_hf.preflight import preflight
from edgedit_hf.report.plots import sensitivity_plot
from edgedit_hf.report.sensitivity import as_csv, as_markdown
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.optimisation import learning_rate_at, set_learning_rate
from edgedit_hf.run.stage import SENSITIVITY
from edgedit_hf.run.state import RunState


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options, device = config.sensitivity, accelerator.device
    dataset, _ = load_training_set(config, accelerator)
    teacher = load_teacher(config).transformer.eval().requires_grad_(False).to(device)
    check_fits_data(teacher.config, dataset)
    changes = single_changes(teacher.config)
    names = list(changes)
    state = RunState(
        config,
        SENSITIVITY,
        len(names) * group_steps(options.steps, 0),
        inputs={"data": dataset.fingerprint},
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
    )
    if state.finished:
        return
    rows, fixed, dropout = options.batch_size, options.calibration_samples, options.class_dropout
    source = FeatureSource(teacher, dataset, rows, fixed, dropout, config.seed, device)
    errors = OutputErrors(teacher, dataset, options.samples, options.timesteps, options.batch_size, config.seed, device)
    group = ChangeGroup(source, errors, options.learning_rate)
    state.track(group=group)
    for step in state.steps():
        now = group_step(step, options.steps, 0)
        name = names[now.group]
        if now.starts:
            group.start(name, changes[name])
            group.measure(name, "before")
        if now.ends:
            group.measure(name, "after")
            group.clear()
            continue
        rate = learning_rate_at(
            now.done, options.learning_rate, options.warmup_steps, options.steps, options.final_learning_rate
        )
        for key, proxy in group.proxies.items():
            set_learning_rate(proxy.optimizer, rate * rate_scale(group.written[key]["layer_before"]))
        features = source.training(now.done, len(teacher.blocks))
        state.log(loss=train_step(group.proxies.values(), features, "normalised"))

    rows = list(group.written.values())
    hash_ = weights_hash(teacher.state_dict())
    atomic_write_json(
        state.folder / "table.json",
        {"teacher_hash": hash_, "timesteps": errors.timesteps, "steps": options.steps, "rows": rows},
    )
    atomic_write_text(state.folder / "table.csv", as_csv(rows))
    atomic_write_text(state.folder / "table.md", as_markdown(rows, options.steps))
    sensitivity_plot(state.folder / "plot.png", rows, len(teacher.blocks))
    print((state.folder / "table.md").read_text(encoding="utf-8"))
    everywhere = {row["change"]: row["model_after"] for row in rows if row["layer_after"] is None}
    state.finish(changes=len(changes), places=sum(map(len, changes.values())), model_error_everywhere=everywhere)


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(SENSITIVITY,)))
