"""What the page of a report draws of the telemetry."""

import json

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report.telemetry import METRICS, POINTS, SPEED, TIME, telemetry
from edgedit_hf.run.stage import EDGEDIT


def write(run, folder: str, *lines: dict) -> None:
    (run / folder).mkdir(exist_ok=True)
    (run / folder / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_number_is_a_series_and_time_and_speed_are_too(tmp_path):
    write(
        *(tmp_path, "student-tuned", {"step": 0, "seconds": 0.0, "changed": {"learning_rate": 0.1}}),
        {"step": 10, "seconds": 2.0, "loss": 0.5, "note": "slow", "flag": True},
        {"step": 30, "seconds": 4.0, "loss": 0.25, "distance": 3.0, "hash": "ab"},
        {"step": 40, "seconds": 4.0, "loss": float("nan"), "large": 10**400},
    )
    write(tmp_path, "teacher", {"step": 1, "loss": 2.0})
    write(tmp_path, "bank", {"step": 1, "seconds": 3.0, "note": "nothing was measured"})
    teacher, tuned = telemetry(tmp_path, EDGEDIT)
    assert teacher == {
        "name": "teacher",
        "label": "train the network that is compressed",
        "series": {"loss": [[1], [2.0]]},
    }
    assert tuned["series"] == {
        "loss": [[10, 30], [0.5, 0.25]],
        "distance": [[30], [3.0]],
        TIME: [[0, 10, 30, 40], [0.0, 2.0, 4.0, 4.0]],
        SPEED: [[10, 30], [5.0, 10.0]],
    }
    assert telemetry(tmp_path / "nothing", EDGEDIT) == []


def test_long_telemetry_is_bounded_and_keeps_its_mean(tmp_path):
    lines = [{"step": step, "loss": float(step % 7)} for step in range(1, 10_001)]
    lines[0] |= {f"metric {number}": 1.0 for number in range(100)}
    write(tmp_path, "teacher", *lines)
    (stage,) = telemetry(tmp_path, EDGEDIT)
    steps, values = stage["series"]["loss"]
    assert len(steps) == len(values) == POINTS and steps[-1] == 10_000 and len(stage["series"]) < METRICS
    assert values[3] == pytest.approx(sum(line["loss"] for line in lines[150:200]) / 50, rel=1e-4) and steps[3] == 200


def test_a_damaged_line_names_its_stage_and_a_cut_one_is_left_out(tmp_path):
    write(tmp_path, "teacher", {"step": 1, "loss": 2.0})
    path = tmp_path / "teacher" / "telemetry.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert telemetry(tmp_path, EDGEDIT)[0]["series"] == {"loss": [[1], [2.0]]}
    path.write_text('{"step": "one"}\n')
    with pytest.raises(EdgeDiTError, match="telemetry.jsonl.*step.*'one'.*"):
        telemetry(tmp_path, EDGEDIT)
