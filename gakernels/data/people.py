"""Invented people and facts: a corpus in which nothing can be known without reading the document.

Names and values are fixed lists of two words each; which person has which value is drawn afresh for every
document from a `random.Random`, so a seed determines a corpus. One pair of names in ten is held out for
evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "test"]

_FIRST_PARTS = (
    "Mi To Ka Le Ro Sa Ne Bi Da Fe Ga Ha Jo Lu Na Pe Ri Se Ta Vi",
    "ra lo na ri da mi va so le ko",
)
_LAST_PARTS = (
    "Bran Tol Mar Kel Dor Fen Gar Hal Jor Lin Nor Pel Rus Sten Tav Ver Wes Yar Zel Cor",
    "den ov ic man sen ley ard win ell ton",
)


def _pairs(left: str, right: str, joiner: str) -> tuple[str, ...]:
    """Joins each of the words in `left` to each of those in `right`."""
    return tuple(f"{a}{joiner}{b}" for a in left.split() for b in right.split())


FIRST_NAMES: tuple[str, ...] = _pairs(*_FIRST_PARTS, joiner="")
LAST_NAMES: tuple[str, ...] = _pairs(*_LAST_PARTS, joiner="")


@dataclass(frozen=True)
class Attribute:
    """Something a person has: how a document states it, and the 64 values it can take.

    Attributes:
        name: The noun that questions and statements share.
        statement: The sentence in a document, with the fields `{person}` and `{value}`, in this order.
        values: The possible values, each of two words. A word belongs to one attribute only.
    """

    name: str
    statement: str
    values: tuple[str, ...]


def _attribute(name: str, statement: str, left: str, right: str) -> Attribute:
    """Builds an attribute whose values join each of 8 words to each of 8 others."""
    return Attribute(name, statement, _pairs(left, right, joiner=" "))


ATTRIBUTES: tuple[Attribute, ...] = (
    _attribute(
        "town",
        "The town of {person} is {value}.",
        "North South East West Old New Upper Lower",
        "Ashford Oakbury Elmwick Birchmere Thorndale Stoneham Brookholm Willowstead",
    ),
    _attribute(
        "job",
        "The job of {person} is {value}.",
        "ship clock glass sign boot harp kite lamp",
        "painter maker seller buyer mender carver tester keeper",
    ),
    _attribute(
        "pet",
        "The pet of {person} is {value}.",
        "grey white black brown spotted striped golden tabby",
        "cat dog rabbit parrot ferret tortoise hamster gecko",
    ),
    _attribute(
        "drink",
        "The drink that {person} orders is {value}.",
        "iced hot spiced sweet bitter foamy weak strong",
        "cocoa coffee tea cider lemonade milk punch broth",
    ),
    _attribute(
        "meal",
        "The meal that {person} cooks is {value}.",
        "baked fried smoked grilled stewed roasted pickled stuffed",
        "trout lamb turnip pepper chicken eggplant mushroom cod",
    ),
    _attribute(
        "instrument",
        "The instrument that {person} plays is {value}.",
        "brass wooden tenor bass alto electric silver folk",
        "horn flute guitar fiddle drum organ banjo zither",
    ),
    _attribute(
        "sport",
        "The sport that {person} practises is {value}.",
        "river beach indoor mountain street winter forest team",
        "rowing volleyball cycling climbing running skating archery fencing",
    ),
    _attribute(
        "hobby",
        "The hobby of {person} is {value}.",
        "paper model pocket garden antique shadow ribbon puzzle",
        "folding collecting drawing photography restoring stitching trading printing",
    ),
    _attribute(
        "vehicle",
        "The vehicle that {person} drives is {value}.",
        "diesel rusty hybrid vintage armoured racing rental borrowed",
        "truck van tractor scooter minibus sedan wagon buggy",
    ),
    _attribute(
        "flower",
        "The flower that {person} grows is {value}.",
        "meadow alpine marsh desert dwarf trailing double evening",
        "rose tulip lily daisy orchid poppy iris violet",
    ),
    _attribute(
        "coat",
        "The coat that {person} wears is {value}.",
        "wool leather velvet denim linen silk quilted padded",
        "cape jacket parka cloak blazer poncho anorak tunic",
    ),
    _attribute(
        "house",
        "The house of {person} is {value}.",
        "brick timber slate clay thatched concrete marble straw",
        "cottage villa cabin tower bungalow farmhouse mansion hut",
    ),
    _attribute(
        "tree",
        "The tree that {person} planted is {value}.",
        "giant weeping young hollow crooked sacred mossy lonely",
        "cedar maple pine larch poplar chestnut walnut spruce",
    ),
    _attribute(
        "book",
        "The book that {person} reads is {value}.",
        "lost secret burning frozen silent haunted broken final",
        "island castle letter kingdom harbour mirror voyage throne",
    ),
    _attribute(
        "boat",
        "The boat that {person} sails is {value}.",
        "swift proud merry gallant noble daring lucky humble",
        "heron gull dolphin seal otter pelican marlin osprey",
    ),
    _attribute(
        "school",
        "The school of {person} is {value}.",
        "north south east west upper lower central royal",
        "college academy institute seminary polytechnic lyceum conservatory university",
    ),
    _attribute(
        "dessert",
        "The dessert that {person} bakes is {value}.",
        "lemon cherry almond vanilla caramel ginger honey plum",
        "tart pudding cake pie sorbet trifle muffin biscuit",
    ),
    _attribute(
        "tool",
        "The tool that {person} lent is {value}.",
        "iron steel copper bent cordless heavy blunt sharp",
        "hammer chisel wrench saw drill spade axe pliers",
    ),
    _attribute(
        "gem",
        "The gem of {person} is {value}.",
        "pale cloudy flawless polished rough cracked square round",
        "opal ruby emerald sapphire topaz garnet amethyst diamond",
    ),
    _attribute(
        "club",
        "The club of {person} is {value}.",
        "chess poetry theatre debating astronomy knitting birding cinema",
        "circle society union league guild fellowship alliance council",
    ),
    _attribute(
        "dance",
        "The dance that {person} teaches is {value}.",
        "slow fast formal village ballroom masked barefoot courtly",
        "waltz tango polka rumba jig foxtrot quickstep minuet",
    ),
    _attribute(
        "hat",
        "The hat that {person} wears is {value}.",
        "felt tweed fur cotton canvas satin feathered woven",
        "cap beret bonnet fedora turban bowler visor sombrero",
    ),
    _attribute(
        "game",
        "The game that {person} won is {value}.",
        "blitz tournament blindfold amateur charity senior online midnight",
        "draughts poker dominoes backgammon bridge darts snooker rummy",
    ),
    _attribute(
        "language",
        "The language of {person} is {value}.",
        "High Low Ancient Middle Coastal Inland Common Temple",
        "Karelic Velanese Oskorian Tirish Unduvian Zamatic Ephondi Quaemic",
    ),
)


@dataclass(frozen=True)
class Person:
    """A person, known by two names."""

    first: str
    last: str

    def __str__(self) -> str:
        """The full name."""
        return f"{self.first} {self.last}"


@dataclass(frozen=True)
class Fact:
    """One value of one attribute of one person."""

    person: Person
    attribute: Attribute
    value: str

    def statement(self) -> str:
        """The sentence that states the fact; the full name comes before the value."""
        return self.attribute.statement.format(person=self.person, value=self.value)

    def question(self) -> str:
        """The prompt whose continuation is the value."""
        return f"Question: What is the {self.attribute.name} of {self.person}? Answer:"


@dataclass(frozen=True)
class Document:
    """People and the facts about them, in the order of the text."""

    people: tuple[Person, ...]
    facts: tuple[Fact, ...]

    def text(self) -> str:
        """The statements in order."""
        return " ".join(fact.statement() for fact in self.facts)

    def questions(self) -> list[tuple[str, str]]:
        """Prompt and answer for every fact, in the order of the facts."""
        return [(fact.question(), fact.value) for fact in self.facts]


def is_held_out(first: int, last: int) -> bool:
    """Whether the names at these positions of the two lists are a pair of the test split (one in ten is)."""
    return (7 * first + 3 * last) % 10 == 0


def draw_person(rng: Random, split: Split = "train") -> Person:
    """Draws one person of a split."""
    while True:
        first, last = rng.randrange(len(FIRST_NAMES)), rng.randrange(len(LAST_NAMES))
        if is_held_out(first, last) == (split == "test"):
            return Person(FIRST_NAMES[first], LAST_NAMES[last])


def draw_people(rng: Random, count: int, split: Split = "train") -> tuple[Person, ...]:
    """Draws distinct people of a split."""
    people: dict[Person, None] = {}
    while len(people) < count:
        people[draw_person(rng, split)] = None
    return tuple(people)


def draw_document(
    rng: Random, people: int = 1, facts_per_person: tuple[int, int] = (15, 18), split: Split = "train"
) -> Document:
    """Draws a document about new facts, its sentences in random order.

    Everybody has the same attributes, so that only the name identifies the value in question.

    Args:
        rng: The source of randomness; the same state gives the same document.
        people: How many people the document is about.
        facts_per_person: The least and the greatest number of facts about each of them.
        split: The names to draw from.

    Raises:
        ValueError: If there are not as many attributes or pairs of names.
    """
    if facts_per_person[1] > len(ATTRIBUTES):
        raise ValueError(f"at most {len(ATTRIBUTES)} facts per person, not {facts_per_person[1]}")
    chosen = draw_people(rng, people, split)
    attributes = rng.sample(ATTRIBUTES, rng.randint(*facts_per_person))
    facts = [Fact(person, attribute, rng.choice(attribute.values)) for person in chosen for attribute in attributes]
    rng.shuffle(facts)
    return Document(chosen, tuple(facts))


def _any_person_chance(fact: Fact, facts: Sequence[Fact]) -> float:
    values = [other.value for other in facts if other.attribute is fact.attribute]
    return values.count(fact.value) / len(values)


def any_person_level(document: Document) -> float:
    """The accuracy of knowing every value and attribute of the document, but not whose value it is.

    A reader who answers each question with the attribute asked for, but of a random person of the document
    (among those who have it), is right this often; passing this level shows that values are bound to names.
    """
    return sum(_any_person_chance(fact, document.facts) for fact in document.facts) / len(document.facts)


def vocabulary() -> list[str]:
    """Every word and punctuation mark of documents and questions, in a fixed order, without repeats."""
    person = Person(FIRST_NAMES[0], LAST_NAMES[0])
    examples = [Fact(person, attribute, attribute.values[0]) for attribute in ATTRIBUTES]
    phrases = [text for fact in examples for text in (fact.statement(), fact.question())]
    words = [word.rstrip(".?:") for phrase in phrases for word in phrase.split()]
    values = [word for attribute in ATTRIBUTES for value in attribute.values for word in value.split()]
    return list(dict.fromkeys([".", "?", ":", *words, *FIRST_NAMES, *LAST_NAMES, *values]))
