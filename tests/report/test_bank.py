"""What a bank's choices are worth, of a menu: made-up losses and times, weights counted by hand."""

from types import SimpleNamespace

from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.report.bank import bank_choices, bank_table


def test_the_choices_of_a_menu():
    menu = [{"modulation_rank": 0}, {"token_merge": 2}, {"merge": 3, "mlp_ratio": 1, "num_heads": 1}]
    space = MenuSpace(4, 8, 2, menu=menu)
    losses = {"loss_before": 0.5, "loss_after": 0.25}
    entries = {
        "01/static": {"source": [1], "option": "static", **losses},
        "02/tokens2": {"source": [2], "option": "tokens2", **losses},
        "00-01-02/heads1-mlp1": {"source": [0, 1, 2], "option": "heads1-mlp1", **losses},
    }
    times = {layer.shape.timed: 3.0 for layer in space.replacements()}
    times[space.option_shape("heads1-mlp1")] = 2.0
    del times[space.option_shape("tokens2")]
    table = SimpleNamespace(space=space, blocks=times)
    found = bank_choices({"space": space.to_dict(), "entries": entries}, table)
    static, tokens, merged = found["choices"]
    qkv, out, mlp, adaln = 3 * (64 + 8), 64 + 8, 64 * 4 * 2 + 32 + 8, 6 * 64 + 48
    assert found["original"]["parameters"] == qkv + out + mlp + adaln == tokens["parameters"]
    assert static["saved_parameters"] == 6 * 64 and static["parameters"] == qkv + out + mlp + 48
    assert merged["parameters"] == qkv + out + (64 * 2 + 16) + adaln
    assert (static["ms"], static["saved_ms"]) == (3.0, 0.0)  # modulation is computed before: bytes, no milliseconds
    assert (tokens["ms"], tokens["saved_ms"]) == (None, None)
    assert (merged["ms"], merged["saved_ms"]) == (2.0, 3 * 3.0 - 2.0)
    assert found["total"]["missing"] == len(space.proxies()) - 3 > 0
    lines = bank_table(found)
    assert lines[4].split()[:5] == ["00-01-02/heads1-mlp1", "0.5", "0.25", "2.000", "7.000"]
    assert lines[3].count("–") == 2 and "were not made" in lines[-1]
