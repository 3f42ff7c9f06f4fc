"""The presets of both families, read from the model files by `ast`: without importing them, and so without torch."""

import ast
from pathlib import Path
from typing import Any

MODELS = {
    "transformer_edgedit.py": "EdgeDiTTransformer2DModel",
    "transformer_elastic_dit.py": "ElasticDiTTransformer2DModel",
}


def preset_configs() -> dict[str, dict[str, Any]]:
    """The full config of every preset, by name: its values in `PRESETS` over the defaults of `__init__`, and
    `_class_name`.
    """
    configs = {}
    for file, name in MODELS.items():
        tree = ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8"))
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        model = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        init = next(node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "__init__").args
        defaults = {
            argument.arg: ast.literal_eval(constants[default.id] if isinstance(default, ast.Name) else default)
            for argument, default in zip(init.args[-len(init.defaults) :], init.defaults)
        }
        for preset, values in ast.literal_eval(constants["PRESETS"]).items():
            configs[preset] = {**defaults, **values, "_class_name": name}
    return configs
