"""Who starts next: the order of requests that wait for a place. No torch, no clock."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

    from engine.sequence import Sequence
    from engine.types import Request

_PREFIX_TOKENS = 64
_Key = tuple[float, float, float, int, float, int]


class LengthEstimator:
    """Expected output length of a request: the mean of its template's finished outputs, else `max_tokens`.

    The mean forgets: it moves by at least 1/32 with every finished sibling. At most `max_templates` are remembered.
    """

    def __init__(self, max_templates: int = 4096) -> None:
        self._max_templates = max_templates
        self._means: dict[str, tuple[int, float]] = {}

    def expected(self, request: Request) -> float:
        known = self._means.get(request.template) if request.template is not None else None
        limit = float(request.sampling.max_tokens)
        return limit if known is None else min(limit, known[1])

    def learn(self, request: Request, generated: int) -> None:
        if request.template is None:
            return
        count, mean = self._means.pop(request.template, (0, 0.0))
        count = min(count + 1, 32)
        self._means[request.template] = (count, mean + (generated - mean) / count)
        if len(self._means) > self._max_templates:
            del self._means[next(iter(self._means))]


class WaitingQueue:
    """Order: preempted first, then priority, deadline, shared prefix (groups with long outputs first), longest expected output.

    Nobody starves: a request that `patience` later choices went past is chosen next, whatever its rank.
    """

    def __init__(self, lengths: LengthEstimator, patience: int) -> None:
        self._lengths = lengths
        self._patience = patience
        self._heap: list[tuple[_Key, Sequence]] = []
        self._arrivals: deque[tuple[int, Sequence]] = deque()
        self._resumed: OrderedDict[int, Sequence] = OrderedDict()
        self._members: dict[int, Sequence] = {}
        self._groups: dict[Hashable, tuple[float, int, int]] = {}
        self._choices = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.serial in self._members

    def push(self, sequence: Sequence) -> None:
        self._members[sequence.serial] = sequence
        self._arrivals.append((self._choices, sequence))
        heapq.heappush(self._heap, (self._key(sequence), sequence))

    def push_front(self, sequence: Sequence) -> None:
        """Puts a preempted sequence back where it is chosen first."""
        self._members[sequence.serial] = sequence
        self._resumed[sequence.serial] = sequence
        self._resumed.move_to_end(sequence.serial, last=False)

    def peek(self) -> Sequence | None:
        """The next to start, without removing it."""
        if self._resumed:
            return next(iter(self._resumed.values()))
        while self._arrivals and self._arrivals[0][1].serial not in self._members:
            self._arrivals.popleft()
        if self._arrivals and self._choices - self._arrivals[0][0] >= self._patience:
            return self._arrivals[0][1]
        while self._heap and self._heap[0][1].serial not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, chosen or aborted."""
        del self._members[sequence.serial]
        self._choices += 1
        if self._resumed.pop(sequence.serial, None) is not None:
            return
        group = self._group(sequence.request)
        rank, serial, count = self._groups.get(group, (0.0, 0, 0))
        if count > 1:
            self._groups[group] = (rank, serial, count - 1)
        else:
            self._groups.pop(group, None)

    def _key(self, sequence: Sequence) -> _Key:
        request = sequence.request
        expected = self._lengths.expected(request)
        group = self._group(request)
        rank, serial, count = self._groups.get(group, (-expected, sequence.serial, 0))
        self._groups[group] = (rank, serial, count + 1)
        deadline = math.inf if request.deadline is None else request.deadline
        return (-request.priority, deadline, rank, serial, -expected, sequence.serial)

    @staticmethod
    def _group(request: Request) -> Hashable:
        return request.template if request.template is not None else request.prompt_token_ids[:_PREFIX_TOKENS]
