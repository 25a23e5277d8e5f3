"""What the default run of the README is worth, and how its learning rate and epochs were chosen.

    python benchmarks/default_run.py cross_validate   # grid over the training queries alone, minutes per cell
    python benchmarks/default_run.py report           # five seeds on the eval file, with two controls
    python benchmarks/default_run.py batches          # five seeds with windows and with plain random batches

`cross_validate` never opens the eval file: five folds of the training queries, fp32, weights of the last epoch.
`report` shows the verdict over five seeds, and the same with the training labels shuffled within the file and with
every query blanked in training and evaluation; all changes are the cross-fitted ones of eval_report.json.
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
import train_bert_rerank as product  # noqa: E402
from train_bert_rerank import train  # noqa: E402

# The README's command; everything else is as main() has it.
SETTINGS = {"model_name_or_path": str(ROOT / "tiny_reranker"), "mixed_precision": "no", "lr": 3e-4, "epochs": 10,
            "log_with": None}  # fmt: skip
LEARNING_RATES, EPOCHS, SEEDS = (1e-4, 3e-4, 1e-3), (5, 10, 20), (42, 43, 44, 45, 46)


def read(path):
    """The rows of a JSONL file; a name alone is a file of the repository."""
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    """Write rows as JSONL; returns the path."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")
    return str(path)


def shuffle_labels(rows, seed):
    """The rows with their labels shuffled."""
    labels = [row["label"] for row in rows]
    random.Random(seed).shuffle(labels)
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def fine_tune(train_rows, eval_rows, **settings):
    """Fine-tune silently with the README's settings and these; returns eval_report.json."""
    silence = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(silence), \
            contextlib.redirect_stderr(silence):
        return train({**SETTINGS, **settings, "train_dataset": write_rows(f"{folder}/train.jsonl", train_rows),
                      "eval_dataset": eval_rows and write_rows(f"{folder}/eval.jsonl", eval_rows),
                      "output_dir": f"{folder}/out"})["report"]


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
        reports = [
            fine_tune([row for row in rows if row["query"] not in order[fold::folds]],
                      [row for query in order[fold::folds] for row in lists[query]], lr=lr, epochs=epochs,
                      load_best_model_at_end=False)
            for fold in range(folds)
        ]
        before, after = (np.mean([report[part]["ndcg@10"] for report in reports]) for part in ("before", "after"))
        print(f"lr {lr:.0e}, {epochs:2d} epochs: held-out NDCG@10 {before:.4f} -> {after:.4f}", flush=True)


def report():
    """The verdict on the eval file over five seeds, and the two controls."""
    train_rows, eval_rows = read("default_train_data.jsonl"), read("default_eval_data.jsonl")
    for name, change, rows in (("as it is", lambda rows, seed: rows, eval_rows),
                               ("labels shuffled", shuffle_labels, eval_rows),
                               ("query blanked", lambda rows, seed: blank(rows), blank(eval_rows))):
        changes = []
        for seed in SEEDS:
            found = fine_tune(change(train_rows, seed), rows, seed=seed)
            before, delta = found["before"]["ndcg@10"], found["delta"]
            changes.append(delta["mean"])
            print(f"{name}, seed {seed}: NDCG@10 {before:.4f}, change {delta['mean']:+.4f}, 95 % interval "
                  f"[{delta['ci95'][0]:+.4f}, {delta['ci95'][1]:+.4f}] over {found['queries']} queries: "
                  f"{found['verdict']}", flush=True)
        print(f"{name}: {before:.4f} -> {before + np.mean(changes):.4f} on average, change {np.mean(changes):+.4f}, "
              f"from {min(changes):+.4f} to {max(changes):+.4f}", flush=True)


def batches():
    """NDCG@10 of the last epoch with windows, and with batches of `batch_size` consecutive rows of the permutation."""
    train_rows, eval_rows = read("default_train_data.jsonl"), read("default_eval_data.jsonl")
    plan_window = product.plan_window

    def random_batches(lengths, max_tokens, batch_cost, *processes):
        """What a plain loop does with batches of 2; evaluation, which names no processes, plans as ever."""
        pairs = [np.split(np.arange(len(lengths)), range(2, len(lengths), 2))]
        return pairs if processes else plan_window(lengths, max_tokens, batch_cost)

    for name, plan in (("windows", plan_window), ("random batches of 2", random_batches)):
        product.plan_window, found = plan, []
        for seed in SEEDS:
            report = fine_tune(train_rows, eval_rows, seed=seed, load_best_model_at_end=False)
            found.append(report["after"]["ndcg@10"])
        seeds = " ".join(f"{each:.3f}" for each in found)
        print(f"| {name} | {seeds} | {np.mean(found):.4f} | {np.std(found, ddof=1):.4f} |", flush=True)


def blank(rows):
    """The rows with two characters that no passage holds in place of each query: they keep the lists apart, no more."""
    used = set("".join(row["content"] for row in rows))
    free = [character for character in map(chr, range(0x4E00, 0x9FA5)) if character not in used][:40]
    names = {query: "".join(pair) for query, pair in
             zip(dict.fromkeys(row["query"] for row in rows), itertools.product(free, free), strict=False)}
    return [{**row, "query": names[row["query"]]} for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cross_validate", "report", "batches"))
    {"cross_validate": cross_validate, "report": report, "batches": batches}[parser.parse_args().what]()
