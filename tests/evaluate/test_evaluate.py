"""evaluate() from folder to folder, on a model that knows nothing."""

import json
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tasks import distributed
from tasks.distributed import World
from tasks.models import load_tokenizer
from tasks.progress import listening
from tests.evaluate.folders import run, with_manifest


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


@pytest.mark.parametrize("step", ["ppo", "reward"])
def test_a_policy_is_evaluated_on_the_base_that_it_was_trained_on(evaluate_config, models, toy_site, tmp_path, step):
    folder = with_manifest(tmp_path / "store", models[step], step, quantization="8bit")
    with pytest.raises(ValueError, match=rf"{step} in .* was trained on 8bit: set evaluate.quantization=8bit"):
        run(evaluate_config, {**models, step: folder}, toy_site, tmp_path / "out")


def test_the_report_names_what_it_was_made_from_and_scores_are_read_no_further_than_they_were_trained(
    evaluated, evaluate_config, models, simulated_site, tmp_path
):
    reward = with_manifest(tmp_path / "store", models["reward"], "reward", max_length=24)
    run(evaluate_config, {**models, "reward": reward}, simulated_site, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'<td class="key">{reward.name}</td><td>1</td><td>1 min 15 s</td>' in page
    short, whole = (strict(out / "tables.json")["models"] for out in (tmp_path / "out", evaluated[0]))
    assert short[0]["scores"]["judge"] != whole[0]["scores"]["judge"]
