"""Export a reranker to ONNX, quantise it to int8, and compare size, speed, scores and ranking with PyTorch's.

    python -m venv onnx_env
    onnx_env/bin/pip install torch==2.13.0
    onnx_env/bin/pip install "optimum-onnx[onnxruntime]==0.1.0" accelerate
    onnx_env/bin/python benchmarks/serving_onnx.py --model FOLDER --rows eval.jsonl --output onnx_model

optimum-onnx wants transformers 4, hence an environment of its own. The export is optimum's, int8 is onnxruntime's
dynamic quantisation (weights in 8 bits, activations quantised as they come). All three score the same pairs in the same
micro-batches, by turns, on one thread; the rows are ranked by each. It is an error if ONNX in fp32 gives a logit that
differs by more than 1e-4. The two ONNX files and the tokenizer are left in --output.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.exporters.onnx import main_export

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import BertRerankerModel, candidate_lists, measure, plan_window, read_rows  # noqa: E402


def session(path):
    """A function from a batch, a dict of tensors [B, T], to logits [B], computed by onnxruntime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    run = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: run.run(None, {each.name: batch[each.name].numpy() for each in run.get_inputs()})[0][:, 0]


def main():
    """Export, quantise, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the reranker, such as output_dir/final_model")
    parser.add_argument("--rows", required=True, help="JSONL rows to rank, held out of training")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--queries", type=int, default=10**9, help="take so many queries (default all)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, model = Path(options.output), BertRerankerModel.from_pretrained(options.model).eval()
    main_export(options.model, folder, task="text-classification", do_validation=False)
    quantize_dynamic(folder / "model.onnx", folder / "model_int8.onnx", weight_type=QuantType.QInt8)
    rows = list(read_rows(options.rows, 0, 1))
    chosen = {*list(dict.fromkeys(row[0] for row in rows))[: options.queries]}
    rows = [row for row in rows if row[0] in chosen]
    labels = np.array([row[2] for row in rows], dtype=float)
    lists = candidate_lists([row[0] for row in rows], labels)
    encoded = list(model.encode([row[:2] for row in rows], model.max_len))
    [micro_batches] = plan_window(np.array([len(ids) for ids, *_ in encoded]), 32 * model.max_len, 16)
    files = {"PyTorch, fp32": Path(options.model, "model.safetensors"), "ONNX, fp32": folder / "model.onnx",
             "ONNX, int8": folder / "model_int8.onnx"}  # fmt: skip
    scorers = {"PyTorch, fp32": lambda batch: model(batch)["logits"][:, 0].numpy(),
               **{name: session(path) for name, path in [*files.items()][1:]}}  # fmt: skip
    logits, seconds = {name: np.zeros(len(rows)) for name in scorers}, {name: [] for name in scorers}
    with torch.inference_mode():
        for _ in range(options.rounds):
            for name, scorer in scorers.items():
                start = time.perf_counter()
                for indices in micro_batches:
                    logits[name][indices] = scorer(model.collate([encoded[index] for index in indices]))
                seconds[name].append(time.perf_counter() - start)
    first, *_ = scorers
    ratios = {name: np.array(seconds[first]) / np.array(times) for name, times in seconds.items()}
    print(f"\n{len(rows)} pairs of {len(chosen)} queries, median (range) of {options.rounds} rounds, one thread\n")
    print("| | size, MB | pairs/s | times PyTorch's | largest difference of a logit, of a probability | NDCG@10 |")
    print("| --- " * 6 + "|")
    for name, path in files.items():
        ndcg = measure(lists, labels, logits[name])[0]["ndcg@10"]
        differences = [np.abs(function(logits[name]) - function(logits[first])).max()
                       for function in (np.array, lambda each: 1 / (1 + np.exp(-each)))]  # fmt: skip
        speed = f"{np.median(ratios[name]):.2f} ({ratios[name].min():.2f}–{ratios[name].max():.2f})"
        print(f"| {name} | {path.stat().st_size / 1e6:.1f} | {len(rows) / np.median(seconds[name]):.0f} | {speed} | "
              f"{differences[0]:.1g}, {differences[1]:.1g} | {ndcg:.4f} |")
    worst = np.abs(logits["ONNX, fp32"] - logits[first]).max()
    if not worst <= 1e-4:
        sys.exit(f"Error: a logit of ONNX in fp32 differs by {worst:.2g}")


if __name__ == "__main__":
    main()
