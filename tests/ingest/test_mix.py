"""Mixing weights, and clusters of duplicates over many sites."""

import json
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from tasks.ingest import mix
from tasks.ingest.pairs import split_of

SHARES = {"sft": 0.3, "reward": 0.3, "rl": 0.3, "eval": 0.1}
SITES = ("a.test", "b.test", "c.test")


def test_a_weight_keeps_its_share_of_the_questions():
    """Within 4 sigma of 10,000 w, sigma = sqrt(10,000 w (1 - w))."""
    for weight in (0.01, 0.25, 0.5, 0.9):
        count = sum(mix.kept("wood.test", qid, {"wood.test": weight}) for qid in range(10_000))
        assert abs(count - 10_000 * weight) < 4 * (10_000 * weight * (1 - weight)) ** 0.5


@given(st.integers(0, 10**9), st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_what_a_weight_keeps_every_larger_one_keeps(root, one, other):
    low, high = sorted((one, other))
    assert mix.kept("wood.test", root, {"wood.test": low}) <= mix.kept("wood.test", root, {"wood.test": high})
    assert mix.kept("wood.test", root, {"wood.test": 1.0})
    assert mix.kept("wood.test", root, {"oil.test": low})


def test_the_splits_of_what_is_kept_have_the_same_shares():
    """Kept and left out against the four splits, 20,000 questions: independent by the chi-square test (3 degrees of freedom)."""
    counts = Counter((mix.kept("wood.test", q, {"wood.test": 0.4}), split_of("wood.test", q, SHARES)) for q in range(20_000))
    table = [[counts[kept, split] for split in SHARES] for kept in (True, False)]
    assert chi2_contingency(table).pvalue > 0.001


def test_two_sites_are_drawn_independently():
    counts = Counter(tuple(mix.kept(site, q, dict.fromkeys(SITES, 0.5)) for site in SITES[:2]) for q in range(20_000))
    table = [[counts[a, b] for b in (True, False)] for a in (True, False)]
    assert chi2_contingency(table).pvalue > 0.001


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"beer.stackexchang.com": 0.5},
            "beer.stackexchang.com, which is not among the dumps: did you mean beer.stackexchange.com?",
        ),
        ({"xyz": 0.5}, "xyz, which is not among the dumps: the dumps are of ai.stackexchange.com, beer.stackexchange.com"),
        ({"beer.stackexchange.com": 0.0}, "beer.stackexchange.com 0: a share must be above 0 and at most 1"),
        ({"beer.stackexchange.com": 1.01}, "beer.stackexchange.com 1.01: a share must be above 0 and at most 1"),
        ({"beer.stackexchange.com": float("nan")}, "nan: a share must be above 0"),
    ],
)
def test_wrong_weights_are_refused_in_one_line(weights, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        mix.check_weights(weights, ["beer.stackexchange.com", "ai.stackexchange.com"])
    assert "\n" not in str(caught.value)
    mix.check_weights({"ai.stackexchange.com": 1.0}, ["beer.stackexchange.com", "ai.stackexchange.com"])


def expected(texts, links):
    """By a dictionary of sets that are joined one by one: {(site, qid): root} of all that have a partner."""
    group = {}

    def join(a, b):
        merged = group.get(a, {a}) | group.get(b, {b})
        for node in merged:
            group[node] = merged

    holders = defaultdict(list)
    for site, rows in texts.items():
        for digest, qid in rows:
            holders[digest].append((site, qid))
    for nodes in holders.values():
        for node in nodes[1:]:
            join(nodes[0], node)
    for site, rows in links.items():
        for a, b in rows:
            join((site, a), (site, b))
    return {node: min(nodes) for node, nodes in group.items() if len(nodes) > 1}


def write(folder: Path, rows, dtype, pieces: int) -> list[Path]:
    """Records in several files, as the blocks of a scan leave them."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(pieces):
        path = folder / str(number)
        np.array(rows[number::pieces], dtype).tofile(path)
        paths.append(path)
    return paths


def found(clusters: mix.Clusters):
    return {
        (site, qid): (clusters.sites[other], root)
        for site in clusters.sites
        for qid, other, root in zip(*(clusters.column(site, name).tolist() for name in ("qid", "root_site", "root")), strict=True)
    }


def digest(number: int) -> bytes:
    """Spread over the leading bits, as hashes are; the last byte tells apart what begins the same."""
    return (number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big") + bytes(7) + bytes([number % 3])


few = st.integers(1, 12)
rows_of = lambda a, b: st.fixed_dictionaries({}, optional={site: st.lists(st.tuples(a, b), max_size=14) for site in SITES})


@settings(max_examples=60, deadline=None)
@given(
    rows_of(st.integers(0, 9).map(digest), few),
    rows_of(few, few),
    st.integers(1, 3),
    st.sampled_from([24, 100, 10**6]),
    st.randoms(),
)
def test_clusters_are_those_of_a_union_find_whatever_the_files_the_order_and_the_passes(
    tmp_path_factory, texts, links, pieces, pass_bytes, rng
):
    tmp = tmp_path_factory.mktemp("clusters")
    shuffled = [{site: rng.sample(rows, len(rows)) for site, rows in table.items()} for table in (texts, links)]
    files = [
        {site: write(tmp / name / site, rows, dtype, pieces) for site, rows in table.items()}
        for name, table, dtype in (("texts", shuffled[0], mix.TEXT), ("links", shuffled[1], mix.LINK))
    ]
    clusters = mix.find_clusters(*files, tmp / "out", pass_bytes)
    want = expected(texts, links)
    assert found(clusters) == want
    assert len(clusters) == len(want)
    for site in SITES:
        qids = range(0, 14)
        assert mix.look_up(tmp / "out", site, qids) == {q: want[site, q] for q in qids if (site, q) in want}


def test_many_questions_in_many_passes_give_the_same_files_as_in_one(tmp_path):
    """30,000 texts of two sites, every third of them shared, in 1 and in 37 passes; long chains of links come to one root."""
    rng = random.Random(1)
    texts = {site: [(digest(rng.randrange(60_000)), qid) for qid in range(1, 15_001)] for site in SITES[:2]}
    chain = list(range(2, 2_002))
    rng.shuffle(chain)
    links = {"b.test": [(a, b) for a, b in pairwise(chain)] + [(5, 5)]}
    want = expected(texts, links)
    assert len(want) > 5_000
    text_files = {site: write(tmp_path / site, rows, mix.TEXT, 3) for site, rows in texts.items()}
    link_files = {site: write(tmp_path / "links" / site, rows, mix.LINK, 2) for site, rows in links.items()}
    for name, pass_bytes in (("one", 10**9), ("many", 20_000)):
        assert found(mix.find_clusters(text_files, link_files, tmp_path / name, pass_bytes)) == want
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_the_root_of_a_cluster_over_two_sites_is_the_first_by_name_and_number(tmp_path):
    texts = {"b.test": [(digest(1), 3)], "a.test": [(digest(1), 70), (digest(1), 9), (digest(2), 1)]}
    files = {site: write(tmp_path / site, rows, mix.TEXT, 1) for site, rows in texts.items()}
    mix.find_clusters(files, {}, tmp_path / "out")
    assert mix.look_up(tmp_path / "out", "b.test", {3, 4}) == {3: ("a.test", 9)}
    assert mix.look_up(tmp_path / "out", "a.test", [1, 9, 70]) == {9: ("a.test", 9), 70: ("a.test", 9)}
    assert mix.look_up(tmp_path / "out", "a.test", []) == {}
    assert mix.open_clusters(tmp_path / "out").counts == {"a.test": 2, "b.test": 1}


def test_an_unfinished_folder_is_not_taken_for_a_result(tmp_path):
    files = {"a.test": write(tmp_path / "a", [(digest(1), 1), (digest(1), 2)], mix.TEXT, 1)}
    mix.find_clusters(files, {}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / mix.SITES).read_text()) == {"a.test": 2}
    (tmp_path / "out" / mix.SITES).unlink()
    with pytest.raises(FileNotFoundError):
        mix.open_clusters(tmp_path / "out")
