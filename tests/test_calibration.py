"""What a probability is worth: Brier score, calibration error without chance, thresholds, words and picture."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from matplotlib.figure import Figure
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, precision_recall_curve
from test_training import scalars_of
from test_verdict import ARGS, candidate_of, dataset_of, judged, queries_of, scores_of

from train_bert_rerank import (
    BINS,
    METRICS,
    Reliability,
    brier_score,
    calibration_of,
    cross_fit_threshold,
    draw_reliability,
    draw_score_distribution,
    halves,
    judge,
    probability_line,
    threshold_for,
    train,
    verdict_text,
)

CANDIDATES = 8


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def lists_of(queries, candidates=CANDIDATES):
    return list(np.arange(queries * candidates).reshape(queries, candidates))


def drawn(generator, queries, offset=0.0, slope=1.0):
    """Labels [N] of queries that share an effect, and probabilities [N] that are `offset` and `slope` off."""
    logits = generator.normal(-1, 1.5, (queries, CANDIDATES))
    labels = generator.random(logits.shape) < expit(logits)
    return labels.ravel().astype(float), expit(slope * logits + offset).ravel()


# ---- Brier score and bins --------------------------------------------------------------------------------------------
def test_brier_score_and_bins_are_scikit_learns(generator):
    labels, probabilities = drawn(generator, 100, offset=0.7)
    assert brier_score(probabilities, labels) == pytest.approx(brier_score_loss(labels, probabilities))
    reliability = Reliability(probabilities, labels, lists_of(100))
    relevant, mean = calibration_curve(labels, probabilities, n_bins=BINS, strategy="quantile")
    np.testing.assert_allclose(reliability.means(labels), relevant)
    np.testing.assert_allclose(reliability.means(probabilities), mean)
    assert np.bincount(reliability.bins).tolist() == [80] * BINS
    assert reliability.raw_error == pytest.approx(np.abs(relevant - mean).mean())


def test_equal_probabilities_share_a_bin_whatever_the_order_of_their_rows():
    labels = np.array([1.0, 0, 0, 0] * 25)
    reliability = Reliability(np.full(100, 0.25), labels, lists_of(25, 4))
    assert reliability.raw_error == 0 and reliability.error == 0
    apart = Reliability(np.full(100, 0.25), np.sort(labels), lists_of(25, 4))
    assert apart.raw_error == 0, "bins by place in the file would hold relevant rows alone"


@pytest.mark.parametrize("count", [1, 2, 3, 9, 11])
def test_fewer_rows_than_bins_are_measured_as_they_are(count):
    labels, probabilities = np.arange(count) % 2.0, np.linspace(0.1, 0.8, count)
    calibration = calibration_of(logit(probabilities), labels, [np.arange(count)], seed=0)
    assert calibration["raw_error"] == pytest.approx(np.abs(labels - probabilities).mean(), abs=0.5)
    assert calibration["error"] is None and calibration["ci95"] is None and sum(calibration["bins"]["rows"]) == count
    assert json.loads(json.dumps(calibration, allow_nan=False)) == calibration


def test_the_order_of_the_file_changes_nothing(generator):
    labels, probabilities = drawn(generator, 60, offset=0.3)
    first = Reliability(probabilities, labels, lists_of(60))
    order = generator.permutation(480)
    lists = [np.flatnonzero(order // CANDIDATES == query) for query in generator.permutation(60)]
    other = Reliability(probabilities[order], labels[order], lists)
    assert other.level == pytest.approx(first.level, abs=1e-12)
    assert other.ci95(3) == pytest.approx(first.ci95(3), abs=1e-12)


# ---- Without what chance puts into it --------------------------------------------------------------------------------
def test_the_level_of_chance_is_the_error_of_labels_drawn_by_the_probabilities(generator):
    _, probabilities = drawn(generator, 80)
    errors, levels = [], []
    for _ in range(200):
        labels = (generator.random(len(probabilities)) < probabilities).astype(float)
        reliability = Reliability(probabilities, labels, lists_of(80))
        errors.append(reliability.raw_error)
        levels.append(reliability.level)
    assert np.mean(levels) == pytest.approx(np.mean(errors), rel=0.07)


@pytest.mark.parametrize("offset, slope, true", [(0.0, 1.0, 0.0), (0.7, 1.0, 0.118), (1.5, 2.0, 0.138)])
def test_the_error_is_the_true_one_on_average_and_its_interval_holds_it(generator, offset, slope, true):
    labels, probabilities = drawn(generator, 30_000, offset, slope)
    assert Reliability(probabilities, labels, lists_of(30_000)).raw_error == pytest.approx(true, abs=0.006)
    errors, raw, held = [], [], 0
    for draw in range(60):
        reliability = Reliability(*drawn(generator, 40, offset, slope)[::-1], lists_of(40))
        errors.append(reliability.error)
        raw.append(reliability.raw_error)
        low, high = reliability.ci95(draw)
        held += low <= true + 0.003 and true - 0.003 <= high
    assert held >= 52, "19 of 20 intervals hold it"
    assert np.mean(errors) == pytest.approx(true, abs=0.025) and np.mean(raw) > np.mean(errors)
    if true:  # where the level itself would take a third of it away
        assert np.mean(errors) > true - 0.015


def test_the_level_of_chance_is_that_of_right_probabilities_also_where_these_are_far_off(generator):
    labels = (generator.random(800) < 0.1).astype(float)
    reliability = Reliability(generator.uniform(0.89, 0.91, 800), labels, lists_of(100))
    right = Reliability(generator.uniform(0.09, 0.11, 800), labels, lists_of(100))
    assert reliability.level == pytest.approx(right.level, rel=0.25)
    assert reliability.error == pytest.approx(0.8, abs=0.03)


def test_grades_are_measured_by_their_mean_and_bring_less_chance_than_zeros_and_ones(generator):
    probabilities = generator.uniform(0.2, 0.8, 800)
    grades = np.clip(probabilities + generator.uniform(-0.15, 0.15, 800), 0, 1)
    binary = (generator.random(800) < probabilities).astype(float)
    by_grades, by_binary = (Reliability(probabilities, labels, lists_of(100)) for labels in (grades, binary))
    assert by_grades.level < by_binary.level / 3 and by_grades.error < 0.01


def test_an_error_lies_in_its_interval_where_queries_are_all_alike():
    dataset = queries_of(40)
    probabilities = expit(scores_of([1, 2] * 20))
    reliability = Reliability(probabilities, dataset.labels.numpy(), dataset.lists["all"])
    low, high = reliability.ci95(0)
    assert low <= reliability.error <= high


# ---- Thresholds ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9])
def test_a_threshold_takes_as_many_rows_as_the_precision_allows(generator, precision):
    labels = (generator.random(400) < 0.3).astype(float)
    scores = labels * 2 + generator.normal(0, 1, 400)
    threshold = threshold_for(precision, labels, scores)
    precisions, recalls, thresholds = precision_recall_curve(labels, scores)
    lowest = thresholds[np.flatnonzero(precisions[:-1] >= precision)[0]]
    assert thresholds[thresholds < lowest].max() < threshold < lowest
    taken = scores >= threshold
    assert labels[taken].mean() >= precision and taken.sum() == (scores >= lowest).sum()


def test_a_precision_that_no_threshold_reaches_has_none(generator):
    scores = np.linspace(-1, 1, 40)
    assert threshold_for(0.5, np.zeros(40), scores) is None
    assert threshold_for(0.9, np.array([0.0, 1.0] * 20), scores[::-1]) is None, "the first is irrelevant"
    assert threshold_for(0.5, np.ones(40), scores) == -1, "all are taken"
    labels = np.array([1.0, 0, 0, 0] * 10)
    assert threshold_for(0.3, labels, np.zeros(40)) is None and threshold_for(0.25, labels, np.zeros(40)) == 0, "ties"


def test_precision_and_recall_of_a_threshold_are_those_on_the_half_that_did_not_choose_it(generator):
    labels = np.tile([1.0] + [0.0] * 7, 100)
    scores = 1.5 * labels + generator.normal(0, 1, 800)
    found = cross_fit_threshold(0.5, labels, scores, lists_of(100), seed=42)
    hits = taken = 0
    for chooses, measures in (halves(100, 42), halves(100, 42)[::-1]):
        rows = np.concatenate([np.arange(8) + 8 * query for query in chooses])
        others = np.concatenate([np.arange(8) + 8 * query for query in measures])
        is_taken = scores[others] >= threshold_for(0.5, labels[rows], scores[rows])
        taken += is_taken.sum()
        hits += labels[others][is_taken].sum()
    assert found == {"threshold": threshold_for(0.5, labels, scores), "rows": taken,
                     "precision": pytest.approx(hits / taken), "recall": pytest.approx(hits / 100)}  # fmt: skip


def test_scores_that_know_nothing_are_promised_no_precision_that_chance_gave_them(generator):
    labels = np.tile([1.0] + [0.0] * 7, 100)
    reached, given = 0, 0
    for _ in range(60):
        scores = generator.normal(0, 1, 800)
        reached += threshold_for(0.25, labels, scores) is not None
        given += cross_fit_threshold(0.25, labels, scores, lists_of(100), seed=1) is not None
    assert reached > 20 and given < 10, "one row in eight is relevant"


def test_few_rows_show_no_precision(generator):
    labels = np.tile([1.0] + [0.0] * 7, 40)
    scores = 9 * labels + generator.normal(0, 1, 320)  # all relevant rows first
    assert cross_fit_threshold(0.999, labels[:128], scores[:128], lists_of(16), 1) is None, "of 16 rows"
    assert cross_fit_threshold(0.999, labels, scores, lists_of(40), 1)["rows"] == 40


def test_a_precision_that_one_half_reaches_and_the_other_misses_is_not_reached():
    first_half, _ = halves(100, 1)
    labels, scores = np.zeros(200), np.zeros(200)
    for query in range(100):
        rows = slice(2 * query, 2 * query + 2)
        if query in first_half[:40]:
            labels[rows], scores[rows] = [1, 0], [2 - query / 1000, -1]  # of these each first row is relevant
        elif query not in first_half:
            labels[rows], scores[rows] = [query % 3 == 0, 0], [2 - query / 1000 + (query % 3 == 0), -1]
    assert threshold_for(0.6, labels, scores) is not None
    found = cross_fit_threshold(0.6, labels, scores, lists_of(100, 2), seed=1)
    assert found is None, "a third of the second half's rows from there on are relevant"


def test_a_precision_is_given_where_it_is_missed_by_no_more_than_chance(generator):
    given, held = 0, []
    for _ in range(60):
        labels = (generator.random(800) < 0.3).astype(float)
        found = cross_fit_threshold(0.8, labels, 2.5 * labels + generator.normal(0, 1, 800), lists_of(100), seed=1)
        if found:
            given += 1
            held.append(found["precision"])
            assert found["rows"] > 50
    assert given > 45 and np.mean(held) == pytest.approx(0.8, abs=0.03)


def test_a_threshold_holds_for_what_predict_gives_where_high_probabilities_are_equal_in_fp32(generator):
    dataset = queries_of(60)
    scores = generator.normal(25, 0.5, 300) + 4 * dataset.labels.numpy()
    report, *_ = judged(dataset, scores, scores)
    assert set(report["thresholds"].values()) == {None}, "all rows have the probability 1"


def test_of_too_few_queries_there_are_no_thresholds_that_could_be_checked():
    assert cross_fit_threshold(0.5, np.array([1.0, 0] * 3), np.arange(6.0)[::-1], lists_of(3, 2), seed=0) is None


# ---- The report and its words ----------------------------------------------------------------------------------------
def test_the_report_has_calibration_before_and_after_and_thresholds(generator):
    dataset = queries_of(40)
    base, tuned = generator.normal(0, 1, 200), scores_of([1, 2] * 20)
    report, *_ = judged(dataset, base, tuned)
    labels, lists = dataset.labels.numpy(), dataset.lists["all"]
    assert report["calibration"] == {
        "before": calibration_of(base, labels, lists, ARGS["seed"]),
        "after": calibration_of(tuned, labels, lists, ARGS["seed"]),
    }
    line = probability_line(report, ARGS)
    assert f"Brier score {report['calibration']['after']['brier']:.3f}, " in line
    assert report["calibration"]["after"]["brier"] != pytest.approx(report["calibration"]["before"]["brier"], abs=0.01)
    assert set(report["thresholds"]) == {"0.5", "0.8", "0.9"} and report["thresholds"]["0.9"] is None
    assert set(report["thresholds"]["0.5"]) == {"threshold", "rows", "precision", "recall"}


def said_of(labels, probabilities, sizes, epochs=3):
    dataset = dataset_of(labels, sizes)
    base = candidate_of(dataset, logit(np.array(probabilities)), step=0)
    report, *_ = judge([base], dataset, dataset.metric, {**ARGS, "epochs": 0})
    return probability_line(report, {"epochs": epochs})


def test_a_run_says_what_a_probability_of_08_was_worth():
    labels, probabilities = [1.0, 0, 0, 0, 0], [0.9, 0.85, 0.8001, 0.1, 0.2]
    line = said_of(labels * 40, probabilities * 40, [5] * 40)
    assert re.match(r"Probabilities of final_model: Brier score 0\.\d{3}, calibration error 0\.\d{3}, "
                    r"95 % interval \[0\.\d{3}, 0\.\d{3}\]\. ", line)  # fmt: skip
    assert line.endswith(" Rows with 0.8 or more: 120, 40 of them relevant (33%). tools/calibrate.py may mend them.")
    assert said_of(labels * 40, probabilities * 40, [5] * 40, epochs=0).startswith("Probabilities of the model: ")


def test_where_no_row_is_so_sure_or_queries_are_few_or_labels_are_grades_it_says_so(generator):
    assert " Rows with 0.8 or more: 0." in said_of([1.0, 0] * 20, [0.6, 0.3] * 20, [2] * 20)
    few = said_of([1.0, 0] * 10, [0.9, 0.3] * 10, [2] * 10)
    assert ", too few queries for a calibration error. Rows" in few and "calibrate.py" not in few
    graded = said_of([0.75, 0.5, 0] * 20, [0.9, 0.85, 0.3] * 20, [3] * 20)
    assert " Rows with 0.8 or more: 40, mean label 0.62 on a scale from 0 to 1." in graded


def test_probabilities_that_are_right_are_not_sent_to_be_mended(generator):
    labels, probabilities = drawn(generator, 60)
    line = said_of(labels.tolist(), probabilities.tolist(), [CANDIDATES] * 60)
    assert "95 % interval [0.000, " in line and "calibrate.py" not in line
    labels, probabilities = drawn(generator, 600, offset=0.25)
    line = said_of(labels.tolist(), probabilities.tolist(), [CANDIDATES] * 600)
    assert "95 % interval [0.000, " not in line and "calibrate.py" not in line, "surely off, but by little"


def test_the_words_stand_with_the_figures_before_the_verdict(generator):
    dataset = queries_of(40)
    report, *_ = judged(dataset, generator.normal(0, 1, 200), scores_of([1, 2] * 20))
    for epochs in (0, 3):
        args = {**ARGS, "model_name_or_path": TINY, "epochs": epochs}
        lines = verdict_text(report, args).splitlines()
        assert lines[len(METRICS)] == probability_line(report, args)


# ---- A run -----------------------------------------------------------------------------------------------------------
def test_every_evaluation_logs_and_prints_both_and_the_picture_shows_the_report(tmp_path, write_jsonl, capsys):
    rows = (ROOT / "default_eval_data.jsonl").read_text(encoding="utf-8").splitlines()[: 40 * 8]
    path = write_jsonl("eval.jsonl", map(json.loads, rows))
    report = train({"model_name_or_path": TINY, "train_dataset": str(ROOT / "default_train_data.jsonl"), "lr": 3e-4,
                    "eval_dataset": path, "epochs": 2, "output_dir": str(tmp_path / "out"), "mixed_precision": "no",
                    "base_interpolation": ()})["report"]  # fmt: skip
    said = capsys.readouterr().out
    assert len(re.findall(r", brier 0\.\d{4}, calibration_error 0\.\d{4}\n", said)) == 3
    logged = scalars_of(tmp_path / "out")
    for name in ("eval/brier", "eval/calibration_error"):
        assert [step for step, _ in logged[name]] == [0, 13, 26]
    assert logged["eval/brier"][0][1] == pytest.approx(report["calibration"]["before"]["brier"], abs=1e-6)
    assert logged["eval/calibration_error"][0][1] == pytest.approx(report["calibration"]["before"]["error"], abs=1e-6)

    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()]
    labels = np.array([row["label"] for row in rows])
    after = np.array([row["score_after"] for row in rows])
    high = labels[after >= 0.8]
    share = pytest.approx(high.mean()) if len(high) else None
    assert report["calibration"]["after"]["high"] == {"from": 0.8, "rows": len(high), "label": share}
    assert report["calibration"]["after"]["brier"] == pytest.approx(brier_score_loss(labels, after))
    assert "calibration error" in Path(tmp_path, "out", "final_model", "README.md").read_text("utf-8")


@pytest.mark.parametrize("titles", [["the model as it is"], ["before: base model", "after: final_model"]])
def test_the_panel_shows_the_bins_of_the_report(generator, titles, tmp_path):
    labels, probabilities = drawn(generator, 40)
    calibration = {name: calibration_of(logit(probabilities) + shift, labels, lists_of(40), 0)
                   for name, shift in (("before", 1.0), ("after", 0.0))}  # fmt: skip
    axes = Figure().subplots()
    draw_reliability(axes, titles, calibration)
    diagonal, *lines = axes.get_lines()
    assert len(lines) == len(titles) and diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    bins = calibration["after"]["bins"]
    np.testing.assert_array_equal(lines[-1].get_xydata().T, [bins["probability"], bins["label"]])
    assert f"error {calibration['after']['error']:.3f}" in lines[-1].get_label()
    columns = dict.fromkeys(titles, probabilities)
    draw_score_distribution(columns, labels, calibration, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
