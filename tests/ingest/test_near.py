"""Near-duplicates: estimates against known Jaccard similarities, the search against brute force, the same result in any order."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from tasks.ingest import near
from tasks.ingest.words import hash_runs, hash_words, words_of

TEXT = "How do I clean a cast-iron pan?\n\nI used soap; *now* it is rusty. Straße, ﬁle, naïve_word 中文 42."
RECORDED = "353a98ead2d39ec7"


def numbers(text: str) -> np.ndarray:
    return np.frombuffer(near.signature(text), "<u4")


def pair_of(similarity: float, rng: random.Random, runs: int = 150) -> tuple[str, str]:
    """Two texts of `runs` different 5-word runs each, s of them in both: similarity = s / (2 runs - s)."""
    shared = round(2 * runs * similarity / (1 + similarity))
    words = [f"w{rng.getrandbits(60)}" for _ in range(2 * runs + 8)]
    length, same = runs + 4, shared + 4
    return " ".join(words[:length]), " ".join(words[:same] + words[length : 2 * length - same])


def exact(one: str, other: str) -> float:
    """Jaccard similarity of the sets of 5-word runs, with strings."""
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), other.split()))
    return len(a & b) / len(a | b)


def test_words_are_those_of_unicode_without_case_and_markup():
    assert [w.decode() for w in words_of("The *Cat_sat* on Straße 7 -- ÉTÉ ﬁne, e\u0301te\u0301!")] == (
        "the cat sat on strasse 7 été fine été".split()
    )
    assert [w.decode() for w in words_of("The *Cat_sat* on `mats[2]`")] == "the cat sat on mats 2".split()


@given(st.text(alphabet="ab Aé_ﬁ*\ud800中", max_size=40), st.text(alphabet="ab _*.", max_size=40))
def test_words_of_ascii_text_are_found_the_same_way_as_in_other_text(any_text, ascii_text):
    assert words_of(ascii_text) == words_of(ascii_text + " é")[:-1]
    assert words_of(any_text) == words_of(any_text.upper().lower()) or not any_text.isascii()


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_runs_have_the_same_number_exactly_when_their_words_are_the_same(words, length):
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    found = hash_runs(hash_words(" ".join(words)), length).tolist()
    assert len(found) == len(runs)
    assert len(set(zip(runs, found))) == len(set(runs)) == len(set(found))


def test_runs_of_a_text_longer_than_the_tables_are_those_of_its_parts():
    words = [str(n % 997) for n in range(20_000)]
    whole = hash_runs(hash_words(" ".join(words)), 5)
    assert whole[15_000:15_006].tolist() == hash_runs(hash_words(" ".join(words[15_000:15_010])), 5).tolist()


def test_a_signature_is_the_same_on_every_machine_and_in_every_process():
    """Recorded; another one here means another choice of questions for the same settings: raise the step's VERSION."""
    ours = hashlib.sha256(near.signature(TEXT)).hexdigest()[:16]
    code = "import sys; from tasks.ingest import near; sys.stdout.buffer.write(near.signature(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", code, TEXT], capture_output=True, check=True, cwd=root, env=environment)
    assert hashlib.sha256(other.stdout).hexdigest()[:16] == ours == RECORDED


def test_a_signature_is_the_least_of_128_affine_images_of_the_mixed_runs():
    """In whole numbers of Python, with MurmurHash3's finalizer, as datasketch documents its scheme affine32."""
    factors, summands = near._permutations().tolist()
    assert all(factor % 2 for factor in factors)
    mixed = []
    for run in {int(number) >> 32 for number in hash_runs(hash_words(TEXT), 5)}:
        h = run ^ (run >> 16)
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        mixed.append(h ^ (h >> 16))
    want = [min((a * h + b) % 2**32 for h in mixed) for a, b in zip(factors, summands, strict=True)]
    assert numbers(TEXT).tolist() == want


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8, 0.95])
def test_the_estimate_is_the_jaccard_similarity(similarity):
    """The mean of 120 pairs is within 4 sigma, sigma = sqrt(J (1 - J) / 128 / 120); the spread that of 128 fair coins."""
    rng = random.Random(similarity)
    pairs = [pair_of(similarity, rng) for _ in range(120)]
    known = exact(*pairs[0])
    assert known == pytest.approx(similarity, abs=0.01)
    estimates = np.array([(numbers(a) == numbers(b)).mean() for a, b in pairs])
    sigma = (known * (1 - known) / 128) ** 0.5
    assert abs(estimates.mean() - known) < 4 * sigma / 120**0.5
    assert 0.75 * sigma < estimates.std() < 1.25 * sigma


def test_the_s_curve_is_the_one_in_the_book():
    """20 bands of 5 rows: figure 3.8 of Leskovec, Rajaraman and Ullman, Mining of Massive Datasets."""
    book = {0.2: 0.006, 0.3: 0.047, 0.4: 0.186, 0.5: 0.470, 0.6: 0.802, 0.7: 0.975, 0.8: 0.9996}
    assert {s: near.found_share(s, 20, 5) for s in book} == pytest.approx(book, abs=0.0006)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_the_bands_fit_the_signature_find_the_pairs_and_are_as_selective_as_they_can(threshold):
    bands, rows = near.banding(threshold)
    assert bands * rows <= 128
    assert near.found_share(threshold, bands, rows) >= 0.99
    assert rows == 32 or near.found_share(threshold, 128 // (rows + 1), rows + 1) < 0.99


def write(path: Path, rows) -> Path:
    path.write_bytes(b"".join(near.record(*row) for row in rows))
    return path


def test_pairs_are_found_as_often_as_theory_says(tmp_path):
    """200 pairs at each similarity, threshold 0.7: found when a binomial of (128, J) reaches 90, as nearly every such pair
    shares a band; within 4 sigma and 1 %.
    """
    rng, dropped_share = random.Random(5), {}
    similarities = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
    rows, known = [], {}
    for place, similarity in enumerate(similarities):
        for number in range(200):
            one, other = pair_of(similarity, rng)
            known.setdefault(similarity, exact(one, other))
            rows += [(0, 1000 * place + 2 * number, 9, one), (0, 1000 * place + 2 * number + 1, 3, other)]
    dropped = near.near_duplicates([write(tmp_path / "s", rows)], ["wood.test"], 0.7, tmp_path / "near").qids("wood.test")
    assert set((dropped % 2).tolist()) == {1}  # never the one with more votes
    for place, similarity in enumerate(similarities):
        dropped_share[similarity] = float(np.mean(dropped // 1000 == place) * len(dropped) / 200)
        theory = float(binom.sf(89, 128, known[similarity]))
        assert abs(dropped_share[similarity] - theory) < 4 * (theory * (1 - theory) / 200) ** 0.5 + 0.01
    assert dropped_share[0.5] == 0
    assert dropped_share[0.9] == 1


WORDS = "oil wax saw file rasp".split()
edits = st.lists(st.tuples(st.integers(0, 29), st.sampled_from(WORDS)), max_size=8)
corpora = st.lists(st.tuples(st.integers(0, 3), edits, st.integers(-2, 3), st.sampled_from("ab")), min_size=2, max_size=14)


def brute_force(rows, threshold: float) -> set[tuple[str, int]]:
    """Down the ranks, against every kept one, where one band at least agrees."""
    bands, size = near.banding(threshold)
    kept: list[np.ndarray] = []
    dropped = set()
    for site, qid, _votes, text in sorted(rows, key=lambda row: (-row[2], row[0], row[1])):
        mine = numbers(text)
        equal = [mine == other for other in kept]
        similar = [e for e in equal if e.sum() >= threshold * 128 and any(e[b * size : (b + 1) * size].all() for b in range(bands))]
        if similar:
            dropped.add((site, qid))
        elif words_of(text):
            kept.append(mine)
    return dropped


@settings(max_examples=30, deadline=None)
@given(corpora, st.sampled_from([0.6, 0.7, 0.9]), st.integers(1, 3), st.sampled_from([40, 10**6]), st.randoms())
def test_what_is_dropped_is_what_brute_force_drops_in_any_order_of_files_and_sites(
    tmp_path_factory, corpus, threshold, pieces, pass_bytes, rng
):
    tmp = tmp_path_factory.mktemp("near")
    rows = []
    for number, (base, changes, votes, site) in enumerate(corpus):
        words = [f"{base}{n}" for n in range(30)] if base else []
        for place, word in changes if base else []:
            words[place] = word
        rows.append((f"{site}.test", number // 2, votes, " ".join(words)))
    rows = list({row[:2]: row for row in rows}.values())
    sites = rng.sample(["a.test", "b.test"], 2)
    shuffled = rng.sample(rows, len(rows))
    files = [write(tmp / str(n), [(sites.index(site), *rest) for site, *rest in shuffled[n::pieces]]) for n in range(pieces)]
    dropped = near.near_duplicates(files, sites, threshold, tmp / "out", pass_bytes)
    found = {(site, qid) for site in sites for qid in dropped.qids(site).tolist()}
    assert found == brute_force(rows, threshold)
    assert len(dropped) == len(found)
    assert sorted(path.name for path in (tmp / "out").iterdir()) == ["dropped-00000.npy", "dropped-00001.npy"]


def test_of_equal_texts_the_one_with_most_votes_stays_then_the_first_by_site_and_number(tmp_path):
    rows = [(0, 1, 3, "a b c d e f"), (0, 2, 8, "A b c *d* e f."), (1, 7, 8, "a b c d e f"), (1, 3, 2, "a b c d e f")]
    dropped = near.near_duplicates([write(tmp_path / "s", rows)], ["b.test", "a.test"], 0.9, tmp_path / "out")
    assert dropped.qids("b.test").tolist() == [1, 2]
    assert dropped.qids("a.test").tolist() == [3]
    assert dropped.counts == {"a.test": 1, "b.test": 2}


def test_texts_without_words_are_like_nothing_and_short_ones_only_like_themselves(tmp_path):
    rows = [(0, n, 0, text) for n, text in enumerate(["", "???", "$$", "why", "Why?", "why not", "why not now"])]
    dropped = near.near_duplicates([write(tmp_path / "s", rows)], ["a.test"], 0.3, tmp_path / "out")
    assert dropped.qids("a.test").tolist() == [4]


def test_a_chain_of_small_changes_is_not_thinned_to_its_head(tmp_path):
    """Each text is 0.7 like the next, and 0.5 like the one after that: every second one stays."""
    words = [f"w{n}" for n in range(400)]
    texts = [" ".join(words[20 * n : 20 * n + 124]) for n in range(5)]
    assert [round(exact(texts[0], texts[n]), 2) for n in (1, 2)] == [0.71, 0.5]
    rows = [(0, n, 10 - n, text) for n, text in enumerate(texts)]
    dropped = near.near_duplicates([write(tmp_path / "s", rows)], ["a.test"], 0.58, tmp_path / "out")
    assert dropped.qids("a.test").tolist() == [1, 3]


def test_many_questions_made_from_one_template_take_no_time(tmp_path, monkeypatch):
    """A bucket of 400 is compared to its first 20 only; every text is like every other, so all but the best go anyway."""
    monkeypatch.setattr(near, "MOST_COMPARED", 20)
    words = [f"w{n}" for n in range(200)]
    rows = [(0, n, n, " ".join([*words, f"x{n}"])) for n in range(400)]
    dropped = near.near_duplicates([write(tmp_path / "s", rows)], ["a.test"], 0.8, tmp_path / "out")
    assert dropped.qids("a.test").tolist() == list(range(399))


def test_no_questions_at_all_are_no_near_duplicates(tmp_path):
    assert len(near.near_duplicates([write(tmp_path / "s", [])], ["a.test"], 0.8, tmp_path / "out")) == 0
    assert len(near.near_duplicates([], ["a.test"], 0.8, tmp_path / "none")) == 0


def test_a_machine_without_the_library_is_told_what_to_install(monkeypatch):
    near.check_library()
    monkeypatch.setattr(near.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package datasketch: install stackrlhf\[dedup\]"):
        near.check_library()
