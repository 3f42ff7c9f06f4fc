"""Lowering to ExecuTorch with XNNPACK: `export_executorch` writes a `.pte` file of the denoiser for one batch.

Precisions: `fp32`; `int8` is 8da8w, `int4` is 8da4w, ExecuTorch's names for activations that are quantised to 8 bits a token as they come,
and weights of 8 bits an output channel, or 4 bits in groups of [`GROUP`] inputs. Weight-only int8 is not offered: it lowers without an error
and returns NaN. The files describe themselves through constant methods `edgedit_*`: genotype, config, weights' hash, precision, batch, scheme of
the linear layers, versions.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..latency.runners import CONSTANT_PREFIX, example_inputs, require_executorch
from ..run_state import explain_write_errors
from .wrappers import DenoiserWrapper, check_batch, check_model, describe, quiet
from .xnnpack import xnnpack_form

if TYPE_CHECKING:
    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel

SCHEMES = {"fp32": "fp32", "int8": "8da8w", "int4": "8da4w"}  # precision → scheme of the linear layers
GROUP = 32  # inputs that share a scale in 4 bits: XNNPACK's smallest
DEFAULT_BATCH = 2  # one image with guidance


def export_executorch(model: EdgeDiTTransformer2DModel, path: str | os.PathLike, precision: str = "fp32", batch: int = DEFAULT_BATCH) -> dict:
    """Write the denoiser as a `.pte` file with inputs `sample`, `timestep`, `class_labels` and output `prediction`.

    The batch is fixed: with an open one, XNNPACK takes over none of the reshapes around attention.

    Args:
        model: the denoiser, float32, on the CPU.
        path: the file.
        precision: a key of [`SCHEMES`].
        batch: images of a forward.

    Returns:
        scheme, linear_layers (their number a scheme) and delegation ([`lower`]).

    Raises:
        EdgeDiTError: ExecuTorch is not installed, the model is not float32 or not plain weights, or precision or batch do not exist.
    """
    require_executorch()
    if precision not in SCHEMES:
        raise EdgeDiTError(f"precision is {precision!r}; ExecuTorch exports exist as {', '.join(SCHEMES)}.")
    check_model(model)
    batch = check_batch(batch, dynamic=False)
    form = xnnpack_form(model)
    layers = quantize_linears(form, SCHEMES[precision])
    inputs = tuple(example_inputs(model.config, batch).values())
    delegation = lower(DenoiserWrapper(form), inputs, path, {**describe(model, precision, batch), "scheme": SCHEMES[precision]})
    return {"scheme": SCHEMES[precision], "linear_layers": layers, "delegation": delegation}


def quantize_linears(module: nn.Module, scheme: str) -> dict[str, int]:
    """Quantise every linear layer in place, as far as the scheme reaches.

    A layer whose number of inputs is not a multiple of [`GROUP`] has no 8da4w kernel and is quantised to 8da8w instead.

    Returns:
        Number of linear layers of each scheme.
    """
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    scheme_of = {name: "8da8w" if scheme == "8da4w" and layer.in_features % GROUP else scheme for name, layer in linears.items()}
    if scheme != "fp32":
        with quiet():
            from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
            from torchao.quantization.granularity import PerAxis, PerGroup

            for kind, dtype, granularity in (("8da8w", torch.int8, PerAxis(0)), ("8da4w", torch.int4, PerGroup(GROUP))):
                config = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
                quantize_(module, config, filter_fn=lambda _, name, kind=kind: scheme_of.get(name) == kind)
    return dict(sorted(Counter(scheme_of.values()).items()))


def lower(wrapper: nn.Module, inputs: tuple[torch.Tensor, ...], path: str | os.PathLike, facts: Mapping[str, str]) -> dict:
    """Trace a module, give XNNPACK all it takes, write the rest as ExecuTorch's portable operators.

    Args:
        wrapper: module with positional tensor inputs, in eval mode.
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
            program = torch.export.export(wrapper, inputs, strict=False)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={f"{CONSTANT_PREFIX}{key}": value for key, value in facts.items()},
        )
        info = get_delegation_info(edge.exported_program().graph_module)
        lowered = edge.to_executorch()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_write_errors(path), open(path, "wb") as file:
        lowered.write_to_file(file)
    portable = {name: count.non_delegated for name, count in info.delegation_by_operator.items() if count.non_delegated and name != "getitem"}
    return {"subgraphs": info.num_delegated_subgraphs, "delegated": info.num_delegated_nodes, "portable": dict(sorted(portable.items()))}
