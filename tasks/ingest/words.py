"""Runs of words as 64-bit numbers: the same on every machine, in every process and Python; numpy does the arithmetic."""

import re
import unicodedata
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Hashes: TypeAlias = NDArray[np.uint64]

# Letters and digits of any script; `_` is markup here (_so_, or \_ in Markdown). In a script without blanks between its words
# each clause is one long word.
WORD = re.compile(r"[^\W_]+")
ASCII = bytes(ord(chr(code).lower()) if chr(code).isalnum() and code < 128 else 32 for code in range(256))  # else a blank
REMEMBERED = 1 << 18  # words whose hashes are held, some 30 MB; a few thousand of them make up nearly all text
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64


class _WordHashes(dict[bytes, int]):
    def __missing__(self, word: bytes) -> int:
        if len(self) >= REMEMBERED:
            self.clear()
        number = int.from_bytes(blake2b(word, digest_size=8).digest(), "little")
        self[word] = number
        return number


def _powers(base: int, count: int) -> Hashes:
    """base^0, base^1, ... modulo 2^64, (count,)."""
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


_hash_of = _WordHashes()
_up, _down = _powers(BASE, 4096), _powers(pow(BASE, -1, 1 << 64), 4096)


def words_of(text: str) -> list[bytes]:
    """The words of a text, without case (NFKC, then case folded), in UTF-8."""
    if text.isascii():  # the same, several times faster
        return text.encode().translate(ASCII).split()
    return [word.encode("utf-8", "surrogatepass") for word in WORD.findall(unicodedata.normalize("NFKC", text).casefold())]


def hash_words(text: str) -> Hashes:
    """One number for each word of a text, (words,)."""
    words = words_of(text)
    return np.fromiter(map(_hash_of.__getitem__, words), np.uint64, len(words))


def hash_runs(words: Hashes, length: int) -> Hashes:
    """One number for each run of `length` words, (words - length + 1,); none of a text that is shorter. (words,) from hash_words.

    Rolling: a run's number is sum_i h_i B^i over its words, modulo 2^64, taken from the sums up to each word of the text.
    """
    global _up, _down  # longer tables for longer texts
    count = len(words)
    if count < length:
        return np.empty(0, np.uint64)
    if count > len(_up):
        _up, _down = _powers(BASE, 2 * count), _powers(pow(BASE, -1, 1 << 64), 2 * count)
    sums = np.zeros(count + 1, np.uint64)
    np.cumsum(words * _up[:count], out=sums[1:])
    return (sums[length:] - sums[:-length]) * _down[: count - length + 1]
