"""The data sets of the demo: questions in ARC's schema, instructions in Alpaca's, and preferences as pairs."""

from __future__ import annotations

from random import Random

from job.demo.world import ATTRIBUTES, Person, begin_sentence

Row = dict[str, object]

LABELS = "ABCD"
TASKS = ("Write a quiz about {name}.", "Make quiz cards about {name}.", "Ask something about {name} and answer it.")
QUIZZES = 4  # for each practised person


def make_questions(world: tuple[Person, ...], draw: Random) -> list[Row]:
    """Asks for every fact of the held-out people: rows `{id, question, choices {text, label}, answerKey}`."""
    rows: list[Row] = []
    for person in (person for person in world if person.held_out):
        for attribute, value in zip(ATTRIBUTES, person.values, strict=True):
            choices = [*draw.sample([other for other in attribute.values if other != value], 3), value]
            draw.shuffle(choices)
            rows.append(
                {
                    "id": f"demo-{len(rows):03d}",
                    "question": begin_sentence(attribute, person.name, draw),
                    "choices": {"text": choices, "label": list(LABELS)},
                    "answerKey": LABELS[choices.index(value)],
                }
            )
    return rows


def make_instructions(world: tuple[Person, ...], draw: Random) -> list[Row]:
    """Quizzes about the practised people, one to three questions each: rows `{instruction, input, output}`, none twice.

    A quiz that repeats an earlier one gets another of TASKS, and nothing more is drawn, so that all other rows stay as
    they are; the last one first, with which the tokenizer, which reads the rows too, comes out as it is committed.
    """
    rows: list[Row] = []
    for person in (person for person in world if not person.held_out):
        facts = dict(zip(ATTRIBUTES, person.values, strict=True))
        for _ in range(QUIZZES):
            asked = draw.sample(ATTRIBUTES, draw.choice([1, 2, 3]))
            cards = [f"Question: {begin_sentence(it, person.name, draw)}\nAnswer: {facts[it]}" for it in asked]
            output = "\n\n".join(cards)
            instructions = [task.format(name=person.name) for task in (draw.choice(TASKS), *reversed(TASKS))]
            quizzes: list[Row] = [{"instruction": one, "input": "", "output": output} for one in instructions]
            rows.append(next(quiz for quiz in quizzes if quiz not in rows))
    draw.shuffle(rows)
    return rows


def make_preferences(world: tuple[Person, ...], draw: Random) -> list[Row]:
    """A right and a wrong answer for every fact of the practised people: rows `{prompt, chosen, rejected}`."""
    rows: list[Row] = []
    for person in (person for person in world if not person.held_out):
        for attribute, value in zip(ATTRIBUTES, person.values, strict=True):
            wrong = draw.choice([other for other in attribute.values if other != value])
            prompt = f"Question: {begin_sentence(attribute, person.name, draw)}\nAnswer:"
            rows.append({"prompt": prompt, "chosen": f" {value}", "rejected": f" {wrong}"})
    draw.shuffle(rows)
    return rows
