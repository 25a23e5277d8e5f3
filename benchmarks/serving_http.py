"""Serve a reranker with infinity, ask it over HTTP, and compare its scores and order with this module's.

    python -m venv infinity_env
    infinity_env/bin/pip install torch==2.13.0
    infinity_env/bin/pip install "infinity-emb[torch,server]==0.0.78" "transformers<5"
    python benchmarks/serving_http.py --server infinity_env/bin/infinity_emb --model FOLDER --rows eval.jsonl

infinity wants transformers 4 and numpy 1, hence an environment of its own; this script runs in the one of
train_bert_rerank.py. The server is started on loopback as docs/serving.md starts it, and asked through its route
/rerank, one request a query. It is an error if a probability differs by more than 1e-5 or an order differs other than
among equals.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import BertRerankerModel, read_rows  # noqa: E402


def post(url, content):
    """The answer, as an object, of a route that takes and gives JSON."""
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def wait_for(url, server):
    """Return once `url` answers; an error if the server ends before, or after three minutes."""
    for _ in range(180):
        if server.poll() is not None:
            sys.exit(f"Error: the server ended with status {server.returncode}")
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(1)
    sys.exit("Error: the server does not answer")


def main():
    """Start the server, ask, compare, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="path of the command infinity_emb")
    parser.add_argument("--model", required=True, help="folder of the reranker, such as output_dir/final_model")
    parser.add_argument("--rows", required=True, help="JSONL rows whose queries and documents are asked for")
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--port", type=int, default=7997)
    options = parser.parse_args()
    documents = {}
    for query, content, *_ in read_rows(options.rows, 0, 1):
        documents.setdefault(query, []).append(content)
    asked, url = dict([*documents.items()][: options.queries]), f"http://127.0.0.1:{options.port}"
    model, differences, seconds = BertRerankerModel.from_pretrained(options.model).eval(), [], [0.0, 0.0]
    server = subprocess.Popen(
        [options.server, "v2", "--model-id", options.model, "--served-model-name", "reranker", "--engine", "torch",
         "--device", "cpu", "--dtype", "float32", "--no-bettertransformer", "--host", "127.0.0.1",
         "--port", str(options.port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"{url}/health", server)
        for query, texts in asked.items():
            start = time.perf_counter()
            answer = post(f"{url}/rerank", {"model": "reranker", "query": query, "documents": texts})["results"]
            middle = time.perf_counter()
            ranked = model.rank(query, texts)
            seconds = [seconds[0] + middle - start, seconds[1] + time.perf_counter() - middle]
            theirs, ours = ({hit[key]: hit[score] for hit in hits} for hits, key, score in (
                (answer, "index", "relevance_score"), (ranked, "corpus_id", "score")))  # fmt: skip
            differences += [abs(theirs[number] - ours[number]) for number in range(len(texts))]
            in_their_order = np.array([ours[hit["index"]] for hit in answer])
            if (np.diff(in_their_order) > 1e-6).any():
                sys.exit(f"Error: another order for {query}")
    finally:
        server.terminate()
        server.wait(60)
    print(f"{len(asked)} requests, {len(differences)} documents: the largest difference of a probability is "
          f"{max(differences):.1g}, the order is the same; {seconds[0] / len(asked) * 1000:.0f} ms a request, "
          f"{seconds[1] / len(asked) * 1000:.0f} ms in this module without HTTP")  # fmt: skip
    if max(differences) > 1e-5:
        sys.exit("Error: that is more than 1e-5")


if __name__ == "__main__":
    main()
