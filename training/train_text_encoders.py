"""Text-to-image, stage 1: train a tokenizer and two small text encoders on the captions, offline.

    edgedit train text --config training/recipes/digits-t2i.yaml [--override text.steps=1000]

The CLIP-type encoder learns which caption belongs to which image, the T5-type one to guess masked words. Writes
<output_dir>/text with tokenizer, text_encoder, tokenizer_2, text_encoder_2. An encoder that text.encoder or
text.encoder_2 names is used as it is instead. Interrupted or killed, run it again: it continues from the last
checkpoint to the same final weights.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from edgedit_hf.data.batches import caption_loader
from edgedit_hf.data.loading import load_run_captions
from edgedit_hf.diffusion import draws
from edgedit_hf.elastic.text_encoders import (
    IMAGE_NOISE,
    NOISE_STREAM,
    T5_TOKENS,
    Learners,
    choose_masked,
    contrastive_loss,
    gather_rows,
    judge_clip,
    judge_t5,
    masked_loss,
    new_text_encoders,
    tokenize,
)
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import print_estimate
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.optimisation import Optimisation, learning_rate_at, set_learning_rate
from edgedit_hf.run.stage import TEXT
from edgedit_hf.run.state import RunState


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options = config.text
    disable_progress_bar()  # saving a small encoder needs no bar of its own
    if options.encoder is not None and options.encoder_2 is not None:
        accelerator.print(f"text: {options.encoder} and {options.encoder_2} are used as they are")
        return
    if options.batch_size % accelerator.num_processes:
        raise EdgeDiTError(
            f"text.batch_size {options.batch_size} is not a multiple of {accelerator.num_processes} processes; change "
            "one."
        )
    dataset = load_run_captions(config)
    state = RunState(
        config,
        TEXT,
        options.steps,
        inputs={"data": dataset.fingerprint},
        accelerator=accelerator,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
    )
    if state.finished:
        return
    torch.manual_seed(config.seed)
    clip, t5, tokenizers = new_text_encoders(options, dataset.captions)
    limits = {"clip": options.max_tokens, "t5": T5_TOKENS}
    tokens = {kind: tokenize(tokenizer, dataset.captions, limits[kind]) for kind, tokenizer in tokenizers.items()}
    number = {caption: place for place, caption in enumerate(sorted(set(dataset.captions)))}
    caption_of = torch.tensor([number[caption] for caption in dataset.captions])
    channels, side = dataset.shapes[0][0], min(min(shape[1:]) for shape in dataset.shapes)
    model = Learners(clip, t5, channels, side).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    start = state.track(model=model, optimisation=Optimisation(optimizer, model.named_parameters()))
    rank, ranks = accelerator.process_index, accelerator.num_processes
    batches = caption_loader(
        dataset, options.batch_size, config.seed, start, options.steps, rank, ranks, config.data.num_workers
    )
    for step, (_, places, batch) in zip(state.steps(), batches):
        set_learning_rate(
            optimizer,
            learning_rate_at(
                step, options.learning_rate, options.warmup_steps, options.steps, options.final_learning_rate
            ),
        )
        mine = {kind: (ids[batch["rows"]], mask[batch["rows"]]) for kind, (ids, mask) in tokens.items()}
        inputs = {kind: tuple(part.to(accelerator.device) for part in pair) for kind, pair in mine.items()}
        if t5 is not None:
            ids, mask = mine["t5"]
            masked = choose_masked(
                ids, mask, tokenizers["t5"].eos_token_id, options.mask_share, config.seed, step, places.tolist()
            )
            masked = masked.to(accelerator.device)
            ids, mask = inputs["t5"]
            inputs["t5"] = ids.masked_fill(masked, tokenizers["t5"].mask_token_id), mask
        images = (
            batch["images"]
            + IMAGE_NOISE * draws(config.seed, step, places.tolist(), batch["images"].shape[1:], NOISE_STREAM).noise
        )
        text, image, logits = wrapped(images.to(accelerator.device), inputs.get("clip"), inputs.get("t5"))
        total = 0.0
        if clip is not None:
            numbers = gather_rows(caption_of[batch["rows"]].to(accelerator.device), accelerator)
            same = numbers[:, None] == numbers
            # Every rank has the loss of the whole batch and gradients of its own rows; their mean over the ranks is
            # 1/ranks of what is meant.
            loss = contrastive_loss(
                gather_rows(text, accelerator), gather_rows(image, accelerator), same, options.temperature
            )
            total = total + ranks * loss
            state.log(contrast=loss)
        if t5 is not None:
            loss = masked_loss(logits, ids, masked)
            total = total + loss
            state.log(guess=loss)
        accelerator.backward(total)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.free_memory()
    model.eval()
    facts: dict[str, dict] = {}
    if accelerator.is_main_process:
        for split in (
            ("validation", "held_out")
            if config.data.source == "digits"
            else ("validation",)
            if config.data.validation_fraction
            else ()
        ):
            judged = load_run_captions(config, split)
            facts[split] = judge_clip(model, tokenizers["clip"], judged, options.max_tokens) if clip is not None else {}
            if t5 is not None:
                facts[split] |= judge_t5(model, tokenizers["t5"], judged, options, config.seed)
        with state.publish() as folder:
            for kind, encoder, suffix in (("clip", clip, ""), ("t5", t5, "_2")):
                if encoder is not None:
                    encoder.cpu().save_pretrained(folder / f"text_encoder{suffix}")
                    tokenizers[kind].save_pretrained(folder / f"tokenizer{suffix}")
    state.finish(learned=facts)


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(TEXT,)))
