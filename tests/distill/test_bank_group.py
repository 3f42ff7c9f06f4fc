"""What each step of the bank's stage does."""

import pytest

from edgedit_hf.distill.bank_group import group_step, group_steps


@pytest.mark.parametrize(("singles", "both"), [(4, 3), (1, 1), (3, 0), (0, 2), (0, 0)])
def test_the_steps_of_two_groups_are_what_a_loop_over_them_does(singles, both):
    wanted = []
    for group in range(2):
        started = False
        local = 0
        for steps, end in ((singles, False), (both, True)):
            for done in range(steps + end):
                combines = end and done == 0
                wanted.append((group, local, done, steps, not started, combines, end and done == steps))
                started, local = True, local + 1
    assert len(wanted) == 2 * group_steps(singles, both)
    assert [group_step(step, singles, both) for step in range(len(wanted))] == wanted
