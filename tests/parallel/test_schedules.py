"""Pipeline schedules: every piece once, inputs just in time, the papers' bubbles, and slots that do not grow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.parallel.schedules import IDLE, Schedule, bubble_fraction, simulate
from tests.conftest import tolerance

FLOAT = tolerance("float64")


@st.composite
def schedules(draw) -> Schedule:
    kind = draw(st.sampled_from(("gpipe", "1f1b", "interleaved")))
    stages = draw(st.integers(2, 6))
    if kind == "interleaved":
        return Schedule(kind, stages, stages * draw(st.integers(1, 4)), draw(st.integers(2, 4)))
    return Schedule(kind, stages, draw(st.integers(1, 14)))


def ticks_of(table: np.ndarray) -> dict[tuple[int, int], int]:
    """Give the tick of every (stage, piece) of a table; no piece may stand there twice."""
    found = {(int(stage), int(table[tick, stage])): int(tick) for tick, stage in np.argwhere(table != IDLE)}
    assert len(found) == (table != IDLE).sum()
    return found


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_every_stage_runs_every_piece_once_forward_and_once_backward(schedule):
    everything = {(stage, piece) for stage in range(schedule.stages) for piece in range(schedule.work)}
    assert schedule.forward.shape == schedule.backward.shape == (schedule.ticks, schedule.stages)
    assert set(ticks_of(schedule.forward)) == everything
    assert set(ticks_of(schedule.backward)) == everything


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_every_input_was_sent_in_the_tick_before(schedule):
    """The executor has no queue: what arrives and is not used is lost."""
    forward, backward = ticks_of(schedule.forward), ticks_of(schedule.backward)
    stages, chunks = schedule.stages, schedule.chunks
    for (stage, piece), tick in forward.items():
        chunk = piece % chunks
        if stage:
            assert forward[stage - 1, piece] == tick - 1
        elif chunk:
            assert forward[stages - 1, piece - 1] == tick - 1
    for (stage, piece), tick in backward.items():
        chunk = piece % chunks
        if stage < stages - 1:
            assert backward[stage + 1, piece] == tick - 1
        elif chunk < chunks - 1:
            assert backward[0, piece + 1] == tick - 1


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_a_piece_goes_backward_after_it_went_forward(schedule):
    """In the same tick at the earliest: a tick runs its forward first."""
    forward, backward = ticks_of(schedule.forward), ticks_of(schedule.backward)
    assert all(backward[place] >= tick for place, tick in forward.items())


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 3), (4, 9)])
def test_gpipe_goes_backward_when_all_have_gone_forward_and_1f1b_at_once(stages, microbatches):
    gpipe, ours = (Schedule(kind, stages, microbatches) for kind in ("gpipe", "1f1b"))
    last = stages - 1
    assert min(ticks_of(gpipe.backward).values()) > max(ticks_of(gpipe.forward).values())
    for piece in range(microbatches):
        assert ticks_of(ours.backward)[last, piece] == ticks_of(ours.forward)[last, piece]


# --- how long it takes


@settings(max_examples=60, deadline=None)
@given(schedules(), st.sampled_from(((1.0, 2.0), (1.0, 1.0), (1.0, 3.0), (2.0, 1.0))))
def test_the_bubble_is_the_papers_closed_form(schedule, times):
    """(p-1) / (v m + p-1) of the whole, whatever a backward costs (arXiv 1811.06965, 2104.04473)."""
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    total, bubble = simulate(schedule, *times)
    np.testing.assert_allclose(bubble, (p - 1) / (v * m + p - 1), **FLOAT)
    np.testing.assert_allclose(bubble_fraction(schedule), bubble, **FLOAT)
    np.testing.assert_allclose(total, (m + (p - 1) / v) * sum(times), **FLOAT)


def test_the_tables_take_as_many_ticks_as_work_and_the_way_there_and_back():
    """The executor's own clock: a tick is one forward and one backward of a chunk."""
    for schedule, ticks in (
        (Schedule("gpipe", 4, 8), 2 * (8 + 3)),
        (Schedule("1f1b", 4, 8), 8 + 2 * 3),
        (Schedule("interleaved", 4, 8, 2), 16 + (8 - 1) + 3),
    ):
        assert schedule.ticks == ticks
        busy = (schedule.forward != IDLE) | (schedule.backward != IDLE)
        assert busy.any(1).all(), "no tick is for nothing"


# --- what is kept


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_a_slot_holds_its_input_until_the_backward_took_it(schedule):
    put, take, number = schedule.slots
    for stage in range(schedule.stages):
        stash = np.full(number + 1, IDLE)
        for tick in range(schedule.ticks):
            ahead, behind = schedule.forward[tick, stage], schedule.backward[tick, stage]
            slot = put[tick, stage]
            assert (slot == number) == (ahead == IDLE), "idle ticks write to the last slot, and nobody else"
            assert slot == number or stash[slot] == IDLE, "overwritten while held"
            stash[slot] = ahead
            slot = take[tick, stage]
            assert (slot == number) == (behind == IDLE)
            if behind != IDLE:
                assert stash[slot] == behind
                stash[slot] = IDLE
        assert (stash[:number] == IDLE).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 14))
def test_gpipe_keeps_every_microbatch_and_1f1b_no_more_than_the_stages_need(stages, microbatches):
    assert Schedule("gpipe", stages, microbatches).slots[2] == microbatches
    assert Schedule("1f1b", stages, microbatches).slots[2] == min(microbatches, 2 * stages - 1)


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (3, 2), (4, 3), (2, 4)])
def test_interleaving_keeps_no_more_for_more_microbatches(stages, chunks):
    kept = [Schedule("interleaved", stages, stages * groups, chunks).slots[2] for groups in (3, 6, 12)]
    assert kept[0] == kept[1] == kept[2]
    assert kept[0] <= 3 * stages * chunks


def test_interleaving_wants_whole_groups_of_microbatches():
    with pytest.raises(ValueError, match=r"microbatches \(6\) must divide by stages \(4\) to interleave"):
        Schedule("interleaved", 4, 6, 2)
    Schedule("interleaved", 4, 8, 2)
    Schedule("1f1b", 4, 6)
