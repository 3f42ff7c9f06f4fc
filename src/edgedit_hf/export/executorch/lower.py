"""Lowering to ExecuTorch: `lower_executorch` writes a `.pte` file of any part of a pipeline, with fixed shapes, for
XNNPACK and where possible others.

Precisions: `fp32`; `int8` is 8da8w, `int4` is 8da4w, ExecuTorch's names for activations that are quantised to 8 bits a
token as they come, and weights of 8 bits an output channel, or 4 bits in groups of [`GROUP`] inputs. Weight-only int8
is not offered: it lowers without an error and returns NaN. The files describe themselves through constant methods
`edgedit_*`: whatever facts they are given, and the scheme.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import EdgeDiTError
from ...files import aside_of, explain_write_errors
from ...quantization.packing import unpack
from ...quantization.weights import AffineWeight
from ...runtimes.profile import executorch_profile
from ...runtimes.sessions import CONSTANT_PREFIX, FORWARD, INPUT_NAMES
from ..formats import FORMATS
from ..parts import (
    ConditionerWrapper,
    ElasticConditionerWrapper,
    ElasticDenoiserWrapper,
    ModulatedDenoiserWrapper,
    ModulatedElasticDenoiserWrapper,
    Part,
    TextConditionerWrapper,
)
from ..wrappers import DenoiserWrapper, quiet
from .backends import Methods, edge_program
from .xnnpack import FormLinear, edgedit_form
from .xnnpack_elastic import elastic_form
from .xnnpack_encoders import encoder_form

FORMAT = FORMATS["executorch"]
SCHEMES = {dtype: precision.name for dtype, precision in FORMAT.precisions.items()}  # of the linear layers
GROUP = 32  # inputs that share a scale in 4 bits: XNNPACK's smallest
SHRINKS = tuple(0.72 + 0.03 * step for step in range(11))  # 0.72 … 1.02
TINY = 1e-30  # least scale: of a group of zeros


def lower_executorch(
    part: Part,
    path: str | os.PathLike,
    precision: str = "fp32",
    facts: Mapping[str, str] | None = None,
    *,
    keep_8bit: Collection[str] = (),
    affine: Mapping[str, AffineWeight] | None = None,
    backend: str = "xnnpack",
    profile_runs: int = 5,
) -> dict:
    """Write a part of a pipeline as a `.pte` file for the sizes of its example inputs.

    Args:
        part: see [`~edgedit_hf.export.parts.Part`].
        path: the file; written aside and renamed.
        precision: a key of [`SCHEMES`]. It is that of the linear layers; everything else computes in float32, and so
            does a whole VAE.
        facts: text that the file returns from its methods `edgedit_<key>`.
        keep_8bit: for `int4`: names of the model's layers that are 8da8w instead.
        affine: layer → weights that were rounded before: a symmetric grid of 4 bits in groups of a multiple of
            [`GROUP`], or of 8 bits a row, is used with its integers as they are (XNNPACK keeps scales of groups as
            bfloat16). Other grids are rounded again.
        backend: `"xnnpack"`; `"coreml"` or `"qnn"` (fp32 alone, lowered but not run; see [`executorch.backends`]).
        profile_runs: forwards that are timed to find the share of what the backend did not take; 0: none.

    Returns:
        backend, scheme, not_run (a sentence, where the file cannot run here), what [`quantize_linears`] returns, bytes,
        planned_bytes and delegation ([`lower_methods`], [`~edgedit_hf.runtimes.profile.executorch_profile`]).

    Raises:
        EdgeDiTError: ExecuTorch or a backend's SDK is not installed, the part cannot be lowered, or given weights have
            another shape.
    """
    FORMAT.require()
    _check_precision(precision)
    FORMAT.check_backend(backend, precision)
    not_run = FORMAT.backends[backend]
    form, scheme, layers = quantized_form(part, precision, keep_8bit, affine, backend)
    inputs = tuple(part.inputs.values())
    facts = described(part, scheme, facts or {})
    with explain_refusals(f"the {part.name} of the {part.component} ({type(part.module).__name__})"):
        said = lower(form, inputs, path, facts, backend)
    if profile_runs and not_run is None:
        said["delegation"] |= executorch_profile(path, part.inputs, profile_runs)
    return {
        "backend": backend,
        "scheme": scheme,
        "not_run": not_run,
        **layers,
        "bytes": Path(path).stat().st_size,
        **said,
    }


def described(part: Part, scheme: str, facts: Mapping[str, str]) -> dict[str, str]:
    """What a file, or a method of one, says of itself."""
    return {**facts, "scheme": scheme, INPUT_NAMES: json.dumps(list(part.inputs))}


def _check_precision(precision: str) -> None:
    if precision not in SCHEMES:
        raise EdgeDiTError(f"precision is {precision!r}; ExecuTorch exports exist as {', '.join(SCHEMES)}.")


@contextlib.contextmanager
def explain_refusals(what: str) -> Iterator[None]:
    """What ExecuTorch raises where it cannot lower something, as an [`EdgeDiTError`] that names it."""
    try:
        yield
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EdgeDiTError(f"ExecuTorch cannot lower {what}: {reason}") from error


def quantized_form(
    part: Part,
    precision: str,
    keep_8bit: Collection[str] = (),
    affine: Mapping[str, AffineWeight] | None = None,
    backend: str = "xnnpack",
) -> tuple[nn.Module, str, dict[str, Any]]:
    """What is lowered of a part: its module in the backend's form with quantised weights, its scheme, and what
    [`quantize_linears`] returns. See [`lower_executorch`] for the arguments.
    """
    form = form_of(part) if backend == "xnnpack" else part.module
    scheme = "fp32" if part.component == "vae" else SCHEMES[precision]  # its convolutions have no dynamic quantisation
    return form, scheme, quantize_linears(form, scheme, keep_8bit, affine or {})


def form_of(part: Part) -> nn.Module:
    """The part's module in operators that XNNPACK takes; see [`xnnpack`]."""
    inputs = tuple(part.inputs.values())
    if isinstance(part.module, (DenoiserWrapper, ModulatedDenoiserWrapper, ConditionerWrapper)):
        return edgedit_form(part.module, inputs)
    if isinstance(
        part.module,
        (ElasticDenoiserWrapper, ModulatedElasticDenoiserWrapper, ElasticConditionerWrapper, TextConditionerWrapper),
    ):
        return elastic_form(part.module, inputs)
    return encoder_form(part.module, inputs)


# -------------------------------------------------------------------- weights


def quantize_linears(
    form: nn.Module, scheme: str, keep_8bit: Collection[str] = (), affine: Mapping[str, AffineWeight] | None = None
) -> dict[str, Any]:
    """Quantise every linear layer of a form in place, as far as the scheme reaches.

    A layer whose number of inputs is not a multiple of [`GROUP`] has no 8da4w kernel and is quantised to 8da8w instead.

    Args:
        keep_8bit, affine: see [`lower_executorch`]; names that the form does not have belong to other parts of the
            model.

    Returns:
        linear_layers: number of linear layers of each scheme; kept_8bit: layers of the model that have 8 bits because
            they were named; given: those whose given integers were taken; rounded_again: those whose given weights have
            no such grid, so that what they stand for was rounded.
    """
    schemes: list[str] = []
    kept: set[str] = set()
    given: set[str] = set()
    rounded: set[str] = set()
    for layer in form.modules():
        if not isinstance(layer, FormLinear):
            continue
        name, chosen = layer.source.name, linear_scheme(scheme, layer.in_features, layer.source.name in keep_8bit)
        schemes.append(chosen)
        if chosen == "fp32":
            continue
        weight = None
        if affine and name in affine:
            weight = given_weight(layer, chosen, affine[name])
            (rounded if weight is None else given).add(name)
        if scheme == "8da4w" and name in keep_8bit and layer.in_features % GROUP == 0:
            kept.add(name)
        layer.weight = nn.Parameter(
            quantized_weight(layer.weight.detach(), chosen) if weight is None else weight, requires_grad=False
        )
    names = {"kept_8bit": kept, "given": given, "rounded_again": rounded}
    return {
        "linear_layers": dict(sorted(Counter(schemes).items())),
        **{key: sorted(value) for key, value in names.items()},
    }


def linear_scheme(scheme: str, inputs: int, keep_8bit: bool = False) -> str:
    """The scheme that a linear layer with so many inputs really gets: with one (patches of one grey pixel), a token has
    no range to quantise by, and torchao's quantiser takes no such tensor.
    """
    if inputs == 1:
        return "fp32"
    return "8da8w" if scheme == "8da4w" and (keep_8bit or inputs % GROUP) else scheme


def quantized_weight(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """A float weight `(O, n)` as torchao's tensor of an `"8da8w"` or `"8da4w"` layer, which eager linear layers
    understand too.

    In 4 bits the scale of a group is the one of [`SHRINKS`] times its largest value that rounds the group with the
    least squared error, kept as bfloat16, which is what XNNPACK has: about 1 dB better than the largest value itself.
    """
    if scheme == "8da8w":
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=TINY)
        return _tensor((weight / scale).round().clamp(-127, 127), scale, 8)
    groups = weight.unflatten(1, (-1, GROUP))
    largest = torch.maximum(groups.amax(-1) / 7, groups.amin(-1) / -8).clamp(min=TINY)
    best, scale = torch.full_like(largest, torch.inf), largest
    for shrink in SHRINKS:
        tried = (shrink * largest).bfloat16().float()
        spread = tried.unsqueeze(-1)
        error = ((groups / spread).round_().clamp_(-8, 7).mul_(spread) - groups).square_().sum(-1)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    return _tensor((groups / scale.unsqueeze(-1)).round().clamp(-8, 7).flatten(1), scale, 4)


def given_weight(layer: FormLinear, scheme: str, given: AffineWeight) -> torch.Tensor | None:
    """Given integers as torchao's tensor of a form's layer; `None` if the scheme has no such grid (it wants a symmetric
    one, of 4 bits in groups of a multiple of [`GROUP`], or of 8 bits a row).

    Raises:
        EdgeDiTError: the shape is not that of the model's layer.
    """
    rows, columns = layer.weight.shape
    first, end = layer.source.rows or (0, given.shape[0])
    if tuple(given.shape[1:]) != (columns,) or end > given.shape[0] or end - first != rows:
        raise EdgeDiTError(
            f"The given weights of {layer.source.name} have the shape {tuple(given.shape)}; rows {first} to {end} of "
            f"{columns} inputs are needed."
        )
    bits, group = (8, columns) if scheme == "8da8w" else (4, GROUP)
    size = given.group_size or columns
    if given.bits != bits or given.zero_point is not None or size % group:
        return None
    size = min(size, -(-columns // group) * group)
    values = unpack(given.values[first:end], bits, columns).to(torch.int16) - (1 << (bits - 1))
    scale = (
        given.scale[first:end].float().repeat_interleave(size // group, dim=1)[:, : columns // group]
        * layer.source.factor
    )
    return _tensor(values, scale, bits)


def _tensor(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers `(O, n)` with scales `(O, G)`, for activations of 8 bits a token."""
    with quiet():
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
            IntxUnpackedToInt8Tensor,
            IntxUnpackedToInt8TensorActivationQuantization,
        )
    per_token = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN
    block, zero = (1, values.shape[1] // scale.shape[1]), torch.zeros_like(scale, dtype=torch.int8)
    return IntxUnpackedToInt8Tensor(
        values.to(torch.int8), scale, zero, getattr(torch, f"int{bits}"), block, torch.float32, per_token
    )


# -------------------------------------------------------------------- lowering


def lower(
    form: nn.Module,
    inputs: Sequence[torch.Tensor],
    path: str | os.PathLike,
    facts: Mapping[str, str],
    backend: str = "xnnpack",
) -> dict[str, Any]:
    """Write a file of one module; see [`lower_methods`], whose entry of the method `forward` it returns.

    Args:
        form: module with positional tensor inputs, in eval mode.
        inputs: example inputs; their shapes become the file's.
        path: the `.pte` file. facts: text that it returns from its methods `edgedit_<key>`.
    """
    return lower_methods({FORWARD: (form, inputs)}, path, facts, backend)[FORWARD]


def lower_methods(
    methods: Methods, path: str | os.PathLike, facts: Mapping[str, str], backend: str = "xnnpack"
) -> dict[str, dict[str, Any]]:
    """Trace modules, give the backend all it takes, write the rest as ExecuTorch's portable operators: one file, in
    which methods share the tensors that are equal.

    Args:
        methods: see [`edge_program`].
        path: the `.pte` file; written aside and renamed.
        facts: text that the file returns from its methods `edgedit_<key>`.

    Returns:
        Of every method planned_bytes (of the buffers that the file plans for a run: inputs, outputs and what is between
        the pieces; XNNPACK's own workspace is not in it) and delegation: subgraphs (pieces that the backend runs),
        delegated (operators in them), portable (operator → number outside them).
    """
    with quiet():
        from executorch.devtools.backend_debug import get_delegation_info

        edge = edge_program(backend, methods, {f"{CONSTANT_PREFIX}{key}": value for key, value in facts.items()})
        infos = {name: get_delegation_info(edge.exported_program(name).graph_module) for name in methods}
        lowered = edge.to_executorch()
    path = Path(path)
    aside = aside_of(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                lowered.write_to_file(file)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    planned = {plan.name: sum(plan.non_const_buffer_sizes) for plan in lowered.executorch_program.execution_plan}
    return {name: {"planned_bytes": planned[name], "delegation": _delegation(info)} for name, info in infos.items()}


def _delegation(info: Any) -> dict[str, Any]:
    portable = {
        name: count.non_delegated
        for name, count in info.delegation_by_operator.items()
        if count.non_delegated and name != "getitem"
    }
    return {
        "subgraphs": info.num_delegated_subgraphs,
        "delegated": info.num_delegated_nodes,
        "portable": dict(sorted(portable.items())),
    }
