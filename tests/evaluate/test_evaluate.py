"""evaluate() from folder to folder, on a model that knows nothing."""

import json
import os
import traceback
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tasks import distributed
from tasks.compute import Compute
from tasks.distributed import World
from tasks.evaluate.evaluate import evaluate
from tasks.ingest.simulated.world import ATTRIBUTES, PARTS, SITE
from tasks.models import adapter_parameters, add_lora, load_model, load_tokenizer, save_lora
from tasks.progress import Progress, listening
from tasks.reward.model import RewardModel, ScoreHead, save
from tasks.sft.config import LoRAConfig

LORA = LoRAConfig(r=2, alpha=4, dropout=0.0)


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """The tiny model as base and as sft, a reward model and a judge that prefer other things, and a policy that learned nothing."""
    root = tmp_path_factory.mktemp("models")
    model = load_model(tiny_model / "model", "fp32", "cpu")
    for name, folder, seed in (("reward", root / "reward", 1), ("judge", root / "reward" / "judge", 2)):
        model = add_lora(model, LORA, name, seed)
        torch.manual_seed(seed)
        for parameter in adapter_parameters(model, name):
            torch.nn.init.normal_(parameter, std=0.2)
        folder.mkdir()
        save(RewardModel(model, name, ScoreHead(32, seed), mean=0.5, std=2.0), folder)
    model = add_lora(model, LORA, "policy", 3)
    save_lora(model, root / "ppo" / "policy", "policy")
    (root / "ppo" / "curves.json").write_text(
        '[{"step": 0, "eval/score": 0.0}, {"step": 1, "eval/score": 0.1, "objective/kl": 0.0}]'
    )
    return {"base": tiny_model, "sft": tiny_model, "reward": root / "reward", "ppo": root / "ppo"}


@pytest.fixture(scope="module")
def simulated_site(tmp_path_factory) -> Path:
    """12 eval questions of the simulated site."""
    root = tmp_path_factory.mktemp("simulated")
    rows = []
    for qid, part in enumerate(PARTS[:12], start=1):
        attribute = ATTRIBUTES[qid % len(ATTRIBUTES)]
        title = attribute.titles[0].format(part=part, sign=next(iter(attribute.facts)))
        answer = {"answer_id": qid, "text": attribute.methods[0], "pm_score": 2, "votes": 3, "selected": True}
        rows.append(
            {"site": SITE, "qid": qid, "title": title, "question": title, "answers": [answer], "pairs": [], "split": "eval"}
        )
    folder = root / "questions" / f"site={SITE}" / "split=eval"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    (root / "card.json").write_text('{"simulated": true, "best_possible_accuracy": 0.8}')
    (root / "NOTICE.md").write_text("Answers by Ada.")
    return root


def run(config, models, data, out) -> dict:
    out.mkdir()
    return evaluate(config, **models, data=data, out=out, compute=Compute(device="cpu", threads=1), progress=Progress("evaluate"))


@pytest.fixture(scope="module")
def evaluated(evaluate_config, models, simulated_site, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    updates = []
    with listening(updates.append):
        metrics = run(evaluate_config, models, simulated_site, out)
    return out, metrics, updates


def strict(path: Path):
    def refuse(constant: str):
        raise AssertionError(f"{path.name} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_it_leaves_everything_the_contract_names(evaluated):
    out, metrics, _ = evaluated
    assert {path.name for path in out.iterdir()} == {
        "verdict.json", "tables.json", "samples.json", "plots", "report.html", "REPORT.md"
    }  # fmt: skip
    found = strict(out / "verdict.json")
    assert found["word"] == metrics["verdict"]
    assert found["by"] == metrics["by"] == "true"
    assert found["interval"] == [metrics["gain_low"], metrics["gain_high"]]
    assert [row["name"] for row in strict(out / "tables.json")["models"]] == ["human", "base", "sft", "best-of-n", "ppo"]
    assert len(strict(out / "samples.json")) == 3
    assert all(path.suffix == ".png" for path in (out / "plots").iterdir())


def test_a_policy_that_learned_nothing_is_the_reference(evaluated):
    out, metrics, _ = evaluated
    rows = {row["name"]: row for row in strict(out / "tables.json")["models"]}
    assert metrics["kl"] == 0
    assert rows["ppo"]["human_perplexity"] == rows["sft"]["human_perplexity"]
    assert rows["base"]["human_perplexity"] == pytest.approx(
        rows["sft"]["human_perplexity"], rel=1e-5
    )  # base and sft are one model here
    assert metrics["verdict"] == "no-evidence"


def test_choosing_by_the_reward_model_raises_the_reward(evaluated):
    rows = {row["name"]: row for row in strict(evaluated[0] / "tables.json")["models"]}
    assert rows["best-of-n"]["gain"]["reward"]["value"] > 0


def test_the_humans_truth_is_the_worlds(evaluated):
    rows = {row["name"]: row for row in strict(evaluated[0] / "tables.json")["models"]}
    # every human answer shows how (0.3) and is clear (0.2), and none names the value (0.5)
    assert rows["human"]["scores"]["true"]["value"] == pytest.approx(0.5)


def test_it_tells_how_far_it_is(evaluated):
    phases = {update.phase for update in evaluated[2]}
    assert {"answers of base", "answers of sft", "answers of best-of-n", "answers of ppo", "report"} <= phases


def test_evaluated_again_it_finds_the_same(evaluated, evaluate_config, models, simulated_site, tmp_path):
    out, metrics, _ = evaluated
    assert run(evaluate_config, models, simulated_site, tmp_path / "again") == metrics
    for name in ("verdict.json", "tables.json", "samples.json", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_on_a_real_site_the_judge_decides_and_the_truth_is_not_asked(evaluate_config, models, toy_site, tmp_path):
    config = evaluate_config.model_copy(update={"max_questions": 4, "samples_per_question": 1, "shown_samples": 0})
    metrics = run(config, models, toy_site, tmp_path / "out")
    assert metrics["by"] == "judge"
    assert metrics["questions"] == 4
    assert metrics["verdict"] == "no-evidence"  # four questions decide nothing
    assert "true_gain" not in metrics


def test_models_with_different_tokenizers_are_refused(evaluate_config, models, toy_site, tmp_path):
    tokenizer = load_tokenizer(models["base"] / "model")
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path / "base" / "model")
    with pytest.raises(ValueError, match="different tokenizers"):
        run(evaluate_config, {**models, "base": tmp_path / "base"}, toy_site, tmp_path / "out")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_come_to_the_same_tables_as_one(
    evaluated, evaluate_config, models, simulated_site, tmp_path, monkeypatch, strategy
):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the threads of the parent's pool are not here
                dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
                monkeypatch.setattr(distributed, "_world", World(rank, 2, strategy == "fsdp"))
                run(evaluate_config, models, simulated_site, tmp_path / str(rank))
                dist.barrier()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    verdict, tables, samples = (
        [(tmp_path / rank / f"{name}.json").read_bytes() for rank in "01"] for name in ("verdict", "tables", "samples")
    )
    assert verdict[0] == verdict[1]
    assert tables[0] == tables[1]
    alone, together = strict(evaluated[0] / "samples.json"), json.loads(samples[0])
    for ours, theirs in zip(together, alone, strict=True):
        assert {name: answer["text"] for name, answer in ours["answers"].items()} == {
            name: answer["text"] for name, answer in theirs["answers"].items()
        }
    ours, theirs = (found["models"] for found in (json.loads(tables[0]), strict(evaluated[0] / "tables.json")))
    for a, b in zip(ours, theirs, strict=True):
        assert {name: score["value"] for name, score in a["scores"].items()} == pytest.approx(
            {name: score["value"] for name, score in b["scores"].items()}, abs=1e-4
        )


def test_a_policy_is_evaluated_on_the_base_that_it_was_trained_on(evaluate_config, models, toy_site, tmp_path):
    folder = tmp_path / "trained"
    folder.mkdir()
    for name in ("policy", "curves.json"):
        (folder / name).symlink_to(models["ppo"] / name)
    (folder / "manifest.json").write_text('{"config": {"quantization": "8bit"}}')
    with pytest.raises(ValueError, match=r"ppo in .* was trained on 8bit: set evaluate.quantization=8bit"):
        run(evaluate_config, {**models, "ppo": folder}, toy_site, tmp_path / "out")
