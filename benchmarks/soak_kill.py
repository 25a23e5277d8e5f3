"""Kill a run with SIGKILL at random moments, start it again each time, and compare what it ends with with a whole run.

    python benchmarks/soak_kill.py                  # 200 kills
    python benchmarks/soak_kill.py --kills 5 --seed 1

The run is the script's main() on tiny_reranker, in a process that is forked when the imports are done, with a
checkpoint after each step. After each kill the newest checkpoint is opened; a run that ends is compared bit by bit:
weights, pictures, report, predictions, logged scalars."""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_bert_rerank  # noqa: E402

SETTINGS = {"model_name_or_path": ROOT / "tiny_reranker", "train_dataset": ROOT / "default_train_data.jsonl",
            "lr": 3e-4, "epochs": 1, "eval_steps": 5, "save_steps": 1, "mixed_precision": "no"}  # fmt: skip
COMPARED = ("final_model/*", "fine_tuned_model/*", "*.png", "*.jsonl", "eval_report.json")


def command_line(name, settings):
    """The arguments of a run into the folder `name`."""
    settings = {**SETTINGS, "output_dir": name, "eval_dataset": "eval.jsonl", **settings}
    return [str(text) for key, value in settings.items() for text in (f"--{key}", value)]


def run(folder, name):
    """In a process of its own: go on with the run `name`, with what it prints in name.txt."""
    os.chdir(folder)
    log = os.open(f"{name}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["train_bert_rerank.py", *command_line(name, {"resume_from_checkpoint": "latest"})]
    train_bert_rerank.main()


def printed(folder, name):
    """What the newest start of a run has printed, cut off anywhere."""
    log = folder / f"{name}.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return text[max(0, text.rfind("Training Args")) :]


def bits(output_dir):
    """{name: SHA-256 or values} of all that two runs have to have in common: of the logged scalars those that are
    computed, not those of "time/", which tell how fast a run was."""
    files = [path for pattern in COMPARED for path in output_dir.glob(pattern)]
    found = {str(path.relative_to(output_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    log = EventAccumulator(str(output_dir / "logs" / "train_bert_rerank"), size_guidance={"scalars": 0}).Reload()
    for tag in log.Tags()["scalars"]:
        if not tag.startswith("time/"):
            found[tag] = [(event.step, event.value) for event in log.Scalars(tag)]
    return found


def moment(folder, output_dir):
    """What a kill interrupted, told by what it left."""
    run_dir, now = output_dir / "unfinished_run", printed(folder, output_dir.name)
    if any(path.suffix not in (".pt", "") and "logs" not in path.parts for path in run_dir.glob("*/*")):
        return "a checkpoint half written"
    if (run_dir / "run.json").exists() or (output_dir / "run.json").exists():
        return "results complete, being moved"
    if "Saving model" in now:
        return "results half written"
    return "training or evaluating" if "Start training" in now else "starting"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, moments, ends, unusable, started = random.Random(given.seed), Counter(), 0, 0, time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = (ROOT / "default_eval_data.jsonl").read_text(encoding="utf-8").splitlines()[: 20 * 8]
        (folder / "eval.jsonl").write_text("\n".join(rows), encoding="utf-8")
        def start(name):
            process = multiprocessing.get_context("fork").Process(target=run, args=(folder, name))
            process.start()
            return process

        before = time.perf_counter()
        start("whole").join()
        whole, usual, resumed, is_last = bits(folder / "whole"), time.perf_counter() - before, 0, False
        while not is_last:
            output_dir, is_last = folder / f"run{ends}", sum(moments.values()) == given.kills  # the last is left to end
            name = output_dir.name
            process, is_anywhere = start(name), draw.random() < 0.2  # else once training goes on
            while not is_anywhere and process.is_alive() and "Start training" not in printed(folder, name):
                time.sleep(0.01)
            process.join(None if is_last else draw.uniform(0, usual / 3))
            is_killed = process.is_alive()
            process.kill()
            process.join()
            resumed += "Going on after step" in printed(folder, name)
            if is_killed:
                moments[moment(folder, output_dir)] += 1
                for checkpoint in sorted((output_dir / "unfinished_run").glob("checkpoint-*/state.pt"))[-1:]:
                    try:
                        torch.load(checkpoint, weights_only=True)
                    except Exception as error:
                        unusable += 1
                        print(f"unusable: {checkpoint}: {error}")
            elif process.exitcode or bits(output_dir) != whole:
                sys.exit(f"{name} ended with status {process.exitcode}, or with other bits:\n"
                         f"{printed(folder, name)[-3000:]}")  # fmt: skip
            else:
                ends += 1
                print(f"{sum(moments.values())} kills, {ends} runs ended with the bits of the whole run", flush=True)
    print("\n| what the kill interrupted | kills |\n| --- | --- |")
    for what, count in moments.most_common():
        print(f"| {what} | {count} |")
    print(json.dumps({"kills": sum(moments.values()), "unusable states": unusable, "starts from a checkpoint": resumed,
                      "runs that ended, all with the same bits": ends, "minutes": round((time.time() - started) / 60)}))
    sys.exit(unusable > 0)


if __name__ == "__main__":
    main()
