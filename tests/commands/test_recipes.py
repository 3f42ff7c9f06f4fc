"""`edgedit recipes copy`: what a pip user gets."""

from edgedit_hf.commands.cli import main


def test_recipes_copy(repository, tmp_path, capsys):
    folder = tmp_path / "training"
    assert main(["recipes", "copy", str(folder)]) == 0
    assert "accelerate launch" in capsys.readouterr().out
    expected = {
        path.relative_to(repository / "training")
        for path in (repository / "training").rglob("*")
        if path.suffix in (".py", ".yaml") and path.name != "__init__.py"
    }
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == expected
    changed = folder / "train_teacher.py"
    original = changed.read_text()
    assert main(["recipes", "copy", str(folder)]) == 0  # equal files are no conflict
    changed.write_text("print('mine')\n")
    assert main(["recipes", "copy", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "train_teacher.py" in said and "--force" in said and changed.read_text() == "print('mine')\n"
    assert main(["recipes", "copy", str(folder), "--force"]) == 0 and changed.read_text() == original
