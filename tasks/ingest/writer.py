"""The three tables of ingest's artifact: their columns, and Parquet files whose bytes depend on the records alone."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.ingest.pairs import markup
from tasks.ingest.posts import moment

GROUP_BYTES = 16_000_000  # text of one row group, unpacked
GROUPS_PER_FILE = 24  # so a file packs to some 130 MB
BATCH_BYTES = 4_000_000  # text that a worker holds as Python objects before it becomes Arrow

MOMENT = pa.timestamp("ms", tz="UTC")
ANSWER = pa.struct(
    [
        ("answer_id", pa.int64()),
        ("text", pa.string()),
        ("pm_score", pa.int32()),
        ("votes", pa.int32()),
        ("selected", pa.bool_()),
        ("author", pa.string()),
        ("author_id", pa.int64()),
        ("author_profile", pa.string()),
        ("licence", pa.string()),
        ("created", MOMENT),
    ]
)
QUESTIONS = pa.schema(
    [
        ("site", pa.string()),
        ("qid", pa.int64()),
        ("title", pa.string()),
        ("question", pa.string()),
        ("split", pa.string()),
        ("cluster", pa.int64()),
        ("cluster_site", pa.string()),
        ("answers", pa.list_(ANSWER)),
        ("pairs", pa.list_(pa.struct([("j", pa.int32()), ("k", pa.int32())]))),
        ("tags", pa.list_(pa.string())),
        ("votes", pa.int32()),
        ("views", pa.int64()),
        ("created", MOMENT),
        ("date", pa.string()),
        ("url", pa.string()),
        ("metadata", pa.list_(pa.string())),
        ("author", pa.string()),
        ("author_id", pa.int64()),
        ("author_profile", pa.string()),
        ("licence", pa.string()),
        ("dump_date", pa.date32()),
        ("contaminated", pa.bool_()),
    ]
)
PAIRS = pa.schema(
    [
        ("site", pa.string()),
        ("qid", pa.int64()),
        ("title", pa.string()),
        ("question", pa.string()),
        ("response_j", pa.string()),
        ("response_k", pa.string()),
        ("split", pa.string()),
        ("pair_index", pa.int32()),
        ("score_gap", pa.int32()),
        ("date", pa.string()),
        ("metadata", pa.list_(pa.string())),
        ("contaminated", pa.bool_()),
        *(
            (f"{name}_{side}", kind)
            for side in ("j", "k")
            for name, kind in (
                ("answer_id", pa.int64()),
                ("pm_score", pa.int32()),
                ("votes", pa.int32()),
                ("selected", pa.bool_()),
                ("length", pa.int32()),
                ("author", pa.string()),
                ("author_profile", pa.string()),
                ("licence", pa.string()),
                ("created", MOMENT),
            )
        ),
    ]
)
QUARANTINE = pa.schema(
    [
        ("site", pa.string()),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("raw", pa.binary()),
        ("sha256", pa.string()),
    ]
)
SCHEMAS = {"questions": QUESTIONS, "pairs": PAIRS, "quarantine": QUARANTINE}
BYTES = "_bytes"  # a record's text, in bytes: where row groups are cut
MARKS = "_marks"  # marks of Markdown in each answer
PIECE = QUESTIONS.append(pa.field(BYTES, pa.int64())).append(pa.field(MARKS, pa.list_(pa.int32())))
"""What workers hand on: with two columns that are not in the files."""
SHARED = ("question", "response_j", "response_k")  # in `pairs`, each text once a row group: in many rows, but all of it is dear
STORED = SCHEMAS | {
    "pairs": pa.schema([f.with_type(pa.dictionary(pa.int32(), pa.string())) if f.name in SHARED else f for f in PAIRS])
}
MOST_AUTHORS = 20_000  # named in NOTICE.md; beyond that the columns have to do
_PLAIN = ("qid", "title", "question", "cluster", "cluster_site", "tags", "votes", "views", "contaminated")
_OF_ANSWERS = {
    "text": "texts",
    "pm_score": "pm_scores",
    "votes": "answer_votes",
    "selected": "selected",
}
# Few values in many rows: these are worth a dictionary, long text is not.
DICTIONARY = ["site", "split", "cluster_site", "dump_date", "licence", "licence_j", "licence_k", "date", "tags.list.element",
              "metadata.list.element", "answers.list.element.licence", "answers.list.element.pm_score", "votes"]  # fmt: skip
STATISTICS = ["qid", "answer_id_j", "answer_id_k"]  # of text they would be its first bytes


class Pieces:
    """What one worker hands on of the questions of one split: Arrow record batches in a scratch file.

    A record is a dict: the values of `_PLAIN` and, for its answers, those of `_OF_ANSWERS`, lists of one length. What follows
    from these (addresses, dates) is made here, for many records at once.
    """

    def __init__(self, path: Path, site: str, split: str, base: str, dump_date: str, pack: bool) -> None:
        self.rows = 0
        self._site, self._split, self._base, self._dump_date = site, split, base, dump_date
        self._records: list[dict[str, Any]] = []
        self._held = 0
        self._stream = pa.ipc.new_stream(path, PIECE, options=pa.ipc.IpcWriteOptions(compression="lz4" if pack else None))

    def add(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self._held += len(record["question"]) + sum(map(len, record["texts"]))
        self.rows += 1
        if self._held > BATCH_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._stream.close()

    def _flush(self) -> None:
        if self._records:
            self._stream.write_batch(self._batch(self._records))
            self._records, self._held = [], 0

    def _batch(self, records: list[dict[str, Any]]) -> pa.RecordBatch:
        columns = {name: pa.array([record[name] for record in records], QUESTIONS.field(name).type) for name in _PLAIN}
        columns["site"], columns["split"] = _repeat(self._site, len(records)), _repeat(self._split, len(records))
        columns["dump_date"] = _repeat(self._dump_date, len(records)).cast(pa.date32())
        created = _texts([record["created"] for record in records])
        columns["created"] = _moments(created)
        columns["date"] = pc.replace_substring(pc.utf8_slice_codeunits(created, 0, 10), "-", "/")
        columns["url"] = pc.binary_join_element_wise(f"{self._base}/questions/", columns["qid"].cast(pa.string()), "")
        columns |= self._credits([record["credit"] for record in records])
        profile = columns["author_profile"].fill_null("")
        metadata = pa.concat_arrays([columns["url"], _repeat(self._base, len(records)), profile])
        order = np.arange(3 * len(records)).reshape(3, -1).T.ravel()  # url, site and author of the first, then of the second
        columns["metadata"] = pa.ListArray.from_arrays(np.arange(len(records) + 1, dtype=np.int32) * 3, metadata.take(order))
        columns["answers"] = self._answers(records)
        columns["pairs"] = _lists(
            [record["pairs"] for record in records],
            lambda pairs: pa.StructArray.from_arrays(
                [pa.array(np.array(pairs, np.int32).reshape(-1, 2)[:, side]) for side in (0, 1)],
                fields=list(QUESTIONS.field("pairs").type.value_type),
            ),
        )
        columns[MARKS] = _marks(columns["answers"])
        size = pc.binary_length(columns["question"]).to_numpy().astype(np.int64)
        texts = pc.binary_length(columns["answers"].values.field("text")).to_numpy()
        columns[BYTES] = pa.array(size + np.add.reduceat(texts, columns["answers"].offsets.to_numpy()[:-1]))
        return pa.RecordBatch.from_arrays([columns[name] for name in PIECE.names], schema=PIECE)

    def _answers(self, records: list[dict[str, Any]]) -> pa.ListArray:
        """(R records) lists of answers; every record has one at least."""
        flat: dict[str, pa.Array] = {
            name: pa.array(list(chain.from_iterable([record[source] for record in records])), ANSWER.field(name).type)
            for name, source in _OF_ANSWERS.items()
        }
        flat["answer_id"] = _texts(list(chain.from_iterable([record["answer_ids"] for record in records]))).cast(pa.int64())
        flat["created"] = _moments(_texts(list(chain.from_iterable([record["answers_created"] for record in records]))))
        flat |= self._credits(list(chain.from_iterable(record["credits"] for record in records)))
        answers = pa.StructArray.from_arrays([flat[field.name] for field in ANSWER], fields=list(ANSWER))
        return pa.ListArray.from_arrays(_offsets([record["texts"] for record in records]), answers)

    def _credits(self, credits: list[tuple[str | None, int | None, str]]) -> dict[str, pa.Array]:
        names, users, licences = zip(*credits, strict=True)
        user = pa.array(users, pa.int64())
        return {
            "author": pa.array(names, pa.string()),
            "author_id": user,
            "author_profile": pc.binary_join_element_wise(f"{self._base}/users/", user.cast(pa.string()), ""),
            "licence": pa.array(licences, pa.string()),
        }


def _marks(answers: pa.ListArray) -> pa.ListArray:
    texts = answers.values.field("text")
    _, offsets, data = texts.buffers()
    places = np.frombuffer(offsets, np.int32)[: len(texts) + 1]
    return pa.ListArray.from_arrays(answers.offsets, pa.array(markup(data.to_pybytes()[: places[-1]], places), pa.int32()))


def _repeat(value: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.string()), count)


def _texts(values: list[bytes]) -> pa.Array:
    return pa.array(values, pa.binary()).cast(pa.string())


def _moments(texts: pa.Array) -> pa.Array:
    """Texts such as 2014-01-21T20:26:05.383, in UTC."""
    if not pc.all(pc.match_substring_regex(texts, r"^.{19}\.\d{3}$")).as_py():
        texts = _texts([moment(text.encode()) for text in texts.to_pylist()])
    return texts.cast(pa.timestamp("ms")).cast(pa.int64()).cast(MOMENT)


def _offsets(lists: Sequence[Sequence[Any]]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum([len(one) for one in lists])]), pa.int32())


def _lists(lists: Sequence[Sequence[Any]], make: Callable[[list[Any]], pa.Array]) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(lists), make(list(chain.from_iterable(lists))))


@dataclass
class Written:
    """What is in the Parquet files of one table, site and split."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    authors: set[tuple[str, str]] = field(default_factory=set)
    """(name, profile), of questions; more than MOST_AUTHORS are not all there."""


@dataclass(frozen=True)
class Job:
    """Join the pieces of one split, in their order, to the Parquet files of one table."""

    table: str
    site: str
    split: str
    pieces: tuple[Path, ...]
    folder: Path
    dropped: Path | None
    """Sorted ids of questions that are left out, .npy."""


def write_parquet(job: Job) -> Written:
    """part-00000.parquet and so on, and what is in them.

    Row groups and files are cut by the records' sizes: where the pieces' borders were, cannot be seen.
    """
    written = Written()
    files = groups = 0
    writer: pq.ParquetWriter | None = None
    try:
        for questions in _groups(job):
            group = pairs_of(questions) if job.table == "pairs" else questions.drop_columns([BYTES, MARKS])
            _count(group, questions, job, written)
            if not group.num_rows:
                continue
            if writer is not None and groups == GROUPS_PER_FILE:
                writer.close()
                writer = None
            if writer is None:
                job.folder.mkdir(parents=True, exist_ok=True)
                writer = open_parquet(job.folder / f"part-{files:05}.parquet", job.table)
                files, groups = files + 1, 0
            writer.write_table(group, row_group_size=max(group.num_rows, 1))
            groups += 1
    finally:
        if writer is not None:
            writer.close()
    return written


def _count(group: pa.Table, questions: pa.Table, job: Job, written: Written) -> None:
    """Counts of a split; a baseline's wins are counted double, so that a tie is one."""
    written.rows += group.num_rows
    counts, split = written.counts, job.split
    if job.table == "pairs":
        counts[f"{split} pairs"] += group.num_rows
        if group.num_rows:
            marks = _sides(questions, questions.column(MARKS).combine_chunks())
            counts[f"{split} longer"] += _wins(group["length_j"], group["length_k"])
            counts[f"{split} earlier"] += _wins(group["created_k"], group["created_j"])
            counts[f"{split} more markup"] += _wins(*marks)
            gaps, found = np.unique(np.minimum(group["score_gap"].to_numpy(), 5), return_counts=True)
            counts.update({f"gap {gap}": int(n) for gap, n in zip(gaps, found, strict=True)})
        return
    answers = group["answers"].combine_chunks().flatten()
    counts[f"{split} questions"] += group.num_rows
    counts[f"{split} answers"] += len(answers)
    counts[f"{split} questions with pairs"] += pc.sum(pc.greater(pc.list_value_length(group["pairs"]), 0)).as_py() or 0
    counts[f"{split} contaminated"] += pc.sum(group["contaminated"]).as_py() or 0
    for licences in (group["licence"], answers.field("licence")):
        for entry in pc.value_counts(licences).to_pylist():
            counts[f"licence {entry['values']}"] += entry["counts"]
    for credited in (group, answers):
        if len(written.authors) <= MOST_AUTHORS:
            name, profile = (
                (credited.field(column) if isinstance(credited, pa.StructArray) else credited[column].combine_chunks()).fill_null(
                    ""
                )
                for column in ("author", "author_profile")
            )
            for both in pc.unique(pc.binary_join_element_wise(name, profile, "\0")).to_pylist():
                if both != "\0":
                    written.authors.add(tuple(both.rsplit("\0", 1)))


def _wins(left: pa.ChunkedArray, right: pa.ChunkedArray) -> int:
    return 2 * (pc.sum(pc.greater(left, right)).as_py() or 0) + (pc.sum(pc.equal(left, right)).as_py() or 0)


def open_parquet(path: Path, table: str) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        STORED[table],
        compression="zstd",
        compression_level=3,
        use_dictionary=[*DICTIONARY, *SHARED] if table == "pairs" else DICTIONARY,
        write_statistics=STATISTICS,
        dictionary_pagesize_limit=1 << 30,
        store_schema=False,  # it would make readers give dictionaries where the page about the data says strings
    )


def pairs_of(questions: pa.Table) -> pa.Table:
    """The rows of `pairs` that questions hold as places in their `answers`.

    In Arrow: no text is decoded, and each stands there once, in a dictionary, however many pairs it is in.
    """
    paired = pc.greater(pc.list_value_length(questions["pairs"]), 0)
    if not pc.all(paired).as_py():
        questions = questions.filter(paired).combine_chunks()
    answers, places = (questions[name].combine_chunks() for name in ("answers", "pairs"))
    question = np.repeat(np.arange(len(questions)), pc.list_value_length(places).to_numpy())
    begin = places.offsets.to_numpy()[:-1] - places.offsets[0].as_py()
    columns = {
        name: questions[name].combine_chunks().take(pa.array(question))
        for name in QUESTIONS.names
        if name in PAIRS.names and name not in SHARED
    }
    columns["question"] = _shared(questions["question"].combine_chunks(), pa.array(question))
    flat = answers.flatten()
    for side, place in zip(("j", "k"), _places(questions), strict=True):
        used, at = np.unique(place, return_inverse=True)
        used, at = pa.array(used, pa.int64()), pa.array(at.reshape(-1))
        texts = flat.field("text").take(used)
        columns[f"response_{side}"] = _shared(texts, at)
        columns[f"length_{side}"] = pc.utf8_length(texts).take(at)
        for one in ANSWER:
            if f"{one.name}_{side}" in PAIRS.names:
                columns[f"{one.name}_{side}"] = flat.field(one.name).take(used).take(at)
    columns["pair_index"] = pa.array(np.arange(len(question)) - begin[question], pa.int32())
    columns["score_gap"] = pc.subtract(columns["pm_score_j"], columns["pm_score_k"])
    return pa.table([columns[one.name].cast(one.type) for one in STORED["pairs"]], schema=STORED["pairs"])


def _shared(texts: pa.Array, places: pa.Array) -> pa.DictionaryArray:
    """The texts at these places, as a dictionary without doubles: with one, Parquet's writer gives up and writes all in full."""
    encoded = texts.dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices.take(places), encoded.dictionary)


def _places(questions: pa.Table) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of both sides of all pairs, the places among all answers of all questions."""
    answers, pairs = (questions[name].combine_chunks() for name in ("answers", "pairs"))
    first = answers.offsets.to_numpy()[:-1] - answers.offsets[0].as_py()
    begins = np.repeat(first, pc.list_value_length(pairs).to_numpy())
    flat = pairs.flatten()
    return begins + flat.field("j").to_numpy(), begins + flat.field("k").to_numpy()


def _sides(questions: pa.Table, lists: pa.ListArray) -> tuple[pa.Array, pa.Array]:
    """Values that stand beside the answers, for both sides of all pairs."""
    flat = lists.flatten()
    j, k = _places(questions)
    return flat.take(pa.array(j)), flat.take(pa.array(k))


def _groups(job: Job) -> Iterator[pa.Table]:
    """The first questions whose sizes come to GROUP_BYTES, then the next; of pairs, the sizes that their rows will have."""
    dropped = np.load(job.dropped, mmap_mode="r") if job.dropped else None
    held: list[pa.RecordBatch] = []
    size = 0
    for path in job.pieces:
        with pa.ipc.open_stream(path) as stream:
            for whole in stream:
                batch = whole
                if dropped is not None:
                    batch = batch.filter(pa.array(~np.isin(batch.column("qid").to_numpy(), dropped)))
                while batch.num_rows:
                    ends = size + np.cumsum(_sizes(batch, job.table))
                    take = int(np.searchsorted(ends, GROUP_BYTES)) + 1  # records until the group is full
                    held.append(batch.slice(0, take))
                    if take > batch.num_rows:
                        size = int(ends[-1])
                        break
                    yield pa.Table.from_batches(held).combine_chunks()
                    held, size = [], 0
                    batch = batch.slice(take)
    if held:
        yield pa.Table.from_batches(held).combine_chunks()


def _sizes(batch: pa.RecordBatch, table: str) -> np.ndarray[Any, Any]:
    """Bytes of text of each question's rows in a table."""
    if table == "questions":
        return np.asarray(batch.column(BYTES).to_numpy())
    questions = pa.Table.from_batches([batch])
    lengths = pc.binary_length(questions["answers"].combine_chunks().flatten().field("text")).to_numpy()
    counts = pc.list_value_length(batch.column("pairs")).to_numpy()
    j, k = _places(questions)
    total = np.concatenate([[0], np.cumsum(lengths[j].astype(np.int64) + lengths[k])])
    ends = np.cumsum(counts)
    question = pc.binary_length(batch.column("question")).to_numpy().astype(np.int64)
    return np.asarray(total[ends] - total[ends - counts] + counts * question)
