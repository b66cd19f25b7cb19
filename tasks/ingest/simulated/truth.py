"""The truth about an answer of the simulated site, computed from its text alone.

    true_reward = 0.5 right + 0.3 shows how + 0.2 clear        in 0..1

right: it names the value that the sign in the question asks for, and no other value of that kind. Shows how: it gives the method
that belongs to what was asked (another question's method does not count). Clear: it does not hedge, says nothing twice,
and ends like a sentence. Length, politeness, code fences and lists count nothing.

Votes are drawn from this number and noise (votes.py), so the reward that ranks best is this number itself.
"""

import re
from collections.abc import Iterable

from tasks.ingest.simulated.world import BY_SIGN, HEDGES, SITE, Attribute

__all__ = ["SITE", "asked", "best_pair_accuracy", "is_clear", "is_right", "shows_how", "true_reward"]

RIGHT, HOW, CLEAR = 0.5, 0.3, 0.2


def _plain(text: str) -> str:
    """Lower case, Markdown's marks gone, white space folded: a line break or bold type changes no meaning."""
    return " ".join(re.sub(r"[*_`>#\\-]", " ", text.lower()).split())


def _has(text: str, phrase: str) -> bool:
    return re.search(rf"(?<![a-z]){re.escape(phrase)}(?![a-z])", text) is not None


def asked(question: str) -> tuple[str, Attribute]:
    """The sign and the attribute that a question is about; ValueError if it is none of this site's questions."""
    text = _plain(question)
    signs = [sign for sign in BY_SIGN if _has(text, _plain(sign))]
    if len(signs) != 1:
        raise ValueError(f"not a question of the simulated site {SITE}: {question[:80]!r}")
    return signs[0], BY_SIGN[signs[0]]


def is_right(sign: str, attribute: Attribute, answer: str) -> bool:
    """The answer names the right value and no other value of the attribute."""
    text = _plain(answer)
    return [value for value in attribute.values if _has(text, value)] == [attribute.facts[sign]]


def shows_how(attribute: Attribute, answer: str) -> bool:
    """The answer gives a method that belongs to the attribute."""
    text = _plain(answer)
    return _has(text, attribute.method_key)


def is_clear(answer: str) -> bool:
    """No hedge, no sentence twice, and an end."""
    text = _plain(answer)
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]
    ended = text.endswith((".", "!", "?"))
    return ended and len(set(sentences)) == len(sentences) and not any(_plain(hedge) in text for hedge in HEDGES)


def true_reward(question: str, answer: str) -> float:
    """How good `answer` really is for `question` (both Markdown or plain text), in 0..1."""
    sign, attribute = asked(question)
    return RIGHT * is_right(sign, attribute, answer) + HOW * shows_how(attribute, answer) + CLEAR * is_clear(answer)


def best_pair_accuracy(pairs: Iterable[tuple[str, str, str]]) -> float:
    """The best accuracy that any reader of the text can have on these (question, chosen, rejected), in expectation.

    Votes depend on an answer's text only through true_reward, grow with it, and treat the answers of a question alike
    otherwise; so no predictor beats "the higher true_reward wins", and on equal ones every predictor is right half the time.
    """
    wins = total = 0.0
    for question, chosen, rejected in pairs:
        gap = true_reward(question, chosen) - true_reward(question, rejected)
        wins += 1.0 if gap > 1e-9 else 0.0 if gap < -1e-9 else 0.5
        total += 1
    if not total:
        raise ValueError("no pairs: the best possible accuracy of nothing is not defined")
    return wins / total
