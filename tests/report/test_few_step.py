"""The table from many steps to few, and what it says in one number: from results that are made up."""

import pytest

from edgedit_hf.report.few_step import few_step_ratios, few_step_table, few_step_widths_table, prompt_agreement

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
    assert found["forwards"] == 14 and found["speedup"] == pytest.approx(7)
    assert found["won_back"] == pytest.approx((8.0 - 4.0) / (8.0 - 3.5)) and found["distance"] == pytest.approx(4 / 3.5)
    assert found["recall"] == pytest.approx(-0.02) and found["class_agreement"] == 0
    assert few_step_ratios(MODELS[:3]) == {}


def test_widths_of_text_to_image():
    shares = {"style_agreement": {"stroke": 0.8, "width": 0.6}, "held_out": {"class_agreement": 0.7}}
    many = model("tiny", "subnet", 20, 2.5, 5.0, class_agreement=1.0, **shares)
    ours = model("tiny", "few-step", 4, 1.0, 5.5, class_agreement=0.94, **shares)
    assert prompt_agreement(many) == pytest.approx(0.8)
    row = {"name": "tiny", "many": many, "few": {**ours, "solver": "Euler"}, "few_step": ours}
    fall = 1 - prompt_agreement(ours) / prompt_agreement(many)
    header, rows = few_step_widths_table([{**row, "relative_fall": {"few": fall, "few_step": fall}}])
    assert [r[0] for r in rows] == ["tiny, many steps", "tiny, Euler", "tiny, few-step"]
    assert [r[header.index("ms an image")] for r in rows] == ["≈ 20", "4", "4"]
    assert rows[2][-1] == "2.5%" and rows[0][-1] == "–" and len(rows[0]) == len(header)
    assert few_step_widths_table([]) == ([], [])
