"""What few-step distillation takes, before anything runs: FLOPs of a step, and bytes of every part."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..distill.memory_plan import PROCESS_BYTES
from ..elastic.flow_teacher import transformer_bytes
from ..errors import EdgeDiTError
from ..hub import resolve
from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
from ..models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from ..pipelines.loading import source_path
from ..run.config import RunConfig
from ..run.cost import BACKWARD, UPDATE_BYTES, Estimate, Machine, saved_bytes
from ..run.sections import FewStepConfig
from ..run.stage import FEW_STEP
from ..search_space import TEXT_TOKENS
from .checks import check_widths
from .networks import STUDENT, Networks, is_elastic, separate_bytes


def net_to_distil(config: RunConfig) -> Any:
    """The net that is distilled, on the meta device: its weights are not read."""
    path = source_path(config, "few_step.path", "distil")
    try:
        folder = resolve(path, ["transformer/config.json"])
        values = EdgeDiTTransformer2DModel.load_config(str(folder), subfolder="transformer")
    except (OSError, ValueError) as error:
        raise EdgeDiTError(
            f"few_step.path is {path}, where no config of a transformer is; give a pipeline folder, or fetch the Hub's "
            "first."
        ) from error
    kind = ElasticDiTTransformer2DModel if "subnets" in values else EdgeDiTTransformer2DModel
    with torch.device("meta"):
        model = kind.from_config(values)
        check_widths(path, config.few_step, getattr(model, "subnet_names", []))
        if config.few_step.subnet is None:
            return model
        model.set_active_subnet(config.few_step.subnet)
        return kind.from_config(model.active_subnet_config())


def meta_networks(model: Any, options: FewStepConfig) -> Networks:
    """The networks of a run around a model on the meta device."""
    with torch.device("meta"):
        return Networks(model, options.backbone == "adapters", options.matching_weight > 0, options.rank, options.alpha)


def memory_lines(networks: Networks, weights: int) -> list[str]:
    """What each part takes, and all of it beside nets of their own in float32."""
    parts = networks.memory()
    whole, separate = sum(parts.values()), separate_bytes(weights, len(networks.roles) > 1)
    return [
        *(f"{name:<26} {told_bytes(size):>10}" for name, size in {**parts, "all": whole}.items()),
        f"{'nets of their own, float32':<26} {told_bytes(separate):>10}: {whole / separate:.3f} of it is needed",
    ]


def teacher_bytes(options: FewStepConfig, elastic: bool, gpu: bool) -> float:
    """Bytes of a given teacher's weights; 0 where there is none, or it is not on this machine."""
    if options.teacher is None or not options.knowledge_weight:
        return 0.0
    try:
        return float(transformer_bytes(options.teacher, options.quantization, 2 if elastic and gpu else 4))
    except (OSError, ValueError):
        return 0.0


def told_bytes(size: float) -> str:
    """Bytes in three digits: 1.21 MB, 4.05 GB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1e3 * factor else f"{size / factor:.0f} {unit}"
    return f"{size / 1e3:.3g} kB"


def print_memory(config: RunConfig) -> None:
    """Print what each part of the run takes of memory."""
    model = net_to_distil(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    for line in memory_lines(meta_networks(model, config.few_step), weights):
        print(line)
    if given := teacher_bytes(config.few_step, is_elastic(model), torch.cuda.is_available()):
        print(f"{'the teacher, beside these':<26} {told_bytes(given):>10}")
    print("Gradients and activations come on top; --dry-run counts them.")


def forwards(options: FewStepConfig, guided: bool, matched_guided: bool) -> float:
    """Forwards of the net for a step and image, the mean over the steps of training; a backward counts for two.

    Args:
        guided: whether the teacher is. matched_guided: whether the real score is.
    """
    student = 1 / options.student_every
    critic = 0.0 if not options.matching_weight else 1 - student * (options.schedule == "alternate")
    simulated = (options.sampling_steps - 1) / 2
    known = options.knowledge_steps * (2 if guided else 1) if options.knowledge_weight else 0
    terms = 3 if options.decoupled is False else 4  # coupled; or a guidance term at noise of its own
    scores = (terms if matched_guided else 2) if options.matching_weight else 0
    judged = options.samples * options.sampling_steps / (options.evaluate_every * options.batch_size)
    return simulated + student * (1 + BACKWARD + known + scores) + critic * (1 + BACKWARD) + (1 - student) + judged


def activation_bytes(model: Any, options: FewStepConfig) -> float:
    """Bytes that autograd keeps of a float32 forward of the student for one image of the net's own size."""
    values, shape = model.config, (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    with torch.device("meta"):  # where adapters can be added
        networks = Networks(
            type(model).from_config(values), options.backbone == "adapters", False, options.rank, options.alpha
        )
    with FakeTensorMode():  # as the CPU's attention keeps less than that of the meta device
        for module in networks.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(weight.shape), weight.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        label = torch.zeros(1, dtype=torch.int64) if values.get("num_classes") else None
        condition: dict[str, Any] = {"class_labels": label}
        if is_elastic(model):
            texts = [torch.empty(1, TEXT_TOKENS, dim) for dim in values.text_dims]
            masks = [torch.ones(1, TEXT_TOKENS, dtype=torch.bool) for _ in texts]
            condition = {"encoder_hidden_states": texts, "encoder_attention_mask": masks}

        def forward() -> torch.Tensor:
            t = torch.empty(1) if is_elastic(model) else torch.zeros(1, dtype=torch.int64)
            return networks(STUDENT, torch.empty(1, *shape), t, condition)[0].square().mean()

        found = float(saved_bytes(forward, networks))
        if options.gradient_checkpointing:
            networks.enable_gradient_checkpointing()
            layers = sum(values.num_layers) if is_elastic(model) else len(model.blocks)
            found = saved_bytes(forward, networks) + found / layers
    return found


def few_step_estimate(
    config: RunConfig, machine: Machine, model: Any, flops: float, guided: bool, activations: float
) -> Estimate:
    """Cost of stage few-step.

    Args:
        model: the net, which may be on the meta device. flops: of a forward of it. guided: whether the teacher is.
        activations: from [`activation_bytes`].
    """
    options = config.few_step
    weights = sum(parameter.numel() for parameter in model.parameters())
    networks = meta_networks(model, options)  # which adds adapters to the net
    matched_guided = is_elastic(model) if options.real_guidance is None else options.real_guidance > 1
    trained = sum(parameter.numel() for role in networks.roles for _, parameter in networks.trained(role))
    seconds = options.steps * (
        forwards(options, guided, matched_guided) * options.batch_size * flops / (machine.processes * machine.flops)
        + UPDATE_BYTES * trained / machine.update_bytes
    )
    held = sum(networks.memory().values()) + teacher_bytes(options, is_elastic(model), machine.gpu)
    held += 4 * trained * (2 if machine.processes > 1 else 1)
    micro = -(-options.batch_size // (machine.processes * options.gradient_accumulation))
    training = held + micro * activations * (0.5 if machine.gpu else 1)
    written = 12.0 * weights  # the file that the net is mapped from, the finished net, its bytes as they are written
    memory = (1e9 if machine.gpu else PROCESS_BYTES) + max(training, 0.0 if machine.gpu else written)
    device = "gpu" if machine.gpu else "cpu"
    return Estimate(FEW_STEP.name, seconds, memory, 4.0 * weights, device, machine.processes)
