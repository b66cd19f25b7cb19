"""What joins across a whole site: authors' names, and clusters of duplicate questions. On disk, so memory stays flat."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.ingest.pairs import roots

BATCH = 20_000  # rows in one insert
LOOKUP = 30_000  # ids in one query; SQLite takes 32,766


class Index:
    """A scratch database of one site: written while the dump is scanned, then read by the workers."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(
            """PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -32000; PRAGMA temp_store = FILE;
            CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
            CREATE TABLE texts (digest BLOB NOT NULL, qid INTEGER NOT NULL);
            CREATE TABLE links (a INTEGER NOT NULL, b INTEGER NOT NULL);
            CREATE TABLE clusters (qid INTEGER PRIMARY KEY, root INTEGER NOT NULL);
            """
        )
        self._database.execute("BEGIN")
        self._users: list[tuple[int, str]] = []
        self._texts: list[tuple[bytes, int]] = []

    def add_user(self, user: int, name: str) -> None:
        self._users.append((user, name))
        if len(self._users) >= BATCH:
            self._flush()

    def add_text(self, digest: bytes, qid: int) -> None:
        self._texts.append((digest, qid))
        if len(self._texts) >= BATCH:
            self._flush()

    def add_link(self, qid: int, original: int) -> None:
        self._database.execute("INSERT INTO links VALUES (?, ?)", (qid, original))

    def close(self) -> int:
        """Find the clusters; how many questions are in one. About 150 bytes of memory for each."""
        self._flush()
        same_text = """SELECT first, qid FROM texts JOIN
            (SELECT digest, min(qid) AS first FROM texts GROUP BY digest HAVING count(DISTINCT qid) > 1) USING (digest)
            WHERE qid != first"""
        edges: Iterable[tuple[int, int]] = self._database.execute(f"SELECT a, b FROM links UNION ALL {same_text}")
        clusters = roots(edges)
        self._database.executemany("INSERT INTO clusters VALUES (?, ?)", sorted(clusters.items()))
        self._database.execute("COMMIT")
        self._database.close()
        return len(clusters)

    def _flush(self) -> None:
        # One id with two names is a damaged table; the later in the alphabet stays, whatever the order of rows.
        self._database.executemany(
            "INSERT INTO users VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET name = max(name, excluded.name)", self._users
        )
        self._database.executemany("INSERT INTO texts VALUES (?, ?)", self._texts)
        self._users, self._texts = [], []


def look_up(path: Path, users: set[int], questions: set[int]) -> tuple[dict[int, str], dict[int, int]]:
    """The names of these users, and the cluster roots of those of these questions that have duplicates."""
    database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        return _select(database, "SELECT id, name FROM users WHERE id", users), _select(
            database, "SELECT qid, root FROM clusters WHERE qid", questions
        )
    finally:
        database.close()


def _select(database: sqlite3.Connection, query: str, ids: set[int]) -> dict[int, Any]:
    wanted = sorted(ids)
    found: dict[int, Any] = {}
    for start in range(0, len(wanted), LOOKUP):
        part = wanted[start : start + LOOKUP]
        found.update(database.execute(f"{query} IN ({','.join('?' * len(part))})", part))
    return found
