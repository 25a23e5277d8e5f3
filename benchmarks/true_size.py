"""Two optimizer steps at the true size: bge-reranker-large's shape with random weights, max_len 512, fp32.

    python benchmarks/true_size.py

24 layers, 1,024 wide, a vocabulary of 250,002: 560 million parameters, so some 5 GB of temporary files and 12 GB of
memory. The tokenizer is tiny_reranker's. Prints seconds and peak memory from the run's own run.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

ROOT = Path(__file__).resolve().parent.parent


def main():
    """Save the random model, train on 32 pairs of 512 tokens, report."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = XLMRobertaConfig(
            vocab_size=250_002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=1,
        )  # fmt: skip
        XLMRobertaForSequenceClassification(config).save_pretrained(f"{folder}/model")
        AutoTokenizer.from_pretrained(ROOT / "tiny_reranker").save_pretrained(f"{folder}/model")
        rows = [json.loads(line) for line in (ROOT / "default_train_data.jsonl").read_text("utf-8").splitlines()]
        texts = ["".join(row["content"] for row in rows[start : start + 9]) for start in range(32)]
        with open(f"{folder}/rows.jsonl", "w", encoding="utf-8") as file:
            for row, text in zip(rows[:32], texts, strict=True):
                file.write(json.dumps({**row, "content": text}) + "\n")
        subprocess.run(
            [sys.executable, str(ROOT / "train_bert_rerank.py"), "--model_name_or_path", f"{folder}/model",
             "--train_dataset", f"{folder}/rows.jsonl", "--eval_dataset", "None", "--output_dir", f"{folder}/out",
             "--epochs", "1", "--mixed_precision", "no"], check=True,
        )  # fmt: skip
        run = json.loads(Path(folder, "out", "run.json").read_text("utf-8"))
        training, preparation = run["seconds"]["training"], run["seconds"]["preparation"]
        print(f"2 steps of 16 pairs of 512 tokens: {training:.0f} s after {preparation:.0f} s of preparation, "
              f"peak memory {run['peak_memory_bytes'] / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
