"""Which answers people preferred to which, and into which split a question goes. Keyed by hashes, never by a global generator."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations

MARKS = ("`", "*", "](", "\n#", "\n>", "\n- ", "\n1. ")  # code, emphasis, links, headings, quotes, lists


def key(*parts: object) -> int:
    """64 bits of BLAKE2b over the parts: the same on every machine, in every process and Python."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def choose_pairs(site: str, qid: int, answers: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Pairs (j, k) of places in `answers`, a list of (answer id, pm_score), with pm_score of j above that of k.

    At most `most`, drawn evenly without replacement: each pair's lot is a hash of (site, question, both answers), and the
    lowest are drawn. They come in the order of the draw, so the first n of them are a fair draw of n.
    """
    candidates = [(j, k) for j, k in permutations(range(len(answers)), 2) if answers[j][1] > answers[k][1]]
    return sorted(candidates, key=lambda pair: (key(site, qid, answers[pair[0]][0], answers[pair[1]][0]), pair))[:most]


def split_of(site: str, root: int, shares: Mapping[str, float]) -> str:
    """The split of a question, by the root of its duplicate cluster: it stays there when the dump grows."""
    place, edge = key("split", site, root) / 2**64, 0.0
    names = ("sft", "reward", "rl", "eval")
    for name in names:
        edge += shares[name]
        if place < edge:
            return name
    return names[-1]


def roots(edges: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The smallest id of each connected cluster, for every id that stands in an edge (union-find)."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {node: root(node) for node in list(parent)}


def markup(text: str) -> int:
    """How many marks of Markdown a text has."""
    lines = "\n" + text
    return sum(map(lines.count, MARKS))
