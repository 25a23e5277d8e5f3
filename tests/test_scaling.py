"""Several processes and machines: what they exchange, what they do with nothing to do, and what one's death does."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress

import pytest
from conftest import ROOT, command_line, rows_of, write_rows
from safetensors.torch import load_file
from test_training import graded_rows, scalars_of, update_errors, without_dropout  # noqa: F401

import train_bert_rerank
from train_bert_rerank import UserError

SCRIPT = ROOT / "train_bert_rerank.py"
TORCHRUN = ["torch.distributed.run", "--nproc_per_node"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes"]  # fmt: skip


def start(folder, *command, **environment):
    """A running process whose output goes into `folder`/output."""
    environment = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", **environment}
    with open(folder / "output", "wb") as output:
        return subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, stdout=output, stderr=output)


def output_of(processes, folders, seconds=120):
    """The text that each of the processes has written when all have ended; a failure if one has not in time."""
    end, hung = time.monotonic() + seconds, []
    for process in processes:
        try:
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            hung.append(process)
            process.terminate()  # a launcher that is killed would leave its workers behind
    for process in hung:
        process.wait(30)
    texts = [(folder / "output").read_text(encoding="utf-8", errors="replace") for folder in folders]
    assert not hung, f"still running after {seconds} s:\n" + "\n".join(texts)
    return texts


@pytest.fixture
def run_two(tmp_path):
    """run_two(settings, script=…, launcher=…) -> (exit status, output) of two processes on this machine."""

    def run(settings, script=SCRIPT, launcher=TORCHRUN):
        process = start(tmp_path, sys.executable, "-m", *launcher, "2", str(script), *command_line(settings),
                        ACCELERATE_USE_CPU="true")  # fmt: skip
        [text] = output_of([process], [tmp_path])
        return process.returncode, text

    return run


@pytest.fixture
def driver(tmp_path):
    """driver(code) -> path of a script that runs the product's main() after `code`, in which it is called `script`."""

    def write(code):
        path = tmp_path / "driver.py"
        begin = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, train_bert_rerank as script\n"
        path.write_text(f"{begin}{code}\nscript.main()\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def settings(without_dropout, write_jsonl, tmp_path):  # noqa: F811
    """Settings of a run of two epochs of nine rows in windows of four, four and one."""
    return {"model_name_or_path": without_dropout, "train_dataset": write_jsonl("train.jsonl", rows_of(9)),
            "eval_dataset": None, "output_dir": str(tmp_path / "out"), "max_len": 128, "epochs": 2, "lr": 1e-3,
            "batch_size": 1, "gradient_accumulation_steps": 2, "mixed_precision": "no",
            "log_with": None}  # fmt: skip


def assert_same_updates(folder, other, base):
    """Both runs' final models are the same but for rounding."""
    weights = [load_file(each / "final_model" / "model.safetensors") for each in (folder, other)]
    errors = update_errors(*weights, load_file(f"{base}/model.safetensors"))
    assert max(errors.values()) < 1e-3, max(errors.items(), key=lambda item: item[1])


# ---- Two processes ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def one_and_two_processes(without_dropout, tmp_path_factory):  # noqa: F811
    """Output folders and printed text of the same run on one process and on two: 33 rows in windows of 16, 16 and 1."""
    folder = tmp_path_factory.mktemp("processes")
    settings = {"model_name_or_path": without_dropout, "max_label": 4, "epochs": 2, "lr": 1e-3,
                "train_dataset": write_rows(folder / "train.jsonl", graded_rows(33)),
                "eval_dataset": write_rows(folder / "eval.jsonl", rows_of(21, 7)), "mixed_precision": "no",
                "load_best_model_at_end": False}  # fmt: skip
    with redirect_stdout(io.StringIO()) as printed:
        train_bert_rerank.train({**settings, "gradient_accumulation_steps": 8, "output_dir": str(folder / "out1")})
    settings |= {"gradient_accumulation_steps": 4, "output_dir": folder / "out2"}
    process = start(folder, sys.executable, "-m", *TORCHRUN, "2", str(SCRIPT), *command_line(settings))
    [text] = output_of([process], [folder])
    assert process.returncode == 0, text
    return [(folder / "out1", printed.getvalue()), (folder / "out2", text)]


def test_two_processes_take_the_same_steps_as_one(one_and_two_processes, without_dropout):  # noqa: F811
    (one, one_text), (two, two_text) = one_and_two_processes
    assert "processes: 1" in one_text and two_text.count("processes: 2") == 1  # said once, by the main process
    ours, theirs = scalars_of(two), scalars_of(one)
    assert ours["train/lr"] == theirs["train/lr"] and len(ours["train/lr"]) == 6
    for tag in ("train/loss", "train/grad_norm"):  # every sample once, or the mean loss would differ
        assert [value for _, value in ours[tag]] == pytest.approx([value for _, value in theirs[tag]], rel=1e-4)
    weights = [load_file(folder / "final_model" / "model.safetensors") for folder in (two, one)]
    errors = update_errors(*weights, load_file(f"{without_dropout}/model.safetensors"))
    assert max(errors.values()) < 1e-3, max(errors.items(), key=lambda item: item[1])


def test_the_number_of_processes_does_not_change_the_evaluation(one_and_two_processes):
    runs = [json.loads((folder / "run.json").read_text()) for folder, _ in one_and_two_processes]
    assert [run["processes"] for run in runs] == [1, 2]
    one, two = (json.loads((folder / "eval_report.json").read_text()) for folder, _ in one_and_two_processes)
    assert one["before"] == pytest.approx(two["before"], abs=1e-6)
    assert one["after"] == pytest.approx(two["after"], abs=1e-3)
    rows = [[json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
            for folder, _ in one_and_two_processes]  # fmt: skip
    assert [row["score_before"] for row in rows[0]] == pytest.approx([row["score_before"] for row in rows[1]], abs=1e-6)
    assert [row["score_after"] for row in rows[0]] == pytest.approx([row["score_after"] for row in rows[1]], abs=1e-4)


# ---- Two machines ----------------------------------------------------------------------------------------------------
@pytest.fixture
def run_on_two_machines(tmp_path):
    """run(settings, files={name: text} or one such per machine, script=…) -> (their folders, exit statuses, outputs):
    one process each in two network namespaces, 10.0.0.1 and 10.0.0.2, joined by a cable. What is relative in the
    settings lies in the working folder of a machine; the model and the script are shared."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("two network namespaces take root and the command `ip`")
    names = [f"rerank-{os.getpid()}-{number}" for number in (1, 2)]
    commands = [f"netns add {names[0]}", f"netns add {names[1]}",
                f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}",
                *(f"-n {name} addr add 10.0.0.{number}/24 dev eth0" for number, name in enumerate(names, start=1)),
                *(f"-n {name} link set {device} up" for name in names for device in ("lo", "eth0"))]  # fmt: skip

    def run(settings, files=({}, {}), script=SCRIPT):
        folders, processes = [tmp_path / f"machine{rank}" for rank in (0, 1)], []
        for rank, (name, folder) in enumerate(zip(names, folders, strict=True)):
            folder.mkdir()
            for file, text in files[rank].items():
                (folder / file).write_text(text, encoding="utf-8")
            node = ["--nnodes", "2", "--node_rank", str(rank), "--master_addr", "10.0.0.1", "--master_port", "29500"]
            launcher = ["ip", "netns", "exec", name, sys.executable, "-m", *TORCHRUN, "1", *node]
            processes.append(start(folder, *launcher, str(script), *command_line(settings), GLOO_SOCKET_IFNAME="eth0"))
        texts = output_of(processes, folders)
        return folders, [process.returncode for process in processes], texts

    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {command}: {done.stderr.strip()}")
        yield run
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_machines_take_the_same_steps_as_one_process(
    run_on_two_machines, one_and_two_processes, without_dropout  # noqa: F811
):
    (one, _), (two, _) = one_and_two_processes
    files = {name: (one.parent / name).read_text(encoding="utf-8") for name in ("train.jsonl", "eval.jsonl")}
    folders, statuses, texts = run_on_two_machines({
        "model_name_or_path": without_dropout, "train_dataset": "train.jsonl", "output_dir": "out", "max_label": 4,
        "mixed_precision": "no", "load_best_model_at_end": False, "epochs": 2, "lr": 1e-3,
        "gradient_accumulation_steps": 4,
    }, (files, files))  # fmt: skip
    assert statuses == [0, 0], "\n".join(texts)
    assert "processes: 2" in texts[0] and "Start training" not in texts[1]
    assert_same_updates(folders[0] / "out", one, without_dropout)
    for tag, values in scalars_of(folders[0] / "out").items():  # the same arithmetic, so the same bits
        assert values == scalars_of(two)[tag]
    assert {path.name for path in (folders[1] / "out").iterdir()} == {"cache"}  # it tokenised for itself, and no more


def test_what_is_wrong_on_one_machine_ends_the_other_soon(run_on_two_machines, settings):
    settings = {**settings, "train_dataset": "train.jsonl", "output_dir": "out"}
    _, statuses, texts = run_on_two_machines(settings, ({"train.jsonl": json.dumps(rows_of(1)[0])}, {}))
    assert statuses == [1, 1] and "Error: train.jsonl: cannot be read" in texts[1], "\n".join(texts)


# ---- What is exchanged -----------------------------------------------------------------------------------------------
WATCH = """
from torch.distributed import distributed_c10d
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
accelerator_class, model_class = script.Accelerator, script.BertRerankerModel
prepare, forward, train_window, counts = accelerator_class.prepare, model_class.forward, script.train_window, [0, 0]
def hook(group, bucket):
    counts[1] += bucket.is_last()
    return allreduce_hook(group, bucket)
def patched_prepare(*arguments):
    wrapped, optimizer = prepare(*arguments)
    wrapped.register_comm_hook(None, hook)
    backend = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    os.write(1, b"waits for %d seconds\\n" % backend.options._timeout.total_seconds())
    return wrapped, optimizer
def patched_forward(self, *arguments):
    counts[0] += self.training
    return forward(self, *arguments)
def patched_train_window(run, window, seed):
    counts[:] = 0, 0
    result = train_window(run, window, seed)
    os.write(1, b"rank %d, rows %d of %d, forwards %d, synchronised %d\\n" % (
        run.accelerator.process_index, len(result.rows), len(window), *counts))
    return result
accelerator_class.prepare, model_class.forward, script.train_window = (
    patched_prepare, patched_forward, patched_train_window)
"""


def test_gradients_are_synchronised_once_a_window_and_waiting_may_take_a_day(settings, driver, run_two):
    status, text = run_two({**settings, "micro_batch_tokens": 80}, driver(WATCH), ACCELERATE)
    assert status == 0 and text.count("processes: 2") == 1, text
    found = re.findall(r"rank (\d), rows (\d) of (\d), forwards (\d), synchronised (\d+)", text)
    windows = [[tuple(map(int, each[1:])) for each in found if each[0] == rank] for rank in "01"]
    assert [len(each) for each in windows] == [6, 6]
    for one, other in zip(*windows, strict=True):
        assert one[3] == other[3] == 1
        assert one[0] + other[0] == one[1] == other[1]
    assert [one[1] for one in windows[0]] == [4, 4, 1] * 2
    assert {(one[0], one[2]) for each in windows for one in each if one[1] == 1} == {(0, 1), (1, 1)}
    assert max(one[2] for each in windows for one in each) > 1, "no window had micro-batches to synchronise too often"
    assert re.findall(r"waits for (\d+) seconds", text) == ["86400"] * 2  # while one tokenises or writes a checkpoint


# ---- Less to do than processes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("train_rows", "eval_rows"), [pytest.param(1, 1, marks=pytest.mark.slow), (3, 2)],
    ids=["one row", "windows of two rows and of one, one eval query"],
)  # fmt: skip
def test_a_process_without_a_row_holds_up_nobody(train_rows, eval_rows, settings, write_jsonl, run_two, tmp_path):
    write_jsonl("train.jsonl", rows_of(train_rows))
    rows = [{"query": "怎么办", "content": text, "label": index} for index, text in enumerate(["请看书。", "请看报。"])]
    write_jsonl("eval.jsonl", rows[:eval_rows])  # of one length, so one micro-batch, and the other process has none
    settings |= {"gradient_accumulation_steps": 1, "eval_dataset": "auto", "load_best_model_at_end": False}
    status, text = run_two(settings)
    assert status == 0 and "processes: 2" in text, text
    report = train_bert_rerank.train({**settings, "batch_size": 2, "output_dir": str(tmp_path / "one")})["report"]
    assert bool(report) == (eval_rows > 1)
    folders = tmp_path / "out", tmp_path / "one"
    assert_same_updates(*folders, settings["model_name_or_path"])
    if report:
        scores = [[json.loads(line)["score_after"] for line in (folder / "predictions.jsonl").open(encoding="utf-8")]
                  for folder in folders]  # fmt: skip
        assert scores[0] == pytest.approx(scores[1], abs=1e-4) and len(scores[0]) == 2


def test_an_error_of_the_user_is_said_once_and_ends_all_processes(settings, write_jsonl, run_two):
    status, text = run_two({**settings, "eval_dataset": write_jsonl("one.jsonl", rows_of(1))})
    assert status == 1, text
    assert text.count("Error: there are no eval rows with labels to measure") == 1, text


def test_fsdp_in_accelerates_configuration_is_refused(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch sets it
    with pytest.raises(UserError, match="FSDP, which this script cannot use"):
        train_bert_rerank.train(settings)


# ---- A process that dies ---------------------------------------------------------------------------------------------
DIE = """
train_window, calls = script.train_window, []
os.write(1, b"pid %d\\n" % os.getpid())
def patched_train_window(*arguments):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), 9)
    return train_window(*arguments)
script.train_window = patched_train_window
"""


def assert_gone(pids, text):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), 0)
            pytest.fail(f"process {pid} is still there:\n{text}")


def test_when_one_process_is_killed_the_launcher_says_so_and_nothing_is_left(settings, driver, run_two, tmp_path):
    status, text = run_two(settings, driver(DIE.replace("{rank}", "0")))
    assert status == 1 and re.search(r"rank +: 0 \(local_rank: 0\)\n +exitcode +: -9 .*SIGKILL", text), text
    pids = re.findall(r"pid (\d+)\n", text)
    assert len(pids) == 2
    assert_gone(pids, text)
    assert not (tmp_path / "out" / "final_model").exists()


def test_when_the_process_of_another_machine_is_killed_this_one_ends_by_itself(settings, driver, run_on_two_machines):
    # Its launcher knows nothing of the other machine: what ends it is the connection that broke.
    _, statuses, texts = run_on_two_machines(settings, script=driver(DIE.replace("{rank}", "1")))
    assert statuses == [1, 1] and "exitcode  : -9" in texts[1], "\n".join(texts)
    said = re.search(r"Error: another process of this run has ended: .*(closed|reset) by peer.*", texts[0])
    assert said and "10.0.0.2" in said[0] and "train_bert_rerank.py\", line" not in texts[0], texts[0]
    assert_gone(re.findall(r"pid (\d+)\n", "".join(texts)), texts[0])
