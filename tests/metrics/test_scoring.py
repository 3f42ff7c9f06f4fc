"""Scoring: chunks on the disk, references of every kind, and figures against the functions they come from."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics import (
    adm_precision_recall,
    frechet_distance,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    precision_recall,
    scoring,
)
from edgedit_hf.metrics.scoring import Chunks, Reference, clip_scores, describe, figures, is_pipeline, open_reference


class Extractor:
    name, hash, width = "of-a-test", "0" * 16, 6

    def features(self, images):
        return images.flatten(1)[:, :6]

    def head(self, features):
        return 3 * features


class Spatial(Extractor):
    name = "inception"

    def features_and_spatial(self, images):
        return self.features(images), images.flatten(1)[:, 6:10]


def stored(folder, name, values, size=7, **more):
    chunks = Chunks(folder, name, len(values), size)
    for index in range(len(chunks)):
        rows = slice(chunks.rows(index).start, chunks.rows(index).stop)
        chunks.write(index, {"features": values[rows], **{key: tensor[rows] for key, tensor in more.items()}})
    return chunks


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(45, 6, generator=generator), 1.3 * torch.randn(60, 6, generator=generator) + 0.4


def test_chunks_are_whole_or_not_there(tmp_path, pair):
    chunks = stored(tmp_path, "samples", pair[0])
    assert len(chunks) == 7 and list(chunks.rows(6)) == [42, 43, 44]
    assert torch.equal(torch.from_numpy(chunks.whole("features")), pair[0])
    assert {path.name for path in tmp_path.iterdir()} == {f"samples-{i:05d}.safetensors" for i in range(7)}
    moments = chunks.moments("features")
    assert moments.count == 45
    np.testing.assert_allclose(moments.covariance, np.cov(pair[0].double().numpy(), rowvar=False), rtol=1e-12)
    content = chunks.path(3).read_bytes()
    chunks.path(3).write_bytes(content[:-20])
    with pytest.raises(EdgeDiTError, match="samples-00003.safetensors is damaged .*delete it and run"):
        chunks.whole("features")


def test_an_image_is_found_in_its_chunk(tmp_path):
    images = torch.randint(0, 256, (9, 1, 3, 4), dtype=torch.uint8)
    chunks = stored(tmp_path, "samples", torch.zeros(9, 6), 4, images=images)
    assert all(torch.equal(chunks.image(number), images[number]) for number in range(9))


def test_what_is_stored_is_of_bytes():
    images = torch.linspace(-1.1, 1.1, 48).reshape(4, 1, 3, 4)
    found = describe(images, Spatial(), keep=True)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round()
    assert torch.equal(found["images"], pixels.to(torch.uint8))
    torch.testing.assert_close(found["features"], (pixels / 127.5 - 1).flatten(1)[:, :6])
    assert found["spatial"].shape == (4, 4) and describe(images, Extractor(), keep=False).keys() == {"features"}


def test_images_with_nan_are_refused_and_do_not_become_black():
    images = torch.zeros(4, 1, 3, 4)
    images[2, 0, 1, 1] = torch.nan
    for look in (
        lambda: describe(images, Extractor(), keep=False),
        lambda: clip_scores(SimpleNamespace(scores=None), images, ["a"], range(4)),
    ):
        with pytest.raises(EdgeDiTError, match="1 of 4 images hold NaN or infinite values"):
            look()


def test_figures_are_those_of_the_functions(tmp_path, pair):
    ours, real = pair
    samples, reference = stored(tmp_path, "samples", ours, clip=ours[:, 0].abs()), stored(tmp_path, "real", real, 11)
    found = figures(samples, reference, Reference("f" * 64), Extractor(), seed=5, clip=True)
    key = "fid[of-a-test,n=45]"
    wanted = {
        key: frechet_distance(ours, real),
        "inception_score": inception_score(3 * ours)[0],
        "kernel_distance": kernel_distance(ours, real, subset_size=45, seed=5)[0],
        "clip_score": float(ours[:, 0].abs().double().mean()),
    }
    for prefix, function in (("", precision_recall), ("adm_", adm_precision_recall)):
        wanted |= dict(zip((f"{prefix}precision", f"{prefix}recall"), function(real, ours)))
    assert found["metrics"] == pytest.approx(wanted, rel=1e-9)
    errors = found["standard_errors"]
    assert set(errors) == set(wanted) - {"kernel_distance", "inception_score"}
    assert errors[key] == pytest.approx(frechet_standard_error(ours, real, seed=5), rel=1e-9)
    precision, recall = wanted["precision"], wanted["recall"]
    assert errors["precision"] == pytest.approx((precision * (1 - precision) / 45) ** 0.5)
    assert errors["recall"] == pytest.approx((recall * (1 - recall) / 60) ** 0.5)
    assert errors["clip_score"] == pytest.approx(float(ours[:, 0].abs().std()) / 45**0.5, rel=1e-5)
    assert found["notes"] == []


def test_statistics_alone_give_distances_alone(tmp_path, pair):
    ours, real = pair
    spatial = torch.randn(45, 4, generator=torch.Generator().manual_seed(1))
    samples = stored(tmp_path, "samples", ours, spatial=spatial)
    pooled, other = ((x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)) for x in (real, spatial))
    found = figures(samples, None, Reference("f" * 64, pooled=pooled, spatial=other), Spatial(), seed=0)
    assert found["metrics"]["fid[inception,n=45]"] == pytest.approx(frechet_distance(ours, real), rel=1e-9)
    assert found["metrics"]["sfid[inception,n=45]"] == pytest.approx(0, abs=1e-9)
    assert set(found["metrics"]) == {"fid[inception,n=45]", "sfid[inception,n=45]", "inception_score"}
    assert found["notes"] == ["the reference has no images: precision, recall and the kernel distance are left out."]


def test_too_few_images_and_a_feature_that_does_not_vary_are_said(tmp_path, pair):
    ours, real = pair[0][:5].clone(), pair[1]
    ours[:, 3] = 0.1
    found = figures(
        stored(tmp_path, "samples", ours), stored(tmp_path, "real", real), Reference("f" * 64), Extractor(), seed=0
    )
    few, still = found["notes"]
    assert found["spreads"]["kernel_distance"] > 0  # subsets of 5 of 60
    same = figures(
        stored(tmp_path, "five", pair[0][:5]),
        stored(tmp_path, "others", real[:5]),
        Reference("f" * 64),
        Extractor(),
        seed=0,
    )
    assert "kernel_distance" in same["metrics"] and "kernel_distance" not in same["spreads"]  # one subset, again
    assert "the samples, features: 5 images are too few for 6 features" in few
    assert "the samples, features: 1 of 6 features (number 3) have no variance" in still
    alone = stored(tmp_path, "alone", ours[:1])
    with pytest.raises(EdgeDiTError, match="needs at least 2 samples, but only 1 were seen"):
        figures(alone, stored(tmp_path, "real", real), Reference("f" * 64), Extractor(), seed=0)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(6):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def test_a_reference_of_images(folder):
    found = open_reference(str(folder), Extractor())
    assert found.count == len(found.images) == 6 and found.pooled is None and len(found.sha256) == 64
    Image.new("RGB", (8, 8), "red").save(folder / "5.png")
    assert open_reference(str(folder), Extractor()).sha256 != found.sha256
    assert open_reference(str(folder), Extractor(), resolution=4).images.shape == (3, 4, 4)


def test_a_large_reference_is_not_of_its_first_classes_alone(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / str(number // 10)).mkdir(exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / str(number // 10) / f"{number:02d}.png")
    monkeypatch.setattr(scoring, "REFERENCE_IMAGES", 10)
    found = open_reference(str(tmp_path), Extractor())
    kept = ((found.images.batch(range(10))["images"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert found.count == len(set(kept)) == 10 and kept == sorted(kept) and 2 <= sum(one < 10 for one in kept) <= 8
    assert open_reference(str(tmp_path), Extractor()).sha256 == found.sha256


def test_a_corrupt_image_is_named(folder):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    with pytest.raises(EdgeDiTError, match=r"3\.png is corrupt or truncated"):
        open_reference(str(folder), Extractor())


def test_statistics_belong_to_inception(tmp_path):
    rng = np.random.default_rng(0)
    statistics = {"mu": rng.normal(size=6), "sigma": np.eye(6), "mu_s": rng.normal(size=4), "sigma_s": np.eye(4)}
    path = str(tmp_path / "reference.npz")
    np.savez(path, **statistics)
    found = open_reference(path, Spatial())
    np.testing.assert_array_equal(found.pooled[0], statistics["mu"])
    assert found.count is None and found.images is None
    with pytest.raises(
        EdgeDiTError, match=r"statistics of ADM's Inception and no images, but the extractor is of-a-test"
    ):
        open_reference(path, Extractor())
    np.savez(path, **{**statistics, "arr_0": rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)})
    assert open_reference(path, Extractor()).pooled is None and open_reference(path, Extractor()).count == 5
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(EdgeDiTError, match="statistics of 2048 features, but the extractor inception gives 6"):
        open_reference(path, Spatial())


def test_pipelines_are_told_from_images(folder, tmp_path):
    assert not is_pipeline(str(folder)) and not is_pipeline(str(tmp_path / "samples.npz"))
    assert is_pipeline("facebook/DiT-XL-2-256") and is_pipeline("hf://org/name")
    (tmp_path / "model_index.json").write_text("{}")
    assert is_pipeline(str(tmp_path))
