"""What answers look like, apart from whether they are good: variety, code fences. (Repetition: tasks/ppo/guards.py.)"""

import re
from collections.abc import Hashable, Iterable, Sequence

WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words, and punctuation marks one by one."""
    return WORD.findall(text.lower())


def ngrams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def distinct_n(answers: Iterable[str], n: int) -> float:
    """Different n-grams of words over all n-grams, of all answers together (Li et al. 2016, https://arxiv.org/abs/1510.03055).

    Falls with the amount of text: compare models on equally many answers. 0 where there is no n-gram at all.
    """
    every = [gram for answer in answers for gram in ngrams(words(answer), n)]
    return len(set(every)) / len(every) if every else 0.0


def has_code_fence(answer: str) -> bool:
    """StackLLaMA's policy learned to write these, because its reward model liked them."""
    return "```" in answer
