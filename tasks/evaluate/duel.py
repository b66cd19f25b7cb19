"""The champion answers the same questions, and stands beside the candidate answer by answer.

It answers as it was trained: with its own model, tokenizer, soft prompt and precision, from the candidate's random streams, so that
a candidate that is the champion over again writes the same and gains exactly nothing. Both are then read as text, which each run's
judge puts into its own tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tasks import prompts
from tasks.distributed import load_frozen
from tasks.evaluate.answers import Answers, scores_of
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.lineage import config_of, reward_max_length
from tasks.models import load_lora, load_tokenizer
from tasks.reward.model import RewardModel, load_reward


class Pair(NamedTuple):
    """Candidate and champion, their texts in the candidate's tokens."""

    candidate: Answers
    champion: Answers


class Champion:
    """The champion's artifacts by step (ppo, sft, reward), and how it reads the questions."""

    def __init__(
        self, folders: Mapping[str, Path], config: EvaluateConfig, questions: Sequence[Mapping[str, Any]], device: torch.device
    ):
        self.folders, self.config, self.questions, self.device = folders, config, questions, device
        self.tokenizer = load_tokenizer(folders["sft"] / "model")

    def policy(self) -> Any:
        """Its network with its adapter, active."""
        return load_lora(self._model(), self.folders["ppo"] / "policy", "policy", trainable=False).eval()

    def judge(self) -> RewardModel:
        """The judge of its run, on a network of its own."""
        return load_reward(self._model(), self.folders["reward"] / "judge", "judge")

    def _model(self) -> Any:
        trained = {"dtype": self.config.dtype, "quantization": self.config.quantization, **config_of(self.folders["ppo"])}
        return load_frozen(self.folders["sft"] / "model", trained["dtype"], self.device, trained["quantization"])

    def queries(self, model: Any) -> list[list[int]]:
        """The questions as it reads them: in its tokens, after its soft prompt, and no longer than it has positions for."""
        room = min(self.config.max_query_tokens, model.config.max_position_embeddings - self.config.max_new_tokens)
        return [prompts.encode_query(self.tokenizer, q["question"], room) for q in self.questions]

    def judged(self, pair: Pair, micro_batch_tokens: int) -> None:
        """Scores of both by its own judge, and the mean of both runs' judges."""
        judge = self.judge()
        judge.micro_batch_tokens = micro_batch_tokens
        max_length = min(reward_max_length(self.folders["reward"]), judge.model.config.max_position_embeddings)
        read = [as_text(answers, self.tokenizer) for answers in pair]
        score_together(judge, "champion_judge", self.queries(judge.model), read, max_length)
        for answers, own in zip(pair, read, strict=True):
            answers.scores["champion_judge"] = own.scores["champion_judge"]
            answers.scores["judges"] = (answers.scores["judge"] + answers.scores["champion_judge"]) / 2


def as_text(answers: Answers, tokenizer: Any) -> Answers:
    """The same texts in this tokenizer's tokens, without scores. Sampled tokens need not be those that their text is read as."""
    ids = [
        [_encoded(tokenizer, text, bool(ended)) for text, ended in zip(texts, finished, strict=True)]
        for texts, finished in zip(answers.texts, answers.finished, strict=True)
    ]
    return Answers(answers.texts, ids, answers.finished)


def _encoded(tokenizer: Any, text: str, finished: bool) -> list[int]:
    ids = prompts.encode_response(tokenizer, text)
    return ids if finished else ids[:-1] or ids


def score_together(
    reward_model: RewardModel, name: str, queries: Sequence[list[int]], writers: Sequence[Answers], max_length: int
) -> None:
    """Score several writers in one go: equal answers then tie exactly, where two goes would differ by rounding."""
    rows = [[ids for row in rows for ids in row] for rows in zip(*(writer.ids for writer in writers), strict=True)]
    scores = scores_of(reward_model, queries, rows, max_length)
    for writer, part in zip(writers, np.split(scores, len(writers), axis=1), strict=True):
        writer.scores[name] = part
