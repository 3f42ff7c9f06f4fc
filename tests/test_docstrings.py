"""What a docstring refers to is there: a [`name`] in this package, its recipes or diffusers, a `folder/file.py` in the
repository.
"""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "edgedit_hf"
FILES = [*sorted(SOURCE.rglob("*.py")), *sorted(REPOSITORY.glob("training/*.py"))]
FILES += sorted(REPOSITORY.glob("benchmarks/*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_of(path: Path) -> str:
    """Its dotted name below the package, or below the repository."""
    parts = path.relative_to(SOURCE if path.is_relative_to(SOURCE) else REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def defined(body: list[ast.stmt]) -> set[str]:
    """Names that a module or class defines or imports, or, of a package, gives on first use."""
    names = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


NAMES = {module_of(path): defined(tree.body) for path, tree in TREES.items()}
for path, tree in TREES.items():
    if path.name == "__init__.py":  # its lazy table
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        NAMES[module_of(path)] |= texts
CLASSES: dict[str, set[str]] = {}
for tree in TREES.values():
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            CLASSES.setdefault(node.name, set()).update(defined(node.body))


def docstrings(path: Path) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(TREES[path]) if isinstance(node, kinds))


def is_there(reference: str) -> bool:
    """Whether there is such a module, or such a name in the module or class that the reference gives, or in any."""
    *owner, name = reference.removeprefix("edgedit_hf.").split(".")
    if any(f".{module}".endswith("." + ".".join([*owner, name])) for module in NAMES):
        return True
    if not owner:
        return any(name in names for names in (*NAMES.values(), *CLASSES.values()))
    if owner[-1] in CLASSES:
        return name in CLASSES[owner[-1]]
    return any(name in names for module, names in NAMES.items() if f".{module}".endswith("." + ".".join(owner)))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(REPOSITORY)) for path in FILES])
def test_what_a_docstring_refers_to_is_there(path):
    text = docstrings(path)
    missing = [name for name in re.findall(r"\[`~?([\w.]+)`\]", text) if not is_there(name)]
    folders = SOURCE, REPOSITORY
    missing += [
        file
        for file in re.findall(r"\b\w[\w/]*/\w+\.py\b", text)
        if not any((folder / file).is_file() for folder in folders)
    ]
    if missing:
        import diffusers

        missing = [name for name in missing if not hasattr(diffusers, name)]
    assert not missing, f"{path} refers to {missing}, which moved, or has another name"
