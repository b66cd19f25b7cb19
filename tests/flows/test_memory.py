"""Estimates of a step's memory: against a real run in a fresh process, and as the settings change."""

import json
import subprocess
import sys

import pytest

from flows import memory
from flows.presets import PRESETS, resolve
from tasks.base.config import BaseModelConfig
from tasks.compute import Compute

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
CPU = Compute(device="cpu", threads=1)
RUN = """
import json, sys, logging
import prefect
from pathlib import Path
from flows.presets import PRESETS
from tasks.compute import Compute
from tasks.progress import Progress
from tasks.sft.train import train
from tasks.step import high_water_mark
base, data, out = map(Path, sys.argv[1:])
train(PRESETS["ci"].sft, base=base, data=data, out=out, compute=Compute(device="cpu", threads=1), progress=Progress("sft"))
print(json.dumps(high_water_mark()))
"""


def test_a_real_run_peaks_within_15_percent_of_the_estimate(tiny_model, toy_site, tmp_path):
    """Most of it is the process here: this says nothing about models whose tensors are most of it."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, tiny_model, toy_site, tmp_path], capture_output=True, text=True, timeout=300, check=True
    )
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    estimated = memory.estimate_memory("sft", PRESETS["ci"], SHAPE, CPU).peak_bytes
    assert estimated == pytest.approx(measured, rel=0.15)


def test_layers_are_alike_so_two_depths_give_all_others():
    config = resolve("ci")
    peaks = {
        layers: memory._PHASES["sft"](config, memory._Traced({**SHAPE, "hidden_size": 256}, layers, "cpu", CPU, memory.Texts()))
        for layers in (2, 3, 4)
    }
    slope = peaks[3]["training"] - peaks[2]["training"]
    assert peaks[4]["training"] == pytest.approx(peaks[2]["training"] + 2 * slope, rel=0.01)


def test_what_should_lower_the_peak_lowers_it():
    wide = {**SHAPE, "hidden_size": 512, "intermediate_size": 2048}
    config = resolve("ci", {"sft.batch_size": 4})

    def peak(config=config, **compute):
        traced = memory._Traced(wide, 2, "cpu", CPU.model_copy(update=compute), memory.Texts())
        return max(memory._PHASES["sft"](config, traced).values())

    plain = peak()
    assert peak(micro_batch_tokens=256) < plain
    assert peak(gradient_checkpointing=True) < plain
    assert peak(resolve("ci", {"sft.batch_size": 4, "sft.dtype": "bf16"})) < plain
    assert peak(resolve("ci", {"sft.batch_size": 4, "sft.tuning": "full"})) > plain
    eight, four = (peak(resolve("ci", {"sft.batch_size": 4, "sft.quantization": q})) for q in ("8bit", "4bit"))
    assert four < eight


@pytest.mark.parametrize("step", sorted(memory.PROCESS))
def test_every_step_that_loads_a_model_can_be_traced(step):
    found = memory.estimate_memory(step, resolve("ci"), SHAPE, CPU)
    assert memory.PROCESS[step] < found.peak_bytes < 2e9


def test_a_model_that_was_never_fetched_has_no_known_shape():
    config = BaseModelConfig(source="hub", hub_id="some/model", revision="0" * 40)
    with pytest.raises(memory.Unknown, match="some/model is known once it has been fetched"):
        memory.architecture_of(config, None)


def test_a_large_step_is_refused_before_it_begins_and_a_small_one_is_not():
    memory.before_running("sft", resolve("ci"), None, CPU)
    huge = resolve("ci", {"base.scratch.hidden_size": 16_384, "base.scratch.layers": 24, "base.scratch.intermediate_size": 65_536})
    with pytest.raises(ValueError, match="sft needs about"):
        memory.before_running("sft", huge, None, CPU)
    assert memory.before_running("sft", huge, None, CPU.model_copy(update={"allow_memory": True})) is not None
