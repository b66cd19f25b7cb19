"""Training of the reward model and of its independent twin, the judge.

Both are a LoRA adapter and a head on sft's merged, frozen model; the judge learns from another split with another seed, so that
it can tell when PPO has learnt to please the reward model alone. An optimizer step takes `questions_per_step` questions with all
their pairs, and encodes each question once and each distinct answer once.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks import distributed
from tasks.checkpoint import NO_CHECKPOINTS, Checkpoints, load_optimizer, optimizer_state, seed_step
from tasks.compute import Compute, cores, fit_threads, is_small, pass_tokens, prepare
from tasks.distributed import load_frozen
from tasks.models import adapter_parameters, add_lora, causal_lm, checkpoint_gradients, load_tokenizer
from tasks.optim import adamw, clip_gradients, fast_matmul, finite, set_learning_rate, warmup_linear
from tasks.processes import side_by_side
from tasks.progress import Progress
from tasks.prompts import encode_query
from tasks.reward.accuracy import differences, flatten, full_accuracy, wins
from tasks.reward.baselines import baselines
from tasks.reward.calibration import calibrate
from tasks.reward.config import RewardConfig
from tasks.reward.data import Encoded, Question, batches_of_questions, encode, read_questions
from tasks.reward.loss import reward_loss
from tasks.reward.model import RewardModel, ScoreHead, load_reward, save
from tasks.reward.report import write_report
from tasks.rollout import Rollout, generate_shared

CURVE_EVALUATIONS = 8
Curve = list[dict[str, Any]]


def train(
    config: RewardConfig,
    *,
    sft: Path,
    data: Path,
    out: Path,
    compute: Compute,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> dict[str, Any]:
    """Reward model into `out`, judge into `out`/judge; both measured on the eval split beside baselines. Returns the metrics."""
    device = prepare(compute)
    tokenizer = load_tokenizer(sft / "model")
    model: Any = load_frozen(sft / "model", config.dtype, device, config.quantization)
    fit_threads(compute, model)
    _fits(config, causal_lm(model).config.max_position_embeddings)

    evaluated = read_questions(data, "eval", config.max_eval_questions, config.seed)
    if len(evaluated) < 2:
        raise ValueError(
            "the eval split has one question with pairs, calibration needs two: raise reward.max_eval_questions or the data"
        )
    pairs = flatten(evaluated)
    splits = {split: read_questions(data, split, config.max_questions, config.seed) for split in ("reward", config.judge_split)}
    card = json.loads((data / "card.json").read_text())
    rivals = baselines(splits["reward"], evaluated, card.get("best_possible_accuracy"))
    progress.note(f"best baseline on {len(pairs.gap)} eval pairs: {rivals['best']['name']} {rivals['best']['accuracy']:.1%}")

    # before there is an adapter, so these are the SFT model's own
    samples = _sft_samples(config, model, tokenizer, splits["reward"], device)
    encoded_eval = [_encode(config, tokenizer, q) for q in evaluated]
    probes = [(q.query, response) for q in encoded_eval for response in q.responses][:32]

    folders = {"reward": out, "judge": out / "judge"}
    # A small model gains little by a second thread, so there the two learn side by side; the numbers are the same.
    alone = distributed.world().size == 1  # a rank's own processes would be no part of the launch
    together = alone and device.type == "cpu" and is_small(model) and (compute.threads or cores()) >= len(folders)
    own = compute.model_copy(update={"threads": 1}) if together else compute
    jobs = [
        Job(
            name, config, sft, folders[name], splits[split], evaluated, samples, probes, seed, own, progress, checkpoints.part(name)
        )
        for name, split, seed in (("reward", "reward", config.seed), ("judge", config.judge_split, config.seed + 1))
    ]
    del model
    trained = dict(zip(folders, side_by_side(train_one, [(job,) for job in jobs], len(jobs) if together else 1), strict=True))

    read_back: Any = load_frozen(sft / "model", config.dtype, device, config.quantization)  # as the next step will
    for name, folder in folders.items():
        read_back = check_hand_over(read_back, folder, name, probes, torch.tensor(trained[name].expected)).model

    cut = {"responses": sum(len(q.responses) for q in encoded_eval), "responses_cut": sum(q.cut for q in encoded_eval)}
    results = {name: full_accuracy(one.differences, pairs) | cut for name, one in trained.items()}
    calibrations = {name: calibrate(one.differences, pairs.question) for name, one in trained.items()}
    scale = {name: one.scale for name, one in trained.items()}
    curves = [row for one in trained.values() for row in one.curve]
    for file, content in (("accuracy", results), ("baselines", rivals), ("calibration", calibrations), ("curves", curves)):
        (out / f"{file}.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_report(out / "REPORT.md", results=results, rivals=rivals, calibrations=calibrations, scale=scale, curves=curves)
    return _metrics(results, rivals, calibrations, scale)


@dataclass(frozen=True)
class Job:
    """What it takes to train one of the two; small enough to send to another process."""

    name: str
    config: RewardConfig
    sft: Path
    folder: Path
    questions: list[Question]
    evaluated: list[Question]
    samples: Rollout
    """Of the SFT model: their scores' mean and spread are the model's 0 and 1."""
    probes: list[tuple[list[int], list[int]]]
    seed: int
    compute: Compute
    progress: Progress
    checkpoints: Checkpoints = field(default_factory=Checkpoints)


@dataclass(frozen=True)
class Trained:
    curve: Curve
    differences: np.ndarray
    """Score of j minus score of k of every pair of the eval split, (P,)."""
    scale: tuple[float, float]
    expected: list[float]
    """Scores of the probes, before saving."""


def train_one(job: Job) -> Trained:
    """Train the reward model or the judge, measure it, and save it into the job's folder."""
    config, name = job.config, job.name
    device = prepare(job.compute)
    tokenizer = load_tokenizer(job.sft / "model")
    model: Any = load_frozen(job.sft / "model", config.dtype, device, config.quantization)
    fit_threads(job.compute, model)
    model = add_lora(model, config.lora, name, job.seed)
    if job.compute.gradient_checkpointing:
        checkpoint_gradients(model)
    head = ScoreHead(causal_lm(model).config.hidden_size, job.seed).to(device)
    reward = RewardModel(model, name, head, micro_batch_tokens=pass_tokens(job.compute, device))
    encoded_eval = [_encode(config, tokenizer, q) for q in job.evaluated]
    few = min(256, max(16, len(job.questions) // 32))  # so that watching costs little beside training
    watched = encoded_eval[:: max(1, len(encoded_eval) // few)][:few]
    with fast_matmul(model):
        curve = fit(
            config, reward, _Encodings(config, tokenizer, job.questions), watched,
            seed=job.seed, progress=job.progress, checkpoints=job.checkpoints,
        )  # fmt: skip
    for parameter in [*adapter_parameters(model, name), *head.parameters()]:
        parameter.requires_grad_(False)

    job.progress.note(f"{name}: measuring on {len(job.evaluated)} questions of the eval split")
    reward.mean, reward.std = score_scale(reward.shared_scores(job.samples.queries, job.samples.responses))
    job.folder.mkdir(exist_ok=True)
    save(reward, job.folder)
    expected = reward.scores(*_columns(job.probes)).tolist()
    return Trained(curve, _differences(reward, encoded_eval), (reward.mean, reward.std), expected)


def fit(
    config: RewardConfig,
    reward: RewardModel,
    questions: Sequence[Encoded],
    watched: list[Encoded],
    *,
    seed: int,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Curve:
    """AdamW with a linear learning rate to 0, gradient clip 1; -> one dict a step, now and then with the accuracy on `watched`.

    Goes on from the newest of the `checkpoints`, and ends in the bits that it would have ended in without a stop.
    """
    curve: Curve = []
    steps_per_epoch = math.ceil(len(questions) / config.questions_per_step)
    total = steps_per_epoch * config.epochs
    parameters = [*adapter_parameters(reward.model, reward.adapter_name), *reward.head.parameters()]
    optimizer = adamw(parameters, config.learning_rate, config.weight_decay)
    warmup = min(config.warmup_steps, total - 1)
    evaluate_every = max(1, total // CURVE_EVALUATIONS)
    done = 0
    if (state := checkpoints.load()) is not None:
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.copy_(state.tensors[f"parameter/{number}"])
        load_optimizer(optimizer, state.tensors)
        done, curve = state.step, state.values["curve"]
        progress.note(f"{reward.adapter_name}: resumed from step {done} of {total}")
    for step in range(done, total):
        seed_step(seed, step)  # dropout
        epoch, place = divmod(step, steps_per_epoch)
        order = list(range(len(questions)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        batch = [questions[i] for i in order[place * config.questions_per_step :][: config.questions_per_step]]
        learning_rate = config.learning_rate * warmup_linear(step, total, warmup)
        set_learning_rate(optimizer, learning_rate)
        reward.model.train()
        row = accumulate(reward, batch, config, reward.micro_batch_tokens)
        distributed.sum_gradients(parameters)
        row |= {"lr": learning_rate, "grad_norm": clip_gradients(optimizer, 1.0)}
        for quantity in ("loss", "grad_norm"):
            finite(row[quantity], f"{reward.adapter_name}'s {quantity}", step + 1, f"reward.learning_rate={config.learning_rate}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % evaluate_every == 0 or step + 1 == total:
            row["eval/accuracy"] = float(wins(_differences(reward, watched)).mean())
        curve.append({"model": reward.adapter_name, "step": step + 1, **row})
        progress(step + 1, total, phase=reward.adapter_name, **row)
        checkpoints.after_step(
            step + 1,
            lambda: (
                {f"parameter/{n}": p.detach() for n, p in enumerate(parameters)} | optimizer_state(optimizer),
                {"curve": curve},
            ),
        )
    reward.model.eval()
    return curve


def accumulate(reward: RewardModel, batch: list[Encoded], config: RewardConfig, micro_batch_tokens: int) -> dict[str, float]:
    """Add the gradients of the batch's mean loss over questions, this rank's share; -> loss and accuracy of all the batch's pairs.

    Whole questions at a time. The micro-batches and ranks change nothing but the rounding (and the numbers of LoRA's dropout).
    """
    # the longest first, so that the ranks' shares are alike
    share = distributed.mine(sorted(batch, key=lambda q: -q.tokens))
    groups = list(batches_of_questions(share, micro_batch_tokens))
    loss, won = 0.0, 0.0
    for number in range(distributed.rounds(len(groups))):
        if number >= len(groups):  # another rank has more, and a pass over a model that is cut is made by all
            (0 * reward.forward([[0]], [[0]]).sum()).backward()
            continue
        group = groups[number]
        queries, responses = _columns([(q.query, response) for q in group for response in q.responses])
        scores = reward.forward(queries, responses, sum(q.tokens for q in group))  # in one pass
        j_k, question, gap = (tensor.to(scores.device) for tensor in index_pairs(group))
        part = reward_loss(scores, j_k, question, config.gap_margin * gap, config.centering) / len(batch)
        part.backward()
        loss += part.item()
        won += float(((scores[j_k[:, 0]] - scores[j_k[:, 1]]).detach().sign().float() + 1).sum() / 2)
    loss, won = distributed.total(torch.tensor([loss, won], dtype=torch.float64)).tolist()
    return {"loss": loss, "accuracy": won / sum(len(q.pairs) for q in batch)}


def index_pairs(questions: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of several questions as indices into all their responses in a row; -> (P, 2), (P,) question numbers, (P,) gaps."""
    starts = np.cumsum([0, *(len(q.responses) for q in questions)])
    j_k = [(int(starts[n]) + j, int(starts[n]) + k) for n, q in enumerate(questions) for j, k in q.pairs]
    numbers = [n for n, q in enumerate(questions) for _ in q.pairs]
    return torch.tensor(j_k), torch.tensor(numbers), torch.tensor([gap for q in questions for gap in q.gaps], dtype=torch.float32)


def score_scale(scores: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the SFT samples' raw scores; (B,) -> (mean, std)."""
    mean, std = float(scores.double().mean()), float(scores.double().std(correction=0))
    if not (math.isfinite(mean) and std > 1e-8):
        raise ValueError(
            f"the reward model gives {len(scores)} SFT samples the same score (mean {mean}, spread {std}): it has learnt nothing"
        )
    return mean, std


def check_hand_over(
    model: Any, folder: Path, name: str, probes: list[tuple[list[int], list[int]]], expected: Tensor
) -> RewardModel:
    """Load what was saved, as the next step will, and score the probes again: RuntimeError unless the scores are `expected`."""
    loaded = load_reward(model, folder, name)
    error = float((loaded.scores(*_columns(probes)) - expected).abs().max())
    if not error <= 1e-5 * max(1.0, float(expected.abs().max())):
        raise RuntimeError(
            f"{name}: after save and load the scores of {len(probes)} probe texts differ by {error:.2e}: {folder} is wrong"
        )
    return loaded


class _Encodings(Sequence[Encoded]):
    """Questions as tokens, encoded when asked for: a large split stays text in memory."""

    def __init__(self, config: RewardConfig, tokenizer: Any, questions: list[Question]) -> None:
        self.config, self.tokenizer, self.questions = config, tokenizer, questions

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        return _encode(self.config, self.tokenizer, self.questions[index])


def _encode(config: RewardConfig, tokenizer: Any, question: Question) -> Encoded:
    return encode(tokenizer, question, config.max_length, config.max_query_tokens)


def _fits(config: RewardConfig, context: int) -> None:
    longest = max(config.max_length, config.max_query_tokens + config.max_new_tokens)
    if longest > context:
        raise ValueError(
            f"reward needs {longest} positions (max_length={config.max_length}, max_query_tokens={config.max_query_tokens} + "
            f"max_new_tokens={config.max_new_tokens}), the model has {context}: lower reward.max_length or reward.max_new_tokens"
        )


def _sft_samples(config: RewardConfig, model: Any, tokenizer: Any, questions: list[Question], device: torch.device) -> Rollout:
    """One sample a question at temperature 1, as in PPO; more than one where there are fewer questions than samples."""
    chosen = list(questions)
    random.Random(config.seed).shuffle(chosen)
    queries = [encode_query(tokenizer, q.text, config.max_query_tokens) for q in chosen[: config.score_samples]]
    queries = [queries[i % len(queries)] for i in range(config.score_samples)]
    return generate_shared(
        model, tokenizer, queries, max_new_tokens=config.max_new_tokens, temperature=1.0, seed=config.seed, device=device
    )  # fmt: skip


def _differences(reward: RewardModel, questions: list[Encoded]) -> np.ndarray:
    """Score of j minus score of k, every pair of every question; -> (P,)."""
    texts = [(q.query, response) for q in questions for response in q.responses]
    scores: Iterator[float] = iter(reward.shared_scores(*_columns(texts)).tolist())
    return differences([q.pairs for q in questions], [[next(scores) for _ in q.responses] for q in questions])


def _columns(texts: list[tuple[list[int], list[int]]]) -> tuple[list[list[int]], list[list[int]]]:
    return [query for query, _ in texts], [response for _, response in texts]


def _metrics(
    results: dict[str, dict[str, Any]],
    rivals: dict[str, Any],
    calibrations: dict[str, dict[str, Any]],
    scale: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    metrics = {
        "accuracy": results["reward"]["accuracy"],
        "accuracy_low": results["reward"]["interval"][0],
        "accuracy_high": results["reward"]["interval"][1],
        "judge_accuracy": results["judge"]["accuracy"],
        "judge_accuracy_low": results["judge"]["interval"][0],
        "judge_accuracy_high": results["judge"]["interval"][1],
        "eval_pairs": results["reward"]["n_pairs"],
        "best_baseline": rivals["best"]["accuracy"],
        "best_baseline_name": rivals["best"]["name"],
        "ece": calibrations["reward"]["ece"],
        "temperature": calibrations["reward"]["temperature"],
        "score_mean": scale["reward"][0],
        "score_std": scale["reward"][1],
        "judge_score_mean": scale["judge"][0],
        "judge_score_std": scale["judge"][1],
    }
    metrics |= {name: rivals[name]["accuracy"] for name in ("longer_wins", "markup_wins", "earlier_wins", "tfidf")}
    if "best_possible" in rivals:
        metrics["best_possible"] = rivals["best_possible"]
    return metrics
