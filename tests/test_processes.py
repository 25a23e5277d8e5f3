"""Who is the main process: what a run takes from the environment and from those who start processes themselves."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, command_line, rows_of


@pytest.fixture
def settings(write_jsonl, small_model, tmp_path):
    """A run of two steps on a model of one layer."""
    return {
        "model_name_or_path": small_model, "train_dataset": write_jsonl("train.jsonl", rows_of(32)),
        "eval_dataset": write_jsonl("eval.jsonl", rows_of(24, 6)), "max_len": 32, "epochs": 1, "mixed_precision": "no",
        "log_with": None, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


@pytest.fixture
def run_python(tmp_path):
    """run_python(code, …) -> CompletedProcess of a Python file with `code`, which can import the script."""

    def run(code, *arguments, launcher=(), **environment):
        (tmp_path / "starter.py").write_text(code)
        return subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "starter.py"), *arguments], cwd=tmp_path, timeout=200, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("epochs, results", [
    (1, "final_model"), pytest.param(0, "evaluation", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("environment", [
    {"RANK": "1"}, pytest.param({"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_rank_that_is_left_over_in_the_environment_keeps_no_run_from_writing(
    run_script, settings, tmp_path, environment, epochs, results
):
    result = run_script(*command_line({**settings, "epochs": epochs}), **environment)
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "out" / results).is_dir()
    assert "Training Args: {" in result.stdout and "average_precision" in result.stdout


HALVES = [{"LOCAL_RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"},
          {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}]  # fmt: skip


@pytest.mark.parametrize("environment", [
    {"LOCAL_RANK": "0"}, *(pytest.param(each, marks=pytest.mark.slow) for each in HALVES),
], ids=str)  # fmt: skip
def test_half_of_a_launchers_environment_is_refused_with_what_there_is_and_what_to_do(
    run_script, settings, tmp_path, environment
):
    result = run_script(*command_line(settings), **environment)
    assert result.returncode == 2, result.stdout
    message = result.stdout[result.stdout.index("Error: ") :]
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
    shown = ", ".join(f"{name}={environment[name]}" for name in names)
    assert f"The environment has {shown}.\n" in message, "as it was, without what accelerate adds"
    assert "unset them" in message and "torchrun" in message and "Traceback" not in result.stdout
    assert not (tmp_path / "out").exists()


DEBUG_LAUNCHER = """
import json, sys
from accelerate import debug_launcher
from train_bert_rerank import train
debug_launcher(train, (json.loads(sys.argv[1]),), num_processes=2)
"""
SPAWN = """
import json, os, sys
import torch
from train_bert_rerank import train

def worker(rank, settings, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=%s)
    for epochs in (0, 1):
        train({**settings, "epochs": epochs})

if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (json.loads(sys.argv[1]), os.getcwd()), nprocs=2)
"""


@pytest.mark.parametrize("starter", ["debug_launcher", pytest.param("spawn", marks=pytest.mark.slow)])
def test_of_processes_that_python_itself_starts_one_is_the_main_one(run_python, settings, tmp_path, starter):
    code = DEBUG_LAUNCHER if starter == "debug_launcher" else SPAWN % repr(str(20000 + os.getpid() % 20000))
    result = run_python(code, json.dumps(settings))
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("Training Args: {") == (2 if starter == "spawn" else 1)
    for line in ("Model saved successfully!", "Verdict: "):
        assert result.stdout.count(line) == 1, line
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["processes"] == 2 and set(run["results"]) <= set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("epochs", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_command_ends_the_group_of_its_processes_after_an_evaluation_alone_too(run_python, settings, epochs):
    code = """
import runpy, sys
import torch
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
print("left:", torch.distributed.is_initialized())
"""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    result = run_python(code, str(ROOT / "train_bert_rerank.py"), *command_line({**settings, "epochs": epochs}),
                        launcher=launcher)  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("left: False") == 2


OWN_GROUP = """
import json, os, sys
import torch
from train_bert_rerank import UserError, train

def worker(rank, settings, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        train(settings)
    except UserError as error:
        print(error)

if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (json.loads(sys.argv[1]), os.getcwd()), nprocs=2)
"""


@pytest.mark.slow
def test_processes_that_would_each_train_alone_and_write_to_one_folder_are_refused(run_python, settings, tmp_path):
    result = run_python(OWN_GROUP, json.dumps(settings))
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("there is a process group of 2, which cannot be used: set RANK, LOCAL_RANK") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_of_two_runs_that_know_nothing_of_each_other_one_writes_to_a_folder(settings, run_python, tmp_path):
    code = """
import json, sys
import train_bert_rerank as script

def beside(run, original=script.fit_bias):
    script.fit_bias = original
    script.ONE_RUN.release()  # as in another process
    held, script.LOCKED_FOLDERS = script.LOCKED_FOLDERS, []
    try:
        script.train(settings)
    except script.UserError as error:
        print("second:", error)
    script.ONE_RUN.acquire()
    script.LOCKED_FOLDERS = held
    return original(run)

settings = json.loads(sys.argv[1])
script.fit_bias = beside
script.train(settings)
script.train(settings)
"""
    result = run_python(code, json.dumps({**settings, "overwrite_output_dir": True}))
    assert result.returncode == 0, result.stdout
    assert f"second: another run is writing to {tmp_path / 'out'}: take another output_dir" in result.stdout
    assert result.stdout.count("Model saved successfully!") == 2, "the first, and the third when it had ended"


CALLERS_OWN = """
import json, os, sys
import torch
from accelerate import Accelerator
from train_bert_rerank import train

settings = json.loads(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
accelerator = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=4)
for epochs in (0, 1):
    train({**settings, "epochs": epochs, "mixed_precision": "bf16"})
    assert torch.distributed.is_initialized(), "the group is the caller's"
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 4)
"""


def test_a_callers_process_group_and_accelerator_are_as_before(run_python, settings):
    result = run_python(CALLERS_OWN, json.dumps(settings))
    assert result.returncode == 0, result.stdout


def test_a_tool_says_what_it_does_whatever_rank_is_left_over(tmp_path, monkeypatch):
    (tmp_path / "table.csv").write_text("query,content,label\nq,c,1\nq,d,0\n")
    command = [sys.executable, str(ROOT / "tools" / "convert_data.py"), "table.csv", "--output", "rows.jsonl"]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "RANK": "1"}, capture_output=True, text=True)
    assert result.returncode == 0 and "rows.jsonl: 2 rows" in result.stdout, result
