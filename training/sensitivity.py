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

import statistics
from functools import partial

from accelerate import Accelerator

from edgedit_hf.data.loading import load_training_set
from edgedit_hf.distill.closed_form import closed_form_block
from edgedit_hf.distill.feature_loss import rate_scale
from edgedit_hf.distill.proxy_group import Features, Proxy, ProxyGroup, held_out_losses, new_optimizer, train_step
from edgedit_hf.distill.sensitivity import (
    Judge,
    disjoint,
    saved,
    single_changes,
)
from edgedit_hf.distill.teacher import check_fits_data, load_teacher
from edgedit_hf.distill.teacher_features import CALIBRATION_STREAM, TEST_STREAM, TRAIN_STREAM, features_at
from edgedit_hf.estimate import print_estimate
from edgedit_hf.files import atomic_write_json, atomic_write_text, weights_hash
from edgedit_hf.genotype import LayerSpec
from edgedit_hf.preflight import preflight
from edgedit_hf.report.plots import sensitivity_plot
from edgedit_hf.report.sensitivity import as_csv, as_markdown
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.optimisation import learning_rate_at, set_learning_rate
from edgedit_hf.run.state import RunState


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options, device = config.sensitivity, accelerator.device
    dataset, _ = load_training_set(config, accelerator)
    teacher = load_teacher(config).transformer.eval().requires_grad_(False).to(device)
    check_fits_data(teacher.config, dataset)
    changes = single_changes(teacher.config)
    length = options.steps + 1  # the last one of a change measures
    state = RunState(
        config.folder("sensitivity"),
        "sensitivity",
        config.section("data", "sensitivity"),
        len(changes) * length,
        seed=config.seed,
        inputs={"teacher": weights_hash(teacher.state_dict()), "data": dataset.fingerprint},
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
    )
    if state.finished:
        return
    judge = Judge(teacher, dataset, options.samples, options.timesteps, options.batch_size, config.seed, device)

    def features_of(rows: int, step: int, stream: int) -> Features:
        return features_at(teacher, dataset, rows, config.seed, step, stream, device, "no", len(teacher.blocks))

    def batches(stream: int) -> list[Features]:
        """Calibration or held-out features, in pieces of a training batch's size."""
        rows = min(options.batch_size, options.calibration_samples)
        return [features_of(rows, step, stream) for step in range(-(-options.calibration_samples // rows))]

    test = batches(TEST_STREAM)

    def new_proxy(layer: LayerSpec, block) -> Proxy:
        block = (teacher.new_block(layer.to_dict()) if block is None else block).to(device).requires_grad_(True)
        return Proxy(layer, block, new_optimizer("adamw", block.parameters(), options.learning_rate))

    group = ProxyGroup(new_proxy)

    def measure(name: str, when: str) -> None:
        """Note the damage of every place of the change, and of all places at once, `when` ("before" or "after" the
        tune).
        """
        losses = held_out_losses(group.blocks(), test)
        places = {key: [(proxy.layer, proxy.block)] for key, proxy in group.proxies.items()}
        everywhere = disjoint(proxy.layer for proxy in group.proxies.values())
        places[f"{name}: all"] = [
            (proxy.layer, proxy.block) for proxy in group.proxies.values() if proxy.layer in everywhere
        ]
        for key, blocks in places.items():
            errors = judge(blocks)
            row = group.written.setdefault(
                key, {"change": name, "layers": [list(layer.source) for layer, _ in blocks], **saved(teacher, blocks)}
            )
            row[f"layer_{when}"] = losses.get(key)
            row[f"model_{when}"] = statistics.fmean(errors)
            row[f"model_{when}_by_timestep"] = errors

    state.track(group=group)
    for step in state.steps():
        number, local = divmod(step, length)
        name = list(changes)[number]
        if local == 0:
            calibration = Features.cat(batches(CALIBRATION_STREAM))
            for layer in changes[name]:
                sources = [teacher.blocks[i] for i in layer.source]
                x, conditioning = calibration.inputs[layer.source[0]], calibration.conditioning
                block = closed_form_block(sources, x, conditioning, layer.attention_dim, layer.mlp_ratio)
                group.proxies[f"{name}: {layer.source[0]}"] = new_proxy(layer, block)
            del calibration
            measure(name, "before")
        if local == options.steps:
            measure(name, "after")
            group.clear()
            continue
        rate = learning_rate_at(local, options.learning_rate, options.warmup_steps, options.steps, 0.02)
        for key, proxy in group.proxies.items():
            set_learning_rate(proxy.optimizer, rate * rate_scale(group.written[key]["layer_before"]))
        state.log(
            loss=train_step(group.proxies.values(), features_of(options.batch_size, local, TRAIN_STREAM), "normalised")
        )

    rows = list(group.written.values())
    hash_ = weights_hash(teacher.state_dict())
    atomic_write_json(
        state.folder / "table.json",
        {"teacher_hash": hash_, "timesteps": judge.timesteps, "steps": options.steps, "rows": rows},
    )
    atomic_write_text(state.folder / "table.csv", as_csv(rows))
    atomic_write_text(state.folder / "table.md", as_markdown(rows, options.steps))
    sensitivity_plot(state.folder / "plot.png", rows, len(teacher.blocks))
    print((state.folder / "table.md").read_text(encoding="utf-8"))
    everywhere = {row["change"]: row["model_after"] for row in rows if row["layer_after"] is None}
    state.finish(changes=len(changes), places=sum(map(len, changes.values())), model_error_everywhere=everywhere)


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=("sensitivity",)))
