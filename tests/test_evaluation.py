"""Metrics against trec_eval, scikit-learn and brute force over the orders of tied documents."""

import itertools

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, nDCG
from sklearn.metrics import ndcg_score

from train_bert_rerank import mrr_at_k, ndcg_at_k, ranking_metrics

GENERATOR = np.random.default_rng(1)


def test_metrics_are_those_of_trec_eval_on_runs_without_ties():
    for _ in range(50):
        size = int(GENERATOR.integers(2, 25))
        grades = GENERATOR.integers(0, 5, size)
        if grades.max() < 2 or grades.min() >= 2:
            continue
        scores = GENERATOR.permutation(size) / 7
        qrels = [ir_measures.Qrel("q", f"d{index}", int(grade)) for index, grade in enumerate(grades)]
        run = [ir_measures.ScoredDoc("q", f"d{index}", float(score)) for index, score in enumerate(scores)]
        theirs = ir_measures.calc_aggregate([nDCG @ 10, RR(rel=2) @ 10], qrels, run)
        ours = ranking_metrics(["q"] * size, grades / 4, scores)
        assert ours["NDCG@10"] == pytest.approx(theirs[nDCG @ 10], abs=1e-6)
        assert ours["MRR@10"] == pytest.approx(theirs[RR(rel=2) @ 10], abs=1e-6)


def test_ndcg_of_ties_is_that_of_scikit_learn():
    for _ in range(200):
        labels, scores = GENERATOR.integers(0, 5, 14) / 4, GENERATOR.integers(0, 4, 14).astype(float)
        if labels.max() > 0:
            assert ndcg_at_k(labels, scores) == pytest.approx(ndcg_score([labels], [scores], k=10), abs=1e-9)


@pytest.mark.parametrize("cutoff", [2, 3, 10])
def test_tied_documents_get_the_mean_over_all_their_orders(cutoff):
    for _ in range(12):
        labels, scores = GENERATOR.integers(0, 3, 6) / 2, GENERATOR.integers(0, 3, 6).astype(float)
        if labels.max() == 0:
            continue
        orders = [scores + 1e-3 * np.array(order) for order in itertools.permutations(range(6))]
        for metric in (ndcg_at_k, mrr_at_k):
            expected = np.mean([metric(labels, order, cutoff) for order in orders])
            assert metric(labels, scores, cutoff) == pytest.approx(expected, abs=1e-9)


def test_a_model_that_scores_everything_alike_gets_what_chance_gets_whatever_the_order_of_the_file():
    labels = np.array([1.0, 0, 0, 0, 0, 0, 0, 0])
    noise = 1e-7 * GENERATOR.standard_normal(8)  # what differs by rounding only is a tie
    for order in (np.arange(8), np.arange(8)[::-1]):
        metrics = ranking_metrics(["q"] * 8, labels[order], 0.3 + noise)
        assert metrics["NDCG@10"] == pytest.approx(np.mean(1 / np.log2(np.arange(2, 10))))
        assert metrics["MRR@10"] == pytest.approx(np.mean(1 / np.arange(1, 9)))


def test_shuffling_the_file_changes_no_metric():
    queries = np.repeat([f"q{index}" for index in range(9)], 5)
    labels, scores = GENERATOR.random(45).round(1), GENERATOR.standard_normal(45)
    order = GENERATOR.permutation(45)
    assert ranking_metrics(queries, labels, scores) == pytest.approx(
        ranking_metrics(queries[order], labels[order], scores[order])
    )


def test_queries_with_nothing_to_rank_are_left_out_and_counted():
    queries = ["a", "a", "b", "b", "c", "d", "d"]
    labels, scores = np.array([1, 0, 1, 1, 0, 0.2, 0.4]), np.array([0.9, 0.1, 0.5, 0.4, 0.3, 0.1, 0.2])
    metrics = ranking_metrics(queries, labels, scores)
    assert metrics == {"NDCG@10": 1.0, "MRR@10": 1.0, "queries": 2, "queries_left_out": 2}
    nothing = ranking_metrics(["a", "b"], np.array([1.0, 0.0]), np.array([0.1, 0.2]))
    assert nothing == {"NDCG@10": None, "MRR@10": None, "queries": 0, "queries_left_out": 2}


def test_mrr_ends_at_the_tenth_place():
    labels, scores = np.zeros(12), np.arange(12.0)
    labels[1] = 1  # the eleventh
    assert mrr_at_k(labels, scores) == 0
    labels[2] = 1  # the tenth
    assert mrr_at_k(labels, scores) == pytest.approx(0.1)
