"""The step: StackExchange dumps, or a simulated site, to questions, preference pairs and a data card."""

import contextlib
import datetime
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.compute import Compute, cores
from tasks.ingest import card, sources
from tasks.ingest.config import IngestConfig
from tasks.ingest.identity import need_a_source
from tasks.ingest.partitions import MOST_AUTHORS, SPLITS, Outcome, Partition, piece, process
from tasks.ingest.scan import Quarantine, Scanned, scan
from tasks.ingest.writer import write_parquet
from tasks.progress import Progress

BUG = "this is a bug of ingest, please report it"
POOL_BYTES = 32_000_000  # of tables; below, starting processes costs more than they bring


def ingest(config: IngestConfig, *, out: Path, compute: Compute, progress: Progress) -> dict[str, Any]:
    """Write questions/, pairs/, quarantine/ and the data card under `out`; return the headline counts."""
    need_a_source(config)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.scratch-", dir=out.parent) as name:
        scratch = Path(name)
        sites = sources.find(config.dump, config.site) if config.dump else _simulate(config, scratch, progress)
        size = sum(site.unpacked for site in sites)
        summaries = []
        with _executor(compute, size) as submit:
            quarantine = Quarantine(out / "quarantine" / "part-00000.parquet")
            running = []
            read = 0

            def tell(chunk: int) -> None:
                nonlocal read
                read += chunk
                progress(min(read, size), size, phase="read")

            try:
                for site in sites:
                    scanned = scan(site, scratch, quarantine, tell)
                    _check(scanned, config, progress)
                    running.append((scanned, [submit(process, p) for p in _partitions(scanned, config, scratch)]))
            finally:
                quarantine.close()
            total, done = sum(len(futures) for _, futures in running), 0
            for scanned, futures in running:
                outcomes = []
                for future in futures:
                    outcomes.append(future.result())
                    done += 1
                    progress(done, total, phase="convert")
                summary = _summarize(scanned, outcomes)
                _write(summary.site, outcomes, scratch=scratch, out=out, submit=submit, progress=progress)
                summaries.append(summary)
    pairs = sum(summary.counts[f"{split} pairs"] for summary in summaries for split in SPLITS)
    if not pairs:
        raise ValueError(
            f"{', '.join(s.site for s in summaries)}: no question has two answers with different votes, so there is nothing "
            "to learn from: give a larger dump"
        )
    return card.write(config, summaries, _best_possible(summaries, out), out)


def _simulate(config: IngestConfig, scratch: Path, progress: Progress) -> list[sources.Site]:
    from tasks.ingest.simulated import truth
    from tasks.ingest.simulated.generate import write_site

    assert config.simulate is not None
    progress.note(f"writing a simulated site of {config.simulate.questions} questions")
    folder = scratch / truth.SITE
    write_site(config.simulate, folder)
    return sources.find((str(folder),))


@contextlib.contextmanager
def _executor(compute: Compute, size: int) -> Iterator[Callable[..., Future[Any]]]:
    """submit(function, argument): in this process for a small dump, in several for a large one. The results are the same."""
    workers = compute.workers or cores()
    if size <= POOL_BYTES or workers == 1:
        yield _now
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool.submit
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a worker of ingest was killed, most likely for memory: {workers} workers need some {workers * 420} MB; set fewer "
                "in compute.workers"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _now(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future


def _check(scanned: Scanned, config: IngestConfig, progress: Progress) -> None:
    """Every row is accounted for; cut files and too many bad rows stop the run, before the long part of it."""
    table, counts = scanned.tables["posts"], scanned.counts
    balance = counts["questions"] + counts["answers"] + counts["other"] + table.quarantined
    if table.rows != balance:
        raise RuntimeError(f"{table.file}: {table.rows} rows were read but {balance} accounted for: {BUG}")
    for count in scanned.tables.values():
        if count.cut:
            text = f"{count.file}: the dump is cut: {count.rows} rows were read, then {count.cut}"
            if not config.allow_incomplete:
                raise ValueError(f"{text}. Fetch it again, or set ingest.allow_incomplete=true to go on with what was read")
            progress.note(f"{text}. Going on, as ingest.allow_incomplete says")
        if count.quarantined > config.max_quarantine * count.rows:
            bad = count.first_bad
            assert bad is not None
            raise ValueError(
                f"{count.file}: {count.quarantined} of {count.rows} rows could not be read, more than ingest.max_quarantine="
                f"{config.max_quarantine:g} allows; the first stands at byte {bad.offset}, line {bad.line}: {bad.reason}"
            )
    if not table.rows:
        raise ValueError(f"{table.file}: the table holds no rows")


def _partitions(scanned: Scanned, config: IngestConfig, scratch: Path) -> list[Partition]:
    pieces = scratch / f"{scanned.site.name}.pieces"
    pieces.mkdir()
    newest = datetime.date.fromisoformat(scanned.newest or "1970-01-01")
    return [
        Partition(
            number=number,
            site=scanned.site.name,
            rows=rows,
            index=scanned.index,
            pieces=pieces,
            converter=config.converter,
            max_pairs=config.max_pairs,
            shares={str(split): share for split, share in config.splits.items()},
            dump_date=newest,
        )
        for number, rows in enumerate(scanned.spill.paths)
    ]


def _summarize(scanned: Scanned, outcomes: list[Outcome]) -> card.Summary:
    counts = Counter(scanned.counts)
    authors: set[tuple[str, str]] = set()
    for outcome in outcomes:
        counts.update(outcome.counts)
        if len(authors) <= MOST_AUTHORS:
            authors |= outcome.authors
    without_parent = scanned.counts["orphans"]
    if counts["questions read"] != counts["questions"] or counts["answers read"] != counts["answers"] - without_parent:
        raise RuntimeError(f"{scanned.site.name}: rows were lost between the two stages: {BUG}")
    return card.Summary(scanned.site.name, scanned.site.files, scanned.tables, counts, authors, scanned.newest)


def _write(
    site: str, outcomes: list[Outcome], *, scratch: Path, out: Path, submit: Callable[..., Future[Any]], progress: Progress
) -> None:
    """The pieces of all partitions, joined to Parquet files; what the files say they hold must be what was made."""
    jobs = {}
    for table in ("questions", "pairs"):
        for split in SPLITS:
            folder = out / table / f"site={site}" / f"split={split}"
            pieces = [piece(scratch / f"{site}.pieces", split, outcome.number) for outcome in outcomes]
            jobs[table, split] = folder, submit(write_parquet, pieces, table, folder)
    for number, ((table, split), (folder, future)) in enumerate(jobs.items(), start=1):
        future.result()
        made = sum(o.records[split] if table == "questions" else o.counts[f"{split} pairs"] for o in outcomes)
        written = sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))
        if made != written:
            raise RuntimeError(f"{folder}: {made} records were made but {written} written: {BUG}")
        progress(number, len(jobs), phase="write")


def _best_possible(summaries: list[card.Summary], out: Path) -> float | None:
    """On the simulated site: the best accuracy that any reader of the text can have on the pairs of split eval."""
    from tasks.ingest.simulated import truth

    if {summary.site for summary in summaries} != {truth.SITE}:
        return None

    def eval_pairs() -> Iterator[tuple[str, str, str]]:
        for path in sorted(out.glob(f"pairs/site={truth.SITE}/split=eval/*.parquet")):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["question", "response_j", "response_k"]):
                    yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    return truth.best_pair_accuracy(eval_pairs()) if summaries[0].counts["eval pairs"] else None
