"""What the tests share: the repository's files, and running the script as a user does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tiny_reranker")
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's & has it ignored, and children inherit that
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run two at a time
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two processes on two cores would spin against each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(name, rows) -> path of a new JSONL file in the test's folder."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def run_script(tmp_path):
    """run_script("--epochs", 1, …) -> CompletedProcess of `python train_bert_rerank.py …`, in the test's folder."""

    def run(*arguments, processes=1, timeout=300, **environment):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        return subprocess.run(
            [sys.executable, *launcher, str(ROOT / "train_bert_rerank.py"), *map(str, arguments)],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        )  # fmt: skip

    return run


def rows_of(count, queries=None):
    """`count` rows over `queries` queries (default: one each) with documents of quite different lengths."""
    queries = queries or count
    return [
        {"query": f"第{index % queries}问怎么办", "content": "请看说明书。" * (1 + 7 * index % 11), "label": index % 2}
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def reranker():
    """tiny_reranker, loaded once: for tests that do not change it."""
    from train_bert_rerank import BertRerankerModel

    return BertRerankerModel.from_pretrained(TINY).eval()
