"""The PPO of the last TRL that had one (1.12.0): at its defaults, and at its best in fp32 and in bf16."""

from pathlib import Path
from typing import Any

from peers.meter import Meter
from peers.trl_trainers import Setting, arguments, lora

STEPS = 1
"""Under the clock, after one to warm up; its steps are long."""


def ppo(folder: Path, work: dict[str, Any], threads: int, setting: Setting) -> dict[str, Any]:
    """PPOTrainer as its example sets it up: policy with LoRA, reference with the adapter off, reward and value models; samples.

    By default the value model is trained whole, as in TRL's example. At its best it has LoRA too, put inside it.
    """
    import torch
    from datasets import Dataset
    from peft import inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    given = arguments(folder, threads, setting, onednn=False)
    del given["train_sampling_strategy"]
    meter = Meter()
    size, queries = work["size"], work["ppo"]["queries"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    load = AutoModelForSequenceClassification.from_pretrained
    reward_model, value_model = (load(folder / "model", num_labels=1) for _ in range(2))
    for model in (reward_model, value_model):
        with torch.no_grad():
            model.score.weight[0] = torch.tensor(work["reward"]["head"])
    if setting != "default":
        value_model.requires_grad_(False)
        value_model = inject_adapter_in_model(lora("SEQ_CLS"), value_model)
        value_model.score.requires_grad_(True)
    per_device = min(8, len(queries))  # TRL's default

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                meter.start()
            elif state.global_step == 1 + STEPS:
                meter.stop()

    trainer = PPOTrainer(
        args=PPOConfig(
            per_device_train_batch_size=per_device, gradient_accumulation_steps=len(queries) // per_device,
            total_episodes=len(queries) * (1 + STEPS), response_length=size["new_tokens"], temperature=1.0,
            num_ppo_epochs=size["epochs"], stop_token="eos", num_sample_generations=0, **given,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": queries}),
        peft_config=lora("CAUSAL_LM"),
        callbacks=[Clock()],
    )  # fmt: skip
    meter.wrap(ppo_trainer, "batch_generation", "generate")
    meter.wrap(ppo_trainer, "get_reward", lambda model, *_: "reward" if model is reward_model else "value")
    meter.wrap(ppo_trainer, "forward", lambda *_: None if torch.is_grad_enabled() else "reference")
    trainer.train()
    found = meter.result(STEPS * len(queries))
    found["phases_cpu_s"]["update"] = found["phases_cpu_s"].pop("rest")  # its update stands in the loop itself
    return found
