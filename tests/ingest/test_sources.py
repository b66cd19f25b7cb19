"""The forms that dumps come in, and archives that are none."""

import gzip
import io
import random

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
        ("a.test.7z.001", b"7z\xbc\xaf\x27\x1c", "corrupt or cut"),
        ("a.test.7z.002", b"7z\xbc\xaf\x27\x1c", "one volume of several: give the first one, a.test.7z.001"),
        ("a.test.zip", b"PK", "a form that is not supported: give a .7z archive"),
        ("a.test.xml.bz2", b"BZh", "a form that is not supported"),
        ("a.test.xml.gz", b"not gzip", "corrupt .no gzip header."),
        ("a.test.xml.zst", b"not zstd", "corrupt .no zstd header."),
        ("a.test.xml", b"", "the file is empty"),
        ("notes.txt", b"hello", "not a dump: give a .7z archive"),
        ("two words.xml", b"<posts/>", r"no name for a site: set ingest\.site,"),
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


def test_the_volumes_of_an_archive_are_read_as_one(tmp_path):
    text = b"".join(b'<row Id="%d" PostTypeId="5" />\n' % number for number in range(20_000))
    whole = pack(tmp_path / "a.test.7z", {"Posts.xml": text, "Users.xml": USERS})
    data = whole.read_bytes()
    key = digest(IngestConfig(dump=(str(whole),)))
    whole.unlink()
    step = len(data) // 11
    for number, start in enumerate(range(0, len(data), step), start=1):
        (tmp_path / f"a.test.7z.{number:03}").write_bytes(data[start : start + step])
    for place in (tmp_path, tmp_path / "a.test.7z.001", tmp_path / "*.7z.*"):
        assert contents(place) == {"a.test": {"posts": text, "users": USERS}}
    assert digest(IngestConfig(dump=(str(tmp_path),))) == key
    (file,) = sources.find((str(tmp_path),))[0].files
    assert (file.name, file.packed) == ("a.test.7z", len(data))
    (tmp_path / "a.test.7z.007").unlink()
    with pytest.raises(ValueError, match="volume 7 of 12 or more is not beside it"):
        sources.find((str(tmp_path),))


def test_random_places_in_volumes_are_those_of_the_whole(tmp_path):
    generator = random.Random(5)
    data = generator.randbytes(10_000)
    for number, start in enumerate((0, 1, 500, 4_096), start=1):
        (tmp_path / f"x.7z.{number}").write_bytes(data[start : [1, 500, 4_096, 10_000][number - 1]])
    with sources.open_file(str(tmp_path / "x.7z.1")) as joined:
        whole = io.BytesIO(data)
        for _ in range(300):
            at, size = generator.randrange(11_000), generator.randrange(6_000)
            assert joined.seek(at) == whole.seek(at)
            assert joined.read(size) == whole.read(size)
        assert joined.seek(-10, io.SEEK_END) == 9_990


def test_gzip_in_several_members_with_zeros_behind_them(tmp_path):
    packed = gzip.compress(XML[:100]) + gzip.compress(b"") + gzip.compress(XML[100:]) + b"\0" * 512
    assert contents(bad(tmp_path, "a.test.xml.gz", packed)) == {"a.test": {"posts": XML}}
    cut = gzip.compress(XML[:100]) + gzip.compress(XML[100:])[:5]
    seen = []
    file = sources.find((str(bad(tmp_path, "b.test.xml.gz", cut)),))[0].files[0]
    assert (
        sources.read(file, lambda table, chunk: seen.append(chunk)) == "b.test.xml.gz ends in the middle of its compressed stream"
    )
    assert b"".join(seen) == XML[:100]
    with pytest.raises(ValueError, match="the file is corrupt"):
        contents(bad(tmp_path, "c.test.xml.gz", gzip.compress(XML) + b"garbage"))


def test_large_files_come_in_large_chunks_whatever_their_form(tmp_path):
    text = random.Random(3).randbytes(4_500_000).hex().encode()
    (tmp_path / "a.test.xml").write_bytes(text)
    (tmp_path / "b.test.xml.gz").write_bytes(gzip.compress(text, 1))
    (tmp_path / "c.test.xml.zst").write_bytes(zstandard.compress(text))
    pack(tmp_path / "d.test.7z", {"Posts.xml": text}, filters=[{"id": py7zr.FILTER_ZSTD, "level": 1}])
    for site in sources.find((str(tmp_path),)):
        chunks: list[bytes] = []
        sources.read(site.files[0], lambda table, chunk, chunks=chunks: chunks.append(chunk))
        assert b"".join(chunks) == text
        assert all(len(chunk) <= 8_000_000 for chunk in chunks)
        assert len(chunks) <= 12, site.name


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (XML, True),
        (b"\xef\xbb\xbf<?xml version='1.0' encoding='utf-8'?>" + XML, True),
        (XML.decode().encode("utf-16"), False),
        (XML.decode().encode("utf-16-be"), False),
        (b'<?xml version="1.0" encoding="windows-1252"?>\n' + XML, False),
    ],
)
def test_only_files_in_utf_8_can_be_cut_anywhere(tmp_path, data, plain):
    file = sources.find((str(bad(tmp_path, "a.test.xml", data)),))[0].files[0]
    assert file.plain is plain
    packed = sources.find((str(bad(tmp_path, "b.test.xml.gz", gzip.compress(data))),))[0].files[0]
    assert packed.plain is False


def test_several_dumps_folders_and_globs_at_once(tmp_path, monkeypatch):
    for name in ("2016/a.test.7z", "2016/b.test.7z", "2020/c.test.7z", "2020/deep/d.test.7z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pack(tmp_path / name, {"Posts.xml": XML})
    (tmp_path / "2020" / "README.md").write_text("hello")
    (tmp_path / "2020" / "e.test.Votes.xml").write_text("<votes/>")
    (tmp_path / "f.test").mkdir()
    (tmp_path / "f.test" / "Posts.xml").write_bytes(XML)
    monkeypatch.chdir(tmp_path)

    def names(*dump):
        return [site.name for site in sources.find(dump)]

    assert names("2016/*.7z") == ["a.test", "b.test"]
    assert names("*/[bc].test.7z") == ["b.test", "c.test"]
    assert names("20??") == ["a.test", "b.test", "c.test"]
    assert names("2020/*") == ["c.test"]
    assert names("**/*.7z", "f.test") == ["a.test", "b.test", "c.test", "d.test", "f.test"]
    assert names("2016", "2016/a.test.7z", "./2016/*", f"file://{tmp_path}/2020") == ["a.test", "b.test", "c.test"]
    with pytest.raises(ValueError, match=r"2021/\*\.7z: nothing matches that is a dump"):
        names("2021/*.7z")
    with pytest.raises(ValueError, match=r"\*\*/\*\.md: nothing matches that is a dump"):
        names("**/*.md")


def test_each_dump_can_be_given_its_sites_name(tmp_path):
    for name in ("old/Posts.xml", "new/Posts.xml", "x.xml", "y.7z", "so/so-Posts.xml", "so/so-Users.xml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(USERS if "Users" in name else XML)
    pack(tmp_path / "y.7z", {"Posts.xml": XML})
    dump = tuple(str(tmp_path / name) for name in ("old", "new/Posts.xml", "x.xml", "y.7z", "so"))
    names = {
        str(tmp_path / "old"): "a.test",
        str(tmp_path / "new" / "Posts.xml"): "b.test",
        "x.xml": "c.test",
        "y": "d.test",
        "so": "e.test",
    }
    found = sources.find(dump, site_names=names)
    assert [site.name for site in found] == ["a.test", "b.test", "c.test", "d.test", "e.test"]
    assert [file.name for file in found[-1].files] == ["so-Posts.xml", "so-Users.xml"]
    assert digest(IngestConfig(dump=dump[3:4], site_names={"y.7z": "d.test"})).keys() == {"d.test: y.7z"}
    for wrong, message in (
        ({"z.7z": "a.test"}, r"site_names: 'z.7z' is no dump that was given: name one of Posts.xml, so-Posts.xml"),
        ({"x.xml": "two words"}, "'two words' is no name for a site"),
        ({"x.xml": "a.test", "y.7z": "a.test"}, "ids of two dumps collide"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.find(dump, site_names=wrong)
    with pytest.raises(ValueError, match="are both set"):
        sources.find(dump, "a.test", site_names=names)


def test_two_dumps_of_one_site_are_refused_before_they_are_opened(tmp_path):
    (tmp_path / "a.test.xml").write_bytes(b"")
    (tmp_path / "a.test.7z").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="ids of two dumps collide"):
        sources.find((str(tmp_path / "a.test.xml"), str(tmp_path / "a.test.7z")))


def test_a_bare_name_is_taken_from_a_mirror_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mirror" / "b.test").mkdir(parents=True)
    pack(tmp_path / "mirror" / "a.test.7z", {"Posts.xml": XML})
    (tmp_path / "mirror" / "b.test" / "Posts.xml").write_bytes(XML)
    for table, data in (("Posts", XML), ("Users", USERS)):
        pack(tmp_path / "mirror" / f"stackoverflow.com-{table}.7z", {f"{table}.xml": data})

    def names(name, archive):
        return [(site.name, len(site.files)) for site in sources.find((name,), archive=archive)]

    assert names("A.test", "mirror/{site}.7z") == [("a.test", 1)]
    assert names("a.test", f"file://{tmp_path}/mirror/{{site}}.7z") == [("a.test", 1)]
    assert names("b.test", "mirror/{site}") == [("b.test", 1)]
    assert names("stackoverflow.com", "mirror/{site}.7z") == [("stackoverflow.com", 2)]
    with pytest.raises(
        ValueError, match=r"c.test: no such file or folder, and where ingest.archive looks is none: mirror/c.test.7z"
    ):
        names("c.test", "mirror/{site}.7z")
    with pytest.raises(ValueError, match=r"ingest.archive=mirror: it must hold \{site\}"):
        names("a.test", "mirror")
    (tmp_path / "a.test").mkdir()  # what is there is meant, before any archive
    (tmp_path / "a.test" / "Posts.xml").write_bytes(XML)
    assert names("a.test", "nowhere/{site}.7z") == [("a.test", 1)]


@pytest.mark.parametrize("name", ["beer", "a.test.7z", "notes.txt", "dumps/a.test", "a..test", "a.test.xml.gz"])
def test_what_is_no_site_name_is_not_asked_for_anywhere(name):
    with pytest.raises(ValueError, match="no such file or folder: check --dump"):
        sources.find((name,), archive="http://127.0.0.1:9/{site}")


def test_unknown_kinds_of_places_are_named():
    with pytest.raises(ValueError, match=r"ftp:// is not supported: give a local path, s3://, https://, or the name of a site"):
        sources.find(("ftp://host/a.test.7z",))


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
