"""The page's scripts run by node."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import edgedit_hf.export

PAGE = Path(edgedit_hf.export.__file__).parent / "web" / "page"
DRIVER = Path(__file__).parents[1] / "export" / "web" / "driver.mjs"
needs_node = pytest.mark.skipif(
    shutil.which("node") is None, reason="node is not installed: the page's scripts cannot run"
)


def ask_node(requests: list[dict]) -> list:
    """The answers of driver.mjs, one a request."""
    command = ["node", str(DRIVER), str(PAGE)]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
