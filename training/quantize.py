"""Stage quantize: about four bits a weight, from a pipeline folder alone (EdgeDiT or elastic); no data is needed.

    edgedit train quantize --config training/recipes/digits.yaml [--override quantize.path=PATH_OR_ID]

 1. Calibrate: sample with the pipeline, guidance on, and record what its network and every layer see.
 2. Judge layers: quantise one at a time, in every form it may take, and measure the error of the network's output.
 3. Allocate: the forms whose summed error is least within quantize.budget_bits; quantise. That is
    <output_dir>/quantized-untuned.
 4. Self-distil: tune biases, norms and modulation, with the weights frozen, to the unquantised network's output on its
    own samples, noised.

Writes <output_dir>/quantized, a pipeline folder that DiffusionPipeline.from_pretrained loads, with quantization.json:
the form and bits of every layer, bytes, and the output's signal-to-noise ratio by timestep before and after step 4.
Interrupted or killed, run it again: it continues.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from edgedit_hf.diffusion import Diffusion
from edgedit_hf.distill.output_loss import output_loss
from edgedit_hf.files import atomic_write_json, hash_json, weights_hash
from edgedit_hf.pipelines.loading import load_pipeline
from edgedit_hf.preflight import preflight
from edgedit_hf.quantization.calibration import record, spread
from edgedit_hf.quantization.inputs import (
    KINDS,
    Judge,
    load_prompts,
    load_source,
    load_texts,
    print_quantization_estimate,
    sampling_options,
    transformer_bytes,
    tuning_options,
    widths_of,
)
from edgedit_hf.quantization.layer_forms import LayerForms
from edgedit_hf.quantization.layers import dequantize_model, quantizable_layers, quantized_weights, set_quantized_weight
from edgedit_hf.quantization.quantizer import mark_quantized
from edgedit_hf.quantization.self_distillation import (
    POOL_STREAM,
    SamplePool,
    TunedState,
    micro_batch,
    on_device,
    step_subnet,
    tuned_parameters,
    verdicts,
)
from edgedit_hf.records import Quantization
from edgedit_hf.run.checkpoint import Facts
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.optimisation import Optimisation, check_batch, learning_rate_at, set_learning_rate
from edgedit_hf.run.stage import QUANTIZE, SELF_DISTIL
from edgedit_hf.run.state import RunState
from edgedit_hf.schema import read_record

RECORD, SAMPLES = "quantization.json", "samples.safetensors"


def quantize(config: RunConfig, accelerator: Accelerator) -> None:
    """Steps 1 to 3, on the main process."""
    options = config.quantize
    check_batch(options, accelerator.num_processes)  # of step 4: nothing is written for a batch that cannot be divided
    if not accelerator.is_main_process:
        return
    pipeline = load_source(config)
    model, widths, prompts = (
        pipeline.transformer.eval().requires_grad_(False),
        widths_of(pipeline),
        load_prompts(config, pipeline),
    )
    names = list(quantizable_layers(model))
    state = RunState(
        config,
        QUANTIZE,
        len(names),
        inputs={"pipeline": weights_hash(model.state_dict()), "prompts": hash_json(prompts)},
        also={"quantize": {"tuned": options.steps > 0}},
        checkpoint_every=options.checkpoint_every,
        log_every=1,
        unit="layer",
    )
    if state.finished:
        return
    pipeline.to(accelerator.device)
    sampling = sampling_options(config, prompts)
    calls = [
        call
        for width in widths
        for call in record(pipeline, options.calibration_images, subnet=width, **sampling).calls
    ]
    judged = [
        call
        for width in widths
        for call in spread(
            record(pipeline, options.sensitivity_images, subnet=width, **sampling).calls, options.timesteps
        )
    ]
    forms = LayerForms(model, options, calls, judged)
    measured = Facts()
    state.track(measured=measured)
    for step in state.steps():
        measured[names[step]] = forms.measure(names[step])
        state.log(mse=measured[names[step]][0]["mse"])

    chosen = forms.allocate(measured)
    judge = Judge(pipeline, options.calibration_images, **sampling)
    samples = {}
    if options.steps:
        pool = record(pipeline, options.samples, stream=POOL_STREAM, subnet=widths[-1], keep_calls=False, **sampling)
        samples = {"latents": pool.latents} | ({"labels": pool.labels} if isinstance(pool.labels, torch.Tensor) else {})
    for name, weight in forms.weights(chosen.plan).items():
        set_quantized_weight(forms.layers[name], weight)
    mark_quantized(model)
    allocation = {
        "budget_bits": options.budget_bits,
        "average_bits": chosen.average_bits,
        "summed_mse": chosen.error,
        "summed_mse_bound": chosen.bound,
    }
    results = {"error": {"untuned": judge(model)}, "layers": forms.describe(chosen, measured)}
    with state.publish() as folder:
        pipeline.to("cpu").save_pretrained(folder)
        atomic_write_json(folder / RECORD, {**allocation, "bytes": transformer_bytes(folder), **results})
        if samples:
            save_file(samples, folder / SAMPLES)
    state.finish(average_bits=chosen.average_bits)


def self_distil(config: RunConfig, accelerator: Accelerator) -> None:
    """Step 4: tune what is not quantised, on every process."""
    options, start = config.quantize, config.folder("quantized-untuned")
    made_by = "this stage's first part"
    state = RunState(
        config,
        SELF_DISTIL,
        options.steps,
        accelerator=accelerator,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
    )
    if state.finished:
        return
    source, model = load_source(config), load_pipeline(start, made_by, kind=KINDS).transformer
    prompts, frozen = load_prompts(config, source), list(quantized_weights(model))
    teacher = source.transformer.to(accelerator.device).eval().requires_grad_(False)
    dequantize_model(model)  # unpacked once for the loop; the packed weights are read again for the result
    tuned = tuned_parameters(model.train().requires_grad_(False), frozen)
    for parameter in tuned.values():
        parameter.requires_grad_(True)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters, names = list(tuned.values()), getattr(model, "subnet_names", [])
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=True
    )  # norms and modulation of the other widths
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(parameters, decay=options.ema_decay, foreach=True)
    ema.to(accelerator.device)
    state.track(tuned=TunedState(tuned), optimisation=Optimisation(optimizer, tuned.items(), ema, accelerator.scaler))
    ema.to(accelerator.device)
    if options.steps:
        made = load_file(start / SAMPLES)
        pool = SamplePool(made["latents"], made.get("labels"), load_texts(config, source, prompts, accelerator))
        teacher.to(accelerator.device)
    diffusion = Diffusion("flow_prediction" if names or prompts else model.config["prediction_type"])
    classes, channels = model.config.get("num_classes", 0), model.config["in_channels"]
    drawing = {"num_classes": classes, **tuning_options(config, source)}
    per_piece = options.batch_size // (accelerator.num_processes * options.gradient_accumulation)
    for step in state.steps():
        rate = learning_rate_at(
            step, options.learning_rate, options.warmup_steps, options.steps, options.final_learning_rate
        )
        set_learning_rate(optimizer, rate)
        width = step_subnet(names, config.seed, step)
        asked = {} if width is None else {"subnet": width}
        for index in range(options.gradient_accumulation):
            first = (accelerator.process_index * options.gradient_accumulation + index) * per_piece
            piece = micro_batch(pool, diffusion, config.seed, step, range(first, first + per_piece), **drawing)
            noisy, t, condition = (on_device(part, accelerator.device) for part in piece)
            with nullcontext() if index == options.gradient_accumulation - 1 else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    with torch.no_grad():
                        reference = teacher(noisy, t, **condition, **asked).sample
                    output = wrapped(noisy, t, **condition, **asked).sample
                loss = output_loss(output, reference, channels).mean()
                accelerator.backward(loss / options.gradient_accumulation)
            state.log(loss=loss)
        if options.max_grad_norm:
            accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
    if options.steps:
        ema.copy_to(parameters)
    if accelerator.is_main_process:
        found = read_record(start / RECORD, Quantization, made_by)
        packed = load_pipeline(start, made_by, kind=KINDS)
        TunedState(tuned_parameters(packed.transformer, frozen)).load_state_dict(TunedState(tuned).state_dict())
        judge = Judge(source.to(accelerator.device), options.calibration_images, **sampling_options(config, prompts))
        found["error"]["tuned"] = judge(packed.transformer.to(accelerator.device).eval())
        with state.publish() as folder:
            packed.to("cpu").save_pretrained(folder)
            atomic_write_json(
                folder / RECORD,
                {**found, "bytes": transformer_bytes(folder), "tuned_parameters": sum(p.numel() for p in parameters)},
            )
        for line in verdicts(found, start):
            print(line)
    accelerator.free_memory()
    state.finish(average_bits=read_record(start / RECORD, Quantization, made_by)["average_bits"])


def run(config: RunConfig, accelerator: Accelerator) -> None:
    quantize(config, accelerator)
    accelerator.wait_for_everyone()
    self_distil(config, accelerator)


if __name__ == "__main__":
    recipe_main(
        run, __doc__, dry_run=print_quantization_estimate, check=partial(preflight, stages=(QUANTIZE, SELF_DISTIL))
    )
