"""Stage elastic: train the elastic text-to-image supernet, all widths in one set of weights.

    edgedit train elastic --config training/recipes/digits-t2i.yaml [--override elastic.steps=2000]

Each step runs the full net and one drawn sub-network (or two: elastic.sampling sandwich) on the same batch, noise and
timesteps: flow loss on each, plus the sub-network's distance to the full net's velocity; their gradients are balanced
where they share weights (elastic/losses.py). With --teacher PATH_OR_ID (knowledge.teacher) the full net also learns
from a large flow pipeline on the same latents (elastic/knowledge.py). Writes <output_dir>/elastic, a pipeline folder
with the averaged (EMA) supernet and the text encoders of stage text; the validation loss of every width is in its
stage.json. Interrupted or killed, run it again: it continues from the last checkpoint to the same final weights.

Memory for W weights: 4 bytes each for weights, moving average, two moments, and one gradient for every network of a
step (full and drawn): 24·W with one sub-network a step. training/accelerate/fsdp.yaml shards all of it between GPUs
(FSDP2); such a run continues on as many.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel

from edgedit_hf.data.batches import caption_loader
from edgedit_hf.data.captions import CaptionedDataset
from edgedit_hf.data.loading import load_captioned_set
from edgedit_hf.data.text_table import TextTable
from edgedit_hf.diffusion import TRAIN_TIMESTEPS, Diffusion
from edgedit_hf.elastic.cost import print_elastic_estimate
from edgedit_hf.elastic.draws import micro_batches, step_subnets
from edgedit_hf.elastic.knowledge import Knowledge, load_knowledge
from edgedit_hf.elastic.losses import (
    balance_scale,
    combine_gradients,
    distillation_loss,
    take_gradients,
    validation_losses,
)
from edgedit_hf.elastic.sharding import ShardedModel, ShardedOptimisation, whole
from edgedit_hf.elastic.supernet import load_text_table, new_elastic, new_elastic_pipeline
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.optimisation import Optimisation, check_batch, learning_rate_at, set_learning_rate
from edgedit_hf.run.sections import ElasticConfig
from edgedit_hf.run.stage import ELASTIC
from edgedit_hf.run.state import RunState


def train_supernet(
    model: ElasticDiTTransformer2DModel,
    dataset: CaptionedDataset,
    texts: TextTable,
    options: ElasticConfig,
    run: RunState,
    accelerator: Accelerator,
    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    num_workers: int = 0,
    knowledge: Knowledge | None = None,
) -> tuple[ElasticDiTTransformer2DModel, dict[str, float]]:
    """The training loop; returns the model with its averaged weights, and the validation losses of its widths.

    A stand-alone net (no sub-networks) trains as one network does: that is the reference that a supernet is compared
    with. With `knowledge` the full net learns from a teacher too.
    """
    check_batch(options, accelerator.num_processes)
    diffusion, names = Diffusion("flow_prediction"), model.subnet_names
    full = names[-1] if names else "full"
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train().requires_grad_(True)
    projection = [] if knowledge is None else knowledge.parameters()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=True
    )  # norms and modulation of the other widths
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if projection:  # no part of the network that is wrapped, nor sharded with it
        optimizer.add_param_group({"params": projection})
    ema = EMAModel(
        model.parameters(), decay=options.ema_decay, foreach=not accelerator.is_fsdp2
    )  # sharded tensors have no foreach copy
    ema.to(accelerator.device)

    tracked = {} if knowledge is None else {"projector": knowledge.projector}
    beside = [
        (f"projector.{name}", parameter) for module in tracked.values() for name, parameter in module.named_parameters()
    ]
    parts = (ShardedModel(model), ShardedOptimisation) if accelerator.is_fsdp2 else (model, Optimisation)
    optimisation = parts[1](optimizer, model.named_parameters(), ema, accelerator.scaler, beside)
    start = run.track(model=parts[0], optimisation=optimisation, **tracked)
    ema.to(accelerator.device)
    batches = caption_loader(
        dataset,
        options.batch_size,
        run.seed,
        start,
        run.total_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=num_workers,
    )
    for step, (_, rows, batch) in zip(run.steps(), batches):
        rate = learning_rate_at(
            step, options.learning_rate, options.warmup_steps, run.total_steps, options.final_learning_rate
        )
        set_learning_rate(optimizer, rate)
        pieces = micro_batches(batch, texts, rows.tolist(), step, run.seed, options, accelerator.device)
        drawn = step_subnets(names, run.seed, step, options.sampling)
        targets, gradients = [], []  # the full net's velocities, a micro-batch each; gradients of every network
        for name in (full, *drawn):
            for index, piece in enumerate(pieces):
                # Gradients of all but the last micro-batch stay on their rank.
                with nullcontext() if index == len(pieces) - 1 else accelerator.no_sync(wrapped):
                    with accelerator.autocast():
                        asked = {
                            "return_features": name == full and knowledge is not None,
                            "subnet": name if names else None,
                        }
                        output = wrapped(piece.noisy, piece.t, piece.text, piece.masks, **asked)
                    velocity = output.sample
                    flow = diffusion.loss(velocity, piece.x0, piece.noise, piece.t)
                    loss = total = flow.mean()
                    if name == full:
                        targets.append(velocity.detach())
                        if knowledge is not None:
                            sigma = piece.t / TRAIN_TIMESTEPS
                            taught, distances = knowledge.loss(
                                flow, velocity, output.features, piece.noisy, sigma, piece.rows, piece.without_text
                            )
                            total = taught.mean()
                            run.log(**distances)
                    else:
                        distance = distillation_loss(velocity, targets[index]).mean()
                        total = total + options.distillation * distance
                        run.log(**{f"distance_{name}": distance})
                    accelerator.backward(total / len(pieces))
                run.log(**{f"loss_{name}": loss})
            gradients.append(take_gradients(model.parameters()))
        of_full, *of_subs = gradients
        scales = [
            balance_scale(of_full, of_sub, options.balance_limit) if options.balance == "gradient_norm" else 1.0
            for of_sub in of_subs
        ]
        for parameter, gradient in zip(model.parameters(), combine_gradients(of_full, of_subs, scales)):
            parameter.grad = gradient
        run.log(**{f"balance_{name}": scale for name, scale in zip(drawn, scales)})
        for parameter in projection:  # outside of the wrapped network, whose gradients are means over the ranks already
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        if options.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        if validate is not None and options.validate_every and (step + 1) % options.validate_every == 0:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            run.log(**{f"validation_{name}": loss for name, loss in validate(wrapped).items()})
            ema.restore(model.parameters())

    ema.copy_to(model.parameters())
    losses = {} if validate is None else validate(wrapped)
    if options.gradient_checkpointing:
        model.disable_gradient_checkpointing()
    model = whole(model, accelerator)
    accelerator.free_memory()
    return model.eval(), losses


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options = config.elastic
    dataset, vae = load_captioned_set(config, accelerator)
    encoders = new_elastic_pipeline(config, None)
    texts = load_text_table(config, accelerator, encoders, dataset.captions)
    torch.manual_seed(config.seed)
    model = new_elastic(config, dataset.shapes, texts.dims)
    knowledge = load_knowledge(config, accelerator, model, dataset, vae)
    taught_by = None if knowledge is None else knowledge.teacher.fingerprint
    state = RunState(
        config,
        ELASTIC,
        options.steps,
        inputs={"data": dataset.fingerprint, "text": texts.fingerprint, "teacher": taught_by},
        accelerator=accelerator,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        sharded=accelerator.is_fsdp2,
    )
    if state.finished:
        return
    validate = None
    if options.validation_samples:
        held_out, _ = load_captioned_set(config, accelerator, "validation")
        held_out_texts = load_text_table(config, accelerator, encoders, held_out.captions, "validation")

        def validate(network: torch.nn.Module) -> dict[str, float]:
            return validation_losses(
                network,
                model,
                held_out,
                held_out_texts,
                options.validation_samples,
                options.batch_size,
                config.seed,
                accelerator,
            )

    model, losses = train_supernet(
        model, dataset, texts, options, state, accelerator, validate, config.data.num_workers, knowledge
    )
    if accelerator.is_main_process:
        with state.publish() as folder:
            new_elastic_pipeline(config, model.cpu(), vae).save_pretrained(folder)
    drawn = [
        name
        for step in range(options.steps)
        for name in step_subnets(model.subnet_names, config.seed, step, options.sampling)
    ]
    state.finish(validation=losses, sampled={name: drawn.count(name) for name in model.subnet_names[:-1]})


if __name__ == "__main__":
    recipe_main(
        run,
        __doc__,
        {"--teacher": "knowledge.teacher"},
        dry_run=print_elastic_estimate,
        check=partial(preflight, stages=(ELASTIC,)),
    )
