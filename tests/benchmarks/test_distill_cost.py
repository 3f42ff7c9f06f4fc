"""The benchmark of the bank's step runs at a small size and prints what it promises; what it is there for holds by a
wide margin.
"""

import json
import os
import subprocess
import sys


def test_one_forward_for_all_proxies_is_cheaper_than_one_a_proxy(repository):
    command = [
        sys.executable,
        repository / "benchmarks" / "distill_cost.py",
        "--json",
        "--threads",
        "1",
        "--repeats",
        "2",
    ]
    small = ["--hidden-size", "32", "--heads", "2", "--sample-size", "4", "--batch-size", "1"]
    done = subprocess.run(
        [*command, *small], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert result["proxies"] == 140 and list(result["seconds"]) == [
        "shared",
        "full forward",
        "prefix only",
        "lower bound",
    ]
    assert (
        result["full_over_shared"] > 2 and result["prefix_over_shared"] > 1.5 and 0.5 < result["shared_over_bound"] < 3
    )
    assert f"shared is {result['full_over_shared']:.2f}× cheaper" in table[-1]
