"""Lines -> groups, streaming: no more than one group and a line are held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from service.domain.line import PlannedGroup, StagedLine
from service.planning.prefix import shared_levels


def plan_groups(lines: Iterable[StagedLine], *, max_lines: int = 64) -> Iterator[PlannedGroup]:
    """Cuts an ordered stream of valid lines into groups of at most `max_lines`.

    The order is `LineStore.for_grouping`'s: by model, then prefix key. A group never mixes models. A full group is cut where the least
    prefix is shared, but not before its half, so that families stay together and groups stay large.
    """
    held: list[StagedLine] = []
    for line in lines:
        if held and held[-1].model != line.model:
            yield _group(held)
            held = []
        elif len(held) == max_lines:
            cut = _best_cut([*held, line], least=(max_lines + 1) // 2)
            yield _group(held[:cut])
            held = held[cut:]
        held.append(line)
    if held:
        yield _group(held)


def _best_cut(lines: list[StagedLine], least: int) -> int:
    """Where to end a group, from `least` to all but the last line: least shared prefix first, then the largest group."""
    return min(range(least, len(lines)), key=lambda at: (shared_levels(lines[at - 1].prefix_key, lines[at].prefix_key), -at))


def _group(lines: list[StagedLine]) -> PlannedGroup:
    model = lines[0].model
    if model is None:
        raise ValueError(f"line {lines[0].line_no} has no model: it was refused and must not be grouped")
    return PlannedGroup(model, tuple(line.line_no for line in lines), sum(line.expected_tokens for line in lines))
