"""What a run claims: the choice on one half of the queries measured on the other, the verdict, what is kept."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

from train_bert_rerank import (
    METRICS,
    RANKING,
    ROW,
    BertRerankerModel,
    Candidate,
    candidate_lists,
    choose_metric,
    confidence_interval,
    cross_fit,
    fill_in,
    host_copy,
    judge,
    metric_values,
    set_weights,
    verdict_text,
)

ARGS = {"seed": 42, "load_best_model_at_end": True, "epochs": 3, "lr": 1e-4}
ROWS = 5  # of each query; the first is the relevant one


@pytest.fixture
def generator():
    return np.random.default_rng(3)


def dataset_of(labels, sizes, metric="ndcg@10"):
    """What judge() needs of a RerankDataset."""
    queries = np.repeat(np.arange(len(sizes)), sizes).tolist()
    labels = torch.tensor(labels, dtype=torch.float32)
    lists = candidate_lists(queries, labels.numpy())
    rows = np.zeros(len(queries), dtype=ROW)
    return SimpleNamespace(
        rows=rows, paths=["some/eval.jsonl"], lists=lists, labels=labels, metric=metric, retrieved=None
    )


def queries_of(count, metric="ndcg@10"):
    """`count` queries with one relevant row each."""
    return dataset_of(([1.0] + [0.0] * (ROWS - 1)) * count, [ROWS] * count, metric)


def scores_of(places):
    """Scores that put the relevant row of each query at its place, 1 to ROWS."""
    others = [[-place for place in range(1, ROWS + 1) if place != mine] for mine in places]
    return np.concatenate([[-float(mine), *rest] for mine, rest in zip(places, others, strict=True)])


def candidate_of(dataset, scores, step=1, base_interpolation=0.0):
    """What evaluate() returns for such scores."""
    candidate = Candidate(step, step, base_interpolation, torch.tensor(np.array(scores, dtype=float)))
    fill_in(candidate, dataset, dataset.metric)
    return candidate


def values_of(dataset, scores):
    return metric_values(dataset.metric, dataset.lists[dataset.metric], dataset.labels.numpy(), scores)


def judged(dataset, base, *fine_tuned, **args):
    """judge() of a base and candidates given as scores, from step 1 on: (report, best candidate, what is kept)."""
    base = candidate_of(dataset, base, step=0)
    candidates = [candidate_of(dataset, scores, step) for step, scores in enumerate(fine_tuned, start=1)]
    report, best, after = judge([base, *candidates], dataset, dataset.metric, {**ARGS, **args})
    assert any(best is each for each in candidates) and (after is best or after is base)
    return report, best, after


def differences_of(dataset, base, *candidates, seed=0):
    values = [np.asarray(candidate_of(dataset, scores).values) for scores in (base, *candidates)]
    return cross_fit(np.array(values[1:]) - values[0], seed)


# ---- Cross-fitting ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [4, 21, 30])
def test_with_one_candidate_the_differences_are_the_plain_ones_of_the_queries(generator, count):
    dataset = queries_of(count)
    base, tuned = generator.standard_normal((2, count * ROWS))
    differences = values_of(dataset, tuned) - values_of(dataset, base)
    assert sorted(differences_of(dataset, base, tuned)) == pytest.approx(sorted(differences))


def test_the_half_that_chose_a_candidate_never_measures_it(generator):
    # Two candidates share the queries: one is right on 20 of 40, the other on the other 20. Whichever one half prefers
    # is then right on at most half of the other half; the half that chose it would find it right on at least half.
    dataset, means = queries_of(40, "hit@1"), []
    for seed in range(20):
        first = generator.permutation(np.repeat([1, 2], 20))
        differences = differences_of(dataset, scores_of([3] * 40), scores_of(first), scores_of(3 - first), seed=seed)
        assert len(differences) == 40 and set(differences) <= {0.0, 1.0}
        means.append(differences.mean())
    assert max(means) <= 0.5 and min(means) < 0.4


@pytest.mark.parametrize("metric", ["ndcg@10", "average_precision"])
def test_noise_gains_nothing_on_average_though_it_does_on_the_queries_that_chose_it(generator, metric):
    dataset, fitted, flattered = queries_of(24, metric), [], []
    for seed in range(120):
        scores = generator.standard_normal((6, 24 * ROWS))
        fitted.append(differences_of(dataset, *scores, seed=seed).mean())
        before, *means = (values_of(dataset, each).mean() for each in scores)
        flattered.append(max(means) - before)
    error = np.std(fitted) / len(fitted) ** 0.5
    assert abs(np.mean(fitted)) < 3 * error and np.mean(flattered) > 6 * error


def test_a_candidate_that_is_better_everywhere_is_chosen_by_both_halves_wherever_it_stands(generator):
    dataset = queries_of(30)
    base, good, *bad = (scores_of(generator.integers(low, high, 30)) for low, high in [(2, 4), (1, 2), (4, 6), (3, 6)])
    for candidates in ([good, *bad], [*bad, good]):
        assert differences_of(dataset, base, *candidates).mean() == pytest.approx(
            differences_of(dataset, base, good).mean()
        )


def test_a_seed_gives_one_split_and_another_seed_another(generator):
    dataset = queries_of(30)
    scores = generator.standard_normal((4, 30 * ROWS))
    first, again, other = (differences_of(dataset, *scores, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == again and sorted(first) != sorted(other)


def test_too_few_queries_to_part_give_no_difference():
    for count, mean in ((3, None), (4, 0.5)):
        report, *_ = judged(queries_of(count), scores_of([3] * count), scores_of([1] * count))
        assert report["delta"]["mean"] == mean and report["verdict"] == "too few"
        assert report["delta"]["queries_up"] == (None if mean is None else count)


def test_of_candidates_that_do_equally_well_on_a_half_the_first_is_measured(generator):
    # Both are right on every other query of what the split makes of them, and never on the same ones.
    dataset, seed = queries_of(40, "hit@1"), 7
    order = np.random.default_rng(seed).permutation(40)
    first = np.empty(40, dtype=int)
    first[order] = np.tile([1, 1, 2, 2], 10)
    base = scores_of(np.where(first == 1, 3, 1))  # right where the first is wrong: this tells them apart
    assert set(differences_of(dataset, base, scores_of(first), scores_of(3 - first), seed=seed)) == {1.0, -1.0}
    assert set(differences_of(dataset, base, scores_of(3 - first), scores_of(first), seed=seed)) == {0.0}


@pytest.mark.parametrize("count", [4, 60, 160])
def test_average_precision_is_compared_by_groups_of_queries(generator, count):
    labels = generator.permutation(np.arange(count) % 2).astype(float)
    dataset = dataset_of(labels.tolist(), [1] * count, "average_precision")
    base, tuned = labels + generator.standard_normal((2, count)) * [[3], [0.5]]
    differences = differences_of(dataset, base, tuned)
    assert len(differences) == min(100, count)
    before, after = (candidate_of(dataset, each).metrics["average_precision"] for each in (base, tuned))
    assert differences.mean() == pytest.approx(after - before)  # the gain as a whole


# ---- The interval ----------------------------------------------------------------------------------------------------
def test_the_interval_holds_the_mean_and_narrows_with_more_queries(generator):
    widths = []
    for count in (20, 80, 320):
        differences = generator.exponential(0.3, count) - 0.1
        low, high = confidence_interval(differences, 42)
        assert low < differences.mean() < high
        widths.append(high - low)
    assert widths[0] > 1.3 * widths[1] > 1.3 * 1.3 * widths[2]


def test_the_interval_moves_with_the_differences_and_turns_with_their_sign(generator):
    differences = generator.standard_normal(60) ** 3 / 10
    low, high = confidence_interval(differences, 42)
    near = (high - low) / 20
    assert confidence_interval(differences + 0.25, 42) == pytest.approx([low + 0.25, high + 0.25], abs=near)
    assert confidence_interval(-differences, 42) == pytest.approx([-high, -low], abs=near)
    assert confidence_interval(2 * differences, 42) == pytest.approx([2 * low, 2 * high], abs=near)


@pytest.mark.parametrize("differing", [0, 1, 2])
def test_there_is_no_interval_where_nearly_all_differences_are_zero(differing):
    differences = np.zeros(100)
    differences[:differing] = 0.3
    assert confidence_interval(differences, 42) is None
    assert confidence_interval(differences + 1e-12, 42) is None  # rounding is no difference


# ---- The verdict -----------------------------------------------------------------------------------------------------
UP, DOWN = [1] * 14 + [3] * 26, [4] * 14 + [3] * 26  # the base: [3] * 40
MIXED_UP, MIXED_DOWN = [2] * 9 + [5] * 9 + [3] * 22, [2] * 8 + [5] * 10 + [3] * 22


@pytest.mark.parametrize(
    ("places", "verdict", "up", "down"),
    [
        (UP, "better", 14, 0),
        (DOWN, "worse", 0, 14),
        (MIXED_UP, "unclear", 9, 9),
        (MIXED_DOWN, "unclear", 8, 10),
        ([3] * 40, "too few", 0, 0),
        ([1, 1] + [3] * 38, "too few", 2, 0),
    ],
    ids=["better", "worse", "unclear, up", "unclear, down", "no difference", "hardly a difference"],
)
def test_the_verdict_is_whether_the_interval_of_the_difference_holds_zero(places, verdict, up, down):
    dataset = queries_of(40)
    report, *_ = judged(dataset, scores_of([3] * 40), scores_of(places))
    delta, gain = report["delta"], report["fine_tuned"]["ndcg@10"] - report["before"]["ndcg@10"]
    assert (report["verdict"], delta["queries_up"], delta["queries_down"]) == (verdict, up, down)
    assert delta["mean"] == pytest.approx(gain)  # of one candidate
    if verdict == "too few":
        assert delta["ci95"] is None
    else:
        low, high = delta["ci95"]
        assert low < delta["mean"] < high
        assert (low > 0, high < 0) == (verdict == "better", verdict == "worse")


@pytest.mark.parametrize(("count", "verdict"), [(3, "too few"), (19, "too few"), (20, "better")])
def test_fewer_than_twenty_queries_are_too_few_however_clear_the_difference(count, verdict):
    places = [1 + index % 2 for index in range(count)]
    report, *_ = judged(queries_of(count), scores_of([4] * count), scores_of(places))
    assert (report["verdict"], report["queries"]) == (verdict, count)
    assert (report["delta"]["ci95"] is None) == (verdict == "too few")
    assert report["delta"]["mean"] == (pytest.approx(report["after"]["ndcg@10"] - report["before"]["ndcg@10"])
                                       if count > 3 else None)  # fmt: skip


def test_only_queries_that_say_something_count_as_queries():
    labels, sizes = [1.0, 0, 0] * 19 + [1.0] * 3 + [0.0] * 2 + [1.0], [3] * 20 + [2, 1]
    base = [0.0, 1, 2] * 19 + [0.0] * 6
    report, *_ = judged(dataset_of(labels, sizes), base, [-score for score in base])
    assert (report["queries"], report["queries_left_out"], report["verdict"]) == (19, 3, "too few")


def test_grades_have_a_verdict_without_a_relevant_row(generator):
    labels = [0.25, 0.0, 0.0] * 30
    report, *_ = judged(dataset_of(labels, [3] * 30), generator.standard_normal(90), labels)
    assert (report["verdict"], report["after"]["ndcg@10"], report["after"]["map"]) == ("better", 1, None)


def test_the_verdict_is_on_the_metric_that_is_asked_for():
    base, tuned = scores_of([2] * 100), scores_of([1] * 15 + [5] * 85)  # more are first, most are last
    verdicts = {}
    for metric in ("ndcg@10", "hit@1"):
        report, *_ = judged(queries_of(100, metric), base, tuned)
        verdicts[report["metric"]] = report["verdict"]
    assert verdicts == {"ndcg@10": "worse", "hit@1": "better"}


@pytest.mark.parametrize(
    ("relevant", "irrelevant", "verdict"), [(20, 20, "better"), (19, 40, "too few"), (40, 19, "too few")]
)
def test_a_row_a_query_has_a_verdict_too_with_twenty_rows_of_each_kind(generator, relevant, irrelevant, verdict):
    labels = generator.permutation(np.repeat([1.0, 0.0], [relevant, irrelevant]))
    base, tuned = labels + generator.standard_normal((2, len(labels))) * [[9], [0.2]]
    report, *_ = judged(dataset_of(labels.tolist(), [1] * len(labels), "average_precision"), base, tuned)
    assert (report["verdict"], report["queries"], report["queries_left_out"]) == (verdict, len(labels), 0)
    assert report["before"]["ndcg@10"] is None and report["delta"]["mean"] > 0
    assert report["delta"]["queries_up"] is report["delta"]["queries_down"] is None  # a single row ranks nothing
    worse, *_, after = judged(dataset_of(labels.tolist(), [1] * len(labels), "average_precision"), tuned, base)
    assert (worse["verdict"], after.step) == (("worse", 0) if verdict == "better" else ("too few", 1))


def single_rows(relevant, irrelevant):
    """Queries with one row each: nothing to rank, all pairs are measured together."""
    count = relevant + irrelevant
    return dataset_of([1.0] * relevant + [0.0] * irrelevant, [1] * count, "average_precision")


@pytest.mark.parametrize(("relevant", "irrelevant", "too_few", "what"), [
    (24, 20, {}, None),
    (4, 20, {"relevant rows": 4}, "relevant rows"),
    (20, 19, {"irrelevant rows": 19}, "irrelevant rows"),
    (14, 10, {"relevant rows": 14, "irrelevant rows": 10}, "relevant rows and irrelevant rows"),
    (3, 16, {"queries": 19, "relevant rows": 3, "irrelevant rows": 16},
     "queries and relevant rows and irrelevant rows"),
])  # fmt: skip
def test_of_pairs_that_are_measured_together_the_verdict_says_what_there_are_too_few_of(
    generator, relevant, irrelevant, too_few, what
):
    dataset = single_rows(relevant, irrelevant)
    base, tuned = generator.standard_normal((2, relevant + irrelevant))
    report, *_ = judged(dataset, base, tuned)
    assert report["too_few"] == too_few and (report["verdict"] == "too few") == bool(too_few)
    *_, verdict, advice = verdict_text(report, ARGS | {"model_name_or_path": TINY}).splitlines()
    if not too_few:
        assert "too few" not in verdict
        return
    evidence = ", ".join([f"{relevant + irrelevant} queries",
                          *(f"{count} {kind}" for kind, count in too_few.items() if kind != "queries")])  # fmt: skip
    assert verdict == f"Verdict: too few {what} to tell. {evidence}."
    needed = " and ".join(f"20 or more {kind} ({count} here)" for kind, count in too_few.items())
    assert advice == f"Next: evaluate on more data: a verdict takes {needed}, better 5 times as many."


@pytest.mark.parametrize(("count", "changed", "what"), [
    (19, 9, "queries"), (40, 5, "queries that changed"), (40, 0, "queries that changed"),
])  # fmt: skip
def test_of_queries_that_are_ranked_too_few_in_all_are_told_from_too_few_that_changed(count, changed, what):
    places = [1] * changed + [3] * (count - changed)
    report, *_ = judged(queries_of(count), scores_of([3] * count), scores_of(places))
    number, needed = (count, 20) if what == "queries" else (changed, 6)
    assert report["too_few"] == {what: number}
    *_, verdict, advice = verdict_text(report, ARGS | {"model_name_or_path": TINY}).splitlines()
    assert verdict.startswith(f"Verdict: too few {what} to tell. {count} queries ({changed} up, 0 down)")
    assert f"a verdict takes {needed} or more {what} ({number} here), " in advice


TOGETHER = "measured by average precision over all pairs, rather than by NDCG@10"
ONE_ROW_EACH = (
    "Warning: none of the {} eval queries can be ranked, for each of them has one row: "
    f"{TOGETHER}; if one query should have several, its text has to be the same in each."
)
LABELS_ALIKE = (
    "Warning: none of the {} eval queries can be ranked, for all rows of a query have one and the same label: "
    f"{TOGETHER}; give queries both relevant and irrelevant rows."
)


@pytest.mark.parametrize(("labels", "sizes", "said"), [
    ([1.0, 0.0] * 30, [1] * 60, [ONE_ROW_EACH.format(60)]),
    ([1.0, 1.0, 0.0, 0.0] * 12, [2] * 24, [LABELS_ALIKE.format(24)]),
    ([1.0] * 14 + [0.0] * 10, [1] * 24, [
        ONE_ROW_EACH.format(24),
        "Warning: 14 eval relevant rows are too few: a verdict takes 20.",
        "Warning: 10 eval irrelevant rows are too few: a verdict takes 20.",
    ]),
], ids=["a row a query", "labels alike", "too few"])  # fmt: skip
def test_before_training_a_run_says_why_nothing_is_ranked_and_what_there_are_too_few_of(capsys, labels, sizes, said):
    dataset = dataset_of(labels, sizes)
    asked = {"metric_for_best_model": "auto", "epochs": 3}
    assert choose_metric(dataset, asked) == "average_precision"
    assert capsys.readouterr().out.splitlines() == said
    choose_metric(dataset, {**asked, "metric_for_best_model": "average_precision"})
    assert capsys.readouterr().out.splitlines() == said[1:], "it was asked for"


# ---- What is kept ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "load_best_model_at_end", "kept"),
    [(40, True, "base"), (20, True, "base"), (19, True, "tuned"), (40, False, "tuned")],
)
def test_the_base_is_kept_where_twenty_queries_or_more_rank_below_it(count, load_best_model_at_end, kept):
    dataset = queries_of(count)
    base, worst, bad = scores_of([1] * count), scores_of([5] * count), scores_of([2] * count)
    report, best, after = judged(dataset, base, worst, bad, load_best_model_at_end=load_best_model_at_end)
    assert best.step == 2 and np.array_equal(after.scores, base if kept == "base" else bad)
    assert report["chosen"] == ("base" if kept == "base" else {"step": 2, "base_interpolation": 0.0})
    assert report["before"]["mrr@10"] == 1 and report["fine_tuned"]["mrr@10"] == 0.5
    assert report["after"] == (report["before"] if kept == "base" else report["fine_tuned"])


def test_the_base_is_not_kept_for_what_ranks_as_well():
    places = [1, 2] * 20
    report, best, after = judged(queries_of(40), scores_of(places), scores_of(places[::-1]))
    assert report["chosen"] == {"step": 1, "base_interpolation": 0.0} and after is best


def test_the_best_candidate_is_kept_and_of_equals_the_first_which_is_mixed_least():
    dataset = queries_of(40)
    base = candidate_of(dataset, scores_of([3] * 40), step=0)
    evaluations = [candidate_of(dataset, scores_of([place] * 40), step) for step, place in ((1, 4), (2, 2), (3, 3))]
    mixtures = [candidate_of(dataset, 9 * scores_of([place] * 40), 2, mix) for place, mix in ((2, 0.25), (2, 0.5))]
    better = candidate_of(dataset, scores_of([1] * 40), 2, 0.75)
    report, best, after = judge([base, *evaluations, *mixtures], dataset, dataset.metric, ARGS)
    assert best is after is evaluations[1] and report["chosen"] == {"step": 2, "base_interpolation": 0.0}
    report, best, after = judge([base, *evaluations, *mixtures, better], dataset, dataset.metric, ARGS)
    assert best is after is better and report["chosen"] == {"step": 2, "base_interpolation": 0.75}
    assert [point["step"] for point in report["history"]] == [0, 1, 2, 3]  # mixtures are no points in training


def test_the_base_alone_is_judged_as_itself():
    dataset = queries_of(40)
    base = candidate_of(dataset, scores_of([1, 2] * 20), step=0)
    report, best, after = judge([base], dataset, dataset.metric, {**ARGS, "epochs": 0})
    assert best is after is base and (report["chosen"], report["verdict"]) == ("base", "too few")
    assert report["before"] == report["after"] == report["fine_tuned"] == base.metrics
    assert len(report["history"]) == 1 and report["delta"]["mean"] == 0


# ---- The report ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("labels", "sizes", "metric", "none"),
    [
        ([1.0, 0, 0] * 30, [3] * 30, "map", set()),
        ([1.0, 0] * 30, [1] * 60, "average_precision", set(RANKING)),
        ([0.25, 0, 0] * 30, [3] * 30, "ndcg@10", set(METRICS) - {"ndcg@10", "ndcg@5"}),
        ([1.0, 0], [2], "ndcg@10", set()),
        ([1.0, 1, 1, 0] * 5, [4] * 5, "ndcg@10", set()),  # the best threshold is below all rows
    ],
    ids=["queries", "a row a query", "nothing relevant", "one query", "mostly relevant"],
)
def test_the_report_is_strict_json_of_the_promised_keys(labels, sizes, metric, none):
    dataset = dataset_of(labels, sizes, metric)
    rows = np.arange(len(labels))
    report, *_ = judged(dataset, np.where(rows % 3, 1.0, 0.0), np.sin(rows), -100.0 * np.array(labels))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report) == {
        "dataset", "queries", "queries_left_out", "metric", "before", "after", "fine_tuned", "delta", "verdict",
        "too_few", "threshold", "history", "chosen", "base_has_new_head", "retriever", "against_retriever", "mixed",
        "all_relevant", "calibration", "thresholds",
    }  # fmt: skip
    keys = set(METRICS)
    for part in ("before", "after", "fine_tuned"):
        assert set(report[part]) == keys
        assert {key for key, value in report[part].items() if value is None} == none
    assert set(report["delta"]) == {"mean", "ci95", "queries_up", "queries_down"}
    assert [set(point) for point in report["history"]] == [{"step", "epoch", *keys}] * 3
    assert [point["step"] for point in report["history"]] == [0, 1, 2]
    assert (report["dataset"], report["metric"]) == ("some/eval.jsonl", metric)
    assert report["queries"] + report["queries_left_out"] == len(sizes)
    assert report["queries"] == len(dataset.lists[metric])
    assert report["threshold"] is None if "best_f1" in none else 0 <= report["threshold"] <= 1


@pytest.mark.parametrize("kept", ["base", "tuned"])
def test_the_threshold_is_a_probability_that_yields_the_best_f1_of_what_is_kept(generator, kept):
    dataset = queries_of(30)
    good = scores_of([1] * 30) + np.repeat(generator.standard_normal(30), ROWS)
    bad = 3 * generator.standard_normal(150) + 2
    report, _, after = judged(dataset, *((good, bad) if kept == "base" else (bad, good)))
    assert np.array_equal(after.scores, good) and 0.2 < report["after"]["best_f1"] < 1
    relevant, taken = dataset.labels.numpy() == 1, torch.from_numpy(good).sigmoid().numpy() >= report["threshold"]
    assert 2 * (relevant & taken).sum() / (relevant.sum() + taken.sum()) == pytest.approx(report["after"]["best_f1"])


def test_a_seed_gives_one_report(generator):
    dataset = queries_of(30)
    scores = generator.standard_normal((4, 30 * ROWS))
    first, again, other = (judged(dataset, *scores, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again and first["delta"]["mean"] != other["delta"]["mean"]


# ---- Mixtures --------------------------------------------------------------------------------------------------------
@pytest.fixture
def weights():
    """A model, base weights, and quite different ones."""
    model = BertRerankerModel.from_pretrained(TINY)
    base = host_copy(model)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e-3).add_(torch.randn(weight.shape, generator=noise))
    return model, host_copy(model), base


def bits_of(weights):
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def test_copies_of_the_weights_stay_as_they_were(weights):
    model, fine_tuned, base = weights
    before = bits_of(fine_tuned)
    assert before.keys() == bits_of(base).keys() and before != bits_of(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert bits_of(fine_tuned) == before


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0])
def test_a_share_of_0_or_1_gives_the_fine_tuned_or_the_base_weights_to_the_bit(weights, share):
    model, fine_tuned, base = weights
    set_weights(model, (fine_tuned, base), 1.0 - share)
    set_weights(model, (fine_tuned, base), share)  # whatever stood there
    assert bits_of(model.state_dict()) == bits_of(base if share else fine_tuned)


def test_a_share_between_mixes_every_weight(weights):
    model, fine_tuned, base = weights
    for share in (0.25, 0.75):
        set_weights(model, (fine_tuned, base), share)
        for name, tensor in model.state_dict().items():
            expected = (1 - share) * fine_tuned[name].double() + share * base[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


def test_the_interval_is_the_one_whose_coverage_is_measured():
    spec = importlib.util.spec_from_file_location("coverage_benchmark", ROOT / "benchmarks" / "coverage.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    generator = np.random.default_rng(0)
    for zeros in (0, 0.9):
        sample = generator.exponential(size=150) * (generator.random(150) >= zeros)
        method = "symmetric bootstrap-t"
        theirs = np.mean([benchmark.intervals(sample[None], generator)[method] for _ in range(20)], axis=0)
        ours = np.mean([confidence_interval(sample, seed) for seed in range(10)], axis=0)
        half = (ours[1] - ours[0]) / 2
        assert ours == pytest.approx(theirs[:, 0], abs=0.03 * half)
        student = 1.976 * sample.std(ddof=1) / np.sqrt(150)
        assert zeros == 0 or half > 1.06 * student  # few differ, skewed: not Student's t
