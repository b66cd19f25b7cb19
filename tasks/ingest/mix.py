"""Many sites at once: how much of each is taken, and which questions stand on several of them."""

import difflib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.ingest.pairs import key

TEXT = np.dtype([("digest", "V16"), ("qid", "<i8")])
"""A question's text, hashed, as its site's scan writes it: raw records one after the other, little-endian."""
LINK = np.dtype([("a", "<i8"), ("b", "<i8")])
"""Two questions of one site that people linked as duplicates."""
NODE = np.dtype([("site", "<i4"), ("qid", "<i8")])
SITES = "sites.json"  # written last: its folder is whole
RECORDS = 1 << 18  # read at once

Ids = NDArray[np.int64]


def kept(site: str, root: int, weights: Mapping[str, float]) -> bool:
    """Whether the mixing weights keep a question: by the root of its duplicate cluster (a question of `site`), so that a cluster
    stays whole. What a weight keeps, every larger one keeps; sites without a weight are kept whole.
    """
    return key("mix", site, root) < weights.get(site, 1.0) * 2.0**64  # an int against a float is exact in Python


def check_weights(weights: Mapping[str, float], sites: Collection[str]) -> None:
    """ValueError for a weight that is not in (0, 1], or that belongs to none of the sites."""
    for site, weight in weights.items():
        if site not in sites:
            near = difflib.get_close_matches(site, sites, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the dumps are of {', '.join(sorted(sites)[:10])}"
            raise ValueError(f"ingest.weights names {site}, which is not among the dumps: {hint}")
        if not 0 < weight <= 1:
            raise ValueError(
                f"ingest.weights gives {site} {weight:g}: a share must be above 0 and at most 1 (leave out the dump for 0)"
            )


@dataclass(frozen=True)
class Clusters:
    """Questions that have duplicates, on any site, in a folder of .npy files."""

    folder: Path
    sites: tuple[str, ...]
    """Sorted; `root_site` counts in them."""
    counts: dict[str, int]
    """site -> its questions that are in a cluster."""

    def __len__(self) -> int:
        return sum(self.counts.values())

    def column(self, site: str, name: str) -> NDArray[Any]:
        """Of one site, in the order of qid: `qid` int64, `root_site` int32, `root` int64, each (questions in a cluster,)."""
        return np.asarray(_load(self.folder, self.sites.index(site), name))


def find_clusters(
    texts: Mapping[str, Sequence[Path]], links: Mapping[str, Sequence[Path]], scratch: Path, pass_bytes: int = 64_000_000
) -> Clusters:
    """Clusters of questions that have the same text, on one site or on two, or that are linked, over any number of steps.

    `texts` and `links` give the files of each site, records of TEXT and of LINK. The root of a cluster is its smallest question
    by (site's name, qid). The result is written to `scratch`, and is the same whatever the order and number of files. Memory:
    some 4 pass_bytes, and 100 bytes for each question that has a duplicate.
    """
    sites = tuple(sorted(texts.keys() | links.keys()))
    files = [(number, path) for number, site in enumerate(sites) for path in texts.get(site, ())]
    total = sum(path.stat().st_size for _, path in files)
    passes = max(1, math.ceil(total / pass_bytes))
    ends = [_same_text(files, number, passes) for number in range(passes)]
    for number, site in enumerate(sites):
        for path in links.get(site, ()):
            for records in _read(path, LINK):
                found = records[records["a"] != records["b"]]
                ends.append((_nodes(number, found["a"]), _nodes(number, found["b"])))
    left, right = (np.concatenate([pair[side] for pair in ends]) if ends else np.empty(0, NODE) for side in (0, 1))
    # Numbers of nodes follow (site, qid), so the smallest number of a cluster is its root.
    nodes, places = _unique(np.concatenate([left, right]))
    root = nodes[_smallest(places[: len(left)], places[len(left) :], len(nodes))]
    return _save(scratch, sites, nodes, root)


def open_clusters(folder: Path) -> Clusters:
    """What find_clusters wrote there; FileNotFoundError when it did not come to its end."""
    counts = json.loads((folder / SITES).read_text(encoding="utf-8"))
    return Clusters(folder, tuple(counts), counts)


def look_up(folder: Path, site: str, qids: Collection[int]) -> dict[int, tuple[str, int]]:
    """qid -> (site, qid) of its cluster's root, of those of these questions that are in a cluster. For workers: the files are
    mapped, not read.
    """
    clusters = open_clusters(folder)
    if not qids or not clusters.counts.get(site):
        return {}
    number = clusters.sites.index(site)
    wanted = np.fromiter(qids, np.int64, len(qids))
    known = _load(folder, number, "qid")
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    found = known[place] == wanted
    place = place[found]
    root_site, root = _load(folder, number, "root_site")[place], _load(folder, number, "root")[place]
    return {
        qid: (clusters.sites[other], first)
        for qid, other, first in zip(wanted[found].tolist(), root_site.tolist(), root.tolist(), strict=True)
    }


def _read(path: Path, kind: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    size = path.stat().st_size
    assert size % kind.itemsize == 0, f"{path}: {size} bytes are no whole number of records of {kind.itemsize}"
    with path.open("rb") as file:
        while chunk := file.read(RECORDS * kind.itemsize):
            yield np.frombuffer(chunk, kind)


def _nodes(site: int, qids: Ids) -> NDArray[Any]:
    nodes = np.empty(len(qids), NODE)
    nodes["site"], nodes["qid"] = site, qids
    return nodes


def _same_text(files: Sequence[tuple[int, Path]], number: int, passes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Neighbours of equal text, among the digests whose leading bits fall to pass `number`."""
    high, low, nodes = [], [], []
    for site, path in files:
        for records in _read(path, TEXT):
            halves = np.ascontiguousarray(records["digest"]).view(">u8").reshape(-1, 2).astype(np.uint64)
            mine = slice(None) if passes == 1 else (halves[:, 0] >> np.uint64(32)) * np.uint64(passes) >> np.uint64(32) == number
            high.append(halves[mine, 0])
            low.append(halves[mine, 1])
            nodes.append(_nodes(site, records["qid"][mine]))
    if not nodes:
        return np.empty(0, NODE), np.empty(0, NODE)
    first, second, node = np.concatenate(high), np.concatenate(low), np.concatenate(nodes)
    high, low, nodes = [], [], []
    order = np.lexsort((node["qid"], node["site"], second, first))
    first, second, node = first[order], second[order], node[order]
    same = (first[1:] == first[:-1]) & (second[1:] == second[:-1]) & (node[1:] != node[:-1])
    return node[:-1][same], node[1:][same]


def _unique(nodes: NDArray[Any]) -> tuple[NDArray[Any], Ids]:
    """Each node once, sorted by (site, qid), and the place of every given one among them."""
    order = np.lexsort((nodes["qid"], nodes["site"]))
    ordered = nodes[order]
    new = np.ones(len(nodes), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    places = np.empty(len(nodes), np.int64)
    places[order] = np.cumsum(new) - 1
    return ordered[new], places


def _smallest(left: Ids, right: Ids, count: int) -> Ids:
    """The smallest number that each of 0, ..., count - 1 is connected to, by union-find on whole arrays."""
    parent = np.arange(count)
    while True:
        a, b = parent[left], parent[right]
        open_ends = a != b
        if not open_ends.any():
            return parent
        left, right, a, b = left[open_ends], right[open_ends], a[open_ends], b[open_ends]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            above = parent[parent]
            if np.array_equal(above, parent):
                break
            parent = above


def _path(folder: Path, site: int, name: str) -> Path:
    return folder / f"clusters-{site:05}-{name}.npy"


def _load(folder: Path, site: int, name: str) -> NDArray[Any]:
    return np.load(_path(folder, site, name), mmap_mode="r")


def _save(folder: Path, sites: tuple[str, ...], nodes: NDArray[Any], roots: NDArray[Any]) -> Clusters:
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for number, site in enumerate(sites):
        begin, end = np.searchsorted(nodes["site"], [number, number + 1])
        columns = {"qid": nodes["qid"][begin:end], "root_site": roots["site"][begin:end], "root": roots["qid"][begin:end]}
        for name, values in columns.items():
            np.save(_path(folder, number, name), np.ascontiguousarray(values))
        counts[site] = int(end - begin)
    unfinished = folder / f"{SITES}.unfinished"
    unfinished.write_text(json.dumps(counts), encoding="utf-8")
    os.replace(unfinished, folder / SITES)
    return Clusters(folder, sites, counts)
