"""The server of the measuring page: it gives what is on its list to who knows the token, and takes rows alone."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from node import needs_node
from phone_servers import TOKEN, free_port, process_of, server_of
from phones import said_by

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.web.runtime import FILES
from edgedit_hf.phone import serve as serving
from edgedit_hf.phone.results import read_rows
from edgedit_hf.phone.serve import address_of, advice, qr_lines, site_of, tls_of, token_of

PAGE = Path(serving.__file__).parent / "page"


@pytest.fixture
def no_runtime(tmp_path):
    """A folder with names of the runtime's files, for tests that run nothing."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(f"// {name}\n")
    return folder


@pytest.fixture
def server(small_bundle, no_runtime, tmp_path):
    with server_of(small_bundle, tmp_path, no_runtime) as server:
        yield server


def ask(server, path, method="GET", body=None, headers=None):
    """Status, headers and content of an answer; the path goes out as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection._encode_request = lambda text: text.encode("latin-1")
    connection.putrequest(method, path, skip_host=False, skip_accept_encoding=True)
    for name, value in {"Content-Length": str(len(body or b"")), **(headers or {})}.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    with contextlib.closing(connection):
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def post(server, name, values):
    status, _, text = ask(server, f"/{TOKEN}/{name}", "POST", json.dumps(values).encode())
    return status, json.loads(text)


# -------------------------------------------------------------------- what is given


def test_everything_on_the_list_is_given_as_it_is(server, small_bundle):
    status, headers, plan = ask(server, f"/{TOKEN}/plan.json")
    plan = json.loads(plan)
    assert status == 200 and plan["hash"] == small_bundle.hash and plan["rounds"] == 20
    assert [entry["name"] for entry in plan["networks"]] == list(small_bundle.networks)
    named = [name for entry in plan["networks"] for name in entry["parts"]] + [
        entry["file"] for entry in plan["inputs"]
    ]
    for name in named:
        status, headers, content = ask(server, f"/{TOKEN}/{name}")
        assert status == 200 and content == (small_bundle.folder / name.partition("/")[2]).read_bytes()
        assert "immutable" in headers["Cache-Control"]
    page = ask(server, f"/{TOKEN}/?from=qr")
    assert page[0] == 200 and page[2] == (PAGE / "measure.html").read_bytes() and page[1]["Cache-Control"] == "no-store"
    for name in re.findall(r'(?:src|href|from) ?=?"\.?/?([\w.]+\.(?:js|css))"', page[2].decode()):
        assert ask(server, f"/{TOKEN}/{name}")[0] == 200, name
    for name, value in (
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Embedder-Policy", "require-corp"),
        ("Referrer-Policy", "no-referrer"),
        ("X-Content-Type-Options", "nosniff"),
    ):
        assert page[1][name] == value
    assert "default-src 'none'" in page[1]["Content-Security-Policy"] and "Server" in page[1]
    status, headers, content = ask(server, f"/{TOKEN}/", "HEAD")
    assert (status, content) == (200, b"") and int(headers["Content-Length"]) == len(page[2])
    status, headers, _ = ask(server, f"/{TOKEN}")
    assert (status, headers["Location"]) == (308, f"/{TOKEN}/")


def test_every_script_that_a_page_imports_is_on_the_list(server):
    for name in ("measure.js", "schedule.js", "runtime.js"):
        text = ask(server, f"/{TOKEN}/{name}")[2].decode()
        for other in re.findall(r'from "\./([\w.]+)"', text):
            assert other in server.site, f"{name} imports {other}"
        assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", text)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_without_the_token_there_is_nothing(server, method):
    for path in ("/", "/plan.json", f"/{'t' * 32}/", f"/{TOKEN[:-1]}/", f"/{TOKEN}x/", f"/x/{TOKEN}/", "/\xe9/", "//"):
        assert ask(server, path, method)[0] == 404, path
        assert ask(server, path + "plan.json", method)[0] == 404, path
    assert post(server, "hello", {})[0] == 400  # while with it one is heard
    assert ask(server, f"/{'t' * 32}/hello", "POST", b"{}")[0] == 404


def test_paths_that_try_to_leave(server, small_bundle, tmp_path):
    (small_bundle.folder / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").write_text("secret")
    hash_ = small_bundle.hash
    encoded = (
        "..%2f",
        "%2e%2e/",
        "%2e%2e%2f",
        "..\\",
        "..%5c",
        "....//",
        "%252e%252e%252f",
        "..;/",
        "\xc0\xae\xc0\xae/",
    )
    tricks = [f"{way}secret.txt" for way in ("../", *encoded)]
    tricks += [".", "..", "%00", "plan.json%00.txt", "plan.json/", "./plan.json", f"{hash_}/../plan.json"]
    tricks += [f"{hash_}/{name}" for name in ("", "secret.txt", "bundle.json", "networks", "networks/../secret.txt")]
    tricks += [
        f"{hash_}/networks//teacher.onnx",
        "/etc/passwd",
        "//etc/passwd",
        "%2fetc%2fpasswd",
        "file:///etc/passwd",
    ]
    tricks += [str(small_bundle.folder / "secret.txt"), "token", "results.csv", "measure.html", "measure.py"]
    tricks += ["http://127.0.0.1/x", "C:\\x"]
    for trick in tricks:
        status, _, content = ask(server, f"/{TOKEN}/{trick}")
        assert status == 404 and b"secret" not in content and b"root:" not in content, trick
    assert ask(server, "/etc/passwd")[0] == ask(server, f"/{TOKEN}/../{TOKEN}/plan.json")[0] == 404
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        assert ask(server, f"/{TOKEN}/plan.json", method)[0] == 501


def test_a_link_is_not_followed(small_bundle, no_runtime, tmp_path):
    """Neither one that is there at the start, nor one that takes a file's place later."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    graph = small_bundle.folder / "networks" / "teacher.onnx"
    with server_of(small_bundle, tmp_path, no_runtime) as server:
        name = f"/{TOKEN}/{small_bundle.hash}/networks/teacher.onnx"
        assert ask(server, name)[0] == 200
        graph.unlink()
        assert ask(server, name)[0] == 404
        graph.symlink_to(secret)
        assert ask(server, name)[0] == 404
    with (
        pytest.raises(EdgeDiTError, match="teacher.onnx is a link; it is not served"),
        server_of(small_bundle, tmp_path, no_runtime),
    ):
        pass


# -------------------------------------------------------------------- what is taken


def test_rows_go_to_the_disk_and_the_rest_is_refused(server, small_bundle):
    phone = said_by(small_bundle)
    assert post(server, "rows", phone.post(phone.rows()[:1])) == (
        409,
        {"error": "This server has started since; say hello again.", "kind": "join"},
    )
    status, told = post(server, "hello", phone.hello)
    assert (status, told["session"], told["count"]) == (200, phone.session, 0)
    assert post(server, "rows", phone.post(phone.rows()[:40]))[1]["count"] == 40
    file = server.devices.known[phone.session].file
    assert read_rows(file) == phone.expected[:40]
    kept = file.read_bytes()
    good = phone.post(phone.rows()[40:41])
    for body in (
        b"",
        b"garbage",
        b"\xff\xfe\x00",
        b"[" * 60_000,
        b"{" * 60_000,
        b'{"session": NaN}',
        b"1" * 60_000,
        b'"' + b"x" * 60_000 + b'"',
        b"null",
        b"[]",
        b"{}",
        json.dumps({**good, "rows": "x"}).encode(),
        json.dumps({**good, "rows": [{**good["rows"][0], "ms": "1; DROP"}]}).encode(),
        json.dumps(good).encode().replace(b"10.0", b"1e999"),
        json.dumps(good).encode().replace(b"10.0", b"NaN"),
        json.dumps({**good, "rows": [{**good["rows"][0], "network": "=cmd|' /C calc'!A0"}]}).encode(),
    ):
        status, _, text = ask(server, f"/{TOKEN}/rows", "POST", body)
        assert status == 400 and json.loads(text)["kind"] == "refused", (body[:50], text)
    assert file.read_bytes() == kept
    assert post(server, "rows", good)[1]["count"] == 41, "and it still takes what is right"
    for name in ("", "plan.json", "results", "rows/", "rows/x"):
        assert ask(server, f"/{TOKEN}/{name}", "POST", b"{}")[0] == 404


def raw(server, head: str, body: bytes = b"") -> bytes:
    """What comes back for such bytes, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                answer += part
        return answer


def test_a_gigabyte_is_refused_unread(server):
    start = time.monotonic()
    for size in (2**30, 10**17, 65537):
        answer = raw(server, f"POST /{TOKEN}/rows HTTP/1.1\r\nHost: x\r\nContent-Length: {size}", b"x" * 1000)
        assert answer.startswith(b"HTTP/1.1 413 ") and b"Connection: close" in answer, answer
        assert f"{size} bytes were to be sent; it may be 65536 at most".encode() in answer
    chunked = f"POST /{TOKEN}/rows HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked"
    twice = f"POST /{TOKEN}/rows HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 1000000000"
    for head in (
        chunked,
        f"{chunked}\r\nContent-Length: 2",
        twice,
        *(
            f"POST /{TOKEN}/rows HTTP/1.1\r\nHost: x\r\nContent-Length: {size}"
            for size in ("-1", "1e9", "", "0x10", "9" * 40)
        ),
        f"POST /{TOKEN}/rows HTTP/1.1\r\nHost: x",
    ):
        assert raw(server, head, b"{}").startswith(b"HTTP/1.1 411 "), head
    assert raw(server, f"POST /x/rows HTTP/1.1\r\nHost: x\r\nContent-Length: {2**30}").startswith(b"HTTP/1.1 404 ")
    assert raw(server, f"GET /{'x' * 70_000} HTTP/1.1").startswith(b"HTTP/1.1 414 ")
    assert time.monotonic() - start < 10
    body = b" " * 65534 + b"{}"  # as much as there may be
    assert ask(server, f"/{TOKEN}/rows", "POST", body)[0] == 400


@pytest.fixture
def narrow(monkeypatch):
    """Three connections at once, and little patience."""
    monkeypatch.setattr(serving.Handler, "timeout", 0.5)
    monkeypatch.setattr(serving, "CONNECTIONS", 3)


def test_connections_that_break_or_say_nothing(narrow, server, small_bundle, capfd):
    silent = [socket.create_connection(("127.0.0.1", server.server_port), timeout=5) for _ in range(3)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as fourth:
        assert fourth.recv(10) == b"", "one too many is closed at once"
    time.sleep(1.0)  # and the silent ones after a while
    assert ask(server, f"/{TOKEN}/plan.json")[0] == 200
    for connection in silent:
        connection.close()
    with socket.create_connection(("127.0.0.1", server.server_port)) as half:
        half.sendall(f"POST /{TOKEN}/rows HTTP/1.1\r\nContent-Length: 500\r\n\r\n{{".encode())
    with socket.create_connection(("127.0.0.1", server.server_port)) as gone:
        gone.sendall(f"GET /{TOKEN}/{small_bundle.hash}/networks/teacher.onnx HTTP/1.1\r\n\r\n".encode())
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert ask(server, f"/{TOKEN}/plan.json")[0] == 200
    assert capfd.readouterr().err == ""


# -------------------------------------------------------------------- the command's parts


def test_the_token_lasts_and_is_its_owners_alone(tmp_path):
    token = token_of(tmp_path)
    path = tmp_path / "token"
    assert re.fullmatch(r"[\w-]{32}", token) and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token_of(tmp_path) == token, "an open page goes on"
    path.chmod(0o644)  # others may have read it
    second = token_of(tmp_path)
    assert second != token and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("short")
    assert token_of(tmp_path) not in ("short", second)
    (tmp_path / "mine.txt").write_text("M" * 32)
    path.unlink()
    path.symlink_to(tmp_path / "mine.txt")
    assert token_of(tmp_path) != "M" * 32 and not path.is_symlink()
    assert (tmp_path / "mine.txt").read_text() == "M" * 32


def test_the_address_and_its_qr_code(monkeypatch):
    segno = pytest.importorskip("segno")
    address = address_of("127.0.0.1", 8765, TOKEN, False)
    assert address == f"http://127.0.0.1:8765/{TOKEN}/" and address_of("::1", 1, "t", True) == "https://[::1]:1/t/"
    assert re.fullmatch(r"https://\d+\.\d+\.\d+\.\d+:5/t/", address_of("0.0.0.0", 5, "t", True))
    assert "adb reverse tcp:8765 tcp:8765" in advice(address)
    assert "no WebGPU" in advice("http://192.168.0.2:8765/t/") and "trust" in advice("https://192.168.0.2:8765/t/")
    # A half block stands for two modules; a border of 4 around them.
    lines = re.sub(r"\x1b\[[\d;]*m", "", qr_lines(address)).split("\n")
    halves = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
    rows = [[halves[each][half] for each in line] for line in lines for half in (0, 1)]
    matrix = [[*row] for row in segno.make(address, error="l", micro=False).matrix]
    size = len(matrix)
    light = [row[4 : 4 + size] for row in rows[4 : 4 + size]]
    assert light in (matrix, [[1 - module for module in row] for row in matrix])
    monkeypatch.setitem(sys.modules, "segno", None)
    assert qr_lines(address) is None


def certificate(folder):
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: no certificate to test with")
def test_https(small_bundle, no_runtime, tmp_path, capfd):
    cert, key = certificate(tmp_path)
    with server_of(small_bundle, tmp_path, no_runtime, tls=tls_of(cert, key)) as server:
        plain = socket.create_connection(("127.0.0.1", server.server_port))  # says nothing, and holds nobody up
        trusting = ssl.create_default_context(cafile=str(cert))
        trusting.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", server.server_port, timeout=10, context=trusting)
        connection.request("GET", f"/{TOKEN}/plan.json")
        assert connection.getresponse().status == 200
        connection.close()
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"200" not in plain.recv(100)
        plain.close()
    assert capfd.readouterr().err == ""
    for files, said in (
        ((None, key), "no --certfile"),
        ((tmp_path / "none.pem", None), "none.pem gives no certificate"),
        ((cert, None), "gives no certificate"),
        ((key, cert), "gives no certificate"),
        ((cert, tmp_path / "none.pem"), "with the key .*none.pem gives no certificate"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            tls_of(*files)
    assert tls_of(None, None) is None


def test_a_network_that_no_browser_holds_is_refused(small_bundle, no_runtime, monkeypatch):
    monkeypatch.setattr(serving, "LIMIT", 1000)
    with pytest.raises(EdgeDiTError, match=r"The network fitted-00 of 0.00 GB takes 0.07 GB .* lower --precision"):
        site_of(small_bundle, no_runtime)


@needs_node
def test_the_order_of_runs():
    """Every run once, in rounds; passes go forwards and backwards; groups are as large as the memory lets them be."""
    script = f"""
import {{ backoff, groupsOf, inWords, placeOf, runsOf, visitsOf }} from {json.dumps((PAGE / "schedule.js").as_uri())};
const networks = ["a", "b", "c", "d", "e"].map((name) => ({{ name, bytes: 100 }}));
const memory = {{ copies: 3, fixed_bytes: 50 }};
const plan = {{ passes: 4, warmups: 3, rounds: 20 }};
const groups = groupsOf(networks, memory, 700);
console.log(JSON.stringify({{
  groups: [groups, groupsOf(networks, memory, 10), groupsOf(networks, memory, 1e9)],
  visits: visitsOf(plan, groups), runs: visitsOf(plan, groups).map((visit) => runsOf(plan, visit)),
  waits: [1, 2, 3, 20].map(backoff), words: [0.2, 59, 600, 7300].map(inWords),
  place: placeOf({{ network: "a", phase: "warm", round: 2 }}),
}}));
"""
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one = [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert found["groups"] == [[["a", "b"], ["c", "d"], ["e"]], one, [["a", "b", "c", "d", "e"]]]
    assert [visit["names"] for visit in found["visits"][:6]] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
        ["e"],
        ["d", "c"],
        ["b", "a"],
    ]
    places = [tuple(run.values()) for runs in found["runs"] for run in runs]
    counts = {"cold": 4, "warm": 12, "timed": 20}
    wanted = {(name, phase, i) for name in "abcde" for phase, count in counts.items() for i in range(count)}
    assert len(places) == len(wanted) and set(places) == wanted
    order = [(run["round"], run["network"]) for run in found["runs"][0] if run["phase"] == "timed"]
    assert order[:4] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")] and len(order) == 10
    assert found["waits"] == [1, 2, 4, 30] and found["words"] == ["1 s", "59 s", "10 min", "2 h 2 min"]
    assert found["place"] == "a warm 2"


# -------------------------------------------------------------------- the whole server, as a process


def send(url, name, values):
    host, port, token = re.fullmatch(r"http://([\d.]+):(\d+)/(.*)/", url).groups()
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("POST", f"/{token}/{name}", json.dumps(values))
    with contextlib.closing(connection):
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_killed_and_started_again(small_bundle, tmp_path, web_runtime):
    """After SIGKILL all that was acknowledged is there, and the address stays; one server at a time; Ctrl-C."""
    phone, port, folder = said_by(small_bundle), free_port(), tmp_path / "results"
    with process_of(small_bundle, folder, port) as (process, url):
        send(url, "hello", phone.hello)
        assert send(url, "rows", phone.post(phone.rows()[:50]))[1]["count"] == 50
        command = [*process.args[:-1], str(free_port())]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 2 and "is in use by process" in second.stderr
        process.send_signal(signal.SIGKILL)
    with process_of(small_bundle, folder, port) as (process, again):
        assert again == url
        assert send(url, "rows", phone.post(phone.rows()[50:60]))[1]["kind"] == "join"
        assert send(url, "hello", phone.hello)[1]["count"] == 50
        assert send(url, "rows", phone.post(phone.rows()[40:]))[0:1] == (200,)
        assert len(read_rows(folder / phone.session / "results.csv")) == 108
        command = [*process.args[:-2], str(tmp_path / "other"), str(port)]
        taken = subprocess.run(command, capture_output=True, text=True)
        assert taken.returncode == 2 and f"port {port} (Address already in use); give another --port" in taken.stderr
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 130 and err.strip().endswith("serve: interrupted.") and "Traceback" not in err
        assert f"108 runs are in {folder}; the same command goes on with them" in out
        assert not list(folder.glob("*.lock")) and os.path.isfile(folder / "token")
