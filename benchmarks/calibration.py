"""Is the calibration error of eval_report.json right, and what are the default run's probabilities worth?

    python benchmarks/calibration.py simulation    # minutes, no data
    python benchmarks/calibration.py default_run

simulation: queries with eight candidates, whose right probabilities are known; those that are given are right, moved by
0.2 or 0.7 in the logit, or twice as steep and moved by 1.5. Labels are independent, share a random effect of their
query, or are 1 for exactly one candidate of a query. `true` is the error in ten bins of equal mass of 20,000 queries,
with right probabilities in place of labels. 200 draws each: the mean of the raw error, of that less its level under
right probabilities, of the error as reported (squares subtracted), and how often its 95 % interval holds `true`.

default_run: the README's command, and what its probabilities in predictions.jsonl are worth: the error in ten bins of
equal width, with nothing subtracted for chance, beside the report's own figures. Last: with slope and offset as
tools/calibrate.py fits them, each fifth of the queries with those of the others.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from default_run import ROOT, SETTINGS
from retriever import silently

sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import calibrate  # noqa: E402

import train_bert_rerank as product  # noqa: E402

DRAWS = 200
CANDIDATES = 8
QUERIES = (20, 60, 160, 600)
MOVED = ((1, 0), (1, 0.2), (1, 0.7), (2, 1.5))  # (slope, offset) of the logits


def sigmoid(logits):
    """Probabilities of logits."""
    return 1 / (1 + np.exp(-logits))


def logit(probabilities):
    """Logits of probabilities."""
    return np.log(probabilities / (1 - probabilities))


def independent(generator, queries):
    """(right probabilities, labels), each [queries, 8]: 30 % relevant."""
    right = sigmoid(generator.normal(-1, 1.5, (queries, CANDIDATES)))
    return right, generator.random(right.shape) < right


def query_effect(generator, queries):
    """The same where a normal effect of the query, unknown to the model, moves all of its logits."""
    spread = 1.5
    logits = generator.normal(-1, 1.5, (queries, CANDIDATES))
    effects = generator.normal(0, spread, (queries, 1))
    labels = generator.random(logits.shape) < sigmoid(logits + effects)
    # The right probability is the mean over effects, by quadrature.
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    right = sigmoid(logits[..., None] + spread * nodes) @ (weights / weights.sum())
    return right, labels


def one_relevant(generator, queries):
    """The same where each query has one relevant candidate, drawn by a softmax."""
    weights = np.exp(generator.normal(0, 1.8, (queries, CANDIDATES)))
    right = weights / weights.sum(1, keepdims=True)
    below = right.cumsum(1) < generator.random((queries, 1))
    chosen = below.sum(1).clip(max=CANDIDATES - 1)
    return right, np.arange(CANDIDATES) == chosen[:, None]


KINDS = {"independent": independent, "query effect": query_effect, "one relevant": one_relevant}


def reliability(right, labels, slope, offset):
    """The product's Reliability of the moved probabilities; labels, or what takes their place."""
    probabilities = sigmoid(slope * logit(right) + offset)
    lists = np.arange(right.size).reshape(right.shape)
    return product.Reliability(probabilities.ravel(), labels.ravel().astype(float), lists)


def simulate(draw, queries, slope, offset, true):
    """(mean raw error, that less its level, and reported error [3], share of intervals that hold `true`)."""
    generator = np.random.default_rng(1)
    errors, held = [], 0
    for number in range(DRAWS):
        right, labels = draw(generator, queries)
        measured = reliability(right, labels, slope, offset)
        errors.append((measured.raw_error, measured.raw_error - measured.level, measured.error))
        low, high = measured.ci95(number)
        held += low <= true <= high
    return np.mean(errors, axis=0), held / DRAWS


def simulation():
    """Print a line for each kind of labels, way that probabilities are wrong, and number of queries."""
    columns = ("labels", "slope, offset", "true", "queries", "raw", "raw − level", "reported", "coverage")
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|", flush=True)
    for (kind, draw), (slope, offset) in itertools.product(KINDS.items(), MOVED):
        right, _ = draw(np.random.default_rng(0), 20_000)
        true = reliability(right, right, slope, offset).raw_error
        for queries in QUERIES:
            means, coverage = simulate(draw, queries, slope, offset, true)
            errors = " | ".join(f"{mean:.3f}" for mean in means)
            print(f"| {kind} | {slope}, {offset} | {true:.3f} | {queries} | {errors} | {coverage:.3f} |", flush=True)


def equal_width_error(probabilities, labels, bins=10):
    """The expected calibration error in bins of equal width, as it is."""
    bin_of_row = np.minimum((probabilities * bins).astype(int), bins - 1)
    return np.abs(np.bincount(bin_of_row, probabilities - labels)).sum() / len(labels)


def default_run():
    """Print the figures of the default run: before fine-tuning, after it, and calibrated."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out")
        settings = {"train_dataset": str(ROOT / "default_train_data.jsonl"), "output_dir": str(output)}
        report, _ = silently({**SETTINGS, **settings})
        lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    labels = np.array([row["label"] for row in rows], dtype=float)

    columns = ("probabilities", "error, equal width", "Brier", "rows ≥ 0.8", "of them relevant",
               "error reported, equal mass", "raw", "level")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|", flush=True)
    for when in ("before", "after"):
        probabilities = np.array([row[f"score_{when}"] for row in rows])
        print(line_of(when, probabilities, labels, report["calibration"][when]), flush=True)

    lists = product.candidate_lists([row["query"] for row in rows], labels)["all"]
    logits = calibrate.cross_fitted(logit(probabilities), labels, lists)
    reported = product.calibration_of(logits, labels, lists, seed=42)
    print(line_of("after, calibrated", sigmoid(logits), labels, reported), flush=True)


def line_of(name, probabilities, labels, reported):
    """The line of a table for some probabilities and what the report says of them."""
    high = labels[probabilities >= 0.8]
    relevant = f"{high.mean():.0%}" if len(high) else "none there"
    low, upper = reported["ci95"]
    return (
        f"| {name} | {equal_width_error(probabilities, labels):.3f} | {np.mean((probabilities - labels) ** 2):.3f} | "
        f"{len(high)} | {relevant} | {reported['error']:.3f} [{low:.3f}, {upper:.3f}] | "
        f"{reported['raw_error']:.3f} | {reported['level']:.3f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulation", "default_run"))
    {"simulation": simulation, "default_run": default_run}[parser.parse_args().what]()
