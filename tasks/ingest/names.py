"""The authors' names of a site, on disk, so that memory stays flat."""

import json
import sqlite3
from collections.abc import Collection, Iterable
from pathlib import Path

LOOKUP = 30_000  # ids in one query; SQLite takes 32,766


def write_names(path: Path, files: Iterable[Path]) -> None:
    """Join the names that the blocks of a table gave, [[id, name], ...] in JSON, to one database."""
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.executescript(
            """PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -32000; PRAGMA temp_store = FILE;
            CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
            BEGIN;
            """
        )
        for file in files:
            # One id with two names is a damaged table; the later in the alphabet stays, whatever the order of rows.
            database.executemany(
                "INSERT INTO users VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET name = max(name, excluded.name)",
                json.loads(file.read_text()),
            )
        database.execute("COMMIT")
    finally:
        database.close()


def names_of(path: Path, users: Collection[int]) -> dict[int, str]:
    """The names of those of these users that have one."""
    database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        wanted = sorted(users)
        found: dict[int, str] = {}
        for start in range(0, len(wanted), LOOKUP):
            part = wanted[start : start + LOOKUP]
            found.update(database.execute(f"SELECT id, name FROM users WHERE id IN ({','.join('?' * len(part))})", part))
        return found
    finally:
        database.close()
