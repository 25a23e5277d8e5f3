"""What the tests share: the repository's files, a small model, and running the script as a user does."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tiny_reranker")
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's & has it ignored, and children inherit that
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run two at a time
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two processes on two cores would spin against each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish():
    gc.freeze()  # a run collects garbage at its end, and need not look at all that was imported for that


def write_rows(path, rows):
    """Write a JSONL file: its path as text."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(name, rows) -> path of a new JSONL file in the test's folder."""
    return lambda name, rows: write_rows(tmp_path / name, rows)


def assert_equal_but_for_rounding(value, other):
    """What two JSON values hold is the same, numbers to 1e-6: on some processors a process that a launcher has started
    rounds otherwise than one that is alone."""
    assert type(value) is type(other)
    if isinstance(value, dict):
        assert value.keys() == other.keys()
        for key in value:
            assert_equal_but_for_rounding(value[key], other[key])
    elif isinstance(value, list):
        assert len(value) == len(other)
        for pair in zip(value, other, strict=True):
            assert_equal_but_for_rounding(*pair)
    elif isinstance(value, float):
        assert value == pytest.approx(other, abs=1e-6)
    else:
        assert value == other


def command_line(settings):
    """["--key", "value", …] of a dict of settings."""
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


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


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main("--epochs", 1, …) -> (exit status, what is printed) of the script's main(), in this process."""
    import train_bert_rerank

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_bert_rerank.py", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            with redirect_stderr(sys.stdout):  # in the order in which it is printed
                train_bert_rerank.main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

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


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Folder of a reranker of one layer, 16 wide, with random weights: where any model shows what is looked at."""
    import torch
    from transformers import AutoConfig, XLMRobertaForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "small"
    shutil.copytree(TINY, folder)
    config = AutoConfig.from_pretrained(TINY)
    config.update({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16})
    torch.manual_seed(0)
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small_pictures():
    """For tests that look at no picture: each is one of 2 x 2, and a small run takes a quarter less time."""
    from matplotlib.figure import Figure
    from PIL import Image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: Image.new("RGBA", (2, 2)).save(path))
        yield
