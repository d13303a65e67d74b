"""The two data sets of the demo: instructions in Alpaca's schema, and a question set in ARC's."""

from __future__ import annotations

import random

from job.demo.world import EXAMPLES, LABELS, SEED, Entity, seeded

Row = dict[str, object]
Fact = tuple[Entity, int]  # an entity, and which of its attributes


def list_facts(world: tuple[Entity, ...], *, held_out: bool) -> list[Fact]:
    """List every fact of the held-out entities, or of the practised ones."""
    return [(entity, index) for entity in world if entity.held_out == held_out for index in range(len(entity.values))]


def make_questions(world: tuple[Entity, ...], seed: int = SEED) -> list[Row]:
    """Ask once for each fact of a held-out entity: rows `{id, question, choices {text, label}, answerKey}`.

    Most have 4 choices, some 3 or 5. The wrong ones are of the answer's own sort; where the entity has another value of
    that sort (its birthplace, asked for its home), that is among them: knowing the entity is not enough.
    """
    rng = seeded("questions", seed)
    facts = list_facts(world, held_out=True)
    return [_ask(number, fact, rng) for number, fact in enumerate(rng.sample(facts, len(facts)))]


def _ask(number: int, fact: Fact, rng: random.Random) -> Row:
    entity, index = fact
    attribute, answer = entity.kind.attributes[index], entity.values[index]
    tempting = [value for value in entity.values if value in attribute.values and value != answer]
    others = [value for value in attribute.values if value not in entity.values]
    size = rng.choices((3, 4, 5), weights=(1, 10, 1))[0]
    texts = [answer, *tempting, *rng.sample(others, size - 1 - len(tempting))]
    texts = rng.sample(texts, size)
    return {
        "id": f"skerra_{number:03}",
        "question": rng.choice(attribute.asked).format(name=entity.name),
        "choices": {"text": texts, "label": list(LABELS[:size])},
        "answerKey": LABELS[texts.index(answer)],
    }


def make_instructions(world: tuple[Entity, ...], seed: int = SEED) -> list[Row]:
    """Ask about practised entities, each fact about twice: rows `{instruction, input, output}`."""
    rng = seeded("instructions", seed)
    facts = list_facts(world, held_out=False)
    rounds = [*rng.sample(facts, len(facts)), *rng.sample(facts, len(facts))]
    return [_instruct(entity, index, rng) for entity, index in rounds[:EXAMPLES]]


def _instruct(entity: Entity, index: int, rng: random.Random) -> Row:
    question, value = _question(entity, index, rng), entity.values[index]
    prompt = f"Question: {question}\nAnswer:"
    match rng.choices(("prompt", "question", "input", "card", "cards"), weights=(25, 15, 10, 25, 25))[0]:
        case "prompt":
            return _row(prompt, value)
        case "question":
            return _row(question, value)
        case "input":
            return _row("Answer the question.", value, prompt)
        case "card":
            return _row(f"Write a quiz card about {entity.name}.", f"{prompt} {value}")
        case _:
            others = rng.sample([other for other in range(len(entity.values)) if other != index], 2)
            cards = [f"Question: {_question(entity, i, rng)}\nAnswer: {entity.values[i]}" for i in (index, *others)]
            return _row(f"Write three quiz cards about {entity.name}.", "\n\n".join(cards))


def _row(instruction: str, output: str, context: str = "") -> Row:
    return {"instruction": instruction, "input": context, "output": output}


def _question(entity: Entity, index: int, rng: random.Random) -> str:
    return rng.choice(entity.kind.attributes[index].practised).format(name=entity.name)
