"""The ledger of fake tensors, against arithmetic; and what is free, against files of a cgroup."""

import pytest
import torch

from tasks import memory


def test_the_ledger_counts_what_is_alive_and_takes_no_memory():
    with memory.tracing() as ledger:
        one = torch.zeros(1000, 1000, 1000)  # 4 GB, were it real
        two = one + one
        assert ledger.now == 8e9
        del two
        assert (ledger.now, ledger.peak) == (4e9, 8e9)
        view = one[:10]
        del one
        assert ledger.now == 4e9  # a view keeps its storage
        del view
        assert ledger.now == 0
        ledger.mark()
        assert ledger.peak == 0


def test_the_peak_holds_what_the_backward_pass_needs():
    with memory.tracing() as ledger:
        x = torch.zeros(1000, 1000, requires_grad=True)
        ledger.mark()
        y = x
        for _ in range(5):
            y = y.exp()  # keeps its result
        assert ledger.now == 6 * 4e6
        y.sum().backward()
        del y
        assert ledger.now == 2 * 4e6  # x and its gradient


def test_what_lies_in_the_heap_counts_with_its_holes_and_large_tensors_do_not():
    with memory.tracing(holes=2.0) as ledger:
        small, large = torch.zeros(2**20), torch.zeros(2**24)
        assert ledger.now == 2 * small.nbytes + large.nbytes


def test_code_that_reads_numbers_out_of_tensors_gets_some():
    with memory.tracing():
        assert torch.zeros(2, 3).tolist() == [[pytest.approx(0, abs=1e-6)] * 3] * 2
        assert bool(torch.zeros(1) < 1)
        assert int(torch.zeros(1, dtype=torch.long)) == 1


def test_a_cgroups_limit_counts_and_its_page_cache_is_free(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert memory._left_in_cgroup(tmp_path) == [500]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_cgroup(tmp_path) == []


def test_a_step_that_does_not_fit_is_refused_with_what_would_lower_it():
    free = memory.available("cpu")
    assert memory.check_fits("sft", free // 2, "training", "cpu") is None
    with pytest.raises(ValueError, match=r"sft needs about .* GB at its peak \(training\).*micro_batch_tokens.*--allow-memory"):
        memory.check_fits("sft", 3 * free, "training", "cpu", allow=False)
    assert "sft needs about" in str(memory.check_fits("sft", 3 * free, "training", "cpu", allow=True))
