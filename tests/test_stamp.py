"""Stamps: what differs between two, and what may be compared."""

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.schema import check
from edgedit_hf.stamp import PROTOCOL, Stamp, check_comparable, differences, protocol

STAMP = {
    "extractor": "digits-cnn",
    "extractor_hash": "0123456789abcdef",
    "reference": "f" * 64,
    "reference_count": 1438,
    "count": 2000,
    "rounding": "none",
    "prompts": None,
    "seed": 0,
    "scheduler": "DDIMScheduler",
    "steps": 20,
    "guidance_scale": 1.5,
    "dtype": "float32",
    "vae": None,
    "vae_hash": None,
}


def test_a_stamp_is_complete_and_checked():
    check(STAMP, Stamp)
    assert set(STAMP) == set(Stamp.__dataclass_fields__) and set(PROTOCOL) < set(STAMP)
    for part, wrong in (("rounding", "half"), ("count", 0), ("extractor_hash", None), ("seed", -1)):
        with pytest.raises(EdgeDiTError, match=part):
            check({**STAMP, part: wrong}, Stamp)


@pytest.mark.parametrize("part", sorted(STAMP))
def test_every_part_that_differs_is_named(part):
    other = {**STAMP, part: "other"}
    assert differences(STAMP, STAMP) == {}
    assert differences(STAMP, other) == {part: (STAMP[part], "other")}
    assert (protocol(STAMP) == protocol(other)) == (part not in PROTOCOL)


def test_results_of_two_protocols_are_not_compared():
    check_comparable({"teacher": STAMP, "student": {**STAMP, "seed": 1, "steps": 4}, "older": None})
    check_comparable({})
    with pytest.raises(
        EdgeDiTError, match="teacher and student were not judged alike: count is 2000 of teacher and 50"
    ):
        check_comparable({"older": None, "teacher": STAMP, "student": {**STAMP, "count": 50}})
