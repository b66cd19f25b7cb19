"""A reward artifact with a taste that PPO can learn in seconds: it likes responses that end with EOS."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def planted_reward(tiny_model, tmp_path_factory) -> Path:
    """reward/ and its judge/ on the tiny model: new adapters, which change nothing, and heads fitted by ridge regression."""
    import torch

    from tasks.models import add_lora, hidden_states, load_model, load_tokenizer, pad_right
    from tasks.reward.model import RewardModel, ScoreHead, save
    from tasks.sft.config import LoRAConfig

    folder = tmp_path_factory.mktemp("reward")
    eos = load_tokenizer(tiny_model / "model").eos_token_id
    for seed, place in enumerate((folder, folder / "judge")):
        model = add_lora(load_model(tiny_model / "model", "fp32", "cpu"), LoRAConfig(r=4, alpha=8, dropout=0.1), "reward", seed)
        generator = torch.Generator().manual_seed(seed)
        texts = torch.randint(2, model.config.vocab_size, (400, 12), generator=generator)
        texts[::2, -1] = eos
        ids, mask = pad_right(texts.tolist(), 1, "cpu")
        with torch.no_grad():
            last = hidden_states(model.eval(), ids, mask)[:, -1]
            liked = (texts[:, -1] == eos).float()
            inputs = torch.cat([last, torch.ones(400, 1)], dim=1)
            solution = torch.linalg.solve(inputs.T @ inputs + torch.eye(inputs.shape[1]), inputs.T @ liked)
            head = ScoreHead(last.shape[1])
            head.weight.copy_(solution[None, :-1])
            head.bias.copy_(solution[-1:])
        save(RewardModel(model, "reward", head, mean=0.5, std=0.5), place)
    return folder
