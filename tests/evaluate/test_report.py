import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tasks.evaluate.report import MARKDOWN_IMAGES, duration, flat, gauge, html, markdown

LOADING = {
    "src",
    "href",
    "srcset",
    "action",
    "data",
    "poster",
    "background",
    "formaction",
    "xlink:href",
    "cite",
    "ping",
    "manifest",
}
VOID = {"meta", "img", "br", "link", "input", "hr", "base"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def parsed(page) -> Page:
    return Page(html(page))


def test_what_people_and_models_wrote_is_text_and_never_markup(parsed, page):
    tags = {tag for tag, _ in parsed.tags}
    assert tags.isdisjoint({"script", "iframe", "object", "embed", "form", "link", "base", "a"})
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert parsed.text.count('<script>alert("x")</script>') >= 5 * len(page.samples)
    assert "{{ 7 * 7 }}" in parsed.text


def test_the_page_loads_nothing_from_anywhere(parsed):
    sources = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in LOADING]
    assert len(sources) == 6  # the figures
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    styles = " ".join(attributes.get("style", "") for _, attributes in parsed.tags) + parsed.text
    assert "@import" not in styles
    assert "url(" not in styles


def test_the_page_forbids_scripts_and_connections_to_itself(parsed):
    policy = next(
        attributes["content"] for tag, attributes in parsed.tags if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_the_page_is_well_formed_and_every_figure_has_a_description(parsed):
    assert parsed.open == []
    assert all(attributes["alt"] for tag, attributes in parsed.tags if tag == "img")


def test_it_opens_with_the_verdict_in_plain_words(parsed, page):
    body = parsed.text[parsed.text.index("evaluation on held-out questions") :]
    assert body.index("Better.") < body.index(page.verdict["sentence"]) < body.index("Who answers best")


@pytest.mark.parametrize(("word", "headline"), [("no-evidence", "No evidence."), ("worse", "Worse.")])
def test_each_verdict_has_its_headline(page, word, headline):
    assert headline in Page(html(replace(page, verdict={**page.verdict, "word": word}))).text


def test_authors_licence_lineage_and_credits_are_there(parsed):
    for part in ("CC BY-SA 4.0", "https://x.test/users/1", "0123abcd", "1 min 15 s", "no manifest", "1,234", "50 % of the way"):
        assert part in parsed.text


def test_a_remark_on_reward_hacking_stands_out(page):
    hacked = {**page.verdict, "word": "no-evidence", "reward_hacking": True, "remark": "Reward hacking: it learned to flatter."}
    tags = Page(html(replace(page, verdict=hacked)))
    assert any(attributes.get("class") == "callout hacking" for _, attributes in tags.tags)
    assert "Reward hacking" in markdown(replace(page, verdict=hacked))


def test_a_page_without_curves_samples_card_or_notice_is_still_a_page(page):
    poor = replace(page, samples=[], figures={}, card={}, manifests={}, notice="")
    parsed = Page(html(poor))
    assert parsed.open == []
    assert "Read for yourself" not in parsed.text


def test_the_markdown_report_is_short_and_shows_all_five_writers(page):
    text = markdown(page)
    assert len(text.encode()) < 200_000
    assert sum(map(len, re.findall(r"data:image/png;base64,[^)]+", text))) <= MARKDOWN_IMAGES
    assert text.startswith("## Better\n")
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(rows) for rows in tables] == [2 + 5, 2 + 5]  # scores, and beside SFT: one table would be wider than the page
    for rows in tables:
        assert len({line.count("|") for line in rows}) == 1  # or it would be no table
    assert "&#39;" not in text  # escaped for HTML, it would show as such
    assert "<script>" not in text


def test_beside_a_champion_both_verdicts_are_told_with_who_decided_and_that_each_judge_may_lean_to_its_own(page_with_champion):
    parsed, found = Page(html(page_with_champion)), page_with_champion.verdict["champion"]
    assert parsed.open == []
    assert found["word"] == "no-evidence"
    for part in (found["sentence"], "f00df00df00d", "Mean of both judgesdecides", "may lean to that run’s policy", found["remark"]):
        assert part in parsed.text
    body = parsed.text[parsed.text.index("evaluation on held-out questions") :]
    assert body.index("Better.") < body.index("Beside the champion: no evidence.") < body.index("Who answers best")


def test_the_markdown_report_has_a_table_beside_the_champion(page_with_champion):
    text = markdown(page_with_champion)
    assert "**Beside the champion `f00df00df00d`: no evidence.**" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(rows) for rows in tables] == [2 + 6, 2 + 6, 2 + 4]
    for rows in tables:
        assert len({line.count("|") for line in rows}) == 1
    assert "| Mean of both judges (decides) |" in text


def test_without_a_champion_no_page_speaks_of_one(page):
    assert "hampion" not in Page(html(page)).text.replace("stackrlhf", "")
    assert "hampion" not in markdown(page)


def test_the_gauge_keeps_the_order_of_the_numbers_and_stays_on_the_line():
    found = gauge({"gain": -0.2, "interval": [-0.3, -0.1]})
    assert 0 < found["low"] < found["gain"] < found["high"] < found["zero"] < 100
    assert found["gain"] - found["low"] == pytest.approx(found["high"] - found["gain"])
    assert gauge({"gain": 0.0, "interval": [0.0, 0.0]})["zero"] == pytest.approx(100 * 0.12 / 1.24)


def test_nested_json_becomes_rows():
    nested = {"a": {"b": 1200, "c": [1, 2]}, "d": None, "e": [{"x": 1}], "f": True}
    assert dict(flat(nested)) == {"a.b": "1,200", "a.c": "1, 2", "d": "–", "e": "1 entries", "f": "yes"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (75, "1 min 15 s"), (7500, "2 h 5 min"), (None, "–"), (59.7, "1 min 0 s")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
