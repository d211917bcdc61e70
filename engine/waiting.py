"""Who starts next: the order of requests that wait for a place. No torch, no clock."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

    from engine.sequence import Sequence
    from engine.types import Request

_PREFIX_TOKENS = 64
_Key = tuple[float, float, float, int]
_Name = tuple[int, float, "Hashable"]
"""Priority, deadline, and what its members have in common."""


class LengthEstimator:
    """Expected output length of a request: the mean of its template's finished outputs, else `max_tokens`.

    The mean forgets: it moves by at least 1/32 with every finished sibling. At most `max_templates` are remembered.
    """

    def __init__(self, max_templates: int = 4096) -> None:
        self._max_templates = max_templates
        self._means: dict[str, tuple[int, float]] = {}

    def expected(self, request: Request) -> float:
        return self.of(request.template, float(request.sampling.max_tokens))

    def of(self, template: str | None, limit: float) -> float:
        """Expected output length of a request of this template that may have `limit` tokens."""
        known = self._means.get(template) if template is not None else None
        return limit if known is None else min(limit, known[1])

    def learn(self, request: Request, generated: int) -> None:
        if request.template is None:
            return
        count, mean = self._means.pop(request.template, (0, 0.0))
        count = min(count + 1, 32)
        self._means[request.template] = (count, mean + (generated - mean) / count)
        if len(self._means) > self._max_templates:
            del self._means[next(iter(self._means))]


@dataclass(slots=True)
class _Group:
    """Requests that share a beginning, of one priority and deadline. members: a heap, the largest `max_tokens` first; some may have left.

    limit: the largest `max_tokens` that joined; first: the serial of the first. key: of its one entry in the queue's heap that counts.
    """

    first: int
    limit: float = 0.0
    count: int = 0
    key: _Key | None = None
    members: list[tuple[float, int, Sequence]] = field(default_factory=list)


class WaitingQueue:
    """Order: preempted first, then priority, deadline, shared prefix (groups with long outputs first), longest output.

    How long a group's outputs are is what is known of its template now: a group moves as its finished siblings teach. Nobody starves: a
    request is chosen next, whatever its rank, `patience` choices after all those that waited when it came could have been.
    """

    def __init__(self, lengths: LengthEstimator, patience: int) -> None:
        self._lengths = lengths
        self._patience = patience
        self._heap: list[tuple[_Key, int, _Name]] = []
        self._entries = 0
        self._arrivals: deque[tuple[int, Sequence]] = deque()
        self._resumed: OrderedDict[int, Sequence] = OrderedDict()
        self._members: dict[int, Sequence] = {}
        self._groups: dict[_Name, _Group] = {}
        self._of_template: dict[str, set[_Name]] = {}
        self._choices = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.serial in self._members

    def push(self, sequence: Sequence) -> None:
        self._members[sequence.serial] = sequence
        self._arrivals.append((self._choices + len(self._members), sequence))
        name, limit = self._name(sequence.request), float(sequence.request.sampling.max_tokens)
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(sequence.serial)
            if sequence.request.template is not None:
                self._of_template.setdefault(sequence.request.template, set()).add(name)
        group.count += 1
        group.limit = max(group.limit, limit)
        heapq.heappush(group.members, (-limit, sequence.serial, sequence))
        self._rank(name, sequence.request.template)

    def push_front(self, sequence: Sequence) -> None:
        """Puts a preempted sequence back where it is chosen first."""
        self._members[sequence.serial] = sequence
        self._resumed[sequence.serial] = sequence
        self._resumed.move_to_end(sequence.serial, last=False)

    def learn(self, request: Request, generated: int) -> None:
        """An answer of so many tokens ended: what is expected of its siblings, and so when they start, is another now."""
        self._lengths.learn(request, generated)
        if request.template is not None:
            for name in self._of_template.get(request.template, ()):
                self._rank(name, request.template)

    def peek(self) -> Sequence | None:
        """The next to start, without removing it."""
        if self._resumed:
            return next(iter(self._resumed.values()))
        while self._arrivals and self._arrivals[0][1].serial not in self._members:
            self._arrivals.popleft()
        if self._arrivals and self._choices - self._arrivals[0][0] >= self._patience:
            return self._arrivals[0][1]
        while self._heap:
            key, _, name = self._heap[0]
            group = self._groups.get(name)
            if group is not None and group.key == key:
                while group.members[0][1] not in self._members:
                    heapq.heappop(group.members)
                return group.members[0][2]
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, chosen or aborted."""
        del self._members[sequence.serial]
        self._choices += 1
        if self._resumed.pop(sequence.serial, None) is not None:
            return
        name, template = self._name(sequence.request), sequence.request.template
        group = self._groups[name]
        group.count -= 1
        if not group.count:
            del self._groups[name]
            if template is not None:
                self._of_template[template].discard(name)
                if not self._of_template[template]:
                    del self._of_template[template]

    def _rank(self, name: _Name, template: str | None) -> None:
        """Gives a group the place that it has now; what its earlier ones left in the heap counts no more."""
        group = self._groups[name]
        priority, deadline, _ = name
        key = (-priority, deadline, -self._lengths.of(template, group.limit), group.first)
        if key != group.key:
            group.key = key
            self._entries += 1
            heapq.heappush(self._heap, (key, self._entries, name))

    @staticmethod
    def _name(request: Request) -> _Name:
        deadline = math.inf if request.deadline is None else request.deadline
        kind: Hashable = request.template if request.template is not None else request.prompt_token_ids[:_PREFIX_TOKENS]
        return request.priority, deadline, kind
