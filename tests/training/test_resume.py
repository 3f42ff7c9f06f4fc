"""A recipe killed with SIGKILL at a random moment and run again ends with the same bytes as one that was left alone."""

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from edgedit_hf.run.stage import EDGEDIT, EXPORT, FEW_STEP, LATENCY, QUANTIZE, SEARCH, SELF_DISTIL, TUNE

# By script: the folder whose run.json says that a stage has begun, the folders that it reads, and the files that must
# come out equal. A measured table of latencies never does.
SUFFIXES = {SEARCH: (".json",), EXPORT: (".onnx",)}
READ = {FEW_STEP: [TUNE.folder]}  # what the script opens itself
STAGES = {
    Path(stage.script).stem: (
        stage.folder,
        list(dict.fromkeys([*(Path(at).parts[0] for _, at in stage.inputs if at), *READ.get(stage, [])])),
        SUFFIXES.get(stage, (".safetensors",)),
    )
    for stage in EDGEDIT
    if stage not in (LATENCY, QUANTIZE, SELF_DISTIL)  # test_quantize has kills of its own
}


@pytest.fixture(scope="module")
def whole_run(recipes, tmp_path_factory):
    """Every stage once, left alone, with its seconds; the killed runs start from copies of what came before."""
    folder, seconds = tmp_path_factory.mktemp("whole") / "run", {}

    def upto(name: str):
        for stage in STAGES:
            if stage not in seconds:
                if stage == "search_architecture":
                    recipes.run("measure_latency", folder)
                result = recipes.run(stage, folder)
                assert "Traceback" not in result.stderr
                seconds[stage] = json.loads((folder / STAGES[stage][0] / "stage.json").read_text())["seconds"]
            if stage == name:
                return folder, seconds[stage]

    return upto


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.parametrize("name", STAGES)
def test_killed_and_rerun_equals_uninterrupted(recipes, whole_run, result_files, tmp_path, name):
    whole, seconds = whole_run(name)
    stage, needs, suffixes = STAGES[name]
    killed = tmp_path / "run"
    for need in needs:
        if (whole / need).exists():
            shutil.copytree(whole / need, killed / need)
    if name in ("search_architecture",) and (whole / "extractor").exists():
        shutil.copytree(whole / "extractor", killed / "extractor")
    delays = recipes.run_with_kills(name, killed, killed / stage / "run.json", seconds, kills=2)
    expected = comparable(result_files(whole / stage, *suffixes))
    found = comparable(result_files(killed / stage, *suffixes))
    assert expected, f"{stage} wrote nothing that could be compared"
    assert sorted(found) == sorted(expected), f"killed after {delays} s"
    different = [file for file in expected if found[file] != expected[file]]
    assert not different, f"killed after {delays} s: {different} differ"


def comparable(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what holds times, paths or run arguments rather than results."""
    left_out = ("run.json", "stage.json", "verify.json", "bench.json", "model_index.json", "latency.json")
    return {name: content for name, content in files.items() if not name.endswith(left_out)}


@pytest.mark.slow
@pytest.mark.kills
def test_a_killed_latency_stage_finds_its_networks_again(recipes, tmp_path):
    """Killed once all parts are lowered: run again it makes none of them anew, and leaves none behind."""
    recipes.run("train_teacher", tmp_path, *recipes.tiny)
    options = (*recipes.tiny, "latency.repeats=200")
    networks = tmp_path / "latency" / "checkpoints" / "networks"

    def made() -> dict[str, int]:
        found = {}
        for path in networks.glob("*/*.onnx.data"):
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = path.stat().st_mtime_ns
        return found

    process = recipes.start("measure_latency", tmp_path, *options)
    while process.poll() is None and not [*networks.glob("*/unembed.onnx")]:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before, seen = made(), set()
    assert len(before) >= 6 and not (tmp_path / "latency" / "stage.json").exists()
    process = recipes.start("measure_latency", tmp_path, *options)
    while process.poll() is None:
        seen |= set(made().items())
        time.sleep(0.01)
    assert process.returncode == 0, process.stdout.read()
    assert seen == set(before.items()) and not networks.exists()
    table = json.loads((tmp_path / "latency" / "table.json").read_text())
    assert table["protocol"]["rounds"] >= 200 and len(table["prediction"]["networks"]) == 14


@pytest.mark.slow
@pytest.mark.kills
def test_ctrl_c_saves_and_the_rerun_continues(recipes, whole_run, result_files, tmp_path):
    whole, _ = whole_run("train_teacher")
    folder = tmp_path / "run"
    telemetry = folder / "teacher" / "telemetry.jsonl"
    if recipes.interrupted("train_teacher", folder, telemetry):
        assert list((folder / "teacher" / "checkpoints").glob("step-*"))
    recipes.run("train_teacher", folder)
    assert result_files(folder / "teacher" / "transformer", ".safetensors") == result_files(
        whole / "teacher" / "transformer", ".safetensors"
    )
    steps = [json.loads(line)["step"] for line in telemetry.read_text().splitlines()]
    assert steps == sorted(set(steps)), "telemetry has a step twice or out of order"


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["train_teacher", "distill_proxies", "finetune", "export_student", "evaluate_models"])
def test_a_signal_at_any_point_of_a_stage_ends_in_the_same_weights(
    recipes, whole_run, result_files, tmp_path, name, share, number
):
    whole, seconds = whole_run(name)
    stage, needs, suffixes = STAGES[name]
    folder = tmp_path / "run"
    for need in needs:
        if (whole / need).exists():
            shutil.copytree(whole / need, folder / need)
    process = recipes.start(name, folder)
    deadline = time.monotonic() + 120
    while not (folder / stage / "run.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(share * seconds)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    # Once the stage is done and Python on its way out, a signal does what it does by default: shells call that 130 and
    # 143 too.
    codes = {0, {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number]}
    codes |= {-number} if (folder / stage / "stage.json").exists() else set()
    assert process.returncode in codes, output
    assert "Traceback" not in output
    if number != signal.SIGKILL:
        assert not list(folder.rglob("run.lock"))
    recipes.run(name, folder)
    assert comparable(result_files(folder / stage, *suffixes)) == comparable(result_files(whole / stage, *suffixes))
    assert not list((folder / stage).rglob(".*.tmp-*")) and not list((folder / stage).rglob("run.lock"))
