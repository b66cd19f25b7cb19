"""evaluate: everybody answers the same held-out questions, two judges (and the truth, where known) score, a verdict follows.

Where there is a champion, it answers too, and a second verdict says whether the candidate is better than it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tasks import prompts
from tasks.compute import SAMPLED_TOKENS, Compute, fit_threads, pass_tokens, prepare
from tasks.distributed import load_frozen
from tasks.evaluate import plots, report
from tasks.evaluate.answers import Answers, best_of, choose_questions, human_answers, sample_answers, scores_of, seed_of
from tasks.evaluate.bootstrap import Interval
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.duel import Champion, Pair, as_text, score_together
from tasks.evaluate.likelihood import kl, perplexity, response_logprobs
from tasks.evaluate.lineage import config_of, manifest_of, reward_max_length, shown
from tasks.evaluate.tables import Divergence, duel_table, gain_of, headline, read_json, reward_model_table, tabulate
from tasks.evaluate.verdict import champion_verdict, verdict
from tasks.ingest.dataset import best_answer
from tasks.ingest.simulated.truth import true_reward
from tasks.models import load_lora, load_tokenizer, use
from tasks.progress import Progress
from tasks.reward.model import load_reward


def evaluate(
    config: EvaluateConfig,
    *,
    base: Path,
    sft: Path,
    reward: Path,
    ppo: Path,
    data: Path,
    champion: Mapping[str, Path] | None = None,
    out: Path,
    compute: Compute,
    progress: Progress,
) -> dict[str, Any]:
    """Write verdict.json, tables.json, samples.json, plots/, report.html and REPORT.md under `out`; return the headline numbers.

    `champion`: the folders of its ppo, sft and reward. Several processes share the sampling and scoring; each comes to the same
    tables.
    """
    card = read_json(data / "card.json") or {}
    simulated = card.get("simulated") is True
    questions = choose_questions(data, config.max_questions, config.seed)
    everyone, divergence, pair = write(
        config, questions, base=base, sft=sft, reward=reward, ppo=ppo, champion=champion, compute=compute, progress=progress
    )
    if simulated:
        for answers in [*everyone.values(), *(pair or ())]:
            true = [[true_reward(q["question"], text) for text in row] for q, row in zip(questions, answers.texts)]
            answers.scores["true"] = np.array(true, dtype=np.float64)

    progress(0, 2, phase="tables")
    tables = tabulate(config, everyone, divergence)
    tables["reward_model"] = reward_model_table(reward, card.get("best_possible_accuracy"))
    gains = {scorer: gain_of(config, everyone, "ppo", scorer) for scorer in everyone["sft"].scores}
    found = verdict(gains, len(questions), config.confidence)
    found |= {
        "simulated": simulated,
        "samples_per_question": config.samples_per_question,
        "win_rate": next(row["win_rate"] for row in tables["models"] if row["name"] == "ppo"),
        "reward_model": tables["reward_model"],
        "champion": None,
    }
    tables["champion"] = None
    if champion and pair:
        tables["champion"] = duel_table(config, pair)
        gains = {scorer: Interval(**row["gain"]) for scorer, row in tables["champion"].items()}
        known = manifest_of(champion["ppo"])
        found["champion"] = champion_verdict(gains, len(questions), config.confidence) | {"key": known.key if known else None}
    samples = side_by_side(questions, everyone, config.shown_samples, config.seed)

    progress(1, 2, phase="report")
    folders = {"ingest": data, "base": base, "sft": sft, "reward": reward, "ppo": ppo}
    figures = plots.draw(
        out / "plots",
        curves={step: read_json(folder / "curves.json") or [] for step, folder in folders.items() if step != "ingest"},
        calibration=read_json(reward / "calibration.json") or {},
        tables=tables,
        scores={name: answers.scores for name, answers in everyone.items()},
        by=found["by"],
    )
    folders |= {f"champion’s {step}": folder for step, folder in (champion or {}).items()}
    notice = data / "NOTICE.md"
    page = report.Report(
        verdict=found,
        tables=tables,
        samples=samples,
        figures=figures,
        card=card,
        manifests={step: shown(folder) for step, folder in folders.items()},
        config=config.identity(),
        notice=notice.read_text(encoding="utf-8") if notice.is_file() else "",
    )
    for name, content in (("verdict", found), ("tables", tables), ("samples", samples)):
        (out / f"{name}.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
    (out / "report.html").write_text(report.html(page), encoding="utf-8")
    (out / "REPORT.md").write_text(report.markdown(page), encoding="utf-8")
    progress(2, 2, phase="report")
    return headline(found, tables)


def write(
    config: EvaluateConfig,
    questions: Sequence[dict[str, Any]],
    *,
    base: Path,
    sft: Path,
    reward: Path,
    ppo: Path,
    champion: Mapping[str, Path] | None,
    compute: Compute,
    progress: Progress,
) -> tuple[dict[str, Answers], Divergence, Pair | None]:
    """The answers of human, base, sft, best-of-n, ppo and the champion, scored by reward model and judge; how far the models
    differ; and candidate and champion as both runs' judges see them."""
    device = prepare(compute)
    for step, folder in (("reward", reward), ("ppo", ppo)):
        trained_on = config_of(folder).get("quantization", config.quantization)
        if trained_on != config.quantization:
            raise ValueError(
                f"evaluate.quantization={config.quantization}, but {step} in {folder} was trained on {trained_on}: "
                f"set evaluate.quantization={trained_on}"
            )
    tokenizer = load_tokenizer(sft / "model")
    base_tokenizer = load_tokenizer(base / "model")
    if not base_tokenizer.get_vocab().items() <= tokenizer.get_vocab().items():
        raise ValueError(f"{base} and {sft} have different tokenizers: evaluate the base that sft was trained from")
    queries = [prompts.encode_query(tokenizer, q["question"], config.max_query_tokens) for q in questions]
    # the base has no rows for the tokens of a soft prompt, which sft may have put in front
    base_queries = [prompts.encode_query(base_tokenizer, q["question"], config.max_query_tokens) for q in questions]
    human = human_answers(questions, tokenizer)

    def answer(
        model: Any,
        name: str,
        asked: list[list[int]],
        samples: int = config.samples_per_question,
        *,
        own: Any = tokenizer,
        stream: str = "",
    ) -> Answers:
        return sample_answers(
            model,
            own,
            asked,
            samples=samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=seed_of(config.seed, stream or name),
            device=device,
            batch_size=max(1, (compute.micro_batch_tokens or SAMPLED_TOKENS) // (max(map(len, asked)) + config.max_new_tokens)),
            told=lambda done, total: progress(done, total, phase=f"answers of {name}"),
        )

    def logprobs(model: Any, of_queries: list[list[int]], responses: list[list[int]], temperature: float) -> Any:
        return response_logprobs(
            model,
            of_queries,
            responses,
            temperature=temperature,
            device=device,
            batch_tokens=pass_tokens(compute, device),
        )

    def human_perplexity(model: Any, queries: list[list[int]]) -> float:
        room = model.config.max_position_embeddings
        cut = [row[0][: room - len(query)] for query, row in zip(queries, human.ids)]
        return perplexity(logprobs(model, queries, cut, temperature=1.0))

    rival = Champion(champion, config, questions, device) if champion else None
    model: Any
    if rival:  # first: what cannot be loaded any more is known at once
        model = rival.policy()
        fit_threads(compute, model)
        theirs = answer(model, "champion", rival.queries(model), own=rival.tokenizer, stream="ppo")
        del model  # one base at a time
        prepare(compute)  # threads as before, because the next model may be larger

    # the base model is a network of its own; sft keeps base's tokenizer, so both write the same ids
    model = load_frozen(base / "model", config.dtype, device, config.quantization)
    fit_threads(compute, model)
    everyone = {"human": human, "base": answer(model, "base", base_queries)}
    perplexities = {"base": human_perplexity(model, base_queries)}
    del model

    # all the others are sft's model with one of three adapters, or none
    model = load_frozen(sft / "model", config.dtype, device, config.quantization)
    reward_model = load_reward(model, reward, "reward")
    judge = load_reward(reward_model.model, reward / "judge", "judge")
    model = load_lora(judge.model, ppo / "policy", "policy", trainable=False).eval()
    reward_model.micro_batch_tokens = judge.micro_batch_tokens = pass_tokens(compute, device)
    max_length = min(reward_max_length(reward), model.config.max_position_embeddings)
    with use(model, None):
        everyone["sft"] = answer(model, "sft", queries)
        drawn = answer(model, "best-of-n", queries, config.samples_per_question * config.best_of)
        perplexities["sft"] = human_perplexity(model, queries)
    everyone["best-of-n"] = best_of(drawn, scores_of(reward_model, queries, drawn.ids, max_length), config.best_of)
    with use(model, "policy"):
        everyone["ppo"] = answer(model, "ppo", queries)
        perplexities["ppo"] = human_perplexity(model, queries)

    for done, (name, answers) in enumerate(everyone.items()):
        progress(done, len(everyone), phase=f"scores of {name}")
        if "reward" not in answers.scores:  # best-of-n was chosen by it
            answers.scores["reward"] = scores_of(reward_model, queries, answers.ids, max_length)
        answers.scores["judge"] = scores_of(judge, queries, answers.ids, max_length)

    pair = None
    if rival:
        progress(0, 2, phase="scores of champion")
        pair = Pair(as_text(everyone["ppo"], tokenizer), as_text(theirs, tokenizer))
        score_together(reward_model, "reward", queries, pair, max_length)
        score_together(judge, "judge", queries, pair, max_length)
        everyone["champion"] = replace(pair.champion, scores=dict(pair.champion.scores))

    rows = [(query, ids) for query, row in zip(queries, everyone["ppo"].ids) for ids in row]
    asked, given = [query for query, _ in rows], [ids for _, ids in rows]
    with use(model, "policy"):
        policy = logprobs(model, asked, given, config.temperature)
    with use(model, None):
        reference = logprobs(model, asked, given, config.temperature)
    differing = kl(policy, reference).reshape(len(queries), -1)
    if rival and pair:
        del model, reward_model, judge
        progress(1, 2, phase="scores of champion")
        rival.judged(pair, pass_tokens(compute, device))
    # best-of-n: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix G.3
    bound = math.log(config.best_of) - (config.best_of - 1) / config.best_of
    return everyone, Divergence({"ppo": differing}, {"best-of-n": bound}, perplexities), pair


def side_by_side(
    questions: Sequence[dict[str, Any]], everyone: Mapping[str, Answers], shown: int, seed: int
) -> list[dict[str, Any]]:
    """Some questions with everybody's first answer, chosen by lot and not by result; human answers with their authors."""
    chosen = sorted(np.random.default_rng(seed).permutation(len(questions))[:shown].tolist())
    return [
        {
            **{key: questions[i][key] for key in ("site", "qid", "title", "question")},
            "credit": {key: best_answer(questions[i]).get(key) for key in ("answer_id", "author", "author_profile", "licence")},
            "answers": {
                name: {
                    "text": answers.texts[i][0],
                    "finished": bool(answers.finished[i, 0]),
                    "tokens": len(answers.ids[i][0]),
                    "scores": {scorer: float(values[i, 0]) for scorer, values in answers.scores.items()},
                }
                for name, answers in everyone.items()
            },
        }
        for i in chosen
    ]
