"""Recomputes a bill from what was delivered, with nothing of Longdraft: `python recompute_bill.py output.jsonl cost.json`.

Tokens of every answer x the prices pinned in cost.json, in whole femto-dollars (1e-15 $), against the amount that is charged.
"""

import json
import sys
from pathlib import Path


def main(output: str, cost_file: str) -> int:
    cost = json.loads(Path(cost_file).read_text())
    prices = cost["prices_nano_dollars_per_million_tokens"]
    lines = total = 0
    with Path(output).open(encoding="utf-8") as file:
        for line in file:
            body = json.loads(line)["response"]["body"]
            usage, price = body["usage"], prices[body["model"]]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            total += (usage["prompt_tokens"] - cached) * price["input"]  # nano-dollars a million tokens: femto-dollars a token
            total += cached * price["cached_input"] + usage["completion_tokens"] * price["output"]
            lines += 1
    owed = total - cost["reversed_femto_dollars"]
    says = f"cost.json says {cost['amount_nano_dollars']} for {cost['billed_lines']}"
    sys.stdout.write(f"{lines} answers: {owed // 10**6}.{owed % 10**6:06d} nano-dollars; {says}\n")
    return int(owed != cost["amount_femto_dollars"] or total != cost["charged_femto_dollars"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
