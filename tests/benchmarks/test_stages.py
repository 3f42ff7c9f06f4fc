"""The benchmark of the three stages: FLOPs by hand at the smallest size, and (slow) all variants at full depth."""

import pytest


def attention(layers: int, tokens: int, text: int, width: int) -> int:
    """FLOPs of the attention of so many layers by hand: to themselves and to the text, two products each."""
    return layers * 2 * 2 * tokens * (tokens + text) * width


@pytest.mark.slow
def test_the_smallest_networks(benchmark):
    arguments = ("--variants", "PixArt", "--layers", 6, "--heads", 4, "--latents", 16, "--repeats", 2)
    table, result = benchmark("stages.py", *arguments)
    rows = result["rows"]
    assert list(rows) == ["PixArt", "A"] and result["layers"] == 6
    # PixArt's one encoder gives 256 text tokens, the elastic net's two give 128 each and a token more each.
    assert rows["PixArt"]["flops"]["attention"] == attention(6, 64, 256, 288)
    assert rows["A"]["flops"]["attention"] == attention(6, 64, 258, 288)
    for row in rows.values():
        assert row["ms"] > 0 and min(row["profile_ms"].values()) > 0 and row["speedup"].keys() == {"PixArt", "A"}
    assert rows["A"]["speedup"]["A"] == rows["A"]["flops_ratio"] == 1
    assert any(line.startswith("PixArt ") for line in table)


@pytest.mark.slow
@pytest.mark.export
def test_stages(benchmark):
    arguments = ("--heads", 4, "--latents", 32, "--repeats", 2)
    rows = benchmark("stages.py", *arguments, children=True)[1]["rows"]
    assert list(rows) == ["PixArt", "A", "B", "C", "D"]
    flops = {variant: row["flops"] for variant, row in rows.items()}
    assert flops["A"]["attention"] == attention(24, 256, 258, 288)
    assert flops["PixArt"]["attention"] == attention(24, 256, 256, 288)
    assert flops["A"]["attention"] > flops["B"]["attention"] > flops["D"]["attention"] > flops["C"]["attention"]
    assert flops["A"]["linear"] > flops["D"]["linear"] > flops["C"]["linear"] > flops["B"]["linear"]
    assert rows["D"]["weights"] > rows["C"]["weights"] > rows["B"]["weights"]
