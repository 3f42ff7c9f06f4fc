"""The table from many steps to few, and what it says in one number: from results that are made up."""

import json
import shutil

import pytest

from edgedit_hf.genotype import Genotype
from edgedit_hf.report.few_step import (
    few_step_facts,
    few_step_ratios,
    few_step_table,
    few_step_widths,
    few_step_widths_table,
    prompt_agreement,
)
from edgedit_hf.report.tables import comparison_table

METRIC = "fid[digits-cnn,n=64]"


def model(name: str, stage: str, steps: int, guidance: float, distance: float, **more) -> dict:
    return {
        "name": name,
        "stage": stage,
        "steps": steps,
        "guidance_scale": guidance,
        "forwards_per_image": steps * (1 + (guidance > 1)),
        "seconds_per_image": {"torch-fp32": steps / 1000},
        "bytes": {"fp32": 5_000_000, "int8": 1_250_000},
        "metrics": {METRIC: distance},
        "recall": 0.8,
        "class_agreement": 0.99,
        **more,
    }


MODELS = [
    model("onnx-int8", "exported", 4, 1.0, 4.1, seconds_per_image={"onnxruntime-int8": 0.001}, bytes={"int8": 1.4e6}),
    model("few-step", "few-step", 4, 1.0, 4.0, recall=0.78),
    model("student-tuned-few-steps", "student-tuned-few-steps", 4, 1.5, 8.0, solver="UniPC, leading"),
    model("student-tuned", "student-tuned", 28, 1.5, 3.5),
    model("student", "student", 28, 1.5, 9.0),
    model("teacher", "teacher", 28, 1.5, 3.4, class_agreement=None),
]


def test_one_row_a_stage_from_teacher_to_export():
    header, rows = few_step_table(MODELS)
    assert [row[0] for row in rows] == [
        *("teacher", "student, tuned", "the same net, UniPC, leading", "few-step student", "exported, int8"),
    ]
    cells = dict(zip(header, rows[-1]))
    assert cells["weights (MB)"] == "1.40" and cells["ms an image"] == "1" and cells["in"] == "ONNX Runtime int8"
    assert cells["forwards an image"] == "4" and cells["guidance"] == "none"
    assert dict(zip(header, rows[0]))["forwards an image"] == "56"
    assert rows[0][header.index("class agreement")] == "–"
    assert few_step_table(MODELS[3:]) == ([], [])


def test_what_was_won_back():
    found = few_step_ratios(MODELS)
    assert found["source"] == "student-tuned" and found["forwards"] == 14 and found["speedup"] == pytest.approx(7)
    assert found["won_back"] == pytest.approx((8.0 - 4.0) / (8.0 - 3.5)) and found["distance"] == pytest.approx(4 / 3.5)
    assert found["recall"] == pytest.approx(-0.02) and found["class_agreement"] == 0
    assert few_step_ratios(MODELS[:3]) == {}


GIVEN = [
    *MODELS,
    model("few-step-source", "few-step-source", 20, 2.0, 3.0, recall=0.7),
    model("few-step-source-few-steps", "few-step-source-few-steps", 4, 2.0, 6.0, solver="DDIM, trailing"),
]


def test_what_was_distilled_is_what_it_is_compared_with():
    """Another pipeline than the run's student (few_step.path): that one, not the student, is the same net."""
    found = few_step_ratios(GIVEN)
    assert found["source"] == "few-step-source" and found["forwards"] == 10 and found["speedup"] == pytest.approx(5)
    assert found["distance"] == pytest.approx(4 / 3) and found["won_back"] == pytest.approx((6 - 4) / (6 - 3))
    assert found["recall"] == pytest.approx(0.78 - 0.7)
    assert [row[0] for row in few_step_table(GIVEN)[1]] == [
        *("source of the few-step student", "the same net, DDIM, trailing", "few-step student", "exported, int8"),
    ]
    assert few_step_ratios([entry for entry in GIVEN if entry["name"] != "few-step-source-few-steps"]) == {}


def test_the_architecture_of_another_net_is_read_from_what_was_made_of_it(make_transformer, tmp_path):
    net = make_transformer(num_layers=3)
    net.save_pretrained(tmp_path / "few-step" / "transformer")
    record = {"config": {}, "inputs": {}, "versions": {}, "seed": 0, "steps": 6, "seconds": 1.0}
    record |= {"timesteps": [601, 300], "best": {"step": 3, "distance": 4.0}}
    (tmp_path / "few-step" / "stage.json").write_text(json.dumps(record))
    given = [{**entry, "path": "someone/pipeline"} for entry in GIVEN]
    source = few_step_facts(tmp_path, given)["source"]
    genotype = Genotype.of(net.config)
    assert source == {"path": "someone/pipeline", "genotype": {"hash": genotype.hash, "layers": genotype.to_layers()}}
    assert "source" not in few_step_facts(tmp_path, MODELS)


def test_how_models_were_sampled_is_said_where_they_differ():
    def columns(*models: dict) -> dict[str, list[str]]:
        header, rows = comparison_table(
            [{"parameters": 1, "flops": 1.0, "latency_ms": {}, **entry} for entry in models]
        )
        return {
            name: [row[place] for row in rows] for place, name in enumerate(header) if name in ("steps", "guidance")
        }

    alike = model("teacher", "teacher", 4, 1.0, 3.0), model("few-step", "few-step", 4, 1.0, 4.0)
    guided = model("teacher", "teacher", 4, 1.5, 3.0), alike[1]
    longer = model("teacher", "teacher", 28, 1.0, 3.0), alike[1]
    assert columns(*alike) == {} and columns(*guided) == {"guidance": ["1.5", "none"]}
    assert columns(*longer) == {"steps": ["28", "4"]}
    assert columns(*MODELS) == {
        "steps": ["28", "28", "28", "4", "4", "4"],
        "guidance": ["1.5", "1.5", "1.5", "1.5", "none", "none"],
    }
    classless = {**guided[0], "forwards_per_image": 4}  # a guidance that is asked for, of a net that knows no class
    assert columns(classless, alike[1]) == {}


def test_widths_of_text_to_image():
    shares = {"style_agreement": {"stroke": 0.8, "width": 0.6}, "held_out": {"class_agreement": 0.7}}
    many = model("tiny", "subnet", 20, 2.5, 5.0, class_agreement=1.0, **shares)
    ours = model("tiny", "few-step", 4, 1.0, 5.5, class_agreement=0.94, **shares)
    assert prompt_agreement(many) == pytest.approx(0.8)
    few = model(
        "tiny", "few-step", 4, 2.5, 6.5, class_agreement=0.94, **shares, seconds_per_image={"torch-fp32": 0.006}
    )
    row = {"name": "tiny", "many": many, "few": {**few, "solver": "Euler"}, "few_step": ours}
    fall = 1 - prompt_agreement(ours) / prompt_agreement(many)
    header, rows = few_step_widths_table([{**row, "relative_fall": {"few": fall, "few_step": fall}}])
    assert [r[0] for r in rows] == ["tiny, many steps", "tiny, Euler", "tiny, few-step"]
    assert [r[header.index("ms an image")] for r in rows] == ["≈ 22", "6", "4"]  # 2 ms beside 4 or 8 forwards of ½ ms
    unclear = few_step_widths_table([{**row, "few": {**row["few"], "seconds_per_image": {"torch-fp32": 0.004}}}])[1]
    assert unclear[0][header.index("ms an image")] == "–"
    assert rows[2][-1] == "2.5%" and rows[0][-1] == "–" and len(rows[0]) == len(header)
    assert few_step_widths_table([]) == ([], [])


def test_widths_of_another_net_stand_beside_themselves(tmp_path):
    """Many steps of what was distilled, where that is not the run's own supernet."""
    no_labels = {"class_agreement": None}
    own = [model(name, "subnet", 20, 2.5, 5.0, parameters=c, **no_labels) for name, c in (("tiny", 10), ("full", 30))]
    judged = tmp_path / "evaluate-few-step"
    judged.mkdir()
    (judged / "stage.json").touch()

    def write(name: str, stage: str, steps: int, distance: float, **more) -> None:
        entry = {
            **model(name, stage, steps, 2.5, distance, **no_labels),
            "num_samples": 16,
            "flops": 1.0,
            "latency_ms": {},
            **more,
        }
        (judged / f"{name}.json").write_text(json.dumps(entry))

    for name, count in (("tiny", 10), ("full", 30)):
        write(name, "few-step", 4, 4.0, parameters=count)
        write(f"{name}-few-steps", "subnet-few-steps", 4, 6.0, parameters=count, solver="Euler")
    assert [width["many"] for width in few_step_widths(tmp_path, own)] == own
    shutil.copy(judged / "full.json", judged / "wide.json")
    shutil.copy(judged / "full-few-steps.json", judged / "wide-few-steps.json")
    write("wide-many-steps", "few-step-source", 20, 3.0, parameters=40)
    write("tiny-many-steps", "few-step-source", 20, 3.5, parameters=10)
    found = few_step_widths(tmp_path, own)
    assert [(width["name"], width["many"]["metrics"][METRIC]) for width in found] == [("tiny", 3.5), ("wide", 3.0)]
    assert few_step_widths_table(found)[1][0][:2] == ["tiny, many steps", "20"]
