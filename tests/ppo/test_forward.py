"""The response's log-probabilities and values, against the whole model and torch's own log_softmax."""

import pytest
import torch

from tasks.models import load_model
from tasks.ppo import forward
from tasks.ppo.forward import policy_forward, response_hidden, response_mask, token_logprobs, unpack
from tasks.reward.model import ScoreHead

QUERIES, RESPONSES = [[5, 6, 7], [9, 10, 11, 12, 13], [20]], [[30, 31], [40], [50, 51, 52, 53]]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model / "model", "fp32", "cpu")


def test_logprobs_and_entropy_are_those_of_the_whole_model(model):
    logprobs, entropy = policy_forward(model, QUERIES, RESPONSES, 0.7, 4, "cpu")
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES)):
        with torch.no_grad():
            at = model(torch.tensor([query + response])).logits[0, len(query) - 1 : -1].double() / 0.7
        distribution = torch.distributions.Categorical(logits=at)
        n = len(response)
        assert torch.allclose(logprobs[i, :n].double(), distribution.log_prob(torch.tensor(response)), atol=1e-5)
        assert torch.allclose(entropy[i, :n].double(), distribution.entropy(), atol=1e-5)
        assert not logprobs[i, n:].any()


@pytest.mark.parametrize("chunk_logits", [1, 50, 10**9])
def test_the_gradient_of_the_fused_head_is_autograds(monkeypatch, chunk_logits):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", chunk_logits)
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((6, 5), (11, 5), (11,)))
    tokens, upstream = torch.randint(11, (6,), generator=g), torch.randn(6, generator=g)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logprobs, entropy = token_logprobs(ours, tokens, weight, bias, 0.7)
    expected = torch.log_softmax((theirs @ weight.T + bias) / 0.7, -1)
    assert torch.allclose(logprobs, expected[torch.arange(6), tokens], atol=1e-6)
    assert torch.allclose(entropy, -(expected.exp() * expected).sum(-1), atol=1e-6)
    (logprobs * upstream).sum().backward()
    (expected[torch.arange(6), tokens] * upstream).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_a_value_is_read_before_its_token(model):
    head = ScoreHead(model.config.hidden_size, seed=3)

    def read(responses: list[list[int]]) -> torch.Tensor:
        return unpack(head(response_hidden(model, QUERIES, responses, "cpu"))[:, 0], response_mask(responses, 5, "cpu"))

    with torch.no_grad():
        values, changed = read(RESPONSES), read([[30, 99], [41], [50, 51, 52, 99]])
        states = model(torch.tensor([[20, 50, 51, 52]]), output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(values[2, :4], head(states)[0, :, 0], atol=1e-5)
    assert torch.equal(values, changed)  # so V_t does not know the token t
    assert values.shape == (3, 5)
    assert not values[0, 2:].any()


def test_only_response_rows_are_read(model):
    assert response_hidden(model, QUERIES, RESPONSES, "cpu").shape == (2 + 1 + 4, model.config.hidden_size)
    assert response_mask(RESPONSES, 4, "cpu").sum(-1).tolist() == [2, 1, 4]
