"""`edgedit bank`: the choices of a bank, against its files and the run's table."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from edgedit_hf.commands.cli import main


@pytest.fixture
def listed(capsys):
    def run(*arguments) -> dict:
        assert main(["bank", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_every_proxy_with_its_loss_time_and_weights(debug_run, listed, capsys):
    found = listed(debug_run)
    entries = json.loads((debug_run / "bank" / "index.json").read_text())["entries"]
    table = json.loads((debug_run / "latency" / "table.json").read_text())
    times = {block["option"]: block["ms"] for block in table["blocks"]}
    teacher = load_file(next((debug_run / "teacher" / "transformer").glob("*.safetensors")))
    own = sum(tensor.numel() for name, tensor in teacher.items() if name.startswith("blocks.0."))
    assert found["original"] == {"ms": times["original"], "parameters": own, "bytes": 4 * own}
    assert [choice["key"] for choice in found["choices"]] == list(entries)
    for choice in found["choices"]:
        entry = entries[choice["key"]]
        weights = sum(tensor.numel() for tensor in load_file(debug_run / "bank" / entry["file"]).values())
        assert choice["parameters"] == weights and choice["bytes"] == 4 * weights
        assert choice["saved_parameters"] == len(entry["source"]) * own - weights
        assert (choice["loss_before"], choice["loss_after"]) == (entry["loss_before"], entry["loss_after"])
        assert choice["ms"] == times[entry["option"]]
        assert choice["saved_ms"] == pytest.approx(len(entry["source"]) * times["original"] - choice["ms"])
    total = found["total"]
    assert total["proxies"] == len(entries) and total["missing"] == 0
    assert total["bytes"] == 4 * total["parameters"] == sum(choice["bytes"] for choice in found["choices"])
    assert main(["bank", str(debug_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(entries) + 3 and all(key in line for key, line in zip(entries, lines[2:]))


def test_a_bank_alone_has_no_times_unless_a_table_is_named(debug_run, listed, capsys, tmp_path):
    bank = shutil.copytree(debug_run / "bank", tmp_path / "bank")
    found = listed(bank)
    assert found["table"] is None and {choice["ms"] for choice in found["choices"]} == {None}
    table = debug_run / "latency" / "table.json"
    assert listed(bank, "--table", table)["choices"] == listed(debug_run)["choices"]
    index = json.loads((bank / "index.json").read_text())
    del index["entries"]["00/mlp"]
    (bank / "index.json").write_text(json.dumps(index))
    assert listed(bank)["total"]["missing"] == 1
    index["space"]["num_heads"] = 1
    (bank / "index.json").write_text(json.dumps(index))
    assert main(["bank", str(bank), "--table", str(table)]) == 2
    said = capsys.readouterr().err
    assert "'num_heads': 2" in said and "'num_heads': 1" in said


def test_what_is_no_bank_is_refused(debug_run, capsys, tmp_path):
    for folder, said in ((debug_run / "teacher", "holds a teacher, no proxy bank"), (tmp_path, "holds no model_index")):
        assert main(["bank", str(folder)]) == 2
        assert said in capsys.readouterr().err


def test_a_bank_on_the_hub(debug_run, make_hub_cache, monkeypatch, listed):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(make_hub_cache(debug_run / "bank", "me/bank")))
    assert [choice["key"] for choice in listed("me/bank")["choices"]] == [
        choice["key"] for choice in listed(debug_run)["choices"]
    ]
