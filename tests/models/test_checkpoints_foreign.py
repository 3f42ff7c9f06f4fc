"""Weights in every form that diffusers' own loader takes or that training scripts leave behind, and files that are none
of them.
"""

import argparse
import io
import json
import math
import os
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from oracles import HEADS, oracle, random_diffusers_model
from safetensors.torch import load_file, save_file

from edgedit_hf import (
    EdgeDiTError,
    EdgeDiTPipeline,
    EdgeDiTTransformer2DModel,
    ElasticDiTPipeline,
    ElasticDiTTransformer2DModel,
    Genotype,
    ProxyBank,
    SearchSpace,
    load_original,
)
from edgedit_hf.commands.info import describe
from edgedit_hf.distill.sensitivity import spliced_student
from edgedit_hf.pipelines.loading import load_pipeline, load_vae
from edgedit_hf.search.latency_networks import random_model


def assert_same(model, other) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


# -------------------------------------------------------------------- wrapped

WRAPPED = {
    "average in a model": lambda w: {"ema": {"model": w}},
    "model in a state dict": lambda w: {"state_dict": {"model": w}, "epoch": 3},
    "average beside the model": lambda w: {
        "model": {k: torch.zeros_like(v) for k, v in w.items()},
        "ema": {"state_dict": w},
        "opt": {},
    },
    "three deep": lambda w: {"module": {"ema": {"state_dict": w}}, "args": argparse.Namespace(model="DiT-XL/2")},
    "DataParallel": lambda w: {f"module.{k}": v for k, v in w.items()},
    "compiled": lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()}},
    "compiled in DataParallel": lambda w: {"ema": {f"module._orig_mod.{k}": v for k, v in w.items()}},
    "DataParallel in compiled": lambda w: {"ema": {f"_orig_mod.module.{k}": v for k, v in w.items()}},
    "compiled blocks": lambda w: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in w.items()},
    "FSDP and checkpointing": lambda w: {
        f"_fsdp_wrapped_module.{k.replace('.attn.', '.attn._checkpoint_wrapped_module.')}": v for k, v in w.items()
    },
    "Lightning": lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}, "pytorch-lightning_version": "2"},
    "Lightning, compiled": lambda w: {"state_dict": {f"model._orig_mod.{k}": v for k, v in w.items()}},
    "ordered": lambda w: OrderedDict(w),
    "parameters": lambda w: {k: torch.nn.Parameter(v) for k, v in w.items()},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_a_wrapped_checkpoint_is_the_bare_one(form, tmp_path):
    weights = oracle("dit")[0]
    torch.save(weights, tmp_path / "dit.pt")
    torch.save(WRAPPED[form](weights), tmp_path / "wrapped-dit.pt")
    assert_same(
        load_original(tmp_path / "wrapped-dit.pt", num_attention_heads=HEADS),
        load_original(tmp_path / "dit.pt", num_attention_heads=HEADS),
    )


# -------------------------------------------------------------------- variants and shards

STEM = "diffusion_pytorch_model"
FORMS = {
    "whole": {},
    "sharded": {"max_shard_size": "40KB"},
    "pickle": {"safe_serialization": False},
    "sharded pickles": {"safe_serialization": False, "max_shard_size": "40KB"},
    "variant": {"variant": "fp16"},
    "sharded variant": {"variant": "fp16", "max_shard_size": "40KB"},
    "pickled variant": {"variant": "non_ema", "safe_serialization": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_diffusers_takes_gives_the_weights_that_diffusers_gives(form, tmp_path):
    options = FORMS[form]
    random_diffusers_model().half().save_pretrained(tmp_path / "form", **options)
    theirs = DiTTransformer2DModel.from_pretrained(
        tmp_path / "form", variant=options.get("variant"), use_safetensors=options.get("safe_serialization", True)
    )
    theirs.save_pretrained(tmp_path / "plain")
    expected = load_original(tmp_path / "plain")
    assert_same(load_original(tmp_path / "form"), expected)
    assert_same(load_original(tmp_path / "form", variant=options.get("variant")), expected)


def test_of_several_variants_one_is_asked_for(tmp_path):
    for variant, seed in (("fp16", 1), ("ema", 2)):
        random_diffusers_model(seed).save_pretrained(tmp_path / "m", variant=variant)
    with pytest.raises(EdgeDiTError, match="variants ema, fp16 .*variant"):
        load_original(tmp_path / "m")
    random_diffusers_model(2).save_pretrained(tmp_path / "plain")
    assert_same(load_original(tmp_path / "m", variant="ema"), load_original(tmp_path / "plain"))
    random_diffusers_model(3).save_pretrained(tmp_path / "m")
    random_diffusers_model(3).save_pretrained(tmp_path / "three")
    assert_same(load_original(tmp_path / "m"), load_original(tmp_path / "three"))
    with pytest.raises(EdgeDiTError, match="no weights; expected diffusion_pytorch_model.bf16.safetensors"):
        load_original(tmp_path / "m", variant="bf16")


def test_pipelines_and_autoencoders_of_one_variant_are_loaded(make_transformer, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        latent_channels=1,
        encoder_block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )
    pipe = EdgeDiTPipeline(make_transformer(), DDIMScheduler(), vae.eval())
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    pipe.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="20KB")
    for folder in ("fp16", "shards"):
        assert not list((tmp_path / folder).glob(f"*/{STEM}.safetensors"))
        loaded = load_pipeline(tmp_path / folder)
        assert_same(loaded.transformer, pipe.transformer)
        assert_same(load_vae(str(tmp_path / folder / "vae")), vae)
    pipe.transformer.save_pretrained(tmp_path / "fp16" / "transformer", variant="ema")
    with pytest.raises(EdgeDiTError, match="variants ema, fp16"):
        load_pipeline(tmp_path / "fp16")
    shutil.rmtree(tmp_path / "fp16" / "transformer")
    pipe.transformer.save_pretrained(tmp_path / "fp16" / "transformer", variant="ema")
    with pytest.raises(EdgeDiTError, match="different variants only"):
        load_pipeline(tmp_path / "fp16")


def test_a_shard_that_is_not_there_is_named(tmp_path):
    random_diffusers_model().save_pretrained(tmp_path / "m", max_shard_size="40KB")
    next((tmp_path / "m").glob(f"{STEM}-00002*")).unlink()
    with pytest.raises(EdgeDiTError, match="00002.* is not there"):
        load_original(tmp_path / "m")


# -------------------------------------------------------------------- keys that somebody added


def test_keys_that_a_trainer_added_to_the_config_are_ignored_and_kept(make_transformer, tmp_path):
    teacher = make_transformer()
    teacher.register_to_config(trained_on="digits", decay=0.999)
    teacher.save_pretrained(tmp_path / "teacher")
    space = SearchSpace.for_config(teacher.config)
    bank = ProxyBank.create(tmp_path / "bank", teacher, space)
    loaded = EdgeDiTTransformer2DModel.from_pretrained(tmp_path / "teacher")
    original = load_original(tmp_path / "teacher")
    made = {
        "diffusers": loaded,
        "load_original": original,
        "the bank's student": bank.assemble(Genotype.of(teacher.config)),
        "a random student": bank.assemble(Genotype.of(teacher.config), random_seed=0),
        "a spliced one": spliced_student(teacher, []),
        "a random net": random_model(loaded.config),
    }
    for name, model in made.items():
        assert (model.config.trained_on, model.config.decay) == ("digits", 0.999), name
        assert "_class_name" not in model.config or model.config._class_name == "EdgeDiTTransformer2DModel"
    assert_same(original, teacher)
    assert describe(str(tmp_path / "teacher"))["layers"] == 4
    original.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["trained_on"] == "digits"


def test_a_config_without_keys_that_have_defaults_is_read_as_diffusers_reads_it(make_transformer, tmp_path):
    make_transformer(num_classes=1000).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_classes", "norm_eps", "mlp_norm_eps", "long_skips"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(load_original(tmp_path), EdgeDiTTransformer2DModel.from_pretrained(tmp_path))


# -------------------------------------------------------------------- files that are no weights


def pickled(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/edgedit-ran-code",)


def changed(key="final_layer.linear.weight", **changes):
    """The oracle with one weight that is something else."""

    def make():
        weights = oracle("dit")[0]
        return pickled({**weights, key: changes["to"](weights[key])})

    return make


MALFORMED = {
    "empty": (lambda: b"", r"empty \(0 bytes\)"),
    "truncated archive": (
        lambda: pickled(oracle("dit")[0])[:50_000],
        r"\(50000 bytes\) is no readable weights file, or truncated",
    ),
    "an archive of something else": (lambda: archive(), "no readable weights file"),
    "text": (lambda: b"these are no weights\n" * 9, "no readable weights file"),
    "a web page": (lambda: b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
    "Git LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2700611775\n",
        r"pointer.*\(2700611775 bytes\).*git lfs pull",
    ),
    "random bytes": (lambda: bytes(range(256)) * 20, "no readable weights file"),
    "a pickle cut short": (lambda: b"\x80\x02}q\x00", "no readable weights file"),
    "code": (lambda: pickled({"model": Runs()}), "holds more than tensors and is not opened"),
    "an object": (
        lambda: pickled({"model": oracle("dit")[0], "path": torch.nn.Linear(1, 1)}),
        "holds more than tensors and is not opened",
    ),
    "no tensors": (lambda: pickled({"epoch": 3, "loss": 0.1}), "not a state dict of tensors: 'epoch'.* is a int"),
    "an empty dict": (lambda: pickled({}), "holds an empty dict"),
    "a list": (lambda: pickled(list(oracle("dit")[0].values())), "holds a list, not a state dict"),
    "a tensor": (lambda: pickled(torch.zeros(3)), "holds a Tensor, not a state dict"),
    "numbers as names": (lambda: pickled(dict(enumerate(oracle("dit")[0].values()))), "0, .*is no name but a int"),
    "a prefix twice": (
        lambda: pickled({**oracle("dit")[0], "module.pos_embed": torch.zeros(1)}),
        "'pos_embed' twice, once as 'module.pos_embed'",
    ),
    "a wrong shape": (changed(to=lambda w: w[:, :-1].clone()), "weights do not fit|do not fit; 'proj_out.weight'"),
    "transposed": (
        changed("blocks.0.attn.qkv.weight", to=lambda w: w.mT.contiguous()),
        "'blocks.0.attn.to_qkv.weight' has the shape",
    ),
    "no dimensions": (changed(to=lambda w: w.sum()), "not of the shapes of a DiT"),
    "expanded": (
        lambda: pickled({k: torch.zeros(1).expand(1 << 20, 1 << 18) for k in oracle("dit")[0]}),
        "expanded without their values",
    ),
    "one storage for all": (
        lambda: pickled(
            dict.fromkeys(
                [*oracle("dit")[0], *(f"blocks.{i}.attn.qkv.weight" for i in range(9000))], torch.zeros(400, 100)
            )
        ),
        "expanded without their values",
    ),
    "sparse": (changed(to=lambda w: w.to_sparse()), r"is sparse \(torch.sparse_coo\)"),
    "compressed rows": (changed(to=lambda w: w.to_sparse_csr()), r"is sparse \(torch.sparse_csr\)"),
    "quantised": (
        changed(to=lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        r"is quantised \(torch.qint8\)",
    ),
    "meta": (changed(to=lambda w: w.to("meta")), "meta device"),
    "complex": (changed(to=lambda w: w.to(torch.complex64)), r"is complex \(torch.complex64\)"),
    "integers": (changed(to=lambda w: (w * 9).to(torch.int8)), r"holds integers \(torch.int8\)"),
    "booleans": (changed(to=lambda w: w > 0), r"holds integers \(torch.bool\)"),
    "not a number": (
        changed("blocks.0.attn.qkv.weight", to=lambda w: w.index_fill(0, torch.tensor([1]), math.nan)),
        "1 of .*first is blocks.0.attn.to_qkv",
    ),
    "infinite": (changed(to=lambda w: w / 0), "NaN or infinite"),
    "above float32": (changed(to=lambda w: w.double() * 1e300), "NaN or infinite"),
}


# Weights under the names of an original file, which a folder's have not.
OF_A_FILE = (
    "a wrong shape",
    "transposed",
    "no dimensions",
    "not a number",
    "infinite",
    "above float32",
    "a prefix twice",
)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("readme.txt", "hello")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "place, kind",
    [("file", kind) for kind in MALFORMED] + [("folder", kind) for kind in MALFORMED if kind not in OF_A_FILE],
)
def test_a_malformed_file_is_one_clear_error(kind, place, tmp_path):
    make, said = MALFORMED[kind]
    path = tmp_path / "DiT.pt"
    if place == "folder":
        random_diffusers_model().save_pretrained(tmp_path / "m")
        (tmp_path / "m" / f"{STEM}.safetensors").unlink()
        path = tmp_path / "m" / f"{STEM}.bin"
    path.write_bytes(make())
    with pytest.raises(EdgeDiTError, match=said) as error:
        load_original(path.parent if place == "folder" else path, num_attention_heads=HEADS)
    assert path.name in str(error.value) or "do not fit" in str(error.value)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    assert not os.path.exists("/tmp/edgedit-ran-code")


@pytest.mark.parametrize("name", ["dit", "sit", "mdtv2", "diffusers"])
def test_a_weight_of_any_wrong_shape_is_one_clear_error(name, tmp_path):
    options = {"num_attention_heads": HEADS}
    if name == "diffusers":
        random_diffusers_model().save_pretrained(tmp_path)
        path, location, options = tmp_path / f"{STEM}.safetensors", tmp_path, {}
        weights = load_file(path)
    else:
        weights, path = oracle(name)[0], tmp_path / f"{name}.safetensors"
        location = path
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    load_original(location, **options)
    for key in list(weights)[:: max(1, len(weights) // 24)]:
        for wrong in (torch.zeros(()), torch.zeros(0), weights[key][None], weights[key][..., :0]):
            save_file({**{k: v.contiguous() for k, v in weights.items()}, key: wrong.contiguous()}, path)
            if key.endswith(("pos_embed.pos_embed", "relative_position_index")):
                continue  # always the formula's
            with pytest.raises(EdgeDiTError):
                load_original(location, **options)


@pytest.mark.parametrize("damage", ["empty", "cut", "header of 2^60 bytes", "text", "pointer"])
def test_a_malformed_safetensors_file_is_one_clear_error(damage, tmp_path):
    save_file(oracle("dit")[0], tmp_path / "dit.safetensors")
    path = tmp_path / "dit.safetensors"
    content = {
        "empty": b"",
        "cut": path.read_bytes()[:40_000],
        "header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
        "text": b"hello hello hello",
        "pointer": MALFORMED["Git LFS pointer"][0](),
    }[damage]
    path.write_bytes(content)
    with pytest.raises(EdgeDiTError, match=r"dit.safetensors \(|empty"):
        load_original(path, num_attention_heads=HEADS)


def test_weights_are_not_those_of_a_file_that_changes(tmp_path):
    path = tmp_path / "dit.pt"
    torch.save(oracle("dit")[0], path)
    model = load_original(path, num_attention_heads=HEADS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path.write_bytes(b"\x00" * path.stat().st_size)  # in place: the same inode
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_adapter_that_is_not_finite_is_named(tmp_path):
    torch.save(oracle("dit")[0], tmp_path / "dit.pt")
    layer = "blocks.0.attn.qkv"
    save_file(
        {f"{layer}.lora_A.weight": torch.full((2, 32), float("nan")), f"{layer}.lora_B.weight": torch.zeros(96, 2)},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(EdgeDiTError, match="adapter .*lora.safetensors.*NaN"):
        load_original(tmp_path / "dit.pt", num_attention_heads=HEADS, lora=tmp_path / "lora.safetensors")


# -------------------------------------------------------------------- configs that claim more than there is


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"layers": None, "num_layers": 10**9}, "describes 1000000000 layers.*weight files have"),
        ({"hidden_size": 10**7}, "weight files have"),
        ({"sample_size": 400_000}, "sample_size 400000.*position embedding"),
        ({"layers": None, "num_layers": 9}, "do not fit"),
        ({"num_layers": "many", "layers": None}, "describes no model"),
        ({"side_layers": 10**9, "decoder_start": 0}, "at most 4096"),
    ],
    ids=str,
)
def test_a_config_that_claims_more_than_the_files_hold_is_refused_before_anything_is_made(
    changes, said, make_transformer, tmp_path
):
    EdgeDiTPipeline(make_transformer(), DDIMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for load in (load_original, load_pipeline):
        with pytest.raises(EdgeDiTError, match=said):
            load(tmp_path)
    if changes.get("num_layers") == 10**9:
        with pytest.raises(EdgeDiTError, match="num_layers is 1000000000"):
            describe(str(tmp_path))
        with pytest.raises(ValueError, match="at most 4096"):
            EdgeDiTTransformer2DModel.from_pretrained(tmp_path / "transformer")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_layers": [10**9, 1, 1]}, "1000000002 layers.*weight files have"),
        ({"num_attention_heads": 10**6}, "weight files have"),
        ({"num_layers": "many"}, "describes no model"),
        ({"sample_size": 400_000}, "sample_size 400000"),
    ],
    ids=str,
)
def test_so_is_that_of_an_elastic_net(changes, said, tmp_path):
    transformer = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    ElasticDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(EdgeDiTError, match=said):
        load_pipeline(tmp_path, kind="ElasticDiTPipeline")


@pytest.mark.parametrize(
    "sizes, said",
    [({"num_layers": [5000, 1, 1]}, "at most 4096 layers"), ({"mlp_ratios": [0.001, 3.0, 4.0]}, "no neuron")],
)
def test_an_elastic_net_of_impossible_size_is_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", subnets=None, **sizes)


def test_a_loaded_model_may_be_saved_over_its_own_file(make_transformer, tmp_path):
    pipe = EdgeDiTPipeline(make_transformer(), DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert_same(loaded.transformer, pipe.transformer)
    assert_same(load_pipeline(tmp_path).transformer, pipe.transformer)
