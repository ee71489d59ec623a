"""Keep jobs and sounds in one SQLite file in WAL mode: every change is one transaction, whole after kill -9."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .records import OPEN, JobRecord, SoundRecord, State

_VERSION = 1
_SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, created REAL NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL, "order" TEXT NOT NULL,
    error TEXT, started REAL, finished REAL
);
CREATE INDEX jobs_by_time ON jobs (created);
CREATE TABLE sounds (
    id TEXT PRIMARY KEY, created REAL NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, file TEXT NOT NULL,
    seconds REAL NOT NULL, samples INTEGER NOT NULL, sample_rate INTEGER NOT NULL, channels INTEGER NOT NULL,
    subtype TEXT NOT NULL, job TEXT, item INTEGER NOT NULL, parent TEXT, prompt TEXT, seed INTEGER, model TEXT,
    regions TEXT NOT NULL, seams TEXT NOT NULL, peak_db REAL, starred INTEGER NOT NULL, provenance TEXT,
    UNIQUE (job, item)
);
CREATE INDEX sounds_by_time ON sounds (created);
CREATE INDEX sounds_by_file ON sounds (file);
CREATE TABLE rates (name TEXT PRIMARY KEY, seconds REAL NOT NULL);
"""
_JSON = ("regions", "seams", "provenance")
_COLUMNS = tuple(field.name for field in fields(SoundRecord))
_LIST_MAX = 500


class Database:
    """Read and write records. All methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Open the file, made where there is none. Raises ValueError for one of another version of sa3."""
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, _VERSION):
            raise ValueError(f"{path}: its version is {found}, this sa3 reads {_VERSION}; use another --folder")
        if not found:
            self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _rows(self, text: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(text, values).fetchall()

    def add_job(self, job: JobRecord) -> None:
        """Store a new job."""
        values = (job.id, job.created, job.kind, job.state, json.dumps(job.order))
        with self._transaction() as connection:
            connection.execute('INSERT INTO jobs (id, created, kind, state, "order") VALUES (?, ?, ?, ?, ?)', values)

    def job(self, job_id: str) -> JobRecord | None:
        """Return a job, None where there is none."""
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", (job_id,))
        return self._job(rows[0]) if rows else None

    def jobs(self, state: str | None = None, limit: int = 100) -> list[JobRecord]:
        """Return the newest jobs, newest first, of one state or of all."""
        where, values = ("WHERE state = ?", [state]) if state else ("", [])
        text = f"SELECT * FROM jobs {where} ORDER BY created DESC, rowid DESC LIMIT ?"
        return [self._job(row) for row in self._rows(text, [*values, min(limit, _LIST_MAX)])]

    def start_jobs(self, job_ids: Sequence[str], now: float) -> None:
        """Mark jobs as running."""
        with self._transaction() as connection:
            text = "UPDATE jobs SET state = 'running', started = ? WHERE id = ?"
            connection.executemany(text, [(now, job_id) for job_id in job_ids])

    def finish_job(
        self, job_id: str, state: State, now: float, error: str | None = None, sounds: Sequence[SoundRecord] = ()
    ) -> None:
        """Mark a job as over and store what it made, both or neither."""
        with self._transaction() as connection:
            text = "UPDATE jobs SET state = ?, finished = ?, error = ? WHERE id = ?"
            connection.execute(text, (state, now, error, job_id))
            for sound in sounds:
                self._insert(connection, sound)

    def interrupt_jobs(self, now: float) -> int:
        """Mark all jobs that are not over as interrupted; return how many."""
        with self._transaction() as connection:
            marks = ", ".join("?" * len(OPEN))
            text = f"UPDATE jobs SET state = 'interrupted', finished = ? WHERE state IN ({marks})"
            return connection.execute(text, (now, *OPEN)).rowcount

    def add_sound(self, sound: SoundRecord) -> None:
        """Store a sound that no job made."""
        with self._transaction() as connection:
            self._insert(connection, sound)

    @staticmethod
    def _insert(connection: sqlite3.Connection, sound: SoundRecord) -> None:
        values = {name: json.dumps(value) if name in _JSON else value for name, value in asdict(sound).items()}
        marks = ", ".join(f":{name}" for name in _COLUMNS)
        connection.execute(f"INSERT INTO sounds ({', '.join(_COLUMNS)}) VALUES ({marks})", values)

    def sound(self, sound_id: str) -> SoundRecord | None:
        """Return a sound, None where there is none."""
        rows = self._rows("SELECT * FROM sounds WHERE id = ?", (sound_id,))
        return self._sound(rows[0]) if rows else None

    def upload_of(self, file: str) -> SoundRecord | None:
        """Return the upload with this content, None where there is none."""
        rows = self._rows("SELECT * FROM sounds WHERE file = ? AND kind = 'upload'", (file,))
        return self._sound(rows[0]) if rows else None

    def sounds(
        self,
        text: str | None = None,
        *,
        starred: bool = False,
        kind: str | None = None,
        before: float | None = None,
        limit: int = 100,
    ) -> list[SoundRecord]:
        """Return the newest sounds, newest first: with ``text`` in prompt or name, made ``before`` a time."""
        wanted: list[tuple[str, Any]] = []
        if text:
            escaped = "".join(f"\\{letter}" if letter in "%_\\" else letter for letter in text)
            wanted.append((r"coalesce(prompt, '') || ' ' || name LIKE ? ESCAPE '\'", f"%{escaped}%"))
        if starred:
            wanted.append(("starred = ?", 1))
        if kind:
            wanted.append(("kind = ?", kind))
        if before is not None:
            wanted.append(("created < ?", before))
        where = f"WHERE {' AND '.join(condition for condition, _ in wanted)}" if wanted else ""
        values = [value for _, value in wanted]
        query = f"SELECT * FROM sounds {where} ORDER BY created DESC, rowid DESC LIMIT ?"
        return [self._sound(row) for row in self._rows(query, [*values, min(limit, _LIST_MAX)])]

    def family(self, sound_id: str) -> list[SoundRecord]:
        """Return all versions of a sound, oldest first: what it was made from, and all that was made from that."""
        query = """
            WITH RECURSIVE up (id, parent) AS (
                SELECT id, parent FROM sounds WHERE id = ?
                UNION SELECT sounds.id, sounds.parent FROM sounds JOIN up ON sounds.id = up.parent
            ), down (id) AS (
                SELECT id FROM up
                UNION SELECT sounds.id FROM sounds JOIN down ON sounds.parent = down.id
            )
            SELECT sounds.* FROM sounds JOIN down USING (id) ORDER BY created, sounds.rowid LIMIT ?
        """
        return [self._sound(row) for row in self._rows(query, (sound_id, _LIST_MAX))]

    def star(self, sound_id: str, starred: bool) -> None:
        """Mark a sound as a favourite, or not."""
        with self._transaction() as connection:
            connection.execute("UPDATE sounds SET starred = ? WHERE id = ?", (starred, sound_id))

    def delete_sound(self, sound_id: str) -> str | None:
        """Remove a sound; return its file where no other sound has it."""
        with self._transaction() as connection:
            row = connection.execute("SELECT file FROM sounds WHERE id = ?", (sound_id,)).fetchone()
            if row is None:
                return None
            connection.execute("DELETE FROM sounds WHERE id = ?", (sound_id,))
            used = connection.execute("SELECT 1 FROM sounds WHERE file = ?", (row["file"],)).fetchone()
            return None if used else str(row["file"])

    def files(self) -> set[str]:
        """Return the names of all files of sounds."""
        return {row["file"] for row in self._rows("SELECT DISTINCT file FROM sounds")}

    def rates(self) -> dict[str, float]:
        """Return the learned rates, in seconds."""
        return {row["name"]: row["seconds"] for row in self._rows("SELECT * FROM rates")}

    def set_rates(self, rates: dict[str, float]) -> None:
        """Store learned rates."""
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO rates VALUES (?, ?)", list(rates.items()))

    def _job(self, row: sqlite3.Row) -> JobRecord:
        made = self._rows("SELECT id FROM sounds WHERE job = ? ORDER BY item", (row["id"],))
        values = {**dict(row), "order": json.loads(row["order"])}
        return JobRecord(**values, sounds=tuple(sound["id"] for sound in made))

    @staticmethod
    def _sound(row: sqlite3.Row) -> SoundRecord:
        values = {name: json.loads(value) if name in _JSON else value for name, value in dict(row).items()}
        return SoundRecord(**{**values, "starred": bool(row["starred"])})
