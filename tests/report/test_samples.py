"""The images that the page of a report compares: of the same seeds, in bounded size."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.records import Model
from edgedit_hf.report.samples import PIXELS, SAMPLES, SIDE, Samples, caption_samples, class_samples, compared
from edgedit_hf.schema import check


def tiles(found: dict, model: int) -> list[np.ndarray]:
    """The images of a sprite."""
    group = found["groups"][found["models"][model]["group"]]
    sprite = np.asarray(
        Image.open(
            io.BytesIO(base64.b64decode(found["models"][model]["sprite"].removeprefix("data:image/png;base64,")))
        )
    )
    width, height = group["tile"]
    corners = [divmod(index, group["columns"]) for index in range(len(group["words"]))]
    return [sprite[y * height : (y + 1) * height, x * width : (x + 1) * width] for y, x in corners]


def samples(name: str, images: np.ndarray, key: str = "same") -> Samples:
    return Samples(name, "class", [str(i % 3) for i in range(len(images))], images, key)


def test_sprites_hold_the_images_pixel_for_pixel_and_only_what_shares_its_seeds_is_compared():
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (7, 5, 6, 1), np.uint8), rng.integers(0, 256, (9, 4, 4, 3), np.uint8)
    found = compared(
        [
            samples("a", grey),
            samples("x", colour, "other"),
            samples("b", grey[::-1]),
            samples("alone", grey, "its own"),
            samples("y", colour[:8], "other"),
        ]
    )
    assert [(model["name"], model["group"]) for model in found["models"]] == [("a", 0), ("b", 0), ("x", 1), ("y", 1)]
    assert [group["tile"] for group in found["groups"]] == [[6, 5], [4, 4]]
    assert found["groups"][0]["words"] == ["0", "1", "2", "0", "1", "2", "0"]
    assert len(found["groups"][1]["words"]) == 8  # what both have
    for place, (shown, wanted) in enumerate(zip(tiles(found, 1), grey[::-1], strict=True)):
        assert (shown == wanted[..., 0]).all(), place
    assert all((shown == wanted).all() for shown, wanted in zip(tiles(found, 2), colour[:8], strict=True))
    assert found["bytes"] == sum(len(model["sprite"]) for model in found["models"])
    assert compared([samples("a", grey), samples("b", grey, "other")]) is None and compared([]) is None


def test_large_images_are_few_and_shrunk():
    images = np.zeros((SAMPLES, 512, 1024, 3), np.uint8)
    images[:, :, 512:] = 255
    found = compared([samples(name, images) for name in "abcdef"])
    (group,) = found["groups"]
    assert group["tile"] == [SIDE, SIDE // 2] and group["of"] == [1024, 512]
    count = len(group["words"])
    assert 2 <= count and 6 * count * SIDE * SIDE // 2 <= PIXELS
    assert tiles(found, 0)[1][10, 10].tolist() == [0, 0, 0] and tiles(found, 0)[1][10, -10].tolist() == [255] * 3


def run_of(folder, **models) -> dict:
    """A run whose models of these images were judged, and its report."""
    (folder / "evaluate").mkdir()
    for name, images in models.items():
        save_file({"images": images}, folder / "evaluate" / f"{name}.safetensors")
    return {"seed": 0, "models": [{"name": name, "folder": name} for name in models]}


def test_classes_have_their_names(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), np.uint8)
    report = run_of(tmp_path, teacher=images, student=images[:30])
    first, second = class_samples(tmp_path, report)
    assert first.kind == "image" and first.key == second.key and len(first.images) == SAMPLES
    (tmp_path / "student" / "transformer").mkdir(parents=True)
    (tmp_path / "student" / "transformer" / "config.json").write_text('{"num_classes": 3}')
    index = {"id2label": {"0": "</script>", "2": "a dog"}}
    (tmp_path / "student" / "model_index.json").write_text(json.dumps(index))
    first, second = class_samples(tmp_path, report)
    assert first.kind == "class" and list(first.words[:4]) == ["</script>", "1", "a dog", "</script>"]
    assert (second.images == images[:30].transpose(0, 2, 3, 1)).all() and second.name == "student, before tuning"
    (tmp_path / "evaluate" / "stage.json").write_text('{"seed": 1}')
    assert class_samples(tmp_path, report)[0].key != first.key  # other noise


def test_a_model_is_called_what_a_file_can_be():
    for name in ("../evaluate/teacher", "/tmp/teacher", "..", ""):
        with pytest.raises(EdgeDiTError, match="name is"):
            check({"name": name}, Model)


@pytest.mark.parametrize(
    ("images", "what"),
    [
        (np.zeros((4, 2, 8, 8), np.uint8), r"U8 of shape \[4, 2, 8, 8\]"),
        (np.zeros((4, 1, 8, 8), np.float32), r"F32 of shape \[4, 1, 8, 8\]"),
        (np.zeros((0, 1, 8, 8), np.uint8), r"U8 of shape \[0, 1, 8, 8\]"),
        (np.array(7, np.uint8), r"U8 of shape \[\]"),
    ],
)
def test_images_of_another_form_name_their_stage(tmp_path, images, what):
    with pytest.raises(EdgeDiTError, match=f"{what}; expected .*stage evaluate"):
        class_samples(tmp_path, run_of(tmp_path, teacher=images))


def test_damaged_images_name_their_stage(tmp_path):
    report = run_of(tmp_path, teacher=np.zeros((4, 1, 8, 8), np.uint8))
    (tmp_path / "evaluate" / "teacher.safetensors").write_bytes(b"nothing")
    with pytest.raises(EdgeDiTError, match="teacher.safetensors cannot be read .* stage evaluate"):
        class_samples(tmp_path, report)


def test_captions_of_every_width_with_many_steps_and_few(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8)
    captions = ["a <b>three</b>", "a seven", "a one", "a two"]
    for folder, names in (("evaluate", ("tiny", "full")), ("evaluate-few-step", ("tiny", "tiny-few-steps"))):
        (tmp_path / folder).mkdir()
        for name in names:
            save_file({"captions": images, "held_out": images}, tmp_path / folder / f"{name}.safetensors")
    report = {"seed": 0, "models": [{"name": "tiny", "steps": 20}, {"name": "full", "steps": 20}]}
    assert caption_samples(tmp_path, report) == []
    (tmp_path / "evaluate" / "captions.json").write_text(json.dumps({"captions": captions, "shown": 2}))
    width = {
        "name": "tiny",
        "many": report["models"][0],
        "few": {"name": "tiny-few-steps", "solver": "Euler", "steps": 4},
        "few_step": {"name": "tiny", "steps": 4},
    }
    found = caption_samples(tmp_path, {**report, "few_step": {"widths": [width]}})
    assert [each.name for each in found] == ["tiny", "full", "tiny, Euler (4 steps)", "tiny, distilled (4 steps)"]
    assert len({each.key for each in found}) == 1 and list(found[0].words) == captions
    given = {**width, "many": {"name": "tiny-many-steps", "steps": 20}}
    save_file({"captions": images}, tmp_path / "evaluate-few-step" / "tiny-many-steps.safetensors")
    names = [each.name for each in caption_samples(tmp_path, {**report, "few_step": {"widths": [given]}})]
    assert "tiny, its source (20 steps)" in names
