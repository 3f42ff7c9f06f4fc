"""What a push of a phone's largest net takes: seconds, bytes and memory, beside huggingface_hub's own upload_folder.

    python benchmarks/push.py [--megabytes 889] [--json] [--check]

A proxy bank's folder of that size (elastic-dit-1.6b takes 889 MB in 4.3 bits a weight; what is in the files does not
matter here, so they are random) is pushed to a Hub on the loopback interface (tests/helpers/hub_server.py, Xet off),
each time by a process of its own: by upload_folder, which only sends it, into a repository of its own; by `edgedit
push`, which looks for what must not leave this machine, compares every file's hash with the recorded one and makes the
card; and by that again, when nothing has changed. Memory is the process's peak above that of an interpreter
which does nothing.

--check fails if `edgedit push` takes more than 300 MB, or sends anything the second time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from edgedit_hf.files import atomic_write_json, file_sha256
from edgedit_hf.records import BANK_FORMAT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from hub_server import Hub  # noqa: E402

MEMORY, FILES = 300e6, 8
PEAK = "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("me/plain", private=True)
HfApi().upload_folder(repo_id="me/plain", folder_path=sys.argv[1])
"""
PUSH = """
import sys
from edgedit_hf.commands.cli import main
code = main(["push", sys.argv[1], "me/bank", "--license", "mit", "--base-model", "me/teacher"])
assert code == 0
"""


def make_bank(folder: Path, size: int) -> None:
    """A bank of random files that add up to `size` bytes."""
    draw, entries = np.random.default_rng(0), {}
    for number in range(FILES):
        name = f"{number:02d}-mlp.safetensors"
        save_file({"w": np.frombuffer(draw.bytes(size // FILES), np.uint8)}, folder / name)
        entries[f"{number:02d}/mlp"] = {
            **{"file": name, "sha256": file_sha256(folder / name), "source": [number], "option": "mlp", "steps": 1},
            **{"loss_before": 1.0, "loss_after": 0.5, "losses": {"random": 1.0, "after": 0.5}, "curve": [], "seed": 0},
        }
    space = {"num_layers": FILES, "hidden_size": 64, "num_heads": 4, "reduced_attention_dim": 32}
    atomic_write_json(
        folder / "index.json", {"format": BANK_FORMAT, "teacher_hash": "0" * 16, "space": space, "entries": entries}
    )


def child(code: str, folder: Path, env: dict[str, str]) -> tuple[float, float]:
    """Seconds that a program takes, and bytes of memory at its peak."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + PEAK, str(folder)],
        env={**os.environ, **env},
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - started, 1024 * float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=889.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the bars are met")
    arguments = parser.parse_args()

    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "bank")
        folder.mkdir()
        make_bank(folder, int(arguments.megabytes * 1e6))
        size = sum(path.stat().st_size for path in folder.iterdir())
        with Hub(Path(name, "hub")) as hub:
            env = hub.env(Path(name, "home"))
            idle = child("", folder, env)[1]
            for label, code in (("upload_folder", UPLOAD), ("edgedit push", PUSH), ("edgedit push, unchanged", PUSH)):
                hub.forget()
                seconds, peak = child(code, folder, env)
                rows[label] = {"seconds": seconds, "sent": hub.sent(), "memory": peak - idle}
    print(f"{size / 1e6:.0f} MB in {FILES} files; an idle interpreter takes {idle / 1e6:.0f} MB")
    print(f"{'':<26}{'seconds':>9}{'sent, MB':>10}{'memory, MB':>12}")
    for label, row in rows.items():
        print(f"{label:<26}{row['seconds']:>9.1f}{row['sent'] / 1e6:>10.1f}{row['memory'] / 1e6:>12.0f}")
    ratio = rows["edgedit push"]["seconds"] / rows["upload_folder"]["seconds"]
    print(f"edgedit push takes {ratio:.2f} of upload_folder's time")
    if arguments.json:
        print(json.dumps({"bytes": size, "rows": rows, "ratio": ratio}))
    memory, again = rows["edgedit push"]["memory"], rows["edgedit push, unchanged"]["sent"]
    if arguments.check and (memory > MEMORY or again):
        sys.exit(f"memory is {memory / 1e6:.0f} MB, {MEMORY / 1e6:.0f} are allowed; the second push sent {again} bytes")


if __name__ == "__main__":
    main()
