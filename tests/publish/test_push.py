"""`edgedit push` against a Hub on the loopback interface: what arrives, what does not go twice, what is refused."""

import json
import shutil

import pytest
from hub_server import READER, STRANGER

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.markup import markdown
from edgedit_hf.publish.contents import MADE
from edgedit_hf.publish.push import plan
from edgedit_hf.search_space import SearchSpace

MAIN = """
import sys
from edgedit_hf.commands.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers", "onnx"} & set(sys.modules)
assert "--bundle-code" in sys.argv or not heavy, f"pushing imports {heavy}"
sys.exit(code)
"""
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(make_transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    teacher = make_transformer()
    EdgeDiTPipeline(teacher, make_scheduler("epsilon")).save_pretrained(folder / "teacher")
    ProxyBank.create(folder / "bank", teacher, SearchSpace.for_config(teacher.config, reduced_attention_dim=8))
    for name in ("teacher", "bank"):
        (folder / name / "README.md").write_text("---\nlicense: mit\n---\n# Of the tests\n")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made / "teacher", tmp_path / "teacher")


@pytest.fixture
def push(run_with_hub):
    def run(*arguments, expect=0, **options):
        return run_with_hub(MAIN, "push", *arguments, "--own-card", expect=expect, **options)

    return run


def title(hub, name: str) -> str:
    repository = hub.repository(name)
    return repository.commit(repository.state["branches"]["main"])["title"]


@pytest.fixture
def refused(run_with_hub, run_python, hub, tmp_path):
    """What the one line of stderr says."""
    code = MAIN.replace("import sys", "import sys; sys.stderr = sys.stdout", 1)

    def run(*arguments, **options) -> str:
        printed = run_with_hub(code, "push", *arguments, "--own-card", expect=2, **options)
        lines = [line for line in printed.splitlines() if line.startswith("edgedit")]
        assert len(lines) == 1 and "Traceback" not in printed, printed
        return lines[0]

    return run


def test_what_arrives_and_what_is_not_sent_again(hub, push, folder):
    printed = push(folder, "me/teacher")
    state = hub.repository("me/teacher").state
    assert state["private"]
    files = hub.files("me/teacher")
    assert set(files) - {".gitattributes"} == {
        *("README.md", MADE, "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", WEIGHTS)
    }
    assert files[WEIGHTS].read_bytes() == (folder / WEIGHTS).read_bytes()
    assert json.loads(files[MADE].read_text())["kind"] == "teacher"
    assert "of its own (EdgeDiT, genotype" in title(hub, "me/teacher")

    hub.forget()
    again = push(folder, "me/teacher")
    assert "nothing was sent" in again and hub.sent() == 0
    assert printed.split()[:3] == again.split()[:3], "the same commit"

    (folder / "notes.txt").write_text("of mine")
    (folder / "scheduler" / "extra.json").write_text("{}")
    push(folder, "me/teacher")
    assert {"notes.txt", "scheduler/extra.json"} <= set(hub.files("me/teacher"))
    (folder / "notes.txt").unlink()
    hub.forget()
    push(folder, "me/teacher")
    assert "notes.txt" not in hub.files("me/teacher") and not hub.requests("PUT /storage/"), "only the deletion went"
    tags = hub.repository("me/teacher").state["tags"]
    assert len(tags) == 3 and all(tag.startswith("teacher-") for tag in tags), "one for each state of the folder"


@pytest.mark.slow
def test_a_folder_of_a_repository_a_collection_and_another_kind(hub, push, refused, folder, made):
    push(folder, "me/family", "--path-in-repo", "teacher", "--collection", "Digits")
    push(made / "bank", "me/family", "--path-in-repo", "bank", "--collection", "Digits")
    files = set(hub.files("me/family"))
    assert {"teacher/README.md", f"teacher/{WEIGHTS}", "bank/index.json", f"bank/{MADE}"} <= files
    push(folder, "me/family")  # its root, beside the folders
    assert files < set(hub.files("me/family"))
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == ["me/family"] and collection["private"]

    push(made / "bank", "me/bank")
    before = hub.repository("me/bank").state
    told = refused(folder, "me/bank")
    assert "holds bank (edgedit), not teacher (edgedit)" in told and "--replace" in told
    assert hub.repository("me/bank").state == before
    foreign = folder.parent / "foreign"
    foreign.mkdir()
    (foreign / "model.gguf").write_text("x")
    hub.add("me/foreign", foreign)
    assert "model.gguf" in refused(folder, "me/foreign")
    push(folder, "me/bank", "--replace")
    assert "index.json" not in hub.files("me/bank") and WEIGHTS in hub.files("me/bank")


def test_a_dry_run_lists_all_and_asks_nobody(hub, push, folder):
    printed = push(folder, "me/teacher", "--dry-run")
    assert not hub.requests() and not list(hub.folder.glob("*"))
    size = (folder / WEIGHTS).stat().st_size
    assert f"{size:,}  {WEIGHTS}" in printed and "README.md" in printed and "tag teacher-" in printed


def test_an_upload_that_is_cut_goes_on_where_it_was(hub, push, refused, folder):
    (folder / "other.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    size = len(content)
    hub.fault("POST .*/commit/", status=503, times=None)
    assert "fault" in refused(folder, "me/teacher")
    assert hub.sent("PUT /storage/") == 2 * size, "both files had arrived"
    hub.faults.clear()
    hub.forget()
    push(folder, "me/teacher")
    assert hub.sent("PUT /storage/") == 0, "they are not sent again"
    assert hub.files("me/teacher")[WEIGHTS].read_bytes() == bytes(content)


@pytest.mark.parametrize(
    ("pattern", "fault", "words"),
    [
        ("create", {"status": 403}, "rights"),
        ("create", {"status": 500}, "has a fault"),
        pytest.param("preupload", {"status": 429, "retry_after": 1}, "wait 1 seconds", marks=pytest.mark.slow),
        ("POST .*/commit/", {"status": 409}, "at the same time"),
        pytest.param(
            "PUT /storage/", {"reset": 100}, "cut the connection", marks=pytest.mark.slow
        ),  # it tries for long
    ],
    ids=["403", "500", "429", "409", "reset"],
)
def test_what_goes_wrong_is_one_line(hub, refused, folder, pattern, fault, words):
    hub.fault(pattern, times=None, **fault)
    assert words in refused(folder, "me/teacher")
    assert WEIGHTS not in (hub.files("me/teacher") if (hub.folder / "models").exists() else {})


@pytest.mark.slow
def test_whoever_may_not(hub, push, refused, folder):
    assert "rights" in refused(folder, "me/teacher", token=READER)
    assert "token" in refused(folder, "me/teacher", token="hf_unknown")
    push(folder, "me/teacher")
    told = refused(folder, "me/teacher", token=STRANGER)
    assert "me/teacher" in told and ("rights" in told or "private" in told)
    assert "no name on the Hub" in refused(folder, "a/b/c")
    assert "relative path" in refused(folder, "me/teacher", "--path-in-repo", "../x")


@pytest.mark.slow
def test_a_card_of_ones_own_says_a_licence(hub, refused, folder):
    (folder / "README.md").write_text("# Mine\n")
    assert "names no licence" in refused(folder, "me/teacher")
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "cannot be read" in refused(folder, "me/teacher")
    (folder / "README.md").write_text("---\nlicense: nonesuch\n---\n")
    assert "does not take the front matter" in refused(folder, "me/teacher")
    assert not hub.requests("/repos/create"), "nothing was made"
    (folder / "README.md").unlink()
    assert "no README.md of its own" in refused(folder, "me/teacher")


def test_a_run_goes_with_a_card_of_its_figures(hub, run_with_hub, debug_run):
    run_with_hub(MAIN, "push", debug_run / "student-tuned", "me/student", "--license", "mit")
    files = hub.files("me/student")
    card, report = files["README.md"].read_text(), json.loads((debug_run / "report.json").read_text())
    (entry,) = (model for model in report["models"] if model["name"] == "student-tuned")
    figures = [markdown(f"{value:.3g}") for key, value in entry["metrics"].items() if key.startswith("fid[")]
    assert "me/student" in card and figures and all(figure in card for figure in figures)
    assert any(name.startswith("card/") for name in files) and "telemetry.jsonl" not in files
    hub.forget()
    run_with_hub(MAIN, "push", debug_run / "student-tuned", "me/student", "--license", "mit")
    assert hub.sent() == 0, "the card is the same to the byte"


@pytest.mark.slow
def test_with_its_code_a_pipeline_loads_without_this_package(push, run_with_hub, folder, hub):
    push(folder, "me/bundle", "--bundle-code")
    index = json.loads(hub.files("me/bundle")["model_index.json"].read_text())
    assert index["_class_name"] == ["pipeline_edgedit", "EdgeDiTPipeline"]
    pipeline = EdgeDiTPipeline.from_pretrained(folder)
    pipeline.save_pretrained(folder.parent / "saved", bundle_code=True)
    path = folder.parent / "saved" / "model_index.json"
    assert str(folder) in path.read_text()
    shutil.copy(folder / "README.md", path.parent)
    push(path.parent, "me/again")
    assert (
        hub.files("me/again")["model_index.json"].read_bytes()
        == hub.files("me/bundle")["model_index.json"].read_bytes()
    )
    for name in ("pipeline_edgedit.py", "transformer/transformer_edgedit.py"):
        assert hub.files("me/bundle")[name].read_bytes() == (folder.parent / "saved" / name).read_bytes(), name
    assert not (folder / "pipeline_edgedit.py").exists(), "the folder itself is as it was"


@pytest.mark.parametrize(
    ("path", "place", "tag"),
    [
        ("./a//b/", "a/b", "b"),
        ("x..y~", "x..y~", "x.y"),
        (" ", " ", ""),
        ("ü/日 本", "ü/日 本", "日-本"),
        (".", "", ""),
    ],
)
def test_a_folder_of_the_repository_is_one_place_and_its_tag_one_that_git_takes(folder, path, place, tag):
    planned = plan(folder, "me/x", path=path, own_card=True)
    assert planned.path == place
    assert planned.tag.startswith(f"{tag}-teacher-" if tag else "teacher-")


LATE = """
import sys
from pathlib import Path
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.publish.push import plan, push
planned = plan(sys.argv[1], "me/x", own_card=True)
Path(sys.argv[1], "notes.txt").unlink()
try:
    push(planned)
except EdgeDiTError as error:
    print(error)
"""


def test_a_file_that_goes_away_before_it_is_pushed_is_named(hub, folder, run_with_hub):
    (folder / "notes.txt").write_text("x")
    assert f"{folder / 'notes.txt'} went away" in run_with_hub(LATE, folder)
    assert not hub.requests("POST .*/commit/")
