"""The step: StackExchange dumps, or a simulated site, to questions, preference pairs and a data card.

blocks of tables -> scan -> (names, clusters) -> partitions -> process -> (near-duplicates) -> write_parquet -> card
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.artifacts import code_fingerprint
from tasks.compute import Compute
from tasks.ingest import card, changes, contamination, mix, near, partitions, scan, sources
from tasks.ingest.blocks import Awkward, Head, blocks
from tasks.ingest.config import IngestConfig
from tasks.ingest.engines import Engine, engine
from tasks.ingest.identity import need_a_source
from tasks.ingest.names import write_names
from tasks.ingest.partitions import SPLITS, Outcome, Partition, piece, process
from tasks.ingest.scan import Block, Scanned
from tasks.ingest.writer import QUARANTINE, Job, Written, open_parquet, write_parquet
from tasks.progress import Progress
from tasks.scratch import scratch

BUG = "this is a bug of ingest, please report it"
BLOCK_BYTES = (8_000_000, 64_000_000, 1_500)  # smallest, largest, and how many there should not be more of
PARTITION_BYTES = (8_000_000, 48_000_000, 2_000)  # of Posts.xml
PACK_FROM = 4_000_000_000  # bytes of dumps; below, packing scratch files costs more than it brings
TABLES = ("posts", "users", "postlinks")


def ingest(config: IngestConfig, *, out: Path, compute: Compute, progress: Progress, kept: Path | None = None) -> dict[str, Any]:
    """Write questions/, pairs/, quarantine/ and the data card under `out`; return the headline counts.

    `kept` is a folder for scratch files, from which a killed run of the same configuration goes on.
    """
    need_a_source(config)
    if config.near_duplicates is not None:
        near.check_library()
    if config.previous is not None:
        changes.check(Path(config.previous))
    with scratch(kept, out.parent, _plan(config)) as folder:
        sites = _find(config, folder, progress)
        mix.check_weights(config.weights, [site.name for site in sites])
        size = sum(site.unpacked for site in sites)
        with engine(compute, size) as pool, _quarantine(out) as quarantine:  # Arrow loads its writer while workers start
            run = _Run(config, folder, out, pool, progress, pack=size > PACK_FROM)
            scans = run.scan(sites, size)
            for one in scans:
                _check(one, config, progress)
            run.quarantine(scans, quarantine)
            run.join(scans)
            outcomes = run.process(scans)
            dropped = run.near_duplicates(outcomes) if config.near_duplicates is not None else None
            summaries = run.write(scans, outcomes, dropped)
    pairs = sum(summary.counts[f"{split} pairs"] for summary in summaries for split in SPLITS)
    if not pairs:
        raise ValueError(
            f"{', '.join(s.site for s in summaries)}: no question has two answers with different votes, so there is nothing "
            "to learn from: give a larger dump"
        )
    changed = changes.compare(Path(config.previous), out) if config.previous is not None else None
    return card.write(config, summaries, best_possible=_best_possible(summaries, out), changed=changed, out=out)


def _plan(config: IngestConfig) -> dict[str, Any]:
    """What scratch files depend on."""
    return {
        "config": config.model_dump(mode="json"),
        "code": code_fingerprint("ingest"),
        "bytes": [BLOCK_BYTES, PARTITION_BYTES, PACK_FROM],
    }


def _find(config: IngestConfig, folder: Path, progress: Progress) -> list[sources.Site]:
    if config.dump:
        return sources.find(config.dump, config.site, site_names=config.site_names, archive=config.archive, progress=progress)
    from tasks.ingest.simulated import truth
    from tasks.ingest.simulated.generate import write_site

    assert config.simulate is not None
    progress.note(f"writing a simulated site of {config.simulate.questions} questions")
    write_site(config.simulate, folder / truth.SITE)
    return sources.find((str(folder / truth.SITE),))


@dataclass
class SiteScan:
    """A site after the first stage."""

    site: sources.Site
    blocks: dict[str, list[Scanned]]
    """table -> its blocks, in order."""
    heads: dict[str, Head]
    partitions: int
    tables: dict[str, card.Table] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    newest: str = ""

    def add_up(self, names: dict[str, str]) -> None:
        for table, scanned in self.blocks.items():
            total = self.tables[table] = card.Table(names[table])
            lines = self.heads[table].lines if table in self.heads else 0
            for one in scanned:
                total.rows += one.rows
                total.repaired += one.repaired
                total.quarantined += one.quarantined
                if one.first_bad and not total.first_bad:
                    total.first_bad = replace(one.first_bad, line=one.first_bad.line + lines)
                lines += one.lines
            total.cut = scanned[-1].cut
        for one in self.blocks["posts"]:
            self.counts.update(one.counts)
            self.newest = max(self.newest, one.newest)


class _Run:
    """The stages of one run."""

    def __init__(self, config: IngestConfig, folder: Path, out: Path, pool: Engine, progress: Progress, pack: bool) -> None:
        self.config, self.folder, self.out, self.pool, self.progress, self.pack = config, folder, out, pool, progress, pack

    # ----------------------------------------------------------------------------------------------------- first stage

    def scan(self, sites: list[sources.Site], size: int) -> list[SiteScan]:
        """Every table of every site, in blocks; those that cannot be cut, in one piece."""
        found: dict[tuple[str, str], list[Scanned]] = defaultdict(list)
        heads: dict[str, dict[str, Head]] = {site.name: {} for site in sites}
        early: dict[str, dict[str, str | None]] = {site.name: {} for site in sites}
        parts = {site.name: _partitions(site) for site in sites}
        whole: list[tuple[sources.Site, sources.File]] = []
        sent: list[str] = []  # the site of each block
        read = 0

        def tell(one: Scanned) -> None:
            nonlocal read
            read += one.size
            self.progress(min(read, size), max(size, 1), phase="read")

        def start(site: sources.Site, file: sources.File | None, table: str, name: str) -> Block:
            folder = self.folder / site.name / "blocks" / f"{table}-{0 if file is None else 99_999:05}"
            return Block(site.name, table, 0, folder, name, parts[site.name], self.pack, file=file)

        def unfinished(source: Iterator[Block]) -> Iterator[Block]:
            for block in source:
                if (done := scan.finished(block)) is None:
                    sent.append(block.site)
                    yield block
                else:
                    found[block.site, block.table].append(done)
                    tell(done)

        def all_blocks() -> Iterator[Block]:
            for site in sites:
                for file in site.files:
                    try:
                        yield from unfinished(
                            blocks(file, partial(start, site, None), heads[site.name], _block_size(file), early[site.name])
                        )
                    except Awkward:
                        whole.append((site, file))

        def run(source: Iterator[Block]) -> None:
            sent.clear()
            for number, one in self.pool.run(scan.scan, source):
                found[sent[number], one.table].append(one)
                tell(one)

        run(all_blocks())
        for site in sites:
            for file in site.files:
                if (site, file) not in whole and any(one.awkward for table in file.tables for one in found[site.name, table]):
                    whole.append((site, file))
        for site, file in whole:
            for table in file.tables:
                found[site.name, table] = []
                heads[site.name].pop(table, None)
                early[site.name].pop(table, None)
        run(unfinished(iter([start(site, file, table, name) for site, file in whole for table, name in sources.inside(file)])))
        scans = []
        for site in sites:
            names = {table: name for file in site.files for table, name in sources.inside(file)}
            tables = {table: sorted(found[site.name, table], key=lambda one: one.number) for table in TABLES if table in names}
            result = SiteScan(site, tables, heads[site.name], parts[site.name])
            result.add_up(names)
            for table, why in early[site.name].items():
                result.tables[table].cut = why or result.tables[table].cut
            scans.append(result)
        return scans

    def quarantine(self, scans: list[SiteScan], writer: pq.ParquetWriter) -> None:
        """The rows that could not be read, in the artifact, so that anyone can see what is missing."""
        place = QUARANTINE.get_field_index("line")
        for one in scans:
            for table, scanned in one.blocks.items():
                lines = one.heads[table].lines if table in one.heads else 0
                for block in scanned:
                    for batch in scan.quarantined(block.folder):
                        line = pa.array(batch.column(place).to_numpy() + lines)
                        writer.write_batch(batch.set_column(place, QUARANTINE.field(place), line))
                    lines += block.lines

    def join(self, scans: list[SiteScan]) -> None:
        """What joins across blocks and sites: authors' names, and clusters of duplicate questions."""
        for one in scans:
            if users := one.blocks.get("users"):
                write_names(self.folder / one.site.name / "names.sqlite", [block.folder / "names.json" for block in users])
        texts = {one.site.name: [block.folder / "texts" for block in one.blocks["posts"]] for one in scans}
        links = {one.site.name: [block.folder / "links" for block in one.blocks.get("postlinks", [])] for one in scans}
        clusters = mix.find_clusters(texts, links, self.folder / "clusters")
        for one in scans:
            one.counts["clustered"] = clusters.counts.get(one.site.name, 0)
        if self.config.evaluation_sets:
            contamination.load_sets(self.config.evaluation_sets).save(self.folder / "evaluation-sets")

    # ---------------------------------------------------------------------------------------------------- second stage

    def process(self, scans: list[SiteScan]) -> dict[str, list[Outcome]]:
        """All partitions of all sites, the records in their folders; by site, in order."""
        names = sorted(one.site.name for one in scans)
        jobs = [job for one in scans for job in self._partitions(one, names.index(one.site.name))]
        outcomes: dict[tuple[str, int], Outcome] = {}
        for job in jobs:
            if (done := partitions.finished(job)) is not None:
                outcomes[job.site, job.number] = done
        left = [job for job in jobs if (job.site, job.number) not in outcomes]
        for number, outcome in self.pool.run(process, iter(left)):
            outcomes[left[number].site, outcome.number] = outcome
            self.progress(len(outcomes), len(jobs), phase="convert")
        return {one.site.name: [outcomes[one.site.name, number] for number in range(one.partitions)] for one in scans}

    def _partitions(self, one: SiteScan, site_number: int) -> Iterator[Partition]:
        config, folder = self.config, self.folder / one.site.name
        for number in range(one.partitions):
            yield Partition(
                number=number,
                site=one.site.name,
                site_number=site_number,
                blocks=tuple(block.folder for block in one.blocks["posts"]),
                folder=folder / "pieces" / f"{number:05}",
                names=folder / "names.sqlite" if "users" in one.blocks else None,
                clusters=self.folder / "clusters",
                contamination=self.folder / "evaluation-sets" if config.evaluation_sets else None,
                pack=self.pack,
                converter=config.converter,
                questions=config.questions,
                max_pairs=config.max_pairs,
                shares={str(split): share for split, share in config.splits.items()},
                weights=config.weights,
                signatures=config.near_duplicates is not None,
                dump_date=one.newest or "1970-01-01",
            )

    def near_duplicates(self, outcomes: dict[str, list[Outcome]]) -> near.Dropped:
        assert self.config.near_duplicates is not None
        files = [outcome.folder / "signatures" for site in sorted(outcomes) for outcome in outcomes[site]]
        self.progress.note("looking for near-duplicates")
        return near.near_duplicates(files, sorted(outcomes), self.config.near_duplicates, self.folder / "near-duplicates")

    def write(self, scans: list[SiteScan], outcomes: dict[str, list[Outcome]], dropped: near.Dropped | None) -> list[card.Summary]:
        """The pieces of all partitions, joined to Parquet files; what the files say they hold must be what was made."""
        jobs = []
        for one in scans:
            site = one.site.name
            left_out = None
            if dropped is not None:
                left_out = self.folder / site / "dropped.npy"
                np.save(left_out, dropped.qids(site))
            for table in ("pairs", "questions"):
                for split in SPLITS:
                    pieces = tuple(piece(outcome.folder, split) for outcome in outcomes[site])
                    folder = self.out / table / f"site={site}" / f"split={split}"
                    jobs.append(Job(table, site, split, pieces, folder, left_out))
        jobs.sort(key=lambda job: -sum(path.stat().st_size for path in job.pieces))  # the long ones first
        written: dict[str, list[tuple[Job, Written]]] = defaultdict(list)
        for done, (number, result) in enumerate(self.pool.run(write_parquet, iter(jobs)), start=1):
            job = jobs[number]
            written[job.site].append((job, result))
            rows = sum(pq.read_metadata(path).num_rows for path in job.folder.glob("*.parquet"))
            if result.rows != rows:
                raise RuntimeError(f"{job.folder}: {result.rows} records were made but {rows} written: {BUG}")
            self.progress(done, len(jobs), phase="write")
        return [self._summarize(one, outcomes[one.site.name], written[one.site.name], dropped) for one in scans]

    def _summarize(
        self,
        one: SiteScan,
        outcomes: list[Outcome],
        written: list[tuple[Job, Written]],
        dropped: near.Dropped | None,
    ) -> card.Summary:
        counts = Counter(one.counts)
        authors: set[tuple[str, str]] = set()
        for outcome in outcomes:
            counts.update(outcome.counts)
        for _, result in written:
            counts.update(result.counts)
            authors |= result.authors
        if dropped is not None:
            counts["near-duplicates"] = dropped.counts.get(one.site.name, 0)
        made = sum(sum(outcome.records.values()) for outcome in outcomes) - counts["near-duplicates"]
        kept = sum(counts[f"{split} questions"] for split in SPLITS)
        without_parent = one.counts["orphans"]
        if (
            counts["questions read"] != counts["questions"]
            or counts["answers read"] != counts["answers"] - without_parent
            or made != kept
        ):
            raise RuntimeError(f"{one.site.name}: rows were lost between the two stages: {BUG}")
        return card.Summary(one.site.name, one.site.files, one.tables, counts, authors, one.newest)


def _quarantine(out: Path) -> pq.ParquetWriter:
    path = out / "quarantine" / "part-00000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = open_parquet(path, "quarantine")
    writer.write_table(QUARANTINE.empty_table())
    return writer


def _partitions(site: sources.Site) -> int:
    size = sum(file.unpacked for file in site.files if "posts" in file.tables)
    return max(1, -(-size // partitions.size_of_parts(size, *PARTITION_BYTES)))


def _block_size(file: sources.File) -> int:
    return partitions.size_of_parts(file.unpacked, *BLOCK_BYTES)


def _check(one: SiteScan, config: IngestConfig, progress: Progress) -> None:
    """Every row is accounted for; cut files and too many bad rows stop the run, before the long part of it."""
    table, counts = one.tables["posts"], one.counts
    balance = counts["questions"] + counts["answers"] + counts["other"] + table.quarantined
    if table.rows != balance:
        raise RuntimeError(f"{table.file}: {table.rows} rows were read but {balance} accounted for: {BUG}")
    for count in one.tables.values():
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
