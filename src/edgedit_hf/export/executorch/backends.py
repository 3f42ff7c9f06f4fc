"""ExecuTorch's backends for an export: XNNPACK (every CPU), Core ML (Apple), QNN (Qualcomm's NPU). Each gives an edge
program that ExecuTorch writes.

Core ML's delegate is lowered wherever `coremltools` is installed, but runs on Apple's devices alone. QNN needs
Qualcomm's SDK, which is not on PyPI: this module never downloads it, and its path has not been run by us.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...runtimes.sessions import FORWARD

QNN_CHIPSET = "SM8650"  # Snapdragon 8 Gen 3


Methods = Mapping[str, tuple[nn.Module, Sequence[torch.Tensor]]]


def edge_program(backend: str, methods: Methods, constants: Mapping[str, Any]) -> Any:
    """Trace modules and give the backend what it takes: ExecuTorch's `EdgeProgramManager`.

    Args:
        backend: see [`~edgedit_hf.export.formats.FORMATS`].
        methods: name → a module with positional tensor inputs, in eval mode, and examples of them, whose shapes become
            the method's. For QNN [`FORWARD`] alone.
        constants: constant methods of the program, by name.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    if backend == "qnn":
        form, inputs = methods[FORWARD]
        return _qnn_program(form, tuple(inputs), constants)
    with torch.no_grad():
        program = {
            name: torch.export.export(form, tuple(inputs), strict=False) for name, (form, inputs) in methods.items()
        }
    if backend == "coreml":
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):  # progress bars of every pass
            return to_edge_transform_and_lower(
                program, partitioner=[_coreml_partitioner()], constant_methods=dict(constants)
            )
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    config = EdgeCompileConfig(_check_ir_validity=False)  # it does not know torchao's quantised operators
    return to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], compile_config=config, constant_methods=dict(constants)
    )


def _coreml_partitioner() -> Any:
    import coremltools as ct
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=ct.precision.FLOAT16, minimum_deployment_target=ct.target.iOS18
    )
    return CoreMLPartitioner(compile_specs=specs)


def _qnn_program(form: nn.Module, inputs: tuple[torch.Tensor, ...], constants: Mapping[str, Any]) -> Any:
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
        to_edge_transform_and_lower_to_qnn,
    )

    options = generate_htp_compiler_spec(use_fp16=True)
    spec = generate_qnn_executorch_compiler_spec(soc_model=QcomChipset[QNN_CHIPSET], backend_options=options)
    return to_edge_transform_and_lower_to_qnn(form, inputs, spec, constant_methods=dict(constants))
