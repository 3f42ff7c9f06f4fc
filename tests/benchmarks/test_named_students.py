"""The benchmark of the paper's students on the first layers of the real networks; the claim is for all of them."""

from edgedit_hf.search_space import model_cost


def test_one_layer_of_each(benchmark):
    arguments = ("--runtimes", "torch", "--layers", 1, "--repeats", 2)
    table, result = benchmark("named_students.py", *arguments)
    rows = {row["network"]: row for row in result["rows"]}
    assert list(rows) == ["EdgeDiT-1", "EdgeDiT-6"] and {row["runtime"] for row in rows.values()} == {"torch"}

    def flops(**layer) -> float:
        layers = [{"source": [0], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 4.0, **layer}]
        sizes = {"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000, "learn_sigma": True}
        return model_cost({**sizes, "hidden_size": 1152, "layers": layers}).flops

    assert rows["EdgeDiT-1"]["flop_ratio"] == flops() / flops(mlp_ratio=2.0) > 1.1
    assert rows["EdgeDiT-6"]["flop_ratio"] == flops() / flops(attention_dim=512) > 1.1
    for row in rows.values():
        assert row["ms"] > 0 and row["teacher_ms"] > 0 and row["share"] == row["speedup"] / row["flop_ratio"]
    assert len(table) == 3
