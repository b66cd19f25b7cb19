"""The forms that dumps come in, and archives that are none."""

import gzip
import io

import py7zr
import pytest
import zstandard

from tasks.ingest import sources
from tasks.ingest.config import IngestConfig
from tasks.ingest.identity import digest

XML = b"<posts>\n" + b'<row Id="1" PostTypeId="5" />\n' * 50 + b"</posts>"
USERS = b'<users>\n<row Id="1" DisplayName="Ann" />\n</users>'


def pack(path, members, **options):
    with py7zr.SevenZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writef(io.BytesIO(data), name)
    return path


def contents(place, site=None):
    """Site -> table -> bytes."""
    found: dict[str, dict[str, bytes]] = {}
    for one in sources.find((str(place),), site):
        tables = found.setdefault(one.name, {})
        for file in one.files:
            assert (
                sources.read(file, lambda table, chunk, tables=tables: tables.update({table: tables.get(table, b"") + chunk}))
                is None
            )
    return found


def test_each_form_gives_the_same_bytes(tmp_path):
    name = "wood.stackexchange.com"
    whole = {name: {"posts": XML}}
    (tmp_path / f"{name}.xml").write_bytes(XML)
    (tmp_path / f"{name}.xml.gz").write_bytes(gzip.compress(XML))
    (tmp_path / f"{name}.Posts.xml.zst").write_bytes(zstandard.compress(XML[:300]) + zstandard.compress(XML[300:]))
    pack(tmp_path / f"{name}.7z", {"Posts.xml": XML})
    (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in" / name / "posts.XML").write_bytes(XML)
    for form in (f"{name}.xml", f"{name}.xml.gz", f"{name}.Posts.xml.zst", f"{name}.7z", f"in/{name}", f"in/{name}/posts.XML"):
        assert contents(tmp_path / form) == whole, form
        assert contents(tmp_path / form, site="steel.test") == {"steel.test": {"posts": XML}}


@pytest.mark.parametrize(
    "names", [("Posts.xml", "Users.xml"), ("posts.xml", "users.xml"), ("a/dump/Posts.xml", "a/dump/Users.xml")]
)
def test_members_in_lower_case_or_in_a_folder(tmp_path, names):
    path = pack(tmp_path / "wood.test.7z", {"Badges.xml": b"<badges/>", names[0]: XML, "Tags.xml": b"x" * 9_999, names[1]: USERS})
    assert contents(path) == {"wood.test": {"posts": XML, "users": USERS}}


def test_one_archive_a_table_is_joined_from_its_folder(tmp_path):
    pack(tmp_path / "stackoverflow.com-Posts.7z", {"Posts.xml": XML})
    pack(tmp_path / "stackoverflow.com-Users.7z", {"Users.xml": USERS})
    pack(tmp_path / "stackoverflow.com-Votes.7z", {"Votes.xml": b"<votes/>"})
    expected = {"stackoverflow.com": {"posts": XML, "users": USERS}}
    assert contents(tmp_path / "stackoverflow.com-Posts.7z") == expected
    assert contents(tmp_path) == expected


def test_a_folder_of_archives_is_many_sites(tmp_path):
    pack(tmp_path / "a.test.7z", {"Posts.xml": XML})
    pack(tmp_path / "b.test.7z", {"Posts.xml": XML})
    assert list(contents(tmp_path)) == ["a.test", "b.test"]


def test_two_dumps_of_one_site_are_refused(tmp_path):
    for folder in ("2016", "2020"):
        (tmp_path / folder).mkdir()
        pack(tmp_path / folder / "a.test.7z", {"Posts.xml": XML})
    with pytest.raises(ValueError, match="ids of two dumps collide"):
        sources.find((str(tmp_path / "2016"), str(tmp_path / "2020")))
    (tmp_path / "2020" / "a.test.7z").rename(tmp_path / "2020" / "b.test.7z")
    with pytest.raises(ValueError, match=r"ingest\.site can name one dump only"):
        sources.find((str(tmp_path / "2016"), str(tmp_path / "2020")), "c.test")


@pytest.mark.parametrize("name", ["../Posts.xml", "a/../../Posts.xml", "/etc/Posts.xml", "C:/Posts.xml"])
def test_archives_that_leave_their_folder_are_refused(tmp_path, name):
    path = tmp_path / "evil.test.7z"
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.writef(io.BytesIO(XML), "Posts.xml")
        archive.header.files_info.files[-1]["filename"] = name
    with pytest.raises(ValueError, match="leaves the folder"):
        sources.find((str(path),))
    assert [p.name for p in tmp_path.iterdir()] == ["evil.test.7z"]


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = pack(tmp_path / "bomb.test.7z", {"Posts.xml": b"<posts>" + b" " * 70_000_000})
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="which no dump does: refused"):
        sources.find((str(path),))


@pytest.mark.parametrize(("suffix", "pack_one"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_bomb_without_a_declared_size_is_stopped_on_the_way(tmp_path, suffix, pack_one):
    path = tmp_path / f"bomb.test.xml.{suffix}"
    path.write_bytes(pack_one(b"<posts>" + b" " * 70_000_000))
    seen = []
    with pytest.raises(ValueError, match="which no dump does: refused"):
        sources.read(sources.find((str(path),))[0].files[0], lambda table, chunk: seen.append(len(chunk)))
    assert sum(seen) <= 64_000_000


def bad(tmp_path, name, data=b"", members=None, **options):
    path = tmp_path / name
    if members is not None:
        return pack(path, members, **options)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.test.7z", b"not an archive", "corrupt or cut"),
        ("a.test.7z", b"7z\xbc\xaf\x27\x1c" + b"\0" * 40, "corrupt|no Posts.xml in the archive"),
        ("a.test.7z.001", b"7z\xbc\xaf\x27\x1c", r"one volume of several: join them first \(cat a.test.7z.\* > a.test.7z\)"),
        ("a.test.zip", b"PK", "a form that is not supported: give a .7z archive"),
        ("a.test.xml.bz2", b"BZh", "a form that is not supported"),
        ("a.test.xml.gz", b"not gzip", "corrupt .no gzip header."),
        ("a.test.xml.zst", b"not zstd", "corrupt .no zstd header."),
        ("a.test.xml", b"", "the file is empty"),
        ("notes.txt", b"hello", "not a dump: give a .7z archive"),
        ("two words.xml", b"<posts/>", "no name for a site: set ingest.site"),
    ],
)
def test_files_that_cannot_be_read_say_why_and_what_to_do(tmp_path, name, data, message):
    path = bad(tmp_path, name, data)
    with pytest.raises(ValueError, match=message):
        sources.find((str(path),))


def test_a_cut_archive_says_so(tmp_path):
    path = pack(tmp_path / "a.test.7z", {"Posts.xml": XML * 100})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="corrupt or cut"):
        sources.find((str(path),))


def test_flipped_bits_in_an_archive_are_noticed(tmp_path):
    path = pack(tmp_path / "a.test.7z", {"Posts.xml": bytes(range(256)) * 100})
    data = bytearray(path.read_bytes())
    data[100] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match="corrupt or cut"):
        sources.read(sources.find((str(path),))[0].files[0], lambda table, chunk: None)


def test_flipped_bits_in_gzip_are_noticed(tmp_path):
    path = bad(tmp_path, "a.test.xml.gz", gzip.compress(XML)[:-6] + b"\1\2\3\4\5\6")
    with pytest.raises(ValueError, match="the file is corrupt"):
        sources.read(sources.find((str(path),))[0].files[0], lambda table, chunk: None)


def test_a_cut_gzip_keeps_what_stands_before_the_cut(tmp_path):
    path = bad(tmp_path, "a.test.xml.gz", gzip.compress(XML)[:-10])
    seen = []
    reason = sources.read(sources.find((str(path),))[0].files[0], lambda table, chunk: seen.append(chunk))
    assert reason == "a.test.xml.gz ends in the middle of its compressed stream"
    assert seen
    assert XML.startswith(b"".join(seen))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"Badges.xml": b"<badges/>"}, "no Posts.xml in the archive; it holds Badges.xml"),
        ({"site.7z": b"7z"}, "it holds site.7z: unpack it and give that"),
        ({"a/Posts.xml": XML, "b/Posts.xml": XML}, "holds a/Posts.xml and b/Posts.xml: give one site an archive"),
    ],
)
def test_archives_without_one_posts_table(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        sources.find((str(pack(tmp_path / "a.test.7z", members)),))


def test_an_encrypted_archive_is_named_so(tmp_path):
    path = pack(tmp_path / "a.test.7z", {"Posts.xml": XML}, password="secret")
    with pytest.raises(ValueError, match="the archive is encrypted: unpack it first"):
        sources.find((str(path),))


def test_errors_of_the_reader_are_not_blamed_on_the_archive(tmp_path):
    path = pack(tmp_path / "a.test.7z", {"Posts.xml": XML})

    def fail(table: str, chunk: bytes) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        sources.read(sources.find((str(path),))[0].files[0], fail)


def test_absent_places_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        sources.find((str(tmp_path / "nowhere"),))
    with pytest.raises(ValueError, match=r"no Posts.xml \(.gz, .zst\) and no .7z archive"):
        sources.find((str(tmp_path),))
    (tmp_path / "Users.xml").write_bytes(USERS)
    with pytest.raises(ValueError, match="no Posts table of"):
        sources.find((str(tmp_path),))


def test_the_digest_is_of_names_and_content_and_not_of_the_place(tmp_path):
    one, two = tmp_path / "one" / "a.test.xml", tmp_path / "two" / "a.test.xml"
    for path in (one, two):
        path.parent.mkdir()
        path.write_bytes(XML)
    first = digest(IngestConfig(dump=(str(one),)))
    assert first == digest(IngestConfig(dump=(str(two),)))
    assert list(first) == ["a.test: a.test.xml"]
    two.write_bytes(XML + b"\n")
    assert first != digest(IngestConfig(dump=(str(two),)))
    one.rename(tmp_path / "one" / "b.test.xml")
    assert first != digest(IngestConfig(dump=(str(tmp_path / "one" / "b.test.xml"),)))


def test_planning_already_says_that_there_is_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        digest(IngestConfig(dump=(str(tmp_path / "x.7z"),)))
    with pytest.raises(ValueError, match=r"give a StackExchange dump with --dump, or set ingest\.simulate"):
        digest(IngestConfig())
    assert digest(IngestConfig(simulate={"questions": 3})) == {}
