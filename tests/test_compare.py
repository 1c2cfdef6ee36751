"""Did transfer help? The statistics hold what they promise; comparisons say what their runs say, and lose none."""

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

# the statistics


def drawn(rng, seeds, rows, gain=0.0, accuracy=1.0, of_seed=0.3):
    """Right and wrong [seeds, rows] twice: rows and seeds have difficulties of their own, and so have pairs of them."""
    row = rng.normal(accuracy, 1, rows)

    def way(gain):
        own = rng.normal(0, 0.3, rows) + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, 0.7, (seeds, rows))
        return row + gain + own > 0

    return way(gain), way(0.0)


def naive(one, other, rng):
    """The textbook's way: rows and paired seeds drawn with replacement, percentiles of the mean."""
    apart = one.astype(float) - other
    seeds, rows = apart.shape
    means = [apart[np.ix_(rng.integers(0, seeds, seeds), rng.integers(0, rows, rows))].mean() for _ in range(300)]
    low, high = np.quantile(means, [0.025, 0.975])
    return not low <= 0 <= high


@pytest.mark.parametrize(("seeds", "rows", "of_seed"), [(1, 76, 0.0), (3, 76, 0.3), (3, 600, 0.3)])
def test_without_a_true_difference_a_verdict_is_rare(seeds, rows, of_seed):
    rng = np.random.default_rng(0)
    wrong, misled = 0, 0
    for number in range(300):
        one, other = drawn(rng, seeds, rows, of_seed=of_seed)
        wrong += difference(one, other, resamples=2000, seed=number).conclusion != "not distinguishable"
        misled += naive(one, other, rng) if rows == 600 and number < 80 else 0
    assert wrong <= 0.08 * 300
    if rows == 600:
        assert misled > 0.12 * 80, "then the few seeds could be resampled, which would be simpler"


@pytest.mark.parametrize(("seeds", "gain", "of_seed"), [(1, 0.5, 0.0), (3, 0.5, 0.3), (5, 1.0, 0.1)])
def test_intervals_hold_the_true_difference_as_often_as_they_say(seeds, gain, of_seed):
    """Over rows and seeds unseen, a way is right where a normal variable is above zero."""
    spread = np.sqrt(1 + 0.3**2 + 0.7**2 + of_seed**2)
    true = norm.cdf((1 + gain) / spread) - norm.cdf(1 / spread)
    rng = np.random.default_rng(1)
    held = 0
    for number in range(200):
        found = difference(*drawn(rng, seeds, 200, gain, of_seed=of_seed), resamples=2000, seed=number)
        held += found.low <= true <= found.high
    assert held >= 0.91 * 200


def test_a_true_difference_is_found_and_has_its_sign():
    rng = np.random.default_rng(0)
    one, other = drawn(rng, 3, 600, gain=1.5, of_seed=0.1)
    found, back = difference(one, other), difference(other, one)
    assert (found.conclusion, back.conclusion) == ("better", "worse")
    assert found.low < found.value < found.high and back.value == -found.value
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.01)
    assert found == difference(one, other)  # equal seeds, equal intervals


@pytest.mark.parametrize("lost", [0, 2, 5])
def test_on_one_seed_it_agrees_with_the_exact_test_of_pairs(lost):
    """McNemar's exact test decides the same, but for one count at the border."""
    rows, other = 76, np.zeros((1, 76))
    exact, ours = [], []
    for gained in range(25):
        one = np.zeros((1, rows))
        one[0, :gained] = 1
        base = other.copy()
        base[0, rows - lost :] = 1 if lost else 0
        ours.append(difference(one, base).conclusion == "better")
        exact.append(gained > lost and binomtest(gained, gained + lost).pvalue < 0.05)
    assert sum(ours) > 5 and sum(a != b for a, b in zip(ours, exact, strict=True)) <= 1


def test_ties_do_not_look_certain():
    right = np.ones((3, 40))
    found = difference(right, right)
    assert found.value == 0 and found.low < 0 < found.high and found.conclusion == "not distinguishable"
    assert required_samples(found).rows is None and required_samples(found).seeds is None
    assert difference(np.ones((3, 40)), np.zeros((3, 40))).high == 1.0  # ends stay where differences can lie


def test_scores_without_bounds_and_other_numbers_of_seeds_are_welcome():
    rng = np.random.default_rng(0)
    losses = rng.exponential(1, (2, 400))
    found = difference(-losses, -losses[:1] - 0.7, largest=None)
    assert found.conclusion == "better" and np.isnan(found.seeds_error) and found.seeds == 1
    five = difference(np.tile(-losses, (3, 1))[:5] + 0.7, -losses, largest=None)
    assert five.seeds == 2 and five.seeds_error > 0
    for one, other in (([[1.0]], [[1.0, 0.0]]), ([[]], [[]]), ([1.0], [1.0]), ([[np.nan]], [[1.0]])):
        with pytest.raises(ValueError, match="scores"):
            difference(one, other)


def test_rows_that_are_needed_are_enough_and_not_far_too_many():
    rng = np.random.default_rng(3)
    one, other = drawn(rng, 1, 100, gain=0.35, of_seed=0)
    found = difference(one, other)
    rows = required_samples(found).rows
    assert found.conclusion == "not distinguishable" and rows > 100
    more, fewer = (int(np.ceil(share * rows / 100)) for share in (1.25, 0.5))
    assert difference(np.tile(one, more), np.tile(other, more)).conclusion == "better"
    assert difference(np.tile(one, fewer), np.tile(other, fewer)).conclusion == "not distinguishable"


def test_where_seeds_are_what_is_missing_seeds_are_asked_for():
    rng = np.random.default_rng(0)
    one, other = drawn(rng, 3, 5000, gain=0.3, of_seed=0.5)
    found = difference(one, other)
    asked = required_samples(found)
    assert found.conclusion == "not distinguishable" and asked.rows is None and asked.seeds > 3


# from run folders to sentences


def measured(folder, method, seed, right, validation=0.5, trained=10, seconds=1.0):
    """A run folder whose test rows are right where `right` says so."""
    make_run(folder / f"{method}-s{seed}", rows=4)
    run = folder / f"{method}-s{seed}"
    writer = TableWriter(run / "predictions.parquet")
    names = ("cat", "dog", "owl")
    rows = []
    for row, correct in enumerate(right):
        label = names[row % 3]
        said = label if correct else names[(row + 1) % 3]
        shares = [0.8 if name == said else 0.1 for name in names]
        rows.append({"split": "test", "row": row, "label": label, "prediction": said})
        rows[-1] |= {"confidence": 0.8, "probabilities": shares}
    writer.write(rows)
    writer.close()
    metrics = {"validation/accuracy": validation, "validation/loss": 1.0, "test/accuracy": float(np.mean(right))}
    (run / "metrics.json").write_text(json.dumps(metrics))
    facts = json.loads((run / "report.json").read_text())
    facts["adapt"] |= {"method": method, "trainable": trained}
    facts["training"]["seconds"] = seconds
    (run / "report.json").write_text(json.dumps(facts))
    return run


def compared(folder, shares, rows=300, seeds=3):
    """A comparison of methods with so many rows right; validation likes the later ones better."""
    rng = np.random.default_rng(0)
    hard = rng.random(rows)
    folders = {method: {} for method in shares}
    for number, (method, share) in enumerate(shares.items()):
        for seed in range(seeds):
            right = hard + rng.normal(0, 0.05, rows) < share
            folders[method][seed] = measured(folder, method, seed, right, 0.5 + number / 10, 10**number, number + 1.0)
    return judge(folders, "test", "2 passes over the same 9 training rows", {}), folders


def test_the_three_sentences(tmp_path):
    helped, _ = compared(tmp_path / "1", {"scratch": 0.6, "frozen": 0.8, "full": 0.9})
    assert helped.conclusion == "helped" and helped.chosen == "full" and helped.baseline == "scratch"
    gain = helped.result("full").score - helped.result("scratch").score
    assert helped.sentence.startswith(f"Transfer helped by {100 * gain:.1f} points of test accuracy (95 % interval ")
    assert not helped.warnings  # full is better than frozen, and nothing else is odd
    hurt, _ = compared(tmp_path / "2", {"scratch": 0.9, "frozen": 0.6})
    assert hurt.conclusion == "hurt" and hurt.sentence.startswith("Transfer hurt by ")
    ends = hurt.result("frozen").difference
    assert f"interval {-100 * ends.high:.1f} to {-100 * ends.low:.1f}" in hurt.sentence and ends.high < 0
    same, _ = compared(tmp_path / "3", {"scratch": 0.8, "frozen": 0.81}, rows=60)
    assert same.conclusion == "not distinguishable" and same.sentence.startswith(
        "Not distinguishable on this test size"
    )
    assert "would be needed" in same.sentence and "60 rows, 3 seeds" in same.sentence


def test_test_rows_do_not_choose_and_the_simplest_is_named_where_it_does_as_well(tmp_path):
    found, _ = compared(tmp_path, {"scratch": 0.5, "frozen": 0.85, "lora": 0.99, "full": 0.85})
    assert found.chosen == "full"  # on validation, though lora is the best on test
    assert found.kept in found.result("full").runs
    (warning,) = found.warnings
    assert warning.startswith("The simplest method is within the noise of the dearest: full minus frozen is")
    assert "1,000 trained parameters and 4.0 s a run against 10 trained parameters and 2.0 s" in warning
    lines = format_comparison(found).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["scratch", "frozen", "lora", "full"]


def test_without_scratch_the_simplest_is_the_baseline(tmp_path):
    found, _ = compared(tmp_path, {"full": 0.9, "frozen": 0.6, "lora": 0.9})
    assert found.baseline == "frozen" and found.conclusion == "better"
    assert "better than frozen by" in found.sentence and "not known without scratch" in found.sentence


def test_what_failed_is_said_and_the_rest_is_judged(tmp_path):
    found, folders = compared(tmp_path, {"scratch": 0.5, "full": 0.9})
    shutil.rmtree(folders["full"][2])
    again = judge(folders | {"lora": {}}, "test", "a budget", {"lora": [Failure(0, "no room (lora-s0.log)")]})
    assert again.conclusion == "helped" and len(again.result("full").scores) == 2
    assert "lora, seed 0, failed: no room (lora-s0.log)" in again.warnings
    assert any(warning.startswith("full, seed 2, failed: run folder") for warning in again.warnings)
    other = measured(tmp_path / "other", "full", 1, np.ones(299))
    strange = judge(folders | {"full": {0: folders["full"][0], 1: other}}, "test", "a budget", {})
    assert any("not measured on the same rows" in warning for warning in strange.warnings)
    alone = judge({"scratch": folders["scratch"], "full": {}}, "test", "a budget", {})
    assert alone.conclusion is None and alone.sentence.startswith("No verdict")
    with pytest.raises(ArtifactError, match="no training of the comparison has a result: full, seed 0: broken"):
        judge({"full": {}}, "test", "a budget", {"full": [Failure(0, "broken")]})


def test_one_seed_and_few_rows_and_validation_are_said(tmp_path):
    found, _ = compared(tmp_path, {"scratch": 0.5, "full": 0.9}, rows=30, seeds=1)
    assert any(warning.startswith("One seed") for warning in found.warnings)
    assert any(warning.startswith("30 rows are few") for warning in found.warnings)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_verdict_is_on_the_page_of_the_comparison_and_of_the_kept_run(tmp_path):
    found, folders = compared(tmp_path, {"scratch": 0.6, "full": 0.9}, rows=90, seeds=1)
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


# real trainings


@pytest.fixture(scope="module")
def quick(images, tiny_timm, tmp_path_factory):
    """A comparison of two methods with two seeds on the coloured images; its folder and how it was called."""
    folder = tmp_path_factory.mktemp("compared") / "runs"
    train = hftl.TrainConfig(num_epochs=2, batch_size_per_device=12, trackers=[], eval_steps=6)
    call = {"methods": ["scratch", "frozen"], "seeds": 2, "run": hftl.RunConfig(train=train), "output_dir": folder}
    return hftl.compare(str(images), tiny_timm["test_resnet"], **call), folder, call


def test_every_training_leaves_a_run_of_its_own_and_differs_in_the_method_alone(quick):
    import yaml

    found, folder, _ = quick
    assert json.loads((folder / "compare.json").read_text()) == found.to_dict()
    settings = {}
    for result in found.results:
        assert result.seeds == [0, 1] and result.trained and result.seconds
        assert 2**26 < result.peak_bytes < 2**33  # of a process of its own
        for name, score in zip(result.runs, result.scores, strict=True):
            metrics = json.loads((folder / name / "metrics.json").read_text())
            assert metrics["test/accuracy"] == pytest.approx(score)
            assert hftl.load(folder / name).labels == ["blue", "green", "red"]
            settings[name] = yaml.safe_load((folder / name / "config.yaml").read_text())
    one, other = settings["scratch-s0"], settings["frozen-s0"]
    assert one["data"] == other["data"] and one["train"]["num_epochs"] == other["train"]["num_epochs"] == 2
    assert one["train"]["seed"] == 0 and settings["scratch-s1"]["train"]["seed"] == 1
    assert (one["model"]["pretrained"], other["model"]["pretrained"]) == (False, True)
    assert "transfer-gain" in Page(folder / found.kept / "report.html").titles


def test_complete_runs_are_read_again_and_other_settings_refused(quick, images, tiny_timm, capsys):
    found, folder, call = quick
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/model/*")}
    again = hftl.compare(str(images), tiny_timm["test_resnet"], **call)
    assert again == found and {file: file.stat().st_mtime_ns for file in folder.glob("*/model/*")} == before
    shorter = hftl.RunConfig(train=hftl.TrainConfig(num_epochs=1, batch_size_per_device=12, trackers=[]))
    with pytest.raises(ConfigError, match="holds a run with other settings") as refused:
        hftl.compare(str(images), tiny_timm["test_resnet"], **(call | {"run": shorter}))
    assert "train.num_epochs was 2" in str(refused.value)


def test_a_training_that_cannot_begin_is_a_line_and_no_verdict_is_given(quick, images, tmp_path, capsys):
    """test_vit has weights on the hub alone, which is not reached."""
    arguments = ["compare", images, "--model", "test_vit", "--methods", "scratch", "full", "--num_seeds", "1"]
    config = tmp_path / "short.yaml"
    config.write_text("{model: {image_size: 32}, train: {max_steps: 1, trackers: []}}")
    arguments += ["--config", config, "--output_dir", tmp_path / "runs"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    assert ended.value.code == 1 and "1 steps over the same 36 training rows" in printed
    assert "full    seed 0: failed: " in printed and "No verdict: of all methods only scratch has a result" in printed
    assert "test_vit" in (tmp_path / "runs" / "full-s0.log").read_text()


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(images, tiny_timm, tmp_path, monkeypatch):
    def refused(*arguments, **options):
        with pytest.raises(ConfigError) as caught:
            hftl.compare(*arguments, **({"output_dir": tmp_path / "runs"} | options))
        assert not (tmp_path / "runs").exists()
        return str(caught.value)

    data, model = str(images), tiny_timm["test_resnet"]
    said = refused(data, model, ["scratch", "forzen"], seeds=0)
    assert (
        "'forzen' is not one of scratch, probe, frozen, lora, full. Did you mean 'frozen'?" in said and "seeds" in said
    )
    assert "name at least two" in refused(data, model, ["full", "full"])
    pushing = hftl.RunConfig(hub=hftl.HubConfig(repo_id="user/name"))
    assert "makes many runs and pushes none" in refused(data, model, run=pushing)
    assert "not as both" in refused(data, model, run=pushing, config="some.yaml")
    said = refused(str(tmp_path / "nowhere"), model)
    assert "nowhere" in said
    bare = hftl.RunConfig(hftl.DataConfig(validation_fraction=0.0), train=hftl.TrainConfig(batch_size_per_device=99))
    shutil.copytree(images, tmp_path / "two", ignore=shutil.ignore_patterns("val"))
    said = refused(str(tmp_path / "two"), "resnet5", run=bare)
    assert all(part in said for part in ("validation_fraction", "effective batch of 99", "resnet5")), said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without several processes of a launcher" in refused(data, model)


def test_a_stop_is_passed_on_and_keeps_what_is_complete(quick, images, tiny_timm, monkeypatch):
    from hftl.selection import comparison

    _, folder, call = quick
    real = comparison.run_in_child

    def stopping(work, *arguments, **options):
        if work is comparison.train:
            raise Stopped("stopped (SIGTERM) after step 3 of 9; the state is in the run folder. The same command …")
        return real(work, *arguments, **options)

    monkeypatch.setattr(comparison, "run_in_child", stopping)
    more = call | {"methods": ["scratch", "full"]}
    with pytest.raises(Stopped, match=r"full, seed 0: stopped \(SIGTERM\) after step 3 of 9\. Complete runs are kept"):
        hftl.compare(str(images), tiny_timm["test_resnet"], **more)
    assert (folder / "scratch-s0" / "model").is_dir()
    monkeypatch.setattr(comparison, "run_in_child", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped, match="the same call goes on"):
        hftl.compare(str(images), tiny_timm["test_resnet"], **more)


def test_a_child_returns_or_says_how_it_ended(tmp_path, capfd):
    log = tmp_path / "log"
    assert run_in_child(os.path.join, "a", "b") == "a/b"
    with pytest.raises(ChildFailedError, match=r"was killed \(by the system where memory was short"):
        run_in_child(signal.raise_signal, int(signal.SIGKILL), log=log)
    with pytest.raises(ChildFailedError, match="status 3 and no answer"):
        run_in_child(os._exit, 3)
    with pytest.raises(ChildFailedError, match="ZeroDivisionError"):
        run_in_child(divmod, 1, 0, log=log)
    assert "Traceback" in log.read_text()
    with pytest.raises(ArtifactError, match="run folder .* does not exist"):
        run_in_child(RunRecord, tmp_path / "nothing")
    assert "Traceback" not in capfd.readouterr().err


def test_a_script_needs_no_guard_and_trainings_no_torch_here(tmp_path):
    """multiprocessing would run a script without `if __name__ == "__main__":` again in each child."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, os\nprint('once')\nfrom hftl.selection.comparison import compare\n"
        "from hftl.selection import isolated\nisolated._IMPORTS = ()\n"
        "assert isolated.run_in_child(os.getpid) != os.getpid()\nassert 'torch' not in sys.modules\n"
    )
    assert run_python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')").split() == ["once"]
