"""The Hub on the loopback interface that other tests push to, against the unmodified client of huggingface_hub."""

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import hub_card_rules
import pytest
from hub_server import READER, STRANGER, TOKEN

CARD = "---\nlicense: cc-by-nc-4.0\nbase_model: acme/teacher\nbase_model_relation: quantized\n---\n# A student\n"
PUSH = """
import sys
from huggingface_hub import HfApi
api, (folder, repo_id) = HfApi(), sys.argv[1:3]
api.create_repo(repo_id, private=True, exist_ok=True)
print(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="push").oid)
"""
PULL = """
import sys
from huggingface_hub import hf_hub_download, snapshot_download
folder = snapshot_download(sys.argv[1], revision=sys.argv[2])
assert hf_hub_download(sys.argv[1], "program.pte", revision=sys.argv[2]) == f"{folder}/program.pte"
print(folder)
"""


@pytest.fixture
def folder(tmp_path):
    """Files of git and of LFS (by name, and by what they hold), one in a folder, one empty."""
    content, folder = random.Random(0), tmp_path / "student"
    (folder / "transformer").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "empty.txt").touch()
    (folder / "grid.png").write_bytes(b"\x89PNG\0" + content.randbytes(1000))
    (folder / "transformer" / "model.safetensors").write_bytes(content.randbytes(250_000))
    (folder / "program.pte").write_bytes(b"\0" + content.randbytes(50_000))
    return folder


def contents(folder) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def test_pushed_and_pulled(hub, folder, run_with_hub):
    """What is there is not sent again; what is pulled is what was pushed: online, from the cache, offline."""
    hub.part_size, hub.page_size = 100_000, 3
    first = run_with_hub(PUSH, folder, "me/student").strip()
    assert {path: file.read_bytes() for path, file in hub.files("me/student").items()} == contents(folder)
    parts = hub.requests("PUT /storage/.*/[123]$")
    assert [part["received"] for part in parts] == [100_000, 100_000, 50_000]
    assert hub.sent("PUT /storage/") == 250_000 + 50_001 + 1005

    hub.forget()
    assert run_with_hub(PUSH, folder, "me/student").strip() == first
    assert hub.sent() == 0 and not hub.requests("/commit/")
    (folder / "transformer" / "config.json").write_text('{"new": 1}')
    (folder / "program.pte").write_bytes(b"\0" * 10)
    second = run_with_hub(PUSH, folder, "me/student").strip()
    assert second != first and hub.sent("PUT /storage/") == 10

    hub.stop(), hub.start()  # on its state
    hub.forget()
    pulled = Path(run_with_hub(PULL, "me/student", "main", home="empty").strip())
    assert contents(pulled) == contents(folder)
    assert len(hub.requests("GET .*/tree/")) == 3  # its pages
    assert sum(entry["answered"] for entry in hub.requests("GET /storage/")) == 250_000 + 10 + 1005
    hub.forget()
    run_with_hub(PULL, "me/student", "main", home="empty")
    assert sum(entry["answered"] for entry in hub.requests("/storage/|GET .*/resolve/")) == 0
    hub.stop()
    assert Path(run_with_hub(PULL, "me/student", "main", home="empty", offline=True).strip()) == pulled
    hub.start()


def test_an_upload_that_is_cut_continues(hub, folder, run_with_hub, tmp_path):
    """The process is killed while it sends the weights; once more a reset, which the client mends by itself."""
    slow = hub.fault("PUT /storage/.*/2$", delay=60)
    hub.part_size = 100_000
    command = [sys.executable, "-c", PUSH, folder, "me/student"]
    push = subprocess.Popen(command, env={**os.environ, **hub.env(tmp_path / "home")}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not (slow.hits and len(hub.requests("PUT /storage/")) == 3) and time.monotonic() < end:
        time.sleep(0.02)
    push.kill(), push.wait()
    assert hub.sent() == 1005 + 50_001 + 100_000 and hub.files("me/student") == {}

    hub.forget()
    reset = hub.fault("PUT /storage/.*/3$", reset=20_000)
    run_with_hub(PUSH, folder, "me/student")
    assert reset.hits == 1 and hub.sent("PUT /storage/") == 250_000 + 20_000
    assert [entry["status"] for entry in hub.requests("PUT /storage/")] == [200, 200, 0, 200]
    assert {path: file.read_bytes() for path, file in hub.files("me/student").items()} == contents(folder)


REFERENCES = """
import warnings
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
api = HfApi()
commit = api.model_info("me/student").sha
api.create_tag("me/student", tag="run/1", tag_message="made by run 1")
api.create_tag("me/student", tag="run/1", exist_ok=True)
api.create_branch("me/student", branch="next")
for create, name in ((api.create_tag, {"tag": "run/1"}), (api.create_branch, {"branch": "next"})):
    try:
        create("me/student", **name)
    except HfHubHTTPError as error:
        assert error.response.status_code == 409
    else:
        raise AssertionError("it was there")
file = api.upload_file(path_or_fileobj=b"2", path_in_repo="b/two.txt", repo_id="me/student", revision="next")
refs = api.list_repo_refs("me/student")
assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": commit, "next": file.oid}
assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/run/1", commit)]
assert api.file_exists("me/student", "b/two.txt", revision="next")
assert not api.file_exists("me/student", "b/two.txt", revision="run/1")
assert [c.title for c in api.list_repo_commits("me/student", revision="next")][0].startswith("Upload b/two.txt")
paths = api.get_paths_info("me/student", ["b", "b/two.txt", "absent"], revision="next")
assert [(type(path).__name__, path.path) for path in paths] == [("RepoFolder", "b"), ("RepoFile", "b/two.txt")]
api.delete_folder("b", repo_id="me/student", revision="next")
api.delete_branch("me/student", branch="next")
api.delete_tag("me/student", tag="run/1")
try:
    api.model_info("me/student", revision="run/1")
except RevisionNotFoundError:
    refs = api.list_repo_refs("me/student")
    assert [ref.name for ref in refs.branches] == ["main"] and refs.tags == []
else:
    raise AssertionError("it is still there")

about = api.model_info("me/student", files_metadata=True)
assert about.card_data.license == "cc-by-nc-4.0" and "base_model:quantized:acme/teacher" in about.tags
assert {s.rfilename: s.size for s in about.siblings if s.lfs} == {
    "grid.png": 1005, "program.pte": 50_001, "transformer/model.safetensors": 250_000}
ModelCard.load("me/student").validate()
try:
    ModelCard("---\\nlicense: my-own\\n---\\n# x").validate()
except ValueError as error:
    assert '- Error: "license" must be one of [apache-2.0, mit,' in str(error)
else:
    raise AssertionError("no such licence")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    api.upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id="me/student")
assert "empty or missing yaml metadata" in str(caught[0].message)

one = api.create_collection("Family", namespace="me", description="of one supernet", private=True)
assert api.create_collection("Family", namespace="me", exists_ok=True).slug == one.slug
api.add_collection_item(one.slug, "me/student", "model", note="full")
again = api.add_collection_item(one.slug, "me/student", "model", exists_ok=True)
assert [(item.item_id, item.item_type, item.note) for item in again.items] == [("me/student", "model", "full")]
api.update_collection_item(one.slug, again.items[0].item_object_id, note="tiny")
changed = api.update_collection_metadata(one.slug, title="Family 2", private=False)
assert (changed.title, changed.private, changed.items[0].note) == ("Family 2", False, "tiny")
assert [collection.slug for collection in api.list_collections(owner="me")] == [one.slug]
api.delete_collection_item(one.slug, changed.items[0].item_object_id)
assert api.get_collection(one.slug).items == []
api.delete_collection(one.slug)
api.delete_collection(one.slug, missing_ok=True)

api.create_repo("me/table", repo_type="dataset")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="latency.json", repo_id="me/table", repo_type="dataset")
assert open(api.hf_hub_download("me/table", "latency.json", repo_type="dataset")).read() == "{}"
api.delete_repo("me/table", repo_type="dataset")
assert not api.repo_exists("me/table", repo_type="dataset")
"""


def test_references_cards_collections(hub, folder, run_with_hub):
    hub.add("me/student", folder, private=True)
    run_with_hub(REFERENCES)


FAILURES = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
writer, reader, stranger = sys.argv[1:]
api, owner = HfApi(), HfApi(token=writer)

def push(name, **kwargs):
    operations = [CommitOperationAdd("a.txt", name.encode())]
    return owner.create_commit(f"me/{name}", operations, commit_message="x", **kwargs)

def what(name, do):
    try:
        return do() and "done"
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        answers = [getattr(getattr(cause, "response", None), "status_code", "") for cause in causes]
        return [f"{type(cause).__name__} {answer}".strip() for cause, answer in zip(causes, answers)] + [str(error)]

tasks = {
    "private": lambda: api.model_info("me/private"),
    "private-stranger": lambda: HfApi(token=stranger).model_info("me/private"),
    "bad-token": lambda: HfApi(token="hf_old").model_info("me/open"),
    "missing": lambda: owner.model_info("me/absent"),
    "gated-file": lambda: hf_hub_download("me/gated", "big.bin", token=stranger),
    "gated-anonymous": lambda: hf_hub_download("me/gated", "big.bin", token=False),
    "gated-owner": lambda: hf_hub_download("me/gated-owner", "big.bin", token=writer),
    "reader": lambda: HfApi(token=reader).create_repo("me/more"),
    "foreign": lambda: owner.create_repo("google/more", exist_ok=True),
    "there": lambda: owner.create_repo("me/open"),
    "revision": lambda: snapshot_download("me/open", revision="v9"),
    "entry": lambda: hf_hub_download("me/open", "absent.json"),
    "parent": lambda: push("open", parent_commit="0" * 40),
    "delete": lambda: owner.create_commit("me/open", [CommitOperationDelete("absent.txt")], commit_message="x"),
    "conflict": lambda: push("conflict"),
    "lost": lambda: push("lost"),
    "limited": lambda: api.model_info("me/limited"),
    "limited-once": lambda: api.list_repo_files("me/limited-once"),
    "down": lambda: api.model_info("me/down"),
    "down-once": lambda: api.list_repo_files("me/down-once"),
    "reset": lambda: api.model_info("me/reset"),
    "slow": lambda: api.model_info("me/slow", timeout=0.3),
    "slow-once": lambda: hf_hub_download("me/slow-once", "big.bin"),
    "short": lambda: hf_hub_download("me/short", "big.bin"),
    "torn": lambda: hf_hub_download("me/torn", "big.bin"),
    "torn-once": lambda: hf_hub_download("me/torn-once", "big.bin"),
}
with ThreadPoolExecutor(len(tasks)) as pool:
    print(json.dumps(dict(zip(tasks, pool.map(lambda task: what(*task), tasks.items())))))
"""


def test_failures_reach_the_client(hub, run_with_hub, tmp_path):
    """Each is the exception of the client that the real answer would be; what can be mended is."""
    weights, large = random.Random(1).randbytes(100_000), random.Random(2).randbytes(10_600_000)
    for name, content in (("files", weights), ("large", large)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "big.bin").write_bytes(content)
    for name in "open conflict lost limited limited-once down down-once reset slow slow-once short torn".split():
        hub.add(f"me/{name}", tmp_path / "files")
    hub.add("me/torn-once", tmp_path / "large")
    hub.add("me/private", tmp_path / "files", private=True)
    for name in ("gated", "gated-owner"):
        hub.add(f"me/{name}", tmp_path / "files", gated="manual")
    hub.fault("/me/conflict/commit/", status=409, message="Another commit is in progress")
    hub.fault("/me/lost/commit/", reset=1_000_000)
    hub.fault("/me/limited$", status=429, retry_after=7, message="Too many requests")
    hub.fault("/me/limited-once/tree", status=429, retry_after=0)
    hub.fault("/me/down$", status=503, message="Down for maintenance")
    hub.fault("/me/down-once/tree", status=500)
    hub.fault("/me/reset$", reset=10)
    hub.fault("/me/slow$", delay=2)
    hub.fault("HEAD /me/slow-once/", delay=2)
    hub.fault("GET /storage/models/me/short/", short=60_000)
    hub.fault("GET /storage/models/me/torn/", reset=60_000)
    hub.fault("GET /storage/models/me/torn-once/", truncate=10_500_000)
    timeout = {"HF_HUB_ETAG_TIMEOUT": "1"}
    said = json.loads(run_with_hub(FAILURES, TOKEN, READER, STRANGER, token=None, env=timeout))

    done = {"gated-owner", "limited-once", "down-once", "slow-once", "torn-once"}
    assert {name for name, error in said.items() if error == "done"} == done
    first = {name: error[0] for name, error in said.items() if name not in done}
    assert first == {
        "private": "RepositoryNotFoundError 401",
        "private-stranger": "RepositoryNotFoundError 404",
        "bad-token": "HfHubHTTPError 401",
        "missing": "RepositoryNotFoundError 404",
        "gated-file": "GatedRepoError 403",
        "gated-anonymous": "GatedRepoError 401",
        "reader": "HfHubHTTPError 403",
        "foreign": "HfHubHTTPError 403",
        "there": "HfHubHTTPError 409",
        "revision": "RevisionNotFoundError 404",
        "entry": "RemoteEntryNotFoundError 404",
        "parent": "HfHubHTTPError 412",
        "delete": "RemoteEntryNotFoundError 404",
        "conflict": "HfHubHTTPError 409",
        "lost": first["lost"],
        "limited": "HfHubHTTPError 429",
        "down": "HfHubHTTPError 503",
        "reset": first["reset"],
        "slow": "ReadTimeout",
        "short": "OSError",
        "torn": first["torn"],
    }
    assert {first[name] for name in ("lost", "reset", "torn")} <= {"ReadError", "RemoteProtocolError"}
    assert "Consistency check failed: file should be of size 100000 but has size 60000" in said["short"][-1]
    assert hub.files("me/lost")["a.txt"].read_bytes() == b"lost"  # it was made, the answer did not arrive
    sent = [(entry["status"], entry["answered"]) for entry in hub.requests("/storage/models/me/torn-once/")]
    assert sent == [(200, 10_500_000), (206, 10_600_000 - (10 << 20))]  # the client goes on at its last 10 MiB
    cache = tmp_path / "home" / "hub"
    blobs = {path.parts[len(cache.parts)]: path for path in cache.rglob("blobs/*")}
    whole = {"models--me--gated-owner", "models--me--slow-once", "models--me--torn-once"}
    assert set(blobs) == whole  # nothing is half-written
    assert blobs["models--me--torn-once"].read_bytes() == large


def test_killed_and_started_again(repository, folder, tmp_path):
    """As a process of its own, the way one tries it by hand."""
    for name in ("one", "two"):
        command = [sys.executable, repository / "tests" / "helpers" / "hub_server.py", tmp_path / "state"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        url = server.stdout.readline().strip()
        body = json.dumps({"name": name, "organization": "acme", "visibility": "public"}).encode()
        create = urllib.request.Request(f"{url}/api/repos/create", body, {"Authorization": f"Bearer {TOKEN}"})
        urllib.request.urlopen(create).close()
        server.kill(), server.wait(), server.stdout.close()
    assert sorted(path.name for path in (tmp_path / "state" / "models" / "acme").iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    "metadata, says",
    [
        ("license: apache-2.0\npipeline_tag: text-to-image\ntags: [a]\nwidget: [{text: a}]", []),
        ("license: Apache", ['Error: "license" must be one of [apache-2.0,']),
        ("license: [mit, cc-by-nc-4.0]\nlicense_name: x", []),
        ("license: other\nlicense_name: My Licence", ['Error: "license_name" with value "My Licence"']),
        ("base_model: runs/demo/teacher", ['Error: "base_model" with value "runs/demo/teacher" is not valid']),
        ("base_model: [acme/a, b]\nbase_model_relation: pruned", ['Error: "base_model_relation" must be one of']),
        ("pipeline_tag: class-to-image", ['Warning: The pipeline tag "class-to-image" is not in the official list']),
        ("tags: a", ['Error: "tags" must be an array']),
        ("tags: [1]", ['Error: "tags[0]" must be a string']),
        ("library_name: [a]", ['Error: "library_name" must be a string']),
        ("license: mit: no", ["Error: Invalid YAML"]),
        ("[1]", ["Error: Metadata should be an object"]),
        (
            "model-index: [{name: a, results: [{task: {name: t}, dataset: {type: d}, metrics: [{type: fid}]}]}]",
            [
                'Error: "model-index[0].results[0].task.type" is required',
                'Error: "model-index[0].results[0].dataset.name" is required',
                'Error: "model-index[0].results[0].metrics[0].value" is required',
            ],
        ),
        ("model-index: [{results: []}]", ['Error: "model-index[0].name" is required']),
    ],
)  # fmt: skip
def test_rules_of_cards(metadata, says):
    errors, warnings = hub_card_rules.check(f"---\n{metadata}\n---\n# A model\n")
    said = [*(f"Error: {error}" for error in errors), *(f"Warning: {warning}" for warning in warnings)]
    assert len(said) == len(says) and all(line.startswith(start) for line, start in zip(said, says)), said
