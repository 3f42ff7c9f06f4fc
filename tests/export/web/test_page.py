"""The page of an export, in a headless browser and on a plain web server: it draws what sample_min.py beside it draws,
and asks nobody but the server of its folder.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from browser import Browser, BrowserError, needs_browser, served
from PIL import Image
from text_pipelines import elastic, tiny_vae

from edgedit_hf import EdgeDiTPipeline, EdgeDiTTransformer2DModel
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.export.web import page as web_page
from edgedit_hf.export.web.runtime import FILES
from edgedit_hf.metrics.distances import psnr
from edgedit_hf.publish.contents import checked
from edgedit_hf.report.card import card_files

LEAST_DB = {"fp32": 40.0, "fp16": 40.0, "int8": 25.0, "int4": 25.0}  # least PSNR (dB) of the page's picture
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
NAMES = {str(index): f"<i onclick=x>{index}</i> &amp;" for index in range(10)}
OPTIONS = ExportOptions(format="web", num_images=2, bench_repeats=2, threads=1)


def edgedit(make_transformer, vae=None, steps=4, **config):
    # A flow, and small weights: pictures with greys, in which an error would show.
    net = make_transformer(**{"prediction_type": "flow_prediction", **config})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.25)
    names = {key: name for key, name in NAMES.items() if int(key) < net.config.num_classes}
    return EdgeDiTPipeline(net, make_scheduler("flow_prediction"), vae, id2label=names, default_steps=steps)


def from_python(folder, tmp_path, *asked) -> np.ndarray:
    """The picture of sample_min.py, from a process with nothing of this package."""
    file = tmp_path / "python.png"
    command = [sys.executable, str(folder / "sample_min.py"), *asked, "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    image = np.asarray(Image.open(file))
    file.unlink()
    return image


def ready(page, url):
    page.open(url)
    return page.wait("['ready', 'error'].includes(document.body.dataset.state) && document.body.dataset.state")


def draw(page, seed, label=None, prompt=None, tap=False) -> np.ndarray:
    """What the page draws: RGB (H, W, 3)."""
    for name, value in (("seed", str(seed)), ("label", label), ("prompt", prompt)):
        if value is not None:
            page.run(f"document.getElementById('{name}').value = {json.dumps(str(value))}")
    page.run("document.body.dataset.state = ''")
    page.tap("#draw") if tap else page.run("document.getElementById('draw').click()")
    state = page.wait("['done', 'error'].includes(document.body.dataset.state) && document.body.dataset.state")
    if state == "error":
        raise BrowserError(text(page, "status"))
    return canvas(page)


def canvas(page) -> np.ndarray:
    png = page.run("document.getElementById('canvas').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png.partition(",")[2]))).convert("RGB"))


def text(page, name) -> str:
    return page.run(f"document.getElementById('{name}').textContent")


def decibels(found, expected) -> float:
    assert len(np.unique(expected)) > 3, "a picture in which an error would show"
    return psnr(found, rgb(expected), data_range=255)


def rgb(image):
    return np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image[..., :3]


def of_origin(page, *urls):
    """Every request went to these, and nothing was kept from going elsewhere."""
    asked = [url for url in page.requests if not url.startswith(("blob:", "data:", "about:"))]
    assert asked and all(url.startswith(urls) for url in asked), asked
    assert page.blocked == [] and [line for line in page.console if "Content Security Policy" in line] == []


@pytest.fixture(scope="module")
def exported(make_transformer, web_runtime, made_once):
    """A web export of a random class-conditional net in fp32."""
    return made_once(
        "web-fp32", lambda folder: export_pipeline(edgedit(make_transformer), folder, replace(OPTIONS, overwrite=True))
    )


@pytest.mark.browser
@needs_browser
def test_the_page_draws_the_picture_of_a_seed_and_asks_its_own_server_alone(exported, tmp_path):
    seed = 2**53 + 1  # a number that a double cannot hold
    expected = from_python(exported, tmp_path, "--seed", str(seed), "--label", "3")
    with served(exported) as url, Browser() as page:
        assert ready(page, url) == "ready"
        found = draw(page, seed, label=3)
        assert decibels(found, expected) >= LEAST_DB["fp32"]
        assert np.abs(found.astype(int) - rgb(draw(page, seed + 1, label=3)).astype(int)).max() > 8, "another seed"
        assert re.fullmatch(
            r"4 steps, \d[\d.]* m?s a step \(median\), \d[\d.]* m?s in all, with \w+", text(page, "status")
        )
        assert "1 thread (the page is not isolated" in text(page, "backends")
        assert text(page, "running").startswith("WebAssembly (1 thread (")
        options = page.run("[...document.querySelectorAll('#label option')].map(o => o.textContent)")
        assert options == [f"{index}: {name}" for index, name in NAMES.items()] and not page.run(
            "!!document.querySelector('i')"
        )
        of_origin(page, url)
        assert not [line for line in page.console if line.startswith("error")], page.console
        assert {name.rpartition("/")[2] for name in page.requests} >= {
            "ort.wasm.min.mjs",
            "model.onnx",
            "contract.json",
        }
        assert not [name for name in page.requests if "asyncify" in name], "the larger build is for WebGPU and WebNN"


def test_the_folder_is_a_pipeline_a_space_and_a_page(exported, tmp_path):
    contract = json.loads((exported / "contract.json").read_text())
    assert contract["format"] == "web" and contract["artefacts"]["denoiser"]["file"] == "transformer/onnx/model.onnx"
    assert contract["web"]["runtime"] == {"package": "onnxruntime-web", "version": "1.30.0", "url": "runtime/"}
    assert {path.name for path in (exported / "runtime").iterdir()} == set(FILES)
    assert set(contract["web"]["files"]) <= set(contract["files"]) and "README.md" not in contract["files"]
    assert contract["artefacts"]["denoiser"]["inputs"][0]["shape"][0] == 2  # one image, with guidance
    verify = json.loads((exported / "verify.json").read_text())
    assert verify["passed"] and verify["run_in"].startswith("ONNX Runtime") and verify["psnr_db"] >= 50
    front = yaml.safe_load((exported / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("static", "index.html")
    assert front["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert len((exported / "sample.js").read_text().splitlines()) <= 400
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", (exported / "sample.js").read_text())
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(exported)
    assert type(pipeline.transformer).__name__ == "OnnxEdgeDiTTransformer2DModel"
    done = subprocess.run(
        [sys.executable, str(exported / "sample_min.py"), "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout


def test_a_page_is_pushed_with_a_card_that_serves_as_a_space_too(exported):
    assert checked(exported).kind == "exported"  # nothing of the runtime looks like a secret or a path
    card = card_files(exported, "me/digits-web", license="mit")["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["sdk"] == "static" and front["title"] == "digits-web" and "web" in front["tags"]
    assert "exported with `edgedit_hf` to a web page" in card and "python -m http.server" in card


@pytest.mark.slow
@pytest.mark.export
def test_a_page_is_replaced_only_as_it_was_written(exported, make_transformer, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "out")
    pipeline = edgedit(make_transformer)
    again = replace(OPTIONS, overwrite=True, runtime_url="https://example.org/ort/")
    export_pipeline(pipeline, folder, again)
    assert not (folder / "runtime").exists()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', (folder / "index.html").read_text())[1]
    assert "connect-src 'self' https://example.org;" in policy and "default-src 'none'" in policy
    assert "https:" not in re.search(r'Policy" content="(.*?)"', (exported / "index.html").read_text())[1]
    for name in ("index.html", "README.md"):
        kept = (folder / name).read_text()
        (folder / name).write_text(kept + "<!-- mine -->")
        with pytest.raises(EdgeDiTError, match=f"{name}, which this package did not write"):
            export_pipeline(pipeline, folder, again)
        (folder / name).write_text(kept)


# -------------------------------------------------------------------- what is refused


def test_a_model_that_does_not_fit_is_refused_with_the_sizes_before_and_after_lowering(
    make_transformer, web_runtime, tmp_path, monkeypatch
):
    """DiT-XL/2 takes 3 × 2.7 GB in fp32; in int8 it would fit."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in EdgeDiTTransformer2DModel.from_preset("DiT-XL/2").parameters())
    with pytest.raises(
        EdgeDiTError, match=r"of the 4\.29 GB .* takes 8\.1\d \(3 × the file \+ 67 MB, in fp32\).*lower "
    ):
        web_page.check_memory({"transformer/onnx/model.onnx": (4 * weights, "fp32")})
    web_page.check_memory({"transformer/onnx/model.onnx": (weights, "int8")})
    pipeline, size = edgedit(make_transformer), 4 * sum(p.numel() for p in make_transformer().parameters())
    monkeypatch.setattr(web_page, "LIMIT", web_page.peak_bytes(size, "fp32") - 1000)
    with pytest.raises(EdgeDiTError, match="does not fit into a browser.*model.onnx"):
        export_pipeline(pipeline, tmp_path / "out", OPTIONS)
    monkeypatch.setattr(
        web_page, "LIMIT", web_page.peak_bytes(size, "fp32") + 1000
    )  # the file's own description is larger
    with pytest.raises(EdgeDiTError, match="does not fit into a browser.*model.onnx"):
        export_pipeline(pipeline, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_what_a_page_could_not_sample_is_refused_before_it_is_lowered(make_transformer, web_runtime, tmp_path):
    from diffusers import DDPMScheduler

    noisy = EdgeDiTPipeline(make_transformer(), DDPMScheduler(), default_steps=4)
    with pytest.raises(EdgeDiTError, match="A page samples by the numbers of a contract, but there is none here"):
        export_pipeline(noisy, tmp_path / "out", OPTIONS)
    with pytest.raises(EdgeDiTError, match="A page reads prompts, but the pipeline has no text encoder"):
        export_pipeline(elastic(False, False), tmp_path / "out", OPTIONS)
    with pytest.raises(EdgeDiTError, match="--runtime-url is 'ftp://x/'"):
        export_pipeline(noisy, tmp_path / "out", replace(OPTIONS, runtime_url="ftp://x/"))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------- more pages


@pytest.mark.slow
@pytest.mark.export
@needs_browser
@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_every_precision(make_transformer, web_runtime, tmp_path, dtype):
    pipeline = edgedit(make_transformer, tiny_vae(), in_channels=4, learn_sigma=True, num_classes=3)
    # Random weights round worse than trained ones; here the page is compared with Python on the same files.
    options = replace(OPTIONS, dtype=dtype, split_conditioner=dtype == "fp16", tolerance=1.0, min_psnr_db=0.0)
    folder = export_pipeline(pipeline, tmp_path / "out", options)
    expected = from_python(folder, tmp_path, "--seed", "5", "--label", "2")
    with served(folder) as url, Browser() as page:
        ready(page, url)
        assert decibels(draw(page, 5, label=2), expected) >= LEAST_DB[dtype]
        of_origin(page, url)


@pytest.mark.slow
@pytest.mark.export
@needs_browser
@pytest.mark.parametrize("dtype, split", [("fp32", False), ("fp32", True), ("int8", False)])
def test_text_to_image_on_a_phone(web_runtime, tmp_path, dtype, split):
    options = replace(OPTIONS, dtype=dtype, split_conditioner=split)
    if dtype != "fp32":  # random weights round worse than trained ones
        options = replace(options, tolerance=1.0, min_psnr_db=0.0)
    folder = export_pipeline(elastic(vae=tiny_vae(), channels=4), tmp_path / "out", options)
    for prompt in ("a red 3", "two 7s <b>"):
        expected = from_python(folder, tmp_path, "--seed", "11", "--prompt", prompt)
        with served(folder) as url, Browser() as page:
            page.phone()
            assert ready(page, url) == "ready"
            assert page.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
            assert (
                page.run(
                    "Math.min(...[...document.querySelectorAll('button:not([hidden])')]"
                    ".filter(b => b.offsetParent).map(b => b.offsetHeight))"
                )
                >= 44
            )
            assert decibels(draw(page, 11, prompt=prompt, tap=True), expected) >= LEAST_DB[dtype]
            assert text(page, "caption") == f"{prompt} (seed 11)" and not page.run("!!document.querySelector('b')")
            assert page.run("document.documentElement.scrollWidth") == 390
            of_origin(page, url)
            with pytest.raises(BrowserError, match="35 tokens; this export takes 16 at most"):
                draw(page, 11, prompt="a long prompt of many letters")
            page.screenshot(tmp_path / f"phone-{dtype}-{split}.png")


@pytest.mark.slow
@pytest.mark.export
@needs_browser
def test_threads_memory_downloads_and_faults(exported, tmp_path):
    expected = from_python(exported, tmp_path, "--seed", "1", "--label", "0")
    with served(exported, ISOLATED) as url, Browser() as page:  # isolated: threads
        ready(page, url)
        assert decibels(draw(page, 1, label=0), expected) >= LEAST_DB["fp32"]
        cores = page.run("navigator.hardwareConcurrency")
        assert text(page, "running").startswith(f"WebAssembly ({min(4, cores)} thread") and page.run(
            "crossOriginIsolated"
        )
        of_origin(page, url)
        page.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        page.run("document.getElementById('download').click()")
        page.wait("new Promise(done => setTimeout(() => done(true), 1000))")
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / "0-i-onclick-x-0-i-amp--seed-1.png").convert("RGB")), canvas(page)
        )
        for seed in ("", "-1", "1.5", str(2**63), "x"):
            with pytest.raises(BrowserError, match="give 0"):
                draw(page, seed)
    with served(exported) as url, Browser() as page:  # little memory: one file after another, the same picture
        source = "Object.defineProperty(navigator, 'deviceMemory', {value: 0.25})"
        page.command("Page.addScriptToEvaluateOnNewDocument", source=source)
        ready(page, url)
        assert decibels(draw(page, 1, label=0), expected) >= LEAST_DB["fp32"]
        assert "one after another" in text(page, "running")
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    model = damaged / "transformer" / "onnx" / "model.onnx"
    os.truncate(model, model.stat().st_size - 1)
    with served(damaged) as url, Browser() as page:
        ready(page, url)
        with pytest.raises(BrowserError, match="model.onnx has .* bytes, not .*copy the folder again"):
            draw(page, 1)
    (damaged / "contract.json").unlink()
    with served(damaged) as url, Browser() as page:
        assert ready(page, url) == "error" and "contract.json: 404" in text(page, "status")


@pytest.mark.slow
@pytest.mark.export
@needs_browser
def test_webgpu_on_a_processor_that_plays_a_graphics_one(exported, tmp_path):
    expected = from_python(exported, tmp_path, "--seed", "1", "--label", "0")
    flags = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with served(exported) as url, Browser(*flags, timeout=300) as page:
        ready(page, url)
        if not page.run("!!document.querySelector('#backend option[value=webgpu]')"):
            pytest.skip(f"this browser has no SwiftShader: {text(page, 'backends')}")
        assert decibels(draw(page, 1, label=0), expected) >= LEAST_DB["fp32"]
        assert text(page, "running").startswith("WebGPU (") and text(page, "failed") == ""
        assert [name for name in page.requests if "asyncify" in name]
        of_origin(page, url)


@pytest.mark.slow
@pytest.mark.export
@needs_browser
def test_a_runtime_from_elsewhere_is_the_one_other_origin(make_transformer, web_runtime, tmp_path):
    with served(web_runtime, {"Access-Control-Allow-Origin": "*"}) as elsewhere:
        options = replace(OPTIONS, runtime_url=elsewhere)
        folder = export_pipeline(edgedit(make_transformer), tmp_path / "out", options)
        with served(folder) as url, Browser() as page:
            ready(page, url)
            expected = from_python(folder, tmp_path, "--seed", "1", "--label", "0")
            assert decibels(draw(page, 1, label=0), expected) >= LEAST_DB["fp32"]
            of_origin(page, url, elsewhere)
            assert any(name.startswith(elsewhere) for name in page.requests)
            assert page.run("fetch('https://example.org/').then(() => 'went', () => 'kept')") == "kept"
