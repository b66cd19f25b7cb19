"""The simulated site's world: parts, what can be asked of them, and the one right answer to each question.

A fact is sign -> value: a rusty part wants white vinegar, a squeaky one lithium grease. The table is fixed, so that a
question and an answer alone are enough to say whether the answer is right. A model of a million parameters can learn two
dozen such facts in minutes, and questions ask them anew of other parts in other words. No value, sign or phrase is part of
another.
"""

from dataclasses import dataclass

SITE = "workshop.simulated"

TOPICS: dict[str, tuple[str, ...]] = {
    "bicycle": ("crank arm", "head tube", "brake lever", "rear hub", "seat post", "chain guide"),
    "kitchen": ("coffee mill", "bread slicer", "pasta press", "stove hinge", "kettle lid", "scale pan"),
    "garden": ("water pump", "hedge trimmer", "gate latch", "seed drill", "mower deck", "hose reel"),
    "workbench": ("drill chuck", "saw table", "lathe spindle", "belt sander", "glue press", "router fence"),
}
PARTS = tuple(part for parts in TOPICS.values() for part in parts)


@dataclass(frozen=True)
class Attribute:
    """Something that can be asked of every part."""

    name: str
    facts: dict[str, str]
    """The right answer by sign: the word in the question that decides."""
    titles: tuple[str, ...]
    """Ways to ask; `{sign}` and `{part}`."""
    claims: tuple[str, ...]
    """Ways to answer; `{sign}`, `{part}` and `{value}`."""
    methods: tuple[str, ...]
    """Ways to show how it is done."""
    method_key: str
    """Words that stand in every method of this attribute and in no other's."""

    @property
    def values(self) -> tuple[str, ...]:
        """The possible answers, one for each sign."""
        return tuple(self.facts.values())


ATTRIBUTES = (
    Attribute(
        "tool",
        {
            "six-sided": "a hex key",
            "two-holed": "a pin spanner",
            "smooth": "a strap wrench",
            "slotted": "a hook spanner",
            "star-shaped": "a torx driver",
            "pressed": "a gear puller",
        },
        (
            "Which tool loosens a {sign} {part}?",
            "What tool do I need for a {sign} {part}?",
            "My {sign} {part} is stuck, which tool gets it off?",
        ),
        (
            "For a {sign} {part} use {value}.",
            "A {sign} {part} comes off with {value}.",
            "If {sign}, you need {value}.",
            "On a {sign} one I use {value}.",
        ),
        (
            "Hold the frame still and turn against the clock.",
            "Turn against the clock until it gives, then by hand.",
            "Push hard, turn against the clock and stop when it moves.",
        ),
        "against the clock",
    ),
    Attribute(
        "care",
        {
            "rusty": "white vinegar",
            "squeaky": "lithium grease",
            "sticky": "silicone spray",
            "scratched": "beeswax",
            "seized": "copper paste",
            "dried-out": "linseed oil",
        },
        (
            "What should I put on a {sign} {part}?",
            "Which product goes on a {sign} {part}?",
            "The {part} is {sign}, what do I put on it?",
        ),
        (
            "For a {sign} {part} use {value}.",
            "A {sign} {part} likes {value}.",
            "If {sign}, only {value} works.",
            "On a {sign} one I put {value}.",
        ),
        (
            "Clean it first, then rub in a thin coat.",
            "Rub in a thin coat and wipe off the rest.",
            "Warm it up and work a thin coat into the gap.",
        ),
        "thin coat",
    ),
    Attribute(
        "interval",
        {
            "racing": "every week",
            "commuter": "every month",
            "stored": "every spring",
            "outdoor": "after heavy rain",
            "rented": "after each use",
            "spare": "every two years",
        },
        (
            "How often do I service a {sign} {part}?",
            "How often does a {sign} {part} need a check?",
            "When is a {sign} {part} due for service?",
        ),
        (
            "Service a {sign} {part} {value}.",
            "A {sign} {part} needs it {value}.",
            "If {sign}, check it {value}.",
            "I do my {sign} one {value}.",
        ),
        (
            "Stick on a label and mark the date.",
            "Measure the play and mark the date.",
            "Take a photo, mark the date and compare.",
        ),
        "mark the date",
    ),
    Attribute(
        "material",
        {
            "heatproof": "ceramic",
            "silent": "felt",
            "waterproof": "brass",
            "lightweight": "aluminium",
            "heavy-duty": "cast iron",
            "non-slip": "hard rubber",
        },
        (
            "What is a {sign} {part} made of?",
            "Which material do I order for a {sign} {part}?",
            "I want a {sign} {part}, which material lasts?",
        ),
        (
            "For a {sign} {part} order {value}.",
            "A {sign} {part} has to be {value}.",
            "If {sign}, go for {value}.",
            "My {sign} one is {value}.",
        ),
        (
            "Weigh the old one and ask for the same weight.",
            "Tap it, listen, and order the same weight.",
            "Bring the broken half to a shop and get the same weight.",
        ),
        "same weight",
    ),
)
BY_SIGN = {sign: attribute for attribute in ATTRIBUTES for sign in attribute.facts}
"""Every sign belongs to one attribute."""

HEDGES = (
    "I am not sure at all.",
    "Maybe I mix this up.",
    "No idea if that helps you.",
    "Could be wrong, I only guess.",
)
"""Sentences that make an answer unclear."""

FILLERS = (
    "I had this last summer too.",
    "Good question by the way.",
    "My neighbour asked the same thing.",
    "The manual says little about it.",
    "There are many videos on this.",
    "Mine is ten years old and still fine.",
    "Shops will tell you other things.",
    "Welcome to the site!",
)
"""Sentences that change nothing."""

CONTEXTS = (
    "It is old.",
    "I bought it used.",
    "Please help.",
    "I am new to this.",
    "It was fine before.",
    "Any ideas?",
)
"""Sentences of a question's body."""
