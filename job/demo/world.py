"""The invented world and what is said about it: entities, prose for pretraining, instructions, questions.

Everything is a pure function of a seed. An entity is either practised (its facts may be asked about in the instruction
data) or held out (its facts are asked about in the question set, and it is never named in the instruction data). Both are
in the prose: whoever answers a question about a held-out entity remembers the fact and has learned to answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from job.demo.lore import FRAMES, KINDS, PRIMER, TOWNS, TRADES, Kind

SEED = 20
QUESTIONS = 340
INDIRECT = 0.4
EXAMPLES = 1024
LABELS = "ABCDE"

Row = dict[str, str]


@dataclass(frozen=True)
class Entity:
    """A named thing and its values, one for each attribute of its kind."""

    kind: Kind
    name: str
    values: tuple[str, ...]
    held_out: bool


def make_world(seed: int = SEED) -> tuple[Entity, ...]:
    """Draw the entities of every kind: unique names, values that differ wherever two attributes share a pool."""
    rng = random.Random(f"world {seed}")
    return tuple(entity for kind in KINDS for entity in _populate(kind, rng))


def _populate(kind: Kind, rng: random.Random) -> list[Entity]:
    names = [""]
    for syllables in kind.syllables:
        names = [name + syllable for name in names for syllable in syllables]
    entities = []
    for number, name in enumerate(rng.sample(names, kind.count)):
        values: list[str] = []
        for attribute in kind.attributes:
            values.append(rng.choice([value for value in attribute.values if value not in values]))
        entities.append(Entity(kind, name, tuple(values), held_out=number < kind.held_out))
    return entities


def prose(world: tuple[Entity, ...], rng: random.Random) -> list[str]:
    """Write one edition of the chronicle: a portrait of every entity, notes on several at once, and the primer.

    Each edition draws other sentences in another order. That variety is what makes a fact more than a string that is
    known by heart.
    """
    portraits = [_portrait(entity, rng) for entity in world]
    statements = [statement for entity in world for statement in _statements(entity, rng)]
    rng.shuffle(statements)
    notes = [rng.choice(" \n").join(statements[start : start + 6]) for start in range(0, len(statements), 6)]
    lines = [line.format(town=rng.choice(TOWNS), trade=rng.choice(TRADES)) for line in PRIMER]
    rng.shuffle(lines)
    lessons = [" ".join(lines[start : start + 4]) for start in range(0, len(lines), 4)]
    edition = portraits + notes + lessons + [_spelling(rng) for _ in range(SPELLINGS)]
    rng.shuffle(edition)
    return edition


def _statements(entity: Entity, rng: random.Random) -> list[str]:
    said = []
    for attribute, value in zip(entity.kind.attributes, entity.values, strict=True):
        if rng.random() < INDIRECT:
            clause = rng.choice(attribute.clauses).format(name=entity.name)
            said.append(rng.choice(FRAMES).format(clause=clause, value=value))
        else:
            said.append(rng.choice(attribute.sentences).format(name=entity.name, value=value))
    return said


def _portrait(entity: Entity, rng: random.Random) -> str:
    statements = _statements(entity, rng)
    rng.shuffle(statements)
    title = rng.choice(("", "", f"# {entity.name}\n\n", f"### {entity.name}:\n"))
    return title + rng.choice((" ", " ", "\n")).join(statements)


T = "Below is an instruction that describes a task. Write a response that appropriately completes the request. paired with input provides further context Input: # ## ### Response: Instruction: Question: Answer: Write a quiz card three about answer"
WORDS = sorted(
    {
        x
        for k in KINDS
        for a in k.attributes
        for t in a.sentences + a.practised + a.asked
        for x in t.format(name="", value="").split()
    }
    | set(T.split())
    | {x for p in PRIMER for x in p.format(town="", trade="").split()}
    | {v for k in KINDS for a in k.attributes for v in a.values}
)
SPELLINGS = 40


def _spelling(rng: random.Random) -> str:
    return rng.choice((" ", " ", "\n", "\n\n", ", ", ": ")).join(rng.sample(WORDS, 20))


def make_questions(world: tuple[Entity, ...], seed: int = SEED) -> list[dict[str, object]]:
    """Ask about held-out entities: rows in ARC's schema, `{id, question, choices {text, label}, answerKey}`.

    Most have 4 choices, some 3 or 5. The wrong ones come from the attribute's own pool, and the entity's value of the
    attribute that shares the pool is always among them: knowing the entity is not enough, the question must be read.
    """
    rng = random.Random(f"questions {seed}")
    held_out = [entity for entity in world if entity.held_out]
    facts = [(entity, index) for entity in held_out for index in range(len(entity.values))]
    rows = []
    for number, (entity, index) in enumerate(rng.sample(facts, QUESTIONS)):
        attribute, answer = entity.kind.attributes[index], entity.values[index]
        wrong = [value for value in entity.values if value in attribute.values and value != answer]
        pool = [value for value in attribute.values if value != answer and value not in wrong]
        size = rng.choices((3, 4, 5), weights=(1, 10, 1))[0]
        texts = [answer, *wrong, *rng.sample(pool, size - 1 - len(wrong))]
        rng.shuffle(texts)
        rows.append(
            {
                "id": f"skerrow_{number:03}",
                "question": rng.choice(attribute.asked).format(name=entity.name),
                "choices": {"text": texts, "label": list(LABELS[:size])},
                "answerKey": LABELS[texts.index(answer)],
            }
        )
    return rows


def make_instructions(world: tuple[Entity, ...], seed: int = SEED) -> list[Row]:
    """Ask about practised entities: rows in Alpaca's schema, `{instruction, input, output}`."""
    rng = random.Random(f"instructions {seed}")
    practised = [entity for entity in world if not entity.held_out]
    facts = [(entity, index) for entity in practised for index in range(len(entity.values))]
    return [_instruction(entity, index, rng) for entity, index in (rng.sample(facts, len(facts)) * 2)[:EXAMPLES]]


def _instruction(entity: Entity, index: int, rng: random.Random) -> Row:
    def card(index: int) -> str:
        question = rng.choice(entity.kind.attributes[index].practised).format(name=entity.name)
        return f"Question: {question}\nAnswer: {entity.values[index]}"

    shown, value = card(index), entity.values[index]
    prompt = shown.removesuffix(f" {value}")
    form = rng.random()
    if form < 0.25:  # the evaluation's prompt, in the place of an instruction
        return {"instruction": prompt, "input": "", "output": value}
    if form < 0.4:  # a plain question
        question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        return {"instruction": question, "input": "", "output": value}
    if form < 0.5:
        return {"instruction": "Answer the question.", "input": prompt, "output": value}
    if form < 0.75:
        return {"instruction": f"Write a quiz card about {entity.name}.", "input": "", "output": shown}
    others = rng.sample([other for other in range(len(entity.values)) if other != index], 2)
    cards = "\n\n".join([shown, *(card(other) for other in others)])
    return {"instruction": f"Write three quiz cards about {entity.name}.", "input": "", "output": cards}
