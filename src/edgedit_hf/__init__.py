"""edgedit_hf: compress a diffusion transformer into one a phone can run.

`import edgedit_hf` is light: nothing heavy is imported until a name is used. It also makes
`DiffusionPipeline.from_pretrained` know the classes of this package, whether diffusers is imported before or after
([`registration`]), and drops a few warnings of the libraries that nobody can act on ([`quiet`]).
"""

import importlib as _importlib

from . import quiet as _quiet
from . import registration as _registration

__version__ = "0.1.0"

# Where each public name lives; it is imported when it is first used.
_NAMES = {
    "EdgeDiTError": ".errors",
    "EdgeDiTPipeline": ".pipelines.pipeline_edgedit",
    "EdgeDiTQuantizationConfig": ".quantization.quantizer",
    "EdgeDiTTransformer2DModel": ".models.transformer_edgedit",
    "ElasticDiTPipeline": ".pipelines.pipeline_elastic_dit",
    "ElasticDiTTransformer2DModel": ".models.transformer_elastic_dit",
    "ExecutorchAutoencoder": ".export.components",
    "ExecutorchEdgeDiTTransformer2DModel": ".export.components",
    "ExecutorchElasticDiTTransformer2DModel": ".export.components",
    "ExecutorchTextEncoder": ".export.components",
    "Genotype": ".genotype",
    "LayerSpec": ".genotype",
    "OnnxAutoencoder": ".export.components",
    "OnnxEdgeDiTTransformer2DModel": ".export.components",
    "OnnxElasticDiTTransformer2DModel": ".export.components",
    "OnnxTextEncoder": ".export.components",
    "ProxyBank": ".distill.proxy_bank",
    "SearchSpace": ".search_space",
    "dequantize_model": ".quantization.layers",
    "load_original": ".models.checkpoints",
    "model_cost": ".search_space",
    "quantize_model": ".quantization.quantizer",
    # diffusers looks these up in the library that model_index.json names, to see how a component is loaded.
    "ConfigMixin": "diffusers",
    "ExportedComponent": ".export.exported",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}
_MODULES = (
    "data",
    "diffusion",
    "distill",
    "elastic",
    "export",
    "metrics",
    "models",
    "pipelines",
    "quantization",
    "report",
    "run",
    "runtimes",
    "search",
)

__all__ = [*_NAMES, *_MODULES, "__version__"]


def __getattr__(name: str):
    if name in _NAMES:
        value = getattr(_importlib.import_module(_NAMES[name], __name__), name)
    elif name in _MODULES:
        value = _importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_quiet.install()
_registration.register()
