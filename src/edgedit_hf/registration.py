"""Every change of diffusers' look-up tables, in one place. Imports neither torch nor diffusers.

diffusers knows a third-party class only if its tables say so: `LOADABLE_CLASSES` decides what `model_index.json`
records for a component and whether a Hub repository that names `edgedit_hf` may be loaded at all, a pipeline's
`_class_name` is looked up as an attribute of the `diffusers` module, and the `quant_method` of a config.json in two
mappings of quantisers. [`register`] makes these entries: at once where diffusers' modules that hold them are loaded,
otherwise right after they are, through import hooks that remove themselves.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

PACKAGE = "edgedit_hf"
TABLES = "diffusers.pipelines.pipeline_loading_utils"  # the module of diffusers that holds the tables of classes
QUANTIZERS = "diffusers.quantizers.auto"  # and the one with the quantisers
OUR_QUANTIZER = f"{PACKAGE}.quantization.quantizer"
METHODS = ["save_pretrained", "from_pretrained"]

# Base classes, as attributes of this package, by which diffusers recognises a component and how it is saved and loaded.
COMPONENTS = {
    "ModelMixin": METHODS,
    "SchedulerMixin": METHODS,
    "ExportedComponent": METHODS,
}
# Classes that diffusers looks up as its own attributes, by the name in `_class_name`. Not the exported models:
# diffusers asks every library for every name in COMPONENTS, and would import their module to load any pipeline.
CLASSES = ("EdgeDiTPipeline", "EdgeDiTTransformer2DModel", "ElasticDiTPipeline", "ElasticDiTTransformer2DModel")


def register() -> None:
    """Make diffusers know this package's classes, now or as soon as its modules are imported. Calling it again changes
    nothing.
    """
    for name, patch in ((TABLES, _patch), (QUANTIZERS, _patch_quantizers)):
        if name in sys.modules:
            importlib.import_module(name)  # another thread may be in the middle of importing it: wait for its end
            patch()
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, patch))


def _patch() -> None:
    tables = sys.modules[TABLES]
    tables.LOADABLE_CLASSES[PACKAGE] = dict(COMPONENTS)
    tables.ALL_IMPORTABLE_CLASSES.update(COMPONENTS)

    # A module's own __getattr__ is asked before its class's, so our names resolve lazily and all others go on to
    # diffusers.
    diffusers: ModuleType = sys.modules["diffusers"]

    def getattr_of_diffusers(name: str):
        if name in CLASSES:
            value = getattr(importlib.import_module(PACKAGE), name)
            setattr(diffusers, name, value)
            return value
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    previous = vars(diffusers).get("__getattr__")
    if getattr(previous, "__module__", None) != __name__:
        vars(diffusers)["__getattr__"] = getattr_of_diffusers


class _Quantizer:
    """Stands in diffusers' mappings for a class of [`OUR_QUANTIZER`], which is imported when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _class(self) -> Any:
        return getattr(importlib.import_module(OUR_QUANTIZER), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._class()(*args, **kwargs)

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._class().from_dict(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return (type(instance).__module__, type(instance).__name__) == (OUR_QUANTIZER, self._name)


def _patch_quantizers() -> None:
    mappings = sys.modules[QUANTIZERS]
    mappings.AUTO_QUANTIZER_MAPPING["edgedit"] = _Quantizer("EdgeDiTQuantizer")
    mappings.AUTO_QUANTIZATION_CONFIG_MAPPING["edgedit"] = _Quantizer("EdgeDiTQuantizationConfig")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Import hook for one module: lets the ordinary finders find it, and patches after it has run."""

    def __init__(self, name: str, patch: Callable[[], None]) -> None:
        self.name, self._patch, self._finding = name, patch, False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name or self._finding:
            return None
        self._finding = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self._patch()

        vars(spec.loader)["exec_module"] = execute_and_patch
        return spec
