"""What stands behind the defaults of evaluation, what was tried and left out, and how often the verdict errs.

    python benchmarks/evaluation.py interpolation   # does mixing the best weights with the base's help?
    python benchmarks/evaluation.py rows_to_check   # do training margins find flipped labels?
    python benchmarks/evaluation.py first_step      # should bias and scale of the head be fitted before step 1?
    python benchmarks/evaluation.py imbalance       # is anything beyond plain BCE worth having at 1:7?
    python benchmarks/evaluation.py null_runs       # how often are runs on shuffled labels called 'better'?

All of them fine-tune tiny_reranker on the default data in fp32. The first two take `--data CRANFIELD --base
cranfield_base` (made by cranfield_base.py) instead and fine-tune that base at max_len 128 on the other half of the
training queries, with at most 8 rows a query, four of them relevant, and rank the evaluation queries with at most 16
rows, 8 of them graded above 0. `--mixed_precision` is that of the Cranfield runs.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from cranfield_base import SETTINGS as CRANFIELD
from cranfield_base import halves
from default_run import ROOT, SEEDS, SETTINGS, fine_tune, read, shuffle_labels

sys.path.insert(0, str(ROOT))
import train_bert_rerank as product  # noqa: E402


def default_data():
    """Train and eval rows of the repository."""
    return read("default_train_data.jsonl"), read("default_eval_data.jsonl")


def at_most(rows, count):
    """Of each query the first `count` rows with a label above 0 and the first `count` with label 0."""
    taken = {}
    for row in rows:
        side = taken.setdefault((row["query"], row["label"] > 0), [])
        side += [row] * (len(side) < count)
    return [row for side in taken.values() for row in side]


def model_and_data(options):
    """Name, (train rows, eval rows) and settings of the model and data asked for."""
    if not options.base:
        return "tiny_reranker", default_data(), SETTINGS
    eval_rows = read(Path(options.data, "cranfield_eval.jsonl").resolve())
    settings = {"model_name_or_path": options.base, "mixed_precision": options.mixed_precision, "lr": 3e-5, "epochs": 2}
    return "Cranfield base", (at_most(halves(options.data)[1], 4), at_most(eval_rows, 8)), {**CRANFIELD, **settings}


def interpolation(options):
    """Cross-fitted change of NDCG@10 with and without mixtures among the candidates, the mean over 20 halvings of the
    queries; ordinary runs, then over-trained ones (10 times the learning rate and the epochs, evaluated ten times)."""
    name, (train_rows, eval_rows), settings = model_and_data(options)
    print("| run | seed | base | last epoch | best epoch | mixed with 25, 50, 75 % | change without mixtures | with |\n"
          + "| --- " * 8 + "|")
    seen, judge = [], product.judge
    product.judge = lambda *arguments: seen.append(arguments) or judge(*arguments)
    for factor, seeds in ((1, SEEDS), (10, SEEDS[:4])):
        changes = []
        for seed in SEEDS[:3] if options.base else seeds:
            epochs = settings["epochs"] * factor
            eval_steps = -(-len(train_rows) // 16) * max(1, epochs // 10)
            fine_tune(train_rows, eval_rows, **{**settings, "lr": settings["lr"] * factor, "epochs": epochs,
                                                "eval_steps": eval_steps, "seed": seed,
                                                "base_interpolation": [0.25, 0.5, 0.75]})  # fmt: skip
            (base, *candidates), *_ = seen.pop()
            ndcg = [each.metrics["ndcg@10"] for each in candidates]
            count = sum(each.base_interpolation == 0 for each in candidates)
            changes.append([np.mean([product.cross_fit(base, among, split).mean() for split in range(20)])
                            for among in (candidates[:count], candidates)])
            mixed = " ".join(f"{each:.4f}" for each in ndcg[count:])
            print(f"| {name}, {epochs} epochs | {seed} | {base['metrics']['ndcg@10']:.4f} | {ndcg[count - 1]:.4f} | "
                  f"{max(ndcg[:count]):.4f} | {mixed} | {changes[-1][0]:+.4f} | {changes[-1][1]:+.4f} |", flush=True)
        mean = np.mean(changes, axis=0)
        print(f"| {name}, {epochs} epochs | mean | | | | | {mean[0]:+.4f} | {mean[1]:+.4f} |", flush=True)


def rows_to_check(options):
    """Of 5 % flipped training labels, the share that stands among the first 5 % of the rows, sorted by several scores
    of the logits that training sees: chance is 0.05. Of Cranfield, all rows of the second half, lr 1e-4, 4 epochs."""
    name, (rows, _), settings = model_and_data(options)
    if options.base:
        rows, settings = halves(options.data)[1], {**settings, "lr": 1e-4, "epochs": 4}
    found = {}
    for seed in SEEDS[:3]:
        flipped = random.Random(seed).sample(range(len(rows)), round(len(rows) / 20))
        noisy = [{**row, "label": 1 - row["label"]} if index in flipped else row for index, row in enumerate(rows)]
        logits, forward = {}, product.BertRerankerModel.forward

        def recording(self, batch, labels=None, logits=logits, forward=forward):
            output = forward(self, batch, labels)
            for ids, mask, logit in zip(batch["input_ids"], batch["attention_mask"], output["logits"], strict=True):
                logits.setdefault(tuple(ids[mask.bool()].tolist()), []).append(logit.item())
            return output

        model = product.BertRerankerModel.from_pretrained(settings["model_name_or_path"])
        encoded = list(model.encode([(row["query"], row["content"]) for row in rows], settings.get("max_len", 512)))
        product.BertRerankerModel.forward = recording
        fine_tune(noisy, None, **{**settings, "seed": seed})
        product.BertRerankerModel.forward = forward
        sign = np.array([[2 * row["label"] - 1] for row in noisy])
        margins = sign * np.array([logits[tuple(ids.tolist())][: settings["epochs"]] for ids, *_ in encoded])
        for what, values in (("mean margin of the logits", margins.mean(1)), ("last epoch's loss", margins[:, -1]),
                             ("mean probability of the label", (1 / (1 + np.exp(-margins))).mean(1)),
                             ("first epoch's loss", margins[:, 0])):  # fmt: skip
            found.setdefault(what, []).append(np.isin(np.argsort(values)[: len(flipped)], flipped).mean())
    for what, shares in found.items():
        print(f"{name}, {len(rows)} rows, {what}: {' '.join(f'{share:.2f}' for share in shares)}, "
              f"mean {np.mean(shares):.2f}", flush=True)


def logistic(logits, labels):
    """Scale and offset of `logits` [N] that minimise BCE against `labels` [N], by Newton's method."""
    design, weights = np.stack([logits, np.ones_like(logits)], 1), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ weights))
        weights += np.linalg.solve((design * (p * (1 - p))[:, None]).T @ design, design.T @ (labels - p))
    return weights


def bias_alone(logits, labels):
    """Scale 1 and the offset that makes the mean probability the mean label, by bisection."""
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        is_low = (1 / (1 + np.exp(-logits - middle))).mean() < labels.mean()
        low, high = (middle, high) if is_low else (low, middle)
    return 1.0, low


def first_step(options):
    """NDCG@10 of the last epoch where the head's logits are multiplied and shifted beforehand; with bias (and scale)
    fitted to the training labels before step 1 it is that of the fitted model, whatever was done to it."""
    train_rows, eval_rows = default_data()
    model = product.BertRerankerModel.from_pretrained(SETTINGS["model_name_or_path"])
    head = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 1][-1]
    product.fit_bias = lambda *arguments: None  # the script's own, which acts where an offset exceeds 2
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    pairs = [(row["query"], row["content"]) for row in train_rows]
    labels = np.array([row["label"] for row in train_rows])
    for name, scale, offset, fit in (
        ("as it is", 1, 0, None), ("+ 8", 1, 8, None), ("x 3, + 8", 3, 8, None),
        ("as it is, bias fitted", 1, 0, bias_alone), ("x 3, + 8, bias fitted", 3, 8, bias_alone),
        ("as it is, bias and scale fitted", 1, 0, logistic),
    ):  # fmt: skip
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            head.weight.copy_(weight * scale)
            head.bias.copy_(bias * scale + offset)
            if fit:
                a, b = fit(model.predict(pairs, activation_fn=torch.nn.Identity()).astype(float), labels)
                head.weight.mul_(a)
                head.bias.mul_(a).add_(b)
            model.save_pretrained(folder)
            with torch.enable_grad():
                histories = [fine_tune(train_rows, eval_rows, model_name_or_path=folder, seed=seed)["history"]
                             for seed in SEEDS]
        first, last = ([history[index]["ndcg@10"] for history in histories] for index in (1, -1))
        print(f"{name}: before {histories[0][0]['ndcg@10']:.4f}, after epoch 1 {np.mean(first):.4f}, after epoch 10 "
              f"{np.mean(last):.4f} ({min(last):.4f} to {max(last):.4f})", flush=True)


def imbalance(options):
    """The last epoch on training data thinned to one relevant row in eight, trained in several ways."""
    train_rows, eval_rows = default_data()
    relevant, irrelevant = ([row for row in train_rows if row["label"] == label] for label in (1, 0))
    results = {}
    for seed in SEEDS[:3]:
        few = random.Random(seed).sample(relevant, len(irrelevant) // 7)
        for what, rows, epochs in (
            ("plain BCE", few + irrelevant, 10),
            ("plain BCE, 3 epochs", few + irrelevant, 3),
            ("relevant rows weigh 7", few * 7 + irrelevant, 10),
            ("relevant rows weigh 7, half the epochs", few * 7 + irrelevant, 5),
            ("irrelevant rows thinned to as many", few + random.Random(seed).sample(irrelevant, len(few)), 10),
        ):
            last = fine_tune(rows, eval_rows, seed=seed, epochs=epochs)["history"][-1]
            results.setdefault(what, []).append([last["ndcg@10"], last["average_precision"]])
    for what, values in results.items():
        ndcg, precision = np.transpose(values)
        print(f"{what}: NDCG@10 {ndcg.mean():.4f} ({ndcg.min():.4f} to {ndcg.max():.4f}), average precision "
              f"{precision.mean():.4f} ({precision.min():.4f} to {precision.max():.4f})", flush=True)


def null_runs(options):
    """Verdicts of 40 runs on training labels shuffled within the file. A tenth of the README's learning rate and 3
    epochs spoil little: the harder case. (The README's own spoil far more.)"""
    train_rows, eval_rows = default_data()
    reports = []
    for seed in range(40):
        reports.append(fine_tune(shuffle_labels(train_rows, seed), eval_rows, seed=seed, lr=3e-5, epochs=3))
        print(f"seed {seed}: {reports[-1]['verdict']}, {reports[-1]['delta']['mean']:+.4f}", flush=True)
    changes = [report["delta"]["mean"] for report in reports]
    chosen = Counter(report["chosen"] if report["chosen"] == "base" else report["chosen"]["base_interpolation"]
                     for report in reports)
    print(f"{dict(Counter(report['verdict'] for report in reports))}; mean change {np.mean(changes):+.4f} "
          f"({min(changes):+.4f} to {max(changes):+.4f}); final_model (base, or its share mixed in): {dict(chosen)}")


if __name__ == "__main__":
    experiments = {each.__name__: each for each in (interpolation, rows_to_check, first_step, imbalance, null_runs)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=experiments)
    parser.add_argument("--data", help="folder of the Cranfield files")
    parser.add_argument("--base", help="the model that cranfield_base.py made")
    parser.add_argument("--mixed_precision", default="no")
    arguments = parser.parse_args()
    experiments[arguments.what](arguments)
