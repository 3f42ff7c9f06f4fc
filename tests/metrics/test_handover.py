"""Hand-over folders: read again as the judges' own scripts read them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics.handover import check_layout, read_prompts, write_handover

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]


@pytest.fixture
def prompts(tmp_path):
    """`prompts(lines, suffix)`: what is read of a file with these lines."""

    def read(lines: list, suffix: str = ".jsonl"):
        path = tmp_path / f"prompts{suffix}"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return read_prompts(path)

    return read


def image_of(number: int) -> torch.Tensor:
    return torch.full((3, 6, 6), number, dtype=torch.uint8)


def values(path) -> list[int]:
    return sorted(set(np.asarray(Image.open(path)).ravel().tolist()))


def test_prompt_files_of_every_kind(prompts):
    assert [p[:2] for p in prompts(["a thin one", "", " a thick seven "], ".txt")] == [
        ("00000", "a thin one"),
        ("00001", "a thick seven"),
    ]
    read = prompts([{"id": "COCOval2014000000000042", "text": "a cat"}, {"id": 7, "prompt": "a dog"}])
    assert [p[:2] for p in read] == [("COCOval2014000000000042", "a cat"), ("7", "a dog")]
    assert [p.line for p in prompts(GENEVAL)] == GENEVAL


def test_prompts_are_cut_at_line_breaks_alone(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two\x85"}, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert [p.text for p in read_prompts(path)] == ["one\u2028two"]
    path = tmp_path / "prompts.txt"
    path.write_text("a\x0bb\u2029c\nd\n", encoding="utf-8-sig")
    assert [p.text for p in read_prompts(path)] == ["a\x0bb\u2029c", "d"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON"),
        ([{"prompt": "a"}, ["b"]], "line 2 has no prompt"),
        ([{"prompt": 5}], "line 1 has no prompt"),
        ([{"prompt": "  "}], "line 1 has no prompt"),
        ([{"prompt": "a", "id": "../../x"}], r"line 1 has the id '../../x', which no file can be called after"),
        ([{"prompt": "a", "id": "猫" * 90}], "which no file can be called after; use .*, 200 bytes at most"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], "has the id '1' twice"),
        ([""], "has no prompt; write one a line"),
    ],
)
def test_bad_prompt_files_are_refused(prompts, lines, message):
    with pytest.raises(EdgeDiTError, match=message):
        prompts(lines)


def test_a_prompt_file_that_is_no_text(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\xfa")
    for name in ("prompts.txt", "nothing.txt"):
        with pytest.raises(EdgeDiTError, match=rf"The file .*{name} cannot be read"):
            read_prompts(tmp_path / name)


def test_geneval(prompts, tmp_path):
    write_handover(tmp_path / "out", "geneval", prompts(GENEVAL), 4, image_of)
    found = {}
    for folder in (tmp_path / "out").iterdir():  # as evaluation/evaluate_images.py goes through them
        if folder.is_dir() and folder.name.isdigit():
            metadata = json.loads((folder / "metadata.jsonl").read_text())
            images = {path.name: values(path) for path in (folder / "samples").iterdir()}
            assert all(re.match(r"\d+\.png", name) for name in images)
            found[metadata["prompt"]] = metadata, images
    assert [metadata for metadata, _ in found.values()] and {p: m for p, (m, _) in found.items()} == {
        line["prompt"]: line for line in GENEVAL
    }
    assert found["a photo of two cows"][1] == {"0000.png": [1], "0001.png": [3]}
    listed = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert listed[1]["images"] == ["00001/samples/0000.png", "00001/samples/0001.png"]


@pytest.mark.parametrize("each", [1, 3, 4])
def test_dpg_bench(prompts, tmp_path, each):
    items = prompts([{"id": "countbench5", "text": "five"}, {"id": "posescript40", "text": "a pose"}])
    command = write_handover(tmp_path / "out", "dpg", items, 2 * each, image_of)
    said = dict(zip(*[iter(command.split()[3:])] * 2))
    assert said["--image-root-path"] == str(tmp_path / "out" / "images")
    side, pictures = int(said["--resolution"]), int(said["--pic-num"])
    names = {path.name.split(".")[0]: path for path in (tmp_path / "out" / "images").iterdir()}
    assert set(names) == {"countbench5", "posescript40"}
    whole = Image.open(names["posescript40"])
    assert whole.size == ((6, 6) if each == 1 else (12, 12)) and pictures == each
    # The crops of compute_dpg_bench.py, in its order.
    for k, (left, top) in enumerate([(0, 0), (side, 0), (0, side), (side, side)][:pictures]):
        assert set(np.asarray(whole.crop((left, top, left + side, top + side))).ravel()) == {2 * k + 1}


def test_dpg_bench_cuts_squares(prompts, tmp_path):
    with pytest.raises(EdgeDiTError, match="cuts squares out of files, but images are 6 × 4"):
        write_handover(tmp_path / "out", "dpg", prompts(["a cat"], ".txt"), 1, lambda number: image_of(number)[:, :4])
    assert not (tmp_path / "out").exists()


def test_hpsv3(prompts, tmp_path):
    said = write_handover(tmp_path / "out", "hpsv3", prompts(["a cat", "a dog"], ".txt"), 4, image_of)
    assert "reward(prompts=prompts, image_paths=paths)" in said
    listed = json.loads((tmp_path / "out" / "hpsv3.json").read_text())
    assert [(row["prompt"], values(tmp_path / "out" / row["path"])) for row in listed] == [
        ("a cat", [0]),
        ("a cat", [2]),
        ("a dog", [1]),
        ("a dog", [3]),
    ]


def test_what_a_judge_could_not_use_is_refused(prompts):
    plain, items = prompts(["a cat", "a dog"], ".txt"), prompts(GENEVAL)
    for layout, given, count, message in (
        ("pick", plain, 2, "The layout 'pick' does not exist; it must be one of geneval, dpg, hpsv3"),
        ("hpsv3", plain, 3, "3 images are no multiple of 2 prompts"),
        ("geneval", plain, 2, "'a cat' has no 'tag'"),
        ("dpg", items, 10, "5 images a prompt, but DPG-Bench looks at 4"),
        ("dpg", prompts([{"id": "a.b", "text": "a"}]), 1, "up to its first dot, but one is 'a.b'"),
        ("dpg", [], 10, "A folder for dpg holds images of prompts; give a file"),
    ):
        with pytest.raises(EdgeDiTError, match=message):
            check_layout(layout, given, count)
