import json

import pytest

from tasks.promote.config import PromoteConfig
from tasks.promote.promote import decide, promote

CONFIG = PromoteConfig()
OLD, NEW = {"key": "aaa", "evaluate": "1"}, {"key": "bbb", "evaluate": "2"}
INTERVALS = {"better": [0.1, 0.3], "no-evidence": [-0.1, 0.3], "worse": [-0.3, -0.1]}


def verdict(word: str, beside: str | None = None) -> dict:
    """Of a candidate against its own sft; and against the champion OLD."""
    low, high = INTERVALS[word]
    found = {"word": word, "gain": (low + high) / 2, "interval": [low, high], "by": "judge", "champion": None}
    return found if beside is None else found | {"champion": verdict(beside) | {"key": OLD["key"], "by": "judges"}}


@pytest.mark.parametrize(("word", "allowed"), [("better", True), ("no-evidence", False), ("worse", False)])
def test_without_a_champion_only_what_is_better_than_its_own_sft_becomes_one(word, allowed):
    decision = decide(CONFIG, verdict(word), None, NEW)
    assert (decision["word"], decision["against"], decision["allowed"], decision["moved"]) == (word, "sft", allowed, allowed)
    assert (decision["champion"], decision["candidate"]) == (None, NEW)
    assert decision["verdicts"]["champion"] is None


@pytest.mark.parametrize(
    ("own", "beside", "allowed"),
    [
        ("better", "better", True),
        ("better", "no-evidence", False),
        ("better", "worse", False),
        ("no-evidence", "better", True),
        ("no-evidence", "no-evidence", False),
        ("no-evidence", "worse", False),
        ("worse", "better", False),
        ("worse", "no-evidence", False),
        ("worse", "worse", False),
    ],
)
def test_the_champion_decides_and_what_is_worse_than_its_own_sft_never_takes_its_place(own, beside, allowed):
    decision = decide(CONFIG, verdict(own, beside), OLD, NEW)
    assert (decision["word"], decision["against"], decision["allowed"], decision["moved"]) == (beside, "champion", allowed, allowed)
    assert (decision["champion"], decision["candidate"]) == (OLD, NEW)
    assert (decision["verdicts"]["sft"]["word"], decision["verdicts"]["champion"]["word"]) == (own, beside)


@pytest.mark.parametrize("own", INTERVALS)
@pytest.mark.parametrize("beside", INTERVALS)
def test_the_reason_is_a_sentence_that_names_pointer_both_verdicts_and_their_numbers(own, beside):
    reason = decide(PromoteConfig(pointer="night-shift"), verdict(own, beside), OLD, NEW)["reason"]
    assert f"against the night-shift the verdict is {beside} (" in reason
    assert f"against its own sft the verdict is {own} (" in reason
    for word in (own, beside):
        assert f"{INTERVALS[word][0]:+.3f} to {INTERVALS[word][1]:+.3f}" in reason
    assert reason.endswith(".")


@pytest.mark.parametrize("word", INTERVALS)
def test_without_a_champion_the_reason_says_so(word):
    reason = decide(CONFIG, verdict(word), None, NEW)["reason"]
    assert ("in place of none" if word == "better" else "stays unset") in reason


@pytest.mark.parametrize(("found", "champion"), [(verdict("better"), OLD), (verdict("better", "better"), None)])
def test_a_verdict_that_met_another_champion_is_refused(found, champion):
    with pytest.raises(ValueError, match=r"compares with the champion .* run evaluate again"):
        decide(CONFIG, found, champion, NEW)


def test_a_candidate_cannot_beat_itself():
    with pytest.raises(ValueError, match="cannot beat itself"):
        decide(CONFIG, verdict("better"), NEW, NEW)


@pytest.mark.parametrize("word", ["good", "", None])
def test_a_verdict_that_is_none_is_refused(word):
    with pytest.raises(ValueError, match="evaluate"):
        decide(CONFIG, {**verdict("better"), "word": word}, None, NEW)


@pytest.mark.parametrize(("word", "interval"), [("better", [0.0, 0.2]), ("better", [-0.1, 0.2]), ("worse", [-0.1, 0.0])])
def test_a_word_that_its_interval_does_not_bear_is_refused(word, interval):
    with pytest.raises(ValueError, match="interval"):
        decide(CONFIG, {**verdict(word), "interval": interval}, None, NEW)
    beside = verdict("better", word)
    with pytest.raises(ValueError, match="against the champion, but its interval"):
        decide(CONFIG, {**beside, "champion": {**beside["champion"], "interval": interval}}, OLD, NEW)


def test_the_decision_is_written_and_deciding_again_writes_the_same(tmp_path):
    (tmp_path / "verdict.json").write_text(json.dumps(verdict("better", "better")))
    metrics = promote(CONFIG, evaluate=tmp_path, champion=OLD, candidate=NEW, out=tmp_path)
    first = (tmp_path / "decision.json").read_bytes()
    assert json.loads(first) == decide(CONFIG, verdict("better", "better"), OLD, NEW)
    assert (metrics["moved"], metrics["against"], metrics["candidate"]) == (True, "champion", "bbb")
    promote(CONFIG, evaluate=tmp_path, champion=OLD, candidate=NEW, out=tmp_path)
    assert (tmp_path / "decision.json").read_bytes() == first


def test_a_folder_without_a_verdict_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"verdict\.json is missing"):
        promote(CONFIG, evaluate=tmp_path, champion=None, candidate=NEW, out=tmp_path)
