"""The committer alone: when it commits, how it waits, and what it does with refusals."""

import threading

import pytest

from service.errors import Unavailable
from service.usecases.committer import Committer
from service.usecases.deliver import Delivery
from tests.unit.usecases.test_holdings import holding, lease, outcome


class Deliverer:
    """Notes what it is given; `answers` are raised or returned in turn, then everything is delivered."""

    def __init__(self, *answers):
        self.answers, self.stored, self.commits = list(answers), [], 0
        self.reached = threading.Semaphore(0)

    def store(self, outcomes, leases):
        self.stored.append([done.line_no for done in outcomes])
        return outcomes

    def commit(self, packed, leases, *, also=()):
        self.commits += 1
        self.reached.release()
        answer = self.answers.pop(0) if self.answers else Delivery(packed, frozenset(), frozenset())
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def committing():
    """Makes a started committer on holdings with four running lines; all are ended after the test."""
    made, seen = [], []

    def make(deliverer, *, every=60.0, lines=2, lost=None):
        holdings = holding()
        holdings.take(4)
        on_lost = (lost if lost is not None else []).extend
        committer = Committer(holdings, deliverer, every=every, lines=lines, on_lost=on_lost, on_delivered=seen.extend)
        committer.start()
        made.append(committer)
        return committer, holdings

    yield make
    for committer in made:
        committer.close()


def finish(committer, holdings, *numbers):
    for number in numbers:
        assert holdings.finish(outcome(number))
        committer.notify()


def test_enough_outcomes_are_a_commit(committing):
    deliverer = Deliverer()
    committer, holdings = committing(deliverer)
    finish(committer, holdings, 1)
    assert not deliverer.reached.acquire(timeout=0.1)
    finish(committer, holdings, 2)
    assert deliverer.reached.acquire(timeout=10)
    assert deliverer.stored == [[1, 2]]


def test_a_few_outcomes_are_committed_after_a_while(committing):
    deliverer = Deliverer()
    committer, holdings = committing(deliverer, every=0.05)
    finish(committer, holdings, 1)
    assert deliverer.reached.acquire(timeout=10)
    assert committer.flush(10)
    assert committer.delivered == 1


def test_a_flush_commits_everything_in_portions(committing):
    deliverer = Deliverer()
    committer, holdings = committing(deliverer, lines=3)
    with committer.committing:  # nothing gets through yet
        finish(committer, holdings, 1, 2, 3, 4)
        assert not committer.flush(0.1)
    assert committer.flush(10)
    assert deliverer.stored == [[1, 2, 3], [4]]


def test_an_outage_is_waited_out_and_the_segment_is_stored_once(committing):
    deliverer = Deliverer(Unavailable("away"), Unavailable("away"))
    committer, holdings = committing(deliverer)
    finish(committer, holdings, 1, 2)
    assert committer.flush(10)
    assert (deliverer.stored, deliverer.commits, committer.delivered) == ([[1, 2]], 3, 2)


def test_a_group_that_was_lost_is_reported(committing):
    lost = []
    committer, holdings = committing(Deliverer(Delivery((), frozenset(), frozenset({1}))), lost=lost)
    finish(committer, holdings, 1, 2)
    assert committer.flush(10)
    assert lost == [1]


def test_a_bug_ends_the_thread_and_is_there_to_be_seen(committing):
    committer, holdings = committing(Deliverer(ZeroDivisionError()))
    finish(committer, holdings, 1, 2)
    assert not committer.flush(10)
    assert isinstance(committer.error, ZeroDivisionError)


def test_groups_without_lines_are_closed_with_a_commit_of_their_own(committing):
    deliverer = Deliverer(Delivery((), frozenset({9}), frozenset()))
    committer, holdings = committing(deliverer)
    holdings.add([lease(9)], [])
    committer.close_empty([lease(9)])
    assert committer.flush(10)
    assert 9 not in holdings.tokens
