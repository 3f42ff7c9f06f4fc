"""Exports that were received, damaged or asked for something that cannot be; int8 files row by row."""

import copy
import functools
import json
import operator
import shutil
import subprocess
import sys

import onnx
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from edgedit_hf import EdgeDiTPipeline, OnnxEdgeDiTTransformer2DModel
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export import sample_min
from edgedit_hf.export.components import COMPONENTS
from edgedit_hf.export.exported import ExportedComponent
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.export.schedule import linear_schedule
from edgedit_hf.files import file_sha256


@pytest.fixture(scope="module")
def pipeline(make_transformer):
    model = make_transformer(num_layers=2, hidden_size=64, num_attention_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.25)
    return EdgeDiTPipeline(
        model, DDIMScheduler(prediction_type="epsilon", clip_sample=False), default_steps=4, default_guidance_scale=1.5
    )


@pytest.fixture(scope="module")
def export(pipeline, tmp_path_factory):
    """`export(**options)`: an ONNX export of the pipeline, made once for the same options."""
    made = {}

    def make(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            output = tmp_path_factory.mktemp("export") / "out"
            rough = {"tolerance": 1.0, "min_psnr_db": 1.0} if options.get("dtype") == "int8" else {}
            made[key] = export_pipeline(
                pipeline,
                output,
                ExportOptions(threads=1, bench_batches=(2,), bench_repeats=2, num_images=2, **rough, **options),
            )
        return made[key]

    return make


@pytest.fixture
def received(export, tmp_path):
    """A copy of an fp32 export."""
    shutil.copytree(export(), tmp_path / "received")
    return tmp_path / "received"


# -------------------------------------------------------------------- rows of a batch


def rows(count: int):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(count, 1, 8, 8, generator=generator) * torch.linspace(0.5, 3, count).view(-1, 1, 1, 1)
    return sample, torch.tensor([999.0, 10.0, 400.0, 999.0, 700.0, 11.0][:count]), torch.arange(count)


def one_at_a_time(artefact, sample, times, labels, copies: int = 1, modulation=None):
    """Each row in a call of its own, as often as a fixed batch wants it."""
    found = []
    for row in range(len(sample)):
        given = {} if modulation is None else {"modulation": modulation[row : row + 1]}
        found.append(
            artefact(
                sample[row : row + 1].expand(copies, -1, -1, -1), times[row], labels[row].expand(copies), **given
            ).sample[:1]
        )
    return torch.cat(found)


@pytest.mark.parametrize("options, copies", [({}, 1), ({"split_conditioner": True}, 1), ({"batch": 2}, 2)])
def test_rows_of_different_timesteps_have_their_own_scales(export, options, copies, tmp_path):
    folder = export(dtype="int8", activations="by-timestep", **options)
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", num_threads=1)
    sample, times, labels = rows(6)
    # A conditioner's activations are dynamic.
    modulation = artefact._condition(times, labels) if artefact.split else None
    expected = one_at_a_time(artefact, sample, times, labels, copies, modulation)
    torch.testing.assert_close(
        artefact(sample, times, labels, modulation=modulation).sample, expected, rtol=1e-4, atol=1e-5
    )
    assert len(json.loads(artefact.sessions["denoiser"].metadata["timestep_edges"])) == 3
    # the file alone takes the first row's scales for all, and one of an older export does not say that it has several
    if not options:
        together = artefact.run("denoiser", {"sample": sample, "timestep": times, "class_labels": labels})[0]
        assert (together - expected).abs().max() > 1e-3
        shutil.copytree(folder / "transformer", tmp_path / "older")
        proto = onnx.load(folder / "transformer" / "onnx" / "model.onnx")
        kept = [
            entry
            for entry in proto.metadata_props
            if entry.key not in ("edgedit.timestep_edges", "edgedit.activations")
        ]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
        onnx.save(proto, tmp_path / "older" / "onnx" / "model.onnx")
        older = OnnxEdgeDiTTransformer2DModel.from_pretrained(tmp_path / "older", num_threads=1)
        torch.testing.assert_close(older(sample, times, labels).sample, expected, rtol=1e-4, atol=1e-5)


def test_static_activations_make_no_row_depend_on_its_batch(export):
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(
        export(dtype="int8", activations="static"), subfolder="transformer", num_threads=1
    )
    sample, times, labels = rows(6)
    torch.testing.assert_close(
        artefact(sample, times, labels).sample, one_at_a_time(artefact, sample, times, labels), rtol=1e-4, atol=1e-5
    )


def test_sample_min_refuses_them(export):
    contract = json.loads((export(dtype="int8", activations="by-timestep") / "contract.json").read_text())
    artefacts = sample_min.Artefacts(contract, lambda key: pytest.fail("it ran"))
    sample, times, labels = (value.numpy() for value in rows(2))
    with pytest.raises(SystemExit, match=r"timesteps \[10.0, 999.0\].*must share one"):
        artefacts("denoiser", sample=sample, timestep=times, class_labels=labels)


# -------------------------------------------------------------------- received folders


def test_an_export_says_which_file_was_changed(received):
    DiffusionPipeline.from_pretrained(received)
    file = received / "transformer" / "onnx" / "model.onnx"
    listed = json.loads((received / "contract.json").read_text())["files"]["transformer/onnx/model.onnx"]["sha256"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        EdgeDiTError, match=rf"model.onnx has the SHA-256 {file_sha256(file)}, but .*contract.json says {listed}"
    ):
        OnnxEdgeDiTTransformer2DModel.from_pretrained(received / "transformer")
    checked = subprocess.run([sys.executable, received / "sample_min.py", "--check"], capture_output=True, text=True)
    assert (
        checked.returncode == 1
        and f"FAIL  transformer/onnx/model.onnx has the SHA-256 {file_sha256(file)}" in checked.stdout
    )
    (received / "contract.json").write_text('{"files": 3}')
    with pytest.raises(EdgeDiTError, match="contract.json does not describe an export's list of files"):
        OnnxEdgeDiTTransformer2DModel.from_pretrained(received / "transformer")


def test_a_missing_file_of_the_list_is_named(received):
    contract = json.loads((received / "contract.json").read_text())
    contract["files"]["transformer/onnx/conditioner.onnx"] = {"bytes": 1, "sha256": "0"}
    contract["files"]["../../secret"] = contract["files"]["transformer/../../secret"] = {"bytes": 1, "sha256": "0"}
    (received / "contract.json").write_text(json.dumps(contract))
    with pytest.raises(EdgeDiTError, match="conditioner.onnx is missing"):
        OnnxEdgeDiTTransformer2DModel.from_pretrained(received / "transformer")


@pytest.mark.parametrize("place", ["onnx/notes.txt", "onnx/deeper"])
def test_saving_follows_no_link_out_of_the_folder(received, tmp_path, place):
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(received / "transformer")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (received / "transformer" / place).symlink_to(tmp_path / "secret" / ("key" if place.endswith("txt") else ""))
    with pytest.raises(EdgeDiTError, match="is a link to .*secret.*not copied"):
        artefact.save_pretrained(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").rglob("*") if path.is_file() and path.name != "config.json"]
    assert {cls.save_pretrained for cls in COMPONENTS.values()} == {ExportedComponent.save_pretrained}


def test_the_hubs_cache_is_links_that_are_followed(received, make_hub_cache, tmp_path):
    cache = make_hub_cache(received, "acme/export")
    loaded = DiffusionPipeline.from_pretrained("acme/export", cache_dir=cache, local_files_only=True)
    loaded.save_pretrained(tmp_path / "saved")
    assert file_sha256(tmp_path / "saved" / "transformer" / "onnx" / "model.onnx") == file_sha256(
        received / "transformer" / "onnx" / "model.onnx"
    )
    (blob,) = [link.resolve() for link in cache.glob("models--acme--export/snapshots/*/transformer/onnx/model.onnx")]
    blob.unlink()
    blob.symlink_to("/etc/hostname")
    with pytest.raises(EdgeDiTError, match="is a link to /etc/hostname"):
        loaded.transformer.save_pretrained(tmp_path / "again")


# -------------------------------------------------------------------- the command line of sample_min


def test_sample_min_ends_in_one_line(received, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"\x89PNG mine")
    (tmp_path / "link.png").symlink_to(received / "contract.json")
    (tmp_path / "ids.json").write_text("{")
    before = {path: path.read_bytes() for path in (*received.rglob("*"), tmp_path / "mine.png") if path.is_file()}

    def run(*arguments, code=2, **options):
        command = [sys.executable, received / "sample_min.py", *map(str, arguments)]
        done = subprocess.run(command, capture_output="stdout" not in options, text=True, cwd=tmp_path, **options)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done

    for output in (
        "",
        ".",
        "no/such/place.png",
        "mine.png",
        "link.png",
        received / "contract.json",
        received / "transformer/onnx/model.onnx",
        "x" * 300,
    ):
        assert len(run("--reference", "--output", output).stderr.splitlines()) == 1
    for arguments in (
        "--seed -1",
        f"--seed {2**64}",
        "--seed nan",
        "--label 11",
        "--label -1",
        "--prompt x",
        "--token-ids ids.json",
    ):
        assert run(*arguments.split()).stderr.splitlines()[-1].startswith("sample_min.py: ")
    assert {path: path.read_bytes() for path in before} == before and not (tmp_path / "image.png").exists()
    for _ in range(2):  # its own image may be replaced
        run("--reference", code=0)
    with open("/dev/full", "w") as full:
        assert "No space" in run("--reference", stdout=full, stderr=subprocess.PIPE).stderr
    (received / "reference.safetensors").write_bytes(b"short")
    assert "reference.safetensors is damaged" in run("--reference").stderr
    contract = json.loads((received / "contract.json").read_text())
    contract["artefacts"]["denoiser"]["file"] = "../transformer/onnx/model.onnx"
    (received / "contract.json").write_text(json.dumps(contract))
    assert "not in this folder" in run("--reference").stderr


PLACES = [
    "format",
    "files sample_min.py",
    "artefacts denoiser inputs",
    "schedule steps",
    "guidance rows",
    "reference file",
    "labels count",
    "noise generator",
    "contract_version",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_contract_is_read_by_its_form(received, place):
    contract, keys = json.loads((received / "contract.json").read_text()), place.split()
    assert sample_min.misfit(contract, sample_min.CONTRACT) is None
    for value in (None, [1], {"a": 1}, float("nan"), True):
        changed = copy.deepcopy(contract)
        functools.reduce(operator.getitem, keys[:-1], changed)[keys[-1]] = value
        assert ": ".join(["contract.json", *keys]) in sample_min.misfit(changed, sample_min.CONTRACT)
    if keys[0] != "files":  # whichever files it lists
        del functools.reduce(operator.getitem, keys[:-1], changed)[keys[-1]]
        assert (
            sample_min.misfit(changed, sample_min.CONTRACT)
            == f"{': '.join(['contract.json', *keys[:-1]])} lacks {keys[-1]}"
        )


def test_token_ids_have_one_shape(tmp_path):
    encoders = [{"tokenizer": {"vocabulary": 10}}, {"tokenizer": None}]
    (tmp_path / "ids.json").write_text("[[[1, 2]], null]")
    assert sample_min.read_windows(tmp_path / "ids.json", encoders) == [[[1, 2]], None]
    for text in (
        "[]",
        "[[[1, 2]]]",
        "[[[10]], null]",
        "[[[-1]], null]",
        "[[[true]], null]",
        "[[1], null]",
        "[[[]], null]",
        '{"a": 1}',
        "[[[NaN]], null]",
    ):
        (tmp_path / "ids.json").write_text(text)
        with pytest.raises(SystemExit, match="must hold"):
            sample_min.read_windows(tmp_path / "ids.json", encoders)


# -------------------------------------------------------------------- schedules


def test_one_step_that_is_stretched_is_refused_by_name(make_transformer, tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    scheduler.set_timesteps(1)
    with pytest.raises(EdgeDiTError, match="shift_terminal=0.1 has .* not finite for 1 step.*two steps"):
        linear_schedule(scheduler)
    scheduler.set_timesteps(2)
    assert len(linear_schedule(scheduler).steps) == 2
    model = make_transformer(num_layers=1, prediction_type="flow_prediction")
    pipeline = EdgeDiTPipeline(model, FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), default_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("it computed something first"))
        with pytest.raises(EdgeDiTError, match="shift_terminal"):
            export_pipeline(pipeline, tmp_path / "out")
