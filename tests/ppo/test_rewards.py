import torch

from tasks.ppo.rewards import normalise_scores, penalise_missing_eos, token_rewards

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


def test_scores_are_centred_scaled_and_clipped():
    assert normalise_scores(torch.tensor([3.0, 7.0, 103.0, -97.0]), mean=3.0, std=2.0, clip=5.0).tolist() == [0.0, 2.0, 5.0, -5.0]


def test_a_response_without_an_end_loses_the_penalty():
    assert penalise_missing_eos(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 1.5).tolist() == [1.0, -0.5]


def test_the_score_lands_on_the_last_real_token():
    zeros = torch.zeros(2, 3)
    assert token_rewards(torch.tensor([2.0, 3.0]), zeros, zeros, MASK, 0.1).tolist() == [[0.0, 0.0, 2.0], [3.0, 0.0, 0.0]]


def test_every_token_pays_its_log_ratio():
    logprobs, ref_logprobs = (
        torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0]]),
        torch.tensor([[-2.0, -2.0, -1.0], [-3.0, 0.0, 0.0]]),
    )
    rewards = token_rewards(torch.tensor([10.0, 20.0]), logprobs, ref_logprobs, MASK, 0.5)
    assert rewards.tolist() == [[-0.5, 0.0, 11.0], [19.0, 0.0, 0.0]]


def test_the_rewards_of_a_response_sum_to_score_minus_its_kl():
    g = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = torch.randn(2, 2, 3, generator=g)
    scores = torch.tensor([1.0, -1.0])
    kl = ((logprobs - ref_logprobs) * MASK).sum(-1)
    assert torch.allclose(token_rewards(scores, logprobs, ref_logprobs, MASK, 0.3).sum(-1), scores - 0.3 * kl, atol=1e-6)
