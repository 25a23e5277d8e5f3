"""How often 95 % intervals of the mean NDCG@10 difference per query (after minus before) hold the true mean.

    python benchmarks/coverage.py [--draws 5000] RUN_DIR_OR_PREDICTIONS ...    # some 15 seconds a run, one core

The differences of a run's predictions.jsonl are a population with known mean; thinned populations have 80, 90 and 95 %
zeros. Samples of n queries are drawn with replacement. Of those with at least 6 differences other than 0, a row gives
one method's mean width (in thousandths) and the share of intervals wholly above the true mean (a false "better" where
that is 0) and wholly below it (a false "worse"). K=... is the coverage of samples with at least K differences other
than 0, the others being answered "too few": no miss. It is left out where fewer than half are answered, as those that
are have too many differences to stand for their population, whatever the method. All methods are
translation-equivariant: a coverage holds at a true mean of 0 too. Its standard error is 0.3 points with 5,000 draws.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm, t

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import ndcg_at_k  # noqa: E402

SAMPLE_SIZES, ZEROS, RESAMPLES, CHUNK = (30, 50, 100, 200), (0.8, 0.9, 0.95), 1999, 500
AT_LEAST, RULE, LEAST_ANSWERED = (0, 5, 6, 10, 15, 20), 6, 0.5
LINE = "| {:3} | {:23} | {:>5} | {:>5} | {:>5} | " + " | ".join(["{:>5}"] * len(AT_LEAST)) + " |"
HEAD = LINE.format("n", "method", "width", "above", "below", *(f"K={least}" for least in AT_LEAST))
HEAD += "\n|----:|" + "-" * 25 + "|" + "------:|" * (3 + len(AT_LEAST))


def read_differences(path):
    """The NDCG@10 differences, after minus before, [queries] of a predictions.jsonl or of the run folder that holds it.
    Queries whose labels are all equal have none."""
    path = Path(path, "predictions.jsonl") if Path(path).is_dir() else Path(path)
    groups = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        groups.setdefault(row["query"], []).append((row["label"], row["score_before"], row["score_after"]))
    differences = []
    for group in groups.values():
        labels, before, after = np.array(group, dtype=float).T
        if labels.min() < labels.max():
            before, after = (np.log(p / (1 - p)) for p in np.clip((before, after), 1e-12, 1 - 1e-12))
            differences.append(ndcg_at_k(labels, after) - ndcg_at_k(labels, before))
    return np.array(differences)


def student(mean, error, n):
    """Student's (1908) t of means [D] with standard errors [D]: low [D], high [D]."""
    half = t.ppf(0.975, n - 1) * error
    return mean - half, mean + half


def pseudo(x, count):
    """Student's t with `count` pseudo-observations, half of them above and half below the mean of x [D, n] by its
    largest deviation, in the manner of Agresti and Coull (1998): low [D], high [D]."""
    n, mean = x.shape[1] + count, x.mean(axis=1, keepdims=True)
    squares = (x - mean) ** 2
    return student(mean[:, 0], np.sqrt((squares.sum(axis=1) + count * squares.max(axis=1)) / (n * (n - 1))), n)


def quantiles(values, *shares):
    """The order statistics of sorted values [D, R] at each share, a number or [D]: [D] for each."""
    ranks = (np.round(np.multiply(share, RESAMPLES + 1)).astype(int) - 1 for share in shares)
    return [values[np.arange(len(values)), rank.clip(0, RESAMPLES - 1)] for rank in ranks]


def bias_corrected(means, mean, skewness, n):
    """Efron's (1987) BCa from sorted resample means [D, R], ties counted half: low [D], high [D]."""
    distance = means - mean[:, None]
    below = ((distance < -1e-12).mean(axis=1) + (distance <= 1e-12).mean(axis=1)) / 2
    bias, acceleration = norm.ppf(below.clip(1e-4, 1 - 1e-4)), skewness / (6 * np.sqrt(n))
    shifted = (bias + z for z in norm.ppf((0.025, 0.975)))
    return quantiles(means, *(norm.cdf(bias + z / np.maximum(1 - acceleration * z, 1e-4)) for z in shifted))


def intervals(x, generator):
    """Every method on samples x [D, n], which share the resamples: {name: (low [D], high [D])}.

    Percentile and bootstrap-t: Efron and Tibshirani (1993), chapters 13 and 12; symmetric bootstrap-t: Hall (1988);
    Johnson's t, moved by the skewness: Johnson (1978). A resample of zero standard deviation has an infinite t, of its
    mean's sign: over 2.5 % of them, as with three differences other than 0 or fewer, make the bootstrap-t unbounded.
    """
    n, mean = x.shape[1], x.mean(axis=1)
    centred = x - mean[:, None]
    deviation = np.maximum(centred.std(axis=1, ddof=1), 1e-300)  # above 0: an infinite t times 0 is no number
    error, skewness = deviation / np.sqrt(n), (centred**3).mean(axis=1) / np.maximum(centred.std(axis=1), 1e-9) ** 3
    weights = generator.multinomial(n, np.full(n, 1 / n), RESAMPLES).T / n  # [n, R]: resampling as a matrix product
    shifts = centred @ weights  # [D, R]: the mean of each resample less that of its sample
    variances = (centred**2 @ weights - shifts**2) * n / (n - 1)
    variances[variances < 1e-9 * deviation[:, None] ** 2] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        studentized = np.nan_to_num(shifts / np.sqrt(variances / n), nan=0, posinf=np.inf, neginf=-np.inf)
    [half] = quantiles(np.sort(np.abs(studentized), axis=1), 0.95)
    low, high = student(mean, error, n)
    small, large = quantiles(np.sort(studentized, axis=1), 0.025, 0.975)
    shifts.sort(axis=1)
    return {
        "Student t": (low, high),
        "Johnson's t": student(mean + skewness * error / (6 * np.sqrt(n)), error, n),
        "t, 1 pseudo": pseudo(x, 1),
        "t, 2 pseudo": pseudo(x, 2),
        "percentile": mean + quantiles(shifts, 0.025, 0.975),
        "BCa": bias_corrected(shifts + mean[:, None], mean, skewness, n),
        "bootstrap-t": (mean - large * error, mean - small * error),
        "symmetric bootstrap-t": (mean - half * error, mean + half * error),
        "wider of t, bootstrap-t": (np.minimum(low, mean - large * error), np.maximum(high, mean - small * error)),
    }


def simulate(differing, zeros, n, draws, generator):
    """Samples of n from the differences other than 0, with zeros for a share of them: the count of others [draws], and
    {method: [width, whether wholly above the true mean, whether wholly below] [3, draws]}."""
    true_mean, counts, results = (1 - zeros) * differing.mean(), [], {}
    for start in range(0, draws, CHUNK):
        shape = (min(CHUNK, draws - start), n)
        x = generator.choice(differing, shape) * (generator.random(shape) >= zeros)
        counts.append((x != 0).sum(axis=1))
        for name, (low, high) in intervals(x, generator).items():
            results.setdefault(name, []).append((high - low, low > true_mean, high < true_mean))
    return np.concatenate(counts), {name: np.concatenate(parts, axis=1) for name, parts in results.items()}


def show(n, name, cells):
    """Print a row; what is no number as a dash."""
    print(LINE.format(n, name, *("-" if np.isnan(cell) else f"{cell:.1f}" for cell in cells)))


def table(differing, zeros, draws, generator):
    """Print the table of one population: {method: [width, above, below, coverage at each K] at each n}, not a number
    where too few samples are answered."""
    rows = {}
    print(HEAD)
    for n in SAMPLE_SIZES:
        counts, results = simulate(differing, zeros, n, draws, generator)
        show(n, "% of samples answered", [np.nan] * 3 + [100 * (counts >= least).mean() for least in AT_LEAST])
        for name, (width, above, below) in results.items():
            columns = [(1000 * width, RULE), (100 * above, RULE), (100 * below, RULE)]
            columns += [(100 - 100 * (above + below), least) for least in AT_LEAST]
            cells = [values[counts >= least].mean() if (counts >= least).mean() >= LEAST_ANSWERED else np.nan
                     for values, least in columns]
            rows.setdefault(name, []).append(cells)
            show(n, name, cells)
    return rows


def main():
    """Simulate each run of the command line at its own share of zeros and thinned; the worst of all of them last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="RUN_DIR_OR_PREDICTIONS")
    parser.add_argument("--draws", type=int, default=5000)
    args = parser.parse_args()
    generator, tables = np.random.default_rng(0), {}
    for path in args.paths:
        differences = read_differences(path)
        differing = differences[np.abs(differences) > 1e-9]
        if len(differing) < RULE:
            raise SystemExit(f"{path}: {len(differing)} of {len(differences)} queries differ, too few for a population")
        own = 1 - len(differing) / len(differences)
        for zeros in (own, *(share for share in ZEROS if share > own)):
            print(f"\n{path}: {len(differences)} queries, {len(differing)} of them differ; {100 * zeros:.0f} % zeros\n")
            for name, rows in table(differing, zeros, args.draws, generator).items():
                tables.setdefault(name, []).extend(rows)
    print("\nAll of the above: mean width in % of Student's t, highest misses, lowest coverage\n\n" + HEAD)
    tables = {name: np.transpose(cells) for name, cells in tables.items()}
    for name, cells in tables.items():
        highest, lowest = np.fmax.reduce(cells[1:3], axis=1), np.fmin.reduce(cells[3:], axis=1)
        show("", name, [100 * np.nanmean(cells[0] / tables["Student t"][0]), *highest, *lowest])


if __name__ == "__main__":
    main()
