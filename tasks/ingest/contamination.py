"""Whether a text holds something of a benchmark: 13 words in a row that stand in an evaluation set too.

The rule is that of GPT-3 (Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C). Words are compared without case and
markup. An evaluation text of 5 to 12 words counts as a whole; shorter ones are too common.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.ingest.words import Hashes, hash_runs, hash_words

RUN = 13  # words
SHORTEST = 5  # words
SUFFIXES = (".parquet", ".jsonl", ".txt")
HELD = 1 << 23  # numbers held before equal ones are dropped: 64 MB
SIEVE_BITS = (16, 26)  # bits of a number that find its place in the sieve, at least and at most: 64 kB to 64 MB
RUNS, LENGTHS, SIEVE = "runs.npy", "lengths.npy", "sieve.npy"


class Contamination:
    """The runs of words of evaluation sets, as numbers. Pickles as the path of its folder, once it was saved."""

    def __init__(self, runs: Hashes, lengths: NDArray[np.int64], sieve: NDArray[np.bool_], folder: Path | None = None) -> None:
        self._runs, self._lengths, self._sieve, self._folder = runs, lengths.tolist(), sieve, folder
        self._shift = np.uint64(64 - (len(sieve).bit_length() - 1))

    def __len__(self) -> int:
        return len(self._runs)

    def contaminated(self, text: str) -> bool:
        """Whether a run of the text's words stands in an evaluation set."""
        words = hash_words(text)
        for length in self._lengths:
            found = _of_length(hash_runs(words, length), length)
            # Nearly all fall on an empty place of the sieve, which is much faster to see than that they are not in the list.
            found = found[self._sieve[found >> self._shift]]
            if len(found):
                place = np.minimum(np.searchsorted(self._runs, found), len(self._runs) - 1)
                if (self._runs[place] == found).any():
                    return True
        return False

    def save(self, folder: Path) -> "Contamination":
        """Write it once, for workers to map; the one that comes back can be pickled."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in ((RUNS, self._runs), (LENGTHS, np.array(self._lengths, np.int64)), (SIEVE, self._sieve)):
            np.save(folder / name, values)
        return open_sets(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        assert self._folder is not None, "save it first"
        return open_sets, (self._folder,)


def open_sets(folder: Path) -> Contamination:
    """What was saved there; the files are mapped, not read."""
    runs, sieve = (np.asarray(np.load(folder / name, mmap_mode="r")) for name in (RUNS, SIEVE))
    return Contamination(runs, np.load(folder / LENGTHS), sieve, folder)


def load_sets(paths: Sequence[str | Path]) -> Contamination:
    """The evaluation sets in these files: .parquet (every string in it), .jsonl (every string value), .txt (a text a line).

    ValueError for a file that cannot be read, or that holds no text of 5 words.
    """
    lengths: set[int] = set()
    every: Hashes = np.empty(0, np.uint64)
    for path in map(_checked, paths):
        held, size, before = [every], 0, len(every)
        for text in _texts(path):
            words = hash_words(text)
            length = min(RUN, len(words))
            if length < SHORTEST:
                continue
            lengths.add(length)
            held.append(_of_length(hash_runs(words, length), length))
            size += len(held[-1])
            before = -1
            if size > HELD:
                held, size = [np.unique(np.concatenate(held))], 0
        if before >= 0:
            raise ValueError(f"{path}: no text in it has {SHORTEST} words, so it is no evaluation set: see ingest.evaluation_sets")
        every = np.unique(np.concatenate(held))
    low, high = SIEVE_BITS
    bits = min(high, max(low, (8 * len(every)).bit_length()))
    sieve = np.zeros(1 << bits, bool)
    sieve[every >> np.uint64(64 - bits)] = True
    # The usual length first: most of what is found is found there.
    return Contamination(every, np.array(sorted(lengths, reverse=True), np.int64), sieve)


def digests(paths: Sequence[str | Path]) -> dict[str, str]:
    """{"evaluation set <name>": sha256} of each file, for the step's key; ValueError for one that is not there."""
    from tasks.artifacts import file_digest  # workers do without what that loads

    named = defaultdict(list)
    for path in map(_checked, paths):
        named[path.name].append(file_digest(path))
    return {
        f"evaluation set {name}" + (f" ({number})" if number > 1 else ""): digest
        for name, found in sorted(named.items())
        for number, digest in enumerate(sorted(found), start=1)
    }


def _of_length(runs: Hashes, length: int) -> Hashes:
    """Runs of different lengths in one list: a run of 5 words is not found among those of 13."""
    return runs if length == RUN else runs ^ np.uint64(length * 0x9E3779B97F4A7C15 % 2**64)


def _checked(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if found.suffix not in SUFFIXES:
        raise ValueError(f"{found}: an evaluation set is a file that ends in {', '.join(SUFFIXES)}: see ingest.evaluation_sets")
    if not found.is_file():
        raise ValueError(f"{found}: there is no such evaluation set: see ingest.evaluation_sets")
    return found


def _texts(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1_000):
                    for column in batch.columns:
                        if _has_text(column.type):
                            yield from _strings(column.to_pylist())
            return
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if path.suffix == ".txt":
                    yield line
                elif line.strip():
                    yield from _strings(_parse(line, path, number))
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this evaluation set cannot be read: {' '.join(str(error).split())}") from error


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: this evaluation set is not JSON a line: {error}") from error


def _has_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _has_text(kind.value_type)
    if pa.types.is_nested(kind):
        return any(_has_text(kind.field(place).type) for place in range(kind.num_fields))
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _strings(value: Any) -> Iterator[str]:
    """Every string in lists, tuples and the values of objects, however deep."""
    waiting: list[Any] = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            waiting.extend(found.values())
        elif isinstance(found, Iterable) and not isinstance(found, bytes):
            waiting.extend(found)
