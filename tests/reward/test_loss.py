"""Expected values by hand: log 2, sums and counts."""

import math

import pytest
import torch

from tasks.reward.loss import bradley_terry, centring, pair_weights, reward_loss


def test_equal_rewards_cost_log_two():
    assert bradley_terry(torch.tensor([3.0]), torch.tensor([3.0])).item() == pytest.approx(math.log(2))


def test_odds_of_three_to_one_cost_minus_log_three_quarters():
    # r_j - r_k = log 3 gives P(j preferred) = 3 / (3 + 1)
    assert bradley_terry(torch.tensor([math.log(3)]), torch.tensor([0.0])).item() == pytest.approx(-math.log(0.75))


def test_a_margin_asks_for_that_much_more():
    assert bradley_terry(torch.tensor([5.0]), torch.tensor([3.0]), margin=2.0).item() == pytest.approx(math.log(2))


def test_a_large_difference_costs_nothing_or_itself_and_never_overflows():
    loss = bradley_terry(torch.tensor([1000.0, -1000.0]), torch.tensor([-1000.0, 1000.0]))
    assert loss.tolist() == [0.0, 2000.0]


def test_bf16_scores_are_subtracted_in_fp32():
    # both are bf16 numbers, their difference 1 + 1/128 + 1/256 is not
    chosen, rejected = torch.tensor([1 + 1 / 128]).bfloat16(), torch.tensor([-1 / 256]).bfloat16()
    loss = bradley_terry(chosen, rejected)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(1 + 3 / 256))), rel=1e-6)


def test_only_the_centring_term_sees_a_common_shift():
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.25])
    torch.testing.assert_close(bradley_terry(chosen + 8, rejected + 8), bradley_terry(chosen, rejected))
    assert centring(chosen, rejected).tolist() == [0.0, 0.5625]


def test_each_question_weighs_one_however_many_pairs_it_has():
    weights = pair_weights(torch.tensor([0, 0, 0, 0, 1, 2, 2]))
    assert weights.tolist() == [0.25, 0.25, 0.25, 0.25, 1.0, 0.5, 0.5]


def test_the_loss_is_the_sum_over_questions_of_the_mean_over_pairs():
    # question 0: answers 0, 1, 2 all score 0, three pairs; question 1: answers 3, 4 with odds of three to one, one pair
    scores = torch.tensor([0.0, 0.0, 0.0, math.log(3), 0.0])
    pairs, question = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]]), torch.tensor([0, 0, 0, 1])
    assert reward_loss(scores, pairs, question).item() == pytest.approx(math.log(2) - math.log(0.75))
    # the centring term adds (0 + 0)^2 for the first question and (log 3)^2 for the second
    with_centring = reward_loss(scores, pairs, question, centering=0.01).item()
    assert with_centring == pytest.approx(math.log(2) - math.log(0.75) + 0.01 * math.log(3) ** 2)


def test_repeating_the_pairs_of_a_question_changes_neither_loss_nor_gradient():
    once, pairs = torch.tensor([0.3, -0.4, 1.0], requires_grad=True), [[0, 1], [0, 2], [1, 2]]
    reward_loss(once, torch.tensor(pairs), torch.zeros(3, dtype=torch.long), centering=0.1).backward()
    thrice = once.detach().clone().requires_grad_()
    reward_loss(thrice, torch.tensor(pairs * 3), torch.zeros(9, dtype=torch.long), centering=0.1).backward()
    torch.testing.assert_close(once.grad, thrice.grad)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_by_one_half_at_the_start():
    scores = torch.zeros(2, requires_grad=True)
    reward_loss(scores, torch.tensor([[0, 1]]), torch.tensor([0])).backward()
    assert scores.grad.tolist() == [-0.5, 0.5]
