"""Stage 2: the proxy bank. Every smaller stand-in of every teacher layer is distilled on its own from the teacher's
features.

    edgedit train bank --config training/recipes/digits.yaml [--memory-budget-gb 16]

One teacher forward a step yields input and output of all layers and so feeds all proxies; features never touch the
disk. Ranks own disjoint ranges of layers that cost alike, and run only the teacher prefix these need. Where memory is
short, a rank's proxies visit the device in groups, one after the other, each for all its steps; the result is the same
to the last bit. Single reductions are trained first; "both" starts from the attention of one and the MLP of another and
is then trained like the rest. With `accelerate launch --mixed_precision bf16` the teacher's weights and all matrix
products are in bf16; proxies and optimisers stay in fp32. Writes <output_dir>/bank (one safetensors file a proxy,
index.json).
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from collections.abc import Iterator
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from edgedit_hf.data.loading import load_training_set
from edgedit_hf.distill import proxy_group
from edgedit_hf.distill.closed_form import combine_blocks
from edgedit_hf.distill.feature_loss import rate_scale
from edgedit_hf.distill.memory_plan import (
    PROCESS_BYTES,
    Group,
    MemoryModel,
    depth_of,
    pairs_of,
    plan_bank,
    wanted_proxies,
)
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.proxy_group import Features, Proxy, ProxyGroup, held_out_losses, start_blocks, train_step
from edgedit_hf.distill.teacher import check_fits_data, load_teacher, read_genotype, search_space_of
from edgedit_hf.distill.teacher_features import CALIBRATION_STREAM, TEST_STREAM, TRAIN_STREAM, features_at
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import print_estimate
from edgedit_hf.files import weights_hash
from edgedit_hf.genotype import LayerSpec
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.optimisation import learning_rate_at, set_learning_rate
from edgedit_hf.run.state import RunState


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options, device, precision = config.bank, accelerator.device, accelerator.mixed_precision
    if precision not in ("no", "bf16"):
        raise EdgeDiTError(
            f"The proxy bank is made in fp32 or bf16, not {precision}; launch with --mixed_precision no or bf16."
        )
    dataset, _ = load_training_set(config, accelerator)
    teacher = load_teacher(config).transformer.eval().requires_grad_(False)
    check_fits_data(teacher.config, dataset)
    space = search_space_of(config, teacher.config)
    wanted = wanted_proxies(
        space, [read_genotype(name, "bank.only") for name in options.only] if options.only is not None else None
    )
    memory = MemoryModel(
        space,
        dict(teacher.config),
        tokens=(teacher.config.sample_size // teacher.config.patch_size) ** 2,
        batch_size=options.batch_size,
        calibration_samples=options.calibration_samples,
        teacher_bytes=2 if precision == "bf16" else 4,
        state_bytes=2 if options.optimizer == "adamw8bit" else 8,
        closed_form=options.init == "closed_form",
        process_bytes=0 if device.type == "cuda" else PROCESS_BYTES,
    )
    budget = None if options.memory_budget_gb is None else 1e9 * options.memory_budget_gb
    plans = plan_bank(wanted, memory, accelerator.num_processes, budget)
    plan = plans[accelerator.process_index]
    both_steps = options.both_steps if any(space.option_of(layer) == "both" for layer in wanted) else 0
    # Ranks go through their groups in step; one with fewer waits at the end. The last step of a round writes the
    # group's files.
    length = options.steps + both_steps + 1
    state = RunState(
        config.folder("bank"),
        "bank",
        {**config.section("data", "bank"), "precision": precision},
        max(map(len, plans)) * length,
        seed=config.seed,
        inputs={"teacher": weights_hash(teacher.state_dict()), "data": dataset.fingerprint},
        accelerator=accelerator,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        sharded=True,
    )
    if state.finished:
        return
    if accelerator.is_main_process:
        ProxyBank.create(state.folder, teacher, space)
    accelerator.wait_for_everyone()
    bank = ProxyBank(state.folder, teacher)
    teacher.blocks = teacher.blocks[: depth_of(plan[-1].layers)]  # layers above the rank's own need no memory
    teacher.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    rows = min(options.batch_size, options.calibration_samples)
    features_of = partial(features_at, teacher, dataset, seed=config.seed, device=device, precision=precision)

    def batches(stream: int, depth: int) -> Iterator[Features]:
        """The calibration or held-out images, a batch at a time."""
        return (
            features_of(rows, step=i, stream=stream, depth=depth)
            for i in range(-(-options.calibration_samples // rows))
        )

    def new_proxy(layer: LayerSpec, block) -> Proxy:
        block = (bank.new_block(layer) if block is None else block).to(device).requires_grad_(True)
        return Proxy(
            layer, block, proxy_group.new_optimizer(options.optimizer, block.parameters(), options.learning_rate)
        )

    def start(members: Group) -> None:
        """Put the group's single reductions on the device, and measure how all its proxies would start."""
        for pair in pairs_of(members.layers):
            calibration, test = (
                [f.needed_by(pair) for f in batches(stream, depth_of(pair))]
                for stream in (CALIBRATION_STREAM, TEST_STREAM)
            )
            calibration = Features.cat(calibration)
            for layer in pair:
                key = bank.key(layer)
                group.starts[key] = {}
                given = calibration.of(layer)[0], calibration.conditioning
                for name, block in start_blocks(teacher, layer, given, config.seed, key, options.init):
                    group.starts[key] |= held_out_losses({name: (layer, block)}, test, precision)
                    if name == proxy_group.STARTS[options.init] and space.option_of(layer) != "both":
                        group.proxies[key] = new_proxy(layer, block)

    def judge(step: int, steps: int) -> None:
        """Add a point to the proxies' curves at a few places: held-out loss after `step` of `steps`."""
        if group.proxies and step in {0, steps // 16, steps // 4, steps}:
            for key, loss in held_out_losses(group.blocks(), batches(TEST_STREAM, group.depth), precision).items():
                group.proxies[key].curve.append([step, loss])

    def write() -> None:
        """Write the files of the proxies on the device, which have had all their steps."""
        for key, proxy in group.proxies.items():
            record = describe_proxy(proxy, group.starts[key], space.option_of(proxy.layer) == "both", config)
            group.written[key] = bank.write_proxy(proxy.layer, proxy.block, record)

    def combine(members: Group) -> None:
        """Replace the trained single reductions on the device by the "both" that are put together from them."""
        singles = {key: proxy.block for key, proxy in group.proxies.items()}
        group.clear()
        for layer in (layer for layer in members.layers if space.option_of(layer) == "both"):
            parts = [singles[bank.key(space.layer(layer.source, name))] for name in ("attention", "mlp")]
            group.proxies[bank.key(layer)] = new_proxy(layer, combine_blocks(*parts))

    group = ProxyGroup(new_proxy)
    state.track(group=group)
    proxy_group.reset_peak_memory(device)
    for step in state.steps():
        number, local = divmod(step, length)
        if number >= len(plan):
            continue  # another rank has more groups
        if local == 0:
            proxy_group.reset_peak_memory(device)
            start(plan[number])
        if local <= options.steps:
            judge(local, options.steps)
        if local == options.steps:
            write()
            combine(plan[number])
        if local >= options.steps:
            judge(local - options.steps, both_steps)
        if local == options.steps + both_steps:
            write()
            group.clear()
            group.starts = {}
        elif group.proxies:
            first, steps = (0, options.steps) if local < options.steps else (options.steps, both_steps)
            rate = learning_rate_at(local - first, options.learning_rate, options.warmup_steps, steps, 0.02)
            for proxy in group.proxies.values():
                set_learning_rate(proxy.optimizer, rate * rate_scale(proxy.curve[0][1]))
            features = features_of(options.batch_size, step=local, stream=TRAIN_STREAM, depth=group.depth)
            state.log(loss=train_step(group.proxies.values(), features, options.loss, precision))
        group.peaks[number] = max(group.peaks.get(number, 0), proxy_group.peak_memory(device))

    reports = [[describe_group(members, group.peaks[number]) for number, members in enumerate(plan)]]
    entries, reports = gather_object([group.written]), gather_object(reports)
    if accelerator.is_main_process:
        bank.write_index({key: made for part in entries for key, made in part.items()})
    state.finish(proxies=len(wanted), memory_budget_gb=options.memory_budget_gb, precision=precision, ranks=reports)


def describe_proxy(proxy: Proxy, starts: dict[str, float], both: bool, config: RunConfig) -> dict:
    """What the bank's index says of a trained proxy, see [`ProxyBank.entries`]; `starts` are the losses of its
    untrained stand-ins.
    """
    (_, before), (steps, after) = proxy.curve[0], proxy.curve[-1]
    losses = {**starts, **({"combined": before} if both else {}), "after": after}
    record = {"loss_before": before, "loss_after": after, "losses": losses, "curve": proxy.curve}
    return {**record, "steps": steps, "seed": config.seed, "init": "combined" if both else config.bank.init}


def describe_group(members: Group, peak: int) -> dict:
    """A group in `stage.json`."""
    layers = [members.layers[0].source[0], depth_of(members.layers) - 1]
    gigabytes = {"predicted_gb": round(members.predicted_bytes / 1e9, 3), "peak_gb": round(peak / 1e9, 3)}
    return {"teacher_layers": layers, "proxies": len(members.layers), **gigabytes}


if __name__ == "__main__":
    recipe_main(
        run,
        __doc__,
        {"--memory-budget-gb": "bank.memory_budget_gb"},
        dry_run=print_estimate,
        check=partial(preflight, stages=("bank",)),
    )
