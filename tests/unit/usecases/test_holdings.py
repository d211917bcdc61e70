"""Where each line of a worker stands, and that a dropped group takes its lines along from everywhere."""

from datetime import UTC, datetime

from service.domain.line import GroupLease, LineOutcome, Outcome, PendingLine
from service.usecases.holdings import Holdings


def lease(group_id, token=1):
    at = datetime(2030, 1, 1, tzinfo=UTC)
    return GroupLease(group_id, token, "b", "p", "m", "/v1/completions", 0, at, "auto", 1, False, "key", None)


def line(line_no, group_id=1):
    return PendingLine("b", line_no, group_id, f"c{line_no}", 0, 10, 0)


def outcome(line_no, group_id=1):
    return LineOutcome("b", line_no, group_id, f"c{line_no}", Outcome.SUCCEEDED)


def holding(lines=4, group_id=1):
    holdings = Holdings()
    holdings.add([lease(group_id)], [line(number, group_id) for number in range(1, lines + 1)])
    return holdings


def test_lines_wait_run_and_are_done_in_this_order():
    holdings = holding()
    assert [taken.line_no for taken in holdings.take(3)] == [1, 2, 3]
    assert holdings.finish(outcome(2))
    assert (holdings.unfinished, holdings.done) == (3, 1)
    assert [taken.line_no for taken in holdings.running] == [1, 3]
    assert holdings.take_done(10) == [outcome(2)]
    assert holdings.done_for() == 0.0


def test_an_outcome_that_nobody_waits_for_is_refused():
    holdings = holding()
    assert not holdings.finish(outcome(1)), "it is still waiting"
    holdings.take(1)
    assert holdings.finish(outcome(1))
    assert not holdings.finish(outcome(1)), "it came twice"


def test_lines_that_never_reached_the_runner_wait_again_in_their_order():
    holdings = holding()
    taken = holdings.take(3)
    holdings.finish(outcome(2))
    holdings.put_back(taken)
    assert [again.line_no for again in holdings.take(10)] == [1, 3, 4]


def test_a_dropped_group_takes_its_lines_along():
    holdings = holding(lines=4)
    holdings.add([lease(2)], [line(10, 2), line(11, 2)])
    holdings.take(2)
    holdings.finish(outcome(1))
    assert holdings.drop([1]) == [("b", 2)], "what the runner has to abort"
    assert (holdings.done, holdings.tokens) == (0, {2: 1})
    assert not holdings.finish(outcome(2))
    assert [left.line_no for left in holdings.take(10)] == [10, 11]


def test_lines_of_a_group_that_is_not_held_are_left_out():
    holdings = Holdings()
    holdings.add([lease(1)], [line(1, 1), line(2, 2)])
    assert [held.line_no for held in holdings.take(10)] == [1]


def test_a_group_that_comes_back_has_its_new_token():
    holdings = holding()
    holdings.drop([1])
    holdings.add([lease(1, token=5)], [line(1)])
    assert holdings.tokens == {1: 5}
