"""What is asked for and what a folder was made with: the first difference has a name."""

import json

from edgedit_hf.run.comparison import first_difference


def test_the_first_difference_is_named():
    old = {"a": {"b": [1, 2], "c": 3}, "d": 4}
    assert first_difference(old, json.loads(json.dumps(old))) is None
    assert first_difference(old, {"a": {"b": [1, 2], "c": 5}, "d": 6}) == ("a.c", 3, 5)
    assert first_difference(old, {"a": {"b": [2, 1], "c": 3}, "d": 4}) == ("a.b", [1, 2], [2, 1])
    assert first_difference(old, {"a": old["a"]}) == ("d", 4, None)
