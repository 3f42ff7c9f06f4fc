"""Sensitivity of a teacher to single changes: which changes there are, a student with given blocks in place of layers,
its output error, and the proxies of one change while they are tuned.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..data.batches import batch_indices
from ..diffusion import Diffusion, draws
from ..errors import EdgeDiTError
from ..genotype import Genotype, LayerSpec
from ..models.transformer_edgedit import EdgeDiTBlock, EdgeDiTTransformer2DModel
from ..search_space import can_merge, model_cost
from .closed_form import closed_form_block
from .proxy_group import Features, Proxy, ProxyGroup, held_out_losses, new_optimizer
from .teacher_features import FeatureSource

MLP_RATIOS = (1.0, 2.0, 3.0)
ATTENTION_SHARES = (4 / 9, 2 / 3)  # 512 and 768 of DiT-XL's 1152
MERGES = (2, 3)
OUTPUT_STREAM = 4  # noise that whole models are judged on


def single_changes(config: Mapping) -> dict[str, list[LayerSpec]]:
    """Every change at every place of the teacher with this model config, by name: narrower MLPs and attention, merged
    neighbours.

    Attention widths are the multiples of 8·heads nearest to 4/9 and 2/3 of the hidden size; what would not be smaller
    than the teacher's own is left out, as are merges across a long skip's end.
    """
    teacher = Genotype.of(config)
    if len({layer.shape for layer in teacher.layers}) != 1 or teacher.merged:
        raise EdgeDiTError(
            f"The teacher has {len(teacher.merged)} merged layers and {len({layer.shape for layer in teacher.layers})} "
            "layer shapes; the study needs an uncompressed teacher."
        )
    attention_dim, heads, ratio = teacher.layers[0].shape[:3]
    singles = [layer.source for layer in teacher.layers]
    changes = {
        f"MLP ratio {new:g}": [LayerSpec(source, attention_dim, heads, new) for source in singles]
        for new in MLP_RATIOS
        if new < ratio
    }
    unit = 8 * heads
    for width in sorted({max(1, round(share * teacher.hidden_size / unit)) * unit for share in ATTENTION_SHARES}):
        if width < attention_dim:
            changes[f"attention {width}"] = [LayerSpec(source, width, heads, ratio) for source in singles]
    for length in MERGES:
        runs = [tuple(range(first, first + length)) for first in range(len(singles) - length + 1)]
        legal = [run for run in runs if all(can_merge(config, layer) for layer in run[:-1])]
        if legal:
            changes[f"merge {length} → 1"] = [LayerSpec(run, attention_dim, heads, ratio) for run in legal]
    return changes


def disjoint(layers: Iterable[LayerSpec]) -> list[LayerSpec]:
    """As many of these layers, in order, as can stand in one student: none begins before the last one ended."""
    chosen: list[LayerSpec] = []
    for layer in layers:
        if not chosen or layer.source[0] > chosen[-1].source[-1]:
            chosen.append(layer)
    return chosen


def spliced_student(
    teacher: EdgeDiTTransformer2DModel, blocks: Sequence[tuple[LayerSpec, EdgeDiTBlock]]
) -> EdgeDiTTransformer2DModel:
    """The teacher with some layers replaced. It shares all other weights with the teacher, so it costs no memory; only
    run it.

    Args:
        blocks: what stands for which teacher layers, in order and disjoint.
    """
    by_first = {layer.source[0]: (layer, block) for layer, block in blocks}
    replaced = {i for layer, _ in blocks for i in layer.source}
    layers, modules = [], []
    for index, own in enumerate(teacher.config.layers):
        if index in by_first:
            layer, block = by_first[index]
            layers.append(layer.to_dict())
            modules.append(block)
        elif index not in replaced:
            layers.append(own)
            modules.append(teacher.blocks[index])
    with torch.device("meta"):
        student = EdgeDiTTransformer2DModel.with_config(teacher.config, layers=layers)
    for name, module in teacher.named_children():
        setattr(student, name, module)
    for name, parameter in teacher.named_parameters(recurse=False):
        setattr(student, name, parameter)
    for name, buffer in teacher.named_buffers(recurse=False):
        setattr(student, name, buffer)
    student.blocks = nn.ModuleList(modules)
    return student.eval()


@torch.no_grad()
def relative_output_error(
    student: EdgeDiTTransformer2DModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor | None,
    reference: torch.Tensor,
) -> torch.Tensor:
    """‖ε_s − ε_t‖² / ‖ε_t‖² of each image, `(B,)`, over the prediction's channels (not a learned variance's).

    Args:
        noisy: `(B, C, H, W)`; timesteps: `(B,)`; labels: `(B,)` or `None`; reference: the teacher's output.

    Raises:
        EdgeDiTError: an error is not finite: an output is not, or the teacher's is zero.
    """
    channels = noisy.shape[1]
    output, reference = (
        t[:, :channels].float().flatten(1) for t in (student(noisy, timesteps, labels).sample, reference)
    )
    error = (output - reference).square().sum(1) / reference.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    if not torch.isfinite(error).all():
        raise EdgeDiTError(
            f"The relative error of the output is {float(error.max())}, with outputs up to {float(output.abs().max())} "
            f"and the teacher's up to {float(reference.abs().max())}: the teacher's must be finite and not zero. Train "
            "it, or use one of before it was damaged."
        )
    return error


class OutputErrors:
    """Relative output error of a changed teacher at evenly spaced timesteps, on images and noise that are a function of
    the seed.
    """

    def __init__(
        self, teacher, dataset, samples: int, count: int, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.teacher = teacher
        self.timesteps = [round(1000 * (i + 0.5) / count) for i in range(count)]
        diffusion = Diffusion.for_config(teacher.config)
        self.batches = []
        for index, t in enumerate(self.timesteps):
            batch = dataset.batch(batch_indices(len(dataset), samples, seed + OUTPUT_STREAM, index))
            noise = draws(seed, index, range(samples), batch["images"].shape[1:], stream=OUTPUT_STREAM).noise
            times = torch.full((samples,), t)
            noisy = diffusion.noisy(batch["images"], noise, times)
            labels = batch["labels"] if teacher.config.num_classes else None
            for rows in torch.arange(samples).split(batch_size):
                inputs = [None if tensor is None else tensor[rows].to(device) for tensor in (noisy, times, labels)]
                with torch.no_grad():
                    self.batches.append((index, inputs, teacher(*inputs).sample))

    def __call__(self, blocks: list[tuple[LayerSpec, torch.nn.Module]]) -> list[float]:
        """Mean error at each timestep with these blocks in place of their teacher layers."""
        student = spliced_student(self.teacher, blocks)
        errors: list[list[torch.Tensor]] = [[] for _ in self.timesteps]
        for index, inputs, reference in self.batches:
            errors[index].append(relative_output_error(student, *inputs, reference))
        return [float(torch.cat(found).double().mean()) for found in errors]


def saved(teacher, blocks) -> dict[str, float]:
    """Parameters and FLOPs of the changed model as shares of the teacher's."""
    whole, changed = model_cost(teacher.config), model_cost(dict(spliced_student(teacher, blocks).config))
    return {"parameters": changed.parameters / whole.parameters, "flops": changed.flops / whole.flops}


class ChangeGroup(ProxyGroup):
    """The proxies of one change, one at every place of the teacher; `written` holds the damage of all changes so far.

    Args:
        source: features of the teacher. errors: of whole models. learning_rate: peak of the tune.
    """

    def __init__(self, source: FeatureSource, errors: OutputErrors, learning_rate: float) -> None:
        super().__init__(self._new_proxy)
        self.source, self.errors, self.learning_rate = source, errors, learning_rate
        self.layers = len(source.teacher.blocks)
        self.test = list(source.held_out(self.layers))

    def _new_proxy(self, layer: LayerSpec, block: EdgeDiTBlock | None) -> Proxy:
        block = self.source.teacher.new_block(layer.to_dict()) if block is None else block
        block = block.to(self.source.device).requires_grad_(True)
        return Proxy(layer, block, new_optimizer("adamw", block.parameters(), self.learning_rate))

    def start(self, name: str, layers: Sequence[LayerSpec]) -> None:
        """Put the change's proxies on the device, each as the closed form fits it."""
        blocks = self.source.teacher.blocks
        calibration = Features.cat(list(self.source.calibration(self.layers)))
        for layer in layers:
            sources = [blocks[i] for i in layer.source]
            x, conditioning = calibration.inputs[layer.source[0]], calibration.conditioning
            block = closed_form_block(sources, x, conditioning, layer)
            self.proxies[f"{name}: {layer.source[0]}"] = self._new_proxy(layer, block)

    def measure(self, name: str, when: str) -> None:
        """Note the damage of every place of the change, and of all places at once, `when` ("before" or "after" the
        tune).
        """
        losses = held_out_losses(self.blocks(), self.test)
        places = {key: [(proxy.layer, proxy.block)] for key, proxy in self.proxies.items()}
        everywhere = disjoint(proxy.layer for proxy in self.proxies.values())
        places[f"{name}: all"] = [
            (proxy.layer, proxy.block) for proxy in self.proxies.values() if proxy.layer in everywhere
        ]
        for key, blocks in places.items():
            errors = self.errors(blocks)
            row = self.written.setdefault(
                key,
                {
                    "change": name,
                    "layers": [list(layer.source) for layer, _ in blocks],
                    **saved(self.source.teacher, blocks),
                },
            )
            row[f"layer_{when}"] = losses.get(key)
            row[f"model_{when}"] = statistics.fmean(errors)
            row[f"model_{when}_by_timestep"] = errors
