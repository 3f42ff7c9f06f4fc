"""`edgedit phone`: networks out, a latency table back, a student chosen by it."""

import contextlib
import http.client
import json
import shutil
import threading
import time

import pytest
from browser import Browser, needs_browser
from phone_servers import free_port
from phones import LAYER_MS, measure, said_by
from unsearched import write_unsearched

from edgedit_hf import Genotype
from edgedit_hf.commands.cli import main
from edgedit_hf.phone.bundle import Bundle
from edgedit_hf.phone.results import append_rows
from edgedit_hf.search.device_tables import DeviceTables
from edgedit_hf.search.latency_table import LatencyTable


@pytest.fixture(scope="module")
def run(make_transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_unsearched(folder, make_transformer())
    assert main(["phone", "pack", str(folder), str(folder / "phone" / "onnxruntime-int8"), "--precision", "int8"]) == 0
    return folder


def test_from_a_run_to_a_student_chosen_by_the_phone(run, tmp_path, capsys):
    bundle = Bundle.read(run / "phone" / "onnxruntime-int8")
    assert (bundle.precision, bundle.batch) == ("int8", 1)
    append_rows(tmp_path / "phone.csv", measure(bundle))
    arguments = ["phone", "import", str(tmp_path / "phone.csv"), str(run), "--device", "Galaxy S25 Ultra"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    table = LatencyTable.from_json(tmp_path / "table.json")
    assert f"onnxruntime-int8 on Galaxy S25 Ultra, hash {table.hash}" in said and "Kendall's τ 1.00" in said
    assert [table.blocks[shape] for shape in bundle.plan.shapes] == pytest.approx(LAYER_MS)
    assert main(arguments) == 0  # its own table may be written again
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.copy(tmp_path / "table.json", copy / "latency" / "table.json")
    whole = table.latency_ms(Genotype.of(json.loads((run / "teacher/transformer/config.json").read_text())))
    capsys.readouterr()
    assert main(["select", str(copy), "--max-latency-ms", repr(0.7 * whole)]) == 0  # though it is not this machine's
    choice = json.loads((copy / "student" / "choice.json").read_text())
    assert choice["teacher_latency_ms"] == pytest.approx(whole) and choice["predicted_latency_ms"] <= 0.7 * whole


@contextlib.contextmanager
def in_the_meantime(work):
    """Do something in a thread; what fails there fails here."""
    failed = []

    def attempt():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    yield
    thread.join()
    if failed:
        raise failed[0]


def address(run, port: int) -> str:
    """Of the page of `edgedit phone serve`, once it answers."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, StopIteration, http.client.HTTPException):
            token = next((run / "phone" / "results").glob("*/token")).read_text()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", f"/{token}/plan.json")
            with contextlib.closing(connection):
                if connection.getresponse().status == 200:
                    return f"http://127.0.0.1:{port}/{token}/"
        time.sleep(0.2)
    raise AssertionError("the server did not answer in time")


def served(run, port, *more) -> list[str]:
    return ["phone", "serve", str(run), "--batch", "16", "--port", str(port), *more]


@pytest.mark.slow
@pytest.mark.export
def test_serve_until_a_device_is_through(run, web_runtime, tmp_path, capsys):
    """A device of known times posts them: its table has them."""
    port = free_port()

    def device():
        url = address(run, port)
        bundle = Bundle.read(next((run / "phone").glob("web-fp32-*")))
        phone = said_by(bundle)
        true = {(row.network, row.phase): row.ms for row in measure(bundle)}
        rows = [{**row, "ms": true[row["network"], row["phase"]]} for row in phone.rows()]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        posts = [("hello", phone.hello)]
        posts += [("rows", phone.post(rows[start : start + 100])) for start in range(0, len(rows), 100)]
        for name, values in posts:
            connection.request("POST", f"/{url.split('/')[3]}/{name}", json.dumps(values))
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            last = json.loads(answer.read())
        assert last["count"] == last["total"] == len(rows) and "summary" in last

    table = tmp_path / "table.json"
    with in_the_meantime(device):
        assert main(served(run, port, "--device", "Galaxy S25 Ultra", "--output", str(table))) == 0
    said = capsys.readouterr().out
    found = LatencyTable.from_json(table)
    assert "web-fp32 on Galaxy S25 Ultra" in said and "Kendall's τ 1.00" in said
    assert list(found.blocks.values()) == pytest.approx(LAYER_MS) and found.to_dict()["protocol"]["backend"] == "wasm"


@pytest.mark.browser
@needs_browser
@pytest.mark.slow
def test_serve_a_browser_that_measures(run, web_runtime, tmp_path, capsys):
    """From a run to a latency table in a real browser; the phone of the test before has its results still."""
    port = free_port()

    def device():
        url = address(run, port)
        with Browser() as page:
            page.phone()
            page.open(url)
            page.wait("document.body.dataset.state === 'ready'")
            page.tap("#measure")
            page.wait("['done', 'error'].includes(document.body.dataset.state)", 240)
            assert page.run("document.body.dataset.state") == "done", page.run("document.body.innerText")

    with in_the_meantime(device):
        assert main(served(run, port, "--device", "Chromium")) == 0
    said = capsys.readouterr().out
    (results,) = [file for file in run.glob("phone/results/*/*/table.json")]
    table = LatencyTable.from_json(results)
    assert f"web-fp32 on Chromium, hash {table.hash}" in said and table.device == "Chromium"
    config = json.loads((run / "teacher/transformer/config.json").read_text())
    measured = table.to_dict()["protocol"]["networks"]["teacher"]["median_ms"]
    # Its scale alone: rounds of a network of milliseconds scatter by more than half where others compute as well.
    assert measured / 4 < table.latency_ms(Genotype.of(config)) < 4 * measured
    assert table.to_dict()["protocol"]["rounds"] == 20 and table.to_dict()["batch"] == 16


def test_select_by_two_phones(run, tmp_path, capsys):
    bundle = Bundle.read(run / "phone" / "onnxruntime-int8")
    tables = []
    for name, layer in (("one", LAYER_MS), ("two", (30.0, 14.0, 29.0, 13.0))):
        append_rows(tmp_path / f"{name}.csv", measure(bundle, layer=layer))
        arguments = [
            str(tmp_path / f"{name}.csv"),
            str(run),
            "--device",
            name,
            "--output",
            str(tmp_path / f"{name}.json"),
        ]
        assert main(["phone", "import", *arguments]) == 0
        tables.append(LatencyTable.from_json(tmp_path / f"{name}.json"))
    copy = shutil.copytree(run, tmp_path / "copy")
    DeviceTables(tables).to_json(copy / "latency" / "table.json")
    capsys.readouterr()
    assert main(["select", str(copy), "--max-latency-ms", "110", "--k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["caps"] == {"latency_ms[one]": 110.0, "latency_ms[two]": 110.0}
    assert all(max(row["latency_ms[one]"], row["latency_ms[two]"]) <= 110 for row in found["rows"])
    assert main(["bank", str(copy)]) == 0  # times of the first


def test_what_is_refused(run, tmp_path, capsys):
    append_rows(tmp_path / "phone.csv", measure(Bundle.read(run / "phone" / "onnxruntime-int8")))
    (tmp_path / "mine.txt").write_text("precious")
    base = ["phone", "import", str(tmp_path / "phone.csv"), str(run), "--device", "a phone"]
    for arguments, said in (
        (["--output", str(tmp_path / "mine.txt")], "exists and is no latency table; it is left as it is"),
        (["--output", str(tmp_path / "phone.csv")], "is a folder, or the results themselves"),
        (["--output", str(tmp_path)], "is a folder, or the results themselves"),
    ):
        assert main([*base, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert main(["phone", "pack", str(run), str(run / "phone" / "onnxruntime-int8")]) == 2
    assert "is there already and is left as it is" in capsys.readouterr().err
    serve = ["phone", "serve", str(run)]
    for arguments, said in (
        (["--port", "0"], "--port is 0; give a whole number from 1 to 65535"),
        (["--port", "65536"], "--port is 65536; give"),
        (["--batch", "0"], "--batch is 0"),
        (["--output", str(tmp_path / "t.json")], "no --device says whose table it is"),
        (["--device", "a", "--output", str(tmp_path / "mine.txt")], "is no latency table; it is left as it is"),
        (["--keyfile", "key.pem"], "--keyfile is key.pem, but there is no --certfile"),
        (["--certfile", str(tmp_path / "mine.txt")], "mine.txt gives no certificate"),
        (["--precision", "int4"], "invalid choice"),
    ):
        assert main([*serve, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["phone", "pack", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is written by stage bank" in capsys.readouterr().err and not (tmp_path / "out").exists()
