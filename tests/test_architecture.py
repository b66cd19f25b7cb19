"""Who may import whom, and what must stay light."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "pyarrow", "numpy", "sklearn", "matplotlib", "bitsandbytes")


def imported(modules: str, watched: tuple[str, ...]) -> str:
    code = f"import sys\nimport {modules}\nprint(*(name for name in {watched!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_imports_run_against_the_direction_of_the_data():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scheduler_loads_no_torch():
    """flows and every task.py are imported where the flow runs, which may be a machine without a GPU or much memory."""
    assert imported("flows.cli, flows.rlhf, flows.steps, flows.plan", HEAVY) == ""


def test_the_command_loads_prefect_only_for_the_verbs_that_need_it():
    assert imported("flows.cli", ("prefect", *HEAVY)) == ""


def test_what_the_steps_share_loads_neither_prefect_nor_torch():
    assert (
        imported("tasks.artifacts, tasks.step, tasks.progress, tasks.compute, tasks.prompts, tasks.config", ("prefect", *HEAVY))
        == ""
    )
