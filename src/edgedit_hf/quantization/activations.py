"""Static int8 activations of a diffusion transformer: its inputs' ranges change with the timestep, so scales may be
chosen by step.

A static scale spares the runtime a look at the data, but one scale for all steps has to hold the widest range of any of
them. As the timestep is known before a step begins, the sampling loop can be cut into buckets of timesteps, each with
scales of its own, at no cost at run time. [`ActivationScales`] holds them for every layer; [`simulated_activations`]
runs a network as if its layers' inputs were 8-bit, to measure what one scale, a scale a bucket, and dynamic scales
lose. Ranges are held whole: on trained networks, clipping 5 % of them lost 2 to 3 dB of the output.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..files import atomic_write_json, parse_json
from ..records import Scales
from ..schema import check

LEVELS = 255  # of unsigned 8 bit, above 0


@dataclass(frozen=True)
class ActivationScales:
    """Scales and zero points of unsigned 8-bit inputs, by layer and bucket of timesteps: value = (integer − zero point)
    · scale.

    Args:
        edges: ascending borders between the buckets, one fewer than buckets; a timestep on a border belongs to the
            bucket above it.
        scale: layer name → `(buckets,)` float32.
        zero_point: layer name → `(buckets,)` int64 in 0 … 255.
    """

    edges: list[float]
    scale: dict[str, torch.Tensor]
    zero_point: dict[str, torch.Tensor]

    @property
    def num_buckets(self) -> int:
        """How many buckets the timesteps fall into."""
        return len(self.edges) + 1

    def bucket_of(self, timestep: float) -> int:
        """Index of the bucket that a timestep belongs to."""
        return bisect.bisect_right(self.edges, timestep)

    def save(self, path: str | Path) -> None:
        """Write one JSON file, atomically (float32 scales survive exactly)."""
        layers = {
            name: {"scale": self.scale[name].tolist(), "zero_point": self.zero_point[name].tolist()}
            for name in self.scale
        }
        atomic_write_json(path, {"format": "edgedit-activation-scales", "edges": list(self.edges), "layers": layers})

    @classmethod
    def load(cls, path: str | Path) -> ActivationScales:
        """Read what [`save`] wrote.

        Raises:
            EdgeDiTError: the file is missing or holds something else.
        """
        try:
            values = parse_json(Path(path).read_text(encoding="utf-8"))
            check(values, Scales)
            edges = [float(edge) for edge in values["edges"]]
            scale = {
                name: torch.tensor(layer["scale"], dtype=torch.float32) for name, layer in values["layers"].items()
            }
            zero = {
                name: torch.tensor(layer["zero_point"], dtype=torch.int64) for name, layer in values["layers"].items()
            }
        except (OSError, ValueError) as error:
            raise EdgeDiTError(
                f"{path} holds no activation scales ({type(error).__name__}: {error}); make them anew with "
                "activation_scales()."
            ) from error
        wrong = [name for name in scale if not len(scale[name]) == len(zero[name]) == len(edges) + 1]
        if wrong or edges != sorted(edges):
            found = (
                f"layer {wrong[0]} has {len(scale[wrong[0]])} scales"
                if wrong
                else f"the borders {edges} are not ascending"
            )
            raise EdgeDiTError(
                f"{path} has {len(edges)} borders, so {len(edges) + 1} buckets, but {found}; make it anew with "
                "activation_scales()."
            )
        return cls(edges, scale, zero)


def timestep_buckets(timesteps: Sequence[float], ranges: Mapping[str, torch.Tensor], buckets: int) -> list[float]:
    """Borders of the buckets that waste least: every timestep of a bucket is quantised with the bucket's range, whose
    step grows with it.

    The rounding error of a layer at a timestep is proportional to the squared width of the range it is given; relative
    to that of its own range, summed over layers and timesteps, it is made least by dynamic programming over the
    contiguous cuts. Borders lie midway between neighbouring timesteps.

    Args:
        timesteps: ascending. ranges: `(timesteps, 2)` of every layer, as [`calibration.input_ranges`] gives them.
        buckets: how many; at most as many as there are timesteps.
    """
    count = len(timesteps)
    if not 1 <= buckets <= count:
        raise EdgeDiTError(
            f"{buckets} buckets were asked for, but there are {count} timesteps; choose between 1 and {count}."
        )
    bounds = torch.stack([ranges[name] for name in sorted(ranges)]).double()  # [layers, T, 2]
    low, high = bounds[..., 0].clamp(max=0), bounds[..., 1].clamp(min=0)
    own = (high - low).clamp(min=1e-12)  # [layers, T]
    waste = [[0.0] * count for _ in range(count)]  # of timesteps first … last as one bucket
    for first in range(count):
        least, greatest = low[:, first], high[:, first]
        for last in range(first, count):
            least, greatest = torch.minimum(least, low[:, last]), torch.maximum(greatest, high[:, last])
            width = (greatest - least).unsqueeze(1)
            waste[first][last] = float(((width / own[:, first : last + 1]) ** 2).sum())
    best = [waste[0][last] for last in range(count)]  # of timesteps 0 … last in so many buckets
    cuts: list[list[int]] = [[] for _ in range(count)]
    for used in range(1, buckets):
        following = [float("inf")] * count
        following_cuts: list[list[int]] = [[] for _ in range(count)]
        for last in range(used, count):
            cut = min(range(used, last + 1), key=lambda first: (best[first - 1] + waste[first][last], first))
            following[last], following_cuts[last] = best[cut - 1] + waste[cut][last], [*cuts[cut - 1], cut]
        best, cuts = following, following_cuts
    return [(timesteps[cut - 1] + timesteps[cut]) / 2 for cut in cuts[-1]]


def activation_scales(
    timesteps: Sequence[float], ranges: Mapping[str, torch.Tensor], buckets: int = 1
) -> ActivationScales:
    """Static scales from measured ranges: one for all timesteps, or one a bucket ([`timestep_buckets`]).

    A range is widened to hold zero, which is then exact. A bucket holds the ranges of all its timesteps.

    Args:
        timesteps, ranges: as [`calibration.input_ranges`] gives them.

    Raises:
        EdgeDiTError: a layer was never called, its inputs are not finite, or there are fewer timesteps than buckets.
    """
    for name, bounds in ranges.items():
        if not torch.isfinite(bounds).all():
            raise EdgeDiTError(
                f"The inputs of layer {name} range from {float(bounds[:, 0].min())} to {float(bounds[:, 1].max())}; "
                "they must be finite."
            )
    edges = timestep_buckets(timesteps, ranges, buckets)
    bucket = torch.tensor([bisect.bisect_right(edges, timestep) for timestep in timesteps])
    scale, zero_point = {}, {}
    for name, bounds in ranges.items():
        parts = [bounds[bucket == index] for index in range(buckets)]
        low = torch.stack([part[:, 0].min() for part in parts]).clamp(max=0)
        high = torch.stack([part[:, 1].max() for part in parts]).clamp(min=0)
        scale[name] = ((high - low) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny).float()
        zero_point[name] = (-low / scale[name]).round().long().clamp(0, LEVELS)
    return ActivationScales(edges, scale, zero_point)


def fake_quantize(values: torch.Tensor, scale: torch.Tensor | float, zero_point: torch.Tensor | int) -> torch.Tensor:
    """What unsigned 8-bit integers with this scale and zero point keep of `values`."""
    return ((values / scale).round() + zero_point).clamp(0, LEVELS).sub(zero_point).mul(scale)


def _dynamic(values: torch.Tensor) -> torch.Tensor:
    """The same with the range of the tensor itself, as dynamic quantisation has it (ONNX Runtime's
    DynamicQuantizeLinear).
    """
    least, greatest = torch.aminmax(values)
    low, high = least.clamp(max=0), greatest.clamp(min=0)
    scale = ((high - low) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return fake_quantize(values, scale, (-low / scale).round().clamp(0, LEVELS))


@contextmanager
def simulated_activations(model: nn.Module, layers: Sequence[str], scales: ActivationScales | None) -> Iterator[None]:
    """Within it the inputs of these layers are rounded to 8 bit: with static scales by the timestep of the forward, or
    dynamic ones (`None`).

    Raises:
        EdgeDiTError: a layer has no scales.
    """
    missing = [] if scales is None else [name for name in layers if name not in scales.scale]
    if missing:
        raise EdgeDiTError(
            f"{len(missing)} of {len(layers)} layers have no activation scales, such as {missing[0]!r}; measure them "
            "too."
        )
    bucket = 0

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal bucket
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        buckets = {0} if scales is None else {scales.bucket_of(time) for time in timestep.reshape(-1).tolist()}
        if len(buckets) > 1:
            least, greatest = float(timestep.min()), float(timestep.max())
            raise EdgeDiTError(
                f"The rows have timesteps from {least} to {greatest}, of several buckets; give those of one at a time."
            )
        (bucket,) = buckets

    def rounding(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> tuple:
            if scales is None:
                return (_dynamic(args[0]), *args[1:])
            return (
                fake_quantize(args[0], float(scales.scale[name][bucket]), int(scales.zero_point[name][bucket])),
                *args[1:],
            )

        return hook

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    try:
        handles += [model.get_submodule(name).register_forward_pre_hook(rounding(name)) for name in layers]
        yield
    finally:
        for handle in handles:
            handle.remove()
