"""The bill of a batch: by model, meter and rate; exact money, and what speculation did."""

from datetime import UTC, date, datetime

from service.billing.reports import acceptance_length, cost_json, sum_up
from service.domain.job import Batch, BatchStatus
from service.domain.money import ChargeDetail, LedgerKind, Meter
from service.domain.usage import Work

AT = datetime(2030, 1, 1, tzinfo=UTC)
BATCH = Batch("batch_1", "p", "/v1/completions", "24h", AT, AT, 1, BatchStatus.COMPLETED, model="m", total=3, completed=3)


def detail(meter=Meter.INPUT, quantity=100, rate=20_000_000, kind=LedgerKind.CHARGE, model="m"):
    day = date(2030, 1, 1)
    return ChargeDetail(day, "p", "default", "batch_1", model, 1, kind, day, meter, rate, quantity, quantity * rate, {})


def test_days_are_summed_models_and_rates_are_not():
    cost = sum_up(BATCH, 3, [detail(), detail(quantity=50), detail(model="n"), detail(rate=1)], Work())
    assert [(m.model, m.rate, m.quantity) for m in cost.meters] == [("m", 1, 100), ("m", 20_000_000, 150), ("n", 20_000_000, 100)]


def test_reversals_are_taken_off():
    cost = sum_up(BATCH, 0, [detail(), detail(quantity=-100, kind=LedgerKind.REVERSAL)], Work())
    assert (cost.total, cost.meters[0].quantity) == (0, 0)


def test_money_is_exact_on_the_wire():
    answer = cost_json(sum_up(BATCH, 3, [detail(quantity=1, rate=1), detail(Meter.OUTPUT, 7, 60_000_000)], Work()))
    assert answer["amount"] == "0.000000420000001"
    assert answer["meters"][0] == {
        "model": "m",
        "meter": "input",
        "quantity": 1,
        "dollars_per_million": "0.000000001",
        "amount": "0.000000000000001",
    }
    assert answer["final"] is True


def test_drafted_tokens_end_as_pruned_accepted_or_rejected():
    work = Work(drafted=10, verified=8, accepted=5, sampled=15, steps=10, decode_ns=2_500_000_000)
    answer = cost_json(sum_up(BATCH, 3, [], work))
    told = answer["speculation"]
    assert told["drafted"] == told["pruned"] + told["accepted"] + told["rejected"]
    assert (told["acceptance_length"], told["acceptance_rate"]) == (1.5, 0.625)
    assert answer["device_seconds"]["total"] == 2.5


def test_no_steps_means_no_acceptance_length():
    assert acceptance_length(Work()) is None


def test_what_speculation_saved_comes_with_its_error():
    work = Work(drafted=4, verified=4, decode_ns=2 * 10**9, draft_ns=10**9, plain_ns=5 * 10**9, modelled_ns=21 * 10**8)
    told = cost_json(sum_up(BATCH, 3, [], work))["speculation"]
    assert (told["saved_seconds_estimate"], told["estimate_error"]) == (2.0, 0.05)
    unknown = cost_json(sum_up(BATCH, 3, [], Work(decode_ns=1)))["speculation"]
    assert unknown["saved_seconds_estimate"] is unknown["estimate_error"] is None


def test_waste_is_drafts_recomputed_positions_and_tokens_behind_a_stop():
    work = Work(prompt=50, cached=10, prefilled=40, recomputed=7, generated=20, sampled=22, drafted=30, verified=12, accepted=9)
    told = cost_json(sum_up(BATCH, 3, [], work))["tokens"]
    assert told == {"prompt": 50, "cached": 10, "prefilled": 40, "generated": 20, "wasted": 21 + 7 + 2}
