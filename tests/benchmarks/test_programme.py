"""The benchmark of the integer programme at its smallest: what it finds is asserted here, time is not."""


def test_programme(benchmark):
    table, result = benchmark("programme.py", "--layers", 5, "--choices", 4, "--points", 4, "--k", 3, threads=None)
    assert result["replacements"] == 4 * (5 + 4 + 3) and result["proved"]
    rows = result["rows"]
    assert rows["best without a cap"]["score"] == 0.0 and len(table) == 3 + len(rows)
    assert [row["solutions"] for row in rows.values()][-1] == 3
    under = [row["score"] for label, row in rows.items() if label.startswith("best under") and "ms" in label]
    assert under == sorted(under, reverse=True)
