"""The three tables of ingest's artifact: their columns, and Parquet files whose bytes depend on the records alone."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

GROUP_BYTES = 24_000_000  # text of one row group, unpacked
GROUPS_PER_FILE = 16  # so a file packs to some 130 MB
BATCH_BYTES = 8_000_000  # text that a worker holds as Python objects before it becomes Arrow

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
BYTES = "_bytes"  # a record's text, in bytes: where row groups are cut; not in the files
# Few values in many rows: these are worth a dictionary, long text is not.
DICTIONARY = ["site", "split", "dump_date", "licence", "licence_j", "licence_k", "date", "tags.list.element",
              "metadata.list.element", "answers.list.element.licence", "answers.list.element.pm_score", "votes"]  # fmt: skip
STATISTICS = ["qid", "answer_id_j", "answer_id_k"]  # of text they would be its first bytes


class Pieces:
    """What one worker hands on of the questions of one split: Arrow record batches in a scratch file."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._schema = QUESTIONS.append(pa.field(BYTES, pa.int64()))
        self._records: list[dict[str, Any]] = []
        self._held = 0
        self._stream = pa.ipc.new_stream(path, self._schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))

    def add(self, record: dict[str, Any]) -> None:
        size = len(record["question"].encode()) + sum(len(answer["text"].encode()) for answer in record["answers"])
        self._records.append({**record, BYTES: size})
        self._held += size
        self.rows += 1
        if self._held > BATCH_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._stream.close()

    def _flush(self) -> None:
        if self._records:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._records, schema=self._schema))
            self._records, self._held = [], 0


def write_parquet(pieces: Iterable[Path], table: str, folder: Path) -> int:
    """Join the pieces of questions, in their order, to part-00000.parquet and so on; or the pairs in them. The rows written.

    Row groups and files are cut by the records' sizes: where the pieces' borders were, cannot be seen.
    """
    schema = SCHEMAS[table]
    rows = files = groups = 0
    writer: pq.ParquetWriter | None = None
    try:
        for group in _groups(pieces, pairs_of if table == "pairs" else None):
            if writer is not None and groups == GROUPS_PER_FILE:
                writer.close()
                writer = None
            if writer is None:
                folder.mkdir(parents=True, exist_ok=True)
                writer = open_parquet(folder / f"part-{files:05}.parquet", schema)
                files, groups = files + 1, 0
            # Arrow's chunk borders would show in the pages; one chunk has none.
            writer.write_table(group.drop_columns([BYTES]).combine_chunks(), row_group_size=max(group.num_rows, 1))
            rows, groups = rows + group.num_rows, groups + 1
    finally:
        if writer is not None:
            writer.close()
    return rows


def open_parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=3, use_dictionary=DICTIONARY, write_statistics=STATISTICS
    )


def pairs_of(questions: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of `pairs` that questions hold as places in their `answers`. In Arrow: text is copied, never decoded."""
    answers, places = questions.column("answers"), questions.column("pairs")
    answer, place = answers.flatten(), places.flatten()
    question = np.repeat(np.arange(len(questions)), pc.list_value_length(places).to_numpy())
    first = answers.offsets.to_numpy()[:-1] - answers.offsets[0].as_py()  # of each question's answers, among all answers
    begin = places.offsets.to_numpy()[:-1] - places.offsets[0].as_py()
    sides = {side: answer.take(pa.array(first[question] + place.field(side).to_numpy())) for side in ("j", "k")}
    columns = {name: questions.column(name).take(pa.array(question)) for name in QUESTIONS.names if name in PAIRS.names}
    for side, chosen in sides.items():
        columns[f"response_{side}"] = text = chosen.field("text")
        columns[f"length_{side}"] = pc.utf8_length(text)
        columns |= {f"{field.name}_{side}": chosen.field(field.name) for field in ANSWER if f"{field.name}_{side}" in PAIRS.names}
    columns["pair_index"] = pa.array(np.arange(len(question)) - begin[question], pa.int32())
    columns["score_gap"] = pc.subtract(columns["pm_score_j"], columns["pm_score_k"])
    texts = [columns[name] for name in ("question", "response_j", "response_k")]
    columns[BYTES] = pa.array(sum(pc.binary_length(text).to_numpy(zero_copy_only=False).astype(np.int64) for text in texts))
    schema = PAIRS.append(pa.field(BYTES, pa.int64()))
    return pa.RecordBatch.from_arrays([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def _groups(pieces: Iterable[Path], change: Callable[[pa.RecordBatch], pa.RecordBatch] | None) -> Iterator[pa.Table]:
    """Tables of the first records whose sizes come to GROUP_BYTES, then of the next."""
    held: list[pa.RecordBatch] = []
    size = 0
    for path in pieces:
        with pa.ipc.open_stream(path) as stream:
            for whole in stream:
                batch = change(whole) if change else whole
                while batch.num_rows:
                    ends = size + np.cumsum(batch.column(BYTES).to_numpy())
                    take = int(np.searchsorted(ends, GROUP_BYTES)) + 1  # records until the group is full
                    held.append(batch.slice(0, take))
                    if take > batch.num_rows:
                        size = int(ends[-1])
                        break
                    yield pa.Table.from_batches(held)
                    held, size = [], 0
                    batch = batch.slice(take)
    if held:
        yield pa.Table.from_batches(held)
