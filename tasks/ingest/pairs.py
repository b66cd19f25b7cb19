"""Which answers people preferred to which, and into which split a question goes. Keyed by hashes, never by a global generator."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_TICK, _STAR, _BRACKET, _LINE_FEED = b"`*]\n"


def key(*parts: object) -> int:
    """64 bits of BLAKE2b over the parts: the same on every machine, in every process and Python."""
    return int.from_bytes(_lot("\0".join(map(str, parts)).encode()), "big")


def candidates(pm_scores: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs (j, k) of places with pm_scores[j] > pm_scores[k]."""
    if len(pm_scores) == 2:  # as most questions have
        first, second = pm_scores
        return [(0, 1)] if first > second else [(1, 0)] if second > first else []
    return [(j, k) for j, better in enumerate(pm_scores) for k, worse in enumerate(pm_scores) if better > worse]


def draw(site: str, qid: int, ids: Sequence[int], possible: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """At most `most` of the possible pairs of places in `ids`, drawn evenly without replacement.

    Each pair's lot is a hash of (site, question, both answers), and the lowest are drawn. They come in the order of the draw, so
    the first n of them are a fair draw of n.
    """
    lots = {(j, k): _lot(f"{site}\0{qid}\0{ids[j]}\0{ids[k]}".encode()) for j, k in possible}
    return sorted(possible, key=lambda pair: (lots[pair], pair))[:most]


def _lot(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).digest()  # compares as the number of `key` does


def split_of(site: str, root: int, shares: Mapping[str, float]) -> str:
    """The split of a question, by the root of its duplicate cluster: it stays there when the dump grows."""
    place, edge = key("split", site, root) / 2**64, 0.0
    names = ("sft", "reward", "rl", "eval")
    for name in names:
        edge += shares[name]
        if place < edge:
            return name
    return names[-1]


def markup(text: bytes, offsets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many marks of Markdown each of N texts has, which stand one behind the other as UTF-8; offsets (N + 1,) -> (N,).

    Marks are backticks, stars, links, and lines that begin with a #, >, - or 1.
    """
    data = np.frombuffer(text + b"\n\n\n", np.uint8)
    begins = offsets[:-1][np.diff(offsets) > 0]
    own = data[: len(text)]
    at = np.flatnonzero((own == _TICK) | (own == _STAR) | (own == _BRACKET) | (own == _LINE_FEED))
    kind = data[at]
    single = at[(kind == _TICK) | (kind == _STAR)]
    links = np.setdiff1d(at[(kind == _BRACKET) & (data[at + 1] == ord("("))], begins - 1)  # the next text's ( is not its own
    lines = np.union1d(at[kind == _LINE_FEED] + 1, begins)
    lines = lines[lines < len(text)]
    first, second, third = data[lines], data[lines + 1], data[lines + 2]
    marked = (first == ord("#")) | (first == ord(">")) | ((first == ord("-")) & (second == ord(" ")))
    marked |= (first == ord("1")) & (second == ord(".")) & (third == ord(" "))
    return np.asarray(np.sum([np.diff(np.searchsorted(found, offsets)) for found in (single, links, lines[marked])], axis=0))
