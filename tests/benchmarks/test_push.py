"""The benchmark of a push at its smallest: what is sent is asserted here, time and memory are not."""


def test_push(benchmark):
    _, result = benchmark("push.py", "--megabytes", 2, children=True, threads=None)
    plain, ours, again = (result["rows"][name]["sent"] for name in result["rows"])
    assert plain >= 2e6 and ours - plain < 5e4, "the weights, and a card beside them"
    assert again == 0
