"""The denoiser's training loop: diffusion loss, the moving average of the weights, distillation of the output."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..data.batches import step_loader
from ..diffusion import Diffusion, draws, drop_labels
from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
from ..run.optimisation import Optimisation, check_batch, learning_rate_at, set_learning_rate
from ..run.sections import TeacherConfig, TuneConfig
from ..run.state import RunState
from .output_loss import output_loss


def train_denoiser(
    model: EdgeDiTTransformer2DModel,
    dataset,
    options: TeacherConfig | TuneConfig,
    run: RunState,
    accelerator: Accelerator,
    teacher: EdgeDiTTransformer2DModel | None = None,
    output_kd: float = 0.0,
    on_step=None,
    num_workers: int = 0,
) -> EdgeDiTTransformer2DModel:
    """The diffusion training loop of teachers and students; returns the model with its averaged weights.

    `teacher` with `output_kd` > 0 adds the distance to the teacher's output. `on_step(step, ema_model)` is called after
    every step.
    """
    check_batch(options, accelerator.num_processes)
    diffusion = Diffusion.for_config(model.config)
    classes, channels = model.config.num_classes, model.config.in_channels
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train().requires_grad_(True)
    if (
        model.side_blocks
    ):  # they serve masked inputs (MDT), which there are none of here; ranks would wait for their gradients
        model.side_blocks.requires_grad_(False)
        model.mask_token.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=options.ema_decay, foreach=True)
    ema.to(accelerator.device)
    if teacher is not None:
        teacher.to(accelerator.device).eval().requires_grad_(False)

    start = run.track(
        model=model, optimisation=Optimisation(optimizer, model.named_parameters(), ema, accelerator.scaler)
    )
    ema.to(accelerator.device)
    batches = step_loader(
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
        drawn = draws(run.seed, step, rows.tolist(), batch["images"].shape[1:])
        pieces = zip(
            *(tensor.chunk(options.gradient_accumulation) for tensor in (batch["images"], batch["labels"], *drawn))
        )
        for index, piece in enumerate(pieces):
            x0, labels, u, drop, noise = (tensor.to(accelerator.device) for tensor in piece)
            t = diffusion.timesteps(u)
            labels = drop_labels(labels, drop, options.class_dropout, classes) if classes else None
            noisy = diffusion.noisy(x0, noise, t)
            last = index == options.gradient_accumulation - 1
            # Gradients of all but the last micro-batch stay on their rank.
            with nullcontext() if last else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    output = wrapped(noisy, t, labels).sample
                loss = diffusion.loss(output, x0, noise, t).mean()
                total = loss
                if output_kd:
                    with torch.no_grad(), accelerator.autocast():
                        reference = teacher(noisy, t, labels).sample
                    distance = output_loss(output, reference, channels).mean()
                    total = total + output_kd * distance
                    run.log(distance=distance)
                accelerator.backward(total / options.gradient_accumulation)
            run.log(loss=loss)
        if options.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        if on_step is not None:
            on_step(step + 1, model, ema)

    ema.copy_to(model.parameters())
    if options.gradient_checkpointing:
        model.disable_gradient_checkpointing()
    accelerator.free_memory()  # it keeps every optimiser that it prepared: 8 bytes a weight of each model of the run
    return model.eval()
