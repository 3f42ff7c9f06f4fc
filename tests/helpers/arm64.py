"""A phone's instruction set without a phone: Debian's Python for arm64 with numpy and ONNX Runtime, run by qemu's
user-mode emulation. It computes what an arm64 processor computes, slowly, so that no time means anything.

Everything is fetched once, checked against its SHA-256 and kept in ~/.cache/edgedit_hf-tests. Nothing is installed.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import pytest

QEMU = "qemu-aarch64-static"
MIRROR = "http://deb.debian.org/debian/pool/main/"
# Debian 12; the mirror keeps a version until a point release has a newer one. SHA-256 and package.
DEBS = dict(
    reversed(line.split())
    for line in """
6a07dd571f1a15af2f855d64571766fe44b73a57cc3b5ca79502bc89156a5e12 p/python3.11/python3.11-minimal_3.11.2-6+deb12u8
c48bac178c0fc43a2bf8ace784c762b5ee83e2b981894a991dc3ccfd3ec7cd4b p/python3.11/libpython3.11-minimal_3.11.2-6+deb12u8
e79876de55c6c2dca10d044b2fa69ccd863950ea01714220c1982d16008105f9 p/python3.11/libpython3.11-stdlib_3.11.2-6+deb12u8
01f4330719fd4f65580e16ea5a0527f372fca750e8f588d26deaf09f2d3b1cf4 g/glibc/libc6_2.36-9+deb12u14
576926b283613db80168ddf76380a3bd877602778cf0d226caa7bfbfa71eacf3 g/gcc-12/libgcc-s1_12.2.0-14+deb12u1
26e138c677a985775331373828a6c286c551ff397cb735d00e2383cb273d1cb2 g/gcc-12/libstdc++6_12.2.0-14+deb12u1
52b8b8a145bbe1956bba82034f77022cbef0c3d0885c9e32d9817a7932fe1913 z/zlib/zlib1g_1.2.13.dfsg-1
8dc1976735acf825e3a922d82f171e20feec7394da2b8c616091983e38706275 e/expat/libexpat1_2.5.0-1+deb12u2
a256e03cc3abd7243ac5c6ee91a9deb56478221ef0d3c2b0748551e13140c0bf o/openssl/libssl3_3.0.20-1~deb12u2
80b5c36177dc0e29d531c7eddbed3cc7355cb490e49f8cfa5959572d161f27b3 libf/libffi/libffi8_3.4.4-1
d3a96ece03326498b39ff093a76800dfcbcb1d4049d6ae6e9f6fa1aa7a590ad6 b/bzip2/libbz2-1.0_1.0.8-5+b1
647ce9d81e41c30071ce6ac0d3324579216a33aaa1d28971d6952315f6a95a75 x/xz-utils/liblzma5_5.4.1-1+deb12u1
""".strip().splitlines()
)
WHEELS = {  # later ones of ONNX Runtime (1.31.1) crash at import under qemu 7.2
    "numpy==2.4.6": "0ab0a9c4ffb1a6d95ef519fe4247dba8eb6b18ad93999f76b7f657039acabd47",
    "onnxruntime==1.23.2": "bbfd2fca76c855317568c1b36a885ddea2272c13cb0e395002c402f2360429a6",
}
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


class Arm64:
    """A Python of arm64.

    Args:
        folder: with `root`, the interpreter's file system, and `site`, its packages.
    """

    def __init__(self, folder: Path):
        self.root, self.site = folder / "root", folder / "site"

    def run(self, *argv, expect: int = 0) -> str:
        """The stdout of `python3.11 *argv` there."""
        python = self.root / "usr" / "bin" / "python3.11"
        done = subprocess.run(
            [QEMU, "-L", str(self.root), str(python), "-s", "-B", *map(str, argv)],
            env={"PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def arm64_python() -> Arm64:
    """The interpreter, fetched if it is not there yet; the test is skipped where it cannot be had."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed (Debian: qemu-user-static): there is nothing that runs arm64 programs")
    pins = hashlib.sha256(repr((DEBS, WHEELS)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgedit_hf-tests"
    folder = cache / f"arm64-{pins}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            made = Path(aside, "made")
            for name, sha256 in DEBS.items():
                unpack_deb(fetch(f"{MIRROR}{name}_arm64.deb", sha256), made / "root")
            unpack_wheels(made / "site", Path(aside))
            made.rename(folder)
    return Arm64(folder)


def fetch(url: str, sha256: str) -> bytes:
    """The bytes of an address; the test is skipped where it does not answer, and fails if they are others."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read()
    except OSError as error:
        pytest.skip(f"{url} cannot be fetched ({error}): there is no Python of arm64")
    found = hashlib.sha256(data).hexdigest()
    assert found == sha256, f"{url} has the SHA-256 {found}, not {sha256}"
    return data


def unpack_deb(data: bytes, root: Path) -> None:
    """Unpack the files of a Debian package: an `ar` archive, one member of which is `data.tar.xz`."""
    assert data[:8] == b"!<arch>\n"
    start = 8
    while start < len(data):
        header = data[start : start + 60]
        name, size = header[:16].decode().strip(), int(header[48:58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data[start + 60 : start + 60 + size])) as archive:
                archive.extractall(root, filter="tar")
            return
        start += 60 + size + size % 2
    raise AssertionError("the package has no files")


def unpack_wheels(site: Path, aside: Path) -> None:
    """Unpack the wheels, fetched from the package index that pip is set to."""
    pinned = aside / "pinned.txt"
    pinned.write_text("".join(f"{name} --hash=sha256:{sha256}\n" for name, sha256 in WHEELS.items()))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--python-version", "3.11", *platforms, "--no-compile", "--target", str(site), "-r", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"the wheels for arm64 cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
