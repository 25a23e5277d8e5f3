"""What the default run of the README is worth, and how its learning rate and epochs were chosen.

    python benchmarks/default_run.py cross_validate   # grid over the training queries alone, minutes per cell
    python benchmarks/default_run.py report           # five seeds on the eval file, with two controls

`cross_validate` never opens the eval file: five folds of the training queries, fp32. `report` shows NDCG@10 before and
after over five seeds, a percentile-bootstrap interval of the rise over the eval queries of each seed, and the rise with
the training labels shuffled within the file and with every query blanked in training and evaluation.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train_bert_rerank import BertRerankerModel, ranking_metrics, train  # noqa: E402

# The README's command; everything else is as main() has it.
SETTINGS = {"model_name_or_path": str(ROOT / "tiny_reranker"), "mixed_precision": "no", "lr": 3e-4, "epochs": 10}
LEARNING_RATES, EPOCHS, SEEDS = (1e-4, 3e-4, 1e-3), (5, 10, 20), (42, 43, 44, 45, 46)


def read(name):
    """The rows of a data file of the repository."""
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


def fine_tune(train_rows, eval_rows, **settings):
    """Fine-tune on rows, silently: (NDCG@10 before, NDCG@10 after, NDCG@10 after of each eval query)."""
    silence = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(silence), \
            contextlib.redirect_stderr(silence):
        for name, rows in (("train", train_rows), ("eval", eval_rows)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
        run = train({**SETTINGS, **settings, "log_with": None, "train_dataset": f"{folder}/train.jsonl",
                     "eval_dataset": f"{folder}/eval.jsonl", "output_dir": f"{folder}/out"})
        of_queries = ndcg_of_queries(f"{folder}/out/final_model", eval_rows)
        return run["before"]["NDCG@10"], run["after"]["NDCG@10"], of_queries


def ndcg_of_queries(model_folder, rows):
    """NDCG@10 of each query, in the order of the rows."""
    pairs = [(row["query"], row["content"]) for row in rows]
    scores = BertRerankerModel.from_pretrained(model_folder).predict(pairs)
    groups = {}
    for row, score in zip(rows, scores, strict=True):
        groups.setdefault(row["query"], []).append((row["label"], score))
    return np.array([
        ranking_metrics([query] * len(group), *map(np.array, zip(*group, strict=True)))["NDCG@10"]
        for query, group in groups.items()
    ])


def candidate_lists(rows):
    """Eight candidates for each training query, of the kinds that the eval file has: {query: rows}.

    The two rows of a training query are nearly always in order before training already, and so say little. Here the
    relevant passage stands among three of the same model, the most similar one of each other model of the family (by
    pairs of neighbouring characters: mostly the same topic) and one of another family, all from the training file.
    """
    draw = random.Random(0)
    relevant = {row["query"]: row["content"] for row in rows if row["label"] == 1}
    passages = sorted(set(relevant.values()))
    models = {passage: re.search(r"[SKR]\d\d", passage)[0] for passage in passages}
    pairs = {passage: set(map("".join, zip(passage, passage[1:], strict=False))) for passage in passages}
    lists = {}
    for query, passage in relevant.items():
        model, of_model = models[passage], {}
        for other in passages:
            of_model.setdefault(models[other], []).append(other)
        same = [other for other in of_model[model] if other != passage]
        nearest = [max(of_model[each], key=lambda other: len(pairs[other] & pairs[passage]) / len(pairs[other]))
                   for each in sorted(of_model) if each[0] == model[0] and each != model]
        off = draw.choice([other for other in passages if models[other][0] != model[0]])
        candidates = [passage, *draw.sample(same, 3), *nearest, off]
        lists[query] = [{"query": query, "content": each, "label": int(each == passage)} for each in candidates]
    return lists


def cross_validate(folds=5):
    """Mean NDCG@10 of held-out training queries for each learning rate and number of epochs."""
    rows = read("default_train_data.jsonl")
    lists = candidate_lists(rows)
    order = random.Random(0).sample(sorted(lists), len(lists))
    for lr, epochs in itertools.product(LEARNING_RATES, EPOCHS):
        results = [
            fine_tune([row for row in rows if row["query"] not in order[fold::folds]],
                      [row for query in order[fold::folds] for row in lists[query]], lr=lr, epochs=epochs)[:2]
            for fold in range(folds)
        ]
        before, after = np.mean(results, axis=0)
        print(f"lr {lr:.0e}, {epochs:2d} epochs: held-out NDCG@10 {before:.4f} -> {after:.4f}", flush=True)


def report():
    """The rise on the eval file over five seeds, and the two controls."""
    train_rows, eval_rows = read("default_train_data.jsonl"), read("default_eval_data.jsonl")
    before_of_queries = ndcg_of_queries(SETTINGS["model_name_or_path"], eval_rows)
    results = {"as it is": [], "labels shuffled": [], "query blanked": []}
    for seed in SEEDS:
        labels = [row["label"] for row in train_rows]
        random.Random(seed).shuffle(labels)
        shuffled = [{**row, "label": label} for row, label in zip(train_rows, labels, strict=True)]
        before, after, after_of_queries = fine_tune(train_rows, eval_rows, seed=seed)
        results["as it is"].append((before, after))
        differences = after_of_queries - before_of_queries
        draws = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(axis=1)
        low, high = np.percentile(draws, [2.5, 97.5])
        print(f"seed {seed}: NDCG@10 {before:.4f} -> {after:.4f}, rise {after - before:+.4f}, "
              f"95 % interval over {len(differences)} queries [{low:+.4f}, {high:+.4f}]", flush=True)
        before, after, _ = fine_tune(shuffled, eval_rows, seed=seed)
        results["labels shuffled"].append((before, after))
        before, after, _ = fine_tune(blank(train_rows), blank(eval_rows), seed=seed)
        results["query blanked"].append((before, after))
    for name, values in results.items():
        before, after = np.mean(values, axis=0)
        rises = [late - early for early, late in values]
        print(f"{name}: {before:.4f} -> {after:.4f} on average, rise {np.mean(rises):+.4f}, from {min(rises):+.4f} to "
              f"{max(rises):+.4f}")


def blank(rows):
    """The rows with two characters that no passage holds in place of each query: they keep the lists apart, no more."""
    used = set("".join(row["content"] for row in rows))
    free = [character for character in map(chr, range(0x4E00, 0x9FA5)) if character not in used][:40]
    names = {query: "".join(pair) for query, pair in
             zip(dict.fromkeys(row["query"] for row in rows), itertools.product(free, free), strict=False)}
    return [{**row, "query": names[row["query"]]} for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cross_validate", "report"))
    {"cross_validate": cross_validate, "report": report}[parser.parse_args().what]()
