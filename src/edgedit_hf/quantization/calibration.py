"""What quantisation is fitted to: the inputs that the network and its layers see along the pipeline's own sampling
loop, with guidance.

No data set is needed: the pipeline samples from fixed noise, with balanced classes or given prompts, and every forward
of its transformer is recorded ([`record`]). Replayed, these forwards tell the second moments of every layer's input
([`second_moments`], for error-compensating rounding), their ranges by timestep ([`input_ranges`], for static activation
scales), and the error of a changed network ([`output_error`]).

Shapes: B rows of a forward (guided: twice the images), C channels, H × W the latents' size, n weights that one output
of a layer sees, G groups of a convolution (1 for a linear layer).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..diffusion import draws, own_generators
from ..errors import EdgeDiTError
from ..models.transformer_elastic_dit import ElasticCompression
from ..pipelines.sampling import quiet_call

CALIBRATION_STREAM, CHECK_STREAM = (
    20,
    21,
)  # of `diffusion.draws`: noise that quantisation is fitted to, and that it is judged by
MOMENTS_BYTES = 2 << 30  # second moments held at a time, by default


@dataclass(frozen=True)
class ModelCall:
    """One forward of the transformer in a sampling loop.

    Args:
        timestep: on the scale 0 … 1000.
        inputs: keyword arguments of the forward, on the CPU; without a precomputed modulation, so that the layers that
            make it run too.
        subnet: the sub-network that ran, of a supernet.
    """

    timestep: float
    inputs: Mapping[str, Any]
    subnet: str | None = None


class Recording(NamedTuple):
    """What sampling gave.

    Args:
        calls: forwards of the transformer, in order.
        latents: the finished samples `(images, C, H, W)` float32.
        labels: their classes `(images,)`, or prompts; `None` if unconditional.
    """

    calls: list[ModelCall]
    latents: torch.Tensor
    labels: torch.Tensor | list[str] | None


# -------------------------------------------------------------------- recording


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    return [_moved(part, device) for part in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def _recorded(model: nn.Module, calls: list[ModelCall]) -> Iterator[None]:
    """Within it every forward of `model` is appended to `calls`."""
    signature = inspect.signature(type(model).forward)
    text: dict[int, Any] = {}  # the text is the same object in every step: one copy of it is kept

    def copy(name: str, value: Any) -> Any:
        if not name.startswith("encoder_"):
            return _moved(value, "cpu")
        if id(value) not in text:
            text[id(value)] = (value, _moved(value, "cpu"))  # with the original, so that its id stays taken
        return text[id(value)][1]

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        inputs = {
            name: copy(name, value)
            for name, value in bound.items()
            if name not in ("self", "return_dict", "modulation", "subnet")
        }
        calls.append(ModelCall(float(inputs["timestep"].reshape(-1)[0]), inputs, bound.get("subnet")))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def record(
    pipeline: Any,
    images: int,
    *,
    seed: int = 0,
    stream: int = CALIBRATION_STREAM,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    prompts: Sequence[str] | None = None,
    subnet: str | None = None,
    keep_calls: bool = True,
) -> Recording:
    """Sample with the pipeline and record the forwards of its transformer.

    Image i is of noise that is a function of (seed, stream, i) and has class i mod the number of classes, or
    prompt i mod the number of prompts.

    Args:
        pipeline: an [`EdgeDiTPipeline`] or [`ElasticDiTPipeline`] with a PyTorch transformer.
        steps, guidance_scale: as its call; default its own.
        batch_size: images at a time.
        prompts: of text to image. subnet: width to sample with, of a supernet.
        keep_calls: false for the finished samples alone.

    Raises:
        EdgeDiTError: prompts are missing, or the samples are not finite.
    """
    config = pipeline.transformer.config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    classes, text = config.get("num_classes"), "text_dims" in config
    if text and not prompts:
        raise EdgeDiTError(
            "Text to image is calibrated with prompts, but none are given; give some that your users could write."
        )
    calls: list[ModelCall] = []
    latents, labels = [], []
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"}
    for start in range(0, images, batch_size):
        rows = range(start, min(start + batch_size, images))
        if text:
            asked: dict[str, Any] = {"prompt": [prompts[row % len(prompts)] for row in rows], "subnet": subnet}
            labels += asked["prompt"]
        elif classes:
            asked = {"class_labels": [row % classes for row in rows]}
            labels += asked["class_labels"]
        else:
            asked = {"batch_size": len(rows)}
        asked |= {"latents": draws(seed, 0, rows, shape, stream=stream).noise}
        asked |= {"generator": own_generators(seed, rows, stream=stream)}
        batch_calls: list[ModelCall] = []
        with _recorded(pipeline.transformer, batch_calls), quiet_call(pipeline):
            latents.append(pipeline(**asked, **options).images.float().cpu())
        calls += batch_calls if keep_calls else []
    return Recording(calls, torch.cat(latents), (labels if text else torch.tensor(labels)) if labels else None)


def spread(calls: Sequence[ModelCall], timesteps: int) -> list[ModelCall]:
    """The calls at so many of their timesteps, evenly spread from the first to the last."""
    there = sorted({call.timestep for call in calls})
    places = torch.linspace(0, len(there) - 1, min(timesteps, len(there))).round().long().tolist()
    chosen = {there[place] for place in places}
    return [call for call in calls if call.timestep in chosen]


# -------------------------------------------------------------------- replaying


@torch.no_grad()
def replay(model: nn.Module, call: ModelCall) -> torch.Tensor:
    """The prediction `(B, C, H, W)` float32 of a recorded forward, on the model's device, without the channels of a
    learned variance.
    """
    device = next(model.parameters()).device
    inputs = {name: _moved(value, device) for name, value in call.inputs.items()}
    if call.subnet is not None:
        inputs["subnet"] = call.subnet
    inputs["hidden_states"] = inputs["hidden_states"].to(model.dtype)
    output = model(**inputs, return_dict=False)[0]
    return output[:, : inputs["hidden_states"].shape[1]].float()


@dataclass(frozen=True)
class OutputError:
    """Squared error of a network's output against another's, by timestep.

    Args:
        timesteps: ascending. mse: mean squared error at each. signal: mean square of the reference there.
    """

    timesteps: tuple[float, ...]
    mse: tuple[float, ...]
    signal: tuple[float, ...]

    @property
    def mean_mse(self) -> float:
        """Mean squared error over all timesteps."""
        return sum(self.mse) / len(self.mse)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise ratio in decibels, 10·log10(Σ signal / Σ error); infinite if there is no
        error.
        """
        return _decibels(sum(self.signal), sum(self.mse))

    @property
    def sqnr_by_timestep(self) -> tuple[float, ...]:
        """The same at each timestep."""
        return tuple(_decibels(signal, error) for signal, error in zip(self.signal, self.mse))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, where `None` stands for an infinite ratio."""
        ratios = [None if math.isinf(value) else value for value in (self.sqnr_db, *self.sqnr_by_timestep)]
        by_timestep = {
            "timesteps": list(self.timesteps),
            "mse_by_timestep": list(self.mse),
            "sqnr_db_by_timestep": ratios[1:],
        }
        return {"mse": self.mean_mse, "sqnr_db": ratios[0], **by_timestep}


def _decibels(signal: float, error: float) -> float:
    return math.inf if error == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / error)


def output_error(model: nn.Module, calls: Sequence[ModelCall], references: Sequence[torch.Tensor]) -> OutputError:
    """How far the outputs of `model` are from `references`, one a call (what [`replay`] gave with the reference
    network).
    """
    sums: dict[float, torch.Tensor] = {}
    for call, reference in zip(calls, references, strict=True):
        error = replay(model, call).cpu().double() - reference.cpu().double()
        total = sums.setdefault(call.timestep, torch.zeros(3, dtype=torch.float64))
        total += torch.stack(
            [
                error.pow(2).sum(),
                reference.double().cpu().pow(2).sum(),
                torch.tensor(float(error.numel()), dtype=torch.float64),
            ]
        )
    timesteps = sorted(sums)
    return OutputError(tuple(timesteps), *(tuple(float(sums[t][i] / sums[t][2]) for t in timesteps) for i in (0, 1)))


# -------------------------------------------------------------------- inputs of layers


def layer_inputs(module: nn.Module, args: Sequence[Any]) -> torch.Tensor:
    """The inputs of a linear or convolutional layer as a matrix a group, `(G, rows, n)`: output = inputs · weightᵀ, n
    as in `weight[0]`.

    A sub-network of an elastic layer, which sees the first inputs alone, gets zeros for the others: they tell nothing
    of those weights.
    """
    values = args[0].detach()
    if isinstance(module, ElasticCompression):  # on tokens instead of an image
        rows, columns = args[1], args[2]
        windows = values.unflatten(1, (rows // 2, 2, columns // 2, 2)).permute(
            5, 0, 1, 3, 2, 4
        )  # [c, B, rows/2, columns/2, 2, 2]
        return F.pad(windows.reshape(windows.shape[0], -1, 4), (0, 0, 0, 0, 0, module.in_channels - windows.shape[0]))
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise EdgeDiTError(
                f"A convolution with padding {module.padding!r} ({module.padding_mode}) cannot be calibrated; use "
                "numbers of zeros."
            )
        columns = F.unfold(
            values, module.kernel_size, module.dilation, module.padding, module.stride
        )  # [B, Cin·kh·kw, places]
        groups = columns.unflatten(1, (module.groups, -1))
        return groups.permute(1, 0, 3, 2).flatten(1, 2)
    return F.pad(values.flatten(0, -2), (0, module.in_features - values.shape[-1])).unsqueeze(0)


@contextmanager
def _observed(model: nn.Module, names: Sequence[str], see: Any) -> Iterator[None]:
    """Within it `see(name, module, args)` is called before every forward of these layers."""
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, args: tuple, name: str = name) -> None:
                see(name, module, args)

            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moment_shape(module: nn.Module) -> tuple[int, int]:
    """(G, n) of a layer."""
    if isinstance(module, nn.Conv2d):
        return module.groups, module.in_channels // module.groups * math.prod(module.kernel_size)
    return 1, module.in_features


def moment_batches(model: nn.Module, names: Sequence[str], memory_bytes: int = MOMENTS_BYTES) -> list[list[str]]:
    """The layers in order, in batches whose second moments fit into so much memory (each at least one layer)."""
    batches: list[list[str]] = []
    free = 0
    for name in names:
        groups, inputs = _moment_shape(model.get_submodule(name))
        needed = 4 * groups * inputs * inputs
        if not batches or needed > free:
            batches.append([])
            free = memory_bytes
        batches[-1].append(name)
        free -= needed
    return batches


def second_moments(model: nn.Module, calls: Sequence[ModelCall], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Mean of x·xᵀ over all inputs x that each layer sees in these calls, `(G, n, n)` float32 on the model's device.

    That is the Hessian of the layer's squared output error, but for a factor; averaged over the timesteps and widths of
    the calls. A layer that is never called has zeros.
    """
    device = next(model.parameters()).device
    sums = {}
    for name in names:
        groups, inputs = _moment_shape(model.get_submodule(name))
        sums[name] = torch.zeros(groups, inputs, inputs, device=device)
    counts = dict.fromkeys(names, 0)

    def see(name: str, module: nn.Module, args: tuple) -> None:
        inputs = layer_inputs(module, args).float()
        sums[name].baddbmm_(inputs.transpose(1, 2), inputs)
        counts[name] += inputs.shape[1]

    with _observed(model, names, see):
        for call in calls:
            replay(model, call)
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


def input_ranges(
    model: nn.Module, calls: Sequence[ModelCall], names: Sequence[str]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Least and greatest input of every layer at every timestep of the calls.

    Returns:
        the timesteps, ascending, and for each layer `(timesteps, 2)` float32: (least, greatest).
    """
    timesteps = sorted({call.timestep for call in calls})
    row_of = {timestep: row for row, timestep in enumerate(timesteps)}
    found = {name: torch.tensor([[math.inf, -math.inf]]).repeat(len(timesteps), 1) for name in names}
    row = 0

    def see(name: str, module: nn.Module, args: tuple) -> None:
        least, greatest = (float(value) for value in torch.aminmax(args[0]))
        found[name][row, 0] = min(found[name][row, 0], least)
        found[name][row, 1] = max(found[name][row, 1], greatest)

    with _observed(model, names, see):
        for call in calls:
            row = row_of[call.timestep]
            replay(model, call)
    return timesteps, found
