"""The table of models: figures that were not measured alike have columns of their own."""

from edgedit_hf.report.tables import comparison_table, judging_lines, plus_minus

STAMP = {
    "extractor": "digits-cnn",
    "extractor_hash": "0123456789abcdef",
    "reference": "f" * 64,
    "reference_count": 1438,
    "count": 2000,
    "rounding": "none",
    "seed": 0,
    "steps": 20,
}


def model(name: str, distance: float, **more) -> dict:
    figures = {"metrics": {"fid[digits-cnn,n=2000]": distance}, "precision": 0.5, "recall": distance / 10}
    return {
        "name": name,
        "parameters": 1,
        "flops": 1.0,
        "latency_ms": {},
        "steps": 4,
        "guidance_scale": 1.0,
        **figures,
    } | more


def columns(*models: dict) -> dict[str, list[str]]:
    header, rows = comparison_table(models)
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def test_one_protocol_has_one_column():
    found = columns(model("teacher", 3.0, stamp=STAMP), model("student", 4.0, stamp={**STAMP, "seed": 1, "steps": 4}))
    assert found["Fréchet distance (digits-cnn, n=2,000)"] == ["3", "4"] and found["precision"] == ["0.500"] * 2
    without = columns(model("teacher", 3.0), model("student", 4.0))
    assert found.keys() == without.keys()


def test_two_protocols_have_two_columns_that_say_what_differs():
    found = columns(
        model("teacher", 3.0, stamp=STAMP),
        model("student", 4.0, stamp={**STAMP, "reference": "e" * 64, "rounding": "bytes"}),
    )
    assert {name: values for name, values in found.items() if "ance" in name} == {
        "Fréchet distance (digits-cnn, n=2,000), reference ffffffffffff; rounding none": ["3", "–"],
        "Fréchet distance (digits-cnn, n=2,000), reference eeeeeeeeeeee; rounding bytes": ["–", "4"],
    }
    assert found["recall, reference eeeeeeeeeeee; rounding bytes"] == ["–", "0.400"]
    assert "precision" not in found and "recall" not in found


def test_a_result_without_a_stamp_stands_apart_from_one_that_has_it():
    found = columns(model("teacher", 3.0, stamp=STAMP), model("student", 4.0))
    assert found["Fréchet distance (digits-cnn, n=2,000), stamped"] == ["3", "–"]
    assert found["Fréchet distance (digits-cnn, n=2,000), without a stamp"] == ["–", "4"]


def test_a_distance_stands_with_its_standard_error_where_that_is_known():
    found = columns(model("teacher", 3.0, standard_errors={"fid[digits-cnn,n=2000]": 0.1234}), model("student", 4.0))
    assert found["Fréchet distance (digits-cnn, n=2,000)"] == ["3 ± 0.12", "4"]


def test_notes_are_said_once_with_the_models_that_they_hold_for():
    few, still = "12 images are too few", "3 of 64 features have no variance"
    models = [model("teacher", 3.0, notes=[few]), model("student", 4.0, notes=[few, still])]
    report = {"models": models, "reference": {"notes": ["real images: 1 feature has no variance"]}}
    said = ["real images: 1 feature has no variance", f"{few} (all models)", f"{still} (student, before tuning)"]
    assert judging_lines(report) == said
    assert judging_lines(report, "mine") == [f"mine: {line}" for line in said]
    assert judging_lines({"models": [model("teacher", 3.0)]}) == []


def test_widths_of_few_steps_have_the_names_of_their_rows():
    """The distilled width is called as the width itself; many steps are a model of the run, or of another net."""
    few, still = "12 images are too few", "3 of 64 features have no variance"
    tiny = model("tiny", 3.0, notes=[few])
    width = {
        "name": "tiny",
        "many": tiny,
        "few": model("tiny-few-steps", 5.0, notes=[few], solver="unipc"),
        "few_step": model("tiny", 4.0, notes=[few, still], standard_errors={"fid[digits-cnn,n=2000]": 0.5}),
    }
    report = {"models": [tiny], "few_step": {"widths": [width]}}
    assert judging_lines(report) == [f"{few} (all models)", f"{still} (tiny, few-step)"]
    other = {**width, "many": model("tiny-many-steps", 6.0, notes=[still])}
    assert judging_lines({**report, "few_step": {"widths": [other]}}) == [
        f"{few} (tiny; tiny, unipc; tiny, few-step)",
        f"{still} (tiny, many steps; tiny, few-step)",
    ]
    (said,) = plus_minus(report)
    assert said.startswith("± is a distance's standard error") and plus_minus({"models": [tiny]}) == []
