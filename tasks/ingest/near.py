"""Near-duplicate questions: MinHash signatures where the text is at hand, then one search over all of them, on disk.

A signature estimates the Jaccard similarity of two texts' sets of 5-word runs: the share of its 128 numbers that agree, with a
standard deviation of at most 0.044 (Broder 1997, "On the resemblance and containment of documents"). Candidates agree in one band
of numbers (locality-sensitive hashing); each is then checked by that estimate.
"""

import contextlib
import importlib.util
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.ingest.words import BASE, Hashes, hash_runs, hash_words

PERMUTATIONS = 128
SHINGLE = 5  # words
RECORD = np.dtype([("site", "<i4"), ("votes", "<i4"), ("qid", "<i8"), ("signature", "<u4", (PERMUTATIONS,))])
"""A question in a signature file: raw records one after the other, little-endian, 528 bytes each."""
NO_WORDS = 0xFFFFFFFF  # every number of a text without words
RECALL = 0.99  # of pairs exactly at the threshold, how many share a band
RECORDS = 1 << 14  # read at once: 9 MB
PAIRS = 1 << 12  # compared at once: 4 MB
MOST_COMPARED = 1_000
"""Each question of a bucket is compared to the first so many by rank, so that a template of a million does not take forever."""

Places = NDArray[np.int64]
_HEAD = struct.Struct("<iiq")


def check_library() -> None:
    """ValueError where the library for MinHash is not installed: before a long run, not in the middle of it."""
    if importlib.util.find_spec("datasketch") is None:
        raise ValueError("ingest.near_duplicates needs the package datasketch: install stackrlhf[dedup]")


def shingles(text: str) -> Hashes:
    """The set of a text's 5-word runs, as sorted numbers; a shorter text is one run."""
    words = hash_words(text)
    return np.unique(hash_runs(words, min(SHINGLE, max(len(words), 1))))


def signature(text: str) -> bytes:
    """512 bytes: the MinHash of a question's title and Markdown. The same on every machine and in every process."""
    import datasketch

    sketch = datasketch.MinHash(
        PERMUTATIONS, hashfunc=int, permutations=_permutations(), scheme="affine32"  # h -> a h + b modulo 2^32
    )  # fmt: skip
    found = shingles(text)
    if len(found):
        sketch.update_batch((found >> np.uint64(32)).tolist())
    return sketch.hashvalues.astype("<u4").tobytes()


def record(site: int, qid: int, votes: int, text: str) -> bytes:
    """A question in a signature file. `site`: its place in the list that near_duplicates is given; `text`: title and Markdown."""
    return _HEAD.pack(site, votes, qid) + signature(text)


@cache
def _permutations() -> NDArray[np.uint32]:
    """128 odd factors and 128 summands, (2, 128), from splitmix64 (Steele et al. 2014): no library's generator can change them."""
    state, numbers = 0, []
    for _ in range(2 * PERMUTATIONS):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append((mixed ^ (mixed >> 31)) >> 32)
    drawn = np.array(numbers, np.uint32).reshape(2, PERMUTATIONS)
    drawn[0] |= 1
    return drawn


def banding(threshold: float) -> tuple[int, int]:
    """(bands, rows): the longest bands that still find 99 % of the pairs at the threshold, 1 - (1 - threshold^rows)^bands."""
    for rows in range(32, 1, -1):
        bands = PERMUTATIONS // rows
        if found_share(threshold, bands, rows) >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1


def found_share(similarity: float, bands: int, rows: int) -> float:
    """How many of the pairs with this Jaccard similarity share at least one band: the S-curve of LSH."""
    return 1 - (1 - similarity**rows) ** bands


@dataclass(frozen=True)
class Dropped:
    """Questions that are near-duplicates of a kept one, in a folder of .npy files."""

    folder: Path
    counts: dict[str, int]
    """site -> its questions that are dropped."""

    def __len__(self) -> int:
        return sum(self.counts.values())

    def qids(self, site: str) -> NDArray[np.int64]:
        """Sorted, (dropped questions of the site,); mapped, not read."""
        found: NDArray[np.int64] = np.load(_path(self.folder, sorted(self.counts).index(site)), mmap_mode="r")
        return found


def near_duplicates(
    files: Sequence[Path], sites: Sequence[str], threshold: float, scratch: Path, pass_bytes: int = 64_000_000
) -> Dropped:
    """Which questions of the signature files to drop, so that no two of the rest are found to be as similar as `threshold`.

    Questions rank by votes, then by (site's name, qid); going down the ranks, one is dropped if it is similar to a kept one above
    it. So every dropped one has a kept twin, and a chain of small changes is not thinned to its head. A question stands in the
    files once. The result is written to `scratch` and does not depend on the order or number of files, sites or passes. Disk: 8
    bytes a question and band beside the files. Memory: some 5 pass_bytes, 1 byte a question, 16 for each similar pair.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    bands, rows = banding(threshold)
    records = _Records(files, sites)
    columns = [scratch / f"band-{band:03}" for band in range(bands + 1)]
    left_out = _hash_bands(records, columns, rows)  # without words, so like nothing
    # First the equal signatures, with all of their numbers as one band: the best of them stands for the others.
    dropped = np.zeros(len(records), bool)
    for places, starts in _buckets(columns.pop(), left_out, records, pass_bytes):
        dropped[np.delete(places, starts)] = True
    left_out |= dropped
    pairs = np.empty((0, 2), np.int64)
    for column in columns:
        buckets = _buckets(column, left_out, records, pass_bytes)
        found = [_similar(places, starts, records, threshold) for places, starts in buckets]
        pairs = np.unique(np.concatenate([pairs, *found]), axis=0)
    dropped[_thin(pairs, records)] = True
    return _save(scratch, records, dropped)


class _Records:
    """All signature files as one long array, on disk."""

    def __init__(self, files: Sequence[Path], sites: Sequence[str]) -> None:
        self.sites = sorted(sites)
        self._by_name = np.array([self.sites.index(site) for site in sites], np.int64)
        self.files, sizes = [], []
        for path in files:
            size = path.stat().st_size
            assert size % RECORD.itemsize == 0, f"{path}: {size} bytes are no whole number of records of {RECORD.itemsize}"
            if size:  # there is nothing to map in an empty file
                self.files.append(path)
                sizes.append(size // RECORD.itemsize)
        self.starts = np.cumsum([0, *sizes])
        self._map = lru_cache(maxsize=128)(lambda number: np.memmap(self.files[number], RECORD, "r"))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def chunks(self) -> Iterator[NDArray[Any]]:
        for path in self.files:
            with path.open("rb") as file:
                while chunk := file.read(RECORDS * RECORD.itemsize):
                    yield np.frombuffer(chunk, RECORD)

    def take(self, places: Places, column: str) -> NDArray[Any]:
        """The records at these places, one column of them."""
        numbers = np.searchsorted(self.starts, places, side="right") - 1
        found = np.empty((len(places), *RECORD[column].shape), RECORD[column].base)
        for number in np.unique(numbers):
            here = numbers == number
            found[here] = self._map(int(number))[column][places[here] - self.starts[number]]
        return found

    def sites_of(self, places: Places) -> Places:
        """Places of their sites in the sorted names."""
        return self._by_name[self.take(places, "site")]

    def rank(self, places: Places, *before: NDArray[Any]) -> Places:
        """The order of these records: by `before`, then the most votes, then the smallest (site's name, qid)."""
        return np.lexsort((self.take(places, "qid"), self.sites_of(places), -self.take(places, "votes").astype(np.int64), *before))


def _hash_bands(records: _Records, columns: Sequence[Path], rows: int) -> NDArray[np.bool_]:
    """Write each band of every signature as one number, a file a band, the last over all of it; True for those without words."""
    factors = np.cumprod(np.full(PERMUTATIONS, BASE, np.uint64))
    empty = []
    with contextlib.ExitStack() as stack:
        out = [stack.enter_context(path.open("wb")) for path in columns]
        for chunk in records.chunks():
            mixed = chunk["signature"].astype(np.uint64) * factors
            for band, file in enumerate(out[:-1]):
                mixed[:, band * rows : (band + 1) * rows].sum(axis=1, dtype=np.uint64).tofile(file)
            mixed.sum(axis=1, dtype=np.uint64).tofile(out[-1])
            empty.append((chunk["signature"] == NO_WORDS).all(axis=1))
    return np.concatenate(empty) if empty else np.empty(0, bool)


def _buckets(column: Path, left_out: NDArray[np.bool_], records: _Records, pass_bytes: int) -> Iterator[tuple[Places, Places]]:
    """Places of the records that share their number in this file with another, bucket after bucket, each in the order of rank;
    and where the buckets start in that. In passes by the number's leading bits; the file is removed.
    """
    passes = max(1, math.ceil(column.stat().st_size / pass_bytes))
    for number in range(passes):
        hashes, places = _numbers(column, left_out, number, passes)
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], places[order]
        same = np.zeros(len(hashes) + 1, bool)  # as the one before
        same[1:-1] = hashes[1:] == hashes[:-1]
        shared = same[1:] | same[:-1]
        hashes, places = hashes[shared], places[shared]
        if len(places):
            places = places[records.rank(places, hashes)]
            yield places, np.flatnonzero(np.insert(hashes[1:] != hashes[:-1], 0, True))
    column.unlink()


def _numbers(column: Path, left_out: NDArray[np.bool_], number: int, passes: int) -> tuple[Hashes, Places]:
    """Of one pass: the numbers in a band's file, and the places where they stand."""
    hashes, places, start = [], [], 0
    with column.open("rb") as file:
        while chunk := file.read(8 << 20):
            numbers = np.frombuffer(chunk, "<u8").astype(np.uint64)
            mine = (numbers >> np.uint64(32)) * np.uint64(passes) >> np.uint64(32) == number
            mine &= ~left_out[start : start + len(numbers)]
            hashes.append(numbers[mine])
            places.append(np.flatnonzero(mine) + start)
            start += len(numbers)
    return (np.concatenate(hashes), np.concatenate(places)) if hashes else (np.empty(0, np.uint64), np.empty(0, np.int64))


def _similar(places: Places, starts: Places, records: _Records, threshold: float) -> Places:
    """Pairs of records of one bucket whose signatures agree in `threshold` of their numbers, the better first, (pairs, 2)."""
    sizes = np.diff(np.append(starts, len(places)))
    ends = np.repeat(starts + sizes, sizes)
    above = np.arange(len(places))
    above = above[above - np.repeat(starts, sizes) < MOST_COMPARED]
    found = []
    distance = 1
    while len(above := above[above + distance < ends[above]]):
        for begin in range(0, len(above), PAIRS):
            better, worse = places[above[begin : begin + PAIRS]], places[above[begin : begin + PAIRS] + distance]
            agree = (records.take(better, "signature") == records.take(worse, "signature")).mean(axis=1)
            found.append(np.stack([better, worse], axis=1)[agree >= threshold])
        distance += 1
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def _thin(pairs: Places, records: _Records) -> Places:
    """Which of the records in the pairs go, down the ranks: each that has a twin above it which stays."""
    nodes, ends = np.unique(pairs, return_inverse=True)
    rank = np.empty(len(nodes), np.int64)
    rank[records.rank(nodes)] = np.arange(len(nodes))
    better, worse = rank[ends.reshape(-1, 2)].T
    goes = np.zeros(len(nodes), bool)
    order = np.lexsort((better, worse))
    for above, below in zip(better[order].tolist(), worse[order].tolist(), strict=True):
        if not goes[above]:
            goes[below] = True
    return nodes[goes[rank]]


def _path(folder: Path, site: int) -> Path:
    return folder / f"dropped-{site:05}.npy"


def _save(folder: Path, records: _Records, dropped: NDArray[np.bool_]) -> Dropped:
    places = np.flatnonzero(dropped)
    numbers, qids = records.sites_of(places), records.take(places, "qid")
    counts = {}
    for number, site in enumerate(records.sites):
        of_site = np.sort(qids[numbers == number])
        np.save(_path(folder, number), of_site)
        counts[site] = len(of_site)
    return Dropped(folder, counts)
