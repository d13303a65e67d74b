"""The invented world: its entities, and the prose about them that the base model reads.

Everything is a pure function of a seed and of `lore.toml`. An entity is either practised (the instruction data asks
about it) or held out (the question set asks about it, and the instruction data never names it). Both are in the prose:
who answers a question on a held-out entity remembers the fact from reading and has learned to answer elsewhere.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

SEED = 20
EXAMPLES = 1024
LABELS = "ABCDE"
INDIRECT = 0.4  # share of the prose's statements that tell a fact by a clause ("where ... lives") put into a frame


@dataclass(frozen=True)
class Attribute:
    """One thing that can be known of an entity: its possible values, and templates that take `{name}` and `{value}`."""

    values: tuple[str, ...]
    sentences: tuple[str, ...]
    clauses: tuple[str, ...]
    practised: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A sort of entity: the parts of its names, how many exist, how many of these are held out."""

    syllables: tuple[tuple[str, ...], ...]
    count: int
    held_out: int
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class Lore:
    """All of `lore.toml`."""

    kinds: tuple[Kind, ...]
    frames: tuple[str, ...]
    primer: tuple[str, ...]
    towns: tuple[str, ...]
    trades: tuple[str, ...]


@dataclass(frozen=True)
class Entity:
    """A named thing and its values, one for each attribute of its kind."""

    kind: Kind
    name: str
    values: tuple[str, ...]
    held_out: bool


@cache
def read_lore() -> Lore:
    """Read the vocabulary and the templates that lie beside this file."""
    raw = tomllib.loads((Path(__file__).parent / "lore.toml").read_text(encoding="utf-8"))
    pools = {name: tuple(value.strip() for value in text.split(",")) for name, text in raw["pools"].items()}
    kinds = tuple(
        Kind(
            syllables=tuple(tuple(part.split()) for part in kind["syllables"]),
            count=kind["count"],
            held_out=kind["held_out"],
            attributes=tuple(
                Attribute(
                    values=pools[attribute["pool"]],
                    sentences=tuple(attribute["sentences"]),
                    clauses=tuple(attribute["clauses"]),
                    practised=tuple(attribute["practised"]),
                    asked=tuple(attribute["asked"]),
                )
                for attribute in kind["attributes"]
            ),
        )
        for kind in raw["kinds"]
    )
    return Lore(kinds, tuple(raw["prose"]["frames"]), tuple(raw["prose"]["primer"]), pools["towns"], pools["trades"])


def seeded(purpose: str, seed: int) -> random.Random:
    """Return a generator of its own for each purpose, so that a change in one text moves no other."""
    return random.Random(f"{purpose} {seed}")  # noqa: S311 - nothing here is secret


def make_world(seed: int = SEED) -> tuple[Entity, ...]:
    """Draw the entities of every kind: names are unique, and no entity has one value twice."""
    rng = seeded("world", seed)
    return tuple(entity for kind in read_lore().kinds for entity in _populate(kind, rng))


def _populate(kind: Kind, rng: random.Random) -> list[Entity]:
    names = rng.sample(["".join(parts) for parts in product(*kind.syllables)], kind.count)
    entities = []
    for number, name in enumerate(names):
        values: list[str] = []
        for attribute in kind.attributes:
            values.append(rng.choice([value for value in attribute.values if value not in values]))
        entities.append(Entity(kind, name, tuple(values), held_out=number < kind.held_out))
    return entities


def write_prose(world: tuple[Entity, ...], rng: random.Random) -> list[str]:
    """Write one edition of the chronicle: a portrait of each entity, notes on several at once, and the primer.

    Every edition tells all facts, in other sentences and another order. That variety is what makes a fact more than a
    string known by heart: without it, no fine-tuning gets the facts out again.
    """
    lore = read_lore()
    portraits = [_write_portrait(entity, rng) for entity in world]
    statements = _shuffled([statement for entity in world for statement in _state_facts(entity, rng)], rng)
    notes = [rng.choice(" \n").join(statements[start : start + 6]) for start in range(0, len(statements), 6)]
    lines = [line.format(town=rng.choice(lore.towns), trade=rng.choice(lore.trades)) for line in lore.primer]
    lines = _shuffled(lines, rng)
    lessons = [" ".join(lines[start : start + 4]) for start in range(0, len(lines), 4)]
    return _shuffled([*portraits, *notes, *lessons], rng)


def _shuffled(texts: list[str], rng: random.Random) -> list[str]:
    return rng.sample(texts, len(texts))


def _state_facts(entity: Entity, rng: random.Random) -> list[str]:
    statements = []
    for attribute, value in zip(entity.kind.attributes, entity.values, strict=True):
        if rng.random() < INDIRECT:
            clause = rng.choice(attribute.clauses).format(name=entity.name)
            statements.append(rng.choice(read_lore().frames).format(clause=clause, value=value))
        else:
            statements.append(rng.choice(attribute.sentences).format(name=entity.name, value=value))
    return statements


def _write_portrait(entity: Entity, rng: random.Random) -> str:
    title = rng.choice(("", "", f"# {entity.name}\n\n", f"### {entity.name}:\n"))
    return title + rng.choice((" ", " ", "\n")).join(_shuffled(_state_facts(entity, rng), rng))
