"""Metrics against trec_eval, scikit-learn and brute force over the orders of tied rows; what cannot be measured."""

import itertools

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, P, R, Success, nDCG
from sklearn.metrics import average_precision_score, f1_score, ndcg_score, precision_recall_curve

from train_bert_rerank import (
    METRICS,
    RANKING,
    average_precision,
    best_f1,
    candidate_lists,
    hit_at_k,
    measure,
    metric_values,
    mrr_at_k,
    ndcg_at_k,
    recall_at_k,
    tie_groups,
)

TREC_EVAL = {"ndcg@10": nDCG @ 10, "ndcg@5": nDCG @ 5, "mrr@10": RR(rel=2) @ 10, "map": AP(rel=2),
             "hit@1": P(rel=2) @ 1, "hit@3": Success(rel=2) @ 3, "recall@10": R(rel=2) @ 10}  # fmt: skip
ANY_K = {"ndcg@20": nDCG @ 20, "ndcg@1": nDCG @ 1, "mrr@4": RR(rel=2) @ 4, "hit@7": Success(rel=2) @ 7,
         "recall@2": R(rel=2) @ 2}  # fmt: skip


@pytest.fixture
def generator():
    return np.random.default_rng(1)


def lists_of(sizes):
    """The row numbers of queries with so many rows each, one query after the other."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def for_metrics(lists, labels, wanted="auto"):
    """The lists of each metric where the rows of each query are `lists`."""
    queries = np.concatenate([np.full(len(rows), number) for number, rows in enumerate(lists)])
    return candidate_lists(queries[np.argsort(np.concatenate(lists))].tolist(), labels, wanted)


def measured(lists, labels, scores):
    labels = np.array(labels, dtype=float)
    return measure(for_metrics(lists, labels), labels, np.array(scores, dtype=float))


def metrics_of(lists, labels, scores):
    return measured(lists, labels, scores)[0]


# ---- Outside references ----------------------------------------------------------------------------------------------
def test_metrics_are_those_of_trec_eval_on_runs_without_ties(generator):
    left_out = dict.fromkeys(TREC_EVAL, 0)
    for _ in range(20):
        lists = lists_of(generator.integers(1, 30, 10))
        total = lists[-1][-1] + 1
        grades, scores = generator.choice(5, total, p=[0.5, 0.25, 0.1, 0.1, 0.05]), generator.permutation(total) / 7
        ours = metrics_of(lists, grades / 4, scores)
        for metric in ANY_K:
            ours[metric] = measure(for_metrics(lists, grades / 4, metric), grades / 4, scores)[0][metric]
        for metric, theirs in (TREC_EVAL | ANY_K).items():
            qrels, run = [], []
            for rows in lists:
                alike = set(grades[rows] if metric.startswith("ndcg") else grades[rows] >= 2)
                if len(alike) == 1:
                    left_out[metric] = left_out.get(metric, 0) + 1
                    continue
                qrels += [ir_measures.Qrel(f"q{rows[0]}", f"d{row}", int(grades[row])) for row in rows]
                run += [ir_measures.ScoredDoc(f"q{rows[0]}", f"d{row}", float(scores[row])) for row in rows]
            expected = ir_measures.calc_aggregate([theirs], qrels, run)[theirs]
            assert ours[metric] == pytest.approx(expected, abs=1e-6), metric
    assert min(left_out.values()) > 0  # else the runs would not show that such queries are left out


@pytest.mark.parametrize("cutoff", [1, 3, 10])
def test_ndcg_of_ties_is_that_of_scikit_learn(generator, cutoff):
    for _ in range(100):
        labels, scores = generator.integers(0, 5, 14) / 4, generator.integers(0, 4, 14).astype(float)
        expected = ndcg_score([labels], [scores], k=cutoff)
        assert ndcg_at_k(labels, scores, cutoff) == pytest.approx(expected, abs=1e-9)


def test_average_precision_over_pairs_is_that_of_scikit_learn_where_no_scores_are_tied(generator):
    for _ in range(50):
        labels, scores = generator.integers(0, 5, 60) / 4, generator.permutation(60) - 30.0
        lists, expected = lists_of([6] * 10), average_precision_score(labels >= 0.5, scores)
        assert average_precision(labels, scores) == pytest.approx(expected, abs=1e-9)
        assert metrics_of(lists, labels, scores)["average_precision"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("levels", [4, 1000], ids=["tied", "hardly tied"])
def test_best_f1_is_the_best_of_scikit_learns_curve_and_its_threshold_yields_it(generator, levels):
    for _ in range(50):
        labels, scores = generator.integers(0, 5, 40) / 4, generator.integers(0, levels, 40) / 3 - 5
        precision, recall, _ = precision_recall_curve(labels >= 0.5, scores)
        curve = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        highest, threshold = best_f1(labels, scores)
        assert highest == pytest.approx(curve.max(), abs=1e-9)
        assert f1_score(labels >= 0.5, scores >= threshold) == pytest.approx(highest, abs=1e-9)


def test_the_threshold_stands_midway_between_the_rows_that_it_parts():
    assert best_f1(np.array([0.0, 1, 0, 1]), np.array([0.0, 3, -4, 2])) == (1.0, 1.0)
    assert best_f1(np.array([0.0, 1, 0, 1]), np.array([2.0, 2, -4, 2])) == (0.8, -1.0)
    assert best_f1(np.array([0.0, 1]), np.array([4.0, 3])) == (pytest.approx(2 / 3), -np.inf)  # all rows are above


# ---- Ties ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cutoff", [1, 2, 3, 10])
def test_tied_rows_get_the_mean_over_all_their_orders(generator, cutoff):
    metrics = {
        "ndcg": (ndcg_at_k, cutoff), "mrr": (mrr_at_k, cutoff), "hit": (hit_at_k, cutoff),
        "recall": (recall_at_k, cutoff), "average precision": (average_precision,),
    }  # fmt: skip
    for _ in range(15):
        labels, scores = generator.integers(0, 3, 5) / 2, generator.integers(0, 3, 5).astype(float)
        labels[0] = 1
        orders = [scores + 1e-3 * np.array(order) for order in itertools.permutations(range(5))]
        for name, (metric, *k) in metrics.items():
            expected = np.mean([metric(labels, order, *k) for order in orders])
            assert metric(labels, scores, *k) == pytest.approx(expected, abs=1e-9), name


def test_hit_at_1_of_tied_rows_is_the_share_of_relevant_ones_among_the_first():
    lists, labels = lists_of([5, 4]), [1, 0.75, 0, 0.25, 1, 1, 0, 0, 0]
    assert metrics_of(lists, labels, [2, 2, 2, 2, -1, 1, 3, 3, 3])["hit@1"] == pytest.approx((2 / 4 + 0 / 3) / 2)


@pytest.mark.parametrize("level", [0.3, 0.0, -7.77, 1234.5678, -1234.5678])
@pytest.mark.parametrize("order", ["best first", "best last", "shuffled"])
def test_a_model_that_scores_everything_alike_gets_chance_whatever_the_order_of_the_file(generator, level, order):
    labels = {"best first": np.arange(12) == 0, "best last": np.arange(12) == 11, "shuffled": np.arange(12) == 5}[order]
    scores = level * (1 + 1e-7 * generator.uniform(-1, 1, 24))  # what differs by rounding only is a tie
    places = np.arange(1, 13)
    assert metrics_of(lists_of([12, 12]), np.tile(labels, 2), scores) == {
        "ndcg@10": pytest.approx(sum(1 / np.log2(places[:10] + 1)) / 12),
        "ndcg@5": pytest.approx(sum(1 / np.log2(places[:5] + 1)) / 12),
        "mrr@10": pytest.approx(sum(1 / places[:10]) / 12),
        "map": pytest.approx(np.mean(1 / places)),
        "hit@1": pytest.approx(1 / 12),
        "hit@3": pytest.approx(3 / 12),
        "recall@10": pytest.approx(10 / 12),
        "average_precision": pytest.approx(np.mean([(1 + (k - 1) / 23) / k for k in range(1, 25)])),
        "best_f1": pytest.approx(2 * 2 / (24 + 2)),
    }


def test_the_metrics_of_random_scores_are_on_average_those_of_scores_that_are_all_alike(generator):
    lists, labels = lists_of([14, 3, 7]), generator.choice([0, 0.25, 0.5, 1], 24)
    draws = [metrics_of(lists, labels, generator.standard_normal(24)) for _ in range(800)]
    chance = metrics_of(lists, labels, np.full(24, 0.7))
    for metric in (*RANKING, "average_precision"):
        values = [draw[metric] for draw in draws]
        assert np.mean(values) == pytest.approx(chance[metric], abs=4 * np.std(values) / len(values) ** 0.5), metric


def test_groups_of_tied_scores_stand_best_first():
    group, sizes = tie_groups(np.array([-1.0, 2.5, 0, 2.5, -1, -1]))
    assert group.tolist() == [2, 0, 1, 0, 2, 2] and sizes.tolist() == [2, 1, 3]


@pytest.mark.parametrize("levels", [(0.25, 0.2501, 0.25, -3), (1234.5, 1234.6, 1234.5, 3), (-20.0, -20.001, -20, 7.5)])
def test_ties_are_scores_that_differ_by_rounding_and_no_others(generator, levels):
    scores = np.array(levels)
    noisy = (scores * (1 + 1e-7 * generator.uniform(-1, 1, 4))).astype(np.float32).astype(float)
    for each in (scores, noisy):
        group, sizes = tie_groups(each)
        assert group[0] == group[2] and len(set(group)) == 3 and sizes.sum() == 4


def test_scores_that_differ_by_rounding_are_ties_at_every_level(generator):
    for level in generator.uniform(-10, 10, 200):
        scores = (level * (1 + 1e-7 * generator.uniform(-1, 1, 6))).astype(np.float32).astype(float)
        assert len(tie_groups(scores)[1]) == 1, level


# ---- By hand ---------------------------------------------------------------------------------------------------------
def test_metrics_are_those_computed_by_hand():
    labels, scores = [0.25, 0.5, 1, 0], [-2, 0.5, 1, 3]  # in the order of scores: 0, 1, 0.5, 0.25
    dcg, ideal = 1 / np.log2(3) + 0.5 / 2 + 0.25 / np.log2(5), 1 + 0.5 / np.log2(3) + 0.25 / 2
    assert metrics_of(lists_of([4]), labels, scores) == {
        "ndcg@10": pytest.approx(dcg / ideal),
        "ndcg@5": pytest.approx(dcg / ideal),
        "mrr@10": 0.5,
        "map": pytest.approx((1 / 2 + 2 / 3) / 2),
        "hit@1": 0.0,
        "hit@3": 1.0,
        "recall@10": 1.0,
        "average_precision": pytest.approx((1 / 2 + 2 / 3) / 2),
        "best_f1": pytest.approx(2 * 2 / (3 + 2)),
    }


def test_ranking_metrics_are_means_over_queries_and_the_others_are_over_all_pairs():
    labels, scores = [1, 0, 0, 1, 0], [-5, -6, 9, 7, 8]  # the second query's scores are all above the first's
    assert metrics_of(lists_of([2, 3]), labels, scores) == {
        "ndcg@10": pytest.approx((1 + 1 / 2) / 2),
        "ndcg@5": pytest.approx((1 + 1 / 2) / 2),
        "mrr@10": pytest.approx((1 + 1 / 3) / 2),
        "map": pytest.approx((1 + 1 / 3) / 2),
        "hit@1": 0.5,
        "hit@3": 1.0,
        "recall@10": 1.0,
        "average_precision": pytest.approx((1 / 3 + 2 / 4) / 2),
        "best_f1": pytest.approx(2 * 2 / (4 + 2)),
    }


def test_ndcg_and_mrr_end_at_the_tenth_place():
    labels, scores = np.zeros(12), np.arange(12.0)
    labels[1] = 1  # the eleventh
    assert mrr_at_k(labels, scores) == ndcg_at_k(labels, scores) == 0
    assert average_precision(labels, scores) == pytest.approx(1 / 11)
    labels[1:3] = 0, 1  # the tenth
    assert mrr_at_k(labels, scores) == pytest.approx(1 / 10)
    assert ndcg_at_k(labels, scores) == pytest.approx(1 / np.log2(11))


def test_ndcg_tells_grades_apart_and_the_other_metrics_part_them_at_a_half():
    lists, scores = lists_of([4]), [4, 3, 2, 1]
    falling, swapped, both = (metrics_of(lists, labels, scores) for labels in (
        [1, 0.5, 0.49, 0], [0.5, 1, 0.49, 0], [0.5, 1, 0, 0.49]
    ))  # fmt: skip
    assert falling == dict.fromkeys(METRICS, 1.0)
    assert both["ndcg@10"] < swapped["ndcg@10"] < 1
    without = {"ndcg@10": None, "ndcg@5": None}
    assert falling | without == swapped | without == both | without


def test_shuffling_the_file_changes_neither_metrics_nor_health(generator):
    queries, labels = np.repeat(np.arange(24), 5), generator.random(120).round(1)
    scores, order = generator.integers(-3, 4, 120).astype(float), generator.permutation(120)
    lists, shuffled = ([np.flatnonzero(ids == query) for query in range(24)] for ids in (queries, queries[order]))
    after = measured(shuffled, labels[order], scores[order])
    for ours, theirs in zip(measured(lists, labels, scores), after, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12) and None not in ours.values()


# ---- What says nothing -----------------------------------------------------------------------------------------------
def test_each_metric_takes_the_queries_that_say_something_about_it():
    labels = np.array([1, 0, 1, 1, 0, 0.2, 0.4, 0.5, 0.5, 0.75, 0.5, 0.5, 0.49])
    mixed, relevant, single, irrelevant, alike, graded, close = lists = lists_of([2, 2, 1, 2, 2, 2, 2])

    def kept(metric):
        return [rows.tolist() for rows in for_metrics(lists, labels)[metric]]

    assert kept("ndcg@10") == [rows.tolist() for rows in (mixed, irrelevant, graded, close)]
    for metric in RANKING[2:]:
        assert kept(metric) == [mixed.tolist(), close.tolist()]
    assert kept("average_precision") == kept("all") == [rows.tolist() for rows in lists]
    for same in ([0.5, 0.75, 1], [0.25, 0, 0.49]):  # pairs that are all relevant, or all irrelevant
        assert for_metrics(lists_of([2, 1]), np.array(same))["average_precision"] == []
    assert not any(candidate_lists([], np.array([])).values())


def test_a_querys_rows_are_one_list_wherever_they_stand_in_the_file():
    lists = candidate_lists(["b", "a", "b", "c", "a"], np.array([1, 0, 0, 1, 1]))
    assert [rows.tolist() for rows in lists["all"]] == [[0, 2], [1, 4], [3]]
    assert [rows.tolist() for rows in lists["map"]] == [[0, 2], [1, 4]]


def test_queries_that_say_nothing_change_no_metric_of_queries():
    metrics = metrics_of(lists_of([3, 2, 1]), [0, 1, 0, 1, 1, 0], [3, 2, 1, 0.9, 0.1, 5])
    assert {metric: metrics[metric] for metric in RANKING} == {
        "ndcg@10": pytest.approx(1 / np.log2(3)), "ndcg@5": pytest.approx(1 / np.log2(3)), "mrr@10": 0.5, "map": 0.5,
        "hit@1": 0.0, "hit@3": 1.0, "recall@10": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "labels", "measured"),
    [
        ([1, 1, 1], [1, 0, 0.5], ["average_precision", "best_f1"]),  # a row a query: nothing to rank
        ([3, 1], [0, 0.25, 0.49, 0], ["ndcg@10", "ndcg@5"]),  # nothing relevant
        ([3, 1], [0.5, 0.75, 1, 1], ["ndcg@10", "ndcg@5"]),  # everything relevant
        ([3, 1], [1, 1, 1, 1], []),
        ([2, 2], [0, 0, 0, 0], []),
        ([2, 2], [1, 0, 0, 0], list(METRICS)),
    ],
)
def test_what_cannot_be_measured_is_none(sizes, labels, measured):
    metrics = metrics_of(lists_of(sizes), labels, np.arange(len(labels)))
    assert list(metrics) == list(METRICS)
    assert [key for key, value in metrics.items() if value is not None] == measured
    assert {type(value) for value in metrics.values()} <= {float, type(None)}  # JSON takes no numpy


def health_of(sizes, labels, probabilities):
    probabilities = np.array(probabilities)
    return measured(lists_of(sizes), labels, np.log(probabilities / (1 - probabilities)))[1]


def test_health_is_that_computed_by_hand():
    health = health_of([3, 1, 2], [1, 0.5, 0, 0.25, 0, 0], [0.9, 0.5, 0.1, 0.995, 0.3, 0.005])
    assert health == {
        "spread": pytest.approx((0.8 + 0.295) / 2),  # a query of one row has none
        "saturated": pytest.approx(2 / 6),
        "relevant": pytest.approx((0.9 + 0.5) / 2),  # from 0.5 on
        "irrelevant": pytest.approx((0.1 + 0.995 + 0.3 + 0.005) / 4),
        "brier": pytest.approx((0.1**2 + 0.1**2 + 0.745**2 + 0.3**2 + 0.005**2) / 6),
        "calibration_error": None,  # of so few queries chance cannot be told
    }
    assert {type(value) for value in health.values()} == {float, type(None)}


def test_health_of_rows_that_are_their_querys_only_ones_takes_their_spread_over_all_and_none_for_no_rows():
    health = health_of([1, 1, 1], [0, 0, 0], [0.2, 0.6, 0.4])
    assert [health["spread"], health["irrelevant"]] == pytest.approx([0.4, 0.4])
    assert (health["saturated"], health["relevant"]) == (0, None)
    assert health_of([2], [1, 1], [0.2, 0.6])["irrelevant"] is None


def test_scores_beyond_what_a_probability_can_tell_overflow_nothing():
    with np.errstate(over="raise", invalid="raise"):
        health = measured([np.arange(3)], [1, 0, 0], [1e4, -1e4, 0])[1]
    errors = {"brier": pytest.approx(0.25 / 3), "calibration_error": None}
    assert health == {"spread": 1, "saturated": pytest.approx(2 / 3), "relevant": 1, "irrelevant": 0.25, **errors}


# ---- Values whose mean is the metric ---------------------------------------------------------------------------------
def test_the_mean_of_a_query_metrics_values_is_what_measure_says(generator):
    lists, labels, scores = lists_of([4] * 30), generator.integers(0, 5, 120) / 4, generator.standard_normal(120)
    metrics = metrics_of(lists, labels, scores)
    for metric in RANKING:
        kept = for_metrics(lists, labels)[metric]
        values = metric_values(metric, kept, labels, scores)
        assert len(values) == len(kept) and values.mean() == pytest.approx(metrics[metric])
        assert values[2] == pytest.approx(metrics_of([np.arange(4)], labels[kept[2]], scores[kept[2]])[metric])


@pytest.mark.parametrize("queries", [2, 7, 100, 220])
def test_the_values_of_average_precision_are_the_pseudo_values_of_leaving_out_a_group_of_queries(generator, queries):
    sizes = generator.integers(1, 6, queries)
    lists, total = lists_of(sizes), sum(sizes)
    labels, scores = generator.integers(0, 2, total).astype(float), generator.permutation(total) / 9
    groups, expected = min(queries, 100), []
    for out in range(groups):
        rest = np.concatenate([rows for number, rows in enumerate(lists) if number % 100 != out])
        of_rest = average_precision_score(labels[rest], scores[rest])
        expected.append(groups * average_precision_score(labels, scores) - (groups - 1) * of_rest)
    values = metric_values("average_precision", lists, labels, scores)
    assert values - values.mean() == pytest.approx(np.array(expected) - np.mean(expected), abs=1e-9)
    assert values.mean() == pytest.approx(average_precision_score(labels, scores), abs=1e-9)


def test_a_single_query_has_one_value_of_average_precision():
    values = metric_values("average_precision", [np.arange(3)], np.array([0.0, 1, 0]), np.array([3.0, 2, 1]))
    assert values.tolist() == [0.5]


def test_the_values_of_average_precision_tell_its_mean_and_its_standard_error(generator):
    lists, precisions, means, errors = lists_of([3] * 60), [], [], []
    for _ in range(150):
        labels = generator.integers(0, 2, 180).astype(float)
        scores = labels + 1.2 * generator.standard_normal(180) + np.repeat(0.7 * generator.standard_normal(60), 3)
        values = metric_values("average_precision", lists, labels, scores)
        precisions.append(average_precision(labels, scores))
        means.append(values.mean())
        errors.append(values.std(ddof=1) / len(values) ** 0.5)
    assert np.mean(errors) == pytest.approx(np.std(precisions), rel=0.15)
    assert means == pytest.approx(precisions, abs=1e-9)


# ---- Dense scores, and the jackknife ---------------------------------------------------------------------------------
def test_scores_that_lie_dense_are_no_endless_tie():
    scores = -0.9e-5 * np.arange(24)  # each within the tolerance of 1e-5 of the next
    group, sizes = tie_groups(scores)
    assert sizes.tolist() == [12, 11, 1] and (np.diff(group) >= 0).all()


def test_the_values_of_average_precision_are_those_of_a_jackknife_by_its_definition(generator):
    labels = generator.permutation(np.arange(90) % 3 == 0).astype(float)
    scores = labels + generator.standard_normal(90)
    lists = lists_of([3] * 30)
    whole = average_precision_score(labels, scores)
    rests = []
    for rows in lists:
        others = np.setdiff1d(np.arange(90), rows)
        rests.append(average_precision_score(labels[others], scores[others]))
    pseudo_values = 30 * whole - 29 * np.array(rests)  # Tukey 1958
    expected = pseudo_values - pseudo_values.mean() + whole  # centred, so that their mean is the metric
    assert metric_values("average_precision", lists, labels, scores) == pytest.approx(expected)
