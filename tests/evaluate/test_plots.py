import numpy as np
import pytest
from PIL import Image

from tasks.evaluate import plots


def test_every_figure_is_a_small_png(page):
    assert set(page.figures) == {"gains", "scores", "reward_accuracy", "reliability", "losses", "ppo"}
    for path in page.figures.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
        assert path.stat().st_size < 100_000


def test_what_was_not_logged_is_not_drawn():
    assert plots.ppo_curves([{"step": 1, "something": 2.0}]) is None
    assert plots.losses({"base": [], "sft": [{"step": 1}]}) is None
    assert plots.reliability({}) is None
    assert plots.reward_accuracy({"accuracy": None}) is None


def test_a_running_mean_of_a_straight_line_is_that_line():
    axis = plots.sheet(1, 1, width=2, height=2)[1][0]
    plots.curve(axis, np.arange(100.0), 3 * np.arange(100.0), "black", "")
    smooth = axis.lines[-1].get_ydata()
    assert smooth.shape == (100,)
    assert smooth[10:90] == pytest.approx(3 * np.arange(10.0, 90.0))


def test_steps_that_lack_a_metric_are_left_out():
    steps, values = plots.series([{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 1}], "loss")
    assert steps.tolist() == [1, 3]
    assert values.tolist() == [2, 1]


def test_the_density_of_one_point_peaks_there_even_without_any_spread():
    grid = np.linspace(0, 1, 101)
    assert grid[plots.kernel_density(np.array([0.3]), grid, 0.0).argmax()] == pytest.approx(0.3)
