"""The candidate beside the champion, from folder to folder."""

import gc
import json
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from tasks import distributed, prompts
from tasks.distributed import World
from tasks.evaluate import duel, evaluate
from tasks.evaluate.answers import seed_of
from tasks.models import add_lora, load_model, load_tokenizer
from tasks.rollout import generate
from tests.conftest import toy_questions
from tests.evaluate.folders import LORA, babbler, heard, other_tokenizer, run, simulated_titles, trained, with_manifest, writer

CLEAR, CUT = "Fine.", "Hardly"  # worth 0.2 and 0 on the simulated site, whatever was asked


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> dict[str, Path]:
    """A run on another base, with another tokenizer, a soft prompt, and fewer positions."""
    root = tmp_path_factory.mktemp("foreign")
    tokenizer = other_tokenizer([q["question"].upper() for q in toy_questions(40, seed=9)], 330)
    return trained(root, babbler(root / "sft", tokenizer, prompt_tokens=3), seed=20)


@pytest.fixture(scope="module")
def writers(tiny_model, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """A run whose policy writes clear answers, and one whose policy does not."""
    root, tokenizer = tmp_path_factory.mktemp("writers"), load_tokenizer(tiny_model / "model")
    other = other_tokenizer([q["question"] for q in toy_questions(40, seed=9)], 300)
    folders = {CLEAR: writer(root / "clear", tokenizer, CLEAR), CUT: writer(root / "cut", other, CUT)}
    return {text: trained(root / text, folder, std=0.02) for text, folder in folders.items()}


@pytest.fixture(scope="module")
def beside(evaluate_config, models, foreign, simulated_site, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("beside") / "out"
    run(evaluate_config, models, simulated_site, out, heard(foreign))
    return out


def read(out: Path, name: str):
    return json.loads((out / f"{name}.json").read_text())


def rows(out: Path) -> dict[str, dict]:
    return {row["name"]: row for row in read(out, "tables")["models"]}


def test_the_champion_answers_with_its_own_model_tokenizer_and_soft_prompt(beside, foreign, models, evaluate_config):
    own, ours = load_tokenizer(foreign["sft"] / "model"), load_tokenizer(models["sft"] / "model")
    model = load_model(foreign["sft"] / "model", "fp32", "cpu")  # its policy learned nothing
    samples, titles = read(beside, "samples"), [title for title, _ in simulated_titles()]
    written = {sample["title"]: sample["answers"]["champion"] for sample in samples}
    assert len(written) == 3
    # 12 questions with two answers each are drawn in one go, in the order of the questions
    queries = [prompts.encode_query(own, title, evaluate_config.max_query_tokens) for title in titles for _ in range(2)]
    assert queries[0][: len(prompts.soft_prompt(own))] == prompts.soft_prompt(own) != []
    rollout = generate(
        model, own, queries, max_new_tokens=evaluate_config.max_new_tokens, temperature=1.0,
        seed=seed_of(seed_of(evaluate_config.seed, "ppo"), 0), device="cpu",
    )  # fmt: skip
    expected = dict(zip(titles, (prompts.decode_response(own, ids) for ids in rollout.responses[::2]), strict=True))
    for title, answer in written.items():
        assert answer["text"] == expected[title]
        assert answer["tokens"] == len(prompts.encode_response(ours, answer["text"])) - (not answer["finished"])


def test_a_row_a_table_a_verdict_and_a_section_are_the_champions(beside, foreign):
    assert list(rows(beside)) == ["human", "base", "sft", "best-of-n", "ppo", "champion"]
    tables, found = read(beside, "tables"), read(beside, "verdict")["champion"]
    assert list(tables["champion"]) == ["true", "judges", "judge", "champion_judge", "reward"]
    assert found["by"] == "true"
    gain = tables["champion"]["true"]["gain"]
    assert (found["gain"], found["interval"]) == (gain["value"], [gain["low"], gain["high"]])
    assert gain["value"] == pytest.approx(
        rows(beside)["ppo"]["scores"]["true"]["value"] - rows(beside)["champion"]["scores"]["true"]["value"]
    )
    mean = (tables["champion"]["judge"]["gain"]["value"] + tables["champion"]["champion_judge"]["gain"]["value"]) / 2
    assert tables["champion"]["judges"]["gain"]["value"] == pytest.approx(mean)
    assert "Beside the champion" in (beside / "report.html").read_text()
    assert found["sentence"] in (beside / "REPORT.md").read_text()


def test_the_champion_changes_no_number_of_anybody_else(beside, evaluate_config, models, simulated_site, tmp_path):
    run(evaluate_config, models, simulated_site, tmp_path / "out")
    alone, together = rows(tmp_path / "out"), rows(beside)
    assert {name: together[name] for name in alone} == alone
    verdict = read(tmp_path / "out", "verdict")
    assert verdict["champion"] is None
    assert {**read(beside, "verdict"), "champion": None} == verdict


@pytest.mark.parametrize("site", ["simulated_site", "toy_site"])
def test_a_candidate_that_is_the_champion_over_again_gains_exactly_nothing(evaluate_config, models, site, tmp_path, request):
    metrics = run(evaluate_config, models, request.getfixturevalue(site), tmp_path / "out", heard(models))
    found = read(tmp_path / "out", "verdict")["champion"]
    assert (found["word"], found["gain"], found["interval"]) == ("no-evidence", 0, [0, 0])
    assert all(row["gain"]["value"] == 0 and row["win_rate"]["value"] == 0.5 for row in duels(tmp_path / "out").values())
    assert (metrics["champion"], metrics["champion_gain"]) == ("no-evidence", 0)


def duels(out: Path) -> dict[str, dict]:
    return read(out, "tables")["champion"]


def test_where_the_judges_decide_the_verdict_turns_its_sign_when_the_two_change_places(
    evaluate_config, models, foreign, toy_site, tmp_path
):
    there, back = tmp_path / "there", tmp_path / "back"
    run(evaluate_config, models, toy_site, there, heard(foreign))
    run(evaluate_config, foreign, toy_site, back, heard(models))
    ours, theirs = read(there, "verdict")["champion"], read(back, "verdict")["champion"]
    assert ours["by"] == theirs["by"] == "judges"
    assert ours["gain"] == pytest.approx(-theirs["gain"], abs=1e-5)
    assert ours["interval"] == pytest.approx([-end for end in reversed(theirs["interval"])], abs=1e-5)
    # each run's judge is the other's champion's judge
    for mine, other in (("judge", "champion_judge"), ("champion_judge", "judge")):
        assert duels(there)[mine]["gain"]["value"] == pytest.approx(-duels(back)[other]["gain"]["value"], abs=1e-5)


@pytest.mark.parametrize(("candidate", "champion", "word", "gain"), [(CLEAR, CUT, "better", 0.2), (CUT, CLEAR, "worse", -0.2)])
def test_a_worse_champion_is_beaten_and_a_better_one_is_not(
    evaluate_config, writers, simulated_site, tmp_path, candidate, champion, word, gain
):
    metrics = run(evaluate_config, writers[candidate], simulated_site, tmp_path / "out", heard(writers[champion]))
    assert metrics["champion"] == word
    assert metrics["champion_gain"] == pytest.approx(gain)
    assert metrics["verdict"] == "no-evidence"  # against its own sft, which writes the same
    assert {row["answers"]["champion"]["text"] for row in read(tmp_path / "out", "samples")} == {champion}
    assert {row["answers"]["ppo"]["text"] for row in read(tmp_path / "out", "samples")} == {candidate}


def test_the_champion_answers_on_the_rounded_base_that_it_was_trained_on(evaluate_config, models, toy_site, tmp_path):
    config = evaluate_config.model_copy(update={"samples_per_question": 1, "shown_samples": 24, "max_questions": 12})
    ppo = with_manifest(tmp_path / "store", models["ppo"], "ppo", quantization="8bit", dtype="fp32")
    run(config, models, toy_site, tmp_path / "rounded", {**heard(models), "ppo": ppo})
    tokenizer, samples = load_tokenizer(models["sft"] / "model"), read(tmp_path / "rounded", "samples")
    queries = [prompts.encode_query(tokenizer, sample["question"], config.max_query_tokens) for sample in samples]
    model = load_model(models["sft"] / "model", "fp32", "cpu", "8bit")
    model = add_lora(model, LORA, "policy", 1)
    rollout = generate(
        model, tokenizer, queries, max_new_tokens=config.max_new_tokens, temperature=1.0,
        seed=seed_of(seed_of(config.seed, "ppo"), 0), device="cpu",
    )  # fmt: skip
    assert [s["answers"]["champion"]["text"] for s in samples] == [
        prompts.decode_response(tokenizer, ids) for ids in rollout.responses
    ]
    assert read(tmp_path / "rounded", "verdict")["champion"]["key"] == ppo.name


def test_one_base_at_a_time_is_in_memory(evaluate_config, models, foreign, toy_site, tmp_path, monkeypatch):
    real, alive = distributed.load_frozen, []

    def models_in_memory() -> int:
        return sum(issubclass(type(thing), PreTrainedModel) for thing in gc.get_objects())

    def counting(*args):
        alive.append(models_in_memory() - before)
        return real(*args)

    config = evaluate_config.model_copy(update={"max_questions": 2, "samples_per_question": 1})
    monkeypatch.setattr(duel, "load_frozen", counting)
    monkeypatch.setattr(evaluate, "load_frozen", counting)
    gc.collect()
    before = models_in_memory()
    gc.disable()  # which would hide by chance what is only held in circles
    try:
        run(config, models, toy_site, tmp_path / "out", heard(foreign))
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]  # champion, base, sft with its adapters, champion's judge


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_come_to_the_same_tables_as_one(
    beside, evaluate_config, models, foreign, simulated_site, tmp_path, monkeypatch, strategy
):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the threads of the parent's pool are not here
                dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
                monkeypatch.setattr(distributed, "_world", World(rank, 2, strategy == "fsdp"))
                run(evaluate_config, models, simulated_site, tmp_path / str(rank), heard(foreign))
                dist.barrier()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    for name in ("verdict", "tables", "samples"):
        assert (tmp_path / "0" / f"{name}.json").read_bytes() == (tmp_path / "1" / f"{name}.json").read_bytes()
    for scorer, row in duels(tmp_path / "0").items():
        assert row["gain"]["value"] == pytest.approx(duels(beside)[scorer]["gain"]["value"], abs=1e-4)
