"""Who caused the work of a step: drafts, device time to the nanosecond. No clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.speculation.cost_model import Load

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.speculation.cost_model import CostModel
    from engine.work import Outcome, Work


def share_out(total: int, weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [N], in proportion to `weights` (not negative, one at least positive) and summing to `total` exactly.

    Differences of rounded running sums, so nobody is off by more than one.
    """
    running = np.cumsum(weights, dtype=np.int64).tolist()
    bounds = np.array([0, *(total * part // running[-1] for part in running)], np.int64)
    return bounds[1:] - bounds[:-1]


def charge(work: Work, outcome: Outcome) -> None:
    """Writes a step's drafts and times into the ledgers of its requests: device time by tokens fed, drafting time as measured."""
    lengths = np.diff(work.step.query_start).astype(np.int64)
    shares = share_out(outcome.nanoseconds, lengths).tolist()
    for chunk, share in zip(work.chunks[work.num_decoding :], shares[work.num_decoding :], strict=True):
        chunk.sequence.ledger.prefill_ns += share
    proposal = work.proposal
    columns = (proposal.drafted.tolist(), proposal.chosen.tolist(), outcome.accepted.tolist(), proposal.nanoseconds.tolist())
    decoding = zip(work.chunks[: work.num_decoding], shares, *columns, strict=False)
    for chunk, share, drafted, verified, accepted, draft_ns in decoding:
        ledger = chunk.sequence.ledger
        ledger.decode_ns += share
        ledger.draft_ns += draft_ns
        ledger.drafted += drafted
        ledger.verified += verified
        ledger.pruned += drafted - verified
        ledger.accepted += accepted
        ledger.rejected += verified - accepted


def estimate(work: Work, outcome: Outcome, cost: CostModel) -> None:
    """Writes two predictions of the cost model into the ledgers of decoding requests: of this step, and of decoding its tokens plainly.

    Plainly, a request that gained k tokens would have taken part in k steps like this one without any drafts; each costs it the share of
    its one token. Shares go by tokens fed, as in `charge`, so that predictions and measurements can be set against each other.
    """
    if not work.num_decoding or not cost.ready:
        return
    step, decoding = work.step, slice(0, work.num_decoding)
    drafted = sum(len(draft) for draft in work.drafts)
    load = work.load
    lengths = np.diff(step.query_start).astype(np.int64)[decoding]
    as_run = cost.predict(load) / load.tokens
    plain_tokens = load.tokens - drafted
    # Drafts stand at the end of their sequences, so each saw about what the sequence's one row sees.
    seen = round(load.pairs * plain_tokens / load.tokens) if drafted else load.pairs
    plainly = cost.predict(Load(plain_tokens, load.rows - drafted, load.kv_tokens - drafted, seen)) / plain_tokens
    gained = outcome.accepted[decoding] + 1
    for chunk, tokens, count in zip(work.chunks[decoding], lengths.tolist(), gained.tolist(), strict=True):
        chunk.sequence.ledger.modelled_ns += round(as_run * tokens * 1e9)
        chunk.sequence.ledger.plain_ns += round(plainly * count * 1e9)
