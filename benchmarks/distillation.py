"""Distil a fine-tuned reranker into one with a layer less, on the default data.

    python benchmarks/distillation.py

The teacher is the default run of the README (three layers, seed 42). The student is the first two layers of
tiny_reranker. It learns from the 198 labelled rows; from the teacher's probabilities (tools/score_with_teacher.py) on
the same rows; and from the teacher's on 792 pairs that nobody has labelled, eight candidates for each training question
(default_run.py's candidate_lists, without their labels), four times as many steps in as many epochs, for which the
labelled rows are also trained on for four times as many epochs. The last weights are kept, so that nothing is chosen on
the evaluation questions. Differences of NDCG@10 are paired by question, averaged over the seeds; the interval is the
product's, over questions. Last: pairs a second of student and teacher, by turns, on one thread.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from default_run import ROOT, SETTINGS, candidate_lists, read, write_rows
from hard_negatives import change, ndcg

sys.path.insert(0, str(ROOT))
import train_bert_rerank as product  # noqa: E402


def fine_tune(folder, model, rows_path, seed, epochs):
    """Fine-tune silently to the last weights; returns the folder of the model."""
    output = Path(tempfile.mkdtemp(dir=folder))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        product.train({**SETTINGS, "model_name_or_path": model, "train_dataset": rows_path, "eval_dataset": None,
                       "seed": seed, "epochs": epochs, "output_dir": str(output)})  # fmt: skip
    return str(output / "final_model")


def make_student(folder):
    """Save the first two of the three layers of tiny_reranker; returns the folder."""
    model = product.BertRerankerModel.from_pretrained(SETTINGS["model_name_or_path"])
    model.model.base_model.encoder.layer = model.model.base_model.encoder.layer[:2]
    model.model.config.num_hidden_layers = 2
    model.save_pretrained(f"{folder}/student")
    return f"{folder}/student"


def scored(folder, teacher, name, rows):
    """The path of the rows' pairs with the teacher's probabilities as labels."""
    pairs = write_rows(f"{folder}/{name}.jsonl", [{key: row[key] for key in ("query", "content")} for row in rows])
    output = f"{folder}/{name}_scored.jsonl"
    subprocess.run([sys.executable, str(ROOT / "tools" / "score_with_teacher.py"), pairs, "--teacher", teacher,
                    "--output", output], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return output


def measure(model, rows):
    """NDCG@10 of each question [Q]."""
    pairs = [(row["query"], row["content"]) for row in rows]
    return ndcg(rows, product.BertRerankerModel.from_pretrained(model).predict(
        pairs, show_progress_bar=False, activation_fn=torch.nn.Identity()).astype(float))  # fmt: skip


def compare_speed(models, rows, rounds=7):
    """Print parameters and pairs a second of two models, by turns, and their ratio."""
    pairs = [(row["query"], row["content"]) for row in rows]
    models, seconds = [product.BertRerankerModel.from_pretrained(model) for model in models], [[], []]
    for _ in range(rounds):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model.predict(pairs, show_progress_bar=False)
            times.append(time.perf_counter() - start)
    millions = [sum(weight.numel() for weight in model.parameters()) / 1e6 for model in models]
    ratios = np.array(seconds[1]) / np.array(seconds[0])
    per_second = [len(pairs) / np.median(times) for times in seconds]
    print(f"\nParameters: {millions[0]:.2f} M and {millions[1]:.2f} M; pairs/s {per_second[0]:.0f} and "
          f"{per_second[1]:.0f}, ratio {np.median(ratios):.2f} ({ratios.min():.2f}–{ratios.max():.2f})")  # fmt: skip


def main():
    """Make teacher and student, train the arms, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_rows, eval_rows = read("default_train_data.jsonl"), read("default_eval_data.jsonl")
    unlabelled, values = [row for rows in candidate_lists(train_rows).values() for row in rows], {}
    with tempfile.TemporaryDirectory() as folder:
        labelled, student = write_rows(f"{folder}/labelled.jsonl", train_rows), make_student(folder)
        teacher = fine_tune(folder, SETTINGS["model_name_or_path"], labelled, 42, SETTINGS["epochs"])
        arms = {"198 labelled rows, 10 epochs": (labelled, 10),
                "the teacher on these, 10 epochs": (scored(folder, teacher, "same", train_rows), 10),
                "198 labelled rows, 40 epochs": (labelled, 40),
                f"the teacher on {len(unlabelled)} unlabelled pairs, 10 epochs": (
                    scored(folder, teacher, "more", unlabelled), 10)}  # fmt: skip
        print(f"NDCG@10: teacher {measure(teacher, eval_rows).mean():.3f}, student untrained "
              f"{measure(student, eval_rows).mean():.3f}; {len(options.seeds)} seeds\n")  # fmt: skip
        print("| the student learns from | NDCG@10, mean | lowest to highest seed | less the first line |")
        print("| --- " * 4 + "|")
        for title, (path, epochs) in arms.items():
            found = np.array([measure(fine_tune(folder, student, path, seed, epochs), eval_rows)
                              for seed in options.seeds])  # fmt: skip
            values[title], means = found.mean(axis=0), found.mean(axis=1)
            first = next(iter(values.values()))
            against = change(values[title] - first) if len(values) > 1 else ""
            print(f"| {title} | {means.mean():.3f} | {means.min():.3f} to {means.max():.3f} | {against} |", flush=True)
        compare_speed((student, teacher), eval_rows)


if __name__ == "__main__":
    main()
