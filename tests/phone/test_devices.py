"""What devices send: nothing is lost, nothing mixes, and nothing is let in that no measurement can be."""

import pytest
from phones import said_by

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.phone.devices import Course, Devices, Refusal
from edgedit_hf.phone.results import read_rows


@pytest.fixture
def devices(small_bundle, tmp_path):
    return Devices(tmp_path / "results", small_bundle)


def refused(action, values, said: str, status: int, kind: str = "refused"):
    with pytest.raises(Refusal, match=said) as error:
        action(values)
    assert (error.value.status, error.value.kind) == (status, kind)


def test_a_course_holds_to_the_protocol(small_bundle):
    course = Course.of(small_bundle)
    assert (course.passes, course.warmups, course.rounds) == (4, 3, 20) and course.total == 3 * (4 + 12 + 20)
    assert all(course.counts[phase] >= least for phase, least in (("cold", 3), ("warm", 3), ("timed", 20)))


def test_a_whole_measurement_in_pieces_and_over_a_restart(devices, small_bundle):
    phone = said_by(small_bundle)
    device, told = devices.join(phone.hello)
    assert (told["count"], told["total"], told["done"]) == (0, 108, {}) and not device.file.exists()
    rows = phone.rows()
    for start in range(0, 60, 20):
        device, told = devices.take(phone.post(rows[start : start + 20]))
    assert told["count"] == 60 and len(read_rows(device.file)) == 60 and "summary" not in told
    with open(device.file, "a") as file:  # killed while it wrote
        file.write("0123,teach")
    again = Devices(devices.folder, small_bundle)
    refused(again.take, phone.post(rows[60:80]), "has started since; say hello", 409, "join")
    device, told = again.join(phone.hello)
    assert told["count"] == 60 and sum(len(n) for each in told["done"].values() for n in each.values()) == 60
    assert again.take(phone.post(rows[40:100]))[1]["count"] == 100, "those that were sent before count once"
    device, told = again.take(phone.post(rows[100:]))
    assert (
        device.whole
        and told["count"] == 108
        and sorted(read_rows(device.file), key=str) == sorted(phone.expected, key=str)
    )
    assert set(told["summary"]["networks"]) == set(small_bundle.networks) and told["summary"]["throttled"] is False
    assert again.join(phone.hello)[1]["summary"] == told["summary"]


def test_two_phones_do_not_mix(devices, small_bundle):
    """Of the same make, at the same time: every one has its own results, and cannot send to the other's."""
    one, two = said_by(small_bundle), said_by(small_bundle, client="b" * 32, tab="2" * 32, ms=50.0)
    other = said_by(small_bundle, backend="webgpu", threads=1)
    names = [devices.join(phone.hello)[1]["session"] for phone in (one, two, other)]
    assert len(set(names)) == 3 and all(name.startswith("pixel-9-") for name in names)
    for phone in (one, two):
        for start in range(0, 108, 50):
            devices.take(phone.post(phone.rows()[start : start + 50]))
    assert {row.ms for row in read_rows(devices.known[names[0]].file)} == {10.0}
    assert {row.ms for row in read_rows(devices.known[names[1]].file)} == {50.0}
    refused(devices.take, {**two.post(two.rows()[:1]), "session": names[0]}, "Another page", 409)
    refused(devices.take, one.post(other.rows()[:1]), "backend is 'webgpu', but the device said 'wasm'", 409)


def test_the_last_page_of_a_browser_goes_on(devices, small_bundle):
    old, new = said_by(small_bundle), said_by(small_bundle, tab="2" * 32)
    devices.join(old.hello)
    devices.take(old.post(old.rows()[:5]))
    assert devices.join(new.hello)[1]["count"] == 5
    refused(devices.take, old.post(old.rows()[5:9]), "Another page of this browser goes on", 409)
    assert devices.take(new.post(new.rows()[5:9]))[1]["count"] == 9


def test_what_is_not_let_in(devices, small_bundle):
    phone = said_by(small_bundle)
    good, row = phone.post(phone.rows()[:1]), phone.rows()[0]
    refused(devices.take, good, "say hello again", 409, "join")
    device, _ = devices.join(phone.hello)
    for values, said in (
        (None, "post is None"),
        ([], r"post is \[\]"),
        ({}, "post.session is missing"),
        ({**good, "admin": 1}, "post: unknown key 'admin'"),
        ({**good, "rows": {}}, "post.rows is"),
        ({**good, "rows": []}, "post.rows has 0 entries"),
        ({**good, "rows": [row] * 201}, "post.rows has 201 entries"),
        ({**good, "rows": [row, 1]}, "post.rows.*1"),
        ({**good, "rows": [row, {**row, "ms": -1.0}]}, "row 1: ms is -1.0"),
        ({**good, "rows": [{**row, "ms": "fast"}]}, "row 0: ms is 'fast'"),
        ({**good, "rows": [{**row, "x": 1}]}, "row 0: unknown key 'x'"),
        ({**good, "rows": [{**row, "network": "../../x"}]}, "no network '../../x'"),
        ({**good, "rows": [{**row, "round": 4}]}, "A network has 4 cold runs, but this is number 4"),
        ({**good, "session": "../../etc"}, "post.session is '../../etc'"),
    ):
        refused(devices.take, values, said, 400)
    refused(devices.take, {**good, "rows": [{**row, "bundle": "f" * 16}]}, "row's bundle is 'ffff", 409)
    refused(devices.take, {**good, "session": "nobody"}, "say hello again", 409, "join")
    for change, said, status in (
        ({"bundle": "f" * 16}, "measures the bundle ffff.* reload", 409),
        ({"backend": "cuda"}, "hello.backend is 'cuda'", 400),
        ({"client": "../" * 8}, "hello.client is", 400),
        ({"threads": 0}, "hello.threads is 0", 400),
        ({"device": "a\nb"}, "hello.device", 400),
        ({"device": "x" * 301}, "301 characters", 400),
        ({"more": 1}, "unknown key 'more'", 400),
    ):
        refused(devices.join, {**phone.hello, **change}, said, status)
    assert device.runs == {} and not devices.folder.exists(), "of a post with one bad row nothing is taken"
    devices.take(good)
    refused(devices.take, {**good, "rows": [{**row, "ms": 99.0}]}, "is there with 10 ms, not 99", 409, "join")
    assert [found.ms for found in read_rows(device.file)] == [10.0]


def test_no_more_rows_a_second_than_a_device_measures(devices, small_bundle, monkeypatch):
    phone = said_by(small_bundle)
    device, _ = devices.join(phone.hello)
    monkeypatch.setattr(devices, "_room", 30.0)
    monkeypatch.setattr("edgedit_hf.phone.devices.ROWS_A_SECOND", 0.0)
    devices.take(phone.post(phone.rows()[:20]))
    refused(devices.take, phone.post(phone.rows()[20:40]), "rows a second; wait", 429, "later")
    assert len(read_rows(device.file)) == 20 == len(device.runs)


def test_no_more_devices_than_there_may_be(devices, small_bundle, monkeypatch):
    monkeypatch.setattr("edgedit_hf.phone.devices.DEVICES", 2)
    phones = [said_by(small_bundle, client=letter * 32) for letter in "abcd"]
    for phone in phones:
        devices.join(phone.hello)
    assert len(devices.known) == 2, "those that sent nothing are forgotten"
    for phone in phones[2:]:
        devices.take(phone.post(phone.rows()[:1]))
    refused(devices.join, phones[0].hello, "2 devices have results", 409)


def test_a_full_disk_is_told_and_nothing_noted(devices, small_bundle, monkeypatch):
    phone = said_by(small_bundle)
    device, _ = devices.join(phone.hello)

    def full(path, rows):
        raise EdgeDiTError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("edgedit_hf.phone.devices.append_rows", full)
        refused(devices.take, phone.post(phone.rows()[:3]), "no space left", 507, "later")
    assert device.runs == {} and devices.take(phone.post(phone.rows()[:3]))[1]["count"] == 3


def test_damaged_results_end_it_before_it_starts(devices, small_bundle):
    phone = said_by(small_bundle)
    device, _ = devices.join(phone.hello)
    devices.take(phone.post(phone.rows()[:3]))
    kept = device.file.read_text()
    for text, said in (
        (kept.replace("teacher", "stranger", 1), "no network 'stranger'"),
        (kept.replace("wasm", "webgpu", 1), "backend is"),
        (kept.replace(",10.0,", ",ten,", 1), "ms is 'ten'"),
    ):
        assert text != kept
        device.file.write_text(text)
        with pytest.raises(EdgeDiTError, match=said):
            Devices(devices.folder, small_bundle)
