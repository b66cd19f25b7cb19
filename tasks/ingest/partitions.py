"""Between the stages rows lie in hash partitions; stage two turns each partition into records, on its own.

Nothing here depends on the order of rows, on how many partitions there are, or on which process takes which.
"""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zstandard

from tasks.ingest import contamination, mix, near, posts
from tasks.ingest.markdown import convert
from tasks.ingest.names import names_of
from tasks.ingest.pairs import candidates, draw, key, split_of
from tasks.ingest.rows import Values
from tasks.ingest.unit import leave, left, unit
from tasks.ingest.writer import Pieces

SPLITS = ("sft", "reward", "rl", "eval")
TURN = 100  # questions whose bodies are unescaped in one go: some 500 KB


def size_of_parts(size: int, smallest: int, largest: int, most: int) -> int:
    """Bytes of each part of `size` bytes: small ones balance the load, but there must not be too many."""
    return min(max(smallest, math.ceil(size / most)), largest)


class Spill:
    """The rows of one block by partition: one file, and an index of who begins where."""

    def __init__(self, folder: Path, site: str, partitions: int, pack: bool) -> None:
        self._folder, self._site, self._partitions, self._pack = folder, site, partitions, pack
        self._rows: dict[int, list[bytes]] = defaultdict(list)  # by question

    def add(self, qid: int, values: Values) -> None:
        # No value of a row holds a quote or a line feed.
        self._rows[qid].append(b'"'.join(values))

    def close(self) -> None:
        parts: list[list[bytes]] = [[] for _ in range(self._partitions)]
        for qid, rows in self._rows.items():
            # By the hash's high end: partitions in their order, each sorted by hash, are the site sorted by hash.
            parts[key(self._site, qid) * self._partitions >> 64].extend(rows)
        self._rows.clear()
        ends = [0]
        packer = zstandard.ZstdCompressor(level=1)
        with (self._folder / "rows").open("wb") as file:
            for rows in parts:
                data = b"\n".join(rows)
                data = packer.compress(data) if self._pack and data else data
                file.write(data)
                ends.append(ends[-1] + len(data))
        np.save(self._folder / "index.npy", np.array(ends, "<i8"))


def spilled(folders: Iterable[Path], number: int, pack: bool) -> Iterator[bytes]:
    """The rows of one partition, from all blocks."""
    unpacker = zstandard.ZstdDecompressor()
    for folder in folders:
        index = np.load(folder / "index.npy", mmap_mode="r")
        begin, end = int(index[number]), int(index[number + 1])
        if begin == end:
            continue
        with (folder / "rows").open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) != end - begin:
            raise RuntimeError(f"{folder}: the scratch file of a block is too short; run again")
        yield from (unpacker.decompress(data) if pack else data).split(b"\n")


@dataclass(frozen=True)
class Partition:
    """All that a worker needs to turn one partition into records: small, and the same for every engine."""

    number: int
    site: str
    site_number: int
    """Place of the site's name among all, sorted."""
    blocks: tuple[Path, ...]
    """Folders of the blocks of the site's posts."""
    folder: Path
    """For what comes out; is not there before it is whole."""
    names: Path | None
    clusters: Path
    contamination: Path | None
    pack: bool
    converter: Literal["stackexchange", "markdownify"]
    questions: Literal["answered", "paired"]
    max_pairs: int
    shares: Mapping[str, float]
    weights: Mapping[str, float]
    signatures: bool
    dump_date: str


@dataclass
class Outcome:
    """What a worker hands back: counts, and how many questions of each split lie in its folder."""

    number: int
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    records: dict[str, int] = field(default_factory=dict)


def piece(folder: Path, split: str) -> Path:
    return folder / f"{split}.arrow"


def process(partition: Partition) -> Outcome:
    """Join, score and pair the answers; convert what is kept; write the records, sorted by the hash of the question."""
    outcome = Outcome(partition.number, partition.folder)
    with unit(partition.folder) as work:
        _process(partition, work, outcome)
        leave(work, vars(outcome) | {"folder": ""})
    return outcome


def finished(partition: Partition) -> Outcome | None:
    """What an earlier run left of this partition."""
    if (kept := left(partition.folder)) is None:
        return None
    return Outcome(kept["number"], partition.folder, Counter(kept["counts"]), kept["records"])


def _process(partition: Partition, work: Path, outcome: Outcome) -> None:
    counts, site = outcome.counts, partition.site
    questions, answers = _load(partition, counts)
    chooser = _Chooser(partition, mix.look_up(partition.clusters, site, questions), counts)
    drafts = [draft for qid, row in questions.items() if (draft := chooser.choose(qid, row, answers.pop(qid, None)))]
    drafts.sort(key=lambda draft: key(site, draft.qid))
    counts["orphans"] += sum(map(len, answers.values()))
    names = {}
    if partition.names:
        owners = {row[posts.OWNER] for draft in drafts for row in (draft.row, *draft.answers)} - {b""}
        names = names_of(partition.names, set(map(int, owners)))
    maker = _Maker(partition, chooser, names, counts)
    base, day = f"https://{posts.host_of(site)}", partition.dump_date
    out = {split: Pieces(piece(work, split), site, split, base, day, partition.pack) for split in SPLITS}
    signatures = (work / "signatures").open("wb") if partition.signatures else None
    for start in range(0, len(drafts), TURN):
        for record in maker.records(drafts[start : start + TURN]):
            out[record["split"]].add(record)
            if signatures:
                signatures.write(near.record(partition.site_number, record["qid"], record["votes"], record["question"]))
    if signatures:
        signatures.close()
    for pieces in out.values():
        pieces.close()
    outcome.records = {name: pieces.rows for name, pieces in out.items()}


def _load(partition: Partition, counts: Counter[str]) -> tuple[dict[int, Values], dict[int, dict[int, Values]]]:
    """Questions by id, and answers by question and id. Of a post that stands there twice, the one active last stays."""
    questions: dict[int, Values] = {}
    answers: defaultdict[int, dict[int, Values]] = defaultdict(dict)
    for line in spilled(partition.blocks, partition.number, partition.pack):
        row: Any = line.split(b'"')
        question = row[posts.KIND] == posts.QUESTION
        counts["questions read" if question else "answers read"] += 1
        place, number = questions if question else answers[int(row[posts.PARENT])], int(row[posts.ID])
        if number in place:
            counts["twice"] += 1
            row = max(row, place[number], key=lambda r: (r[posts.ACTIVE], b'"'.join(r)))
        place[number] = row
    return questions, dict(answers)


@dataclass(slots=True)
class _Draft:
    """A question and those of its answers that are kept, sorted by id; nothing is converted yet."""

    qid: int
    row: Values
    answers: list[Values]
    votes: list[int]
    scores: list[int]  # pm_score
    selected: list[bool]
    pairs: list[tuple[int, int]] | None
    """Places in `answers`; None: to be drawn when it is known which answers have text."""
    everything: "_Draft | None" = None
    """Where answers were left out because they are in no pair: with them."""

    def of(self, places: list[int], pairs: list[tuple[int, int]] | None) -> "_Draft":
        """With the answers at these places alone; `pairs` still counts in the old places."""
        return _Draft(
            self.qid,
            self.row,
            [self.answers[place] for place in places],
            [self.votes[place] for place in places],
            [self.scores[place] for place in places],
            [self.selected[place] for place in places],
            None if pairs is None else [(bisect_left(places, j), bisect_left(places, k)) for j, k in pairs],
        )


class _Chooser:
    """What of a partition is kept, before anything is converted, which is the dear part."""

    def __init__(self, partition: Partition, clusters: dict[int, tuple[str, int]], counts: Counter[str]) -> None:
        self.partition, self.clusters, self.counts = partition, clusters, counts
        self.paired = partition.questions == "paired"

    def choose(self, qid: int, row: Values, group: dict[int, Values] | None) -> _Draft | None:
        """A question and its answers by id, as far as they are kept; None when nothing is."""
        if group is None:
            self.counts["unanswered"] += 1
            return None
        if self.partition.weights and not mix.kept(*self.root(qid), self.partition.weights):
            self.counts["left out by weight"] += 1
            return None
        if not self.paired:
            return self.everything(qid, row, group)
        if len(group) > 1:
            draft = self.in_pairs(self.everything(qid, row, group))
            if draft.pairs:
                return draft
        self.counts["without a pair"] += 1
        return None

    def root(self, qid: int) -> tuple[str, int]:
        """(site, id) of the root of the question's cluster."""
        return self.clusters.get(qid) or (self.partition.site, qid)

    def everything(self, qid: int, row: Values, group: dict[int, Values]) -> _Draft:
        answers = [group[number] for number in sorted(group)] if len(group) > 1 else list(group.values())
        accepted = row[posts.ACCEPTED]
        votes = [int(answer[posts.SCORE]) for answer in answers]
        selected = [answer[posts.ID] == accepted for answer in answers]
        return _Draft(qid, row, answers, votes, list(map(posts.pm_score, votes, selected)), selected, None)

    def in_pairs(self, draft: _Draft) -> _Draft:
        """With its pairs drawn, and only the answers in them."""
        pairs = self.draw(draft)
        used = sorted({place for pair in pairs for place in pair})
        if len(used) < len(draft.answers):
            fewer = draft.of(used, pairs)
            fewer.everything = draft
            return fewer
        draft.pairs = pairs
        return draft

    def draw(self, draft: _Draft) -> list[tuple[int, int]]:
        possible = candidates(draft.scores)
        if len(possible) < 2:
            return possible
        ids = [int(answer[posts.ID]) for answer in draft.answers]
        return draw(self.partition.site, draft.qid, ids, possible, self.partition.max_pairs)


class _Maker:
    """Makes the records of one partition."""

    def __init__(self, partition: Partition, chooser: _Chooser, names: dict[int, str], counts: Counter[str]) -> None:
        self.partition, self.chooser, self.names, self.counts = partition, chooser, names, counts
        self.contamination = contamination.open_sets(partition.contamination) if partition.contamination else None
        self._licences: dict[bytes, str] = {}

    def records(self, drafts: list[_Draft]) -> Iterator[dict[str, Any]]:
        bodies = iter(posts.unescape_all([row[posts.BODY] for draft in drafts for row in (draft.row, *draft.answers)]))
        for draft in drafts:
            record = self._record(draft, next(bodies), [next(bodies) for _ in draft.answers])
            if record is not None:
                yield record

    def _record(self, draft: _Draft, html: str, htmls: list[str]) -> dict[str, Any] | None:
        """One row of `questions`; None when the question, or every answer to it, has no text."""
        texts = list(map(self._markdown, htmls))
        if not all(texts):
            draft, texts = self._with_text(draft, texts)
        title = posts.unescape(draft.row[posts.TITLE]).strip()
        body = self._markdown(html)
        self.counts["bodies"] += 1 + len(htmls)
        text = f"{title}\n\n{body}" if title and body else title or body
        if not text or not texts:
            self.counts["questions without text" if not text else "unanswered"] += 1
            return None
        pairs = self.chooser.draw(draft) if draft.pairs is None else draft.pairs
        if self.chooser.paired and not pairs:
            self.counts["without a pair"] += 1
            return None
        row, (site, root) = draft.row, self.chooser.root(draft.qid)
        return {
            "qid": draft.qid,
            "title": title,
            "question": text,
            "split": split_of(site, root, self.partition.shares),
            "cluster": root,
            "cluster_site": site,
            "answer_ids": [answer[posts.ID] for answer in draft.answers],
            "texts": texts,
            "pm_scores": draft.scores,
            "answer_votes": draft.votes,
            "selected": draft.selected,
            "credits": [self._credit(answer) for answer in draft.answers],
            "answers_created": [answer[posts.CREATED] for answer in draft.answers],
            "pairs": pairs,
            "tags": posts.split_tags(row[posts.TAGS]),
            "votes": int(row[posts.SCORE]),
            "views": int(row[posts.VIEWS]) if row[posts.VIEWS] else None,
            "created": row[posts.CREATED],
            "credit": self._credit(row),
            "contaminated": self.contamination is not None and any(map(self.contamination.contaminated, (text, *texts))),
        }

    def _with_text(self, draft: _Draft, texts: list[str]) -> tuple[_Draft, list[str]]:
        """Without the answers that have no text. Pairs that were drawn with one are drawn anew, as if it had not been there."""
        if draft.everything is not None:
            draft = draft.everything
            texts = [self._markdown(html) for html in posts.unescape_all([answer[posts.BODY] for answer in draft.answers])]
        kept = [place for place, text in enumerate(texts) if text]
        self.counts["answers without text"] += len(texts) - len(kept)
        draft = draft.of(kept, None)
        texts = [texts[place] for place in kept]
        if not self.chooser.paired:
            return draft, texts
        by_id = {answer[posts.ID]: text for answer, text in zip(draft.answers, texts, strict=True)}
        draft = self.chooser.in_pairs(draft)
        return draft, [by_id[answer[posts.ID]] for answer in draft.answers]

    def _markdown(self, html: str) -> str:
        text, fell_back = convert(html, self.partition.converter)
        if fell_back:
            self.counts["bodies by markdownify"] += 1
        return text.strip()

    def _credit(self, row: Values) -> tuple[str | None, int | None, str]:
        """Whom to name for a post, and under which licence: name, id, licence."""
        licence = self._licences.get(row[posts.LICENCE]) if row[posts.LICENCE] else posts.licence_of(row[posts.CREATED])
        if licence is None:
            licence = self._licences[row[posts.LICENCE]] = posts.unescape(row[posts.LICENCE])
        number = int(row[posts.OWNER]) if row[posts.OWNER] else None
        name = None if number is None else self.names.get(number)
        return name or posts.unescape(row[posts.OWNER_NAME]) or None, number, licence
