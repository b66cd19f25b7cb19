"""Training: gradients by comparison, learning by a planted preference, and the step with what it hands over."""

import json
import math
import random
import re

import pytest
import torch

from tasks.compute import Compute
from tasks.models import adapter_parameters, add_lora, load_model, load_tokenizer
from tasks.progress import Progress, Update, listening
from tasks.prompts import encode_query
from tasks.reward.config import RewardConfig
from tasks.reward.data import Encoded, Question, encode, read_questions
from tasks.reward.model import RewardModel, ScoreHead, load_reward, save
from tasks.reward.train import _differences, _sft_samples, accumulate, check_hand_over, fit, index_pairs, score_scale, train
from tasks.sft.config import LoRAConfig

CPU = Compute(device="cpu", threads=1)
CONFIG = RewardConfig(
    questions_per_step=4,
    max_length=96,
    max_query_tokens=48,
    max_new_tokens=8,
    score_samples=30,
    learning_rate=1e-3,
    max_questions=12,
)
WATCHED = [Encoded([5, 6], [[7], [8]], [(0, 1)], [1], 0)]
WORDS = ("oil", "clamp", "bolt", "wheel", "chain", "brush", "flux", "resin", "wax", "blade", "file", "plane")


def untrained(tiny_model, dropout: float = 0.0, seed: int = 1) -> RewardModel:
    model = add_lora(load_model(tiny_model / "model", "fp32", "cpu"), LoRAConfig(r=8, alpha=32, dropout=dropout), "reward", seed)
    return RewardModel(model, "reward", ScoreHead(32, seed))


def planted(tiny_model, n: int, seed: int) -> list[Encoded]:
    """Answers with the word "solder" are preferred to those without it, three answers a question, in any order."""
    tokenizer, rng = load_tokenizer(tiny_model / "model"), random.Random(seed)
    questions = []
    for qid in range(n):
        texts = [rng.choices(WORDS, k=rng.randint(3, 8)) for _ in range(3)]
        good = rng.randrange(3)
        texts[good].insert(rng.randrange(4), "solder")
        pairs = [(good, other) for other in range(3) if other != good]
        question = Question(
            "toy.test", qid, f"How do I fit the {rng.choice(WORDS)}?", [" ".join(t) for t in texts], [0] * 3, pairs, [1, 2]
        )
        questions.append(encode(tokenizer, question, 96, 48))
    return questions


def gradients(reward: RewardModel, batch: list[Encoded], tokens: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    parameters = [*adapter_parameters(reward.model, "reward"), *reward.head.parameters()]
    for parameter in parameters:
        parameter.grad = None
    reward.model.train()
    row = accumulate(reward, batch, CONFIG, tokens)
    return row, [parameter.grad.clone() for parameter in parameters]


@pytest.mark.parametrize("tokens", [1, 150, 500])
def test_accumulated_gradients_equal_those_of_one_big_batch(tiny_model, tokens):
    reward, batch = untrained(tiny_model), planted(tiny_model, 6, seed=0)
    whole, expected = gradients(reward, batch, tokens=1_000_000)
    parts, actual = gradients(reward, batch, tokens=tokens)
    assert parts == pytest.approx(whole, abs=1e-5)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert any(g.abs().max() > 1e-3 for g in actual)


def test_the_loss_is_that_of_two_forwards_a_pair(tiny_model):
    reward, batch = untrained(tiny_model), planted(tiny_model, 3, seed=0)
    row, _ = gradients(reward, batch, tokens=1_000_000)
    loss, won = 0.0, 0.0
    for q in batch:
        for j, k in q.pairs:
            chosen, rejected = (reward.scores([q.query], [q.responses[i]]).item() for i in (j, k))
            loss += (math.log1p(math.exp(rejected - chosen)) + 0.01 * (chosen + rejected) ** 2) / len(q.pairs) / len(batch)
            won += chosen > rejected
    assert row["loss"] == pytest.approx(loss, abs=1e-5)
    assert row["accuracy"] == won / 6


def test_pairs_of_several_questions_point_at_their_own_responses():
    first = Encoded([1], [[2], [3], [4]], [(0, 2), (1, 2)], [1, 3], 0)
    second = Encoded([1], [[5], [6]], [(1, 0)], [2], 0)
    pairs, question, gaps = index_pairs([first, second])
    assert pairs.tolist() == [[0, 2], [1, 2], [4, 3]]
    assert question.tolist() == [0, 0, 1]
    assert gaps.tolist() == [1.0, 3.0, 2.0]


def test_a_planted_preference_is_learnt_and_holds_on_unseen_questions(tiny_model):
    config = CONFIG.model_copy(update={"questions_per_step": 8, "learning_rate": 1e-2, "epochs": 1})
    reward, unseen = untrained(tiny_model, dropout=0.05), planted(tiny_model, 60, seed=2)
    before = (_differences(reward, unseen) > 0).mean()
    curve = fit(config, reward, planted(tiny_model, 320, seed=1), unseen[:10], seed=1, progress=Progress("reward"))
    assert before < 0.75
    assert (_differences(reward, unseen) > 0).mean() > 0.9
    assert curve[-1]["step"] == 40
    # linear to zero: the last of 40 steps still has a fortieth of the peak
    assert [curve[i]["lr"] for i in (0, 20, 39)] == pytest.approx([1e-2, 5e-3, 2.5e-4])
    assert "eval/accuracy" in curve[-1]


def test_the_warm_up_rises_to_the_peak_and_then_falls(tiny_model):
    config = CONFIG.model_copy(update={"questions_per_step": 1, "warmup_steps": 3})
    curve = fit(
        config,
        untrained(tiny_model),
        planted(tiny_model, 8, seed=1),
        planted(tiny_model, 1, seed=2),
        seed=1,
        progress=Progress("reward"),
    )
    assert [row["lr"] / 1e-3 for row in curve] == pytest.approx([0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_diverging_run_stops_and_says_what_to_lower(tiny_model):
    config = CONFIG.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(ValueError, match=r"lower reward\.learning_rate"):
        fit(
            config,
            untrained(tiny_model),
            planted(tiny_model, 40, seed=1),
            planted(tiny_model, 1, seed=2),
            seed=1,
            progress=Progress("reward"),
        )


def test_scores_that_are_all_equal_have_no_scale():
    with pytest.raises(ValueError, match="same score"):
        score_scale(torch.ones(10))
    assert score_scale(torch.tensor([1.0, 3.0])) == (2.0, 1.0)


def test_the_hand_over_fails_when_what_is_on_disk_is_not_what_was_trained(tiny_model, tmp_path):
    reward = untrained(tiny_model)
    probes = [([5, 6], [7, 8]), ([9], [10])]
    expected = reward.scores(*([list(column) for column in zip(*probes, strict=True)]))
    save(reward, tmp_path)
    check_hand_over(load_model(tiny_model / "model", "fp32", "cpu"), tmp_path, "reward", probes, expected)
    ScoreHead(32, seed=99).save(tmp_path)
    with pytest.raises(RuntimeError, match="after save and load the scores of 2 probe texts differ"):
        check_hand_over(load_model(tiny_model / "model", "fp32", "cpu"), tmp_path, "reward", probes, expected)


@pytest.fixture(scope="module")
def step(tiny_model, toy_site, tmp_path_factory):
    out = tmp_path_factory.mktemp("reward")
    updates: list[Update] = []
    with listening(updates.append):
        metrics = train(CONFIG, sft=tiny_model, data=toy_site, out=out, compute=CPU, progress=Progress("reward"))
    return out, metrics, updates


def test_the_step_writes_its_layout_and_nothing_executable(step):
    out, _, _ = step
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "head.safetensors", "score.json",
        "judge/adapter/adapter_config.json", "judge/adapter/adapter_model.safetensors",
        "judge/head.safetensors", "judge/score.json",
        "accuracy.json", "baselines.json", "calibration.json", "curves.json", "REPORT.md",
    }  # fmt: skip


def test_normalised_scores_of_the_sft_models_samples_have_mean_zero_and_spread_one(step, tiny_model, toy_site):
    out, metrics, _ = step
    model, tokenizer = load_model(tiny_model / "model", "fp32", "cpu"), load_tokenizer(tiny_model / "model")
    questions = read_questions(toy_site, "reward", CONFIG.max_questions, CONFIG.seed)
    samples = _sft_samples(CONFIG, model, tokenizer, questions, torch.device("cpu"))
    assert len(samples.queries) == 30
    asked = {tuple(encode_query(tokenizer, q.text, 48)) for q in questions}
    assert {tuple(query) for query in samples.queries} == asked
    for folder in (out, out / "judge"):
        reward = load_reward(load_model(tiny_model / "model", "fp32", "cpu"), folder, "any name")
        scores = reward.normalise(reward.scores(samples.queries, samples.responses))
        assert scores.mean().item() == pytest.approx(0, abs=1e-4)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert metrics["score_std"] > 0


def test_accuracy_and_baselines_are_on_the_same_pairs_and_stand_in_the_metrics(step):
    out, metrics, _ = step
    accuracy, rivals = json.loads((out / "accuracy.json").read_text()), json.loads((out / "baselines.json").read_text())
    assert (
        accuracy["reward"]["n_pairs"] == accuracy["judge"]["n_pairs"] == rivals["longer_wins"]["n_pairs"] == metrics["eval_pairs"]
    )
    assert sum(row["n_pairs"] for row in accuracy["reward"]["by_gap"].values()) == metrics["eval_pairs"]
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    assert metrics["best_baseline"] == max(rivals[name]["accuracy"] for name in ("longer_wins", "markup_wins", "tfidf"))
    assert "best_possible" not in metrics  # the toy site's truth is not known
    assert all(isinstance(value, str | int | float) for value in metrics.values())


def test_the_judge_is_another_model_than_the_reward_model(step, tiny_model):
    out, _, _ = step
    reward = load_reward(load_model(tiny_model / "model", "fp32", "cpu"), out, "reward")
    judge = load_reward(reward.model, out / "judge", "judge")
    queries, responses = [[5, 6, 7]] * 3, [[8], [9, 10], [11, 12, 13]]
    assert not torch.allclose(reward.scores(queries, responses), judge.scores(queries, responses), atol=1e-3)


def test_curves_show_both_models_and_progress_reaches_its_total(step):
    out, _, updates = step
    curves = json.loads((out / "curves.json").read_text())
    for name in ("reward", "judge"):
        rows = [row for row in curves if row["model"] == name]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert {"loss", "accuracy", "lr", "eval/accuracy"} <= set(rows[-1])
        assert [(u.done, u.total) for u in updates if u.phase == name] == [(1, 3), (2, 3), (3, 3)]


def test_the_report_shows_the_model_beside_its_baselines_and_a_small_figure(step):
    out, metrics, _ = step
    report = (out / "REPORT.md").read_text()
    assert f"| reward model | {metrics['accuracy']:.1%} |" in report
    assert f"| longer answer wins | {metrics['longer_wins']:.1%} |" in report
    (picture,) = re.findall(r"data:image/png;base64,([\w+/=]+)", report)
    assert len(picture) < 200_000


def test_the_same_config_gives_the_same_bytes(tiny_model, toy_site, tmp_path):
    config = CONFIG.model_copy(update={"max_questions": 4, "max_eval_questions": 4, "score_samples": 8})
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        train(config, sft=tiny_model, data=toy_site, out=folder, compute=CPU, progress=Progress("reward"))
    for path in folders[0].rglob("*.safetensors"):
        assert path.read_bytes() == (folders[1] / path.relative_to(folders[0])).read_bytes()


def test_the_best_possible_accuracy_of_a_simulated_site_is_passed_on(tiny_model, toy_site, tmp_path):
    (data := tmp_path / "data").mkdir()
    (data / "questions").symlink_to(toy_site / "questions")
    (data / "card.json").write_text('{"simulated": true, "best_possible_accuracy": 0.81}')
    (out := tmp_path / "out").mkdir()
    config = CONFIG.model_copy(update={"max_questions": 4, "max_eval_questions": 4, "score_samples": 8})
    metrics = train(config, sft=tiny_model, data=data, out=out, compute=CPU, progress=Progress("reward"))
    assert metrics["best_possible"] == 0.81
    assert "| best possible (the truth is known) | 81.0% |" in (out / "REPORT.md").read_text()


def test_too_few_eval_questions_are_refused_before_training(tiny_model, toy_site, tmp_path):
    config = CONFIG.model_copy(update={"max_eval_questions": 1})
    updates: list[Update] = []
    with listening(updates.append), pytest.raises(ValueError, match=r"reward\.max_eval_questions"):
        train(config, sft=tiny_model, data=toy_site, out=tmp_path, compute=CPU, progress=Progress("reward"))
    assert not updates


@pytest.mark.parametrize("change", [{"max_length": 300}, {"max_new_tokens": 250}])
def test_what_does_not_fit_the_models_context_is_refused_before_training(tiny_model, toy_site, tmp_path, change):
    config = CONFIG.model_copy(update=change)
    with pytest.raises(ValueError, match=r"reward needs .* positions .* the model has 256"):
        train(config, sft=tiny_model, data=toy_site, out=tmp_path, compute=CPU, progress=Progress("reward"))
