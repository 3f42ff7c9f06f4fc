"""A pack: its scripts, against stand-ins that print what the real binaries print, give rows that make a true table."""

import json
import os
import re
import shutil
import subprocess

import pytest
from phones import LAYER_MS, TRUNK_MS, true_ms
from standins import write_standins

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.phone.bundle import Bundle
from edgedit_hf.phone.pack import readme, script_of, write_pack
from edgedit_hf.phone.results import COLUMNS, read_rows
from edgedit_hf.phone.table import import_table

SLOW = (pytest.mark.slow, pytest.mark.export)
BINARIES = {"onnxruntime": "onnxruntime_perf_test", "executorch": "executor_runner"}


@pytest.fixture
def pack(bundle_copy):
    """The bundle with the script of a runtime; of another than its own the networks only have its names."""

    def make(runtime: str) -> Bundle:
        data = json.loads((bundle_copy / "bundle.json").read_text())
        del data["hash"]
        if runtime != data["runtime"]:
            data["runtime"] = runtime
            for entry in data["networks"]:
                place = entry["file"].replace(".onnx", ".pte")
                shutil.move(bundle_copy / entry["file"], bundle_copy / place)
                entry["file"], entry["files"] = place, [place]
        found = Bundle(bundle_copy, data)
        (bundle_copy / "bundle.json").write_text(json.dumps({**data, "hash": found.hash}))
        script = bundle_copy / "adb.sh"
        script.write_text(script_of(found))
        script.chmod(0o755)
        return Bundle.read(bundle_copy)

    return make


@pytest.fixture
def measure(tmp_path):
    """Run a pack's script with stand-ins on PATH."""

    def run(bundle: Bundle, **environment: str) -> subprocess.CompletedProcess:
        standins, phone = tmp_path / "bin", tmp_path / "phone"
        if not standins.is_dir():
            times = {g.hash: true_ms(bundle, g) for g in bundle.plan.check}
            costs = dict(zip(bundle.plan.shapes, LAYER_MS, strict=True))
            times |= {key: TRUNK_MS + sum(costs[shape] for shape in key) for key in bundle.plan.fitted}
            write_standins(standins, phone, {name: times[key] for name, key in bundle.networks.items()})
        settings = {"BIN": str(standins / BINARIES[bundle.runtime]), "VERSION": "9.8.7", "THREADS": "3", **environment}
        path = f"{standins}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["sh", str(bundle.folder / "adb.sh")],
            env={"PATH": path, "PHONE": str(phone), **settings},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize(
    ("runtime", "platform"), [("onnxruntime", ""), ("executorch", "android"), ("executorch", "posix")]
)
def test_a_pack_measures_what_the_binary_says(runtime, platform, pack, measure):
    bundle = pack(runtime)
    ended = measure(bundle, **({"PLATFORM": platform} if platform else {}))
    assert ended.returncode == 0, ended.stderr
    rows = read_rows(bundle.folder / "results.csv")
    assert len(rows) == len(bundle.networks) * 5 * (1 + 3 + 4)
    first = rows[0]
    assert (first.device, first.threads, first.version, first.battery) == ("SM-S938B", 3, "9.8.7", 0.8)
    assert first.temperature == 31.5 and first.backend == {"onnxruntime": "cpu", "executorch": "xnnpack"}[runtime]
    table = import_table(bundle.folder / "results.csv", bundle.folder, "Galaxy S25 Ultra")
    assert table.runtime == runtime and table.trunk_ms == pytest.approx(TRUNK_MS, rel=1e-3)
    assert [table.blocks[shape] for shape in bundle.plan.shapes] == pytest.approx(LAYER_MS, rel=1e-4)
    protocol = table.to_dict()["protocol"]
    assert (protocol["rounds"], protocol["cold_loads"], protocol["warmups"]) == (20, 5, 15)
    teacher = protocol["networks"]["teacher"]
    assert teacher["cold_ms"] == pytest.approx(3 * teacher["median_ms"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.export
def test_rounds_take_out_a_slow_down(pack, measure):
    """Every process is slower than the one before: the table's ratios hold, and the drift is said."""
    bundle = pack("onnxruntime")
    assert measure(bundle, SLOWER="0.001").returncode == 0
    table = import_table(bundle.folder / "results.csv", bundle.folder, "a phone")
    whole, student = (table.latency_ms(g) for g in (bundle.plan.space.ends()[0], bundle.plan.check[-1]))
    wanted = true_ms(bundle, bundle.plan.check[-1]) / true_ms(bundle, bundle.plan.space.ends()[0])
    assert student / whole == pytest.approx(wanted, rel=0.03)
    assert table.to_dict()["protocol"]["throttled"] is True


@pytest.mark.parametrize("runtime", [pytest.param("executorch", marks=SLOW), "onnxruntime"])
def test_a_measurement_that_breaks_goes_on(runtime, pack, measure):
    bundle = pack(runtime)
    count = len(bundle.networks)
    broken = measure(bundle, BREAKS_AT=str(count + 3))
    assert broken.returncode != 0 and re.search(rf"adb.sh: {BINARIES[runtime]} failed with ", broken.stderr)
    kept = (bundle.folder / "results.csv").read_text()
    with pytest.raises(EdgeDiTError, match="the protocol asks for"):
        import_table(bundle.folder / "results.csv", bundle.folder, "a phone")
    again = measure(bundle)
    assert again.returncode == 0 and again.stdout.count("round ") == 5 * count - (count + 2)
    assert (bundle.folder / "results.csv").read_text().startswith(kept)
    assert import_table(bundle.folder / "results.csv", bundle.folder, "a phone").trunk_ms == pytest.approx(
        TRUNK_MS, rel=1e-3
    )
    assert measure(bundle).stdout.count("round ") == 0  # nothing is left to do


def test_what_goes_wrong_is_said(pack, measure, tmp_path):
    bundle = pack("onnxruntime")
    short = measure(bundle, SHORT="2")
    assert short.returncode != 0 and re.search(r"gave +5 times of fitted-00 for 7 runs", short.stderr)
    assert read_rows(bundle.folder / "results.csv") == []
    for environment, said in (
        ({"BIN": ""}, "say where the binary is"),
        ({"BIN": "/nowhere"}, "there is no binary /nowhere"),
        ({"VERSION": ""}, "say which version"),
        ({"SERIAL": "emulator-1"}, "no phone answers"),
        ({"PHONE": str(tmp_path / "none")}, "no phone answers"),
    ):
        ended = measure(bundle, **environment)
        assert ended.returncode != 0 and said in ended.stderr, ended
    (bundle.folder / "results.csv").write_text(",".join(COLUMNS) + "\nffffffff,teacher,cold,0\n")
    assert "holds another bundle's rows" in measure(bundle).stderr
    (bundle.folder / "results.csv").write_text("mine\n")
    assert "is no file of this script" in measure(bundle).stderr


@pytest.mark.slow
@pytest.mark.export
def test_what_a_pack_holds(subject, tmp_path):
    bundle = write_pack(tmp_path / "out", subject, runtime="onnxruntime", precision="int8", batch=1)
    assert (bundle.runtime, bundle.precision, bundle.batch) == ("onnxruntime", "int8", 1)
    bundle.check_files()
    assert os.access(tmp_path / "out" / "adb.sh", os.X_OK)
    text = (tmp_path / "out" / "README.md").read_text()
    assert bundle.hash in text and not re.search(r"@[A-Z]+@", text) and "| not run |" in text
    assert not re.search(r"@[A-Z]+@", (tmp_path / "out" / "adb.sh").read_text())
    for path, said in (("out", "is there already"), ("", "no name of a folder")):
        with pytest.raises(EdgeDiTError, match=said):
            write_pack(tmp_path / path if path else "", subject, runtime="onnxruntime")
    with pytest.raises(EdgeDiTError, match="A pack for 'web' is asked for.*phone serve"):
        write_pack(tmp_path / "web", subject, runtime="web")
    assert not (tmp_path / "web").exists()


def test_the_swift_file_and_the_readmes_are_filled_in(bundle):
    data = {**bundle.data, "runtime": "coreml", "precision": "fp16"}
    found = Bundle(bundle.folder, data)
    swift = script_of(found)
    assert f'let bundle = "{found.hash}"' in swift and '"teacher"' in swift and ",".join(COLUMNS) in swift
    assert '("class_labels", [2], "int64", "2-class_labels.bin")' in swift
    assert not re.search(r"@[A-Z]+@", swift)
    for runtime in ("onnxruntime", "executorch", "coreml"):
        text = readme(Bundle(bundle.folder, {**bundle.data, "runtime": runtime}))
        assert not re.search(r"@[A-Z]+@", text) and "not run" in text and "edgedit phone import results.csv" in text
