"""What a user sees on stderr that is no progress: nothing, of the command line, of a stage, of loading a pipeline.

Elsewhere: loading from the Hub, of exported pipelines, with this package imported first (export/onnx/test_lower.py,
export/test_pipeline_formats.py).
"""

import ctypes
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from stderr import beside_progress

from edgedit_hf import EdgeDiTPipeline, ElasticDiTPipeline, ElasticDiTTransformer2DModel, quantize_model
from edgedit_hf.quiet import MESSAGES, without_native_lines

EDGEDIT = Path(sys.executable).with_name("edgedit")

LOAD = """
import sys
import diffusers
import edgedit_hf
for folder in sys.argv[1:]:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.to(pipeline.dtype)
"""


@pytest.fixture(scope="module")
def folders(make_transformer, tmp_path_factory) -> list[Path]:
    """Pipelines with and without a VAE, of either family, quantised and not."""
    top = tmp_path_factory.mktemp("pipelines")
    plain = EdgeDiTPipeline(make_transformer(num_layers=1), DDIMScheduler())
    plain.save_pretrained(top / "plain")
    quantize_model(plain.transformer, {"proj_out": {"scheme": "affine", "bits": 8}})
    plain.save_pretrained(top / "quantised")
    sizes = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    vae = AutoencoderTiny(latent_channels=1, **sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    ElasticDiTPipeline(net, FlowMatchEulerDiscreteScheduler(), vae=vae).save_pretrained(top / "elastic")
    return sorted(top.iterdir())


def test_info_is_quiet_and_quick(folders):
    """The console script itself, in CPU time, which other work on the machine does not lengthen."""
    models = ("DiT-S/2", "DiT-XL/2", "elastic-dit-1.6b", *folders)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for model in models:
        done = subprocess.run([EDGEDIT, "info", model], env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == ""
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(models) < 1.5


def test_loading_pipelines_is_quiet(folders, run_python):
    run_python(LOAD, *folders, quiet=True)


@pytest.mark.parametrize("run", ["debug_run", "debug_t2i_run"])
def test_every_stage_of_a_debug_recipe_is_quiet(request, run):
    folder = request.getfixturevalue(run).parents[1]
    assert beside_progress((folder / "stderr.txt").read_text()) == []


def test_only_the_named_messages_are_dropped():
    """Whatever else these loggers say is heard."""
    for name in MESSAGES:
        logger = logging.getLogger(name)
        assert [type(present).__module__ for present in logger.filters].count("edgedit_hf.quiet") == 1
        record = logging.LogRecord(name, logging.WARNING, __file__, 1, "Failed to load %s", ("weights.bin",), None)
        assert logger.filter(record)
    record = logging.LogRecord(
        "torchao",
        logging.WARNING,
        __file__,
        1,
        "Failed to load /a/torchao/_C.abi3.so: Could not load this library: x",
        (),
        None,
    )
    kept = logging.getLogger("torchao").filter(record)
    assert bool(kept) == (torch.version.cuda is not None)


def test_native_lines_are_dropped_by_their_beginning(capfd):
    with without_native_lines(re.compile(rb"\[noise\] ")):
        os.write(2, b"[noise] a\nkept\n[noise] b\nkept too")
    assert capfd.readouterr().err == "kept\nkept too"


def test_native_lines_of_stdout_are_dropped_though_c_holds_them_back(capfd):
    libc = ctypes.CDLL(None)
    print("first")
    libc.puts(b"before")
    with without_native_lines(re.compile(rb"\[noise\] "), stream=1):
        libc.puts(b"[noise] a")
        libc.puts(b"kept")
    assert capfd.readouterr().out == "first\nbefore\nkept\n"
