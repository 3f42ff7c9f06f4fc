"""The memory plan of an export: every number of contract.json and PORTING.md, from the files and the arrays of a real
loop.
"""

import re
from itertools import pairwise

import numpy as np
import pytest
from text_pipelines import elastic, tiny_vae

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.export import sample_min
from edgedit_hf.export.contract import Artefact, run_part, write_contract
from edgedit_hf.export.memory import artefact_bytes, memory_plan
from edgedit_hf.export.parts import pipeline_parts

SIZES = {"text_encoder": 700, "conditioner": 50, "text_conditioner": 90, "denoiser": 4000, "decoder": 1200}


def written(folder, pipeline, split):
    """(contract, what runs the eager parts) of stand-ins for the files: their sizes are what counts."""
    artefacts = [Artefact(part, part.key, "fp32", planned_bytes=7) for part in pipeline_parts(pipeline, split=split)]
    for artefact in artefacts:
        (folder / artefact.file).write_bytes(bytes(SIZES.get(artefact.key, 300)))
    contract = write_contract(
        folder, pipeline, artefacts, format="coreml", precision="fp32", split=split, prompt="a 3", label=0
    )
    by_key = {artefact.key: artefact for artefact in artefacts}

    def opener(key):
        names = by_key[key].inputs
        return lambda arrays: list(run_part(by_key[key], dict(zip(names, arrays))).values())

    return contract, sample_min.Artefacts(contract, opener)


def test_what_a_real_loop_keeps(tmp_path):
    """Text to image, split, with a VAE: everything that an app may keep."""
    contract, run = written(tmp_path, elastic(second=False, vae=tiny_vae(), channels=4), split=True)
    reference = sample_min.read_safetensors(tmp_path / "reference.safetensors")
    condition = sample_min.conditioning(contract, run, None, sample_min.reference_windows(contract, reference))
    text = run("text_conditioner", **condition)
    steps = contract["schedule"]["steps"]
    table = [run("conditioner", timestep=np.full(2, step["timestep"])) for step in steps]
    record: dict = {}
    sample_min.sample(contract, run, reference["noise"], condition, record)

    def size(*arrays) -> int:
        return sum(array.astype(np.float32).nbytes for array in arrays)

    states = size(*(value for name, value in condition.items() if name[-1] == "0"))
    absent = size(*(value for name, value in condition.items() if name[-1] == "1"))  # zeros of the missing encoder
    embedded, modulations = size(*text.values()), sum(size(*entry.values()) for entry in table)
    latents, image = size(reference["noise"]), size(record["loop.decoded"])
    assert len(steps) == 3 and contract["schedule"]["history"] == 0
    expected = {
        "text_encoder": states + absent,
        "conditioner": states + absent + modulations,
        "text_conditioner": states + absent + modulations + embedded,
        "denoiser": modulations + embedded + 2 * latents,
        "decoder": latents + image,
        "encoder": None,
    }
    entries = contract["memory"]["artefacts"]
    assert {key: entry["kept_bytes"] for key, entry in entries.items()} == expected
    assert {key: entry["file_bytes"] for key, entry in entries.items()} == {**SIZES, "encoder": 300}
    alone = {key: SIZES[key] + 7 + expected[key] for key in SIZES}
    assert contract["memory"]["orders"] == {
        "all_at_once": {"peak_bytes": sum(SIZES.values()) + 5 * 7 + max(value for value in expected.values() if value)},
        "one_after_another": {"peak_bytes": max(alone.values()), "at": max(alone, key=alone.__getitem__)},
    }
    check_porting((tmp_path / "PORTING.md").read_text(), contract, alone)


def check_porting(text, contract, alone):
    """PORTING.md has the contract's numbers."""
    text, orders = text.replace(",", ""), contract["memory"]["orders"]
    for entry in contract["memory"]["artefacts"].values():
        kept = "not in the loop" if entry["kept_bytes"] is None else entry["kept_bytes"]
        assert f"| {entry['file_bytes']} | {entry['planned_bytes']} | {kept} |" in text
    assert f"open at once | {orders['all_at_once']['peak_bytes']} |" in text
    assert (
        f"one after another | {orders['one_after_another']['peak_bytes']} | `{orders['one_after_another']['at']}` |"
        in text
    )
    steps = re.findall(r"^\d\. Open `(.*?)`.*: (\d+) bytes\.$", text, re.MULTILINE)
    assert [(name, int(size)) for name, size in steps] == list(alone.items())


@pytest.mark.parametrize("split", [False, True])
def test_a_class_conditional_loop_keeps_its_table(make_transformer, tmp_path, split):
    pipeline = EdgeDiTPipeline(make_transformer(num_layers=1), make_scheduler("epsilon"), default_steps=4)
    contract, _ = written(tmp_path, pipeline, split)
    kept = {key: entry["kept_bytes"] for key, entry in contract["memory"]["artefacts"].items()}
    latents, table = 4 * 8 * 8, 4 * 2 * 4 * (6 + 2) * 32  # steps, rows, bytes; modulations of one layer of 32
    assert kept == ({"conditioner": table, "denoiser": table + 2 * latents} if split else {"denoiser": 2 * latents})


def test_one_file_in_turn_holds_all_files_and_one_methods_buffers():
    kept = {"denoiser": 10, "decoder": 40}
    sizes, planned = {"denoiser": 1000, "decoder": 300, "encoder": 200}, {"denoiser": 5, "decoder": 60, "encoder": 1}
    one = {"bytes": 1400, "methods": {key: {"planned_bytes": value} for key, value in planned.items()}}
    orders = memory_plan(sizes, planned, kept, one)["orders"]
    assert orders == {
        "all_at_once": {"peak_bytes": 1300 + 65 + 40},
        "one_after_another": {"peak_bytes": 1000 + 5 + 10, "at": "denoiser"},
        "one_file": {"peak_bytes": 1400 + 65 + 40},
        "one_file_in_turn": {"peak_bytes": 1400 + 60 + 40, "at": "decoder"},
    }
    peaks = [orders[name]["peak_bytes"] for name in ("one_after_another", "all_at_once", "one_file")]
    assert all(less < more for less, more in pairwise(peaks))
    unknown = memory_plan(sizes, dict.fromkeys(sizes), kept)
    assert unknown["orders"]["all_at_once"]["peak_bytes"] == 1340 and "one_file" not in unknown["orders"]


def test_a_package_and_data_beside_a_file_count_whole(tmp_path):
    (tmp_path / "a.mlpackage/Data").mkdir(parents=True)
    for name, size in (("a.mlpackage/x", 3), ("a.mlpackage/Data/y", 40), ("b.onnx", 500), ("b.onnx.data", 6000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert artefact_bytes(tmp_path / "a.mlpackage") == 43 and artefact_bytes(tmp_path / "b.onnx") == 6500
