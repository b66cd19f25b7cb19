import json

import pytest

from tasks.promote.config import PromoteConfig
from tasks.promote.promote import decide, promote

CONFIG = PromoteConfig()
OLD, NEW = {"key": "aaa", "evaluate": "1"}, {"key": "bbb", "evaluate": "2"}
INTERVALS = {"better": [0.1, 0.3], "no-evidence": [-0.1, 0.3], "worse": [-0.3, -0.1]}


def verdict(word: str) -> dict:
    low, high = INTERVALS[word]
    return {"word": word, "gain": (low + high) / 2, "interval": [low, high], "by": "judge"}


@pytest.mark.parametrize(
    ("word", "champion", "allowed", "moved"),
    [
        ("better", None, True, True),
        ("better", OLD, True, True),
        ("better", NEW, True, False),
        ("no-evidence", None, False, False),
        ("no-evidence", OLD, False, False),
        ("no-evidence", NEW, False, False),
        ("worse", None, False, False),
        ("worse", OLD, False, False),
        ("worse", NEW, False, False),
    ],
)
def test_only_better_moves_the_pointer_and_only_once(word, champion, allowed, moved):
    decision = decide(CONFIG, verdict(word), champion, NEW)
    assert (decision["word"], decision["allowed"], decision["moved"]) == (word, allowed, moved)
    assert (decision["champion"], decision["candidate"]) == (champion, NEW)


@pytest.mark.parametrize("word", INTERVALS)
def test_the_reason_is_a_sentence_that_names_pointer_verdict_and_numbers(word):
    reason = decide(PromoteConfig(pointer="night-shift"), verdict(word), OLD, NEW)["reason"]
    assert "night-shift" in reason
    assert word in reason
    assert f"{INTERVALS[word][0]:+.3f} to {INTERVALS[word][1]:+.3f}" in reason
    assert reason.endswith(".")


@pytest.mark.parametrize("word", ["good", "", None])
def test_a_verdict_that_is_none_is_refused(word):
    with pytest.raises(ValueError, match="evaluate"):
        decide(CONFIG, {**verdict("better"), "word": word}, None, NEW)


@pytest.mark.parametrize(("word", "interval"), [("better", [0.0, 0.2]), ("better", [-0.1, 0.2]), ("worse", [-0.1, 0.0])])
def test_a_word_that_its_interval_does_not_bear_is_refused(word, interval):
    with pytest.raises(ValueError, match="interval"):
        decide(CONFIG, {**verdict(word), "interval": interval}, None, NEW)


def test_the_decision_is_written_and_deciding_again_writes_the_same(tmp_path):
    (tmp_path / "verdict.json").write_text(json.dumps(verdict("better")))
    metrics = promote(CONFIG, evaluate=tmp_path, champion=OLD, candidate=NEW, out=tmp_path)
    first = (tmp_path / "decision.json").read_bytes()
    assert json.loads(first) == decide(CONFIG, verdict("better"), OLD, NEW)
    assert metrics["moved"] is True
    promote(CONFIG, evaluate=tmp_path, champion=OLD, candidate=NEW, out=tmp_path)
    assert (tmp_path / "decision.json").read_bytes() == first


def test_a_folder_without_a_verdict_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"verdict\.json is missing"):
        promote(CONFIG, evaluate=tmp_path, champion=None, candidate=NEW, out=tmp_path)
