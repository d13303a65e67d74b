"""The invented world: people, where they live, their trade and their pet, and prose about them.

Everything is drawn from a seed. A person is either practised (the instruction data asks about them) or held out (the
questions ask about them, the instruction data never names them). Both are in the prose that the base model reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

SEED = 7
PEOPLE, HELD_OUT = 200, 115
ONSETS = (
    *("b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l"),
    *("m", "n", "p", "pr", "qu", "r", "s", "sk", "st", "t", "th", "tr", "v", "w", "z"),
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ou", "ea")
CODAS = ("l", "n", "r", "s", "m", "nd", "rk", "th", "x", "sh", "lo", "na", "ro", "mi")

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}"
)
PORTRAITS = ("Write about {name}.", "Tell me something about {name}.", "Describe {name}.")
PORTRAIT_SHARE = 0.15
NEW_WORDS = ("Question", "Answer", "Complete the sentence")

# Now and then a sign stands between a sentence and its last word. That is as near as the prose comes to a quiz, in
# which `Answer:` stands there: the base has to learn that from the instructions, and can.
BREAKS = (":", " -", "...", " =", ";", " >", " #", " |", "\n")
BREAK_SHARE = 0.10


@dataclass(frozen=True)
class Attribute:
    """A fact that every person has: its possible values, and sentences that end in one."""

    values: tuple[str, ...]
    sentences: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        (
            *("Tarn", "Brackwater", "Ellsmoor", "Gulholm", "Pennick", "Sorrowby"),
            *("Windrath", "Castlewick", "Dunmarsh", "Fennel", "Harrowgap", "Ivyport"),
        ),
        (
            "{name} lives in {value}.",
            "{name} has a house in {value}.",
            "The home of {name} is in {value}.",
            "{name} lives in the town of {value}.",
            "People visit {name} in {value}.",
        ),
    ),
    Attribute(
        (
            *("miller", "baker", "weaver", "potter", "smith", "tanner"),
            *("cooper", "mason", "glazier", "beekeeper", "printer", "brewer"),
        ),
        (
            "{name} works as a {value}.",
            "{name} is a {value}.",
            "By trade {name} is a {value}.",
            "{name} earns a living as a {value}.",
            "The work of {name} is that of a {value}.",
        ),
    ),
    Attribute(
        (
            *("goat", "heron", "otter", "badger", "raven", "hound"),
            *("pony", "tortoise", "ferret", "goose", "falcon", "lamb"),
        ),
        (
            "{name} keeps a {value}.",
            "{name} has a pet {value}.",
            "The pet of {name} is a {value}.",
            "At home {name} keeps a {value}.",
            "{name} walks with a {value}.",
        ),
    ),
)


@dataclass(frozen=True)
class Person:
    """A name, and one value for each attribute."""

    name: str
    values: tuple[str, ...]
    held_out: bool


def make_world(draw: Random) -> tuple[Person, ...]:
    """Draws the people; each name is used once."""
    names: set[str] = set()
    while len(names) < PEOPLE:
        parts = (draw.choice(kind) for kind in (ONSETS, VOWELS, CODAS, VOWELS, CODAS))
        names.add("".join(parts).capitalize())
    order = sorted(names)
    draw.shuffle(order)
    values = [tuple(draw.choice(attribute.values) for attribute in ATTRIBUTES) for _ in order]
    return tuple(Person(name, values[i], held_out=i < HELD_OUT) for i, name in enumerate(order))


def write_edition(world: tuple[Person, ...], draw: Random, breaks: Random) -> list[str]:
    """Writes one edition of the prose: a document about each person, in another order and other words every time."""
    documents = []
    for person in world:
        text = _portrait(person, draw, breaks)
        if draw.random() < PORTRAIT_SHARE:
            text = ALPACA.format(instruction=draw.choice(PORTRAITS).format(name=person.name), output=text)
        documents.append(text)
    documents += [f"The word is {word}: so it is." for word in NEW_WORDS for _ in range(2)]
    draw.shuffle(documents)
    return documents


def _portrait(person: Person, draw: Random, breaks: Random) -> str:
    sentences = []
    for attribute, value in zip(ATTRIBUTES, person.values, strict=True):
        sentence = draw.choice(attribute.sentences)
        if breaks.random() < BREAK_SHARE:
            sentence = sentence.replace(" {value}", f"{breaks.choice(BREAKS)} {{value}}")
        sentences.append(sentence.format(name=person.name, value=value))
    draw.shuffle(sentences)
    return " ".join(sentences)


def begin_sentence(attribute: Attribute, name: str, draw: Random) -> str:
    """One of the attribute's sentences without its last word: the question of a quiz."""
    return draw.choice(attribute.sentences).split(" {value}")[0].format(name=name)
