"""How people of the simulated site write: questions and answers as HTML, good, bad and rambling."""

import html
import random

from tasks.ingest.simulated.world import ATTRIBUTES, CONTEXTS, FILLERS, HEDGES, PARTS, Attribute

P_MISSED, P_MISREAD, P_WRONG = 0.25, 0.12, 0.05
P_TWO_VALUES, P_HOW, P_OTHER_HOW, P_HEDGE = 0.08, 0.45, 0.3, 0.35


def question(rng: random.Random) -> tuple[str, str, Attribute, str, str]:
    """A part, a sign, an attribute, a title (plain text) and a body (HTML)."""
    part, attribute = rng.choice(PARTS), rng.choice(ATTRIBUTES)
    sign = rng.choice(list(attribute.facts))
    title = rng.choice(attribute.titles).format(part=part, sign=sign)
    return part, sign, attribute, title, paragraphs(rng.sample(CONTEXTS, rng.choice((1, 1, 1, 2))), rng)


def answer(part: str, sign: str, attribute: Attribute, rng: random.Random) -> str:
    """One answer as HTML; its author may miss the question, misread its sign, or not know.

    Whether it is right, shows how and is clear does not depend on its length.
    """
    right, read, about = attribute.facts[sign], sign, attribute
    draw = rng.random()
    if draw < P_MISSED:  # answers another kind of question, and rightly
        about = rng.choice([other for other in ATTRIBUTES if other is not attribute])
        read = rng.choice(list(about.facts))
    elif draw < P_MISSED + P_MISREAD:  # answers the question for another sign, and rightly
        read = rng.choice([other for other in attribute.facts if other != sign])
    value = about.facts[read]
    if P_MISSED + P_MISREAD <= draw < P_MISSED + P_MISREAD + P_WRONG:
        value = rng.choice([other for other in attribute.values if other != right])
    sentences = [sentence_case(rng.choice(about.claims).format(sign=read, part=part, value=value))]
    if rng.random() < P_TWO_VALUES:  # cannot decide: wrong, whatever the first value was
        sentences.append(f"Or {rng.choice([other for other in about.values if other != value])}.")
    draw = rng.random()
    if draw < P_HOW:
        sentences.append(rng.choice(about.methods))
    elif draw < P_HOW + P_OTHER_HOW:
        sentences.append(rng.choice(rng.choice([other for other in ATTRIBUTES if other is not about]).methods))
    for sentence in rng.sample(FILLERS, rng.choice((0, 0, 0, 1, 1, 2))):
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    if rng.random() < P_HEDGE:
        sentences.insert(rng.choice((0, len(sentences))), rng.choice(HEDGES))
    return paragraphs(sentences, rng, fence=rng.random() < 0.1)


def sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


def paragraphs(sentences: list[str], rng: random.Random, fence: bool = False) -> str:
    """HTML as the site would render it: one or two paragraphs, at times with bold type, a list, or a code fence."""
    escaped = [html.escape(sentence, quote=False) for sentence in sentences]
    if fence:
        code = f"<pre><code>part {rng.randint(1, 99)} ok\n</code></pre>"
        cut = rng.randint(0, len(escaped) - 1)
        blocks = [*([f"<p>{' '.join(escaped[:cut])}</p>"] if cut else []), code, f"<p>{' '.join(escaped[cut:])}</p>"]
    elif len(escaped) > 2 and rng.random() < 0.1:
        items = "".join(f"<li>{sentence}</li>\n" for sentence in escaped)
        blocks = [f"<ul>\n{items}</ul>"]
    elif len(escaped) > 1 and rng.random() < 0.3:
        cut = rng.randint(1, len(escaped) - 1)
        blocks = [f"<p>{' '.join(escaped[:cut])}</p>", f"<p>{' '.join(escaped[cut:])}</p>"]
    else:
        if rng.random() < 0.05:
            place = rng.randrange(len(escaped))
            escaped[place] = f"<strong>{escaped[place]}</strong>"
        blocks = [f"<p>{' '.join(escaped)}</p>"]
    return "\n\n".join(blocks) + "\n"
