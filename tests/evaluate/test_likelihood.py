import pytest
import torch

from tasks.evaluate.likelihood import kl, perplexity, response_logprobs
from tasks.models import load_model

QUERIES, RESPONSES = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [[20, 21], [22, 23, 24, 0], [25]]
HOW = {"device": torch.device("cpu"), "batch_tokens": 1000}


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model / "model", "fp32", "cpu")


def test_logprobs_are_those_of_the_librarys_own_loss(model):
    found = response_logprobs(model, QUERIES, RESPONSES, temperature=1.0, **HOW)
    for query, response, logprobs in zip(QUERIES, RESPONSES, found):
        ids, labels = torch.tensor([query + response]), torch.tensor([[-100] * len(query) + response])
        assert logprobs.shape == (len(response),)
        assert -logprobs.mean().item() == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), abs=1e-5)


def test_batches_change_nothing(model):
    together = response_logprobs(model, QUERIES, RESPONSES, temperature=0.7, **HOW)
    apart = response_logprobs(model, QUERIES, RESPONSES, temperature=0.7, device=torch.device("cpu"), batch_tokens=1)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, apart))


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    assert perplexity([torch.full((3,), 1 / 384).log(), torch.full((9,), 1 / 384).log()]) == pytest.approx(384)


def test_perplexity_weighs_tokens_not_answers():
    # 3 tokens of probability 1/2 and 1 of 1/32: exp of (3 log 2 + 5 log 2) / 4 = 4
    assert perplexity([torch.tensor([0.5, 0.5, 0.5]).log(), torch.tensor([1 / 32]).log()]) == pytest.approx(4)


def test_kl_to_itself_is_zero_and_a_certain_answer_costs_its_surprise():
    logprobs = [torch.tensor([0.5, 0.25]).log(), torch.tensor([1.0]).log()]
    assert kl(logprobs, logprobs).tolist() == [0, 0]
    certain = [torch.zeros(2), torch.zeros(1)]
    assert kl(certain, logprobs) == pytest.approx([torch.tensor(8.0).log().item(), 0])
