"""Runs of a sweep that end early: the rule on hand-made scores, and a sweep in miniature."""

import csv
import json

import pytest
from tiny import save_tiny_prior
from tiny_training import STEPS, command_line, tiny_overrides, write_images

from ud2m.training.pruning import MedianPruning, history


def runs(folder, *scores):
    for number, values in enumerate(scores):
        (folder / str(number)).mkdir()
        (folder / str(number) / "scores.json").write_text(json.dumps({str(step): v for step, v in values.items()}))


def test_a_run_below_the_median_of_the_others_ends(tmp_path, capsys):
    runs(tmp_path, {10: 1.0}, {10: 2.0}, {10: 4.0}, {10: 5.0}, {20: 9.0})  # the fifth had no score at step 10
    (tmp_path / "mine").mkdir()
    assert MedianPruning(tmp_path / "mine", 10).should_prune(10, 2.9)
    assert "ends at step 10: its best score, 2.9, is below 3, the median of 4 other runs" in capsys.readouterr().err
    assert not MedianPruning(tmp_path / "mine", 10).should_prune(10, 3.0)
    assert capsys.readouterr().err == ""


def test_the_best_score_so_far_counts_after_a_resume_too(tmp_path):
    runs(tmp_path, *[{10: 3.0, 20: 3.0}] * 4)
    (tmp_path / "mine").mkdir()
    assert not MedianPruning(tmp_path / "mine", 10).should_prune(10, 3.5)
    assert not MedianPruning(tmp_path / "mine", 10).should_prune(20, 1.0)
    assert history(tmp_path / "mine") == {"10": 3.5, "20": 3.5}
    # Step 10 is done again, worse: what came after it does not count.
    assert MedianPruning(tmp_path / "mine", 10).should_prune(10, 2.0)


@pytest.mark.parametrize(("after", "others"), [(11, 4), (10, 3)])
def test_no_run_ends_before_its_time_or_beside_a_few(after, others, tmp_path):
    runs(tmp_path, *[{10: 3.0}] * others)
    (tmp_path / "mine").mkdir()
    assert not MedianPruning(tmp_path / "mine", after).should_prune(10, 0.0)


@pytest.mark.slow
def test_a_sweep_ends_the_run_that_falls_behind_and_says_where(tmp_path):
    tiny = tiny_overrides(save_tiny_prior(tmp_path / "prior"), write_images(tmp_path / "images"))
    folder, rates = tmp_path / "sweep", ["1e-05", "2e-05", "3e-05", "4e-05", "8.0"]  # the last one throws psi far off
    options = [f"hydra.sweep.dir={folder}", f"steps={2 * STEPS}", f"validate_every={STEPS}"]
    rates_option = "training.optimizer.lr_psi=" + ",".join(rates)
    assert (
        command_line("-m", *tiny, *options, rates_option, f"give_up_after={STEPS}", "training.optimizer.warmup=0") == 0
    )
    with open(folder / "sweep.csv", newline="") as file:
        rows = {row["training.optimizer.lr_psi"]: row for row in csv.DictReader(file)}
    assert {rate: rows[rate]["gave_up_at"] for rate in rates} == dict.fromkeys(rates[:4], "-") | {"8.0": str(STEPS)}
    assert rows["8.0"]["rank"] == "5"
    assert list(history(folder / "4")) == [str(STEPS)]
    assert list(history(folder / "0")) == [str(STEPS), str(2 * STEPS)]
    assert (folder / "4" / "export" / "config.json").is_file()


def test_the_number_of_steps_is_checked(tmp_path):
    with pytest.raises(ValueError, match="give_up_after must be at least 1 step, or null, got 0"):
        MedianPruning(tmp_path, 0)
