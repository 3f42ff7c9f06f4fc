"""Distil a many-step net to 1 … 8 steps without guidance, by knowledge-guided distribution matching. Either family.

    edgedit train few-step --config training/recipes/digits-few-step.yaml [--override few_step.sampling_steps=2]

The student goes its own way from noise with the sampler that ships; at one of its steps it learns from the many-step
net (or a teacher, --teacher PATH_OR_ID) where x_t leads, and from real score and critic how its samples differ from the
data. Of a supernet every step trains one width, drawn. Student and critic are adapters of the one frozen net
(few_step.backbone), so that all of it takes little more memory than that net; --report-memory prints it. Writes
<output_dir>/few-step, a pipeline folder that knows its steps: the best by Fréchet distance of few-step samples, not the
last. A drift of the samples' mean or contrast stops the run. Interrupted or killed, run it again: it continues from the
last checkpoint to the same final weights (few_step.continue_from best: from the best one).
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel

from edgedit_hf.elastic.sharding import ShardedModel, ShardedOptimisation
from edgedit_hf.estimate import print_few_step_estimate
from edgedit_hf.few_step.best import Best, Trained
from edgedit_hf.few_step.cost import print_memory
from edgedit_hf.few_step.diagnosis import Diagnosis, drift_message
from edgedit_hf.few_step.judge import Judge
from edgedit_hf.few_step.knowledge import Knowledge, given_knowledge, own_knowledge
from edgedit_hf.few_step.networks import CRITIC, STUDENT, Networks
from edgedit_hf.few_step.objective import Objective
from edgedit_hf.few_step.source import Conditions, Source, load_conditions, load_source, step_choice
from edgedit_hf.files import weights_hash
from edgedit_hf.preflight import preflight
from edgedit_hf.report.plots import save_montage
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.optimisation import Optimisation, check_batch, learning_rate_at
from edgedit_hf.run.stage import FEW_STEP
from edgedit_hf.run.state import RunState


def distil(
    networks: Networks,
    source: Source,
    conditions: Conditions,
    knowledge: Knowledge | None,
    judge: Judge,
    config: RunConfig,
    run: RunState,
    accelerator: Accelerator,
) -> Best:
    """The training loop; returns the best student by the mean distance of its widths."""
    options, matching = config.few_step, config.few_step.matching_weight > 0
    trained = {role: networks.trained(role) for role in networks.roles}
    projection = [] if knowledge is None else knowledge.parameters()
    if options.gradient_checkpointing:
        networks.enable_gradient_checkpointing()
    groups = [{"params": [parameter for _, parameter in trained[role]]} for role in networks.roles]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)  # one role a pass, one width
    wrapped, optimizer = accelerator.prepare(networks, optimizer)
    trained = {role: networks.trained(role) for role in networks.roles}  # FSDP2 puts others in their place
    students = [parameter for _, parameter in trained[STUDENT]]
    if projection:
        optimizer.add_param_group({"params": projection})
    ema = EMAModel(students, decay=options.ema_decay, foreach=not accelerator.is_fsdp2)
    ema.to(accelerator.device)
    beside = [(name, parameter) for role in networks.roles[1:] for name, parameter in trained[role]]
    beside += [] if not projection else [(f"projector.{n}", p) for n, p in knowledge.projector.named_parameters()]
    parts = (ShardedModel(networks), ShardedOptimisation) if accelerator.is_fsdp2 else (Trained(trained), Optimisation)
    optimisation = parts[1](optimizer, trained[STUDENT], ema, accelerator.scaler, beside)
    best, diagnosis = Best(trained[STUDENT]), Diagnosis()
    tracked = {} if not projection else {"projector": knowledge.projector}
    start = run.track(
        options.continue_from == "best",
        **{"model": parts[0], "optimisation": optimisation, "best": best, "diagnosis": diagnosis, **tracked},
    )
    ema.to(accelerator.device)
    moments = judge.moments.channel_mean.to(accelerator.device), judge.moments.channel_std.to(accelerator.device)
    if knowledge is None and options.knowledge_weight:
        knowledge = own_knowledge(config, source, wrapped)
    objective = Objective(wrapped, source, options, knowledge, moments, run.seed)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = conditions.loader(
        options.batch_size, run.seed, start, run.total_steps, rank, world, config.data.num_workers
    )
    for step, (_, rows, batch) in zip(run.steps(), batches):
        peaks = [options.learning_rate, options.critic_learning_rate][: len(networks.roles)]
        for group, peak in zip(optimizer.param_groups, [*peaks, options.learning_rate]):
            group["lr"] = learning_rate_at(
                step, peak, options.warmup_steps, run.total_steps, options.final_learning_rate
            )
        students_turn = step % options.student_every == 0
        critics_turn = matching and not (options.schedule == "alternate" and students_turn)
        k, width = step_choice(run.seed, step, len(source.timesteps), source.widths)
        count = options.gradient_accumulation
        pieces = conditions.pieces(batch, rows, count, run.seed, step, accelerator.device)
        whole = objective.moments(pieces, step, k, width, accelerator) if students_turn else None
        samples = []
        for index, piece in enumerate(pieces):
            with accelerator.autocast():
                x_t = objective.student_input(piece, step, k, width)
                if not students_turn:
                    samples.append(objective.sample(piece, x_t, k, width))
                    continue
            with nullcontext() if index == count - 1 else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    loss, x0, figures = objective.student_loss(piece, x_t, step, k, width, whole)
                accelerator.backward(loss / count)
            samples.append(x0)
            run.log(loss=loss, mean=x0.mean(), std=x0.std(), **figures)
            if matching:
                diagnosis.see(gap=figures["gap"], cosine=figures["cosine"])
        if critics_turn:
            for index, (piece, x0) in enumerate(zip(pieces, samples)):
                with nullcontext() if index == count - 1 else accelerator.no_sync(wrapped):
                    with accelerator.autocast():
                        loss = objective.critic_loss(piece, x0, step, width)
                    accelerator.backward(loss / count)
                run.log(critic=loss)
        for parameter in projection:  # outside of the wrapped module, whose gradients are means over the ranks already
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        if options.max_grad_norm:
            accelerator.unscale_gradients()
            if projection:
                torch.nn.utils.clip_grad_norm_(projection, options.max_grad_norm)
            for role in networks.roles:
                norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained[role]], options.max_grad_norm)
                if (students_turn, critics_turn)[role == CRITIC]:
                    run.log(**{f"norm_{role}": norm.full_tensor() if hasattr(norm, "full_tensor") else norm})
        optimizer.step()
        optimizer.zero_grad()
        if students_turn:
            ema.step(students)
        if critics_turn and options.critic_merge:
            with torch.no_grad():
                for (_, critic), student in zip(trained[CRITIC], students):
                    critic.lerp_(student, 1 - options.critic_merge)
        if (step + 1) % options.evaluate_every == 0 or step + 1 == run.total_steps:
            ema.store(students)
            ema.copy_to(students)
            look(judge, wrapped, source, matching, best, diagnosis, run, step + 1, accelerator)
            ema.restore(students)
    accelerator.free_memory()
    return best


def look(judge, wrapped, source, matching, best, diagnosis, run, step, accelerator) -> None:
    """Judge the averaged student at every width; keep the best, say what is wrong, and stop where it has drifted."""
    found = {}
    for width in source.widths:
        of, suffix = ("", "") if width is None else (f"of {width} ", f"_{width}")
        judged = judge(wrapped, width)
        if judged is None:
            raise run.abort(f"the few-step samples {of}hold NaN or infinite values at step {step}")
        found[width] = judged
        run.log(**{f"distance{suffix}": judged.distance, f"recall{suffix}": judged.recall})
        run.log(**{f"sample_mean{suffix}": judged.moments.mean, f"sample_std{suffix}": judged.moments.std})
        strips = judge.strips(wrapped, width, judged.latents, matching)
        if run.is_main:
            folder = run.folder / "samples"
            folder.mkdir(exist_ok=True)
            pictures = ((strips + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
            save_montage(folder / f"step-{step:06d}{suffix}.png", pictures, len(pictures) // (3 if matching else 2))
    mean = sum(judged.distance for judged in found.values()) / len(found)
    run.remark(diagnosis.update(found[source.widths[-1]].moments.std))
    for width, judged in found.items():
        message = drift_message(judge.moments, judged.moments, judge.options.mean_drift, judge.options.std_drift)
        if message is not None:
            kept = ", and continue from the best checkpoint (few_step.continue_from=best)" if best.facts else ""
            raise run.abort(
                f"{'' if width is None else f'{width}: '}{message}",
                f"Lower few_step.matching_weight or the rates, or give few_step.moments_weight{kept}",
            )
    if best.take(mean, step, {width or "full": judged.distance for width, judged in found.items()}):
        run.keep_best()


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options = config.few_step
    check_batch(options, accelerator.num_processes)
    source = load_source(config)
    conditions, judged = load_conditions(config, accelerator, source)
    knowledge = given_knowledge(config, accelerator, source, conditions) if options.knowledge_weight else None
    given = None if knowledge is None else knowledge.fingerprint
    judge = Judge(config, accelerator, source, conditions, judged)
    state = RunState(
        config,
        FEW_STEP,
        options.steps,
        inputs={
            "pipeline": weights_hash(source.pipeline.transformer.state_dict()),
            "data": conditions.dataset.fingerprint,
            "extractor": judge.extractor.hash,
            "knowledge": given,
            "text": None if conditions.texts is None else conditions.texts.fingerprint,
        },
        accelerator=accelerator,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        sharded=accelerator.is_fsdp2,
    )
    if state.finished:
        return
    networks = Networks(
        source.pipeline.transformer,
        options.backbone == "adapters",
        options.matching_weight > 0,
        options.rank,
        options.alpha,
        config.seed,
    )
    memory = networks.memory()
    best = distil(networks, source, conditions, knowledge, judge, config, state, accelerator)
    student = best.finished(networks, accelerator)
    if accelerator.is_main_process:
        with state.publish() as folder:
            source.few_step_pipeline(student.cpu().eval(), options.sampler).save_pretrained(folder)
    state.finish(best=best.facts, timesteps=source.timesteps, memory=memory)


if __name__ == "__main__":
    recipe_main(
        run,
        __doc__,
        {"--teacher": "few_step.teacher"},
        dry_run=print_few_step_estimate,
        check=partial(preflight, stages=(FEW_STEP,)),
        reports={"--report-memory": ("print what each part takes of memory", print_memory)},
    )
