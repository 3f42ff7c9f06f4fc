"""The order of the house: a module imports only what stands above it, model files stand alone, and importing stays
light.
"""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "edgedit_hf"

# From top to bottom: a module may import those before it, and those of its own entry.
ORDER = [
    "errors",
    "quiet",
    "entry",
    "markup",
    "files",
    "private",
    "schema",
    "stamp",
    "records",
    "hub",
    "genotype",
    "search_space",
    "menu_space",
    "diffusion",
    "export.formats",  # a table without torch, which recipes and commands read too
    "run",
    "folders",
    "models",
    "pipelines",
    "data",
    "metrics",
    "distill",
    "elastic",
    "few_step",
    "runtimes",
    "quantization",
    "export",
    "search",
    "phone",
    "report",
    "publish",
    "estimate",
    "preflight",
    "registration",
    "commands",
    "optimum_register",
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in ((names,) if isinstance(names, str) else names)}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "datasets", "botorch", "gpytorch", "onnx", "onnxruntime"}
LIGHT_MODULES = (
    "errors entry markup files private schema stamp records hub genotype search_space menu_space run/config "
    "run/sections run/comparison run/lock run/outputs run/results run/state folders publish export/formats "
    "models/presets quiet registration commands optimum_register phone"
).split()
SELF_CONTAINED = {"torch", "diffusers", "safetensors", "numpy", "PIL"} | sys.stdlib_module_names


def sources(*names: str) -> list[Path]:
    found = []
    for name in names:
        those = [SOURCE / f"{name}.py"] if (SOURCE / f"{name}.py").is_file() else sorted((SOURCE / name).rglob("*.py"))
        assert those, f"there is no {name} in {SOURCE}"
        found += those
    return found


def imports(path: Path, top_level_only: bool = False, for_types: bool = True) -> list[tuple[int, str]]:
    """(line, absolute module or name) of every import; relative ones are resolved, `from . import a` names `…a`.

    Args:
        top_level_only: without those in functions, and those for type checkers alone. for_types: with the latter.
    """
    package = ["edgedit_hf", *path.relative_to(SOURCE).parts[:-1]] if path.is_relative_to(SOURCE) else []
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = set()
    for node in ast.walk(tree):
        guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if (guard and (top_level_only or not for_types)) or (deferred and top_level_only):
            hidden.update(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def entry(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_module_has_its_place_in_the_order():
    there = {entry(path) for path in SOURCE.rglob("*.py")} - {"__init__"}
    assert there <= set(PLACE), f"add {sorted(there - set(PLACE))} to ORDER, where the design places them"


@pytest.mark.parametrize("path", [p for p in sorted(SOURCE.rglob("*.py")) if p != SOURCE / "__init__.py"], ids=str)
def test_a_module_imports_only_what_stands_above_it(path):
    place = PLACE.get(".".join(path.relative_to(SOURCE).with_suffix("").parts[:2]), PLACE[entry(path)])
    for line, name in imports(path):
        if not name.startswith("edgedit_hf."):
            assert name != "edgedit_hf", f"{path}:{line} imports the whole package; import the module that is meant"
            continue
        parts = name.split(".")
        if parts[1] == "__version__":
            continue
        assert parts[1] in PLACE, f"{path}:{line} imports {name}, which has no place in the order"
        assert PLACE.get(".".join(parts[1:3]), PLACE[parts[1]]) <= place, (
            f"{path}:{line} imports {name}, which stands below {entry(path)}"
        )


def modules() -> dict[str, Path]:
    """Every module of the package by its absolute name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(["edgedit_hf", *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imported(path: Path, among: dict[str, Path], top_level_only: bool) -> set[str]:
    """Modules of ours that a module imports when it runs."""
    found = set()
    for _, name in imports(path, top_level_only, for_types=False):
        module = name if name in among else name.rpartition(".")[0]
        if module in among and among[module] != path:
            found.add(module)
    return found


@pytest.mark.parametrize("top_level_only", [True, False], ids=["at the top", "in functions too"])
def test_no_module_imports_itself_by_way_of_others(top_level_only):
    among = modules()
    left = {module: imported(path, among, top_level_only) for module, path in among.items()}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    circle = {module: sorted(needs & left.keys()) for module, needs in left.items()}
    assert not circle, f"these modules stand on a circle of imports, or on one's way: {circle}"


def test_no_private_name_of_another_module_is_imported():
    private = [
        f"{path}:{line} {name}"
        for path in modules().values()
        for line, name in imports(path)
        if name.startswith("edgedit_hf.") and name.split(".")[-1].startswith("_") and not name.endswith("__")
    ]
    assert not private, f"{private}: give the name no underscore, or move what needs it"


MODELS, PIPELINES = sorted(SOURCE.glob("models/transformer_*.py")), sorted(SOURCE.glob("pipelines/pipeline_*.py"))
LONGEST = 700  # lines of a file; a model has its own, because it ships alone


def test_no_file_is_too_long_to_read():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()}
    long = {str(path): length for path, length in lengths.items() if length > LONGEST and path not in MODELS}
    assert not long, f"{long} are longer than {LONGEST} lines; give a part of each a file of its own"


@pytest.mark.parametrize("path", [*MODELS, *PIPELINES, SOURCE / "pipelines" / "call.py"], ids=str)
def test_model_and_pipeline_files_stand_alone(path):
    beside = "edgedit_hf.pipelines.call."  # its text stands in place of its import where a pipeline ships with its code
    foreign = [
        f"{line}: {name}"
        for line, name in imports(path)
        if name.split(".")[0] not in SELF_CONTAINED and not (path in PIPELINES and name.startswith(beside))
    ]
    assert not foreign, f"{path} ships to the Hub as it is, but imports {foreign}"


@pytest.mark.parametrize("path", sources("__init__", *LIGHT_MODULES), ids=str)
def test_light_modules_import_nothing_heavy_at_the_top(path):
    heavy = [f"{line}: {name}" for line, name in imports(path, top_level_only=True) if name.split(".")[0] in HEAVY]
    assert not heavy, f"{path} imports {heavy} at the top; import them in the function that needs them"


LIGHT = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
import edgedit_hf
import edgedit_hf.run.config, edgedit_hf.search_space, edgedit_hf.metrics
dir(edgedit_hf)
spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
heavy = {"torch", "numpy", "diffusers", "transformers", "accelerate", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
assert spent < 0.3, f"importing took {spent:.2f} s of CPU"
assert edgedit_hf.Genotype.original(2, 32, 2).num_teacher_layers == 2
try:
    edgedit_hf.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError
"""


def test_importing_the_package_is_light(run_python):
    run_python(LIGHT)


OPTIMUM_HELP = """
import sys
from optimum.commands.optimum_cli import main
for arguments in (["--help"], ["export", "edgedit", "--help"]):
    sys.argv = ["optimum-cli", *arguments]
    try:
        main()
    except SystemExit as done:
        assert done.code == 0
heavy = {"torch", "diffusers", "transformers", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
"""


def test_optimum_cli_help_shows_our_command_and_imports_no_torch(run_python):
    printed = run_python(OPTIMUM_HELP)
    assert "edgedit" in printed and "--format" in printed


def test_every_public_name_is_there():
    import edgedit_hf

    for name in edgedit_hf.__all__:
        assert getattr(edgedit_hf, name) is not None
    assert set(edgedit_hf.__all__) <= set(dir(edgedit_hf))
