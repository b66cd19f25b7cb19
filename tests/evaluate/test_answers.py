from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks.evaluate.answers import Answers, best_of, choose_questions, sample_answers, scores_of, seed_of
from tasks.models import load_model, load_tokenizer


def qids(questions) -> list[int]:
    return [question["qid"] for question in questions]


def test_the_chosen_questions_are_the_same_each_time_and_a_larger_choice_holds_the_smaller(toy_site):
    few, many = qids(choose_questions(toy_site, 5, seed=1)), qids(choose_questions(toy_site, 12, seed=1))
    assert few == qids(choose_questions(toy_site, 5, seed=1)) == sorted(few)
    assert len(few) == 5
    assert set(few) < set(many)
    assert few != qids(choose_questions(toy_site, 5, seed=2))


def test_without_a_limit_all_24_questions_are_asked(toy_site):
    assert qids(choose_questions(toy_site, None, seed=1)) == qids(choose_questions(toy_site, 1000, seed=1)) == list(range(1, 25))


def test_best_of_two_by_hand():
    answers = Answers([["a", "b", "c", "d"]], [[[1], [2], [3], [4]]], np.array([[True, False, True, False]]))
    chosen = best_of(answers, np.array([[0.1, 0.9, 5.0, -5.0]]), 2)
    assert (chosen.texts, chosen.ids, chosen.finished.tolist()) == ([["b", "c"]], [[[2], [3]]], [[False, True]])
    assert chosen.scores["reward"].tolist() == [[0.9, 5.0]]


def test_purposes_have_seeds_of_their_own():
    seeds = [seed_of(1, name) for name in ("base", "sft", "best-of-n", "ppo")] + [seed_of(2, "sft")]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_equal_answers_get_equal_scores_and_each_is_scored_once():
    asked = []

    class Reward:
        def shared_scores(self, queries, responses):
            asked.extend(zip(map(tuple, queries), map(tuple, responses)))
            return torch.rand(len(queries))  # a model whose rounding depends on the batch, at its worst

        def normalise(self, scores):
            return scores

    scores = scores_of(Reward(), [[1, 2], [3]], [[[7, 8], [7, 8], [9]], [[7, 8], [9], [9]]], max_length=100)
    assert scores[0, 0] == scores[0, 1]
    assert scores[1, 1] == scores[1, 2]
    assert scores[0, 0] != scores[1, 0]  # the same words to another question
    assert len(asked) == len(set(asked)) == 4


def test_answers_are_cut_to_what_the_reward_model_was_trained_on():
    seen = []
    reward = SimpleNamespace(shared_scores=lambda q, r: seen.extend(r) or torch.zeros(len(r)), normalise=lambda s: s)
    scores_of(reward, [[1, 2, 3], [1, 2, 3, 4, 5, 6]], [[[5] * 10], [[6] * 10]], max_length=5)
    assert sorted(seen) == [[5, 5], [6]]  # a query that fills everything still leaves the answer a token


@pytest.mark.parametrize("batch_size", [3, 64])
def test_every_sample_of_a_question_is_another_one_whatever_the_batch_size(tiny_model, batch_size):
    tokenizer, model = load_tokenizer(tiny_model / "model"), load_model(tiny_model / "model", "fp32", "cpu")
    told = []
    answers = sample_answers(
        model, tokenizer, [[5, 6, 7], [8, 9]], samples=3, max_new_tokens=6, temperature=1.0, seed=3,
        device=torch.device("cpu"), batch_size=batch_size, told=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert [len(row) for row in answers.ids] == [3, 3]
    assert all(len({tuple(ids) for ids in row}) == 3 for row in answers.ids)
    assert answers.finished.tolist() == [[ids[-1] == tokenizer.eos_token_id for ids in row] for row in answers.ids]
    assert answers.lengths.tolist() == [[len(ids) for ids in row] for row in answers.ids]
    assert told == [(6, 6)]
