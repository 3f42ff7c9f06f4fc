"""The port contract: sample_min.py makes the pipeline's images without this package, and contract.json says what it
needs.
"""

import ast
import json
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.numpy import load_file
from text_pipelines import elastic, tiny_vae

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_few_step_scheduler, make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export import sample_min
from edgedit_hf.export.contract import Artefact, _porting, run_part, write_contract
from edgedit_hf.export.onnx.lower import lower_onnx
from edgedit_hf.export.parts import pipeline_parts
from edgedit_hf.files import file_sha256
from edgedit_hf.pipelines.loading import with_components

ALONE = """
import runpy, sys

sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None: importing it fails
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OURS = "edgedit_hf,diffusers,transformers,safetensors,PIL"


@pytest.fixture(scope="module")
def alone(run_python):
    """`alone(folder, *arguments)`: run an export's sample_min.py where neither this package nor torch can be
    imported.
    """

    def run(folder: Path, *arguments, blocked: str = f"{OURS},torch", expect: int = 0) -> str:
        return run_python(ALONE, blocked, folder / "sample_min.py", *arguments, expect=expect)

    return run


def edgedit(make_transformer, vae=None, scheduler=None, **config) -> EdgeDiTPipeline:
    options = {name: config.pop(name) for name in ("default_guidance_scale", "guidance_channels") if name in config}
    transformer = make_transformer(num_layers=1, **config)
    scheduler = make_scheduler(transformer.config.prediction_type) if scheduler is None else scheduler
    return EdgeDiTPipeline(transformer, scheduler, vae, default_steps=4, **options)


def video_vae():
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 1.5, 2.0]}
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **statistics
    ).eval()


def contract_of(folder, pipeline, *, split=False, batch=2, open_sizes=(), **options):
    """The contract of an export whose files nobody has lowered: the eager parts stand in for them, as for Core ML
    here.
    """
    artefacts = [
        Artefact(part, f"{part.component}/{part.name}", "fp32", open_sizes)
        for part in pipeline_parts(pipeline, split=split, batch=batch)
    ]
    for artefact in artefacts:
        (folder / artefact.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / artefact.file).write_bytes(b"a stand-in")
    options = {"format": "coreml", "precision": "fp32", "prompt": "a 3", **options}
    return write_contract(folder, pipeline, artefacts, split=split, **options), artefacts


def eager(contract, artefacts) -> sample_min.Artefacts:
    """The eager parts as sample_min's files."""
    by_key = {artefact.key: artefact for artefact in artefacts}

    def opener(key):
        artefact = by_key[key]
        return lambda arrays: list(run_part(artefact, dict(zip(artefact.inputs, arrays))).values())

    return sample_min.Artefacts(contract, opener)


def pipeline_image(pipeline, noise: np.ndarray, what=None) -> np.ndarray:
    """uint8 image (H, W, channels) of the eager pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, EdgeDiTPipeline):
        what = {"class_labels": what} if pipeline.transformer.config.num_classes else {"batch_size": 1}
    else:
        what = {"prompt": what} if isinstance(what, str) else {"prompt_embeds": [None] * 2}
    image = pipeline(**what, latents=torch.from_numpy(noise.copy()), output_type="np").images[0]
    return (image * 255).round().astype(np.uint8)


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape and expected.std() > 5, "a blank image would prove nothing"
    return float(10 * np.log10(255**2 / max(np.mean((found.astype(float) - expected.astype(float)) ** 2), 1e-10)))


# -------------------------------------------------------------------- a real export


def lowered(folder: Path, pipeline, *, split: bool, prompt: str = "a 3"):
    """An export in ONNX of open batch."""
    import onnxruntime

    artefacts = []
    for part in pipeline_parts(pipeline, split=split):
        stem = {"denoiser": "model", "text_encoder": "model"}.get(part.name, part.name)
        artefacts.append(Artefact(part, f"{part.component}/onnx/{stem}.onnx", "fp32", ("batch",)))
        (folder / artefacts[-1].file).parent.mkdir(parents=True, exist_ok=True)
        lower_onnx(part, folder / artefacts[-1].file, "fp32", {}, open_sizes=("batch",))

    def run(artefact, inputs):
        session = onnxruntime.InferenceSession(str(folder / artefact.file))
        return dict(zip(artefact.part.outputs, session.run(None, inputs)))

    return write_contract(
        folder,
        pipeline,
        artefacts,
        format="onnx",
        precision="fp32",
        split=split,
        seed=3,
        label=0,
        prompt=prompt,
        run=run,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, make_transformer):
    """(folder, pipeline, contract) of a split EdgeDiT with a learned variance."""
    folder, pipeline = tmp_path_factory.mktemp("exported"), edgedit(make_transformer, learn_sigma=True)
    return folder, pipeline, lowered(folder, pipeline, split=True)


def test_sample_min_makes_the_pipelines_image_alone(exported, alone, tmp_path):
    folder, pipeline, _ = exported
    printed = alone(folder, "--check")
    assert printed.count("ok  ") == 6 and "FAIL" not in printed
    noise = load_file(folder / "reference.safetensors")["noise"]
    assert alone(folder, "--reference", "--label", 3, "--output", tmp_path / "3.png").strip() == str(tmp_path / "3.png")
    image = np.asarray(Image.open(tmp_path / "3.png"))[..., None]
    assert psnr(image, pipeline_image(pipeline, noise, 3)) >= 50
    assert psnr(image, pipeline_image(pipeline, noise, 4)) < 30  # the label matters


def test_a_damaged_export_fails_the_check(exported, alone, tmp_path):
    folder, _, contract = exported
    (tmp_path / "transformer").symlink_to(folder / "transformer")
    (tmp_path / "sample_min.py").write_bytes((folder / "sample_min.py").read_bytes())
    (tmp_path / "reference.safetensors").write_bytes((folder / "reference.safetensors").read_bytes())
    contract = json.loads((folder / "contract.json").read_text())
    contract["guidance"]["scale"] += 0.5
    (tmp_path / "contract.json").write_text(json.dumps(contract))
    printed = alone(tmp_path, "--check", expect=1)
    assert printed.count("FAIL") >= 3 and "ok    denoiser.outputs.prediction" in printed


def test_the_contract_says_what_an_app_needs(exported):
    folder, pipeline, contract = exported
    assert json.loads((folder / "contract.json").read_text()) == contract
    assert [call["artefact"] for call in contract["order"]] == ["conditioner", "denoiser"]
    sample, modulation = contract["artefacts"]["denoiser"]["inputs"]
    assert (
        sample["shape"] == ["batch", 1, 8, 8]
        and sample["axes"] == ["batch", "channels", "height", "width"]
        and sample["dtype"] == "float32"
    )
    assert modulation["shape"] == ["batch", 8, 32]
    assert (
        contract["artefacts"]["denoiser"]["outputs"][0]["shape"] == ["batch", 2, 8, 8]
        and contract["variance_channels"] == 1
    )
    assert [tensor["dtype"] for tensor in contract["artefacts"]["conditioner"]["inputs"]] == ["float32", "int64"]
    assert contract["labels"] == {"count": 10, "null": 10, "names": None} and contract["guidance"]["scale"] == 4.0
    assert len(contract["schedule"]["steps"]) == 4 and contract["schedule"]["scheduler"] == "DDIMScheduler"
    assert (
        contract["genotype"] is not None
        and contract["versions"]["onnxruntime"]
        and contract["model"]["patch_size"] == 2
    )
    names = {
        "reference.safetensors",
        "sample_min.py",
        "transformer/onnx/model.onnx",
        "transformer/onnx/conditioner.onnx",
    }
    assert set(contract["files"]) == names
    assert all(entry["sha256"] == file_sha256(folder / name) for name, entry in contract["files"].items())
    text = (folder / "PORTING.md").read_text()
    assert "Not run: " in text and "adb push" in text and "null class 10" in text and "learned variance" in text


def test_names_of_others_stay_text_in_porting(exported):
    contract, hostile = exported[2], "](javascript:x)|<b>`c`\n---\n# title\n```\n[x]: http://evil"

    def structure(text: str) -> list[str]:
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
        return [
            token.type
            for block in tokens
            for token in (block, *(block.children or []))
            if token.type not in ("text", "softbreak", "text_special")
        ]

    foreign = json.loads(json.dumps(contract))
    foreign["versions"] = dict.fromkeys(foreign["versions"], hostile)
    foreign["schedule"]["scheduler"] = foreign["reference"]["made_by"] = hostile
    for artefact in foreign["artefacts"].values():
        artefact["precision"] = hostile
        for tensor in (*artefact["inputs"], *artefact["outputs"]):
            tensor["name"] = hostile
    assert structure(_porting(foreign)) == structure(_porting(contract))


def test_sample_min_reads_safetensors_and_writes_png(exported, tmp_path):
    found, expected = (
        sample_min.read_safetensors(exported[0] / "reference.safetensors"),
        load_file(exported[0] / "reference.safetensors"),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
    for channels in (1, 3, 4):
        image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        sample_min.write_png(tmp_path / "image.png", image)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")).reshape(image.shape), image)


def test_sample_min_imports_nothing_of_ours():
    allowed = {"numpy", "onnxruntime", "executorch", "coremltools", "tokenizers", "torch"} | sys.stdlib_module_names
    found = {name for node in ast.walk(ast.parse(Path(sample_min.__file__).read_text())) for name in _imported(node)}
    assert found <= allowed and not {"edgedit_hf", ""} & found


def _imported(node) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").split(".")[0] if node.level == 0 else ""]
    return [alias.name.split(".")[0] for alias in node.names] if isinstance(node, ast.Import) else []


# -------------------------------------------------------------------- the loop against the pipelines


@pytest.mark.parametrize(
    "batch, open_sizes, split", [(1, (), False), (2, (), True), (3, (), True), (2, ("batch",), False)]
)
def test_any_batch_makes_the_same_image(make_transformer, tmp_path, batch, open_sizes, split):
    pipeline = edgedit(make_transformer)
    contract, artefacts = contract_of(tmp_path, pipeline, split=split, batch=batch, open_sizes=open_sizes, label=7)
    reference = load_file(tmp_path / "reference.safetensors")
    assert psnr(reference["loop.image"], pipeline_image(pipeline, reference["noise"], 7)) >= 50
    rows = 2 if open_sizes else batch  # two, in as many runs as a fixed batch takes
    assert reference["denoiser.inputs.sample"].shape[0] == rows
    assert contract["artefacts"]["denoiser"]["inputs"][0]["shape"][0] == ("batch" if open_sizes else batch)
    assert sample_min.check(
        contract, eager(contract, artefacts), sample_min.read_safetensors(tmp_path / "reference.safetensors")
    )


@pytest.mark.parametrize(
    "config",
    [
        {"num_classes": 0},
        {"in_channels": 4, "learn_sigma": True, "guidance_channels": 3},
        {"default_guidance_scale": 1.0},
        {"prediction_type": "flow_prediction"},
        {"scheduler": diffusers.DPMSolverMultistepScheduler(solver_order=3, thresholding=False)},
        {"scheduler": diffusers.EulerDiscreteScheduler()},
    ],
    ids=["unconditional", "VAE", "unguided", "flow", "multistep", "scaled"],
)
def test_edgedits_of_every_kind(make_transformer, tmp_path, config):
    pipeline = edgedit(make_transformer, tiny_vae() if config.get("in_channels") == 4 else None, **config)
    contract, _ = contract_of(tmp_path, pipeline)
    reference = load_file(tmp_path / "reference.safetensors")
    assert psnr(reference["loop.image"], pipeline_image(pipeline, reference["noise"], 0)) >= 50
    assert ("label" in reference) == (pipeline.transformer.config.num_classes > 0)
    assert contract["guidance"]["rows"] == (
        1 if pipeline.transformer.config.num_classes == 0 or "default_guidance_scale" in config else 2
    )


@pytest.mark.parametrize(
    "first, second, split",
    [
        ("text_encoder", "text_encoder_2", False),
        ("text_encoder", "text_encoder_2", True),
        ("text_encoder", None, True),
        (None, None, False),
    ],
)
def test_prompts_of_every_encoder(tmp_path, first, second, split):
    pipeline = elastic(first is not None, second is not None)
    contract, _ = contract_of(tmp_path, pipeline, split=split)
    reference = load_file(tmp_path / "reference.safetensors")
    assert psnr(reference["loop.image"], pipeline_image(pipeline, reference["noise"], first and "a 3")) >= 50
    assert [encoder["artefact"] for encoder in contract["text"]["encoders"]] == [first, second]


def test_a_video_vae_and_a_shift_by_tokens(tmp_path):
    pipeline = elastic(
        second=False,
        vae=video_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        channels=4,
    )
    contract, artefacts = contract_of(tmp_path, pipeline)
    assert contract["latents"]["multiply"] == [0.5, 1.0, 1.5, 2.0] and contract["latents"]["add"] == [
        0.1,
        -0.2,
        0.3,
        0.0,
    ]
    reference = load_file(tmp_path / "reference.safetensors")
    assert psnr(reference["loop.image"], pipeline_image(pipeline, reference["noise"], "a 3")) >= 50
    assert reference["encoder.inputs.image"].shape == (1, 3, 16, 16)


def few_step(pipeline, timesteps, stochastic=False):
    kind = pipeline.transformer.config.get("prediction_type", "flow_prediction")
    few = {"default_steps": len(timesteps), "default_guidance_scale": 1.0, "few_step_timesteps": timesteps}
    return with_components(pipeline, scheduler=make_few_step_scheduler(kind, stochastic), **few)


@pytest.mark.parametrize(
    "family, timesteps",
    [
        ("epsilon", [800, 600, 400, 200]),
        ("epsilon", [700]),
        ("flow_prediction", [1000, 900, 750, 500]),
        ("elastic", [1000, 900, 750, 500]),
        ("elastic", [1000, 500]),
        ("elastic", [1000]),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_few_steps_without_guidance(make_transformer, tmp_path, family, timesteps, split):
    """One row a forward, the timesteps of the distillation, DDIM's or Euler's coefficients, and clean data at the
    end.
    """
    plain = elastic() if family == "elastic" else edgedit(make_transformer, prediction_type=family)
    pipeline = few_step(plain, timesteps)
    contract, artefacts = contract_of(tmp_path, pipeline, split=split, batch=1, label=7)
    steps, product = contract["schedule"]["steps"], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert contract["guidance"]["rows"] == 1 and contract["schedule"]["num_inference_steps"] == len(timesteps)
    assert [step["timestep"] for step in steps] == pytest.approx(timesteps, abs=1e-3)
    assert contract["artefacts"]["denoiser"]["inputs"][0]["shape"][0] == 1
    assert contract["schedule"]["init_noise_sigma"] == 1.0 and {step["input_scale"] for step in steps} == {1.0}
    levels = [(1 - t / 1000, t / 1000) for t in timesteps]
    if family == "epsilon":
        levels = [(product[t] ** 0.5, (1 - product[t]) ** 0.5) for t in timesteps]
    for index, (alpha, sigma) in enumerate(levels):
        after, rest = (*levels[1:], (1.0, 0.0))[index : index + 1][0]
        of_x, of_m = (after / alpha, rest - after * sigma / alpha) if family == "epsilon" else (1.0, rest - sigma)
        assert dict(steps[index]["x"]) == {index: pytest.approx(of_x, rel=1e-5)}
        assert dict(steps[index]["m"]) == {index: pytest.approx(of_m, rel=1e-5)}
    noise = load_file(tmp_path / "reference.safetensors")["noise"]
    condition = sample_min.conditioning(
        contract,
        eager(contract, artefacts),
        7,
        sample_min.reference_windows(contract, load_file(tmp_path / "reference.safetensors")),
    )
    record = {}
    image = sample_min.sample(contract, eager(contract, artefacts), noise, condition, record)
    what = {"prompt": "a 3"} if family == "elastic" else {"class_labels": 7}
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(**what, latents=torch.from_numpy(noise.copy()), output_type="latent").images.numpy()
    assert np.abs(record["loop.latents"] - expected).max() < 1e-4 * np.abs(expected).max()
    assert psnr(image, pipeline_image(pipeline, noise, "a 3" if family == "elastic" else 7)) >= 50


@pytest.mark.parametrize("family, remedy", [("epsilon", "solver_order=1"), ("elastic", "stochastic_sampling=False")])
def test_few_steps_that_add_noise_are_no_numbers(make_transformer, tmp_path, family, remedy):
    plain = elastic() if family == "elastic" else edgedit(make_transformer)
    with pytest.raises(EdgeDiTError, match=f"it adds noise in every step.*{remedy}"):
        contract_of(tmp_path, few_step(plain, [800, 400], stochastic=True))


@torch.no_grad()
def test_prompts_are_read_as_the_pipeline_reads_them(tmp_path):
    from tokenizers.processors import TemplateProcessing

    pipeline = elastic()
    ending = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    pipeline.tokenizer_2.backend_tokenizer.post_processor = ending
    contract, artefacts = contract_of(tmp_path, pipeline, open_sizes=("batch", "tokens", "tokens_0", "tokens_1"))
    files = eager(contract, artefacts)
    for prompt in ("a 3", "", "a thin slanted seven, twice as long as the window"):
        windows = [sample_min.tokenize(tmp_path, encoder, prompt) for encoder in contract["text"]["encoders"]]
        embeds, masks = pipeline.encode_prompt(prompt)
        for (states, mask), expected, valid in zip(sample_min.encode_text(contract, files, windows), embeds, masks):
            count = int(valid.sum())
            assert mask.sum() == count and not states[0, count:].any()
            np.testing.assert_allclose(states[0, :count], expected[0, :count].numpy(), rtol=1e-4, atol=1e-5)
    assert windows[1][0][-1] == 2 and len(windows[1][0]) == 12 and len(windows[0]) > 1


def test_a_prompt_that_does_not_fit_is_refused(tmp_path):
    contract, artefacts = contract_of(tmp_path, elastic())
    windows = [
        sample_min.tokenize(tmp_path, encoder, "three windows of characters, or two")
        for encoder in contract["text"]["encoders"]
    ]
    with pytest.raises(SystemExit, match="this export takes 16 at most"):
        sample_min.encode_text(contract, eager(contract, artefacts), windows)


def test_a_files_further_input_gets_the_timestep(make_transformer, tmp_path):
    pipeline, seen = edgedit(make_transformer), []
    artefacts = [Artefact(part, part.name, "int8") for part in pipeline_parts(pipeline, split=True)]
    artefacts[-1] = Artefact(artefacts[-1].part, "denoiser", "int8", extra_inputs={"timestep": torch.zeros(2)})

    for artefact in artefacts:
        (tmp_path / artefact.file).write_bytes(b"a stand-in")

    def run(artefact, inputs):
        if artefact.key == "denoiser":
            seen.append(inputs["timestep"].tolist())
        return run_part(artefact, inputs)

    contract = write_contract(tmp_path, pipeline, artefacts, format="onnx", precision="int8", split=True, run=run)
    assert [tensor["name"] for tensor in contract["artefacts"]["denoiser"]["inputs"]] == [
        "sample",
        "modulation",
        "timestep",
    ]
    assert seen == [[step["timestep"]] * 2 for step in contract["schedule"]["steps"]]


# -------------------------------------------------------------------- refusals


def test_what_cannot_be_ported_is_refused(make_transformer, tmp_path):
    with pytest.raises(EdgeDiTError, match="EulerAncestralDiscreteScheduler.*use EulerDiscreteScheduler"):
        contract_of(tmp_path, edgedit(make_transformer, scheduler=diffusers.EulerAncestralDiscreteScheduler()))
    with pytest.raises(EdgeDiTError, match="label is 10, but the model has the classes 0 … 9"):
        contract_of(tmp_path, edgedit(make_transformer), label=10)

    def broken(artefact, inputs):
        return {name: value * np.nan for name, value in run_part(artefact, inputs).items()}

    with pytest.raises(
        EdgeDiTError, match="output prediction of transformer/denoiser holds numbers that are not finite"
    ):
        contract_of(tmp_path, edgedit(make_transformer), run=broken)
    assert not (tmp_path / "contract.json").exists()


# -------------------------------------------------------------------- every part lowered


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("split", [False, True])
def test_text_to_image_alone(alone, tmp_path, split):
    pipeline = elastic(vae=tiny_vae(), channels=4)
    lowered(tmp_path, pipeline, split=split)
    printed = alone(tmp_path, "--check")
    assert printed.count("ok  ") == 9 + split * 3 and "FAIL" not in printed
    noise = load_file(tmp_path / "reference.safetensors")["noise"]
    alone(tmp_path, "--reference", "--prompt", "a 7", "--output", tmp_path / "prompt.png")
    (tmp_path / "ids.json").write_text(
        json.dumps([[[2, *pipeline.tokenizer("a 7").input_ids, 2]], [pipeline.tokenizer_2("a 7").input_ids]])
    )
    alone(
        tmp_path,
        "--reference",
        "--token-ids",
        tmp_path / "ids.json",
        "--output",
        tmp_path / "ids.png",
        blocked=f"{OURS},torch,tokenizers",
    )
    expected = pipeline_image(pipeline, noise, "a 7")
    for name in ("prompt.png", "ids.png"):
        assert psnr(np.asarray(Image.open(tmp_path / name)), expected) >= 50


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("split", [False, True])
def test_executorch_with_a_fixed_batch(make_transformer, alone, tmp_path, split):
    pytest.importorskip("executorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        pipeline, artefacts = edgedit(make_transformer, tiny_vae(), in_channels=4), []
        for part in pipeline_parts(pipeline, split=split):
            artefacts.append(Artefact(part, f"{part.component}/executorch/{part.name}.pte", "fp32"))
            path = tmp_path / artefacts[-1].file
            path.parent.mkdir(parents=True, exist_ok=True)
            program = torch.export.export(part.module, tuple(part.inputs.values()))
            path.write_bytes(
                to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
            )

    def run(artefact, inputs):
        method = Runtime.get().load_program(str(tmp_path / artefact.file)).load_method("forward")
        values = method.execute([torch.from_numpy(value) for value in inputs.values()])
        return {name: value.numpy() for name, value in zip(artefact.part.outputs, values)}

    contract = write_contract(
        tmp_path, pipeline, artefacts, format="executorch", precision="fp32", split=split, run=run
    )
    assert (
        contract["artefacts"]["denoiser"]["inputs"][0]["shape"] == [2, 4, 8, 8]
        and contract["runtime"]["inputs"] == "by position"
    )
    printed = alone(tmp_path, "--check", blocked=OURS)  # ExecuTorch's binding needs torch
    assert "FAIL" not in printed
    noise = load_file(tmp_path / "reference.safetensors")["noise"]
    alone(tmp_path, "--reference", "--label", 5, "--output", tmp_path / "5.png", blocked=OURS)
    assert psnr(np.asarray(Image.open(tmp_path / "5.png")), pipeline_image(pipeline, noise, 5)) >= 50


def test_one_step_of_a_shifted_terminal_is_refused(make_transformer, tmp_path):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    pipeline = EdgeDiTPipeline(make_transformer(prediction_type="flow_prediction"), scheduler, default_steps=1)
    with pytest.raises(EdgeDiTError, match="1 default step.*shift_terminal 0.1"):
        contract_of(tmp_path, pipeline)
