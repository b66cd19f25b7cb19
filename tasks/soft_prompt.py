"""A soft prompt (Lester et al. 2021, https://arxiv.org/abs/2104.08691): embeddings of tokens that no text has, trained alone.

Its tokens have the ids after the embedding's last row, and only the input side knows them: the head keeps its rows, tied or not,
so a model can read them and never write them, and its distribution over the other tokens is what it was. The rows are saved with
the model under a key of their own, `...embed_tokens.soft_prompt`, which `tasks.models.load_model` looks for.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

KEY = "soft_prompt"
COMMON = 5_000  # the paper draws its start from the most common tokens


class PromptedEmbedding(nn.Embedding):
    """An embedding of V rows that reads the ids from V on in `soft_prompt`, (n, D)."""

    soft_prompt: nn.Parameter

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.num_embeddings
        ordinary = functional.embedding(ids.clamp(max=rows - 1), self.weight, self.padding_idx)
        soft = functional.embedding((ids - rows).clamp(min=0), self.soft_prompt).to(ordinary.dtype)
        return torch.where((ids >= rows)[..., None], soft, ordinary)


def attach(model: Any, prompt: Tensor) -> nn.Parameter:
    """Put a soft prompt, (n, D), before the model's embedding; the parameter that holds it."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding:
        raise ValueError(f"prompt tuning needs a plain embedding, not a {type(embedding).__name__}: use sft.tuning=lora")
    embedding.__class__ = PromptedEmbedding  # in place: a tied head keeps sharing its rows
    embedding.soft_prompt = nn.Parameter(prompt.clone().to(embedding.weight.device))
    return cast(nn.Parameter, embedding.soft_prompt)


def read(folder: Path) -> Tensor | None:
    """The soft prompt in a model's files, (n, D); None where it has none."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.rsplit(".", 1)[-1] == KEY:
                    return cast(Tensor, file.get_tensor(key))
    return None


def start(model: Any, ids: Tensor, n: int, seed: int) -> Tensor:
    """n embeddings, (n, D) fp32, drawn from those of the most common of `ids` (tokens of the training texts)."""
    embedding = model.get_input_embeddings()
    counts = torch.bincount(ids, minlength=embedding.num_embeddings)
    common = counts.argsort(descending=True, stable=True)[: min(COMMON, int((counts > 0).sum()))].numpy()
    drawn = np.random.default_rng(seed).choice(common, n, replace=n > len(common))
    return cast(Tensor, embedding.weight.detach()[torch.from_numpy(drawn).to(embedding.weight.device)].float())
