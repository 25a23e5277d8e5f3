"""The retriever's order: read, measured beside the model, mixed with it, in reports, models and rank()."""

import copy
import json
import re
import statistics
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_equal_but_for_rounding, command_line
from ir_measures import AP, RR, R, nDCG
from matplotlib.figure import Figure
from test_recovery import train_until
from test_training import scalars_of
from test_verdict import ARGS, ROWS, candidate_of, dataset_of, queries_of, scores_of

import train_bert_rerank
from train_bert_rerank import (
    RANKING,
    SHARES,
    BertRerankerModel,
    Retrieved,
    UserError,
    check_settings,
    cross_fit_mixture,
    judge,
    judge_search,
    load_data,
    mixture,
    ndcg_at_k,
    verdict_text,
    weight_to_save,
)

pytestmark = pytest.mark.usefixtures("small_pictures")
QUERIES = 40


@pytest.fixture
def generator():
    return np.random.default_rng(5)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def lines_of(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def scored_rows(signal):
    """The first default evaluation lists, with scores that know of the labels as much as `signal` says."""
    generator = np.random.default_rng(0)
    rows = read_jsonl(ROOT / "default_eval_data.jsonl")[: 8 * QUERIES]
    return [{**row, "score": float(signal * row["label"] + generator.standard_normal())} for row in rows]


# ---- Reading ---------------------------------------------------------------------------------------------------------
ROW = {"query": "怎么退款", "content": "在订单页点退款。", "label": 1}
OTHER = {"query": "怎么退款", "content": "请看说明书。", "label": 0}
SHOULD_BE_WHOLE = "Give all rows of a query the retriever's score, or none, and a query one "


def load(write_jsonl, rows, **settings):
    path = write_jsonl("my_eval.jsonl", rows)
    return load_data(check_settings({"train_dataset": str(ROOT / "default_train_data.jsonl"), "eval_dataset": path,
                                     **settings}))  # fmt: skip


@pytest.mark.parametrize("score, said", [
    ("0.9", 'score is "0.9": drop the quotes, or call the key something else if it is no'),
    (float("nan"), "score is nan: it should be a finite number"),
    (float("inf"), "score is inf: it should be a finite number"),
    (-float("inf"), "score is -inf: it should be a finite number"),
    (10**400, "it should be a finite number"),
    (True, "score is true: it should be a number"),
    ([0.5], "score is [0.5]: it should be a number"),
])  # fmt: skip
@pytest.mark.parametrize("shape", ["rows", "hits"])
def test_a_score_that_is_no_finite_number_is_an_error_with_its_line(write_jsonl, shape, score, said):
    rows = [{**ROW, "score": 1}, {**OTHER, "score": score}]
    if shape == "hits":
        hits = [{key: row[key] for key in ("content", "label", "score")} for row in rows]
        rows = [{"query": "怎么退款", "hits": hits[:1]}, {"query": "怎么退款", "hits": hits}]
    with pytest.raises(UserError) as error:
        load(write_jsonl, rows)
    assert "my_eval.jsonl: 1 bad line\n  line 2: score is " in str(error.value) and said in str(error.value)


def test_scores_of_some_rows_of_a_query_are_an_error_that_names_the_lines_without(write_jsonl):
    rows = [{**ROW, "score": 3.5}, OTHER, {**ROW, "query": "怎么开发票"}, {**OTHER, "content": "另一条", "score": None}]
    with pytest.raises(UserError) as error:
        load(write_jsonl, rows)
    assert str(error.value).splitlines()[0].endswith("my_eval.jsonl: 2 bad lines")
    assert str(error.value).splitlines()[1:3] == [
        f"  line {line}: score is missing, and other rows of its query have one" for line in (2, 4)
    ]
    assert SHOULD_BE_WHOLE in str(error.value)


@pytest.mark.parametrize("relevant, said", [
    ("7", 'relevant is "7": it should be a whole number, of the documents'),
    (-1, "relevant is -1"), (2.0, "relevant is 2.0"),
    (True, "relevant is true"), (0, "line 1: relevant is less than the relevant documents that are here"),
])  # fmt: skip
def test_a_number_of_relevant_documents_that_cannot_be_is_an_error_with_its_line(write_jsonl, relevant, said):
    hits = [{"content": row["content"], "label": row["label"]} for row in (ROW, OTHER)]
    with pytest.raises(UserError, match=re.escape(said)):
        load(write_jsonl, [{"query": "怎么退款", "hits": hits, "relevant": relevant}])


def test_a_relevant_document_that_stands_twice_is_one(write_jsonl):
    hits = [{"content": "甲", "label": 1}, {"content": "甲", "label": 1}, {"content": "乙", "label": 0}]
    _, eval_rows, *_ = load(write_jsonl, [{"query": "一问", "hits": hits, "relevant": 1}])
    assert eval_rows["relevant"].tolist() == [1, 1, 1]


def test_two_numbers_of_relevant_documents_for_one_query_are_an_error(write_jsonl):
    lists = [{"query": "怎么退款", "hits": [{"content": f"第{number}条", "label": 1}], "relevant": 3 + number % 2}
             for number in range(2)]  # fmt: skip
    with pytest.raises(UserError, match="line 1: relevant is less than on another line of its query"):
        load(write_jsonl, lists)


def test_a_number_of_relevant_documents_on_one_line_of_a_query_is_that_of_all(write_jsonl, tmp_path):
    hits = [{"content": f"第{number}条", "label": int(not number)} for number in range(3)]
    lines = [{"query": "一问", "hits": hits[1:]}, {"query": "一问", "hits": hits[:1], "relevant": 2}]
    report = train_bert_rerank.train({
        "model_name_or_path": TINY, "epochs": 0, "eval_dataset": write_jsonl("eval.jsonl", lines), "log_with": None,
        "mixed_precision": "no", "output_dir": str(tmp_path / "out"),
    })["report"]  # fmt: skip
    assert (report["all_relevant"]["relevant"], report["all_relevant"]["found"]) == (2, 1)


def test_whole_numbers_nulls_and_hits_are_read_and_queries_without_scores_may_stand_beside(write_jsonl):
    hits = [{"content": "甲", "label": 1, "score": 7}, {"content": "乙", "label": 0, "score": -2.5e3}]
    rows = [{"query": "一问", "hits": hits, "relevant": 4}, {**ROW, "score": None}, OTHER,
            {"query": "二问", "pos": ["丙"], "neg": ["丁"], "score": "of another kind"}]  # fmt: skip
    _, eval_rows, *_ = load(write_jsonl, rows)
    np.testing.assert_array_equal(eval_rows["score"], [7, -2500, np.nan, np.nan, np.nan, np.nan])
    assert eval_rows["relevant"].tolist() == [4, 4, -1, -1, -1, -1]


@pytest.mark.parametrize("eval_dataset", ["file", None, "auto"])
def test_scores_are_read_where_a_file_is_evaluated_on_and_nowhere_else(write_jsonl, eval_dataset):
    path = write_jsonl("my_rows.jsonl", [{**ROW, "query": f"第{number}问", "score": "high"} for number in range(30)])
    settings = {"train_dataset": path, "eval_dataset": eval_dataset}
    if eval_dataset == "file":
        settings["eval_dataset"] = write_jsonl("other.jsonl", [{**ROW, "score": 2}, {**OTHER, "score": 1}])
    if eval_dataset == "auto":
        with pytest.raises(UserError, match='my_rows.jsonl: 30 bad lines\n  line 1: score is "high": drop the quotes'):
            load_data(check_settings(settings))
        return
    train_rows, eval_rows, *_ = load_data(check_settings(settings))
    assert len(train_rows) == 30 and np.isnan(train_rows["score"]).all()
    assert eval_rows["score"].tolist() == ([2, 1] if eval_dataset else [])


def test_a_query_of_the_train_file_needs_no_score_because_it_has_one_in_the_eval_file(write_jsonl):
    train = write_jsonl("my_rows.jsonl", [ROW, OTHER])
    _, eval_rows, *_ = load(write_jsonl, [{**ROW, "score": 2}, {**OTHER, "score": 1}], train_dataset=train)
    assert eval_rows["score"].tolist() == [2, 1]


# ---- Mixtures --------------------------------------------------------------------------------------------------------
def test_a_mixture_is_the_sum_of_what_is_standardised_within_the_list(generator):
    assert mixture(np.array([2.0, 0, 1]), np.array([30.0, 20, 10]), 0.5) == pytest.approx([1.5**0.5, -(0.375**0.5),
                                                                                         -(0.375**0.5)])  # fmt: skip
    for count in (2, 3, 17):
        logits, scores = generator.standard_normal((2, count)) * [[3], [40]] + [[0], [100]]
        expected = []
        for logit, score in zip(logits, scores, strict=True):
            model = (logit - statistics.fmean(logits)) / statistics.pstdev(logits)
            retriever = (score - statistics.fmean(scores)) / statistics.pstdev(scores)
            expected.append(0.7 * model + 0.3 * retriever)
        assert mixture(logits, scores, 0.3) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [[5.0], [2.0, 2.0, 2.0], [0.1] * 7, [0.0, 0.0], [-1e300] * 3])
def test_a_list_of_one_or_of_equal_scores_leaves_the_order_to_the_other(scores):
    scores, logits = np.array(scores), np.arange(len(scores)) * 1.0
    zero = np.zeros(len(scores))
    assert mixture(zero + 0.3, scores, 0.4).tolist() == zero.tolist()
    assert np.argsort(mixture(logits, scores, 0.4)).tolist() == np.argsort(logits).tolist()
    assert np.argsort(mixture(scores, logits, 0.4)).tolist() == np.argsort(logits).tolist()


def test_logits_that_differ_by_rounding_are_not_blown_up():
    noise = 0.7 + 1e-7 * np.array([0, 3, -2, 1])
    assert mixture(noise, np.array([1.0, 2, 3, 4]), 0.1) == pytest.approx(0.1 * mixture(np.zeros(4), np.arange(4.0), 1))
    # The retriever's scores are taken at their word.
    assert np.argsort(mixture(np.zeros(4), noise, 0.1)).tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("scale", [1e-300, 1e-6, 1e6, 1e290])
def test_the_scale_of_the_scores_counts_nothing(generator, scale):
    logits, scores = generator.standard_normal((2, 12))
    with np.errstate(all="raise", under="ignore"):
        mixed = mixture(logits, scale * scores, 0.4)
    assert mixed == pytest.approx(mixture(logits, scores, 0.4), abs=1e-9)
    assert mixture(logits, scores + 1000, 0.4) == pytest.approx(mixed, abs=1e-9)


# ---- The retriever among the candidates ------------------------------------------------------------------------------
def retrieved_of(dataset, scores, weight=0.0):
    """Retrieved of all rows of a dataset of test_verdict."""
    rows = np.arange(len(dataset.labels))
    return Retrieved(rows, np.asarray(scores, dtype=float), dataset.labels.numpy(), dataset.lists, weight)


def judged_with(dataset, retriever, base, *fine_tuned, weight=0.0, **args):
    """(report, what is kept) of candidates given as scores, beside a retriever's scores."""
    dataset.retrieved = retrieved_of(dataset, retriever, weight)
    candidates = [candidate_of(dataset, scores, step) for step, scores in enumerate([base, *fine_tuned])]
    report, _, kept = judge(candidates, dataset, dataset.metric, {**ARGS, "model_name_or_path": TINY, **args})
    return report, kept


def test_the_retrievers_metrics_are_those_of_trec_eval_by_its_scores(generator):
    dataset = queries_of(30)
    retriever = generator.permutation(30 * ROWS) / 7.0
    report, _ = judged_with(dataset, retriever, generator.standard_normal(30 * ROWS))
    qrels, run = [], []
    for rows in dataset.lists["all"]:
        qrels += [ir_measures.Qrel(str(rows[0]), str(row), int(dataset.labels[row])) for row in rows]
        run += [ir_measures.ScoredDoc(str(rows[0]), str(row), retriever[row]) for row in rows]
    measures = {"ndcg@10": nDCG @ 10, "mrr@10": RR @ 10, "map": AP, "recall@10": R @ 10}
    expected = ir_measures.calc_aggregate(measures.values(), qrels, run)
    for metric, theirs in measures.items():
        assert report["retriever"][metric] == pytest.approx(expected[theirs], abs=1e-6)


@pytest.mark.parametrize("metric", ["ndcg@10", "average_precision"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_multiplying_all_scores_changes_nothing_and_equal_ones_alone_are_ties(generator, metric, scale):
    dataset = queries_of(30, metric)
    base, tuned = generator.standard_normal((2, 30 * ROWS))
    retriever = generator.integers(0, 4, 30 * ROWS) / 8.0  # has ties
    report, _ = judged_with(dataset, retriever, base, tuned)
    scaled, _ = judged_with(dataset, scale * retriever, base, tuned)
    assert scaled == report
    tied = [0.1, 0.1 + 1e-15, 0.1 - 1e-15, 0.1, -0.5] * 30  # the first and the fourth are equal
    report, _ = judged_with(dataset, tied, base, tuned)
    ranks, _ = judged_with(dataset, [2, 3, 1, 2, 0] * 30, base, tuned)
    assert report["retriever"] == ranks["retriever"] and report["against_retriever"] == ranks["against_retriever"]


def test_the_gain_over_the_retriever_is_paired_and_has_the_interval_of_the_first_verdict(generator):
    dataset = queries_of(60)
    base, tuned, retriever = generator.standard_normal((3, 60 * ROWS))
    report, _ = judged_with(dataset, retriever, base, tuned, load_best_model_at_end=False)
    swapped, _ = judged_with(dataset, base, retriever, tuned, load_best_model_at_end=False)
    against = dict(report["against_retriever"])
    assert (against.pop("queries"), against.pop("after")) == (60, report["after"]["ndcg@10"])
    assert against.pop("verdict") == swapped["verdict"]
    for key in ("mean", "ci95", "queries_up", "queries_down"):
        assert against[key] == pytest.approx(swapped["delta"][key])


@pytest.mark.parametrize("places, verdict, is_loud", [
    ([1] * 20 + [3] * 20, "better", False), ([5] * 20 + [3] * 20, "worse", True),
    ([3] * 40, "too few", False), ([2] * 9 + [5] * 9 + [3] * 22, "unclear", False),
    ([2] * 8 + [5] * 10 + [3] * 22, "unclear", True),
])  # fmt: skip
def test_worse_than_the_retriever_is_said_as_loudly_as_worse_than_the_base(places, verdict, is_loud):
    report, _ = judged_with(queries_of(40), scores_of([3] * 40), scores_of([5] * 40), scores_of(places),
                            load_best_model_at_end=False)  # fmt: skip
    against = report["against_retriever"]
    assert against["verdict"] == verdict
    mean = report["after"]["ndcg@10"] - report["retriever"]["ndcg@10"]
    assert against["mean"] == pytest.approx(mean, abs=1e-12)
    said = verdict_text(report, {**ARGS, "model_name_or_path": TINY}).splitlines()
    assert any(line.startswith("!!! WORSE THAN THE RETRIEVER !!! final_model ranks") for line in said) == is_loud
    word = {"better": "better", "worse": "WORSE", "unclear": "no clear difference",
            "too few": "too few queries that changed to tell"}[verdict]  # fmt: skip
    assert any("Put to work as it is, it makes the search worse." in line for line in said) == (verdict == "worse")
    [line] = [line for line in said if line.startswith("Against the retriever: ")]
    assert line.startswith(f"Against the retriever: {word}. ") and "40 queries (" in line
    assert said[-1].startswith("Next: ")
    assert ("train on what this retriever finds" in said[-1]) == (verdict == "worse")


def test_final_model_is_compared_with_the_retriever_when_it_holds_the_base(generator):
    dataset = queries_of(40)
    report, kept = judged_with(dataset, scores_of([2] * 40), scores_of([1] * 30 + [4] * 10), scores_of([5] * 40))
    assert kept.step == 0 and report["chosen"] == "base"
    assert report["against_retriever"]["mean"] == pytest.approx(
        report["before"]["ndcg@10"] - report["retriever"]["ndcg@10"]
    )


def test_only_queries_with_scores_are_compared_and_the_others_leave_no_trace(generator):
    dataset = queries_of(60)
    scores = generator.standard_normal((3, 60 * ROWS))
    whole, part = queries_of(25), copy.copy(dataset)
    rows = np.concatenate([np.arange(ROWS) + ROWS * query for query in range(10, 35)])
    expected, _ = judged_with(whole, *scores[:, rows])
    part.retrieved = Retrieved(rows, scores[0, rows], dataset.labels.numpy()[rows], whole.lists, 0.0)
    candidates = [candidate_of(part, each, step) for step, each in enumerate(scores[1:])]
    report = judge_search([candidates[1], candidates[0]], candidates[1], part.retrieved, "ndcg@10", 42)
    expected = judge_search(
        [candidate_of(whole, scores[2, rows]), candidate_of(whole, scores[1, rows])],
        candidate_of(whole, scores[2, rows]), whole.retrieved, "ndcg@10", 42,
    )  # fmt: skip
    assert report == expected and report["against_retriever"]["queries"] == 25
    text = verdict_text({**judged_with(dataset, *scores)[0], **report}, {**ARGS, "model_name_or_path": TINY})
    assert re.search(r"^ndcg@10 .*; retriever \(25 queries\) \d", text, re.M)


@pytest.mark.parametrize("count, verdict", [(3, None), (19, "too few"), (20, "better")])
def test_fewer_than_twenty_queries_are_too_few_against_a_retriever_too(count, verdict):
    report, _ = judged_with(queries_of(count), scores_of([4] * count), scores_of([2] * count),
                            scores_of([1 + index % 2 for index in range(count)]))  # fmt: skip
    against = report["against_retriever"]
    assert (against["mean"] is None) == (count < 4) and against["verdict"] == (verdict or "too few")
    assert report["mixed"]["verdict"] in ("too few", "unclear")


# ---- Choosing a share ------------------------------------------------------------------------------------------------
def complementary(generator, count, strength=1.2):
    """Model and retriever that each know the labels a little, and not in the same way."""
    labels = np.tile([1.0] + [0.0] * (ROWS - 1), count)
    return strength * labels + generator.standard_normal((2, count * ROWS))


def test_the_best_share_of_what_is_kept_is_reported_with_its_metrics(generator):
    dataset = queries_of(80)
    model, retriever = complementary(generator, 80)
    report, kept = judged_with(dataset, retriever, generator.standard_normal(80 * ROWS), model)
    mixed, means = report["mixed"], []
    for share in SHARES:
        scores = model.copy()
        for rows in dataset.lists["all"]:
            standard = [(each[rows] - each[rows].mean()) / each[rows].std() for each in (model, retriever)]
            scores[rows] = (1 - share) * standard[0] + share * standard[1]
        means.append(np.mean([ndcg_at_k(dataset.labels.numpy()[rows], scores[rows]) for rows in dataset.lists["all"]]))
    assert mixed["weight"] == SHARES[int(np.argmax(means))] and 0 < mixed["weight"] < 1
    assert mixed["metrics"]["ndcg@10"] == pytest.approx(max(means)) and mixed["candidates"] == ROWS
    assert mixed["metrics"]["average_precision"] is mixed["metrics"]["best_f1"] is None
    assert mixed["verdict"] == "better" and mixed["delta"]["ci95"][0] > 0
    assert mixed["against_retriever"]["verdict"] == "better"


def test_candidate_and_share_are_chosen_on_one_half_and_measured_on_the_other():
    # Two candidates and two shares. On each half another one is right, and on the other half that one is wrong.
    seed, count = 3, 40
    first, second = train_bert_rerank.halves(count, seed)
    values = np.zeros((2, 4, count))  # the model alone, two shares, the retriever alone
    values[0, 0, first], values[1, 0, second] = 0.5, 0.5  # the first half chooses candidate 0, the second 1
    values[0, 1, first], values[0, 2, second] = 1.0, 1.0  # of candidate 0 the first half chooses the first share
    values[1, 1, second], values[1, 2, first] = 1.0, 1.0  # of candidate 1 the second half chooses the first share
    values[:, 3] = 0.25
    over_model, over_retriever = cross_fit_mixture(values, [0, 1, 2, 3], seed)
    assert set(over_model) == {0.0} and set(over_retriever) == {-0.25}  # what they chose is worth 0 elsewhere


def test_a_share_that_noise_chose_gains_nothing_on_average(generator):
    dataset, gains = queries_of(30), []
    model, _ = complementary(generator, 30, strength=2)
    for seed in range(60):
        retrieved = retrieved_of(dataset, generator.standard_normal(30 * ROWS))
        values = retrieved.values_of("ndcg@10", model)[None]
        gains.append([cross_fit_mixture(values, retrieved.choices, seed)[0].mean(),
                      values[0].mean(axis=1).max() - values[0, 0].mean()])  # fmt: skip
    fitted, flattered = np.transpose(gains)
    error = flattered.std() / len(gains) ** 0.5
    assert fitted.mean() < 2 * error and flattered.mean() > 2 * error


def test_the_ends_of_the_grid_are_exactly_the_model_and_the_retriever(generator):
    dataset = queries_of(20)
    model = np.round(generator.standard_normal(20 * ROWS), 1)
    retriever = 1e-7 * generator.integers(0, 3, 20 * ROWS) + 5  # closer together than the rounding of logits
    values = retrieved_of(dataset, retriever).values_of("ndcg@10", model)
    assert values.shape == (len(SHARES), 20)
    assert values[0].tolist() == np.asarray(candidate_of(dataset, model).values).tolist()
    ranks = candidate_of(dataset, np.round((retriever - 5) / 1e-7)).values
    assert values[-1].tolist() == np.asarray(ranks).tolist()


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_a_weight_that_the_model_has_is_measured_rather_than_another_chosen(generator, weight):
    dataset = queries_of(80)
    model, retriever = complementary(generator, 80)
    report, _ = judged_with(dataset, retriever, model, weight=weight, epochs=0)
    plain = retrieved_of(dataset, retriever)
    best = plain.values_of("ndcg@10", model).mean(axis=1)
    assert report["mixed"]["weight"] == (weight or SHARES[best.argmax()])
    if weight:
        gain = best[SHARES.index(weight)] - best[0]
        assert report["mixed"]["delta"]["mean"] == pytest.approx(gain)
        assert SHARES[best.argmax()] != weight


@pytest.mark.parametrize("count, verdict", [(15, "too few"), (80, "better")])
def test_a_share_is_saved_where_it_is_clearly_better_and_nowhere_else(generator, count, verdict):
    model, retriever = complementary(generator, count)
    report, _ = judged_with(queries_of(count), retriever, generator.standard_normal(count * ROWS), model)
    assert report["mixed"]["verdict"] == verdict and report["mixed"]["weight"] > 0
    assert weight_to_save(report) == (report["mixed"]["weight"] if verdict == "better" else 0)


def test_a_retriever_that_adds_nothing_is_not_mixed_in(generator):
    dataset = queries_of(40)
    report, _ = judged_with(dataset, scores_of([5] * 40), scores_of([3] * 40), scores_of([1] * 20 + [2] * 20))
    assert report["mixed"]["weight"] == 0 and report["mixed"]["verdict"] != "better"
    assert report["mixed"]["metrics"]["ndcg@10"] == report["after"]["ndcg@10"]
    said = verdict_text(report, {**ARGS, "model_name_or_path": TINY})
    assert "Mixed: with no share of the retriever it ranks better than final_model alone.\n" in said


def test_with_average_precision_over_pairs_a_retriever_is_compared_by_ndcg(generator):
    dataset = queries_of(40, "average_precision")
    model, retriever = complementary(generator, 40)
    retriever += 100 * np.repeat(generator.standard_normal(40), ROWS)  # scores of two queries say nothing together
    report, _ = judged_with(dataset, retriever, generator.standard_normal(40 * ROWS), model)
    assert report["metric"] == "average_precision" and report["against_retriever"]["metric"] == "ndcg@10"
    assert report["retriever"]["average_precision"] is report["retriever"]["best_f1"] is None
    gain = report["after"]["ndcg@10"] - report["retriever"]["ndcg@10"]
    assert report["against_retriever"]["mean"] == pytest.approx(gain)
    said = verdict_text(report, {**ARGS, "model_name_or_path": TINY})
    assert "Verdict: " in said and "AVERAGE_PRECISION" in said
    assert f"NDCG@10 {report['retriever']['ndcg@10']:.3f}" in said


def test_a_row_a_query_leaves_nothing_to_compare_with_a_retriever(generator):
    labels = generator.permutation(np.arange(60) % 2).astype(float)
    dataset = dataset_of(labels.tolist(), [1] * 60, "average_precision")
    report, _ = judged_with(dataset, generator.standard_normal(60), labels, labels)
    assert report["retriever"] is report["against_retriever"] is report["mixed"] is None
    assert "etriever" not in verdict_text(report, {**ARGS, "model_name_or_path": TINY})


# ---- What the retriever did not find ---------------------------------------------------------------------------------
def test_ndcg_by_all_relevant_documents_is_that_of_trec_eval_with_those_that_were_not_found(generator):
    labels = np.tile([1.0] + [0.0] * (ROWS - 1), 30)
    labels[5 * ROWS : 6 * ROWS] = 0  # a query of which nothing was found counts as well
    dataset = dataset_of(labels.tolist(), [ROWS] * 30)
    base, tuned, retriever = generator.standard_normal((3, 30 * ROWS))
    more = generator.integers(0, 12, 30)  # that nobody found
    more[5] += 1
    dataset.rows["relevant"] = np.repeat(1 + more, ROWS)
    report, _ = judged_with(dataset, retriever, base, tuned, load_best_model_at_end=False)
    of_all = report["all_relevant"]
    assert json.loads(json.dumps(of_all, allow_nan=False)) == of_all
    assert (of_all["queries"], of_all["relevant"], of_all["found"]) == (30, 30 + more.sum(), 29)
    for name, order in (("before", base), ("after", tuned), ("retriever", retriever), ("ceiling", labels)):
        qrels, run = [], []
        for query, rows in enumerate(dataset.lists["all"]):
            found = int(labels[rows].sum())
            qrels += [ir_measures.Qrel(str(query), str(row), int(labels[row])) for row in rows]
            qrels += [ir_measures.Qrel(str(query), f"other {number}", 1) for number in range(1 + more[query] - found)]
            run += [ir_measures.ScoredDoc(str(query), str(row), float(order[row])) for row in rows]
        expected = ir_measures.calc_aggregate([nDCG @ 10], qrels, run)[nDCG @ 10]
        assert of_all["ndcg@10"][name] == pytest.approx(expected, abs=1e-6), name
    said = verdict_text(report, {**ARGS, "model_name_or_path": TINY})
    assert f"Of {of_all['relevant']} relevant documents of 30 queries 29 are among the candidates. NDCG@10 by" in said
    assert f"no reranker can have more than {of_all['ndcg@10']['ceiling']:.3f}." in said


def test_a_number_of_relevant_documents_that_nobody_can_have_costs_no_memory(generator):
    dataset = queries_of(30)
    dataset.rows["relevant"] = 10**15
    report, *_ = judge([candidate_of(dataset, generator.standard_normal(30 * ROWS), 0)], dataset, "ndcg@10", ARGS)
    assert 0 < report["all_relevant"]["ndcg@10"]["ceiling"] < 0.3


def test_a_relevant_document_that_is_found_twice_leaves_none_that_was_not_found(generator):
    dataset = dataset_of([1.0, 1, 0, 0] * 20, [4] * 20)
    dataset.rows["relevant"] = 1
    report, *_ = judge([candidate_of(dataset, generator.standard_normal(80), 0)], dataset, "ndcg@10", ARGS)
    assert report["all_relevant"]["ndcg@10"]["ceiling"] == 1


def test_all_relevant_documents_count_without_a_retrievers_scores_too(generator):
    dataset = queries_of(30)
    dataset.rows["relevant"] = 2
    report, *_ = judge([candidate_of(dataset, generator.standard_normal(30 * ROWS), 0)], dataset, "ndcg@10", ARGS)
    assert set(report["all_relevant"]["ndcg@10"]) == {"before", "after", "ceiling"}
    assert report["retriever"] is report["against_retriever"] is report["mixed"] is None


# ---- rank() ----------------------------------------------------------------------------------------------------------
DOCUMENTS = ["请擦净S35底部的充电触点。", "R42支持访客网络。", "S35充不进电时擦触点，再推回充电座。", "请点退款。"]


@pytest.fixture
def mixing():
    """A reranker whose config holds a share of the retriever."""
    model = BertRerankerModel.from_pretrained(TINY)
    model.model.config.update({"retriever_weight": 0.6})
    return model


def test_rank_sorts_by_the_mixture_and_keeps_the_models_own_score(mixing):
    plain = {hit["corpus_id"]: hit for hit in mixing.rank("S35充不进电", DOCUMENTS)}
    retriever = [1.0, 9.5, 2.0, 3.0]
    hits = mixing.rank("S35充不进电", DOCUMENTS, retriever_scores=retriever, return_documents=True)
    logits = mixing.predict([("S35充不进电", text) for text in DOCUMENTS], activation_fn=torch.nn.Identity())
    expected = mixture(logits.astype(float), np.array(retriever), 0.6)
    assert [hit["corpus_id"] for hit in hits] == np.argsort(-expected).tolist() != list(plain)
    for hit in hits:
        assert hit["score"] == plain[hit["corpus_id"]]["score"] and hit["text"] == DOCUMENTS[hit["corpus_id"]]
        assert hit["mixed_score"] == pytest.approx(expected[hit["corpus_id"]])
    assert json.loads(json.dumps(hits)) == hits
    assert mixing.rank("S35充不进电", DOCUMENTS, top_k=2, retriever_scores=retriever)[0]["corpus_id"] == 1
    # An activation changes the scores that are returned, and no order.
    raw = mixing.rank("S35充不进电", DOCUMENTS, retriever_scores=retriever, activation_fn=torch.nn.Identity())
    assert [hit["mixed_score"] for hit in raw] == [hit["mixed_score"] for hit in hits]


def test_rank_without_scores_or_without_a_weight_keeps_the_models_order(mixing, reranker):
    expected = reranker.rank("S35充不进电", DOCUMENTS)
    assert mixing.rank("S35充不进电", DOCUMENTS) == expected
    hits = reranker.rank("S35充不进电", DOCUMENTS, retriever_scores=[1, 9, 2, 3])
    assert [{key: hit[key] for key in ("corpus_id", "score")} for hit in hits] == expected
    assert all("mixed_score" in hit for hit in hits)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda scores: np.float32(scores), iter])
def test_rank_takes_the_retrievers_scores_as_whatever_holds_numbers_in_order(mixing, kind):
    hits = mixing.rank("S35充不进电", DOCUMENTS, retriever_scores=kind([1.0, 9.5, 2.0, 3.0]))
    assert hits[0]["corpus_id"] == 1


@pytest.mark.parametrize("weight", ["0.3", 1.5, -0.1, float("nan"), True, [0.3]])
def test_a_weight_in_a_config_that_is_no_share_is_refused(mixing, weight):
    mixing.model.config.update({"retriever_weight": weight})
    with pytest.raises(UserError, match=r"retriever_weight in the model's config.json is .*: it should be a number"):
        mixing.rank("S35充不进电", DOCUMENTS, retriever_scores=[1, 2, 3, 4])
    mixing.rank("S35充不进电", DOCUMENTS)


def test_rank_of_no_document_and_of_one_has_a_result(mixing):
    assert mixing.rank("S35充不进电", [], retriever_scores=[]) == []
    [hit] = mixing.rank("S35充不进电", DOCUMENTS[:1], retriever_scores=[3])
    assert hit["mixed_score"] == 0


@pytest.mark.parametrize("scores, kind, said", [
    ([1, 2, 3], ValueError, "retriever_scores has 3 values for 4 documents"),
    ([1, 2, float("nan"), 3], ValueError, "retriever_scores[2] is nan: it should be a finite number"),
    ([1, 2, 3, float("-inf")], ValueError, "retriever_scores[3] is -inf: it should be a finite number"),
    ([1, True, 3, 4], TypeError, "retriever_scores[1] should be a number, not bool True"),
    (np.array(0.5), TypeError, "retriever_scores should be a list of numbers, not ndarray array(0.5)"),
    (torch.tensor(0.5), TypeError, "retriever_scores should be a list of numbers, not Tensor tensor(0.5000)"),
    ([1, 2, 10**400, 3], ValueError, "retriever_scores[2] is 1000"),
    ([1, "2", 3, 4], TypeError, "retriever_scores[1] should be a number, not str '2'"),
    ([1, None, 3, 4], TypeError, "retriever_scores[1] should be a number, not NoneType None"),
    (torch.zeros(1, 4), ValueError, "retriever_scores has 1 values for 4 documents"),
    (0.5, TypeError, "retriever_scores should be a list of numbers, not float 0.5"),
    ("1234", TypeError, "retriever_scores should be a list of numbers, not str '1234'"),
])  # fmt: skip
def test_rank_refuses_scores_that_are_not_one_finite_number_for_each_document(reranker, scores, kind, said):
    with pytest.raises(kind, match=re.escape(said)):
        reranker.rank("S35充不进电", DOCUMENTS, retriever_scores=scores)


# ---- Whole runs ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{"train", "inverted", "eval", "plain": paths}: the default data, with and without a retriever's scores."""
    folder = tmp_path_factory.mktemp("data")
    rows = read_jsonl(ROOT / "default_train_data.jsonl")
    files = {
        "train": rows,
        "inverted": [{**row, "label": 1 - row["label"]} for row in rows],
        "eval": scored_rows(signal=1.5),
        "plain": [{key: row[key] for key in ("query", "content", "label")} for row in scored_rows(signal=0)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text(lines_of(rows), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in files}


def settings_of(data, output_dir, train="train", **changes):
    return {"model_name_or_path": TINY, "train_dataset": data[train], "eval_dataset": data["eval"], "lr": 3e-4,
            "epochs": 1, "mixed_precision": "no", "output_dir": str(output_dir), "log_with": None,
            "base_interpolation": (0.5,), **changes}  # fmt: skip


def config_of(folder):
    return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mixed_run(data, tmp_path_factory, small_pictures):
    """(folder, report, what was said) of a run whose model and retriever complement each other."""
    folder = tmp_path_factory.mktemp("mixed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(train_bert_rerank, "say", said.append)
        result = train_bert_rerank.train(settings_of(data, folder))
    return folder, result["report"], "\n".join(said)


def test_a_run_says_how_the_retriever_ranks_and_ends_with_verdicts_against_it_and_on_both(mixed_run):
    folder, report, said = mixed_run
    value = report["retriever"]["ndcg@10"]
    assert f"There are the retriever's scores for {QUERIES} of {QUERIES} eval queries: its order has ndcg@10 " in said
    table = said[said.index("Model saved successfully!") :].splitlines()[1:]
    for line in table[: table.index(next(line for line in table if line.startswith("average_precision")))]:
        metric = line.split()[0]
        assert metric in RANKING and line.endswith(
            f"; retriever {report['retriever'][metric]:.4f}; final_model mixed with it "
            f"{report['mixed']['metrics'][metric]:.4f}"
        )
    [against] = [line for line in table if line.startswith("Against the retriever: ")]
    assert f"NDCG@10 {value:.3f} → " in against and f"over {QUERIES} queries (" in against
    [mixed] = [line for line in table if line.startswith("Mixed with ")]
    weight = report["mixed"]["weight"]
    assert mixed.startswith(f"Mixed with {weight:.0%} of the retriever: against final_model alone better, +")
    assert "; against the retriever alone " in mixed and mixed.endswith(" On lists of 8 candidates.")
    assert f"retriever_weight {weight}: so rank(…, retriever_scores=…) mixes." in table
    assert json.loads((folder / "eval_report.json").read_text(encoding="utf-8")) == report


def test_the_picture_has_a_line_for_the_retriever(mixed_run):
    _, report, _ = mixed_run
    for drawn, expected in ((report, [report["retriever"]["ndcg@10"]] * 2), ({**report, "retriever": None}, None)):
        axes = Figure().subplots()
        train_bert_rerank.draw_evaluations(axes, drawn)
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        assert lines.get(f"the retriever's own order ({QUERIES} queries)") == expected


def test_the_weight_of_a_better_mixture_is_saved_with_the_model_and_rank_mixes_as_was_measured(mixed_run, data):
    folder, report, _ = mixed_run
    assert report["mixed"]["verdict"] == "better" and 0 < report["mixed"]["weight"] < 1
    assert config_of(folder / "final_model")["retriever_weight"] == report["mixed"]["weight"]
    model = BertRerankerModel.from_pretrained(folder / "final_model")
    assert model.retriever_weight == report["mixed"]["weight"]
    lists, values = {}, []
    for row in read_jsonl(data["eval"]):
        lists.setdefault(row["query"], []).append(row)
    for query, rows in lists.items():
        hits = model.rank(query, [row["content"] for row in rows], retriever_scores=[row["score"] for row in rows])
        labels = np.array([rows[hit["corpus_id"]]["label"] for hit in hits])
        values.append(ndcg_at_k(labels, -np.arange(len(labels)) * 1.0))
    assert np.mean(values) == pytest.approx(report["mixed"]["metrics"]["ndcg@10"], abs=1e-6)


def test_the_card_says_how_other_software_mixes_and_its_code_does_so(mixed_run, data):
    folder, report, _ = mixed_run
    card = (folder / "final_model" / "README.md").read_text(encoding="utf-8")
    section = card[card.index("## With a retriever") : card.index("## Training")]
    weight = report["mixed"]["weight"]
    assert f"Mixed with {weight:.0%} of the score" in section and "lists of about 8 candidates" in section
    [code] = re.findall(r"```python\n(.*?)```", section, re.S)
    logits, scores = np.array([2.0, -1, 0.5, 0]), np.array([11.0, 12, 40, 3])
    names = {"logits": logits, "retriever_scores": scores}
    exec(code, names)
    assert names["mixed"] == pytest.approx(mixture(logits, scores, weight))
    assert "{" not in re.sub(r"```.*?```", "", section, flags=re.S)


def test_a_run_without_scores_has_the_weights_and_the_report_of_one_with_them(mixed_run, data, tmp_path):
    folder, report, _ = mixed_run
    plain = train_bert_rerank.train(settings_of(data, tmp_path / "out", eval_dataset=data["plain"]))["report"]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / "final_model" / name).read_bytes() == (folder / "final_model" / name).read_bytes()
    assert "retriever_weight" not in config_of(tmp_path / "out" / "final_model")
    assert "## With a retriever" not in (tmp_path / "out" / "final_model" / "README.md").read_text(encoding="utf-8")
    new = {"retriever", "against_retriever", "mixed", "dataset"}
    assert {key: plain[key] for key in plain.keys() - new} == {key: report[key] for key in report.keys() - new}
    assert plain["retriever"] is plain["against_retriever"] is plain["mixed"] is None


def test_a_mixture_that_is_not_clearly_better_leaves_the_weight_at_0_and_out_of_the_card(data, write_jsonl, tmp_path):
    path = write_jsonl("noise.jsonl", scored_rows(signal=0))
    report = train_bert_rerank.train(settings_of(data, tmp_path / "out", eval_dataset=path))["report"]
    assert report["mixed"]["verdict"] != "better" and report["against_retriever"]["verdict"] == "better"
    assert config_of(tmp_path / "out" / "final_model")["retriever_weight"] == 0
    assert "## With a retriever" not in (tmp_path / "out" / "final_model" / "README.md").read_text(encoding="utf-8")


def test_training_on_from_a_model_with_a_weight_forgets_it_where_there_are_no_scores(mixed_run, data, tmp_path):
    settings = settings_of(data, tmp_path / "out", eval_dataset=data["plain"])
    train_bert_rerank.train({**settings, "model_name_or_path": str(mixed_run[0] / "final_model")})
    assert "retriever_weight" not in config_of(tmp_path / "out" / "final_model")


def test_some_queries_without_scores_are_counted_and_left_out_of_the_comparison(data, write_jsonl, tmp_path, capsys):
    rows = scored_rows(signal=1.5)
    for row in rows[: 8 * 10]:
        del row["score"]
    path = write_jsonl("part.jsonl", rows)
    report = train_bert_rerank.train(settings_of(data, tmp_path / "out", eval_dataset=path))["report"]
    assert report["queries"] == QUERIES and report["against_retriever"]["queries"] == QUERIES - 10
    assert f"There are the retriever's scores for {QUERIES - 10} of {QUERIES} eval queries" in capsys.readouterr().out


def test_scores_of_train_rows_count_where_queries_are_held_out(write_jsonl, tmp_path):
    path = write_jsonl("rows.jsonl", scored_rows(signal=1.5))
    report = train_bert_rerank.train({
        "model_name_or_path": TINY, "train_dataset": path, "eval_proportion": 0.6, "epochs": 1, "mixed_precision": "no",
        "output_dir": str(tmp_path / "out"), "log_with": None,
    })["report"]  # fmt: skip
    assert report["queries"] == report["against_retriever"]["queries"] == 24


def test_any_k_can_be_what_weights_are_compared_by_beside_a_retriever(data, tmp_path, run_main):
    settings = settings_of(data, tmp_path / "out", metric_for_best_model="ndcg@3", log_with="tensorboard")
    status, said = run_main(*command_line(settings))
    report = json.loads((tmp_path / "out" / "eval_report.json").read_text(encoding="utf-8"))
    assert status == 0 and report["metric"] == "ndcg@3" and "Step 13, epoch 1: ndcg@3 " in said
    for part in ("before", "after", "fine_tuned", "retriever"):
        assert list(report[part]) == [*RANKING, "ndcg@3", "average_precision", "best_f1"]
    assert "Verdict: " in said and "NDCG@3 " in said and {"ndcg@3"} <= report["history"][0].keys()
    [gain] = scalars_of(tmp_path / "out")["eval/delta_over_retriever"]
    assert gain[-1] == pytest.approx(report["against_retriever"]["mean"])


@pytest.mark.parametrize("metric", ["ndcg", "ndcg@0", "ndcg@-1", "ndcg@1.5", "map@10", "recall@k", "best_f1", ""])
def test_a_metric_that_does_not_exist_is_refused_with_those_that_do(run_main, metric):
    status, said = run_main("--metric_for_best_model", metric)
    assert status == 2 and "metric_for_best_model should be " in said and '"recall@k"' in said


# ---- How the parts go together ---------------------------------------------------------------------------------------
METRICS_TRIED = ["ndcg@10", "average_precision"]


@pytest.fixture(scope="module", params=[
    ("ndcg@10", "train"), ("ndcg@10", "inverted"), ("average_precision", "train"), ("average_precision", "inverted")
], ids=" ".join)  # fmt: skip
def whole(request, data, tmp_path_factory, small_pictures):
    """(settings, folder, report) of a run by a metric that ends with fine-tuned weights, or with the base's."""
    metric, train = request.param
    folder = tmp_path_factory.mktemp("whole") / "out"
    settings = settings_of(data, folder, train, metric_for_best_model=metric, save_steps=4, eval_steps=7)
    return settings, folder, train_bert_rerank.train(settings)["report"]


def test_a_run_by_each_metric_and_with_the_base_chosen_too_has_a_retriever(whole):
    settings, folder, report = whole
    metric, is_base = settings["metric_for_best_model"], "inverted" in settings["train_dataset"]
    assert (report["chosen"] == "base") == is_base and report["metric"] == metric
    assert report["retriever"]["ndcg@10"] is not None and report["against_retriever"]["mean"] is not None
    weight = config_of(folder / "final_model")["retriever_weight"]
    assert weight == (report["mixed"]["weight"] if report["mixed"]["verdict"] == "better" else 0)
    if is_base:  # the weight was measured with the base
        assert "retriever_weight" not in config_of(folder / "fine_tuned_model")


def test_a_run_that_was_killed_and_goes_on_has_the_same_report_of_the_retriever(whole, tmp_path):
    settings, folder, report = whole
    settings = {**settings, "output_dir": str(tmp_path / "out")}
    train_until(10, settings)
    resumed = train_bert_rerank.train({**settings, "resume_from_checkpoint": "latest"})["report"]
    assert resumed == report
    for name in ("config.json", "README.md"):
        assert (tmp_path / "out" / "final_model" / name).read_text() == (folder / "final_model" / name).read_text()


def test_scores_that_changed_since_a_checkpoint_are_no_run_to_go_on_with(data, tmp_path, write_jsonl):
    settings = settings_of(data, tmp_path / "out", save_steps=4)
    train_until(6, settings)
    other = write_jsonl("other.jsonl", scored_rows(signal=0))
    with pytest.raises(UserError, match="is of another run"):
        train_bert_rerank.train({**settings, "eval_dataset": other, "resume_from_checkpoint": "latest"})


@pytest.mark.slow
def test_two_processes_report_the_retriever_as_one_does(whole, run_script, tmp_path):
    settings, _, report = whole
    settings = {**settings, "output_dir": str(tmp_path / "out"), "gradient_accumulation_steps": 4}
    result = run_script(*command_line(settings), processes=2)
    assert result.returncode == 0, result.stdout
    two = json.loads((tmp_path / "out" / "eval_report.json").read_text(encoding="utf-8"))
    assert two["retriever"] == report["retriever"]
    assert (two["chosen"] == "base") == (report["chosen"] == "base")
    assert two["against_retriever"]["mean"] == pytest.approx(report["against_retriever"]["mean"], abs=0.02)
    assert result.stdout.count("Against the retriever: ") == 1


@pytest.mark.parametrize("metric", METRICS_TRIED)
def test_epochs_0_has_the_same_verdicts_on_a_model_as_it_is(mixed_run, data, tmp_path, metric, capsys):
    settings = settings_of(data, tmp_path / "out", epochs=0, metric_for_best_model=metric)
    folder, trained, _ = mixed_run
    report = train_bert_rerank.train({**settings, "model_name_or_path": str(folder / "final_model")})["report"]
    assert report["retriever"] == trained["retriever"]
    said = capsys.readouterr().out
    before, retriever = report["before"]["ndcg@10"], report["retriever"]["ndcg@10"]
    assert f"{'ndcg@10':17}  {before:.4f}; retriever {retriever:.4f}; the model mixed with it " in said
    assert "Against the retriever: " in said and "retriever_weight " not in said
    # The weight that was saved, and no other.
    assert report["mixed"]["weight"] == trained["mixed"]["weight"]
    gain = report["mixed"]["metrics"]["ndcg@10"] - report["after"]["ndcg@10"]
    assert report["mixed"]["delta"]["mean"] == pytest.approx(gain)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS_TRIED)
def test_epochs_0_in_two_processes_has_the_report_of_one(mixed_run, data, run_script, tmp_path, metric):
    reports = []
    for processes in (1, 2):
        settings = settings_of(data, tmp_path / f"out{processes}", epochs=0, metric_for_best_model=metric)
        settings["model_name_or_path"] = str(mixed_run[0] / "final_model")
        result = run_script(*command_line(settings), processes=processes)
        assert result.returncode == 0, result.stdout
        path = tmp_path / f"out{processes}" / "evaluation" / "eval_report.json"
        reports.append(json.loads(path.read_text(encoding="utf-8")))
    assert_equal_but_for_rounding(*reports)
