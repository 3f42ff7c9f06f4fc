"""The table of models: figures that were not measured alike have columns of their own."""

from edgedit_hf.report.tables import comparison_table, judging_notes

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
    models = [model("teacher", 3.0, notes=[few]), model("student", 4.0, notes=[few, still]), model("mine", 5.0)]
    report = {"models": models[:2], "reference": {"notes": ["real images: 1 feature has no variance"]}}
    assert judging_notes(report) == [
        "real images: 1 feature has no variance",
        f"{few} (all models)",
        f"{still} (student, before tuning)",
    ]
    width = {"name": "tiny", "many": models[0], "few": models[1], "few_step": {**models[2], "name": "tiny"}}
    assert judging_notes({"models": models[:1], "few_step": {"widths": [width]}}) == [
        f"{few} (teacher, student, before tuning)",
        f"{still} (student, before tuning)",
    ]
    assert judging_notes({"models": models[2:]}) == []
