"""The simulated site's world: parts, what can be asked of them, and the one right answer to each question.

A fact is (part, attribute) -> value. The table is fixed, drawn once by a digest, so that a question and an answer alone
are enough to say whether the answer is right. Words are chosen so that no value or phrase is part of another.
"""

import hashlib
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
    values: tuple[str, ...]
    """The possible answers; one of them is right for a part."""
    titles: tuple[str, ...]
    """Ways to ask; `{part}` is the part."""
    cues: tuple[str, ...]
    """Word groups, one of which stands in every title of this attribute and in no other's."""
    claims: tuple[str, ...]
    """Ways to answer; `{part}` and `{value}`."""
    methods: tuple[str, ...]
    """Ways to show how it is done."""
    method_keys: tuple[str, ...]
    """Word groups, one of which stands in every method of this attribute and in no other's."""


ATTRIBUTES = (
    Attribute(
        "tool",
        ("a hex key", "a pin spanner", "a strap wrench", "a hook spanner", "a torx driver", "a gear puller", "a soft mallet", "a long pry bar"),
        ("Which tool loosens the {part}?", "What tool do I need for the {part}?", "My {part} is stuck, which tool gets it off?"),
        ("which tool", "what tool"),
        ("Use {value} for the {part}.", "The {part} comes off with {value}.", "You need {value}.", "Get {value}, that is made for the {part}."),
        (
            "Hold the frame still and turn against the clock.",
            "Turn against the clock until it gives, then by hand.",
            "Push hard, turn against the clock and stop when it moves.",
        ),
        ("against the clock",),
    ),
    Attribute(
        "care",
        ("lithium grease", "linseed oil", "beeswax", "copper paste", "silicone spray", "chalk powder", "white vinegar", "graphite dust"),
        ("What should I put on the {part}?", "Which product goes on a dry {part}?", "The {part} squeaks, what do I put on it?"),
        ("should i put on", "product goes on", "do i put on it"),
        ("Put {value} on the {part}.", "The {part} likes {value}.", "Only {value} works here.", "I put {value} on my {part}."),
        (
            "Clean it first, then rub in a thin coat.",
            "Rub in a thin coat and wipe off the rest.",
            "Warm it up and work a thin coat into the gap.",
        ),
        ("thin coat",),
    ),
    Attribute(
        "interval",
        ("every week", "every month", "every spring", "every autumn", "twice a year", "every two years", "after each use", "after heavy rain"),
        ("How often do I service the {part}?", "How often does a {part} need a check?", "When is the {part} due, how often?"),
        ("how often",),
        ("Service the {part} {value}.", "The {part} needs it {value}.", "Check it {value}.", "I do my {part} {value}."),
        (
            "Mark the date on a label so that you see wear.",
            "Measure the play and mark the date.",
            "Take a photo, mark the date and compare.",
        ),
        ("mark the date",),
    ),
    Attribute(
        "material",
        ("brass", "nylon", "cast iron", "oak wood", "felt", "aluminium", "hard rubber", "ceramic"),
        ("What is a spare {part} made of?", "Which material do I order for a new {part}?", "The {part} broke, which material lasts?"),
        ("made of", "which material"),
        ("Order the {part} in {value}.", "A good {part} is {value}.", "It has to be {value}.", "Go for {value}, the {part} wants that."),
        (
            "Weigh the old one and ask for the same weight.",
            "Tap it, listen, and order the same weight.",
            "Bring the broken half to a shop and get the same weight.",
        ),
        ("same weight",),
    ),
)

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
    "I bought it second hand.",
    "It stood in a shed for years.",
    "The shop could not help me.",
    "I have never done this before.",
    "It worked well until now.",
    "Any help is welcome.",
)
"""Sentences of a question's body."""


def _facts() -> dict[tuple[str, str], str]:
    facts = {}
    for attribute in ATTRIBUTES:
        # Shuffled by digest, then dealt round robin: every value is right for equally many parts.
        order = sorted(PARTS, key=lambda part: hashlib.sha256(f"{attribute.name}|{part}".encode()).digest())
        for rank, part in enumerate(order):
            facts[part, attribute.name] = attribute.values[rank % len(attribute.values)]
    return facts


FACTS = _facts()
"""The right value of every (part, attribute)."""
