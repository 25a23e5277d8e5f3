"""tools/score_with_teacher.py: a teacher's probabilities as labels, against CrossEncoder's, and through a kill."""

import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY
from sentence_transformers import CrossEncoder

sys.path.insert(0, str(ROOT / "tools"))
import score_with_teacher  # noqa: E402

from train_bert_rerank import BertRerankerModel, train  # noqa: E402

LABELLED = [
    {"query": "S35充不进电", "content": "请擦净S35底部的充电触点。", "label": "relevant"},
    {"query": "退款要几天", "pos": ["退款要七天", "第二条"], "neg": ["R42支持访客网络。"], "pos_scores": [9.5]},
    {"query": "R42", "hits": [{"content": "R42支持访客网络。", "label": 4}, {"content": "S35" * 30}]},
]
UNLABELLED = [{"query": "问", "content": "书" * count} for count in (90, 1, 40, 3)]
PAIRS = [
    ("S35充不进电", "请擦净S35底部的充电触点。"), ("退款要几天", "退款要七天"), ("退款要几天", "第二条"),
    ("退款要几天", "R42支持访客网络。"), ("R42", "R42支持访客网络。"), ("R42", "S35" * 30),
    *(("问", "书" * count) for count in (90, 1, 40, 3)),
]  # fmt: skip


@pytest.fixture
def score(monkeypatch):
    """score(argument, …): the tool with tiny_reranker as the teacher, in this process."""

    def score(*arguments, teacher=TINY):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments), "--teacher", str(teacher)])
        score_with_teacher.main()

    return score


def read(path):
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


@pytest.mark.parametrize("name", ["scored.jsonl", "scored.jsonl.gz"])
def test_labels_are_the_teachers_probabilities_in_the_order_of_the_pairs_of_all_inputs(
    score, write_jsonl, tmp_path, capsys, name
):
    first, second = write_jsonl("first.jsonl", LABELLED), tmp_path / "second.jsonl.gz"
    second.write_bytes(gzip.compress("\n".join(map(json.dumps, UNLABELLED)).encode()))
    score(first, second, "--output", tmp_path / name)
    rows = read(tmp_path / name)
    assert [(row["query"], row["content"]) for row in rows] == PAIRS and {*rows[0]} == {"query", "content", "label"}
    expected = CrossEncoder(TINY, device="cpu").predict(PAIRS)
    assert [row["label"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    assert (tmp_path / name).read_bytes()[4:8] == bytes(4) or name == "scored.jsonl", "no time in a gzip file"
    assert f"python train_bert_rerank.py --train_dataset {tmp_path / name}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["first.jsonl", "second.jsonl.gz", name])


def test_max_len_cuts_what_the_teacher_sees(score, write_jsonl, tmp_path, monkeypatch):
    path = write_jsonl("pairs.jsonl", UNLABELLED)
    score(path, "--output", tmp_path / "cut.jsonl", "--max_len", 16)
    model = BertRerankerModel.from_pretrained(TINY)
    model.tokenizer.model_max_length = 16
    expected = model.predict([(row["query"], row["content"]) for row in UNLABELLED])
    assert [row["label"] for row in read(tmp_path / "cut.jsonl")] == pytest.approx(expected.tolist(), abs=1e-6)
    with pytest.raises(SystemExit, match="max_len 513: .* takes 512"):
        score(path, "--output", tmp_path / "long.jsonl", "--max_len", 513)


IN_SMALL_BLOCKS = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import score_with_teacher
score_with_teacher.BLOCK = 4
score_with_teacher.main()
"""


def test_killed_and_started_again_it_writes_the_same_bytes_and_scores_nothing_twice(
    score, write_jsonl, tmp_path, monkeypatch
):
    rows = [{"query": f"第{number}问", "content": "书" * (number * 37 % 400 + 1)} for number in range(200)]
    path, output = write_jsonl("pairs.jsonl", rows), tmp_path / "killed.jsonl"
    sidecar = tmp_path / "killed.jsonl.unfinished"
    command = [sys.executable, "-c", IN_SMALL_BLOCKS, path, "--teacher", TINY, "--output", str(output)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while not sidecar.exists() or sidecar.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = 4 * (sidecar.read_bytes().count(b"\n") - 1)
    assert 12 <= done < 200 and not output.exists()
    sidecar.write_bytes(sidecar.read_bytes() + b"[0.1, 0.")  # as a write that was cut off leaves it
    monkeypatch.setattr(score_with_teacher, "BLOCK", 4)
    scored, predict = [], BertRerankerModel.predict
    monkeypatch.setattr(BertRerankerModel, "predict", lambda self, pairs, *rest: (
        scored.extend(pairs), predict(self, pairs, *rest))[1])  # fmt: skip
    score(path, "--output", output)
    assert scored == [(row["query"], row["content"]) for row in rows[done:]]
    score(path, "--output", tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not sidecar.exists()


@pytest.mark.parametrize("change", ["teacher", "data", "max_len"])
def test_what_another_call_left_is_an_error_and_stays(score, write_jsonl, tmp_path, monkeypatch, change):
    path, output = write_jsonl("pairs.jsonl", UNLABELLED), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^Stopped; the same command goes on"):
        patch.setattr(score_with_teacher, "BLOCK", 2)
        patch.setattr(score_with_teacher, "whole_file", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        score(path, "--output", output)
    left = (tmp_path / "out.jsonl.unfinished").read_bytes()
    teacher = TINY
    if change == "data":
        write_jsonl("pairs.jsonl", UNLABELLED[:3])
    if change == "teacher":
        teacher = tmp_path / "teacher"
        shutil.copytree(TINY, teacher)
        other = BertRerankerModel.from_pretrained(TINY)
        with torch.no_grad():
            next(other.parameters())[0, 0] += 1
        other.save_pretrained(teacher)
    more = ["--max_len", 64] if change == "max_len" else []
    with pytest.raises(SystemExit, match="unfinished is of a call with other data, teacher or settings: remove it"):
        score(path, "--output", output, *more, teacher=teacher)
    assert (tmp_path / "out.jsonl.unfinished").read_bytes() == left and not output.exists()


@pytest.fixture
def stopped(score, write_jsonl, tmp_path, monkeypatch):
    """A call that is stopped after all is scored: (path of its pairs, of its output, of its sidecar)."""

    def stop(*_):
        raise OSError("no space left")

    path, output = write_jsonl("pairs.jsonl", UNLABELLED), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="no space left"):
        patch.setattr(score_with_teacher, "write", stop)
        score(path, "--output", output)
    return path, output, tmp_path / "out.jsonl.unfinished"


def test_a_sidecar_in_which_nothing_is_done_yet_is_started_afresh(score, stopped):
    """It is empty, or its key is cut off."""
    path, output, sidecar = stopped
    content = sidecar.read_bytes()
    score(path, "--output", output)
    whole = output.read_bytes()
    for left in (0, 20, 64):
        output.unlink()
        sidecar.write_bytes(content[:left])
        score(path, "--output", output)
        assert output.read_bytes() == whole and not sidecar.exists()


DAMAGED = {
    "no JSON": b"x",
    "a number": b"5",
    "an object": b"{}",
    "zeros": bytes(30),
    "texts": b'["a"]',
    "lists": b"[[0.5]]",
    "more scores than pairs": b"[0.5]",
    "too deep": b"[" * 5000,
}


def test_a_damaged_sidecar_is_an_error_that_says_what_to_do_and_it_works(score, stopped):
    path, output, sidecar = stopped
    content = sidecar.read_bytes()
    for name, line in DAMAGED.items():
        left = content + line + b"\n"
        sidecar.write_bytes(left)
        with pytest.raises(SystemExit, match="unfinished is damaged: remove it, and the pairs are scored again"):
            score(path, "--output", output)
        assert sidecar.read_bytes() == left and not output.exists(), name
    sidecar.unlink()
    score(path, "--output", output)
    assert len(read(output)) == len(UNLABELLED)


@pytest.mark.parametrize("output, problem", [
    (".", "is a folder"), ("", "is a folder"), ("folder", "is a folder"), ("pipe", "is a device or a pipe"),
    ("file/out.jsonl", "file is no folder")])  # fmt: skip
def test_an_output_that_is_no_file_is_refused(score, tmp_path, monkeypatch, output, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo("pipe")
    with pytest.raises(SystemExit, match=f"^Error: --output .*{problem}"):
        score("file", "--output", output)


def test_a_batch_of_no_pairs_is_refused_and_the_next_command_is_quoted(score, write_jsonl, tmp_path, capsys):
    path = write_jsonl("pairs.jsonl", UNLABELLED)
    with pytest.raises(SystemExit, match="^Error: batch_size 0: it should be 1 or more"):
        score(path, "--output", tmp_path / "out.jsonl", "--batch_size", 0)
    score(path, "--output", tmp_path / "the pairs.jsonl")
    words = shlex.split(capsys.readouterr().out.rpartition("Next: ")[2])
    assert words[-1] == str(tmp_path / "the pairs.jsonl")


def test_mistakes_end_in_one_message(score, write_jsonl, tmp_path):
    (tmp_path / "there.jsonl").write_text("")
    good = write_jsonl("good.jsonl", UNLABELLED)
    with pytest.raises(SystemExit, match="there.jsonl exists already: remove it"):
        score(good, "--output", tmp_path / "there.jsonl")
    bad = tmp_path / "bad.jsonl"
    lines = [b'{"query": "q", "content": "c"}', b"{", b'{"query": "q", "content": " "}', b"[1]", b'{"hits": 3}']
    bad.write_bytes(b"\n".join(lines + [b"x"] * 20))
    with pytest.raises(SystemExit) as error:
        score(bad, "--output", tmp_path / "out.jsonl")
    said = str(error.value).splitlines()
    assert said[0] == f"Error: {bad}: 24 bad lines" and [line.split(":")[0] for line in said[1:11]] == [
        f"  line {number}" for number in range(2, 12)]  # fmt: skip
    assert said[2] == "  line 3: content is blank" and said[11] == "  … and 14 more"
    with pytest.raises(SystemExit, match="no pairs"):
        (tmp_path / "empty.jsonl").write_text("\n")
        score(tmp_path / "empty.jsonl", "--output", tmp_path / "out.jsonl")
    with pytest.raises(SystemExit, match="cannot be read: No such file"):
        score(tmp_path / "missing.jsonl", "--output", tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_training_on_the_output_works_as_it_is(score, write_jsonl, tmp_path):
    rows = [json.loads(line) for line in (ROOT / "default_eval_data.jsonl").read_text("utf-8").splitlines()[:80]]
    pairs = write_jsonl("pairs.jsonl", [{"query": row["query"], "content": row["content"]} for row in rows])
    score(pairs, "--output", tmp_path / "scored.jsonl")
    scored = str(tmp_path / "scored.jsonl")
    run = train({"model_name_or_path": TINY, "train_dataset": scored, "eval_proportion": 0.3, "epochs": 1,
                 "mixed_precision": "no", "log_with": None, "output_dir": str(tmp_path / "out")})  # fmt: skip
    assert (tmp_path / "out" / "final_model" / "model.safetensors").exists() and run["report"]["queries"] == 3
