"""The store: files and rows appear and go together, whatever happens in between."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.server.settings import Settings
from sa3_mlx.server.store import pool as pools
from sa3_mlx.server.store.pool import Full
from sa3_mlx.server.store.records import JobRecord, SoundRecord
from sa3_mlx.server.store.store import Store, new_id
from sa3_mlx.server.studio import Studio
from tests.support.command import tone, write_tone
from tests.support.server import body, done


def open_store(folder: Path) -> Store:
    return Store(folder, disk_free=1, upload_max=1 << 20)


def put(store: Store, data: bytes, name: str = "x.wav") -> SoundRecord:
    with store.upload() as taken:
        for start in range(0, len(data), 1000):
            taken.write(data[start : start + 1000])
        return store.add_upload(taken, name)


def everything(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("studio.sqlite")}


def test_uploads_are_kept_once_under_their_hash(tmp_path: Path) -> None:
    store, data = open_store(tmp_path / "s"), write_tone(tmp_path / "x.wav").read_bytes()
    first, second = put(store, data, "one"), put(store, data, "two")
    assert first == second and first.name == "one"
    assert everything(tmp_path / "s") == {first.file} and store.path(first).read_bytes() == data
    assert np.array_equal(store.audio(first), tone(1.0))
    store.delete(first.id)
    assert everything(tmp_path / "s") == set() and store.database.sound(first.id) is None
    store.close()


@pytest.mark.parametrize("kind", ["text", "cut", "empty", "large"])
def test_what_is_no_whole_sound_leaves_nothing(tmp_path: Path, kind: str) -> None:
    store, data = open_store(tmp_path / "s"), write_tone(tmp_path / "x.wav").read_bytes()
    bad = {"text": b"RIFF of nothing" * 9, "cut": data[: len(data) // 2], "empty": b"", "large": b"\0" * (2 << 20)}[
        kind
    ]
    with pytest.raises(ValueError) as caught:
        put(store, bad, "take.wav")
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)
    assert everything(tmp_path / "s") == set() and store.database.sounds() == []
    store.close()


def test_a_full_disk_refuses_uploads_and_fails_jobs(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tone(tmp_path / "x.wav").read_bytes()
    usage = pools.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(pools.shutil, "disk_usage", lambda _: usage._replace(free=0))
        with pytest.raises(Full, match="free some space"):
            put(studio.store, data)
        with pytest.raises(Full):
            studio.submit(body())
    done(studio, studio.submit(body()))


def test_a_disk_that_is_full_at_the_end_fails_the_job_and_leaves_nothing(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = studio.submit(body())
    with monkeypatch.context() as full:
        full.setattr("sa3_mlx.server.engine.results.write_audio", _no_space)
        while studio.job(job.id).state in ("queued", "running"):
            time.sleep(0.002)
    record = studio.job(job.id)
    assert record.state == "failed" and "No space left" in (record.error or "")
    assert everything(studio.settings.folder) == set()


def _no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_one_server_has_a_folder(wanted: Settings) -> None:
    with Studio(wanted), pytest.raises(OSError, match="another process works in this folder"):
        Studio(wanted)
    with Studio(wanted):
        pass


def test_what_a_killed_server_left_is_swept_and_marked(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    kept = put(store, write_tone(tmp_path / "x.wav").read_bytes())
    job = JobRecord(id=new_id(), created=1.0, kind="generate", state="queued", order={})
    store.database.add_job(job)
    store.close()
    (tmp_path / "s" / "incoming" / "half.audio").write_bytes(b"half")
    (tmp_path / "s" / "incoming" / ".half.audio.1.partial").write_bytes(b"half")
    (tmp_path / "s" / "exports" / "x.mp3").write_bytes(b"old")
    orphan = tmp_path / "s" / "files" / "aa" / f"{'a' * 64}.wav"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"nobody's")
    store = open_store(tmp_path / "s")
    assert everything(tmp_path / "s") == {kept.file}
    found = store.database.job(job.id)
    assert store.interrupted == 1 and found is not None and found.state == "interrupted"
    store.close()


def test_jobs_of_a_stopped_server_can_be_queued_again(wanted: Settings) -> None:
    with Studio(replace(wanted, batch_max=1)) as studio:
        long = body(seed=3)
        long["request"]["sampling"] = {"steps": 1000}
        jobs = [studio.submit(long), studio.submit(body(seed=4))]
    with Studio(wanted) as studio:
        assert [studio.job(job.id).state for job in jobs] == ["interrupted", "interrupted"]
        (record,) = done(studio, studio.again(jobs[1].id))
        assert studio.sound(record.sounds[0]).seed == 4


def test_history_is_searched_and_versions_are_a_tree(studio: Studio) -> None:
    first, other = (
        done(studio, studio.submit(body(seed=n, prompt=p)))[0].sounds[0] for n, p in ((1, "bell"), (2, "100%"))
    )
    edit = {
        "source": first,
        "request": {"items": [{"prompt": "kick", "seed": 5}], "inpaint": {"regions": [[0.1, 0.3]]}},
    }
    second = done(studio, studio.submit(edit))[0].sounds[0]
    third = done(studio, studio.submit({**edit, "source": second}))[0].sounds[0]
    side = done(studio, studio.submit({"source": first, "request": {"items": [{"seed": 6}]}}))[0].sounds[0]
    database = studio.store.database
    assert [sound.id for sound in database.family(second)] == [first, second, third, side]
    assert [sound.id for sound in database.sounds("BELL")] == [side, first]
    assert [sound.id for sound in database.sounds("0%")] == [other] and database.sounds("_") == []
    assert [sound.id for sound in database.sounds(kind="inpaint")] == [third, second]
    database.star(third, True)
    assert [sound.id for sound in database.sounds(starred=True)] == [third]
    assert [sound.id for sound in database.sounds(before=studio.sound(other).created, limit=9)] == [first]
    kept = studio.store.audio(studio.sound(third))
    assert np.array_equal(kept[2400:], studio.store.audio(studio.sound(first))[2400:])  # but for the region
    studio.store.delete(first)
    assert [sound.id for sound in database.family(third)] == [second, third]


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    store.database._connection.execute("PRAGMA user_version = 9")
    store.close()
    with pytest.raises(ValueError, match="its version is 9"):
        open_store(tmp_path / "s")
