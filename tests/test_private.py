"""Tokens, pickles and paths of a machine are found wherever they hide, and nothing else is."""

import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgedit_hf.private import CHUNK, is_pickle, local_path_in, local_paths, secret_in, without_local_paths

# Put together here, so that no scanner of repositories takes this file for a leak.
TOKENS = {
    "a Hugging Face token": "hf" + "_" + "Ab1" * 12,
    "a GitHub token": "ghp" + "_" + "x9" * 20,
    "a GitLab token": "glpat" + "-" + "a-b_c" * 5,
    "an AWS key": "AKIA" + "B7" * 8,
    "a Google key": "AIza" + "Sy-_x" * 7,
    "a Slack token": "xox" + "b-" + "12345-abcde",
    "a secret key": "sk" + "-" + "proj4567" * 5,
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
}


@pytest.mark.parametrize(("kind", "token"), TOKENS.items(), ids=str)
def test_tokens_are_found_in_text_and_in_weights(kind, token, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"note": "{token}"}}')
    assert secret_in(tmp_path / "config.json").startswith(kind)
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "w.safetensors", metadata={"note": token})
    assert secret_in(tmp_path / "w.safetensors").startswith(kind)
    assert token not in secret_in(tmp_path / "config.json"), "the message must not spread it"


def test_a_token_across_two_reads_is_found(tmp_path):
    token = TOKENS["a Hugging Face token"].encode()
    (tmp_path / "model.onnx").write_bytes(b"\0" * (CHUNK - 10) + token + b"\0" * 50)
    assert secret_in(tmp_path / "model.onnx")


def test_named_keys_own_token_and_files_of_secrets(tmp_path):
    (tmp_path / "a.yaml").write_text("wandb_api_key: " + "0123456789abcdef" * 2)
    assert "api_key" in secret_in(tmp_path / "a.yaml")
    (tmp_path / "b.txt").write_text("see mytoken123")
    assert secret_in(tmp_path / "b.txt") is None
    assert "logged in" in secret_in(tmp_path / "b.txt", own="mytoken123")
    (tmp_path / "id_rsa").write_text("")
    assert "by its name" in secret_in(tmp_path / "id_rsa")


def test_random_weights_and_ordinary_words_are_no_secrets(tmp_path):
    (tmp_path / "w.onnx").write_bytes(random.Random(0).randbytes(4 << 20))
    assert secret_in(tmp_path / "w.onnx") is None
    (tmp_path / "README.md").write_text("Set HF_TOKEN=hf_... and `sk-learn`, a password: yes; token: null")
    assert secret_in(tmp_path / "README.md") is None


def test_pickles_by_their_bytes_and_by_their_suffix(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "model.bin").write_bytes(b"anything")
    np.savez(tmp_path / "latents.npz", a=np.zeros(2))
    for name in ("weights.safetensors", "notes.txt", "model.bin", "latents.npz"):
        assert is_pickle(tmp_path / name), name
    package = tmp_path / "model.mlpackage" / "Data" / "weights"
    package.mkdir(parents=True)
    (package / "weight.bin").write_bytes(b"\0" * 64)
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "w.safetensors")
    assert not is_pickle(package / "weight.bin") and not is_pickle(tmp_path / "w.safetensors")


def test_paths_of_a_machine_and_what_only_looks_like_one(tmp_path):
    here = tmp_path / "photos"
    here.mkdir()
    text = f"from {here} and /home/ada/data/x.png, C:\\Users\\ada\\run; https://huggingface.co/tmp/a/b "
    text += "adb push model.pte /data/local/tmp/model.pte; runs/demo/teacher; 3/4/5; transformer/config.json; </a/b>"
    assert list(local_paths(text)) == [str(here), "/home/ada/data/x.png", "C:\\Users\\ada\\run"]
    (tmp_path / "config.json").write_text(f'{{\n"a": 1,\n"b": "{here}"\n}}')
    assert local_path_in(tmp_path / "config.json") == (3, str(here))
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"/home/user": 1}}')
    assert local_path_in(tmp_path / "tokenizer.json") is None
    values = {"data": {"source": str(here), "others": [f"a {here}/b.png", 3]}}
    assert without_local_paths(values) == {"data": {"source": "photos", "others": ["a b.png", 3]}}


def test_a_pickle_anywhere_in_an_archive_and_paths_in_text_of_any_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.dat", "w") as archive:
        archive.writestr("readme.txt", "x" * 200)
    assert not is_pickle(tmp_path / "model.dat")
    with zipfile.ZipFile(tmp_path / "model.dat", "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(1))
    assert is_pickle(tmp_path / "model.dat")
    for name in ("NOTES", "notes.TXT", "run.sh", "setup.cfg"):
        (tmp_path / name).write_text("cd /root/photos/cats")
        assert local_path_in(tmp_path / name) == (1, "/root/photos/cats"), name
