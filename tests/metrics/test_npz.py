"""ADM's files: what is read of them, what is refused, and that NumPy reads what is written."""

import pickle
import zipfile

import numpy as np
import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics.npz import read_npz, write_npz


@pytest.fixture
def adm(tmp_path):
    """`adm(mu=…, arr_0=None, …)`: a file like ADM's with these arrays changed or (`None`) left out."""
    rng = np.random.default_rng(0)
    whole = {"mu": rng.normal(size=4), "sigma": np.cov(rng.normal(size=(4, 9)))}
    whole |= {"mu_s": rng.normal(size=3).astype(np.float32), "sigma_s": np.eye(3, dtype=np.float32)}
    whole |= {"arr_0": rng.integers(0, 256, (5, 8, 6, 3), dtype=np.uint8), "arr_1": np.arange(5)}

    def make(**changed):
        arrays = {name: array for name, array in (whole | changed).items() if array is not None}
        np.savez(tmp_path / "reference.npz", **arrays)
        return tmp_path / "reference.npz", whole

    return make


def test_statistics_and_images_are_read(adm):
    path, whole = adm()
    found = read_npz(path)
    for given, (mean, covariance) in ((("mu", "sigma"), found.pooled), (("mu_s", "sigma_s"), found.spatial)):
        np.testing.assert_array_equal(mean, whole[given[0]])
        np.testing.assert_array_equal(covariance, whole[given[1]])
        assert mean.dtype == covariance.dtype == np.float64
    images = found.images.batch([1, 4])["images"]
    assert images.shape == (2, 3, 8, 6) and len(found.images) == 5
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), whole["arr_0"][[1, 4]] / 127.5 - 1, atol=1e-6)
    path, _ = adm(mu=None, sigma=None, mu_s=None, sigma_s=None)
    assert read_npz(path)[:2] == (None, None) and len(read_npz(path).images) == 5
    path, _ = adm(arr_0=None)
    assert read_npz(path).images is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigma": None}, "has no 'sigma' beside its other statistics"),
        ({"mu": None, "sigma": None, "arr_0": None}, r"holds neither statistics \(mu, sigma\) nor images \(arr_0\)"),
        ({"mu": np.zeros(5)}, r"'mu' has shape \(5,\) and 'sigma' \(4, 4\); expected \[D\] and \[D, D\]"),
        ({"sigma_s": np.full((3, 3), np.nan)}, r"'sigma_s' \(float64\) must hold finite"),
        ({"mu": np.zeros(4, dtype=int)}, r"'mu' \(int64\) must hold finite floating-point"),
        ({"arr_0": np.zeros((5, 3, 8, 8), dtype=np.uint8)}, r"'arr_0' has shape \(5, 3, 8, 8\) and type uint8"),
        ({"arr_0": np.zeros((5, 8, 8, 3))}, r"type float64; expected images, uint8 \[N, H, W, 3\]"),
        ({"mu": np.array([{}], dtype=object)}, "cannot be read as ADM's .npz"),
    ],
)
def test_other_arrays_are_refused(adm, changed, message):
    path, _ = adm(**changed)
    with pytest.raises(EdgeDiTError, match=message):
        read_npz(path)


def test_other_files_are_refused(adm, tmp_path):
    path, _ = adm()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(path.read_bytes()[:900])
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps({"mu": 1}))
    for name in ("cut.npz", "pickled.npz"):
        with pytest.raises(EdgeDiTError, match=f"{name} cannot be read as ADM's .npz"):
            read_npz(tmp_path / name)
    with pytest.raises(EdgeDiTError, match="nothing.npz does not exist; give ADM's .npz, or a folder of images"):
        read_npz(tmp_path / "nothing.npz")


def with_header(text: str) -> bytes:
    """An array of NumPy's that declares this and has no data."""
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("mu.npy", with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}")),
        ("mu.npy", with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**30},)}}")),
        ("mu.npy", with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (5,")),
        ("mu", b"no array"),
    ],
)
def test_what_numpy_would_fail_at_in_its_own_ways_is_refused(tmp_path, member, content):
    with zipfile.ZipFile(tmp_path / "made.npz", "w") as file:
        file.writestr(member, content)
    with pytest.raises(EdgeDiTError, match=r"made.npz(: 'mu' is no array of NumPy's| cannot be read as ADM's .npz)"):
        read_npz(tmp_path / "made.npz")


@pytest.mark.parametrize("damage", ["plain", "deflated", "encrypted", "unknown compression"])
def test_archives_that_zipfile_fails_at_are_refused(tmp_path, damage):
    path = tmp_path / "made.npz"
    if damage == "plain":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        np.savez_compressed(path, mu=np.random.default_rng(0).normal(size=500))
        content = bytearray(path.read_bytes())
        entry = content.rfind(b"PK\x01\x02")
        if damage == "deflated":
            content[200:260] = b"\xff" * 60
        elif damage == "encrypted":
            content[6], content[entry + 8] = content[6] | 1, content[entry + 8] | 1
        else:
            content[8], content[entry + 10] = 99, 99
        path.write_bytes(content)
    with pytest.raises(EdgeDiTError, match=r"made.npz cannot be read as ADM's .npz"):
        read_npz(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_numpy_reads_what_is_written(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (7, channels, 5, 4), dtype=np.uint8)
    write_npz(tmp_path / "samples.npz", 7, np.array_split(pixels, 3))
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], pixels.repeat(3 // channels, axis=1).transpose(0, 2, 3, 1))
    assert len(read_npz(tmp_path / "samples.npz").images) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
