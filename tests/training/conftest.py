"""What the recipes' tests share beside the processes themselves."""

from pathlib import Path

import pytest


@pytest.fixture
def fail(recipes, capsys):
    """Run a recipe in this process; it must end with exit code 2 and one line, which is returned."""

    def run(name: str, output: Path, *overrides: str, config: str = "debug.yaml") -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            recipes.run_here(name, output, *overrides, config=config)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 2 and len(errors) == 1, errors
        return errors[0]

    return run


def files_of(folder: Path, *suffixes: str) -> dict[str, bytes]:
    """Content of the result files below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in suffixes
    }


@pytest.fixture(scope="session")
def result_files():
    return files_of
