"""Metrics of generated images. Names load on first use, so that importing the package stays light."""

from __future__ import annotations

import importlib

_EXPORTS = {
    "distances": (
        "RunningMoments",
        "adm_precision_recall",
        "frechet_distance",
        "frechet_distance_from_moments",
        "frechet_standard_error",
        "inception_score",
        "kernel_distance",
        "precision_recall",
        "psnr",
    ),
    "extractors": (
        "Extractor",
        "FeatureExtractor",
        "class_agreement",
        "train_classifier",
        "train_independent_classifier",
    ),
    "networks": ("InceptionExtractor", "ModuleExtractor", "TransformersExtractor", "open_extractor"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
