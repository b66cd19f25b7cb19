import numpy as np
import pytest
import torch

from tasks import prompts
from tasks.evaluate.answers import Answers
from tasks.evaluate.duel import as_text, score_together
from tasks.models import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model / "model")


def test_what_was_sampled_in_odd_tokens_is_read_like_what_anybody_else_wrote(tokenizer):
    usual = prompts.encode_response(tokenizer, "Use the wheel")
    odd = [*tokenizer.convert_tokens_to_ids(list("ĠUseĠtheĠwheel")), tokenizer.eos_token_id]
    assert odd != usual
    text = prompts.decode_response(tokenizer, odd)
    assert text == "Use the wheel"
    sampled = Answers([[text, text]], [[odd, odd[:-1]]], np.array([[True, False]]))
    read = as_text(sampled, tokenizer)
    assert read.ids == [[usual, usual[:-1]]]  # what did not end by itself gets no end
    assert read.texts == sampled.texts
    assert read.scores == {}


def test_an_empty_answer_is_still_one(tokenizer):
    read = as_text(Answers([[""]], [[[tokenizer.eos_token_id]]], np.array([[False]])), tokenizer)
    assert len(read.ids[0][0]) > 0


class Wavering:
    """A scorer in which nothing but asking once makes equal answers equal."""

    def shared_scores(self, queries, responses):
        return torch.rand(len(responses))

    def normalise(self, scores):
        return scores


def test_equal_answers_of_two_writers_tie_exactly():
    ours = Answers([["a", "b"]] * 3, [[[1], [2]]] * 3, np.ones((3, 2), dtype=bool))
    theirs = Answers([["b", "c"]] * 3, [[[2], [3]]] * 3, np.ones((3, 2), dtype=bool))
    score_together(Wavering(), "judge", [[7], [8], [9]], (ours, theirs), max_length=10)
    assert ours.scores["judge"].shape == theirs.scores["judge"].shape == (3, 2)
    assert (ours.scores["judge"][:, 1] == theirs.scores["judge"][:, 0]).all()
    assert len(np.unique(np.concatenate([ours.scores["judge"], theirs.scores["judge"]], axis=1))) == 9
