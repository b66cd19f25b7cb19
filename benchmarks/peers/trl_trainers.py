"""TRL's trainers for supervised fine-tuning and reward models: at their defaults, and at their best in fp32 and in bf16."""

from pathlib import Path
from typing import Any, Literal

from peers.meter import Meter
from peers.workload import LAYERS, LORA, probe

Setting = Literal["default", "fp32", "bf16"]


def arguments(folder: Path, threads: int, setting: Setting, onednn: bool = True) -> dict[str, Any]:
    """What every run is given, and nothing that a trainer has a default for but what must be equal.

    `onednn`: fp32 products go there; its many small products of attention are slower for it, which PPO pays more than it gains.
    """
    import torch

    torch.set_num_threads(threads)
    if setting == "fp32" and onednn:
        torch.set_float32_matmul_precision("medium")  # exact fp32 where the CPU has no AMX
    best = {"bf16": setting == "bf16", "gradient_checkpointing": False}
    return {
        "output_dir": str(folder / "trl"), "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False, **(best if setting != "default" else {}),
    }  # fmt: skip


def lora(task: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=LAYERS, task_type=task)


def _train(trainer: Any, meter: Meter, warm: int, steps: int) -> None:
    """One step to warm up, on the first `warm` examples once more, then the others under the clock."""
    from datasets import concatenate_datasets
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                meter.start()
            elif state.global_step == 1 + steps:
                meter.stop()

    examples = trainer.train_dataset
    trainer.train_dataset = concatenate_datasets([examples.select(range(warm)), examples])
    trainer.args.max_steps = 1 + steps
    trainer.add_callback(Clock())
    trainer.train()


def sft(folder: Path, work: dict[str, Any], threads: int, setting: Setting, packing: str, per_device: int) -> dict[str, Any]:
    """SFTTrainer on packed rows, `rows_per_step` of them a step; tokens."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    size = work["size"]
    given = arguments(folder, threads, setting)
    meter = Meter()
    documents = work["sft"]["documents"]
    labels = [[-100] * first + ids[first:] for ids, first in documents]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=SFTConfig(
            packing=True, packing_strategy=packing, max_length=size["row_tokens"], per_device_train_batch_size=per_device,
            gradient_accumulation_steps=size["rows_per_step"] // per_device, **given,
        ),
        train_dataset=Dataset.from_dict({"input_ids": [ids for ids, _ in documents], "labels": labels}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=lora("CAUSAL_LM"),
    )  # fmt: skip
    first = len(probe(documents, size["row_tokens"]))
    row = {
        "input_ids": [i for ids, _ in documents[:first] for i in ids],
        "labels": [i for ids in labels[:first] for i in ids],
        "seq_lengths": [len(ids) for ids, _ in documents[:first]],
    }
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, trainer.data_collator([row])))
    trainer._metrics["train"].clear()
    steps = len(trainer.train_dataset) // size["rows_per_step"]
    tokens = sum(len(ids) for ids in trainer.train_dataset[: steps * size["rows_per_step"]]["input_ids"])
    _train(trainer, meter, size["rows_per_step"], steps)
    return meter.result(tokens, loss=loss)


def reward(folder: Path, work: dict[str, Any], threads: int, setting: Setting, per_device: int) -> dict[str, Any]:
    """RewardTrainer, one epoch over the pairs; pairs."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    given = arguments(folder, threads, setting)
    meter = Meter()
    questions = work["reward"]["questions"]
    pairs = [
        {"chosen_ids": q["query"] + q["responses"][j], "rejected_ids": q["query"] + q["responses"][k]}
        for q in questions for j, k in q["pairs"]
    ]  # fmt: skip
    a_step = round(len(pairs) * work["size"]["questions_per_step"] / len(questions))  # pairs in as many questions as ours take
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    with torch.no_grad():
        model.score.weight[0] = torch.tensor(work["reward"]["head"])
    accumulation = max(1, round(a_step / per_device))
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            max_length=work["size"]["pair_tokens"], per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation, **given,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=lora("SEQ_CLS"),
    )  # fmt: skip
    starts = [sum(len(q["pairs"]) for q in questions[:n]) for n in range(work["size"]["questions_per_step"])]
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, trainer.data_collator([pairs[start] for start in starts])))
    trainer._metrics["train"].clear()
    steps = len(pairs) // (accumulation * per_device)
    _train(trainer, meter, accumulation * per_device, steps)
    return meter.result(steps * accumulation * per_device, loss=loss)
