"""What checkpoints cost: their share of a training run, and size, seconds and memory of a single one.

    python benchmarks/checkpoint_cost.py                     # the default run, on tiny_reranker
    python benchmarks/checkpoint_cost.py --large             # at bge-reranker-large's size, random weights: 2 epochs
    python benchmarks/checkpoint_cost.py --large --rows 2000 --mixed_precision bf16    # on a GPU, 500 steps an epoch

Each save and each load of a real run is timed where the script calls it; memory is the process's peak, in host memory,
before and after the first save. `--large` needs 30 GB of disk and 20 GB of memory."""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import true_size  # noqa: E402

import train_bert_rerank  # noqa: E402


def timed(name, calls):
    """Replace a function of the script by one that notes (seconds, peak memory before and after in MB) of each call."""
    function = getattr(train_bert_rerank, name)

    def measured(*arguments, **options):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        result = function(*arguments, **options)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        calls.append((time.perf_counter() - started, before / 1024, after / 1024))
        return result

    setattr(train_bert_rerank, name, measured)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--mixed_precision", default="no")
    asked = parser.parse_args()
    saves, loads, sizes = [], [], []
    save, step = train_bert_rerank.save_checkpoint, train_bert_rerank.train_step

    def save_and_look(run):
        save(run)
        sizes.append({path.parent.name: path.stat().st_size for path in run.folder.rglob("*.pt")})

    def step_or_die(*arguments):
        if len(saves) == 1 and not loads:
            raise KeyboardInterrupt  # after the first epoch; a second run goes on
        return step(*arguments)

    train_bert_rerank.save_checkpoint, train_bert_rerank.train_step = save_and_look, step_or_die
    for name, calls in (("save_checkpoint", saves), ("load_checkpoint", loads)):
        timed(name, calls)
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        settings = {"model_name_or_path": str(ROOT / "tiny_reranker"), "lr": 3e-4, "epochs": 10, "log_with": None,
                    "train_dataset": str(ROOT / "default_train_data.jsonl"), "output_dir": f"{folder}/out",
                    "mixed_precision": asked.mixed_precision}  # fmt: skip
        if asked.large:
            true_size.make(folder)
            long = [json.loads(line) for line in Path(folder, "rows.jsonl").read_text("utf-8").splitlines()]
            rows = [{**long[index % 4], "query": f"{index // 2}", "label": index % 2}
                    for index in range(asked.rows + 4)]  # fmt: skip
            for name, part in (("train", rows[4:]), ("eval", rows[:4])):
                Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
            settings |= {"model_name_or_path": f"{folder}/model", "train_dataset": f"{folder}/train.jsonl", "epochs": 2,
                         "gradient_accumulation_steps": 2, "lr": 1e-5, "base_interpolation": ()}  # fmt: skip
        started = time.perf_counter()
        try:
            train_bert_rerank.train(settings)
        except KeyboardInterrupt:
            first = time.perf_counter() - started
        run = train_bert_rerank.train({**settings, "resume_from_checkpoint": "latest"})
    seconds, later = [each[0] for each in saves], run["seconds"]["training"]
    print(f"\n{len(saves)} saves, {sum(seconds[1:]):.2f} of {later:.1f} s from the second epoch on: "
          f"{sum(seconds[1:]) / later:.1%}. The first run took {first:.1f} s.")  # fmt: skip
    print(f"Each took {min(seconds):.2f} to {max(seconds):.2f} s; files in MB when the last was written: "
          + ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in sorted(sizes[-1].items())))  # fmt: skip
    print(f"Peak host memory before and after the first save: {saves[0][1]:,.0f} and {saves[0][2]:,.0f} MB.")
    print(f"Loading it to go on took {loads[0][0]:.2f} s.")


if __name__ == "__main__":
    main()
