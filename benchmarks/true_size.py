"""Memory and time of two optimizer steps at bge-reranker-large's size: random weights, max_len 512, fp32.

    python benchmarks/true_size.py                            # the four combinations of the memory options
    python benchmarks/true_size.py --batch_size 1 --options both

24 layers, 1,024 wide, a vocabulary of 250,002: 560 million parameters, so some 5 GB of temporary files and up to 16 GB
of memory. The tokenizer is tiny_reranker's. Two steps, since
the optimizer's state stands beside activations from the second on, of 4 pairs of 512 tokens each, in micro-batches of
`--batch_size` pairs; each combination is a run of its own, whose run.json tells seconds and peak memory. On a GPU the
memory is the GPU's, and `--mixed_precision bf16` is what a run has by default.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"none": [], "freeze_embeddings": ["freeze_embeddings"], "gradient_checkpointing": ["gradient_checkpointing"],
           "both": ["freeze_embeddings", "gradient_checkpointing"]}  # fmt: skip


def shape(layers=24, width=1024):
    """The configuration of bge-reranker-large, or of a model like it with fewer layers or less width."""
    return XLMRobertaConfig(
        vocab_size=250_002, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=1,
    )  # fmt: skip


def make(folder):
    """Save the random model and four rows of 512 tokens and more."""
    torch.manual_seed(0)
    XLMRobertaForSequenceClassification(shape()).save_pretrained(f"{folder}/model")
    AutoTokenizer.from_pretrained(ROOT / "tiny_reranker").save_pretrained(f"{folder}/model")
    rows = [json.loads(line) for line in (ROOT / "default_train_data.jsonl").read_text("utf-8").splitlines()]
    with open(f"{folder}/rows.jsonl", "w", encoding="utf-8") as file:
        for start, row in enumerate(rows[:4]):
            text = "".join(other["content"] for other in rows[start : start + 9])
            file.write(json.dumps({**row, "content": text}) + "\n")


def main():
    """Make the model once, then run and print a line for each combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--batch_size", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--mixed_precision", default="no")
    asked = parser.parse_args()
    print("| options | peak memory, GiB | seconds of the steps |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        make(folder)
        for name in asked.options:
            settings = {
                "model_name_or_path": f"{folder}/model", "train_dataset": f"{folder}/rows.jsonl", "eval_dataset": None,
                "output_dir": f"{folder}/out", "epochs": 2, "batch_size": asked.batch_size, "log_with": None,
                "gradient_accumulation_steps": 4 // asked.batch_size, "mixed_precision": asked.mixed_precision,
                "micro_batch_tokens": None,
                **dict.fromkeys(OPTIONS[name], True),
            }  # fmt: skip
            arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
            subprocess.run([sys.executable, str(ROOT / "train_bert_rerank.py"), *arguments], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            run = json.loads(Path(folder, "out", "run.json").read_text("utf-8"))
            print(f"| {name} | {run['peak_memory_bytes'] / 2**30:.1f} | {run['seconds']['training']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
