"""Schedules end where they should, and plans keep to steps, to the clock, or to what an earlier run did."""

from itertools import pairwise

import pytest

from clearwing.train.schedule import SCHEDULES, Budget, FirstEpoch, Replay, Steps, schedule
from clearwing.types import ClearwingError


class Clock:
    """A clock that moves when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_stay_between_zero_and_the_peak(name):
    values = [schedule(name)(i / 200) for i in range(201)]
    assert all(0 <= value <= 1 for value in values)
    assert max(values) > 0.999


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
def test_annealed_schedules_end_at_zero_and_fall_after_the_warm_up(name):
    values = [schedule(name)(0.3 + 0.7 * i / 100) for i in range(101)]
    assert values[-1] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in pairwise(values))


def test_step_schedule_divides_by_ten_at_a_half_and_three_quarters():
    step = schedule("step")
    assert [step(0.0), step(0.49), step(0.5), step(0.75), step(0.99)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_unknown_schedule_names_the_near_ones():
    with pytest.raises(ClearwingError, match="schedule: cosin; did you mean cosine"):
        schedule("cosin")


def test_a_schedule_can_rise_for_another_share():
    assert schedule("one-cycle", 0.5)(0.5) == pytest.approx(1)
    assert schedule("cosine", 0.0)(0.0) == pytest.approx(1)
    assert schedule("one-cycle")(0.25) == schedule("one-cycle", 0.25)(0.25)
    with pytest.raises(ClearwingError, match=r"warmup: 0\.1; the schedule step has none"):
        schedule("step", 0.1)
    with pytest.raises(ClearwingError, match=r"warmup: 1\.5"):
        schedule("cosine", 1.5)


def test_steps_end_after_their_number():
    plan = Steps(4)
    assert [plan.over(i) for i in range(5)] == [False] * 4 + [True]
    assert [plan.progress(i) for i in range(4)] == [0, 0.25, 0.5, 0.75]


def run_plan(plan, clock, seconds_a_step, epoch_steps=10, validation=0.0, most=10_000):
    """Steps taken, with the clock moving as a training would move it."""
    step = 0
    while not plan.over(step) and step < most:
        plan.took(plan.progress(step))
        clock.now += seconds_a_step(step)
        step += 1
        if step % epoch_steps == 0:
            clock.now += validation
            plan.epoch_ended(step)
    return step


def test_budget_ends_in_time_with_the_schedule_run_down():
    clock = Clock()
    plan = Budget(60, clock=clock)
    plan.hold_back(5)
    run_plan(plan, clock, lambda step: 0.4, validation=1.0)
    assert plan.elapsed <= 55 + 1e-9
    assert plan.history[-1] > 0.97
    assert plan.history == sorted(plan.history)


def test_budget_ends_in_time_when_steps_become_slower():
    clock = Clock()
    plan = Budget(60, clock=clock)
    run_plan(plan, clock, lambda step: 0.2 if step < 100 else 1.5)
    assert 55 < plan.elapsed <= 60 + 1e-9


def test_a_grown_reserve_never_turns_progress_back():
    clock = Clock()
    plan = Budget(100, clock=clock)
    clock.now += 40
    before = plan.progress(0)
    plan.took(before)
    assert plan.share(1) == before > plan.share(0) == 0
    plan.hold_back(20)
    assert plan.progress(1) >= before
    plan.hold_back(10)
    assert plan.reserve == 20


def test_budget_goes_on_after_a_restart_with_the_time_that_is_left():
    clock = Clock()
    plan = Budget(60, clock=clock)
    clock.now += 45
    plan.took(plan.progress(0))
    kept = plan.state()
    clock.now += 1000  # the machine was off
    again = Budget(60, clock=clock)
    again.restore(kept)
    assert again.remaining(1) == pytest.approx(15)
    assert again.progress(1) == pytest.approx(0.75)


def test_no_time_left_is_refused():
    with pytest.raises(ClearwingError, match="--time-budget"):
        Budget(-1)


def test_first_epoch_plans_eighty_percent_of_what_fits():
    clock = Clock()
    plan = FirstEpoch(100, clock=clock)
    steps = run_plan(plan, clock, lambda step: 0.5)  # an epoch takes 5 s; 95 s are left: 15.2 epochs of 80 %
    assert steps == 10 * (1 + 15)
    assert set(plan.history[:10]) == {0.0}
    assert plan.history[10] == 0
    assert plan.history[-1] == pytest.approx(149 / 150)


def test_first_epoch_ends_after_it_where_no_other_fits():
    clock = Clock()
    plan = FirstEpoch(8, clock=clock)
    assert run_plan(plan, clock, lambda step: 0.5) == 10
    assert plan.over(10)
    assert 0 <= plan.progress(10) <= 1


def test_the_share_behind_a_step_names_whole_epochs():
    plan = Steps(20 * 7)
    assert [epoch for epoch in range(20) if plan.share(7 * epoch) >= 1 - 0.15 - 1e-9] == [17, 18, 19]
    assert Replay([0.1, 0.5, 0.9]).share(0) == 0
    assert Replay([0.1, 0.5, 0.9]).share(2) == 0.5


def test_replay_repeats_the_progress_of_a_budget():
    clock = Clock()
    plan = Budget(20, clock=clock)
    steps = run_plan(plan, clock, lambda step: 0.3 + 0.01 * step)
    again = Replay(plan.state()["history"])
    assert again.total == steps
    assert [again.progress(i) for i in range(steps)] == plan.history
    with pytest.raises(ClearwingError, match=r"plan\.json"):
        Replay([])
