"""Lowering to ExecuTorch: `lower_executorch` writes a `.pte` file of any part of a pipeline, with fixed shapes, for XNNPACK and where possible others.

Precisions: `fp32`; `int8` is 8da8w, `int4` is 8da4w, ExecuTorch's names for activations that are quantised to 8 bits a token as they come,
and weights of 8 bits an output channel, or 4 bits in groups of [`GROUP`] inputs. Weight-only int8 is not offered: it lowers without an error
and returns NaN. The files describe themselves through constant methods `edgedit_*`: whatever facts they are given, and the scheme.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..latency.runners import CONSTANT_PREFIX, require_executorch
from ..quantization.packing import unpack
from ..quantization.weights import AffineWeight
from ..run_state import explain_write_errors
from .parts import (
    ConditionerWrapper,
    ElasticConditionerWrapper,
    ElasticDenoiserWrapper,
    ModulatedDenoiserWrapper,
    ModulatedElasticDenoiserWrapper,
    Part,
    TextConditionerWrapper,
    edgedit_parts,
)
from .wrappers import DenoiserWrapper, check_batch, check_model, describe, quiet
from .xnnpack import FormLinear, edgedit_form
from .xnnpack_elastic import elastic_form
from .xnnpack_encoders import encoder_form

if TYPE_CHECKING:
    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel

SCHEMES = {"fp32": "fp32", "int8": "8da8w", "int4": "8da4w"}  # precision → scheme of the linear layers
GROUP = 32  # inputs that share a scale in 4 bits: XNNPACK's smallest
DEFAULT_BATCH = 2  # one image with guidance
SHARE_METHOD = (
    "Median over the runs of 1 - (time in delegate calls) / (time of Method::execute), both from ExecuTorch's event tracer (ETDump) in the "
    "Python runtime on the host's CPU; so the interpreter's own time counts as not delegated."
)


def export_executorch(model: EdgeDiTTransformer2DModel, path: str | os.PathLike, precision: str = "fp32", batch: int = DEFAULT_BATCH) -> dict:
    """Write an EdgeDiT as a `.pte` file with inputs `sample`, `timestep`, `class_labels` and output `prediction`.

    The batch is fixed: with an open one, XNNPACK takes over none of the reshapes around attention.

    Args:
        model: the denoiser, float32, on the CPU.
        path: the file.
        precision: a key of [`SCHEMES`].
        batch: images of a forward.

    Returns:
        What [`lower_executorch`] returns, without measured times.

    Raises:
        EdgeDiTError: ExecuTorch is not installed, the model is not float32 or not plain weights, or precision or batch do not exist.
    """
    require_executorch()
    _check_precision(precision)
    check_model(model)
    batch = check_batch(batch, dynamic=False)
    size = model.config.sample_size
    (part,) = edgedit_parts(model, (size, size), batch, split=False)
    return lower_executorch(part, path, precision, describe(model, precision, batch), profile_runs=0)


def lower_executorch(
    part: Part,
    path: str | os.PathLike,
    precision: str = "fp32",
    facts: Mapping[str, str] | None = None,
    *,
    keep_8bit: Collection[str] = (),
    affine: Mapping[str, AffineWeight] | None = None,
    profile_runs: int = 5,
) -> dict:
    """Write a part of a pipeline as a `.pte` file for the sizes of its example inputs.

    Args:
        part: see [`~edgedit_hf.export.parts.Part`].
        path: the file; written aside and renamed.
        precision: a key of [`SCHEMES`]. It is that of the linear layers; everything else computes in float32, and so does a whole VAE.
        facts: text that the file returns from its methods `edgedit_<key>`.
        keep_8bit: for `int4`: names of the model's layers that are 8da8w instead.
        affine: for `int4`: layer → symmetric 4-bit weights in groups of [`GROUP`], whose integers are used as they are. XNNPACK keeps the scales
            as bfloat16.
        profile_runs: forwards that are timed to find the share of what the backend did not take; 0: none.

    Returns:
        backend, scheme, linear_layers (their number a scheme), kept_8bit and given (names of the layers), bytes, delegation ([`lower`],
        [`profile`]).

    Raises:
        EdgeDiTError: ExecuTorch is not installed, the part cannot be lowered, a name is not one of its layers, or given weights do not fit.
    """
    require_executorch()
    _check_precision(precision)
    inputs = tuple(part.inputs.values())
    form = form_of(part)
    scheme = "fp32" if part.component == "vae" else SCHEMES[precision]  # its convolutions have no dynamic quantisation
    layers = quantize_linears(form, scheme, keep_8bit, affine or {})
    facts = {**(facts or {}), "scheme": scheme}
    try:
        delegation = lower(form, inputs, path, facts)
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EdgeDiTError(f"ExecuTorch cannot lower the {part.name} of the {part.component} ({type(part.module).__name__}): {reason}") from error
    if profile_runs:
        delegation |= profile(path, inputs, profile_runs)
    return {"backend": "xnnpack", "scheme": scheme, **layers, "bytes": Path(path).stat().st_size, "delegation": delegation}


def _check_precision(precision: str) -> None:
    if precision not in SCHEMES:
        raise EdgeDiTError(f"precision is {precision!r}; ExecuTorch exports exist as {', '.join(SCHEMES)}.")


def form_of(part: Part) -> nn.Module:
    """The part's module in operators that XNNPACK takes; see [`xnnpack`]."""
    inputs = tuple(part.inputs.values())
    if isinstance(part.module, (DenoiserWrapper, ModulatedDenoiserWrapper, ConditionerWrapper)):
        return edgedit_form(part.module, inputs)
    if isinstance(part.module, (ElasticDenoiserWrapper, ModulatedElasticDenoiserWrapper, ElasticConditionerWrapper, TextConditionerWrapper)):
        return elastic_form(part.module, inputs)
    return encoder_form(part.module, inputs)


# -------------------------------------------------------------------- weights


def quantize_linears(
    form: nn.Module, scheme: str, keep_8bit: Collection[str] = (), affine: Mapping[str, AffineWeight] | None = None
) -> dict[str, Any]:
    """Quantise every linear layer of a form in place, as far as the scheme reaches.

    A layer whose number of inputs is not a multiple of [`GROUP`] has no 8da4w kernel and is quantised to 8da8w instead.

    Args:
        keep_8bit, affine: see [`lower_executorch`]; names that the form does not have belong to other parts of the model.

    Returns:
        linear_layers: number of linear layers of each scheme; kept_8bit, given: names of the model's layers that the arguments named.
    """
    linears = [layer for layer in form.modules() if isinstance(layer, FormLinear)]
    schemes, kept, given = [], set(), set()
    for layer in linears:
        name, chosen = layer.source.name, scheme
        if scheme == "8da4w" and layer.in_features % GROUP:
            chosen = "8da8w"
        elif scheme == "8da4w" and name in keep_8bit:
            chosen = "8da8w"
            kept.add(name)
        elif scheme == "8da4w" and affine and name in affine:
            given.add(name)
        if chosen != "fp32":
            quantize_linear(layer, chosen, affine[name] if name in given else None)
        schemes.append(chosen)
    return {"linear_layers": dict(sorted(Counter(schemes).items())), "kept_8bit": sorted(kept), "given": sorted(given)}


def quantize_linear(layer: FormLinear, scheme: str, given: AffineWeight | None = None) -> None:
    """Quantise a layer in place.

    Args:
        scheme: `"8da8w"` or `"8da4w"`.
        given: for 8da4w: the weights of the model's layer that this one is made from.

    Raises:
        EdgeDiTError: the given weights are of another shape, width, or kind of grid.
    """
    with quiet():
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
            IntxUnpackedToInt8Tensor,
            IntxUnpackedToInt8TensorActivationQuantization,
        )
    per_token = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN
    rows, columns = layer.weight.shape
    dtype, block = (torch.int8, (1, columns)) if scheme == "8da8w" else (torch.int4, (1, GROUP))
    if given is None:
        weight = IntxUnpackedToInt8Tensor.from_hp(layer.weight.detach(), block, dtype, activation_quantization=per_token)
    else:
        if given.bits != 4 or given.group_size != GROUP or given.zero_point is not None:
            raise EdgeDiTError(
                f"The given weights of {layer.source.name} are {given.spec()}; ExecuTorch takes symmetric ones of 4 bits in groups of {GROUP}."
            )
        first, end = layer.source.rows or (0, given.shape[0])
        if given.shape[1:] != (columns,) or end > given.shape[0] or end - first != rows:
            raise EdgeDiTError(f"The given weights of {layer.source.name} have the shape {given.shape}; the layer's rows {first} to {end} of {columns} inputs.")
        values = (unpack(given.values[first:end], 4, columns).to(torch.int16) - 8).to(torch.int8)
        scale = given.scale[first:end].float() * layer.source.factor
        weight = IntxUnpackedToInt8Tensor(values, scale, torch.zeros_like(scale, dtype=torch.int8), dtype, block, torch.float32, per_token)
    layer.weight = nn.Parameter(weight, requires_grad=False)


# -------------------------------------------------------------------- lowering


def lower(form: nn.Module, inputs: Sequence[torch.Tensor], path: str | os.PathLike, facts: Mapping[str, str]) -> dict:
    """Trace a module, give XNNPACK all it takes, write the rest as ExecuTorch's portable operators.

    Args:
        form: module with positional tensor inputs, in eval mode.
        inputs: example inputs; their shapes become the file's.
        path: the `.pte` file.
        facts: text that the file returns from its methods `edgedit_<key>`.

    Returns:
        subgraphs (pieces that XNNPACK runs), delegated (operators in them), portable (operator → number outside them).
    """
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.devtools.backend_debug import get_delegation_info
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        with torch.no_grad():
            program = torch.export.export(form, tuple(inputs), strict=False)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={f"{CONSTANT_PREFIX}{key}": value for key, value in facts.items()},
        )
        info = get_delegation_info(edge.exported_program().graph_module)
        lowered = edge.to_executorch()
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                lowered.write_to_file(file)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    portable = {name: count.non_delegated for name, count in info.delegation_by_operator.items() if count.non_delegated and name != "getitem"}
    return {"subgraphs": info.num_delegated_subgraphs, "delegated": info.num_delegated_nodes, "portable": dict(sorted(portable.items()))}


def profile(path: str | os.PathLike, inputs: Sequence[torch.Tensor], runs: int) -> dict:
    """Where the time of a forward goes, by ExecuTorch's event tracer.

    Args:
        path: the `.pte` file. inputs: of its shapes. runs: forwards that count, after one that does not.

    Returns:
        portable_share: the share of what is not in delegate calls; portable_share_method; portable_ms: portable kernel → ms a forward;
        forward_ms (median, with the tracer on).
    """
    with quiet():
        from executorch.devtools import Inspector
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

        program = _load_for_executorch(str(path), enable_etdump=True)
        for _ in range(runs + 1):
            program.forward([tensor.contiguous() for tensor in inputs])
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "etdump")
            program.write_etdump_result_to_file(file)
            (block,) = [block for block in Inspector(etdump_path=file).event_blocks if block.name == "Execute"]
    times: dict[str, torch.Tensor] = {}
    for event in block.events:
        if event.perf_data is not None and not event.is_delegated_op:
            times[event.name] = times.get(event.name, 0) + torch.tensor(event.perf_data.raw[1:], dtype=torch.float64)
    total = times["Method::execute"]
    share = 1 - times.get("DELEGATE_CALL", torch.zeros_like(total)) / total
    kernels = {name.removeprefix("native_call_"): float(value.median()) for name, value in times.items() if name.startswith("native_call_")}
    return {
        "portable_share": float(share.median()),
        "portable_share_method": SHARE_METHOD,
        "portable_ms": dict(sorted(kernels.items())),
        "forward_ms": float(total.median()),
    }
