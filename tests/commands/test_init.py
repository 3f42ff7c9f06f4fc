"""`edgedit init`: a recipe with every key and what it means."""

import yaml

from edgedit_hf.commands.cli import main


def test_init_prints_a_recipe_with_every_key_commented(tmp_path, capsys):
    from edgedit_hf.run.config import load_config

    assert main(["init", "--teacher", "runs/teacher", "--data", "my: images", "--output", "runs/mine"]) == 0
    printed = capsys.readouterr().out
    assert all("#" in line for line in printed.splitlines() if line.strip())
    values = yaml.safe_load(printed)
    assert values["teacher"]["path"] == "runs/teacher" and values["data"]["source"] == "my: images"
    (tmp_path / "run.yaml").write_text(printed)
    assert load_config(tmp_path / "run.yaml").output_dir == "runs/mine"
