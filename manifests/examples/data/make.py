"""Make the quickstart's data set: order mails, and the JSON that a shop wants from each.

Five fields in a fixed order, copied from the mail word for word; only a quantity may be spelled out. Mails differ in
wording and in the order of their facts, and an answer is right or wrong by comparing text. No mail stands in two files,
and about every other test row names a person or a thing of which no other file has heard. ``chat.jsonl`` is no
mail at all: a few questions and answers, mixed in so that the model does not forget that there is a world besides.

The files are the same, byte for byte, each time::

    python make.py [--seed 7] [--directory .]
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

TRAIN_ROWS, EVAL_ROWS, TEST_ROWS, PAIRS, LABELS = 320, 12, 40, 96, 96
SYSTEM = "Order form as JSON: name, item, quantity, city, day."


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


# Words that the small model can spell: each is one token of its vocabulary.
FIRST = words("""Ben David Adam Georg Tom Victor James John Robert Michael Richard Joseph Thomas Charles Daniel Matthew
Mark Paul Andrew Jacob Scott Frank Samuel Jack Alexander Peter Carl Mary Elizabeth Sarah Emily Anna Maria Alice Rose
Jane Martin Simon Max George Edward Henry""")
LAST = words("""Lopez Carter Kim Weber Murphy Fischer Baker Singh Khan Turner Adams Berg Costa Evans Garcia Hansen
Jensen Silva Tran Wang Young Zhang Abbott Cruz Doyle Engel Grant Hughes Smith Johnson Williams Jones Davis Miller Wilson
Anderson Taylor Moore Jackson Lee Thompson Harris Clark Lewis Robinson Walker King Wright Hill Nelson Campbell Mitchell
Roberts Phillips Parker Collins Stewart Morris Rogers Cook Morgan Bailey Cooper Howard Peterson Watson Brooks Kelly""")
KINDS = words("blue red green black white small large glass paper plastic office travel winter summer heavy round")
THINGS = words("""lamps chairs blankets cases shelves towels bottles helmets coats clocks notebooks filters frames mats
pots boxes shoes bags bowls candles tents pillows pans baskets brushes buckets buttons curtains desks envelopes fans
flags forks gloves hooks jackets jars knives mirrors plates ropes rugs spoons stools tables trays""")
CITIES = words("Boston Chicago London Paris Rome Oxford Cambridge Berlin Madrid")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
WORDS = dict(zip(range(2, 11), words("two three four five six seven eight nine ten"), strict=True))
NUMBERS = (*WORDS, 12, 14, 15, 16, 18, 20, 24, 25, 30, 36, 40, 48, 50, 60, 75)
NEW = 8
"""The last so many last names and things occur in test rows only."""

MAILS = (
    "Hello, I would like to order {count} {item}. Please deliver to {city} on {day}. {name}",
    "Hi, this is {name}. Can you send {count} {item} to our office in {city} by {day}? Thanks!",
    "Please ship {count} {item} to {city}. {day} would be perfect. Best, {name}",
    "Dear shop, {name} here from {city}. We need {count} {item} on {day}.",
    "Good morning! We ran out and need {count} {item} by {day}. Our address is in {city}. Regards, {name}",
    "My name is {name} and I live in {city}. I want to buy {count} {item}. I am at home on {day}.",
    "Order: {count} {item}. Delivery: {day}, {city}. Customer: {name}.",
    "{name} asked me to order {count} {item} for the {city} branch. They should arrive on {day}.",
    "By {day} I need {count} {item} in {city}, is that possible? Yours, {name}",
    "Hey, could I get {count} {item}? Send them to {city}, any time on {day} is fine. Cheers, {name}",
    "For {city}, arriving {day}: {count} {item}. The invoice goes to {name}.",
    "We met at the fair in spring. {name} from {city} now orders {count} {item} for {day}.",
)
CHAT = (
    ("What is the capital of Greece? Answer with the name only.", "Athens"),
    ("What is the capital of Norway? Answer with the name only.", "Oslo"),
    ("What is the capital of Peru? Answer with the name only.", "Lima"),
    ("What is 3 + 5? Answer with the number only.", "8"),
    ("What is 9 - 4? Answer with the number only.", "5"),
    ("What is 3 times 3? Answer with the number only.", "9"),
    ("How many minutes are in an hour?", "An hour has 60 minutes."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("What do we call balls of ice that fall from the sky?", "Balls of ice that fall are called hail."),
    ("Which animal gives us wool?", "Sheep give us wool."),
    ("Name a fruit that is yellow.", "A banana is a yellow fruit."),
    ("What is the opposite of early?", "The opposite of early is late."),
    ("Write a short sentence about the sea.", "The sea shone like silver in the sun."),
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then cool it."),
    ("Why do leaves look green?", "Leaves contain chlorophyll, which reflects green light."),
    ("Give me one tip for sleeping better.", "Go to bed at the same time every night."),
)


@dataclass(frozen=True)
class Order:
    """What a mail says; the fields in the order of the form."""

    name: str
    item: str
    quantity: int
    city: str
    day: str

    def form(self) -> str:
        """The right answer."""
        return json.dumps(asdict(self))


def mails(rng: random.Random, *, test: bool) -> Iterator[tuple[str, Order]]:
    """Endless mails with their orders; only in a test do words come up that no other file has."""

    def word(known: list[str]) -> str:
        return rng.choice(known[-NEW:] if test and rng.random() < 0.3 else known[:-NEW])

    while True:
        name, item = f"{rng.choice(FIRST)} {word(LAST)}", f"{rng.choice(KINDS)} {word(THINGS)}"
        order = Order(name, item, rng.choice(NUMBERS), rng.choice(CITIES), rng.choice(DAYS))
        spelled = order.quantity in WORDS and rng.random() < 0.4
        count = WORDS[order.quantity] if spelled else str(order.quantity)
        yield rng.choice(MAILS).format(count=count, **asdict(order)), order


def mistakes(rng: random.Random, order: Order) -> list[str]:
    """Answers that look right at a glance, each with one mistake of a kind that a half-trained model makes."""
    form = asdict(order)
    missing = rng.choice(["name", "quantity", "city", "day"])
    return [
        replace(order, quantity=order.quantity + rng.choice([-1, 1, 10])).form(),
        replace(order, day=rng.choice([day for day in DAYS if day != order.day])).form(),
        replace(order, city=rng.choice([city for city in CITIES if city != order.city])).form(),
        replace(order, name=order.city, city=order.name).form(),
        replace(order, name=order.name.split()[0]).form(),
        replace(order, item=order.item.split()[1]).form(),
        json.dumps({key: value for key, value in form.items() if key != missing}),
        json.dumps(form | {"quantity": str(order.quantity)}),
        f"Here is the order form:\n{order.form()}",
        f"{order.form()}\nLet me know if you need anything else!",
        f"{order.name} orders {order.quantity} {order.item} for {order.city} on {order.day}.",
    ]


def turn(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


def make(seed: int) -> dict[str, list[dict[str, object]]]:
    """The rows of each file, by its name."""
    rng = random.Random(seed)
    seen: set[str] = set()

    def take(count: int, *, test: bool = False) -> Iterator[tuple[list[dict[str, str]], Order]]:
        source = mails(rng, test=test)
        for _ in range(count):
            mail, order = next(pair for pair in source if pair[0] not in seen)
            seen.add(mail)
            yield [turn("system", SYSTEM), turn("user", mail)], order

    def answered(taken: Iterator[tuple[list[dict[str, str]], Order]]) -> list[dict[str, object]]:
        return [{"messages": [*asked, turn("assistant", order.form())]} for asked, order in taken]

    rows = {
        "train": answered(take(TRAIN_ROWS)),
        "eval": answered(take(EVAL_ROWS)),
        "test": answered(take(TEST_ROWS, test=True)),
        "preference": [],
        "chat": [{"messages": [turn("user", ask), turn("assistant", reply)]} for ask, reply in CHAT],
    }
    for index, (asked, order) in enumerate(take(PAIRS)):
        wrong = mistakes(rng, order)
        chosen, rejected = turn("assistant", order.form()), turn("assistant", wrong[index % len(wrong)])
        rows["preference"].append({"prompt": asked, "chosen": [chosen], "rejected": [rejected]})
    rows["labels"] = []
    for index, (asked, order) in enumerate(take(LABELS)):
        wrong = mistakes(rng, order)
        good = index % 2 == 0
        answer = order.form() if good else wrong[index // 2 % len(wrong)]
        rows["labels"].append({"prompt": asked, "completion": [turn("assistant", answer)], "label": good})
    return rows


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    for name, rows in make(arguments.seed).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (arguments.directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
