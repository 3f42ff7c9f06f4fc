"""Presets read by `ast` are those that the model classes build."""

import inspect

from edgedit_hf.models import transformer_edgedit, transformer_elastic_dit
from edgedit_hf.models.presets import preset_configs

FAMILIES = {
    transformer_edgedit.EdgeDiTTransformer2DModel: transformer_edgedit.PRESETS,
    transformer_elastic_dit.ElasticDiTTransformer2DModel: transformer_elastic_dit.PRESETS,
}


def test_they_are_the_classes_own():
    expected = {}
    for model, presets in FAMILIES.items():
        parameters = list(inspect.signature(model.__init__).parameters.values())[1:]
        for name, values in presets.items():
            expected[name] = {p.name: p.default for p in parameters} | values | {"_class_name": model.__name__}
    assert preset_configs() == expected and list(preset_configs()) == list(expected)
