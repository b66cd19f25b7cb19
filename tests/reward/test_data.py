"""Questions as index pairs into answers that are encoded once."""

from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.models import load_tokenizer
from tasks.prompts import encode_query, encode_response
from tasks.reward.data import Encoded, Question, batches_of_questions, encode, read_questions


def write(folder: Path, rows: list[dict], split: str = "reward") -> Path:
    target = folder / "questions" / "site=a.test" / f"split={split}"
    target.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{**row, "contaminated": False} for row in rows]), target / "part-00000.parquet")
    return folder


def row(qid: int, pm_scores: list[int], pairs: list[tuple[int, int]], created: list[datetime] | None = None) -> dict:
    answers = [{"answer_id": 100 - a, "text": f"answer {a}", "pm_score": pm} for a, pm in enumerate(pm_scores)]
    if created:
        answers = [{**answer, "created": date} for answer, date in zip(answers, created, strict=True)]
    pair_list = [{"j": j, "k": k} for j, k in pairs]
    return {"site": "a.test", "qid": qid, "question": f"Question {qid}?", "answers": answers, "pairs": pair_list}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model / "model")


def test_pairs_keep_their_answers_and_gaps_when_unpaired_answers_are_dropped(tmp_path):
    (question,) = read_questions(write(tmp_path, [row(1, [4, 9, 1, 6], [(3, 0), (0, 2)])]), "reward", None, seed=0)
    assert question.answers == ["answer 0", "answer 2", "answer 3"]
    assert [(question.answers[j], question.answers[k]) for j, k in question.pairs] == [
        ("answer 3", "answer 0"),
        ("answer 0", "answer 2"),
    ]
    assert question.gaps == [2, 3]


def test_a_question_without_pairs_teaches_nothing_and_is_left_out(tmp_path):
    rows = [row(1, [1, 0], [(0, 1)]), row(2, [1], [])]
    assert [q.qid for q in read_questions(write(tmp_path, rows), "reward", None, seed=0)] == [1]


def test_a_split_without_any_pair_is_refused_in_one_clear_line(tmp_path):
    (target := tmp_path / "questions" / "site=a.test" / "split=eval").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row(1, [1, 0], [(0, 1)])]).slice(1), target / "part-00000.parquet")
    with pytest.raises(ValueError, match=r"no question of split 'eval' under .* has a preference pair"):
        read_questions(tmp_path, "eval", None, seed=0)


def test_a_limit_takes_a_random_subset_that_the_seed_fixes(toy_site):
    everything = read_questions(toy_site, "reward", None, seed=0)
    some = read_questions(toy_site, "reward", 8, seed=0)
    assert some == read_questions(toy_site, "reward", 8, seed=0)
    assert [q for q in everything if q in some] == some
    assert some != everything[:8]
    assert some != read_questions(toy_site, "reward", 8, seed=1)
    assert read_questions(toy_site, "reward", 10_000, seed=0) == everything


def test_a_smaller_limit_takes_part_of_what_a_larger_one_takes(toy_site):
    large = {q.qid for q in read_questions(toy_site, "reward", 12, seed=0)}
    assert {q.qid for q in read_questions(toy_site, "reward", 5, seed=0)} < large


def test_the_earlier_answer_is_told_by_its_date_and_without_dates_by_its_id(tmp_path):
    dates = [datetime(2020, 1, 1), datetime(2021, 1, 1)]
    (dated,) = read_questions(write(tmp_path / "dated", [row(1, [2, 1], [(0, 1)], dates)]), "reward", None, seed=0)
    assert dated.earliness[0] > dated.earliness[1]
    (undated,) = read_questions(write(tmp_path / "undated", [row(1, [2, 1], [(0, 1)])]), "reward", None, seed=0)
    assert undated.earliness[0] < undated.earliness[1]  # ids 100 and 99


def test_query_and_responses_are_tokenized_as_in_every_other_step(tokenizer):
    question = Question("a.test", 1, "How do I fit the bolt?", ["Use the clamp.", "Oil it."], [0, -1], [(0, 1)], [1])
    encoded = encode(tokenizer, question, max_length=200, max_query_tokens=100)
    assert encoded.query == encode_query(tokenizer, question.text, 100)
    assert encoded.responses == [encode_response(tokenizer, "Use the clamp."), encode_response(tokenizer, "Oil it.")]
    assert encoded.cut == 0


def test_each_distinct_answer_is_encoded_once(tokenizer):
    question = Question("a.test", 1, "How?", ["Oil.", "Wax.", "Oil. "], [0, 0, 0], [(0, 1), (2, 1), (0, 2)], [1, 2, 1])
    encoded = encode(tokenizer, question, max_length=100, max_query_tokens=40)
    assert len(encoded.responses) == 2
    assert encoded.pairs == [(0, 1), (0, 1), (0, 0)]


def test_a_long_answer_is_cut_to_what_the_query_leaves_and_counted(tokenizer):
    question = Question("a.test", 1, "How do I fit the bolt?", ["oil " * 200, "Oil."], [0, 0], [(0, 1)], [1])
    encoded = encode(tokenizer, question, max_length=60, max_query_tokens=40)
    assert len(encoded.query) + len(encoded.responses[0]) == 60
    assert encoded.responses[0][-1] != tokenizer.eos_token_id
    assert encoded.cut == 1


def test_an_answer_that_just_fits_is_not_counted_as_cut(tokenizer):
    question = Question("a.test", 1, "How?", ["Oil it."], [0], [(0, 0)], [1])
    exact = len(encode_query(tokenizer, "How?", 40)) + len(encode_response(tokenizer, "Oil it."))
    assert encode(tokenizer, question, max_length=exact, max_query_tokens=exact - 1).cut == 0


def test_a_query_limit_that_leaves_no_room_for_a_response_is_refused(tokenizer):
    question = Question("a.test", 1, "How?", ["Oil."], [0], [(0, 0)], [1])
    with pytest.raises(ValueError, match=r"reward.max_query_tokens=60 leaves no room .* reward.max_length=60"):
        encode(tokenizer, question, max_length=60, max_query_tokens=60)


def test_micro_batches_hold_whole_questions_in_order_and_keep_to_the_limit():
    questions = [
        Encoded([0] * 4, [[0] * n, [0]], [(0, 1)], [1], 0) for n in (15, 5, 25, 5, 5, 95)
    ]  # 20, 10, 30, 10, 10, 100 tokens
    groups = list(batches_of_questions(questions, max_tokens=30))
    assert [q for group in groups for q in group] == questions
    assert [[q.tokens for q in group] for group in groups] == [[20, 10], [30], [10, 10], [100]]
