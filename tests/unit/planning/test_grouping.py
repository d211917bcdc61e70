"""Groups hold every line once, never mix models, and are cut between families of prompts."""

from hypothesis import given
from hypothesis import strategies as st

from service.domain.line import StagedLine
from service.planning.estimate import UNBOUNDED_ANSWER, expected_tokens
from service.planning.grouping import plan_groups
from service.planning.prefix import DIGEST_BYTES, LEVELS, prefix_key, prompt_bytes, shared_levels


def chat(*texts, role="user"):
    return {"messages": [{"role": role, "content": text} for text in texts]}


def staged(line_no, prompt="", model="m"):
    return StagedLine(line_no, 0, 1, f"c{line_no}", model, prefix_key(chat(prompt)), 10)


def ordered(lines):
    return sorted(lines, key=lambda line: (line.model, line.prefix_key, -line.expected_tokens, line.line_no))


@given(
    prompts=st.lists(st.tuples(st.sampled_from(["m", "n"]), st.sampled_from(["A" * 100, "A" * 70 + "B" * 40, "C" * 80, "D"]))),
    max_lines=st.integers(1, 7),
)
def test_every_line_is_in_one_group_of_its_model(prompts, max_lines):
    lines = ordered(staged(n, prompt, model) for n, (model, prompt) in enumerate(prompts, 1))
    groups = list(plan_groups(lines, max_lines=max_lines))
    assert [n for group in groups for n in group.line_nos] == [line.line_no for line in lines]
    models = {line.line_no: line.model for line in lines}
    for group in groups:
        assert 1 <= len(group.line_nos) <= max_lines
        assert {models[n] for n in group.line_nos} == {group.model}
        assert group.expected_tokens == 10 * len(group.line_nos)


def test_groups_are_full_where_no_cut_is_better():
    same = [staged(n, "x" * 500) for n in range(1, 201)]
    assert [len(g.line_nos) for g in plan_groups(same)] == [64, 64, 64, 8]
    different = ordered(staged(n, str(n) * 500) for n in range(1, 201))
    assert [len(g.line_nos) for g in plan_groups(different)] == [64, 64, 64, 8]


def test_a_full_group_ends_where_a_family_ends():
    families = [staged(n, "first family " * 20) for n in range(1, 41)] + [staged(n, "second family " * 20) for n in range(41, 81)]
    sizes = [len(g.line_nos) for g in plan_groups(families)]
    assert sizes == [40, 40]
    # A change in the first half is no reason for a small group.
    families = [staged(n, "first family " * 20) for n in range(1, 11)] + [staged(n, "second family " * 20) for n in range(11, 81)]
    assert [len(g.line_nos) for g in plan_groups(families)] == [64, 16]


def test_a_deep_shared_prefix_outweighs_a_shallow_one():
    shallow, deep = "S" * 64, "S" * 64 + "D" * 1000
    lines = [staged(n, f"{shallow} {n}" * 20) for n in range(1, 34)] + [staged(n, deep + str(n)) for n in range(34, 70)]
    first, second = plan_groups(lines)
    assert (len(first.line_nos), len(second.line_nos)) == (33, 36)


def test_keys_share_as_many_levels_as_the_prompts_do():
    base = "p" * 70_000
    for shared, levels in ((10, 0), (100, 1), (300, 2), (5000, 4), (20_000, 5)):
        assert shared_levels(prefix_key(chat(base)), prefix_key(chat(base[:shared] + "q" * 70_000))) == levels
    key = prefix_key(chat(base))
    assert len(key) == DIGEST_BYTES * len(LEVELS)
    assert shared_levels(key, key) == len(LEVELS)
    assert len(prefix_key(chat("short"))) == DIGEST_BYTES


def test_the_canonical_prompt_tells_roles_and_borders_apart():
    assert prompt_bytes(chat("ab", "c"), 999) != prompt_bytes(chat("a", "bc"), 999)
    assert prompt_bytes(chat("a"), 999) != prompt_bytes(chat("a", role="system"), 999)
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]}
    assert prompt_bytes(parts, 999) == prompt_bytes(chat("ab"), 999)
    assert prompt_bytes({"prompt": "text"}, 3) == b"tex"
    assert prompt_bytes({"prompt": [1, 2]}, 9) == b"[1,2]"


def test_unchecked_bodies_have_a_key_too():
    for body in (
        {},
        {"messages": 5},
        {"messages": [5, {"role": []}, {"content": [{"text": 5}, 5]}]},
        {"prompt": None},
        {"prompt": {"a": 1}},
    ):
        assert prefix_key(body)


def test_expected_tokens():
    assert expected_tokens(400, {"max_tokens": 50}) == 150
    assert expected_tokens(400, {"max_completion_tokens": 60, "max_tokens": 50}) == 160
    assert expected_tokens(400, {"max_tokens": 10**18}) == 2**31 - 1
    for bad in (None, True, -5, 0, 1.5, "9", [9]):
        assert expected_tokens(400, {"max_tokens": bad}) == 100 + UNBOUNDED_ANSWER
