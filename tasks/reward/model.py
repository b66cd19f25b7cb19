"""The reward model: a LoRA adapter on the frozen SFT model and an fp32 head read at the last token of the response."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks import distributed
from tasks.last_layer import hidden_rows
from tasks.models import load_lora, save_lora, use
from tasks.packing import Tree, collate_trees

HEAD_FILE = "head.safetensors"
SCORE_FILE = "score.json"


class ScoreHead(nn.Linear):
    """Hidden states (..., D) -> (..., 1), in fp32 whatever the trunk computes in. Weight N(0, 1/sqrt(D+1)), bias 0

    (The N implementation details of RLHF with PPO, https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo).
    """

    def __init__(self, hidden_size: int, seed: int = 0) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.weight.copy_(torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1))
            self.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.float())

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, folder / HEAD_FILE)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "ScoreHead":
        """ValueError where head.safetensors is missing or is not such a head."""
        path = folder / HEAD_FILE
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: without its head this is no reward model but a language model; train `reward` again"
            )
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): fetch or train it again") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        width = shapes.get("weight", (0, 0))[-1]
        if shapes != {"weight": (1, width), "bias": (1,)} or not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{path} holds {shapes}, not a finite head weight [1, D] and bias [1]: fetch or train it again")
        head = cls(width)
        head.load_state_dict(tensors)
        return head.to(device)


@dataclass
class RewardModel:
    """`adapter_name` on `model`, and the head. Scores are raw logits; `normalise` gives SFT samples mean 0 and spread 1."""

    model: Any
    adapter_name: str
    head: ScoreHead
    mean: float = 0.0
    std: float = 1.0
    micro_batch_tokens: int = 16_384
    """Tokens in one forward pass of `scores`."""

    def forward(self, queries: list[list[int]], responses: list[list[int]], micro_batch_tokens: int | None = None) -> Tensor:
        """Raw scores at each response's last token, in the order given; with gradients and dropout as they are switched; -> (B,).

        Responses to the same query share it: it is encoded once (tasks.packing). Nothing is padded, no text sees another. Of
        responses beyond `micro_batch_tokens` there is another pass.
        """
        device = self.head.weight.device
        passes = list(_passes(queries, responses, micro_batch_tokens or self.micro_batch_tokens))
        parts = [torch.zeros(0, device=device)]
        with use(self.model, self.adapter_name):
            for number in range(distributed.rounds(len(passes))):
                if number < len(passes):
                    trees = [(queries[rows[0]], [responses[i] for i in rows]) for rows in passes[number]]
                    parts.append(self._last_scores(trees))
                else:  # another rank has more, and a pass over a model that is cut is made by all
                    parts.append(self._last_scores([([0], [[0]])])[:0])
        order = [i for trees in passes for rows in trees for i in rows]
        return torch.cat(parts)[torch.tensor(order, dtype=torch.long, device=device).argsort()]

    def _last_scores(self, trees: list[tuple[list[int], list[list[int]]]]) -> Tensor:
        arrays = [Tree(np.array(query, np.int32), [np.array(r, np.int32) for r in responses]) for query, responses in trees]
        batch = collate_trees(arrays, self.head.weight.device)
        # by length and never by looking for an id: an answer may hold any, and EOS at its end is a real token
        return self.head(hidden_rows(self.model, batch, batch.branch_ends))[:, 0]

    @torch.no_grad()
    def scores(self, queries: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Raw scores of the responses, without dropout or gradients; -> (B,) fp32, independent of batch and order to rounding."""
        was_training = self.model.training
        self.model.eval()
        try:
            return self.forward(queries, responses)
        finally:
            self.model.train(was_training)

    def shared_scores(self, queries: list[list[int]], responses: list[list[int]]) -> Tensor:
        """`scores` of the same texts on every rank, each having scored its share of the queries."""
        if distributed.world().size == 1:
            return self.scores(queries, responses)
        groups = list(_by_query(queries).values())
        own = [i for rows in distributed.mine(groups) for i in rows]
        found = iter(self.scores([queries[i] for i in own], [responses[i] for i in own]).tolist())
        gathered = distributed.gather([[next(found) for _ in rows] for rows in distributed.mine(groups)], len(groups))
        scores = torch.zeros(len(queries))
        for rows, values in zip(groups, gathered, strict=True):
            scores[rows] = torch.tensor(values)
        return scores.to(self.head.weight.device)

    def normalise(self, scores: Tensor) -> Tensor:
        """(raw - mean) / std of SFT samples."""
        return (scores - self.mean) / self.std


def _by_query(queries: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Numbers of the texts of each query, in the order in which queries come."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, query in enumerate(queries):
        groups.setdefault(tuple(query), []).append(i)
    return groups


def _passes(queries: list[list[int]], responses: list[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """Texts by their numbers: of each pass the trees, of each tree the responses; at most `max_tokens` tokens a pass (or one text).

    Long ones first, so that trees of a pass are alike. A query with more responses than fit is encoded once a pass.
    """
    trees: list[list[int]] = []
    room = max_tokens
    for query, rows in sorted(_by_query(queries).items(), key=lambda item: -len(item[0])):
        tree: list[int] = []
        for i in sorted(rows, key=lambda i: -len(responses[i])):
            need = len(responses[i]) + (0 if tree else len(query))
            if need > room and (trees or tree):
                yield [*trees, tree] if tree else trees
                trees, tree, room = [], [], max_tokens
                need = len(responses[i]) + len(query)
            tree.append(i)
            room -= need
        trees.append(tree)
    if trees:
        yield trees


def similar_lengths(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices from the shortest to the longest, in groups of at most `max_tokens` when padded to their longest (or of one)."""
    group: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = lengths[i] * (len(group) + 1)
        # more than an eighth of padding is worth another pass, unless the batch is too small to keep the machine busy
        wasteful = total > 1024 and padded > 1.125 * (total + lengths[i])
        if group and (padded > max_tokens or wasteful):
            yield group
            group, total = [], 0
        group.append(i)
        total += lengths[i]
    if group:
        yield group


def save(reward: RewardModel, folder: Path) -> None:
    """adapter/, head.safetensors and score.json under `folder`."""
    save_lora(reward.model, folder / "adapter", reward.adapter_name)
    reward.head.save(folder)
    (folder / SCORE_FILE).write_text(json.dumps({"mean": reward.mean, "std": reward.std}) + "\n")


def load_reward(model: Any, folder: Path, name: str, trainable: bool = False) -> RewardModel:
    """The reward model (or the judge) in `folder`, as adapter `name` on `model`: sft's merged model, or a PeftModel of it.

    A reward model that has lost its head scores at random without an error, so head, score scale and class are checked here.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(base).__name__.endswith("ForCausalLM"):
        raise ValueError(f"a reward model goes on sft's causal language model, not on a {type(base).__name__}: load sft's model/")
    head = ScoreHead.load(folder, next(base.parameters()).device)
    if head.in_features != base.config.hidden_size:
        raise ValueError(
            f"{folder / HEAD_FILE} reads {head.in_features} features, but the model has {base.config.hidden_size}: "
            "the reward model belongs to another sft model"
        )
    mean, std = _read_scale(folder / SCORE_FILE)
    if not (folder / "adapter").is_dir():
        raise ValueError(f"{folder / 'adapter'} is missing: the reward model's adapter was not stored; train `reward` again")
    head.requires_grad_(trainable)
    return RewardModel(load_lora(model, folder / "adapter", name, trainable=trainable), name, head, mean, std)


def _read_scale(path: Path) -> tuple[float, float]:
    try:
        scale = json.loads(path.read_text())
        mean, std = float(scale["mean"]), float(scale["std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is missing or is not {{"mean": number, "std": number}} ({error!r}): train `reward` again'
        ) from error
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"{path}: mean={mean} and std={std} cannot normalise a score: train `reward` again")
    return mean, std
