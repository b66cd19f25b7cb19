"""Evaluation sets in any form, and what is found of them, against brute force with strings."""

import json
import pickle
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.ingest import contamination
from tasks.ingest.contamination import digests, load_sets, open_sets

WORDS = "the a of oil wax saw Straße 中文 été".split()
SENTENCE = "Which of these tools would you use first to take the rust off a plane iron?"  # 16 words
SHORT = "What is the capital of France?"  # 6 words


def write(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def brute_force(sets: list[str], text: str) -> bool:
    """With strings: a run of 13 words in both, or all of an evaluation text of 5 to 12 words."""
    words = words_of(text)
    runs = set()
    for one in map(words_of, sets):
        length = min(13, len(one))
        if length >= 5:
            runs |= {tuple(one[i : i + length]) for i in range(len(one) - length + 1)}
    return any(tuple(words[i : i + n]) in runs for n in range(5, 14) for i in range(len(words) - n + 1))


texts = st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), texts, st.integers(0, 20), st.integers(5, 20))
def test_a_text_is_contaminated_exactly_when_brute_force_finds_it(tmp_path_factory, sets, text, begin, length):
    sets.append(SENTENCE)
    found = load_sets([write(tmp_path_factory.mktemp("sets") / "e.txt", sets)])
    mixed = f"{text} {' '.join(words_of(sets[0])[begin : begin + length])} {text}"  # a piece of an evaluation text, between others
    for one in (text, mixed, *sets):
        assert found.contaminated(one) == brute_force(sets, one)


def test_texts_drawn_from_a_few_words_are_found_as_brute_force_finds_them(tmp_path):
    """Of two words 13 in a row are often the same by chance, 8,192 runs in all: both answers are frequent."""
    rng = random.Random(2)
    draw = lambda size: " ".join(rng.choices(["oil", "wax"], k=size))
    sets = [draw(300), draw(11)]
    found = load_sets([write(tmp_path / "e.txt", sets)])
    answers = [(found.contaminated(text), brute_force(sets, text)) for text in (draw(20) for _ in range(400))]
    assert all(ours == theirs for ours, theirs in answers)
    assert 40 < sum(ours for ours, _ in answers) < 360


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not(tmp_path):
    found = load_sets([write(tmp_path / "e.txt", [SENTENCE])])
    words = SENTENCE.split()
    assert len(words) == 16
    assert found.contaminated("So: " + " ".join(words[3:16]) + " he said")
    assert not found.contaminated("So: " + " ".join(words[3:15]) + " he said")
    assert not found.contaminated(" ".join(words[3:9]) + " and " + " ".join(words[9:16]))
    assert found.contaminated("*WHICH* of `these`\n\n> tools would\tyou use_first to take, the [rust](off) a plane... iron")
    assert len(found) == 4


def test_an_evaluation_text_of_five_to_twelve_words_counts_as_a_whole(tmp_path):
    found = load_sets([write(tmp_path / "e.txt", [SHORT, "one two three four"])])
    assert found.contaminated("Today I ask: what is the capital of FRANCE, please?")
    assert not found.contaminated("what is the capital of Spain")
    assert not found.contaminated("one two three four")


def test_every_form_of_file_gives_the_same(tmp_path):
    records = [{"question": SENTENCE, "n": 3, "choices": {"text": [SHORT, "no"], "label": ["A", "B"]}}, {"question": None}]
    jsonl = tmp_path / "e.jsonl"
    jsonl.write_text("\ufeff" + "\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    table = pa.table(
        {
            "question": pa.array([SENTENCE, None]).dictionary_encode(),
            "n": [3, 4],
            "choices": pa.array([{"text": [SHORT, "no"], "label": ["A", "B"]}, None]),
            "raw": [b"bytes are no text and are not read", b""],
        }
    )
    pq.write_table(table, tmp_path / "e.parquet")
    large = pa.table({"a": pa.array([SENTENCE], pa.large_string()), "b": pa.array([[SHORT]], pa.list_(pa.string()))})
    pq.write_table(large, tmp_path / "l.parquet")
    txt = write(tmp_path / "e.txt", [SENTENCE, SHORT])
    runs = [load_sets([path])._runs.tolist() for path in (txt, jsonl, tmp_path / "e.parquet", tmp_path / "l.parquet")]
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert len(runs[0]) == 4 + 1
    assert load_sets([jsonl, txt, txt])._runs.tolist() == runs[0]


def test_a_saved_set_is_mapped_and_pickles_as_its_path(tmp_path):
    made = load_sets([write(tmp_path / "e.txt", [SENTENCE, SHORT])])
    with pytest.raises(AssertionError, match="save it first"):
        pickle.dumps(made)
    saved = made.save(tmp_path / "saved")
    small = pickle.dumps(saved)
    assert len(small) < 500
    for one in (saved, pickle.loads(small), open_sets(tmp_path / "saved")):
        assert one.contaminated(SENTENCE)
        assert one.contaminated(SHORT)
        assert not one.contaminated("Some other text that nobody ever asked about in an exam of any kind at all")
        assert isinstance(one._sieve.base, np.memmap) or isinstance(one._sieve, np.memmap)


def test_many_numbers_are_held_in_pieces_and_the_sieve_grows_with_them(tmp_path, monkeypatch):
    rng = random.Random(4)
    sets = [" ".join(f"w{rng.randrange(5_000)}" for _ in range(60)) for _ in range(400)]
    path = write(tmp_path / "e.txt", sets)
    whole = load_sets([path])
    assert len(whole) == 400 * 48
    assert len(whole._sieve) >= 8 * len(whole)
    monkeypatch.setattr(contamination, "HELD", 1_000)
    assert load_sets([path])._runs.tolist() == whole._runs.tolist() == sorted(set(whole._runs.tolist()))
    assert all(map(whole.contaminated, sets))


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> contamination.Contamination:
    return load_sets([write(tmp_path_factory.mktemp("sets") / "e.txt", [SENTENCE, SHORT])])


@given(text=st.text(max_size=200))
@example("a" * 10_000)
@example("a b c d e f g h i j k l m n " * 2_000)
@example("\ud800 \ud801 x y z w v")
def test_no_text_is_too_strange(both, text):
    assert both.contaminated(text) is False
    assert both.contaminated(f"{text} {SHORT} {text}") is True


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", b"a", "e.csv: an evaluation set is a file that ends in .parquet, .jsonl, .txt"),
        ("none.txt", None, "none.txt: there is no such evaluation set"),
        ("e.jsonl", b'{"a": "b"}\n{"a": \n', "e.jsonl, line 2: this evaluation set is not JSON a line: "),
        ("e.txt", b"\xff\xfe what", "e.txt: this evaluation set cannot be read: 'utf-8' codec"),
        ("e.parquet", b"no parquet", "e.parquet: this evaluation set cannot be read: "),
        ("s.txt", b"too short\n", "s.txt: no text in it has 5 words"),
    ],
)
def test_a_file_that_is_no_evaluation_set_is_refused_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    good = write(tmp_path / "good.txt", [SENTENCE])
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_sets([good, tmp_path / name])
    assert "\n" not in str(caught.value)


def test_the_digests_name_the_files_and_depend_on_their_content_not_their_place(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    one, other = write(tmp_path / "a" / "e.txt", [SENTENCE]), write(tmp_path / "b" / "e.txt", [SHORT])
    moved = write(tmp_path / "c" / "e.txt", [SENTENCE])
    found = digests([one, other])
    assert list(found) == ["evaluation set e.txt", "evaluation set e.txt (2)"]
    assert digests([other, moved]) == found
    assert digests([]) == {}
    with pytest.raises(ValueError, match="there is no such evaluation set"):
        digests([tmp_path / "none.txt"])
