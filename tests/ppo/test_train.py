"""PPO end to end on the tiny model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tasks.compute import Compute
from tasks.models import load_lora, load_model, load_tokenizer
from tasks.ppo.config import GuardConfig, PPOConfig
from tasks.ppo.queries import EVAL, draw, split_questions, stream
from tasks.ppo.train import train
from tasks.progress import Progress, listening
from tasks.prompts import decode_response, encode_query
from tasks.rollout import generate

COMPUTE = Compute(device="cpu", threads=1)
LENIENT = GuardConfig(max_kl=1000, max_length_ratio=100, max_repetition=1.0)


def config(**changes) -> PPOConfig:
    values = {
        "steps": 3, "batch_size": 16, "minibatch_size": 8, "max_query_tokens": 32, "max_new_tokens": 12, "value_warmup_steps": 1,
        "eval_every": 2, "eval_queries": 8, "learning_rate": 1e-3, "epochs": 2, "guard": LENIENT,
    }  # fmt: skip
    return PPOConfig(**{**values, **changes})


@pytest.fixture
def run(tiny_model, planted_reward, toy_site, tmp_path):
    def run(config, name="out", compute=COMPUTE):
        out = tmp_path / name
        out.mkdir()
        metrics = train(
            config, sft=tiny_model, reward=planted_reward, data=toy_site, out=out, compute=compute, progress=Progress("ppo")
        )
        return metrics, out

    return run


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("value", ["adapter", "policy_trunk"])
def test_a_taste_for_ended_responses_is_learned(run, value):
    learning = {"steps": 16, "batch_size": 64, "minibatch_size": 32, "eval_every": 8, "learning_rate": 6e-3}
    metrics, _ = run(config(**learning, value=value, kl_coef=0.0, missing_eos_penalty=0.0))
    assert metrics["score_after"] > metrics["score_before"] + 0.2
    assert metrics["judge_after"] > metrics["judge_before"] + 0.2
    assert metrics["eos_rate"] > 0.8


def test_the_artifact_is_whole_and_the_saved_policy_writes_the_samples(run, tiny_model, toy_site):
    metrics, out = run(config(steps=4))
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == {
        "policy/adapter_model.safetensors", "policy/adapter_config.json", "value/adapter/adapter_model.safetensors",
        "value/adapter/adapter_config.json", "value/head.safetensors", "samples.json", "curves.json", "preflight.json",
        "guards.json", "REPORT.md",
    }  # fmt: skip
    assert all(isinstance(value, int | float) for value in metrics.values())
    samples = read(out / "samples.json")
    tokenizer = load_tokenizer(tiny_model / "model")
    policy = load_lora(load_model(tiny_model / "model", "fp32", "cpu"), out / "policy", "default", trainable=False)
    _, questions = split_questions(toy_site, 8)
    queries = [encode_query(tokenizer, q, 32) for q in questions]
    again = generate(policy, tokenizer, queries, max_new_tokens=12, temperature=1.0, seed=stream(1, EVAL, 0), device="cpu")
    assert [s["question"] for s in samples] == questions
    assert [s["after"] for s in samples] == [decode_response(tokenizer, r) for r in again.responses]
    assert metrics["score_before"] == pytest.approx(sum(s["score_before"] for s in samples) / 8)
    assert metrics["score_after"] == pytest.approx(sum(s["score_after"] for s in samples) / 8)


def test_the_best_checkpoint_by_held_out_score_is_kept_the_sft_policy_included(run):
    for seed in (1, 2):
        metrics, out = run(config(steps=4, eval_every=1, learning_rate=3e-2, seed=seed), name=f"seed{seed}")
        scores = {row["step"]: row["eval/score"] for row in read(out / "curves.json") if "eval/score" in row}
        assert set(scores) == {0, 1, 2, 3, 4}
        assert metrics["score_after"] == max(scores.values()) == scores[metrics["best_step"]]


def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(run):
    _, out = run(config())
    checks = {check["name"]: check for check in read(out / "preflight.json")}
    assert all(check["ok"] for check in checks.values())
    assert checks["max |ratio - 1|"]["value"] < 1e-5
    assert checks["|KL| per token"]["value"] == 0
    assert checks["max |reference - base|"]["value"] == 0
    assert len(checks) == 11


def test_the_warm_up_trains_the_critic_and_leaves_the_policy(run):
    _, out = run(config(steps=4, value_warmup_steps=2, eval_every=1))
    rows = read(out / "curves.json")
    rounding = pytest.approx([0.0, 0.0, 0.0], abs=1e-5)
    assert [row["eval/kl"] for row in rows[:3]] == rounding
    assert [row["objective/kl"] for row in rows[1:4]] == rounding  # the third rollout is the untouched policy's
    assert abs(rows[3]["eval/kl"]) > 1e-3
    assert "policy/loss" not in rows[1]


def test_the_critic_learns_while_it_is_trained_alone(run):
    _, out = run(config(steps=11, value_warmup_steps=10, eval_every=11, batch_size=32, value_learning_rate=1e-2))
    rows = read(out / "curves.json")
    assert rows[10]["val/explained_variance"] > rows[1]["val/explained_variance"] + 0.2


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run):
    runs = [run(config(seed=seed), name=f"run{i}") for i, seed in enumerate((1, 1, 2))]
    bits = [[p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()] for _, out in runs]
    assert bits[0] == bits[1]
    assert bits[0] != bits[2]


def test_cutting_a_minibatch_into_passes_changes_nothing(run):
    curves = []
    for tokens in (50, 100_000):
        _, out = run(config(steps=2), name=f"out{tokens}", compute=Compute(device="cpu", threads=1, micro_batch_tokens=tokens))
        curves.append(read(out / "curves.json"))
    for cut, whole in zip(*curves):
        assert cut == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_old_logprobs_are_the_samplers_where_they_agree_with_a_forward_pass(run):
    rows = {}
    for source in ("auto", "forward"):
        _, out = run(config(value="policy_trunk", old_logprobs=source), name=source)
        rows[source] = read(out / "curves.json")
    measured = [[k for k in row if k.startswith("sampling/")] for row in rows["auto"]]
    assert [bool(names) for names in measured] == [False, True, False, False]  # one pass, at the first rollout, which decides
    for ours, forward in zip(rows["auto"], rows["forward"]):
        assert {k: v for k, v in forward.items() if k in ours} == pytest.approx(ours, rel=1e-3, abs=1e-4)
    assert max(row["sampling/max_difference"] for row in rows["forward"][1:]) <= 1e-5


def test_in_bf16_old_logprobs_are_a_forward_passes(run):
    _, out = run(config(dtype="bf16", steps=2))
    assert all("sampling/max_difference" in row for row in read(out / "curves.json")[1:])


def test_the_samplers_logprobs_of_another_engine_are_refused():
    with pytest.raises(ValueError, match="use auto"):
        config(engine="vllm", old_logprobs="rollout")


def test_alarms_raise_the_kl_coefficient_then_roll_back_then_stop(run):
    # the planted taste makes responses short, which this guard does not have
    learning = {"steps": 40, "batch_size": 32, "minibatch_size": 32, "epochs": 4, "eval_every": 40, "learning_rate": 1e-2}
    notes = []
    with listening(lambda update: notes.append(update.note)):
        metrics, out = run(config(**learning, kl_coef=0.01, kl_target=None, guard=GuardConfig(max_length_ratio=1.2)))
    alarms = read(out / "guards.json")["alarms"]
    assert [alarm["action"] for alarm in alarms] == ["raise_kl", "roll_back", "stop"]
    assert metrics["alarms"] == 3
    assert metrics["steps"] == alarms[2]["step"] - 1
    assert metrics["best_step"] == 0
    rows = {row["step"]: row for row in read(out / "curves.json")}
    assert rows[alarms[0]["step"]]["kl_coef"] == pytest.approx(0.015)
    assert rows[alarms[1]["step"]]["rolled_back_to"] == 0
    assert sum("alarm at step" in note for note in notes) == 3
    policy = load_file(out / "policy" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in policy.items() if "lora_B" in name)  # the SFT policy itself


@pytest.mark.parametrize("base", [{"dtype": "bf16"}, {"quantization": "8bit"}, {"quantization": "4bit"}])
def test_a_rounded_base_passes_its_looser_preflight_and_keeps_fp32_adapters(run, base):
    metrics, out = run(config(**base, steps=2))
    assert metrics["steps"] == 2
    assert abs(read(out / "curves.json")[2]["eval/kl"]) > 1e-3  # it has learnt something, be it worse
    adapter = load_file(out / "policy" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_a_run_that_diverges_fails_and_says_so(run):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run(config(learning_rate=1e30, max_ratio=1e30, target_kl=1e30))


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="otherwise the ratio is not 1"):
        config(lora={"r": 4, "alpha": 8, "dropout": 0.1})


def test_held_out_queries_are_fixed_and_never_trained_on(toy_site):
    training, held_out = split_questions(toy_site, 8)
    assert (len(training), len(held_out)) == (16, 8)
    assert not set(training) & set(held_out)
    assert split_questions(toy_site, 4)[1] == held_out[:4]
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_questions(toy_site, 24)


def test_every_query_comes_once_an_epoch_in_another_order():
    drawn = [i for step in range(1, 7) for i in draw(9, 6, step, seed=3)]
    epochs = [drawn[k : k + 9] for k in range(0, 36, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert drawn[:6] == draw(9, 6, 1, seed=3) != draw(9, 6, 1, seed=4)
