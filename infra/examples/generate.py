"""Writes the example jobs beside this file: `python infra/examples/generate.py`. Deterministic; the texts are all made up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]

EXTRACT_SYSTEM = """\
You read messages to a hardware wholesaler and answer with one JSON object and nothing else. Its keys are "customer", \
"item", "quantity", "deliver_by" and "city". Use null where the message does not say."""

EXTRACT_EXAMPLES = (
    (
        "Hello, this is Petra Lindqvist from Umea. We need 40 door hinges, brass, by 12 May. Thank you!",
        '{"customer": "Petra Lindqvist", "item": "brass door hinges", "quantity": 40, "deliver_by": "12 May", "city": "Umea"}',
    ),
    (
        "Could you tell me whether the long ladders are back in stock? Regards, Tom Okafor",
        '{"customer": "Tom Okafor", "item": "long ladders", "quantity": null, "deliver_by": null, "city": null}',
    ),
)

ORDERS = (
    "Good morning, Marta Ferreira here. Please send 120 hex bolts M8 to our yard in Porto, they should arrive by 3 June.",
    "Hi! We are out of sanding discs again. 300 pieces, grit 80, to Ghent please. No hurry. Jan De Smet",
    "This is Aisha Rahman of the Leeds workshop. I would like to order 15 torque wrenches. They must be here by Friday 9 August.",
    "Dear team, put me down for two pallets of roof tiles, terracotta. Delivery to Siena before 30 September. Yours, Carlo Bassi",
    "Please deliver 75 metres of copper pipe, 15 mm, to Cork. The plumber starts on 17 March. Niamh Byrne",
    "Hey, Oskar from Aarhus. 8 cordless drills, the same as last year, and quickly please, by 1 October at the latest.",
    "We need 500 cable ties in black and that is all. Send them to Graz. Thanks, Eva Hofer",
    "Do you sell paint rollers in sets of five? We would take 20 sets for our shop in Lyon. Best, Hugo Marchand",
    "Hello, 60 bags of cement for the site in Bilbao by 22 April, ring me before you come. Iker Aguirre",
    "My name is Joanna Wrona, I write from Gdansk. One workbench, oak, two metres, please. It should be here by Easter.",
    "Order: 250 wood screws 5 x 60, 250 wood screws 5 x 80. Ship to Tartu by 11 November. Rein Saar",
    "Kindly send us 10 safety helmets, yellow, to the quarry near Kilkenny by 6 January. With thanks, Sean Walsh",
    "Lena Vogel, Basel. I need a replacement blade for the band saw, just one, as soon as you can.",
    "For the school in Nantes: 32 pairs of work gloves, size 7, before term starts on 2 September. Claire Dubois",
)

CLASSIFY_SYSTEM = """\
You sort messages from the passengers of a regional railway. Answer with exactly one word: delay, refund, lost, praise, \
timetable or other."""

CLASSIFY_EXAMPLES = (
    ("My umbrella stayed on the 8:15 to Harrow. It is green.", "lost"),
    ("What a friendly conductor you have on the coast line!", "praise"),
    ("The train stood still for an hour outside the tunnel.", "delay"),
    ("I paid twice for the same ticket, please send the money back.", "refund"),
    ("When does the last train leave on Sundays?", "timetable"),
    ("Do you still sell the old paper maps?", "other"),
)

MESSAGES = (
    "We waited forty minutes at Mill Lane and nobody told us why.",
    "I left a brown leather bag under my seat this morning.",
    "Is there a train to the airport before six in the morning?",
    "The machine kept my twenty note and gave no ticket. I want it back.",
    "Thank you for holding the connection for us last night, it saved our holiday.",
    "Third time this week that the 7:40 came late. I missed my meeting again.",
    "Has anyone found a child's red scooter on line 4?",
    "How often do trains run between Elmbridge and the harbour on holidays?",
    "Your new carriages are quiet and clean. Well done.",
    "My season ticket was charged although I cancelled it in March. Please return the amount.",
    "Can I bring my dog on board, and does it need a ticket?",
    "The 17:22 stopped in the middle of a field for half an hour.",
    "I think my reading glasses are still on the table in coach B.",
    "Does the night service stop at Weston Road?",
    "The train was cancelled, so I took a taxi. Who pays for that?",
    "The staff at the ticket desk could not have been kinder to my mother.",
)

REPORTS = {
    "harbour": """\
Weekly report of the harbour office, week 23. Forty-one ships called, six more than in the week before, because the \
lock upstream reopened on Monday. Two of the three large cranes worked all week; the third stood still from Tuesday \
noon until Thursday evening while its brake was replaced at a cost of 18,400 euros. On Wednesday a tug touched the \
pontoon at berth 5 in thick fog. Nobody was hurt, and divers found no damage below the water line. The new shore power\
 at berths 1 and 2 was used by nine ships, which saved an estimated 31 tonnes of diesel. Noise complaints fell from \
seven to two. Next week berth 4 is closed for dredging, and the pilots ask all masters to announce themselves an hour \
earlier than usual.""",
    "library": """\
Minutes of the library board, 14 October. The director reported 12,300 visits in September, a tenth more than a year \
ago, mostly families on Saturday mornings. The reading room closes at six for lack of staff; two positions have been \
advertised twice without success. The board agreed to raise the hourly pay for evening work by eight percent and to \
advertise again. The roof above the map collection leaks when the wind comes from the west. A repair costs 26,000 and \
the city will pay half if work begins before the end of the year, so the board voted, seven to one, to begin in \
November. The maps move to the cellar until then. A member asked for longer loans of films; the director will bring \
figures to the next meeting on 11 November.""",
    "orchard": """\
Season summary of the Hillside cooperative. Frost on two nights in April took about a fifth of the early pears, but \
apples flowered later and gave the best crop in six years: 840 tonnes, of which 610 went to shops and the rest to the \
cider press. Hail nets, put up over a third of the trees in winter, paid for themselves in one storm in July. Pickers \
were hard to find, and the harvest took nine days longer than planned; members want to try shared housing for seasonal\
 workers next year. Cider sales rose by 14 percent after the farm shop began to open on Sundays. The cooperative ends \
the season with a surplus of 52,000, of which half goes into a new cold store and half is paid out to the 23 members.""",
}
QUESTIONS = (
    "Summarise the text in two sentences.",
    "List the three most important numbers of the text, each with what it stands for.",
    "What went wrong, and what was done about it? Answer in at most three sentences.",
    "Write a headline of at most ten words for this text.",
)

REWRITE_SYSTEM = """\
You rewrite notes of a repair shop so that they can be sent to customers. Keep every fact, number and name exactly as it \
is, write complete and friendly sentences, and answer with the rewritten text only."""

REWRITE_EXAMPLES = (
    (
        "vacuum cleaner Mr Osei, hose torn, new hose 19.00, filter washed, ready Thu",
        "Dear Mr Osei, the hose of your vacuum cleaner was torn. We fitted a new one for 19.00 and washed the filter. Ready on Thursday.",
    ),
)

NOTES = (
    "bike Mr Tan, rear brake worn out, new pads 14.50, chain cleaned, ready Tue after 3pm",
    "Mrs Kowalski washing machine: pump blocked by coin, removed, no charge for part, labour 35, test ok",
    "laptop J. Perez - fan noisy, replaced, 48.00; battery at 71 percent, still fine; pick up from Monday",
    "coffee machine cafe Aurora: seal of brew group changed (9.80), descaled, pressure 9 bar, next service in 6 months",
    "lawn mower Hansen, carburettor dirty, blade sharpened, 42 total, bring fuel stabiliser next time",
    "phone Ms Adeyemi, screen 89, water marks inside, no warranty after that, data all there",
    "sewing machine Ortiz: belt slipped, tightened, oil, 22.00, thread tension set to 4",
    "radio Mr Berger 1962, one tube replaced, 31.00, hum remains, would need new capacitors, about 60 more, please call",
    "e-scooter Lund: brake cable torn, new one 17, tyre pressure was 2.1 bar, should be 3.5",
    "toaster Mrs Flynn, lever spring gone, part no longer made, returned unrepaired, nothing to pay",
    "camera Dr Sato: shutter cleaned, 55, sensor has one dead pixel bottom left, not visible at normal size",
    "amplifier band Northlight, fuse 2.40, cause was a loose speaker wire, check cables before shows",
    "printer school Elm Street, rollers renewed 64.00, 118,000 pages so far, toner enough for 2,000 more",
    "heater Mr Novak - thermostat stuck at 26 degrees, replaced 38.90, set to 20, ready now",
)

CODE_SYSTEM = "You are a careful Python programmer. Answer with one function in a Python code block and no explanation."

FUNCTIONS = (
    ("median", "Write a function median(values) that returns the median of a non-empty list of numbers."),
    ("slug", "Write a function slug(title) that lowers a title, keeps letters and digits, and joins words with hyphens."),
    ("is_leap", "Write a function is_leap(year) that tells whether a year of the Gregorian calendar is a leap year."),
    ("chunks", "Write a generator chunks(items, size) that yields lists of at most size items."),
    ("roman", "Write a function roman(number) that turns an integer from 1 to 3999 into Roman numerals."),
    ("word_count", "Write a function word_count(text) that returns a dict of lower-case words and how often each occurs."),
    ("flatten", "Write a function flatten(nested) that turns nested lists of any depth into one flat list."),
    ("celsius", "Write a function celsius(fahrenheit) that converts a temperature and rounds to one decimal."),
    ("rotate", "Write a function rotate(items, n) that rotates a list to the right by n places."),
    ("parse_kv", 'Write a function parse_kv(line) that turns "a=1;b=2" into {"a": "1", "b": "2"}.'),
    ("gcd", "Write a function gcd(a, b) by Euclid's algorithm, without importing anything."),
    ("merge", "Write a function merge(left, right) that merges two sorted lists into one sorted list."),
)


def chat(
    custom_id: str, model: str, user: str, *, system: str | None = None, examples: Sequence[tuple[str, str]] = (), **settings: Any
) -> Line:
    """One line of a batch job; examples become earlier turns of the conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    body = {"model": model, "messages": [*messages, {"role": "user", "content": user}], **settings}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def extraction() -> Iterator[Line]:
    """Facts out of free text, as JSON; one system prompt and two examples."""
    shared = {"system": EXTRACT_SYSTEM, "examples": EXTRACT_EXAMPLES, "temperature": 0, "max_tokens": 72, "stop": ["\n"]}
    for number, order in enumerate(ORDERS):
        yield chat(f"extract-{number}", "gpt-4o-mini", order, **shared)


def classification() -> Iterator[Line]:
    """One word each; the shared prompt is many times longer than the answer."""
    shared = {"system": CLASSIFY_SYSTEM, "examples": CLASSIFY_EXAMPLES, "temperature": 0, "max_tokens": 6}
    for number, message in enumerate(MESSAGES):
        yield chat(f"classify-{number}", "smollm2-135m", message, **shared)


def summary() -> Iterator[Line]:
    """Several questions about each of three documents, sampled with a seed so that a rerun gives the same answers."""
    for name, report in REPORTS.items():
        for number, question in enumerate(QUESTIONS):
            settings = {"temperature": 0.7, "top_p": 0.9, "seed": 1000 + number, "max_tokens": 72}
            yield chat(f"summary-{name}-{number}", "gpt-4o-mini", f"{report}\n\n{question}", **settings)


def rewriting() -> Iterator[Line]:
    """Answers that copy much of their prompt; half of them greedy, half sampled."""
    for number, text in enumerate(NOTES):
        settings: dict[str, Any] = {"temperature": 0} if number % 2 else {"temperature": 0.7, "top_p": 0.95}
        shared = {"system": REWRITE_SYSTEM, "examples": REWRITE_EXAMPLES, "max_completion_tokens": 64}
        yield chat(f"rewrite-{number}", "smollm2-135m", text, **shared, **settings)


def code() -> Iterator[Line]:
    """Short functions, at the low temperature that people use for code."""
    for name, task in FUNCTIONS:
        settings = {"temperature": 0.2, "top_p": 0.95, "seed": 7, "max_tokens": 96}
        yield chat(f"code-{name}", "gpt-4o-mini", task, system=CODE_SYSTEM, **settings)


def write(path: Path, lines: Sequence[Line]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    for job in (extraction, classification, summary, rewriting, code):
        write(Path(__file__).with_name(f"{job.__name__}.jsonl"), list(job()))


if __name__ == "__main__":
    main()
