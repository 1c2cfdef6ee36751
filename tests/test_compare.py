"""`hftl compare`: statistics match simulations and exact tests, comparisons match their runs."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from conftest import run_python
from scipy.stats import binomtest, norm
from test_report import Page, make_run

import hftl
from hftl.cli.main import main
from hftl.errors import ArtifactError, ConfigError, Stopped
from hftl.evaluation.evaluate import TableWriter
from hftl.reporting import compare_reports, write_report
from hftl.reporting.run_record import RunRecord
from hftl.run.child_process import ChildFailedError, run_in_child
from hftl.selection.results import Failure, format_comparison, judge
from hftl.statistics.score_difference import difference, required_samples

# Statistics


def simulate(rng, seeds, rows, gain=0.0, accuracy=1.0, seed_std=0.3):
    """Returns correctness [seeds, rows] of a method and of the baseline, with effects of rows, seeds and both."""
    row = rng.normal(accuracy, 1, rows)

    def method(gain):
        noise = rng.normal(0, 0.3, rows) + rng.normal(0, seed_std, (seeds, 1)) + rng.normal(0, 0.7, (seeds, rows))
        return row + gain + noise > 0

    return method(gain), method(0.0)


def percentile_bootstrap_excludes_zero(scores, baseline, rng):
    """Textbook bootstrap: resamples rows and paired seeds, percentiles of the mean."""
    differences = scores.astype(float) - baseline
    seeds, rows = differences.shape
    means = [differences[np.ix_(rng.integers(0, seeds, seeds), rng.integers(0, rows, rows))].mean() for _ in range(300)]
    low, high = np.quantile(means, [0.025, 0.975])
    return not low <= 0 <= high


@pytest.mark.parametrize(("seeds", "rows", "seed_std"), [(1, 76, 0.0), (3, 76, 0.3), (3, 600, 0.3)])
def test_difference_without_effect_rarely_excludes_zero(seeds, rows, seed_std):
    rng = np.random.default_rng(0)
    errors, textbook_errors = 0, 0
    for number in range(300):
        scores, baseline = simulate(rng, seeds, rows, seed_std=seed_std)
        errors += difference(scores, baseline, resamples=2000, seed=number).conclusion != "not distinguishable"
        if rows == 600 and number < 80:
            textbook_errors += percentile_bootstrap_excludes_zero(scores, baseline, rng)
    assert errors <= 0.08 * 300
    if rows == 600:
        assert textbook_errors > 0.12 * 80, "otherwise the simpler bootstrap over seeds would do"


@pytest.mark.parametrize(("seeds", "gain", "seed_std"), [(1, 0.5, 0.0), (3, 0.5, 0.3), (5, 1.0, 0.1)])
def test_difference_intervals_have_nominal_coverage(seeds, gain, seed_std):
    """Over all rows and seeds, a method is correct where a normal variable is above zero."""
    std = np.sqrt(1 + 0.3**2 + 0.7**2 + seed_std**2)
    expected = norm.cdf((1 + gain) / std) - norm.cdf(1 / std)
    rng = np.random.default_rng(1)
    covered = 0
    for number in range(200):
        measured = difference(*simulate(rng, seeds, 200, gain, seed_std=seed_std), resamples=2000, seed=number)
        covered += measured.low <= expected <= measured.high
    assert covered >= 0.91 * 200


def test_difference_returns_sign_of_true_effect():
    rng = np.random.default_rng(0)
    scores, baseline = simulate(rng, 3, 600, gain=1.5, seed_std=0.1)
    gain, loss = difference(scores, baseline), difference(baseline, scores)
    assert (gain.conclusion, loss.conclusion) == ("better", "worse")
    assert gain.low < gain.value < gain.high and loss.value == -gain.value
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low), abs=0.01)
    assert gain == difference(scores, baseline)  # equal seeds, equal intervals


@pytest.mark.parametrize("lost", [0, 2, 5])
def test_difference_with_one_seed_matches_mcnemar_test(lost):
    """McNemar's exact test gives the same result, except for one count at the boundary."""
    rows = 76
    exact, ours = [], []
    for gained in range(25):
        scores, baseline = np.zeros((1, rows)), np.zeros((1, rows))
        scores[0, :gained] = 1
        baseline[0, rows - lost :] = 1 if lost else 0
        ours.append(difference(scores, baseline).conclusion == "better")
        exact.append(gained > lost and binomtest(gained, gained + lost).pvalue < 0.05)
    assert sum(ours) > 5 and sum(a != b for a, b in zip(ours, exact, strict=True)) <= 1


def test_difference_of_ties_is_not_distinguishable():
    scores = np.ones((3, 40))
    tie = difference(scores, scores)
    assert tie.value == 0 and tie.low < 0 < tie.high and tie.conclusion == "not distinguishable"
    assert required_samples(tie).rows is None and required_samples(tie).seeds is None
    assert difference(np.ones((3, 40)), np.zeros((3, 40))).high == 1.0  # intervals stay within possible differences


def test_difference_supports_unbounded_scores_and_seed_counts():
    rng = np.random.default_rng(0)
    losses = rng.exponential(1, (2, 400))
    one_seed = difference(-losses, -losses[:1] - 0.7, largest=None)
    assert one_seed.conclusion == "better" and np.isnan(one_seed.seeds_error) and one_seed.seeds == 1
    five_seeds = difference(np.tile(-losses, (3, 1))[:5] + 0.7, -losses, largest=None)
    assert five_seeds.seeds == 2 and five_seeds.seeds_error > 0
    for scores, baseline in (([[1.0]], [[1.0, 0.0]]), ([[]], [[]]), ([1.0], [1.0]), ([[np.nan]], [[1.0]])):
        with pytest.raises(ValueError, match="scores"):
            difference(scores, baseline)


def test_required_rows_are_sufficient_and_not_excessive():
    rng = np.random.default_rng(3)
    scores, baseline = simulate(rng, 1, 100, gain=0.35, seed_std=0)
    measured = difference(scores, baseline)
    rows = required_samples(measured).rows
    assert measured.conclusion == "not distinguishable" and rows > 100
    more, fewer = (int(np.ceil(factor * rows / 100)) for factor in (1.25, 0.5))
    assert difference(np.tile(scores, more), np.tile(baseline, more)).conclusion == "better"
    assert difference(np.tile(scores, fewer), np.tile(baseline, fewer)).conclusion == "not distinguishable"


def test_required_samples_returns_seeds_for_seed_noise():
    rng = np.random.default_rng(0)
    measured = difference(*simulate(rng, 3, 5000, gain=0.3, seed_std=0.5))
    required = required_samples(measured)
    assert measured.conclusion == "not distinguishable" and required.rows is None and required.seeds > 3


# Comparison of run folders


def make_scored_run(folder, method, seed, correct, validation=0.5, trainable=10, seconds=1.0):
    """Writes a run folder with a test prediction per element of `correct` (whether it equals the label)."""
    make_run(folder / f"{method}-s{seed}", rows=4)
    run = folder / f"{method}-s{seed}"
    writer = TableWriter(run / "predictions.parquet")
    names = ("cat", "dog", "owl")
    rows = []
    for row, is_correct in enumerate(correct):
        label = names[row % 3]
        prediction = label if is_correct else names[(row + 1) % 3]
        probabilities = [0.8 if name == prediction else 0.1 for name in names]
        rows.append({"split": "test", "row": row, "label": label, "prediction": prediction})
        rows[-1] |= {"confidence": 0.8, "probabilities": probabilities}
    writer.write(rows)
    writer.close()
    metrics = {"validation/accuracy": validation, "validation/loss": 1.0, "test/accuracy": float(np.mean(correct))}
    (run / "metrics.json").write_text(json.dumps(metrics))
    facts = json.loads((run / "report.json").read_text())
    facts["adapt"] |= {"method": method, "trainable": trainable}
    facts["training"]["seconds"] = seconds
    (run / "report.json").write_text(json.dumps(facts))
    return run


def compare_accuracies(folder, accuracies, rows=300, seeds=3):
    """Compares methods with the given test accuracies; later methods have a higher validation accuracy."""
    rng = np.random.default_rng(0)
    difficulty = rng.random(rows)
    folders = {method: {} for method in accuracies}
    for index, (method, accuracy) in enumerate(accuracies.items()):
        for seed in range(seeds):
            correct = difficulty + rng.normal(0, 0.05, rows) < accuracy
            validation, trainable, seconds = 0.5 + index / 10, 10**index, index + 1.0
            folders[method][seed] = make_scored_run(folder, method, seed, correct, validation, trainable, seconds)
    return judge(folders, "test", "2 epochs on the same 9 training rows", {}), folders


def test_compared_runs_return_helped_hurt_or_undecided(tmp_path):
    helped, _ = compare_accuracies(tmp_path / "1", {"scratch": 0.6, "frozen": 0.8, "full": 0.9})
    assert helped.conclusion == "helped" and helped.chosen == "full" and helped.baseline == "scratch"
    gain = helped.result("full").score - helped.result("scratch").score
    assert helped.sentence.startswith(f"Transfer helped by {100 * gain:.1f} points of test accuracy (95 % interval ")
    assert not helped.warnings  # full is better than frozen
    hurt, _ = compare_accuracies(tmp_path / "2", {"scratch": 0.9, "frozen": 0.6})
    assert hurt.conclusion == "hurt" and hurt.sentence.startswith("Transfer hurt by ")
    loss = hurt.result("frozen").difference
    assert f"interval {-100 * loss.high:.1f} to {-100 * loss.low:.1f}" in hurt.sentence and loss.high < 0
    undecided, _ = compare_accuracies(tmp_path / "3", {"scratch": 0.8, "frozen": 0.81}, rows=60)
    assert undecided.conclusion == "not distinguishable"
    assert undecided.sentence.startswith("Not distinguishable on this test size")
    assert "would be needed" in undecided.sentence and "60 rows, 3 seeds" in undecided.sentence


def test_compare_selects_on_validation_only(tmp_path):
    comparison, _ = compare_accuracies(tmp_path, {"scratch": 0.5, "frozen": 0.85, "lora": 0.99, "full": 0.85})
    assert comparison.chosen == "full"  # best on validation; lora is the best on test
    assert comparison.kept in comparison.result("full").runs
    (warning,) = comparison.warnings
    assert warning.startswith(
        "The simplest method is not distinguishable from the most expensive: full minus frozen is"
    )
    assert "1,000 trainable parameters and 4.0 s per run against 10 trainable parameters and 2.0 s" in warning
    lines = format_comparison(comparison).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["scratch", "frozen", "lora", "full"]


def test_compare_without_scratch_uses_simplest_baseline(tmp_path):
    comparison, _ = compare_accuracies(tmp_path, {"full": 0.9, "frozen": 0.6, "lora": 0.9})
    assert comparison.baseline == "frozen" and comparison.conclusion == "better"
    assert "better than frozen by" in comparison.sentence and "unknown without scratch" in comparison.sentence


def test_compare_reports_failures_and_compares_others(tmp_path):
    _, folders = compare_accuracies(tmp_path, {"scratch": 0.5, "full": 0.9})
    shutil.rmtree(folders["full"][2])
    partial = judge(folders | {"lora": {}}, "test", "a budget", {"lora": [Failure(0, "disk full (lora-s0.log)")]})
    assert partial.conclusion == "helped" and len(partial.result("full").scores) == 2
    assert "lora, seed 0, failed: disk full (lora-s0.log)" in partial.warnings
    assert any(warning.startswith("full, seed 2, failed: ") for warning in partial.warnings)
    other_rows = make_scored_run(tmp_path / "other", "full", 1, np.ones(299))
    mixed = judge(folders | {"full": {0: folders["full"][0], 1: other_rows}}, "test", "a budget", {})
    assert any("was evaluated on other rows of test" in warning for warning in mixed.warnings)
    single = judge({"scratch": folders["scratch"], "full": {}}, "test", "a budget", {})
    assert single.conclusion is None and single.sentence == "No conclusion: only scratch has a result."
    with pytest.raises(ArtifactError, match="no run of the comparison has a result: full, seed 0: broken"):
        judge({"full": {}}, "test", "a budget", {"full": [Failure(0, "broken")]})


def test_compare_warns_about_one_seed_and_few_rows(tmp_path):
    comparison, _ = compare_accuracies(tmp_path, {"scratch": 0.5, "full": 0.9}, rows=30, seeds=1)
    assert any(warning.startswith("One seed") for warning in comparison.warnings)
    assert any(warning.startswith("30 rows are few") for warning in comparison.warnings)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_conclusion_is_on_comparison_page_and_best_run_report(tmp_path):
    found, folders = compare_accuracies(tmp_path, {"scratch": 0.6, "full": 0.9}, rows=90, seeds=1)
    runs = [folder for of_method in folders.values() for folder in of_method.values()]
    page = Page(compare_reports(runs, tmp_path / "compare.html", found.to_dict()))
    assert page.titles[0] == "transfer-gain" and found.sentence in page.text
    rows = {row[0]: row for row in page.tables["Training methods"][1:]}
    ends = found.result("full").difference
    assert f"{ends.value:.4f} [{ends.low:.4f}, {ends.high:.4f}]" in rows["full"][3] and "–" in rows["scratch"][3]
    drawn = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert any("points of test accuracy vs scratch" in alt and "full" in alt for alt in drawn)
    kept = tmp_path / found.kept
    (kept / "compare.json").write_text(json.dumps(found.to_dict()))
    assert Page(write_report(kept)).titles[1] == "transfer-gain"
    assert "transfer-gain" not in Page(write_report(runs[0])).titles


# Runs


@pytest.fixture(scope="module")
def quick(images, tiny_timm, tmp_path_factory):
    """Comparison of two methods with two seeds on the color images, with its folder and its arguments."""
    folder = tmp_path_factory.mktemp("compared") / "runs"
    train = hftl.TrainConfig(num_epochs=2, batch_size_per_device=12, trackers=[], eval_steps=6)
    call = {"methods": ["scratch", "frozen"], "num_seeds": 2, "run": hftl.RunConfig(train=train), "output_dir": folder}
    return hftl.compare(str(images), tiny_timm["test_resnet"], **call), folder, call


def test_compare_runs_differ_in_method_and_seed_only(quick):
    import yaml

    found, folder, _ = quick
    assert json.loads((folder / "compare.json").read_text()) == found.to_dict()
    settings = {}
    for result in found.results:
        assert result.seeds == [0, 1] and result.trainable and result.seconds
        assert 2**26 < result.peak_bytes < 2**33  # memory of a separate process
        for name, score in zip(result.runs, result.scores, strict=True):
            metrics = json.loads((folder / name / "metrics.json").read_text())
            assert metrics["test/accuracy"] == pytest.approx(score)
            assert hftl.load(folder / name).labels == ["blue", "green", "red"]
            settings[name] = yaml.safe_load((folder / name / "config.yaml").read_text())
    scratch, frozen = settings["scratch-s0"], settings["frozen-s0"]
    assert scratch["data"] == frozen["data"]
    assert scratch["train"]["num_epochs"] == frozen["train"]["num_epochs"] == 2
    assert scratch["train"]["seed"] == 0 and settings["scratch-s1"]["train"]["seed"] == 1
    assert (scratch["model"]["pretrained"], frozen["model"]["pretrained"]) == (False, True)
    assert "transfer-gain" in Page(folder / found.kept / "report.html").titles


def test_compare_reuses_complete_runs_of_equal_settings(quick, images, tiny_timm, capsys):
    found, folder, call = quick
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/model/*")}
    again = hftl.compare(str(images), tiny_timm["test_resnet"], **call)
    assert again == found and {file: file.stat().st_mtime_ns for file in folder.glob("*/model/*")} == before
    shorter = hftl.RunConfig(train=hftl.TrainConfig(num_epochs=1, batch_size_per_device=12, trackers=[]))
    with pytest.raises(ConfigError, match="contains a run with other settings") as refused:
        hftl.compare(str(images), tiny_timm["test_resnet"], **(call | {"run": shorter}))
    assert "train.num_epochs was 2" in str(refused.value)


def test_compare_logs_failed_run_and_no_conclusion(quick, images, tmp_path, capsys):
    """The weights of test_vit are on the Hub only, which is unreachable."""
    arguments = ["compare", images, "--model", "test_vit", "--methods", "scratch", "full", "--num_seeds", "1"]
    config = tmp_path / "short.yaml"
    config.write_text("{model: {image_size: 32}, train: {max_steps: 1, trackers: []}}")
    arguments += ["--config", config, "--output_dir", tmp_path / "runs"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    assert ended.value.code == 1 and "1 steps on the same 36 training rows" in printed
    assert "full    seed 0: failed: " in printed and "No conclusion: only scratch has a result" in printed
    assert "test_vit" in (tmp_path / "runs" / "full-s0.log").read_text()


def test_compare_rejects_invalid_arguments_before_training(images, tiny_timm, tmp_path, monkeypatch):
    def error_of(*arguments, **options):
        with pytest.raises(ConfigError) as caught:
            hftl.compare(*arguments, **({"output_dir": tmp_path / "runs"} | options))
        assert not (tmp_path / "runs").exists()
        return str(caught.value)

    data, model = str(images), tiny_timm["test_resnet"]
    message = error_of(data, model, ["scratch", "forzen"], num_seeds=0)
    assert "'forzen' is invalid; allowed: scratch, probe, frozen, lora, full. Did you mean 'frozen'?" in message
    assert "num_seeds: 0 is invalid" in message
    assert "Pass at least two" in error_of(data, model, ["full", "full"])
    pushing = hftl.RunConfig(hub=hftl.HubConfig(repo_id="user/name"))
    assert "hub.repo_id: 'user/name' is invalid" in error_of(data, model, run=pushing)
    assert "config: conflicts with `run`" in error_of(data, model, run=pushing, config="some.yaml")
    assert "missing-folder" in error_of(str(tmp_path / "missing-folder"), model)
    bare = hftl.RunConfig(hftl.DataConfig(validation_fraction=0.0), train=hftl.TrainConfig(batch_size_per_device=99))
    shutil.copytree(images, tmp_path / "two", ignore=shutil.ignore_patterns("val"))
    said = error_of(str(tmp_path / "two"), "resnet5", run=bare)
    assert all(part in said for part in ("validation_fraction", "effective batch size of 99", "resnet5")), said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a multi-process launcher" in error_of(data, model)


def test_compare_raises_stopped_and_preserves_complete_runs(quick, images, tiny_timm, monkeypatch):
    from hftl.selection import comparison

    _, folder, call = quick
    run_in_child = comparison.run_in_child

    def stop_training(work, *arguments, **options):
        if work is comparison.train:
            raise Stopped("stopped (SIGTERM) after step 3 of 9; the state is in the run folder. The same command …")
        return run_in_child(work, *arguments, **options)

    monkeypatch.setattr(comparison, "run_in_child", stop_training)
    call = call | {"methods": ["scratch", "full"]}
    with pytest.raises(Stopped, match=r"full, seed 0: stopped \(SIGTERM\) after step 3 of 9\. Complete runs are pres"):
        hftl.compare(str(images), tiny_timm["test_resnet"], **call)
    assert (folder / "scratch-s0" / "model").is_dir()
    monkeypatch.setattr(comparison, "run_in_child", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped, match="Repeat the call to resume"):
        hftl.compare(str(images), tiny_timm["test_resnet"], **call)


def test_run_in_child_returns_result_or_raises_reason(tmp_path, capfd):
    log = tmp_path / "log"
    assert run_in_child(os.path.join, "a", "b") == "a/b"
    with pytest.raises(ChildFailedError, match="was killed with SIGKILL, possibly by the system"):
        run_in_child(signal.raise_signal, int(signal.SIGKILL), log=log)
    with pytest.raises(ChildFailedError, match="status 3 and no result"):
        run_in_child(os._exit, 3)
    with pytest.raises(ChildFailedError, match="ZeroDivisionError"):
        run_in_child(divmod, 1, 0, log=log)
    assert "Traceback" in log.read_text()
    with pytest.raises(ArtifactError, match="run folder .* does not exist"):
        run_in_child(RunRecord, tmp_path / "missing")
    assert "Traceback" not in capfd.readouterr().err


def test_run_in_child_needs_no_main_guard_and_no_torch(tmp_path):
    """multiprocessing runs scripts without `if __name__ == "__main__":` again in each child process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, os\nprint('once')\nfrom hftl.selection.comparison import compare\n"
        "from hftl.run import child_process\nchild_process._IMPORTS = ()\n"
        "assert child_process.run_in_child(os.getpid) != os.getpid()\nassert 'torch' not in sys.modules\n"
    )
    assert run_python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')").split() == ["once"]
