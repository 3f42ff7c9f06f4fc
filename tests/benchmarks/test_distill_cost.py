"""The benchmark of the bank's step runs at a small size and prints what it promises; what it is there for holds by a
wide margin.
"""

import pytest


@pytest.mark.slow
def test_one_forward_for_all_proxies_is_cheaper_than_one_a_proxy(benchmark):
    arguments = ("--repeats", 2, "--hidden-size", 32, "--heads", 2, "--sample-size", 4, "--batch-size", 1)
    table, result = benchmark("distill_cost.py", *arguments)
    assert result["proxies"] == 140
    assert list(result["seconds"]) == ["shared", "full forward", "prefix only", "lower bound"]
    assert (
        result["full_over_shared"] > 2 and result["prefix_over_shared"] > 1.5 and 0.5 < result["shared_over_bound"] < 3
    )
    assert f"shared is {result['full_over_shared']:.2f}× cheaper" in table[-1]
