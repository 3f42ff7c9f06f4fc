"""diffusers knows the package's classes whichever is imported first, from folders and from the Hub; and without the
package, by trust.
"""

import pytest
import torch

from edgedit_hf import EdgeDiTPipeline, ElasticDiTPipeline, ElasticDiTTransformer2DModel

LOAD = """
def generate(pipeline, latents):
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "get_label_ids"):
        what = {"class_labels": ["cat", "dog"]}
    else:
        what = {"prompt_embeds": [latents.new_ones(2, 3, 16), None]}
    return pipeline(**what, latents=latents, num_inference_steps=3, output_type="pt").images
"""

PACKAGE_FIRST = (
    LOAD
    + """
import sys
import edgedit_hf

assert not {"torch", "diffusers"} & set(sys.modules), "importing edgedit_hf must stay light"
import diffusers
from safetensors.torch import load_file
tensors = load_file(sys.argv[1] + "/expected.safetensors")

pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline) is edgedit_hf.EdgeDiTPipeline is diffusers.EdgeDiTPipeline
assert (generate(pipeline, tensors["latents"]) == tensors["images"]).all()
ours = [type(finder).__module__ for finder in sys.meta_path if type(finder).__module__.startswith("edgedit_hf")]
assert not ours, "the import hook removes itself"

for repo in ("acme/listed", "acme/unlisted"):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(repo)
    assert type(pipeline.transformer) is edgedit_hf.EdgeDiTTransformer2DModel
    assert (generate(pipeline, tensors["latents"]) == tensors["images"]).all()
assert type(edgedit_hf.EdgeDiTPipeline.from_pretrained("acme/listed")) is edgedit_hf.EdgeDiTPipeline

model = diffusers.AutoModel.from_pretrained(sys.argv[1], subfolder="transformer")
assert type(model) is edgedit_hf.EdgeDiTTransformer2DModel
model = diffusers.AutoModel.from_pretrained(sys.argv[1] + "/transformer")
assert type(model) is edgedit_hf.EdgeDiTTransformer2DModel
try:
    diffusers.NoSuchPipeline
except AttributeError as error:
    assert "NoSuchPipeline" in str(error)
else:
    raise AssertionError("unknown names must stay unknown")
"""
)

DIFFUSERS_FIRST = (
    LOAD
    + """
import sys
import diffusers
from diffusers import DiffusionPipeline
import edgedit_hf
import edgedit_hf.registration
edgedit_hf.registration.register()  # once more changes nothing
from safetensors.torch import load_file
tensors = load_file(sys.argv[1] + "/expected.safetensors")

for source in (sys.argv[1], "acme/listed"):
    pipeline = DiffusionPipeline.from_pretrained(source)
    assert type(pipeline) is edgedit_hf.EdgeDiTPipeline
    assert (generate(pipeline, tensors["latents"]) == tensors["images"]).all()
pipeline.save_pretrained(sys.argv[2])
"""
)

WITHOUT_THE_PACKAGE = (
    LOAD
    + """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "edgedit_hf":
            raise ModuleNotFoundError("No module named 'edgedit_hf'", name=name)

sys.meta_path.insert(0, NotInstalled())
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
bundle, saved, plain, cache = sys.argv[1:]
tensors = load_file(bundle + "/expected.safetensors")

cached = {"cache_dir": cache, "local_files_only": True}
for source, where in ((bundle, {}), ("acme/bundled", {}), ("acme/bundled-1.6b", {}), ("acme/cached", cached)):
    try:
        DiffusionPipeline.from_pretrained(source, **where)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("code from a repository must not run without trust")
    pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, **where)
    assert type(pipeline).__name__ == "EdgeDiTPipeline" and "diffusers_modules" in type(pipeline).__module__
    assert (generate(pipeline, tensors["latents"]) == tensors["images"]).all()

pipeline.save_pretrained(saved)
pipeline = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
assert (generate(pipeline, tensors["latents"]) == tensors["images"]).all()

try:
    DiffusionPipeline.from_pretrained(plain)
except (AttributeError, ValueError) as error:
    assert "EdgeDiT" in str(error) or "edgedit_hf" in str(error)
else:
    raise AssertionError("a folder without code needs the package")
assert "edgedit_hf" not in sys.modules
"""
)


def both_families(script: str) -> pytest.MarkDecorator:
    """The test for each of the two families, with the script that names the classes of that one."""
    return pytest.mark.parametrize(
        "saved, script",
        [
            ("EdgeDiT", script),
            pytest.param("ElasticDiT", script.replace("EdgeDiT", "ElasticDiT"), marks=pytest.mark.slow),
        ],
        indirect=["saved"],
    )


@pytest.fixture
def saved(request, make_transformer, tmp_path):
    """A pipeline folder, the same with bundled code, and in both what it must generate; `request.param` names the
    family.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    if getattr(request, "param", "EdgeDiT") == "EdgeDiT":
        pipeline = EdgeDiTPipeline(make_transformer(num_classes=2), DDIMScheduler(), id2label={0: "cat", 1: "dog"})
    else:
        net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
        torch.nn.init.normal_(
            net.proj_out.weight, generator=torch.Generator().manual_seed(0)
        )  # a fresh net predicts zero
        pipeline = ElasticDiTPipeline(net, FlowMatchEulerDiscreteScheduler())
    plain, bundle = tmp_path / "plain", tmp_path / "bundle"
    pipeline.save_pretrained(plain)
    pipeline.save_pretrained(bundle, bundle_code=True)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the children run on one thread, and must reproduce this to the bit
    generate = {}
    exec(LOAD, generate)
    images = generate["generate"](pipeline, latents)
    torch.set_num_threads(threads)
    for folder in (plain, bundle):
        save_file({"latents": latents, "images": images}, folder / "expected.safetensors")
    return plain, bundle


@pytest.mark.slow
@both_families(PACKAGE_FIRST)
def test_package_first(saved, script, make_hub_cache, run_python):
    plain, _ = saved
    make_hub_cache(plain, "acme/unlisted", listing=False)
    cache = make_hub_cache(plain, "acme/listed")
    run_python(script, plain, env={"HF_HUB_CACHE": str(cache)})


@pytest.mark.slow
def test_diffusers_first_and_a_real_download(saved, make_hub_server, run_python, tmp_path):
    plain, _ = saved
    run_python(DIFFUSERS_FIRST, plain, tmp_path / "again", env=make_hub_server({"acme/listed": plain}))
    assert '"edgedit_hf",\n    "EdgeDiTTransformer2DModel"' in (tmp_path / "again" / "model_index.json").read_text()


@both_families(WITHOUT_THE_PACKAGE)
def test_bundled_code_without_the_package(saved, script, make_hub_cache, make_hub_server, run_python, tmp_path):
    plain, bundle = saved
    # Without a file list: with one, diffusers 0.42 asks the Hub for the commit of remote code even where it is offline.
    cache = make_hub_cache(bundle, "acme/cached", listing=False)
    # diffusers names a module after its repository: with a dot in that, no module finds another beside it.
    env = make_hub_server({"acme/bundled": bundle, "acme/bundled-1.6b": bundle})
    run_python(script, bundle, tmp_path / "again", plain, cache, env=env)
