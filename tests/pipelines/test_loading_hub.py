"""Every flavour of pipeline from the Hub, by diffusers' classes and by ours: online, from the cache, offline; the
images are those of the folder, to the bit.
"""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from edgedit_hf import EdgeDiTPipeline, ElasticDiTPipeline, ElasticDiTTransformer2DModel, Genotype, quantize_model
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.models.checkpoints import load_original
from edgedit_hf.pipelines.loading import load_pipeline, load_vae
from edgedit_hf.quantization.layers import quantizable_layers
from edgedit_hf.run.results import pipeline_weights_hash
from edgedit_hf.search_space import SearchSpace


@pytest.fixture
def cached(make_hub_cache, monkeypatch):
    """`cached(folder, "org/name")`: the folder is in the client's cache, which is offline."""

    def make(folder, name):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(make_hub_cache(folder, name)))

    return make


@pytest.fixture
def pipeline(make_transformer):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, layers_per_block=1).eval()
    return EdgeDiTPipeline(make_transformer(num_classes=2), DDIMScheduler(), vae)


def equal(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_by_name_as_by_path(pipeline, tmp_path, cached):
    """Pipelines, in a folder of a repository too; of its parts the VAE, and the transformer as a checkpoint."""
    pipeline.save_pretrained(tmp_path / "all" / "one")
    pipeline.save_pretrained(tmp_path / "all" / "one", variant="fp16")  # a second form of the same weights
    cached(tmp_path / "all", "me/all")
    name = "hf://me/all@main/one"
    loaded = load_pipeline(name)
    assert equal(loaded.transformer, pipeline.transformer) and equal(loaded.vae, pipeline.vae)
    assert loaded.config["_name_or_path"] == name
    assert loaded.transformer.config["_name_or_path"] == f"{name}/transformer"  # no place of this machine is saved
    assert equal(load_vae(f"{name}/vae"), pipeline.vae)
    assert equal(load_original(name), pipeline.transformer)
    shutil.rmtree(tmp_path / "all" / "one")
    pipeline.save_pretrained(tmp_path / "all" / "one")
    assert pipeline_weights_hash(name) == pipeline_weights_hash(tmp_path / "all" / "one") != None  # noqa: E711
    for wrong, said in (
        ("me/all", "There is no pipeline in me/all"),
        ("hf://me/all/two", "There is no pipeline in hf://me/all/two"),
        ("hf://me/all@v1/one", "nor a Hub id that is whole in the cache"),
        ("hf://datasets/me/all", "is a dataset"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            load_pipeline(wrong)


def test_a_bank_by_name_fetches_what_a_student_needs(pipeline, tmp_path, cached):
    teacher = pipeline.transformer
    space = SearchSpace.for_config(teacher.config)
    bank = ProxyBank.create(tmp_path / "bank", teacher, space)
    wanted = [layer for layer in space.proxies() if space.option_of(layer) == "mlp" and len(layer.source) == 1]
    for layer in wanted:
        bank.write_index({bank.key(layer): bank.write_proxy(layer, bank.new_block(layer), {})})
    genotype = Genotype(
        tuple(
            wanted[0] if index == wanted[0].source[0] else layer
            for index, layer in enumerate(Genotype.of(teacher.config).layers)
        ),
        teacher.config.hidden_size,
    )
    student = bank.assemble(genotype)
    cached(tmp_path / "bank", "me/bank")
    named = ProxyBank("me/bank", teacher)
    assert equal(named.assemble(genotype), student)
    gone = next(file for file in named.folder.glob(f"{named.key(wanted[1]).replace('/', '-')}*"))
    gone.unlink()
    assert equal(named.assemble(genotype), student)  # which needs only its own
    with pytest.raises(EdgeDiTError, match="nor a Hub id that is whole in the cache"):
        named.load(wanted[1])


def test_a_pipeline_has_no_subfolder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="subfolder='one'.*give that folder"):
        EdgeDiTPipeline.from_pretrained(tmp_path, subfolder="one")
    with pytest.raises(ValueError, match="subfolder='one'.*give that folder"):
        ElasticDiTPipeline.from_pretrained(tmp_path, subfolder="one")


# -------------------------------------------------------------------- in processes of their own

SAMPLES = """
import json, sys
import edgedit_hf
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

torch.set_num_threads(1)

def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if hasattr(pipeline, "get_label_ids"):
        what = {"class_labels": [0, 1]}
    else:
        what = {"prompt_embeds": [latents.new_ones(2, 3, 16), None]}
    return pipeline(**what, latents=latents, num_inference_steps=3, output_type="pt").images

folders, offline = json.loads(sys.argv[1]), sys.argv[2] == "offline"
for name, (folder, options) in folders.items():
    trust = {"trust_remote_code": True} if "bundled" in name else {}
    expected = images(DiffusionPipeline.from_pretrained(folder, **trust, **options))
    # See docs/hub.md.
    where = hf_hub_download(name, "model_index.json").rpartition("/")[0] if trust and offline else name
    loaded = DiffusionPipeline.from_pretrained(where, **trust, **options)
    assert torch.equal(images(loaded), expected), name
    assert ("diffusers_modules" in type(loaded).__module__) == bool(trust), name
    print(name, type(loaded.transformer).__name__)
    if trust and offline:
        try:
            DiffusionPipeline.from_pretrained(name, **trust)
        except Exception as error:  # diffusers asks the Hub for the commit of remote code, wherever it came from
            print("theirs:", type(error).__name__)

small = edgedit_hf.ElasticDiTPipeline.from_pretrained("me/elastic", subnet="small")
expected = edgedit_hf.ElasticDiTPipeline.from_pretrained(folders["me/elastic"][0], subnet="small")
assert torch.equal(images(small), images(expected)) and small.transformer.config.subnets is None
alone = DiffusionPipeline.from_pretrained("me/small")  # pushed as a pipeline of its own
assert torch.equal(images(alone), images(expected)) and alone.transformer.config.subnets is None
net = edgedit_hf.ElasticDiTTransformer2DModel.from_pretrained("me/elastic", subfolder="transformer", subnet="small")
assert net.hidden_size == small.transformer.hidden_size
old = DiffusionPipeline.from_pretrained("me/edgedit", revision="v1")
assert old.config.default_steps == 7
"""


UPLOAD = """
import json, sys
from edgedit_hf.commands.cli import main
from huggingface_hub import HfApi
for name, folder, tag in json.loads(sys.argv[1]):
    assert main(["push", folder, name, "--own-card"]) == 0
    if tag:
        HfApi().create_tag(name, tag=tag)
assert main(["push", sys.argv[2], "me/small", "--subnet", "small", "--own-card"]) == 0
"""


@pytest.mark.slow
@pytest.mark.export
def test_every_flavour_online_cached_and_offline(pipeline, make_transformer, hub, run_with_hub, tmp_path):
    from edgedit_hf.export.formats import ExportOptions
    from edgedit_hf.export.pipeline import export_pipeline

    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    torch.nn.init.normal_(net.proj_out.weight, generator=torch.Generator().manual_seed(0))
    elastic = ElasticDiTPipeline(net, FlowMatchEulerDiscreteScheduler())
    packed = make_transformer(num_classes=2)
    spec = {"scheme": "affine", "bits": 4, "group_size": 32}
    quantize_model(packed, dict.fromkeys(quantizable_layers(packed), spec))
    quantized = EdgeDiTPipeline(packed, DDIMScheduler(), pipeline.vae)
    made, options = tmp_path / "made", {"threads": 1, "bench_repeats": 2, "num_images": 2}
    pipeline.save_pretrained(made / "edgedit")
    pipeline.save_pretrained(made / "variant", variant="fp16")
    pipeline.save_pretrained(made / "bundled", bundle_code=True)
    elastic.save_pretrained(made / "elastic")
    elastic.save_pretrained(made / "elastic-bundled-1.6b", bundle_code=True)
    quantized.save_pretrained(made / "quantized")
    export_pipeline(
        made / "edgedit", made / "onnx", ExportOptions(dtype="int8", min_psnr_db=5, tolerance=1.0, **options)
    )
    export_pipeline(made / "edgedit", made / "pte", ExportOptions(format="executorch", batch=4, **options))
    for folder in made.iterdir():
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    folders = {
        f"me/{folder.name}": (str(folder), {"variant": "fp16"} if folder.name == "variant" else {})
        for folder in sorted(made.iterdir())
    }
    pipeline.register_to_config(default_steps=7)
    pipeline.save_pretrained(tmp_path / "older")
    shutil.copy(made / "edgedit" / "README.md", tmp_path / "older")
    older = ["me/edgedit", str(tmp_path / "older"), "v1"]
    run_with_hub(
        UPLOAD, json.dumps([older, *([name, folder, None] for name, (folder, _) in folders.items())]), made / "elastic"
    )
    said = run_with_hub(SAMPLES, json.dumps(folders), "online", home="user")
    assert len(said.splitlines()) == len(folders) and "OnnxEdgeDiTTransformer2DModel" in said
    assert "ExecutorchEdgeDiTTransformer2DModel" in said
    hub.forget()
    assert run_with_hub(SAMPLES, json.dumps(folders), "online", home="user") == said
    assert sum(entry["answered"] for entry in hub.requests("/storage/|GET .*/resolve/")) == 0  # of the cache
    said = run_with_hub(SAMPLES, json.dumps(folders), "offline", home="user", offline=True)
    assert said.count("theirs: ") == 2  # where this is 0, docs/hub.md need not speak of it any more


COMMANDS = """
import os, sys
from pathlib import Path
from edgedit_hf.commands.cli import main

out, home = sys.argv[1], Path(os.environ["HF_HOME"])
assert main(["info", "me/edgedit"]) == 0
assert not {"torch", "diffusers"} & sys.modules.keys() and not list(home.rglob("*.safetensors"))
assert main(["convert", "hf://me/edgedit@main", f"{out}/converted"]) == 0
sys.argv = ["optimum-cli", "export", "edgedit", "--model", "me/edgedit", "--output", f"{out}/onnx", "--images", "2"]
from optimum.commands.optimum_cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.export
def test_commands_take_names(pipeline, hub, run_with_hub, tmp_path):
    pipeline.save_pretrained(tmp_path / "edgedit")
    hub.add("me/edgedit", tmp_path / "edgedit")
    said = run_with_hub(COMMANDS, tmp_path)
    assert said.startswith("me/edgedit  (one input of 8 x 8 x 1") and (tmp_path / "onnx" / "verify.json").is_file()
    assert equal(load_pipeline(tmp_path / "converted").transformer, pipeline.transformer)
    for written in (tmp_path / "converted", tmp_path / "onnx"):
        assert not [file for file in written.rglob("*.json") if str(tmp_path) in file.read_text()]
