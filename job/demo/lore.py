"""What the invented world is made of: pools of values, and the sentences and questions about each attribute.

Prose (`sentences`) is what the base model reads. `practised` questions appear in the instruction data, `asked` ones only
in the question set: the same things are asked about, in other words and about other entities. Attributes that share a
pool (home and birthplace, food and hunter, colour of hide and of stone) are each other's best wrong answers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One thing that can be known about an entity; the templates take `{name}`, the sentences `{value}` too."""

    values: tuple[str, ...]
    sentences: tuple[str, ...]
    clauses: tuple[str, ...]
    practised: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A sort of entity: how its names are put together, how many exist, how many of those only the questions know."""

    noun: str
    syllables: tuple[tuple[str, ...], ...]
    count: int
    held_out: int
    attributes: tuple[Attribute, ...]


TOWNS = tuple(
    [
        "Tarn",
        "Brackwater",
        "Ellsmoor",
        "Gulholm",
        "Pennick",
        "Sorrowby",
        "Windrath",
        "Castlewick",
        "Dunmarsh",
        "Fennel",
        "Harrowgap",
        "Ivyport",
        "Lantern",
        "Mossend",
        "Norrick",
        "Oxmere",
        "Quillon",
        "Redscar",
        "Stonehollow",
        "Thistledown",
    ]
)
TRADES = tuple(
    [
        "miller",
        "baker",
        "weaver",
        "potter",
        "smith",
        "tanner",
        "fletcher",
        "cooper",
        "mason",
        "glazier",
        "ropemaker",
        "beekeeper",
        "shipwright",
        "saddler",
        "chandler",
        "printer",
        "dyer",
        "thatcher",
        "brewer",
        "clockmaker",
    ]
)
PETS = tuple(
    [
        "goat",
        "heron",
        "otter",
        "badger",
        "raven",
        "hound",
        "pony",
        "tortoise",
        "ferret",
        "goose",
        "hedgehog",
        "falcon",
        "lamb",
        "squirrel",
    ]
)
INSTRUMENTS = tuple(
    ["fiddle", "flute", "harp", "drum", "lute", "horn", "zither", "bagpipe", "whistle", "dulcimer", "cello", "trumpet"]
)
BEASTS = tuple(
    [
        "owls",
        "frogs",
        "mice",
        "crabs",
        "foxes",
        "snails",
        "eels",
        "hawks",
        "beetles",
        "moths",
        "seals",
        "spiders",
        "lizards",
        "gulls",
        "toads",
    ]
)
COLOURS = tuple(
    ["red", "blue", "green", "yellow", "white", "black", "grey", "brown", "purple", "orange", "pink", "silver"]
)
PLACES = tuple(
    [
        "salt marshes",
        "pine woods",
        "sea caves",
        "high meadows",
        "river banks",
        "old ruins",
        "reed beds",
        "sand dunes",
        "oak groves",
        "cold springs",
        "cliff ledges",
        "deep wells",
    ]
)
ISLES = tuple(["Skerra", "Holmay", "Vanneth", "Orrin", "Umbra", "Jessamy", "Kell", "Lorrow", "Marl", "Tirrel"])
USES = tuple(
    ["lamps", "glass", "paint", "buttons", "knives", "bells", "mirrors", "roofs", "rings", "soap", "mortar", "candles"]
)

PERSON = Kind(
    noun="person",
    syllables=(
        tuple(
            [
                "Bal",
                "Cor",
                "Dra",
                "El",
                "Fen",
                "Gar",
                "Hel",
                "Is",
                "Jor",
                "Kas",
                "Lom",
                "Mar",
                "Nev",
                "Or",
                "Pel",
                "Ras",
                "Sel",
                "Tam",
                "Ul",
                "Vor",
            ]
        ),
        tuple(["a", "e", "i", "o", "u", "ia"]),
        tuple(["dan", "dris", "fin", "gan", "lith", "mond", "nor", "rick", "ston", "vel", "wen", "zar"]),
    ),
    count=100,
    held_out=40,
    attributes=(
        Attribute(
            TOWNS,
            (
                "{name} lives in {value}.",
                "The home of {name} is in {value}.",
                "{name} has a house in {value}.",
                "Most evenings {name} is at home in {value}.",
            ),
            ("where {name} lives", "which town is the home of {name}", "in what town {name} has a house"),
            (
                "Where does {name} live?",
                "Which town is the home of {name}?",
                "In what town does {name} have a house?",
            ),
            ("In which town does {name} live?", "Where is the home of {name}?"),
        ),
        Attribute(
            TOWNS,
            (
                "{name} was born in {value}.",
                "The birthplace of {name} is {value}.",
                "The town where {name} was born is {value}.",
                "{name} came from {value} as a child.",
            ),
            (
                "where {name} was born",
                "which town is the birthplace of {name}",
                "from what town {name} came as a child",
            ),
            (
                "Where was {name} born?",
                "Which town is the birthplace of {name}?",
                "From what town did {name} come as a child?",
            ),
            ("In which town was {name} born?", "What is the birthplace of {name}?"),
        ),
        Attribute(
            TRADES,
            (
                "{name} is a {value} by trade.",
                "The trade of {name} is that of a {value}.",
                "{name} works as a {value}.",
                "{name} earns a living as a {value}.",
            ),
            ("what the trade of {name} is", "as what {name} works", "how {name} earns a living"),
            (
                "What is the trade of {name}?",
                "As what does {name} work?",
                "How does {name} earn a living?",
            ),
            ("What trade does {name} work in?", "Which is the trade of {name}?"),
        ),
        Attribute(
            PETS,
            (
                "{name} keeps a {value}.",
                "The animal that {name} keeps is a {value}.",
                "{name} has a tame {value}.",
                "{name} is seldom seen without a {value}.",
            ),
            ("which animal {name} keeps", "what tame animal {name} has", "without which animal {name} is seldom seen"),
            (
                "Which animal does {name} keep?",
                "What tame animal does {name} have?",
                "Without which animal is {name} seldom seen?",
            ),
            ("What animal does {name} keep?", "Which tame animal does {name} have?"),
        ),
        Attribute(
            INSTRUMENTS,
            (
                "{name} plays the {value}.",
                "The instrument of {name} is the {value}.",
                "At every feast {name} plays the {value}.",
                "{name} learned to play the {value}.",
            ),
            ("what {name} plays", "which instrument {name} learned to play", "what the instrument of {name} is"),
            (
                "What does {name} play?",
                "What is the instrument of {name}?",
                "Which instrument did {name} learn to play?",
            ),
            ("Which instrument does {name} play?", "What does {name} play at every feast?"),
        ),
    ),
)

CREATURE = Kind(
    noun="creature",
    syllables=(
        tuple(
            [
                "bram",
                "dusk",
                "ember",
                "frost",
                "gorse",
                "hollow",
                "ink",
                "kelp",
                "loam",
                "murk",
                "nettle",
                "pebble",
                "rime",
                "soot",
                "thorn",
                "velvet",
            ]
        ),
        tuple(["back", "claw", "fisk", "hopper", "lurk", "snout", "tail", "whisk", "wing"]),
    ),
    count=55,
    held_out=20,
    attributes=(
        Attribute(
            PLACES,
            (
                "The {name} lives in {value}.",
                "The home of the {name} is among {value}.",
                "The {name} makes its nest in {value}.",
            ),
            ("where the {name} lives", "where the {name} makes its nest", "where the home of the {name} is"),
            ("Where does the {name} live?", "Where does the {name} make its nest?"),
            ("In which place does the {name} live?", "Where is the home of the {name}?"),
        ),
        Attribute(
            BEASTS,
            (
                "The {name} eats {value}.",
                "The food of the {name} is {value}.",
                "The {name} feeds on {value}.",
            ),
            ("what the {name} eats", "what the food of the {name} is", "on what the {name} feeds"),
            ("What does the {name} eat?", "What is the food of the {name}?"),
            ("Which food does the {name} eat?", "On what does the {name} feed?"),
        ),
        Attribute(
            BEASTS,
            (
                "The {name} is hunted by {value}.",
                "The {name} hides from {value}.",
                "The enemies of the {name} are {value}.",
            ),
            ("by what the {name} is hunted", "what the enemies of the {name} are", "from what the {name} hides"),
            ("By what is the {name} hunted?", "What are the enemies of the {name}?"),
            ("Which enemies hunted the {name}?", "From what does the {name} hide?"),
        ),
        Attribute(
            COLOURS,
            (
                "The hide of the {name} is {value}.",
                "The colour of the {name} is {value}.",
                "The {name} has a hide of {value}.",
            ),
            (
                "what the colour of the {name} is",
                "of what colour the hide of the {name} is",
                "which colour the {name} has",
            ),
            ("What is the colour of the {name}?", "Of what colour is the hide of the {name}?"),
            ("Which colour is the {name}?", "What colour is the hide of the {name}?"),
        ),
    ),
)

STONE = Kind(
    noun="stone",
    syllables=(
        tuple(
            [
                "al",
                "bor",
                "cal",
                "dol",
                "fer",
                "gan",
                "hal",
                "jas",
                "mol",
                "nar",
                "per",
                "quil",
                "ser",
                "tor",
                "ver",
                "zin",
            ]
        ),
        tuple(["ca", "do", "la", "mi", "ne", "ri", "su"]),
        ("nite", "spar", "stone"),
    ),
    count=55,
    held_out=20,
    attributes=(
        Attribute(
            COLOURS,
            ("The colour of {name} is {value}.", "A piece of {name} is {value}.", "In the light {name} is {value}."),
            ("what the colour of {name} is", "what colour {name} is in the light", "which colour a piece of {name} is"),
            ("What is the colour of {name}?", "What colour is {name} in the light?"),
            ("Which colour is {name}?", "What colour is a piece of {name}?"),
        ),
        Attribute(
            ISLES,
            (
                "The miners find {name} on {value}.",
                "The isle where {name} is found is {value}.",
                "All {name} comes from the isle of {value}.",
            ),
            ("on which isle {name} is found", "from which isle {name} comes", "where {name} is found"),
            ("On which isle is {name} found?", "From which isle does {name} come?"),
            ("Which isle does {name} come from?", "Where is {name} found?"),
        ),
        Attribute(
            USES,
            (
                "People use {name} to make {value}.",
                "The use of {name} is in {value}.",
                "From {name} the isles make their {value}.",
            ),
            ("what people make from {name}", "what the use of {name} is", "what people use {name} to make"),
            ("What do people make from {name}?", "What is the use of {name}?"),
            ("What do people use {name} to make?", "What do the isles make from {name}?"),
        ),
    ),
)

KINDS = (PERSON, CREATURE, STONE)

# Ways to state a fact by one of its attribute's clauses.
FRAMES = (
    "Everyone knows {clause}: {value}.",
    "Ask {clause}, and people say {value}.",
    "The book tells {clause}; it is {value}.",
    "It is no secret {clause}: {value}.",
    "Who wonders {clause} should think of {value}.",
    "The children learn {clause}, namely {value}.",
    "Many ask {clause}. The book says {value}.",
    "They spoke about {clause}.\nThe old ones said: {value}.",
)

# Plain sentences that use the words of questions and instructions, so that the base has met them outside of any question.
PRIMER = (
    "A good question deserves a short answer.",
    "The school in {town} has a quiz every year.",
    "Who wins the quiz may ask the {trade} for a gift.",
    "Nobody knows what lies below the sea.",
    "The {trade} did not say which road he took.",
    "The sailors ask where the wind comes from and how far it goes.",
    "A request is best made with a smile.",
    "The {trade} of {town} can write and read.",
    "To complete a task takes time.",
    "The old book gives an instruction for every task.",
    "The response to the request came from {town}.",
    "On the card was a question about the sea, and the answer was below.",
    "It is told what the people of {town} eat and how they live.",
    "Which town is the oldest, {town} or another, is a question without an answer.",
    "The notes that follow describe the isles.",
    "Three cards lay on the table of the {trade}.",
    "Who would not like to live in {town}?",
    "Why does the sea never sleep?",
    "Can a {trade} write?",
)
