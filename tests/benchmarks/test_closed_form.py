"""The benchmark of the closed forms at a small size: what it prints holds together; that it is better throughout is for
the real size.
"""


def test_closed_form(benchmark, repository, debug_run):
    recipe = ("--config", repository / "training" / "recipes" / "debug.yaml", "--override", "threads=1")
    arguments = ("--layers", "0,2", "--budget", 20, "--steps", 12)
    _, result = benchmark("closed_form.py", debug_run, *recipe, *arguments, threads=None)
    kinds = ["mlp", "attention", "both", "merged original", "merged mlp", "merged attention", "merged both"]
    assert set(result["copied_ratio"]) == {f"{layer}/{kind}" for layer in (0, 2) for kind in kinds}
    assert result["marks"] == [0, 10, 12] and set(result["random"]) == {
        f"{i}/{kind}" for i in (0, 2) for kind in ("mlp", "attention")
    }
    for place, row in result["random"].items():
        assert row["steps"] == 40 or row["steps"] == 20 and row["gain"] < 0.01
        assert row["closed_form"] == result["curves"]["closed form"][place][0] and row["ratio"] > 1
    for place, ratio in result["copied_ratio"].items():
        pairs = zip(result["curves"]["copied"][place], result["curves"]["closed form"][place])
        assert ratio == min(copied / closed for copied, closed in pairs) > 1
