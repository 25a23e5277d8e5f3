"""Windows: every sample once, no padding that could be saved, no process that waits for another for long."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

from train_bert_rerank import BertRerankerModel, cut_window, epoch_windows, micro_batch_cost, plan_window, read_rows

GENERATOR = np.random.default_rng(0)


def cost_of(lengths, batch_cost):
    """Padded tokens of one micro-batch, plus the constant."""
    return len(lengths) * max(lengths) + batch_cost


def partitions(items):
    """All ways to group `items`."""
    if not items:
        yield []
        return
    for smaller in partitions(items[1:]):
        yield [[items[0]], *smaller]
        for index, group in enumerate(smaller):
            yield [*smaller[:index], [items[0], *group], *smaller[index + 1 :]]


def allowed(groups, max_tokens):
    return all(len(group) * max(group) <= max_tokens or len(group) == 1 for group in groups)


@pytest.mark.parametrize(("max_tokens", "batch_cost"), [(40, 0), (40, 5), (64, 16), (10_000, 3), (1, 3)])
def test_the_cut_is_the_cheapest_of_all_ways_to_group_the_samples(max_tokens, batch_cost):
    for _ in range(8):
        lengths = GENERATOR.integers(1, 30, GENERATOR.integers(1, 8)).tolist()
        groups = [sorted(lengths)[start:end] for _, start, end in cut_window(np.sort(lengths), max_tokens, batch_cost)]
        assert sorted(itertools.chain(*groups)) == sorted(lengths) and allowed(groups, max_tokens)
        best = min(
            sum(cost_of(group, batch_cost) for group in way) for way in partitions(lengths) if allowed(way, max_tokens)
        )
        assert sum(cost_of(group, batch_cost) for group in groups) == best


def test_a_sample_longer_than_the_bound_stands_alone():
    runs = cut_window(np.array([10, 10, 90]), max_tokens=40, batch_cost=0)
    assert sorted((start, end) for _, start, end in runs) == [(0, 2), (2, 3)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_over_all_processes_every_sample_comes_up_once_an_epoch_within_the_bound(processes):
    lengths = GENERATOR.integers(3, 512, 203)
    orders = [torch.Generator().manual_seed(5) for _ in range(processes)]
    for _ in range(2):
        windows = list(zip(*(
            [(window, [window[indices] for indices in plan_window(lengths[window], 1024, 16, processes)[index]])
             for window in epoch_windows(203, 16, orders[index])] for index in range(processes)
        ), strict=True))  # fmt: skip
        assert len(windows) == math.ceil(203 / 16)
        seen = []
        for window in windows:
            micro_batches = [indices for _, mine in window for indices in mine]
            rows = np.concatenate(micro_batches)
            assert {tuple(mine) for mine, _ in window} == {tuple(window[0][0])} and len(rows) == len(window[0][0])
            assert all(len(indices) * lengths[indices].max() <= 1024 for indices in micro_batches)
            seen += rows.tolist()
        assert sorted(seen) == list(range(203))
        assert [len(window) for (window, _), *_ in windows] == [16] * 12 + [11]


def test_a_window_is_consecutive_in_the_random_permutation_and_each_epoch_has_its_own():
    order, expected = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    epochs = []
    for _ in range(2):
        permutation = torch.randperm(40, generator=expected).tolist()
        windows = epoch_windows(40, 8, order)
        assert [window.tolist() for window in windows] == [permutation[step : step + 8] for step in range(0, 40, 8)]
        epochs.append(permutation)
    assert epochs[0] != epochs[1]


def epochs_by_query(queries, samples_per_step, count=2):
    """The first `count` epochs' windows with the rows of each query together, as lists of row numbers."""
    order = torch.Generator().manual_seed(9)
    epochs = []
    for _ in range(count):
        windows = epoch_windows(len(queries), samples_per_step, order, np.array(queries))
        epochs.append([window.tolist() for window in windows])
    return epochs


def test_by_query_its_rows_stay_together_wherever_they_stand_in_the_file():
    queries = GENERATOR.permutation(np.repeat(np.arange(40), GENERATOR.integers(1, 9, 40)))
    for windows in epochs_by_query(queries, 16):
        assert [len(window) for window in windows[:-1]] == [16] * (len(windows) - 1)
        rows = [row for window in windows for row in window]
        assert sorted(rows) == list(range(len(queries)))
        assert len(list(itertools.groupby(queries[rows]))) == 40  # each begins once


def test_by_query_these_and_the_rows_of_each_come_in_another_order_in_each_epoch():
    queries = np.repeat(np.arange(40), 8)
    first, second = ([row for window in windows for row in window] for windows in epochs_by_query(queries, 16))
    assert queries[first].tolist() != queries[second].tolist()

    # No place of a list comes first more often, so that a window's end cuts no kind of rows off.
    places = [windows[0][0] % 8 for windows in epochs_by_query(queries, 16, 400)]
    assert np.bincount(places, minlength=8) == pytest.approx(np.full(8, 50), abs=30)


def test_by_query_those_of_one_row_each_are_permuted_evenly():
    """Each row comes first about as often as any other: of 4,000 epochs of five rows 800 times."""
    first = [windows[0][0] for windows in epochs_by_query(range(5), 5, 4000)]
    assert np.bincount(first) == pytest.approx(np.full(5, 800), abs=120)


def test_a_window_smaller_than_the_number_of_processes_leaves_some_without_work():
    plan = plan_window(np.array([7, 9]), max_tokens=1024, batch_cost=16, num_processes=4)
    assert sorted(len(mine) for mine in plan) == [0, 0, 1, 1]


@functools.cache
def realistic_lengths(kind):
    """Lengths in tokens of the default rows, or of pairs like Cranfield's: some 220 on average, clipped at 512."""
    if kind == "abstracts":
        return np.clip(GENERATOR.lognormal(5.25, 0.6, 6400), 8, 512).astype(int)
    pairs = [row[:2] for row in read_rows(str(ROOT / "default_train_data.jsonl"), 0, 1)]
    return np.array([len(ids) for ids, *_ in BertRerankerModel.from_pretrained(TINY).encode(pairs, 512)])


@pytest.mark.parametrize("kind", ["abstracts", "default data"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 8), (8, 8)])
def test_four_processes_do_the_work_of_at_least_three_point_six(kind, batch_size, accumulation):
    costs = {"max_tokens": batch_size * 512, "batch_cost": micro_batch_cost(None, torch.device("cpu"), "no")}
    alone = together = bound = 0
    for _ in range(40):
        lengths = GENERATOR.choice(realistic_lengths(kind), 4 * batch_size * accumulation)
        loads = [
            max(sum(cost_of(lengths[indices], costs["batch_cost"]) for indices in mine) for mine in plan)
            for plan in (plan_window(lengths, **costs), plan_window(lengths, **costs, num_processes=4))
        ]
        alone, together = alone + loads[0], together + loads[1]
        bound += max(lengths.sum() / 4, lengths.max()) + costs["batch_cost"]
    assert alone / together >= 3.6
    assert together / bound <= 1.15


def test_windows_pad_less_than_five_percent_of_the_tokens_where_random_batches_pad_forty():
    lengths = realistic_lengths("abstracts")
    order = torch.Generator().manual_seed(0)
    padded = sum(
        len(indices) * lengths[window][indices].max()
        for window in epoch_windows(len(lengths), 64, order)
        for indices in plan_window(lengths[window], max_tokens=8 * 512, batch_cost=16)[0]
    )
    random_batches = lengths.reshape(-1, 8)
    assert lengths.sum() / padded > 0.95
    assert lengths.sum() / (8 * random_batches.max(axis=1)).sum() < 0.65
