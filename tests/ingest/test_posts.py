"""What the attributes of a post mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ingest.posts import host_of, licence_of, moment, pm_score, split_tags, unescape, unescape_all


@pytest.mark.parametrize(
    ("votes", "score"),
    # log2(1 + votes) by hand: 1 -> 1; 2 -> 1.58; 3 -> 2; 4 -> 2.32; 5 -> 2.58; 10 -> 3.46; 11 -> 3.58; 22 -> 4.52; 1023 -> 10
    [(0, 0), (1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (7, 3), (10, 3), (11, 4), (22, 5), (1023, 10)],
)
def test_pm_score_is_the_rounded_logarithm_of_one_more_than_the_votes(votes, score):
    assert pm_score(votes, accepted=False) == score
    assert pm_score(votes, accepted=True) == score + 1


def test_below_zero_votes_the_score_is_minus_one_accepted_or_not():
    assert {pm_score(votes, accepted) for votes in (-1, -2, -50) for accepted in (True, False)} == {-1}


def test_no_number_of_votes_is_halfway_between_two_scores():
    """round() goes to the even neighbour at .5; log2(1 + n) = k + 1/2 has no whole n, as 2^(2k + 1) is no square."""
    for k in range(0, 25):
        edge = 2 ** (k + 0.5) - 1
        assert pm_score(int(edge), accepted=False) == k
        assert pm_score(int(edge) + 1, accepted=False) == k + 1


def test_the_licence_follows_the_day():
    days = {"2011-04-07": "2.5", "2011-04-08": "3.0", "2018-05-01": "3.0", "2018-05-02": "4.0", "2024-01-01": "4.0"}
    found = {day: licence_of(f"{day}T00:00:00.000".encode()) for day in days}
    assert found == {day: f"CC BY-SA {version}" for day, version in days.items()}


def test_tags_of_both_kinds():
    assert split_tags(b"&lt;home-brew&gt;&lt;ale&gt;") == split_tags(b"|home-brew|ale|") == ["home-brew", "ale"]
    assert split_tags(b"") == []


def test_unescape_reads_nothing_twice():
    assert unescape(b"&amp;lt;b&amp;gt; &lt;i&gt; &amp;amp; &amp;#xA; &quot;&apos;") == "&lt;b&gt; <i> &amp; &#xA; \"'"


@given(st.lists(st.text(st.characters(blacklist_characters='"<', blacklist_categories=["Cc", "Cs"])), max_size=5))
def test_many_values_unescape_as_each_alone(texts):
    values = [text.encode() for text in texts]
    assert unescape_all(values) == [unescape(value) for value in values]


def test_references_of_every_kind_among_many_values():
    values = [b"&#233;", b"&amp;#233; &lt;", b"&#x9;&#xA;", b"", b"plain"]
    assert unescape_all(values) == ["\u00e9", "&#233; <", "\t\n", "", "plain"]
    assert unescape_all([]) == []


def test_moments_are_to_the_millisecond():
    assert moment(b"2014-01-21T20:26:05.3830000Z") == moment(b"2014-01-21T20:26:05.383") == b"2014-01-21T20:26:05.383"
    assert moment(b"2014-01-21T20:26:05") == moment(b"2014-01-21T20:26:05Z") == b"2014-01-21T20:26:05.000"
    assert moment(b"2014-01-21T20:26:05.3") == b"2014-01-21T20:26:05.300"


def test_links_go_where_the_site_is_today():
    assert host_of("beer.stackexchange.com") == "alcohol.stackexchange.com"
    assert host_of("beer.meta.stackexchange.com") == "alcohol.meta.stackexchange.com"
    assert host_of("bicycles.meta.stackexchange.com") == "bicycles.meta.stackexchange.com"
    assert host_of("stackoverflow.com") == "stackoverflow.com"
