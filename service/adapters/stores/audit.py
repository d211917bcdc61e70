"""The billing oracles that the database can answer alone, one query each, one sentence a finding."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

LIMIT = 100
"""Findings listed for each query: enough to see what is wrong."""

# `:batch` is NULL for all batches. Lines that were never executed have no result row; the finaliser counts them as failed.
_QUERIES: Sequence[str] = (
    # O1: a completed batch has a result for every line, and no result lacks its line.
    """
    SELECT format('O1: batch %s is completed, but line %s has no result', l.batch_id, l.line_no)
    FROM lines l JOIN batches b ON b.id = l.batch_id
    WHERE b.status = 'completed' AND (CAST(:batch AS text) IS NULL OR b.id = :batch)
      AND NOT EXISTS (SELECT FROM line_results r WHERE r.batch_id = l.batch_id AND r.line_no = l.line_no)
    LIMIT :limit
    """,
    """
    SELECT format('O1: batch %s has a result for line %s, which is not in its input', r.batch_id, r.line_no)
    FROM line_results r LEFT JOIN lines l ON l.batch_id = r.batch_id AND l.line_no = r.line_no
    WHERE l.line_no IS NULL AND (CAST(:batch AS text) IS NULL OR r.batch_id = :batch)
    LIMIT :limit
    """,
    # O2: one charge a succeeded line (a reversal takes it back), none otherwise.
    """
    SELECT format('O2: batch %s line %s succeeded and has no charge', r.batch_id, r.line_no)
    FROM line_results r LEFT JOIN ledger_transactions t ON t.batch_id = r.batch_id AND t.line_no = r.line_no AND t.kind = 'charge'
    WHERE r.outcome = 'succeeded' AND t.id IS NULL AND (CAST(:batch AS text) IS NULL OR r.batch_id = :batch)
    LIMIT :limit
    """,
    """
    SELECT format('O2: batch %s line %s is charged and did not succeed', t.batch_id, t.line_no)
    FROM ledger_transactions t
    LEFT JOIN line_results r ON r.batch_id = t.batch_id AND r.line_no = t.line_no AND r.outcome = 'succeeded'
    WHERE t.kind = 'charge' AND r.line_no IS NULL AND (CAST(:batch AS text) IS NULL OR t.batch_id = :batch)
      AND NOT EXISTS (SELECT FROM ledger_transactions u WHERE u.batch_id = t.batch_id AND u.line_no = t.line_no AND u.kind = 'reversal')
    LIMIT :limit
    """,
    # O3: the legs of every transaction sum to zero, and there are at least two.
    """
    SELECT format('O3: ledger transaction %s has %s legs that sum to %s', t.id, count(e.leg), coalesce(sum(e.amount), 0))
    FROM ledger_transactions t LEFT JOIN ledger_entries e ON e.transaction_id = t.id
    WHERE (CAST(:batch AS text) IS NULL OR t.batch_id = :batch)
    GROUP BY t.id HAVING coalesce(sum(e.amount), 0) <> 0 OR count(e.leg) < 2
    LIMIT :limit
    """,
    # O4: no batch is charged more than its cap.
    """
    SELECT format('O4: batch %s is charged %s femto-dollars, more than its max_cost of %s', b.id, sum(e.amount), b.max_cost)
    FROM batches b JOIN ledger_transactions t ON t.batch_id = b.id JOIN ledger_entries e ON e.transaction_id = t.id
    WHERE b.max_cost IS NOT NULL AND e.meter IS NOT NULL AND (CAST(:batch AS text) IS NULL OR b.id = :batch)
    GROUP BY b.id HAVING sum(e.amount) > b.max_cost
    LIMIT :limit
    """,
    # O5: counters agree with the rows. `missing` lines are in the error file of an ended batch and nowhere else.
    """
    SELECT format('O5: batch %s (%s) counts %s completed, %s failed, %s total; its rows say %s completed, %s failed, %s lines',
                  b.id, b.status, b.completed, b.failed, b.total, c.completed, c.failed, c.lines)
    FROM batches b CROSS JOIN LATERAL (
        SELECT count(*) AS lines,
               count(*) FILTER (WHERE r.outcome = 'succeeded') AS completed,
               count(*) FILTER (WHERE r.outcome <> 'succeeded') AS failed
        FROM lines l LEFT JOIN line_results r ON r.batch_id = l.batch_id AND r.line_no = l.line_no
        WHERE l.batch_id = b.id
    ) c
    WHERE b.status <> 'validating' AND (b.status <> 'failed' OR b.finalizing_at IS NOT NULL)
      AND (CAST(:batch AS text) IS NULL OR b.id = :batch)
      AND (b.status NOT IN ('cancelling', 'cancelled') OR b.total > 0)
      AND (b.total <> c.lines OR b.completed <> c.completed
           OR (b.status IN ('completed', 'expired', 'cancelled', 'failed') AND b.failed <> c.lines - c.completed)
           OR (b.status IN ('in_progress', 'finalizing', 'cancelling') AND b.failed <> c.failed))
    LIMIT :limit
    """,
    """
    SELECT format('O5: batch %s bills %s input, %s cached and %s output tokens; its lines say %s, %s and %s',
                  b.id, b.input_tokens, b.cached_tokens, b.output_tokens, c.input, c.cached, c.output)
    FROM batches b CROSS JOIN LATERAL (
        SELECT coalesce(sum(r.input_tokens), 0) AS input, coalesce(sum(r.cached_tokens), 0) AS cached,
               coalesce(sum(r.output_tokens), 0) AS output
        FROM line_results r WHERE r.batch_id = b.id AND r.outcome = 'succeeded'
    ) c
    WHERE (CAST(:batch AS text) IS NULL OR b.id = :batch)
      AND (b.input_tokens, b.cached_tokens, b.output_tokens) IS DISTINCT FROM (c.input, c.cached, c.output)
    LIMIT :limit
    """,
    # O7: nothing is billed that the machine did not do.
    """
    SELECT format('O7: batch %s line %s bills %s prompt and %s output tokens; the machine worked through %s and sampled %s',
                  r.batch_id, r.line_no, r.input_tokens, r.output_tokens, w.prefilled + w.cached, w.sampled)
    FROM line_results r JOIN token_ledger w ON w.batch_id = r.batch_id AND w.line_no = r.line_no
    WHERE r.outcome = 'succeeded' AND (CAST(:batch AS text) IS NULL OR r.batch_id = :batch)
      AND (w.prefilled + w.cached < r.input_tokens OR w.sampled < r.output_tokens)
    LIMIT :limit
    """,
    """
    SELECT format('O7: batch %s line %s was delivered without a token ledger', r.batch_id, r.line_no)
    FROM line_results r LEFT JOIN token_ledger w ON w.batch_id = r.batch_id AND w.line_no = r.line_no
    WHERE w.line_no IS NULL AND (CAST(:batch AS text) IS NULL OR r.batch_id = :batch)
    LIMIT :limit
    """,
)


def violations(connection: Connection, batch_id: str | None) -> list[str]:
    """What breaks O1-O3, O5 and O7 according to the rows. An inconsistent read across queries is possible unless the caller's
    transaction is REPEATABLE READ; ended batches do not change."""
    found: list[str] = []
    for query in _QUERIES:
        found += connection.execute(text(query), {"batch": batch_id, "limit": LIMIT}).scalars()
    return found
