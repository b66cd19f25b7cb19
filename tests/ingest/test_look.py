"""What stands at a source: which of a site's dumps is the newest, and what tells two versions apart."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tasks.ingest import look as looking
from tasks.ingest.config import IngestConfig
from tasks.ingest.look import look

ROW = '<row Id="{id}" PostTypeId="1" CreationDate="{day}T00:00:00.000" LastActivityDate="{day}T00:00:00.000" Body="x" />'


def dump(path: Path, *days: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(ROW.format(id=number, day=day) for number, day in enumerate(days, 1))
    path.write_text(f"<posts>\n{rows}\n</posts>")
    return path


def names(found) -> list[str]:
    return [Path(one.where).parent.name for one in found.files]


def test_the_newest_of_the_real_snapshots_of_a_site_is_found_by_its_posts(real_dump):
    older, newer = (real_dump(f"{day}/beer.stackexchange.com.7z") for day in ("2016-12", "2020-06"))
    found = look(IngestConfig(dump=(str(older), str(newer))))
    assert found.dump == (str(newer),)
    assert [(one.where, one.site) for one in found.files] == [(str(newer), "beer.stackexchange.com")]
    (line,) = found.passed_over
    assert "is the newest (2020-05-31, its newest post)" in line
    assert f"passed over: {older} (2016-12-10)" in line


def test_its_own_posts_say_more_than_its_path_and_its_time(tmp_path):
    """As when an old dump is packed anew, or put into a folder of today."""
    dump(tmp_path / "2024-04" / "wood.test.xml", "2019-01-01", "2019-03-01")
    newest = dump(tmp_path / "2021-01" / "wood.test.xml", "2020-12-31", "2019-01-01")
    os.utime(newest, (1, 1))
    found = look(IngestConfig(dump=(str(tmp_path / "*" / "wood.test.xml"),)))
    assert names(found) == ["2021-01"]


def test_large_dumps_are_told_apart_by_their_paths_and_without_dates_by_their_times(tmp_path, monkeypatch):
    monkeypatch.setattr(looking, "READ_FOR_ITS_DATE", 0)
    for number, folder in enumerate(("dump_20240402", "2023-12-07", "2024-03")):
        os.utime(dump(tmp_path / folder / "wood.test.xml", "2019-01-01"), (100 - number, 100 - number))
    source = str(tmp_path / "*" / "wood.test.xml")
    assert names(look(IngestConfig(dump=(source,)))) == ["dump_20240402"]
    (tmp_path / "2024-03").rename(tmp_path / "latest")
    os.utime(tmp_path / "latest" / "wood.test.xml", (200, 200))
    assert names(look(IngestConfig(dump=(source,)))) == ["latest"]
    for path in tmp_path.glob(f"*/{Path(source).name}"):
        os.utime(path, (7, 7))
    with pytest.raises(ValueError, match="nothing says which is the newest: put its date into each one's path"):
        look(IngestConfig(dump=(source,)))


def test_every_site_has_its_own_newest_and_the_tables_beside_it(tmp_path):
    for folder, day in (("a", "2019-01-01"), ("b", "2020-01-01")):
        dump(tmp_path / folder / "wood.test" / "Posts.xml", day)
        (tmp_path / folder / "wood.test" / "Users.xml").write_text("<users></users>")
    dump(tmp_path / "a" / "iron.test" / "Posts.xml", "2018-01-01")
    found = look(IngestConfig(dump=(str(tmp_path / "*" / "*.test" / "*.xml"),)))
    shown = sorted(str(Path(one.where).relative_to(tmp_path)) for one in found.files)
    assert shown == ["a/iron.test/Posts.xml", "b/wood.test/Posts.xml", "b/wood.test/Users.xml"]
    alone = look(IngestConfig(dump=(str(tmp_path / "b" / "wood.test" / "Posts.xml"),)))
    assert [Path(one.where).name for one in alone.files] == ["Posts.xml", "Users.xml"]


def test_a_mark_differs_when_the_file_does_and_only_then(tmp_path):
    path = dump(tmp_path / "wood.test.xml", "2019-01-01")
    config = IngestConfig(dump=(str(path),))
    first = look(config).files
    assert look(config).files == first
    before = path.stat()
    path.write_text(path.read_text().replace("2019", "2020"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    (now,) = look(config).files
    assert (now.where, now.site) == (first[0].where, "wood.test")
    assert now.mark != first[0].mark


def test_volumes_are_one_dump_and_each_of_them_counts(tmp_path, real_dump):
    whole = real_dump("2016-12/beer.stackexchange.com.7z").read_bytes()
    for number, part in enumerate((whole[:300_000], whole[300_000:]), 1):
        (tmp_path / f"beer.stackexchange.com.7z.00{number}").write_bytes(part)
    config = IngestConfig(dump=(str(tmp_path),))
    (first,) = look(config).files
    assert len(re.findall("bytes", str(first.mark))) == 2
    os.utime(tmp_path / "beer.stackexchange.com.7z.002", (1, 1))
    assert look(config).files[0].mark != first.mark


def test_names_of_sites_follow_the_dump_that_is_chosen(tmp_path):
    for folder, day in (("a", "2019-01-01"), ("b", "2020-01-01")):
        dump(tmp_path / folder / "Export.xml", day)
    config = IngestConfig(dump=(str(tmp_path / "a" / "Export.xml"), str(tmp_path / "b" / "Export.xml")),
                          site_names={"Export.xml": "wood.test"})  # fmt: skip
    found = look(config)
    assert (names(found), found.site_names) == (["b"], {str(tmp_path / "b" / "Export.xml"): "wood.test"})


def test_what_is_not_there_or_is_cut_is_one_line(tmp_path, real_dump):
    with pytest.raises(ValueError, match="nothing matches that is a dump"):
        look(IngestConfig(dump=(str(tmp_path / "*.7z"),)))
    older, newer = tmp_path / "a" / "beer.stackexchange.com.7z", tmp_path / "b" / "beer.stackexchange.com.7z"
    for path in (older, newer):
        path.parent.mkdir()
        shutil.copy(real_dump("2016-12/beer.stackexchange.com.7z"), path)
    newer.write_bytes(newer.read_bytes()[:400_000])  # while it is being uploaded
    with pytest.raises(ValueError, match="the archive is corrupt or cut"):
        look(IngestConfig(dump=(str(tmp_path / "*" / "*.7z"),)))
