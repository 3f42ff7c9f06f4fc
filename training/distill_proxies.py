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

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from edgedit_hf.data.loading import load_training_set
from edgedit_hf.distill.bank_group import BankGroup, describe_group, group_step, group_steps
from edgedit_hf.distill.feature_loss import rate_scale
from edgedit_hf.distill.memory_plan import PROCESS_BYTES, MemoryModel, combined, depth_of, plan_bank, wanted_proxies
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.proxy_group import peak_memory, reset_peak_memory, train_step
from edgedit_hf.distill.teacher import check_fits_data, load_teacher, read_genotype, search_space_of
from edgedit_hf.distill.teacher_features import FeatureSource
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import print_estimate
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.optimisation import learning_rate_at, set_learning_rate
from edgedit_hf.run.stage import BANK
from edgedit_hf.run.state import RunState
from edgedit_hf.search_space import grid_tokens


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
        tokens=grid_tokens(teacher.config),
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
    both_steps = options.both_steps if any(combined(space, layer) for layer in wanted) else 0
    # Ranks go through their groups in step; one with fewer waits at the end.
    state = RunState(
        config,
        BANK,
        max(map(len, plans)) * group_steps(options.steps, both_steps),
        inputs={"data": dataset.fingerprint},
        also={"precision": precision},
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
    depth = max(depth_of(members.layers) for members in plan)
    teacher.blocks = teacher.blocks[:depth]  # layers above the rank's own need no memory
    teacher.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    rows, fixed, dropout = options.batch_size, options.calibration_samples, options.class_dropout
    source = FeatureSource(teacher, dataset, rows, fixed, dropout, config.seed, device, precision)
    group = BankGroup(bank, source, options)
    state.track(group=group)
    reset_peak_memory(device)
    for step in state.steps():
        now = group_step(step, options.steps, both_steps)
        if now.group >= len(plan):
            continue  # another rank has more groups
        if now.starts:
            reset_peak_memory(device)
            group.start(plan[now.group])
        if now.combines:
            group.judge(options.steps, options.steps)
            group.write()
            group.combine(plan[now.group])
        group.judge(now.done, now.steps)
        if now.ends:
            group.write()
            group.end()
        elif group.proxies:
            rate = learning_rate_at(
                now.done, options.learning_rate, options.warmup_steps, now.steps, options.final_learning_rate
            )
            for proxy in group.proxies.values():
                set_learning_rate(proxy.optimizer, rate * rate_scale(proxy.curve[0][1]))
            features = source.training(now.local, group.depth)
            state.log(loss=train_step(group.proxies.values(), features, options.loss, precision))
        group.peaks[now.group] = max(group.peaks.get(now.group, 0), peak_memory(device))

    reports = [[describe_group(members, group.peaks[number]) for number, members in enumerate(plan)]]
    entries, reports = gather_object([group.written]), gather_object(reports)
    if accelerator.is_main_process:
        bank.write_index({key: made for part in entries for key, made in part.items()})
    state.finish(proxies=len(wanted), memory_budget_gb=options.memory_budget_gb, precision=precision, ranks=reports)


if __name__ == "__main__":
    recipe_main(
        run,
        __doc__,
        {"--memory-budget-gb": "bank.memory_budget_gb"},
        dry_run=print_estimate,
        check=partial(preflight, stages=(BANK,)),
    )
