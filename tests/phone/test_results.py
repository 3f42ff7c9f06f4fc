"""What a device measured: every row is held to the schema, nothing is lost, and figures are those of numpy."""

import dataclasses
import os
import re

import numpy as np
import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.phone.results import (
    COLUMNS,
    Row,
    append_rows,
    drift_of,
    progress,
    read_rows,
    row_of,
    summarise,
)

GOOD = {
    "bundle": "0123456789abcdef",
    "network": "teacher",
    "phase": "timed",
    "round": 0,
    "ms": 12.5,
    "device": "Pixel 9",
    "browser": "",
    "backend": "wasm",
    "threads": 4,
    "version": "1.30.0",
    "battery": None,
    "temperature": None,
    "time": "2026-01-31T10:00:00.123Z",
}


def rows_of(samples, cold=(50.0, 70.0, 60.0), **changes) -> list[Row]:
    """A whole measurement: timed samples by network."""
    rows = []
    for name, values in samples.items():
        for phase, all_ms in (("cold", cold), ("warm", (40.0, 30.0, 20.0)), ("timed", values)):
            for number, ms in enumerate(all_ms):
                rows.append(Row(**{**GOOD, "network": name, "phase": phase, "round": number, "ms": ms, **changes}))
    return rows


def test_a_row_is_every_column_and_no_other():
    assert row_of(GOOD, "it") == Row(**GOOD) and tuple(GOOD) == COLUMNS
    assert row_of({**GOOD, "ms": 12, "battery": 1}, "it").battery == 1.0  # JSON's numbers have no kinds
    for name in COLUMNS:
        if name not in ("browser", "battery", "temperature"):  # these need not be told
            with pytest.raises(EdgeDiTError, match=f"post 3: {name} is missing"):
                row_of({key: value for key, value in GOOD.items() if key != name}, "post 3")
    with pytest.raises(EdgeDiTError, match="post 3: unknown key 'admin'; the keys are bundle, network"):
        row_of({**GOOD, "admin": 1}, "post 3")
    with pytest.raises(EdgeDiTError, match=r"post 3: it is \[1\]; it must hold keys"):
        row_of([1], "post 3")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ms", float("nan"), "ms is nan; it must be a finite number"),
        ("ms", float("inf"), "ms is inf"),
        ("ms", -1.0, "ms is -1.0; it must be above 0"),
        ("ms", 0, "ms is 0"),
        ("ms", "12", "ms is '12' .str.; it must be float"),
        ("ms", True, "ms is True"),
        ("round", 1.5, "round is 1.5"),
        ("round", -1, "round is -1; it must be at least 0"),
        ("phase", "hot", "phase is 'hot'; it must be one of cold, warm, timed"),
        ("threads", 0, "threads is 0"),
        ("battery", 80, "battery is 80.*at most 1"),
        ("device", "", "device is ''; it must not be empty"),
        ("device", "x" * 301, "it may have at most 300"),
        ("device", "a\nb", "holds the character"),
        ("time", "yesterday, at noon or so", "time is 'yesterday, at noon or so'; it must be UTC as in 2000"),
        ("time", "2026-01-31T10:00:00+01:00", "it must be UTC"),
        ("network", None, "network is None"),
    ],
)
def test_a_value_that_is_none(name, value, said):
    with pytest.raises(EdgeDiTError, match=said):
        row_of({**GOOD, name: value}, "it")


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "of" / "phone.csv"
    rows = [
        Row(**GOOD),
        Row(**{**GOOD, "round": 1, "ms": 0.1 + 0.2, "device": 'Mozilla/5.0 (Linux; "K"), like', "battery": 0.75}),
        Row(**{**GOOD, "round": 2, "temperature": -3.25, "browser": "Chrome 140, mobile"}),
    ]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert read_rows(path) == rows
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 4
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as Windows saves it
    assert read_rows(path) == rows


def test_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "phone.csv"
    append_rows(path, [Row(**GOOD), Row(**{**GOOD, "round": 1})])
    os.truncate(path, path.stat().st_size - 5)
    assert [row.round for row in read_rows(path)] == [0]
    append_rows(path, [Row(**{**GOOD, "round": 2})])  # nothing is glued to the rest
    assert [row.round for row in read_rows(path)] == [0, 2]
    path.write_text("bundle,net")  # killed in its header
    append_rows(path, [Row(**GOOD)])
    assert read_rows(path) == [Row(**GOOD)]


def test_files_that_are_none(tmp_path):
    path = tmp_path / "phone.csv"
    with pytest.raises(EdgeDiTError, match="phone.csv cannot be read"):
        read_rows(path)
    path.write_bytes(b"\xff\xfe\x00rubbish\n")
    with pytest.raises(EdgeDiTError, match="cannot be read"):
        read_rows(path)
    header, line = ",".join(COLUMNS), ",".join("" if v is None else str(v) for v in GOOD.values())
    for text, said in (
        ("", r"its first line is ''; it lacks bundle, network"),
        (header.replace(",ms", "") + "\n", "it lacks ms"),
        (header + ",more\n", r"it names \['more'\] too much"),
        (header.replace(",", ";") + "\n", "it lacks bundle"),
        (f"{header}\n{line},7\n", "line 2: it has 14 values, the first line 13"),
        (f"{header}\n{line}\n{line.replace('12.5', 'NaN')}\n", "line 3: ms is nan"),
        (f"{header}\n{line.replace('12.5', '1,5')}\n", "line 2: it has 14 values"),
        (f"{header}\n{line.replace('12.5', 'fast')}\n", "line 2: ms is 'fast'; it must be a number"),
        (f"{header}\n{line.replace(',4,', ',4.5,')}\n", "line 2: threads is '4.5'; it must be a whole number"),
        (f'{header}\n"{line}\n', "no CSV file"),
    ):
        path.write_text(text)
        with pytest.raises(EdgeDiTError, match=said):
            read_rows(path)


def test_the_figures_are_those_of_numpy():
    draw = np.random.default_rng(0)
    samples = {name: draw.lognormal(3, 0.1, 23) for name in ("teacher", "fitted-00")}
    found = summarise(rows_of(samples), GOOD["bundle"], list(samples))
    for name, values in samples.items():
        ours = found.networks[name]
        assert ours.median_ms == pytest.approx(np.median(values)) and ours.p90_ms == pytest.approx(
            np.percentile(values, 90)
        )
        assert ours.iqr_ms == pytest.approx(np.subtract(*np.percentile(values, [75, 25])))
        assert ours.cold_ms == 60 and ours.samples == pytest.approx(values)
    assert (found.rounds, found.cold_loads, found.warmups, found.unused) == (23, 3, 3, 0)
    assert found.setting["device"] == "Pixel 9" and found.battery is None and found.temperature is None


def test_a_device_that_throttles_is_flagged():
    steady = {"a": [10.0] * 20, "b": [20.0] * 20}
    assert summarise(rows_of(steady), GOOD["bundle"], ["a", "b"]).throttled is False
    slowing = {name: values[0] * np.linspace(1, 1.3, 20) for name, values in steady.items()}
    found = summarise(rows_of(slowing), GOOD["bundle"], ["a", "b"])
    first, last = np.median(np.linspace(1, 1.3, 20)[:4]), np.median(np.linspace(1, 1.3, 20)[-4:])
    assert found.drift == pytest.approx(last / first - 1) and found.throttled
    assert drift_of({"a": [2.0, 1.0], "b": [2.0, 1.0]}) == pytest.approx(-0.5)  # it got faster: no throttling


def test_what_the_device_tells_of_itself():
    rows = [
        dataclasses.replace(
            row, battery=1 - place / 1000, temperature=30 + place / 10, time=f"2026-01-31T10:{place:02}:00Z"
        )
        for place, row in enumerate(rows_of({"a": [10.0] * 20}))
    ]
    found = summarise(rows[::-1], GOOD["bundle"], ["a"])  # in whatever order they came
    assert found.battery == (1.0, pytest.approx(0.975)) and found.temperature == (30.0, pytest.approx(32.5))
    assert found.time == ("2026-01-31T10:00:00Z", "2026-01-31T10:25:00Z")


def test_rows_that_came_twice_count_once():
    rows = rows_of({"a": [10.0] * 20, "b": [20.0] * 20})
    assert summarise(rows + rows[5:9], GOOD["bundle"], ["a", "b"]).rounds == 20
    other = dataclasses.replace(rows[-1], ms=21.0)
    with pytest.raises(EdgeDiTError, match="the timed run 19 of b is there twice, with 20 and 21 ms"):
        summarise([*rows, other], GOOD["bundle"], ["a", "b"])
    assert progress(rows + rows)["b"] == {"cold": 3, "warm": 3, "timed": 20}


def test_rounds_that_not_all_networks_have_are_left_out():
    """Rounds are compared with each other: those of one network alone say nothing."""
    found = summarise(rows_of({"a": [10.0] * 21, "b": [20.0] * 20}), GOOD["bundle"], ["a", "b"])
    assert found.rounds == 20 and found.unused == 1
    rows = rows_of({"a": [10.0] * 20, "b": [20.0] * 20})
    rows = [dataclasses.replace(r, round=r.round + 1) if r.place == ("b", "timed", 19) else r for r in rows]
    with pytest.raises(EdgeDiTError, match="only 19 rounds are there of every network, the protocol asks for 20"):
        summarise(rows, GOOD["bundle"], ["a", "b"])


def test_what_is_no_whole_measurement():
    rows = rows_of({"a": [10.0] * 20, "b": [20.0] * 20})
    names = ["a", "b"]

    def without(phase, number):
        return [row for row in rows if (row.phase, row.round) != (phase, number)]

    for given, said in (
        ([], "there are no rows"),
        ([dataclasses.replace(row, bundle="ffffffffffffffff") for row in rows], "of the bundle 'ffff.*this is 0123"),
        (
            [*rows[:-1], dataclasses.replace(rows[-1], device="iPhone")],
            "different device are in it: 'Pixel 9' and 'iPhone'",
        ),
        ([*rows[:-1], dataclasses.replace(rows[-1], threads=8)], "different threads are in it: '4' and '8'"),
        ([*rows[:-1], dataclasses.replace(rows[-1], backend="webgpu")], "different backend"),
        ([*rows, dataclasses.replace(rows[-1], network="c")], "it names the network 'c', which the bundle"),
        ([row for row in rows if row.network == "a"], r"b has 0 cold runs, the protocol asks for 3 \(1 of 2 networks"),
        (without("cold", 2), r"a has 2 cold runs, the protocol asks for 3 \(2 of 2 networks have too few\)"),
        (without("warm", 0), "a has 2 warm runs"),
        (without("timed", 7), "a has 19 timed runs, the protocol asks for 20"),
    ):
        with pytest.raises(EdgeDiTError, match=said) as raised:
            summarise(given, GOOD["bundle"], names, "phone.csv")
        assert re.match("phone.csv: ", str(raised.value))
