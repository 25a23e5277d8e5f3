"""Checkpoints: a run killed anywhere goes on to the same bits, and what would be lost or mixed up is refused."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, rows_of
from safetensors.torch import load_file, save_file
from test_training import scalars_of, update_errors, without_dropout  # noqa: F401

import train_bert_rerank
from train_bert_rerank import RESULTS, UserError, checkpoints_in

WRITTEN = [name for name in RESULTS if name not in ("fine_tuned_model", "logs", "run.json")]  # bits that are compared
RESUME = {"resume_from_checkpoint": "latest"}


def digests(output_dir):
    """{file: SHA-256} of what has to be the same in two runs, and the scalars that were logged."""
    files = [path for name in WRITTEN for path in [Path(output_dir, name), *Path(output_dir, name).glob("*")]]
    found = {str(path.relative_to(output_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in files if path.is_file()}  # fmt: skip
    assert "final_model/model.safetensors" in found
    return found, scalars_of(output_dir)


@pytest.fixture
def settings(tmp_path, write_jsonl):
    """Settings of a run of two epochs with five steps each, evaluated and saved every second one."""
    return {"model_name_or_path": TINY, "train_dataset": write_jsonl("train.jsonl", rows_of(40)),
            "eval_dataset": write_jsonl("eval.jsonl", rows_of(63, 21)), "output_dir": str(tmp_path / "out"),
            "max_len": 64, "epochs": 2, "lr": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 4, "save_steps": 2,
            "eval_steps": 2, "mixed_precision": "no"}  # fmt: skip


class Killed(BaseException):
    """What a test raises in the place of a kill."""


@pytest.fixture
def train_until(monkeypatch):
    """train_until(step, settings): train, and let the process 'die' before that step."""

    def train_until(step, settings):
        original = train_bert_rerank.train_step

        def dies(run, window):
            if run.progress.step + 1 == step:
                raise Killed
            return original(run, window)

        with monkeypatch.context() as patch:
            patch.setattr(train_bert_rerank, "train_step", dies)
            with pytest.raises(Killed):
                train_bert_rerank.train(settings)

    return train_until


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ---- Real processes, real signals ------------------------------------------------------------------------------------
class Process:
    """The script in a process of its own, or in several under torchrun, and what it prints."""

    def __init__(self, settings, processes=1, **environment):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        self.popen = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "train_bert_rerank.py"), *arguments], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        self.output, self.looked_at = "", 0

    def wait_for(self, pattern):
        """Read until `pattern` is printed, behind what was waited for before."""
        while not (found := re.search(pattern, self.output[self.looked_at :])):
            data = os.read(self.popen.stdout.fileno(), 1 << 16)
            assert data, self.output
            self.output += data.decode(errors="replace")
        self.looked_at += found.end()
        return self

    def workers(self):
        """The process ids of the launcher's children, or the process itself."""
        children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
        return [int(each) for each in children] or [self.popen.pid]

    def send(self, number):
        self.popen.send_signal(number)
        return self

    def end(self):
        """Wait for its end: (exit status, all that it printed)."""
        self.output += self.popen.communicate(timeout=120)[0].decode(errors="replace")
        return self.popen.returncode, self.output


def at_step(step):
    return rf"Training: [^\r]*?\| {step}/\d+ "


@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=pytest.mark.soak)])
def test_stopped_by_each_signal_and_killed_a_run_goes_on_to_the_same_bits(settings, tmp_path, processes):
    settings = {**settings, "epochs": 4, "save_steps": 3, "gradient_accumulation_steps": 6 // processes}
    status, whole = Process({**settings, "output_dir": tmp_path / "whole"}, processes).end()
    assert status == 0, whole
    assert whole.count(f"processes: {processes}") == 1
    for step, number in ((3, signal.SIGTERM), (6, signal.SIGINT), (9, signal.SIGUSR1), (13, signal.SIGKILL)):
        run = Process({**settings, **RESUME}, processes).wait_for(at_step(step))
        if number in (signal.SIGKILL, signal.SIGUSR1):  # those a launcher does not pass on
            for worker in run.workers():
                os.kill(worker, number)
        else:
            run.send(number)
        status, output = run.end()
        [*_, last] = checkpoints_in(tmp_path / "out" / "unfinished_run")
        if number == signal.SIGKILL:
            assert status == (-9 if processes == 1 else 1)
            continue
        assert status == (128 + number if processes == 1 else 1), output  # torchrun has an exit status of its own
        reached = int(last.name.rpartition("-")[2])
        assert step <= reached <= step + 3
        said = (rf"Stopped by {number.name} after step {reached} of 16; checkpoints are in \S*/out/unfinished_run\.\n"
                r"  to go on:      the same command with --resume_from_checkpoint latest\n"
                r"  to start over: the same command with --overwrite_output_dir true")  # fmt: skip
        assert len(re.findall(said, output)) == 1 and "train_bert_rerank.py\", line" not in output, output
    status, output = Process({**settings, **RESUME}, processes).end()
    assert status == 0 and "Going on after step" in output, output
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert names_in(tmp_path / "out") == names_in(tmp_path / "whole")


def test_a_second_signal_ends_the_run_at_once_and_writes_no_checkpoint(settings, tmp_path, write_jsonl):
    rows = [{**row, "query": f"{index}"} for index, row in enumerate(100 * rows_of(40))]  # one window
    settings = {**settings, "train_dataset": write_jsonl("many.jsonl", rows), "gradient_accumulation_steps": 2000,
                "epochs": 9, "eval_dataset": None, "save_steps": 1}  # fmt: skip
    run = Process(settings).wait_for(at_step(1)).send(signal.SIGTERM)
    time.sleep(5.2)  # what comes sooner may be the same signal, by way of a launcher
    status, output = run.send(signal.SIGTERM).end()
    assert status == -signal.SIGTERM and "Stopped by" not in output, output
    assert names_in(tmp_path / "out" / "unfinished_run") == ["checkpoint-00000001", "logs"]


def test_a_signal_cuts_an_evaluation_short_and_the_next_run_does_it_again(settings, tmp_path, write_jsonl):
    settings = {**settings, "eval_steps": 5, "eval_dataset": write_jsonl("eval.jsonl", rows_of(1500, 500))}
    assert Process({**settings, "output_dir": tmp_path / "whole"}).end()[0] == 0
    run = Process(settings).wait_for(at_step(4)).wait_for(r"Scoring: +[1-9]\d?%").send(signal.SIGTERM)
    status, output = run.end()
    assert status == 143 and "Stopped by SIGTERM after step 5 of 10" in output and "Step 5, epoch" not in output, output
    assert names_in(tmp_path / "out" / "unfinished_run")[:2] == ["checkpoint-00000004", "checkpoint-00000005"]
    assert Process({**settings, **RESUME}).end()[0] == 0
    ours, theirs = (json.loads((tmp_path / name / "eval_report.json").read_text()) for name in ("out", "whole"))
    assert ours == theirs and [point["step"] for point in ours["history"]] == [0, 5, 10]


def test_outside_of_training_a_signal_ends_the_run_at_once(settings, tmp_path):
    for number, status in ((signal.SIGINT, -2), (signal.SIGTERM, -15)):
        assert Process(settings).wait_for("Training Args").send(number).end()[0] == status
        assert not (tmp_path / "out" / "unfinished_run").exists()


def test_handlers_of_the_caller_are_back_after_a_run_and_another_thread_may_train(settings):
    import threading

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        train_bert_rerank.train(settings)
        assert signal.getsignal(signal.SIGTERM) is mine
        done = []
        thread = threading.Thread(target=lambda: done.append(train_bert_rerank.train(settings)["args"]))
        thread.start()
        thread.join()
        assert done and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- Cut off at every point ------------------------------------------------------------------------------------------
CRASHING = """
import json, os, shutil, sys
sys.path.insert(0, {root!r})
import train_bert_rerank
settings, folder = json.loads(sys.argv[1]), sys.argv[2]
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open")  # events of sys.audit that change a disk
changes = []

def start(name, point=None):
    child = os.fork()  # so that the imports are paid for once
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.path.join(folder, name + ".txt"), os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
    os.dup2(1, 2)
    output_dir = os.path.join(folder, name)
    def crash(event, arguments):
        if event in CHANGES and (event != "open" or set(str(arguments[1])) & set("wax+")):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
            is_below = event in ("os.remove", "os.rmdir") and arguments[1] >= 0  # relative to a folder that is open
            is_inside = is_below or os.path.abspath(path).startswith(output_dir)
            if is_inside and "/logs" not in path and "/cache" not in path:
                changes.append(event)
                if len(changes) == point:
                    os._exit(9)
    sys.addaudithook(crash)
    train_bert_rerank.train({{**settings, "output_dir": output_dir, "resume_from_checkpoint": "latest"}})
    print("changes of the disk:", len(changes), flush=True)
    os._exit(0)

for point in json.loads(sys.argv[3]):
    shutil.copytree(os.path.join(folder, "earlier"), os.path.join(folder, f"point-{{point}}"))
    first = start(f"point-{{point}}", point)
    print(point, first, start(f"point-{{point}}"), flush=True)
"""


@pytest.mark.parametrize("chosen", [slice(1, None, 9), pytest.param(slice(1, None), marks=pytest.mark.soak)])
def test_cut_off_before_any_change_of_the_disk_the_next_run_ends_with_the_same_bits(
    settings, tmp_path, write_jsonl, chosen
):
    """It replaces an earlier run's results, of another seed and with one more, so that their moving is cut off too."""
    rows = (ROOT / "default_eval_data.jsonl").read_text(encoding="utf-8").splitlines()[: 21 * 8]
    settings = {**settings, "train_dataset": str(ROOT / "default_train_data.jsonl"), "save_steps": 1, "eval_steps": 1,
                "eval_dataset": write_jsonl("eval.jsonl", map(json.loads, rows)), "gradient_accumulation_steps": 33,
                "epochs": 1, "save_total_limit": 1, "base_interpolation": [], "log_with": None, "lr": 1e-4}  # fmt: skip
    train_bert_rerank.train({**settings, "seed": 1, "output_dir": str(tmp_path / "earlier")})
    (tmp_path / "earlier" / "fine_tuned_model").mkdir()
    (tmp_path / "crashing.py").write_text(CRASHING.format(root=str(ROOT)), encoding="utf-8")

    def cut_off(points):
        command = [sys.executable, tmp_path / "crashing.py", json.dumps(settings), tmp_path, json.dumps(points)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    assert cut_off([0]) == [(0, 0, 0)]
    files = [path for path in (tmp_path / "point-0").rglob("*") if path.is_file() and path.suffix != ".tokens"]
    whole = {path.relative_to(tmp_path / "point-0"): path.read_bytes() for path in files}
    assert "fine_tuned_model" not in names_in(tmp_path / "point-0")
    count = int(re.search(r"changes of the disk: (\d+)", (tmp_path / "point-0.txt").read_text())[1])
    assert count > 50
    points = list(range(count + 1))[chosen]
    assert cut_off(points) == [(point, 9, 0) for point in points], (tmp_path / f"point-{points[-1]}.txt").read_text()
    for point in points:
        folder = tmp_path / f"point-{point}"
        assert names_in(folder) == names_in(tmp_path / "point-0")
        for path, content in whole.items():
            found = folder / path
            assert found.exists() and (found.name == "run.json" or found.read_bytes() == content), (point, found)


def test_killed_five_times_at_random_a_run_ends_with_the_same_bits():
    command = [sys.executable, ROOT / "benchmarks" / "soak_kill.py", "--kills", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and '{"kills": 5, "unusable states": 0, ' in done.stdout, done.stdout + done.stderr


# ---- What a checkpoint is --------------------------------------------------------------------------------------------
def test_by_default_each_epoch_ends_with_a_checkpoint_and_the_newest_two_are_kept(settings, train_until, tmp_path):
    folder = tmp_path / "out" / "unfinished_run"
    train_until(16, {**settings, "epochs": 5, "save_steps": None})
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-00000010", "checkpoint-00000015"]
    train_until(16, {**settings, "epochs": 5, "save_steps": 4, "save_total_limit": 1, "overwrite_output_dir": True})
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-00000012"]
    train_bert_rerank.train({**settings, "epochs": 5, "save_steps": 4, "save_total_limit": 1, **RESUME})
    assert not folder.exists() and (tmp_path / "out" / "final_model").exists()


def test_best_weights_stand_once_beside_the_checkpoints_and_those_in_use_are_never_removed(
    settings, tmp_path, monkeypatch
):
    folder, seen = tmp_path / "out" / "unfinished_run", []
    save = train_bert_rerank.save_checkpoint

    def saving(run):
        save(run)
        states = [torch.load(each / "state.pt", weights_only=True) for each in checkpoints_in(folder)]
        files = {int(each.stem[-8:]) for each in folder.glob("best_weights-*.pt")}
        best_steps = {state["progress"]["best_step"] for state in states} - {0}
        seen.append((len(files), len(best_steps)))
        assert best_steps <= files and len(files) <= 2
        assert not any("best_weights" in state for state in states)

    monkeypatch.setattr(train_bert_rerank, "save_checkpoint", saving)
    quality = iter([0.5, 0.6, 0.4, 0.7, 0.8, 0.1, 0.2, 0.9, 0.3, 0.3])  # bests at steps 4, 8, 10 and 16
    evaluate = train_bert_rerank.evaluate
    monkeypatch.setattr(train_bert_rerank, "evaluate", lambda *each: replace(evaluate(*each), quality=next(quality)))
    run = train_bert_rerank.train({**settings, "epochs": 4, "lr": 1e-4, "base_interpolation": [], "eval_steps": 2,
                                   "save_steps": 1, "gradient_accumulation_steps": 5})
    assert len(seen) == 16 and run["report"]["history"][-1]["step"] == 16


def test_a_checkpoint_holds_no_code_and_one_that_does_is_refused_unread(settings, train_until, tmp_path):
    train_until(4, settings)
    state = tmp_path / "out" / "unfinished_run" / "checkpoint-00000002" / "state.pt"
    assert torch.load(state, weights_only=True)["progress"]["step"] == 2

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"step": 2, "harm": Harmful()}, state)
    with pytest.raises(UserError, match="checkpoint-00000002 and the best weights beside it cannot be read"):
        train_bert_rerank.train({**settings, **RESUME})
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"rubbish" * 99])
def test_a_spoilt_checkpoint_is_an_error_and_the_older_one_goes_on(settings, train_until, tmp_path, spoil):
    train_until(6, settings)
    older, newer = checkpoints_in(tmp_path / "out" / "unfinished_run")
    (newer / "state.pt").write_bytes(spoil((newer / "state.pt").read_bytes()))
    with pytest.raises(UserError, match="checkpoint-00000004 and the best weights beside it cannot be read"):
        train_bert_rerank.train({**settings, **RESUME})
    run = train_bert_rerank.train({**settings, "resume_from_checkpoint": str(older)})
    assert run["resumed_from"] == str(older)
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_half_written_checkpoint_is_never_taken_for_one_and_goes(settings, train_until, tmp_path):
    train_until(4, settings)
    folder = tmp_path / "out" / "unfinished_run"
    half = folder / "checkpoint-00000003" / "state.machine.7"
    half.parent.mkdir()
    half.write_bytes(b"half")
    (folder / "best_weights-00000003.machine.7").write_bytes(b"half")
    train_until(4, {**settings, **RESUME})
    assert names_in(folder) == ["checkpoint-00000002", "logs"]


def test_going_on_from_an_older_checkpoint_leaves_no_newer_one_that_latest_would_take(settings, train_until, tmp_path):
    folder = tmp_path / "out" / "unfinished_run"
    train_until(6, settings)
    older, newer = checkpoints_in(folder)
    (newer / "state.pt").write_bytes(b"spoilt")
    (folder / "best_weights-00000005.pt").write_bytes(b"of a run that was cut off before its checkpoint")
    train_until(7, {**settings, "resume_from_checkpoint": str(older), "save_total_limit": 1})  # killed once more
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-00000006"]
    train_bert_rerank.train({**settings, **RESUME})
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_copies_that_a_user_made_are_neither_taken_for_checkpoints_nor_removed(settings, train_until, tmp_path):
    folder = tmp_path / "out" / "unfinished_run"
    train_until(6, settings)
    [older, newer] = checkpoints_in(folder)
    older.rename(folder / "keep")
    shutil.copytree(newer, folder / "checkpoint-backup")
    train_until(8, {**settings, "resume_from_checkpoint": str(folder / "keep")})
    assert {"keep", "checkpoint-backup"} <= set(names_in(folder))
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-00000004", "checkpoint-00000006"]
    train_bert_rerank.train({**settings, **RESUME})
    assert names_in(folder) == ["checkpoint-backup", "keep"]


def test_a_checkpoint_that_another_run_has_written_meanwhile_is_not_thrown_away(
    settings, train_until, tmp_path, monkeypatch
):
    train_until(6, settings)
    (tmp_path / "out" / "unfinished_run").rename(tmp_path / "other")
    load = train_bert_rerank.load_base
    monkeypatch.setattr(train_bert_rerank, "load_base",
                        lambda args: ((tmp_path / "other").rename(tmp_path / "out" / "unfinished_run"), load(args))[1])
    with pytest.raises(UserError, match="checkpoint-00000004 has come meanwhile: another run writes to"):
        train_bert_rerank.train(settings)
    assert len(checkpoints_in(tmp_path / "out" / "unfinished_run")) == 2


def test_a_resumed_run_keeps_no_checkpoint_open(settings, train_until, tmp_path, monkeypatch):
    train_until(6, settings)
    maps, save = [], train_bert_rerank.save_checkpoint
    monkeypatch.setattr(train_bert_rerank, "save_checkpoint",
                        lambda *each: (save(*each), maps.append(Path("/proc/self/maps").read_text())))
    train_bert_rerank.train({**settings, **RESUME})
    assert maps and not any(".pt" in each for each in maps)


# ---- Which run goes on -----------------------------------------------------------------------------------------------
def test_latest_starts_afresh_where_there_is_no_checkpoint_and_says_so(settings, tmp_path, capsys):
    train_bert_rerank.train({**settings, **RESUME})
    assert f"No checkpoint in {tmp_path}/out/unfinished_run: starting afresh." in capsys.readouterr().out


def test_latest_on_a_finished_run_says_so_and_changes_nothing(settings, tmp_path, run_script, capsys):
    first = train_bert_rerank.train(settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    arguments = [text for key, value in {**settings, **RESUME}.items() for text in (f"--{key}", value)]
    done = run_script(*arguments)
    assert done.returncode == 0 and "Loading" not in done.stdout
    assert "A run with these settings has ended (data are not compared)" in done.stdout
    again = train_bert_rerank.train({**settings, **RESUME, "save_steps": 1, "log_with": None})
    assert again == json.loads(json.dumps(first))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    train_until = train_bert_rerank.train({**settings, **RESUME, "lr": 1e-4})  # another run, as without "latest"
    assert train_until["args"]["lr"] == 1e-4 and "starting afresh" in capsys.readouterr().out


def test_an_unfinished_run_is_not_thrown_away_unasked(settings, train_until, tmp_path, run_script):
    train_until(6, settings)
    before = names_in(tmp_path / "out" / "unfinished_run")
    arguments = [text for key, value in settings.items() for text in (f"--{key}", value)]
    done = run_script(*arguments)
    assert done.returncode == 2 and "Loading" not in done.stdout
    assert re.search(r"Error: \S+/unfinished_run holds checkpoint-00000004 of a run that has not ended.\n"
                     r"  to go on: .* --resume_from_checkpoint latest\n"
                     r"  to start over: .* --overwrite_output_dir true .*\n  to keep it: +another --output_dir\n$",
                     done.stdout), done.stdout  # fmt: skip
    assert names_in(tmp_path / "out" / "unfinished_run") == before
    train_until(3, {**settings, "overwrite_output_dir": True})
    assert names_in(tmp_path / "out" / "unfinished_run") == ["checkpoint-00000002", "logs"]


def test_both_going_on_and_starting_over_is_an_error(settings):
    with pytest.raises(UserError, match="set one of them"):
        train_bert_rerank.train({**settings, **RESUME, "overwrite_output_dir": True})


def test_a_folder_that_is_no_checkpoint_is_an_error_that_names_those_there_are(settings, train_until, tmp_path):
    train_until(6, settings)
    with pytest.raises(UserError, match="nowhere is no checkpoint; there are: .*0002, .*checkpoint-00000004$"):
        train_bert_rerank.train({**settings, "resume_from_checkpoint": "nowhere"})


def test_a_checkpoint_that_was_copied_elsewhere_goes_on_in_another_output_dir(settings, train_until, tmp_path):
    train_until(8, settings)
    source = tmp_path / "out" / "unfinished_run"
    saved = torch.load(source / "checkpoint-00000006" / "state.pt", weights_only=True)
    shutil.copytree(source / "checkpoint-00000006", tmp_path / "copy" / "checkpoint-00000006")
    other = {**settings, "output_dir": str(tmp_path / "other"),
             "resume_from_checkpoint": str(tmp_path / "copy" / "checkpoint-00000006")}  # fmt: skip
    with pytest.raises(UserError, match="best weights beside it cannot be read: .*best_weights-0000000"):
        train_bert_rerank.train(other)
    shutil.copy(source / f"best_weights-{saved['best_step']:08}.pt", tmp_path / "copy")
    train_bert_rerank.train(other)
    train_bert_rerank.train({**settings, **RESUME})
    assert digests(tmp_path / "other") == digests(tmp_path / "out")
    assert names_in(tmp_path / "copy") == [f"best_weights-{saved['best_step']:08}.pt", "checkpoint-00000006"]


# ---- What may change, and what is refused ----------------------------------------------------------------------------
def changed_rows(settings, **changes):
    rows = [{**rows_of(40)[0], "content": "Anders."}, *rows_of(40)[1:]]
    Path(settings["train_dataset"]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {}


def changed_eval_rows(settings):
    path = Path(settings["eval_dataset"])
    path.write_text(path.read_text(encoding="utf-8").replace('"label": 1', '"label": 0', 1), encoding="utf-8")
    return {}


def changed_model(settings, tmp_path, part):
    folder = tmp_path / "changed"
    shutil.copytree(TINY, folder)
    if part == "weights":
        weights = load_file(folder / "model.safetensors")
        weights["classifier.out_proj.bias"] += 0.1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif part == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.2}))
    else:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        tokenizer = json.loads(text)
        tokenizer["normalizer"] = {"type": "NFC"}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return {"model_name_or_path": str(folder)}


REFUSED = {
    "lr": (lambda *_: {"lr": 2e-3}, r"lr: 0.001 → 0.002"),
    "epochs": (lambda *_: {"epochs": 3}, r"epochs: 2 → 3"),
    "two": (lambda *_: {"seed": 7, "max_len": 48}, r"max_len: 64 → 48\n  seed: 42 → 7"),
    "freeze": (lambda *_: {"freeze_embeddings": True}, r"freeze_embeddings: False → True"),
    "eval_steps": (lambda *_: {"eval_steps": 5}, r"eval_steps: 2 → 5"),
    "rows": (lambda settings, _: changed_rows(settings), r"train rows: \w{64} → \w{64}"),
    "eval rows": (lambda settings, _: changed_eval_rows(settings), r"eval rows: \w{64} → \w{64}"),
    "no evaluation": (lambda *_: {"eval_dataset": None}, r"eval rows: \w{64} → \w{64}"),
    "samples": (lambda *_: {"batch_size": 4}, r"samples of a step: 8 → 16"),
    "weights": (lambda settings, path: changed_model(settings, path, "weights"), r"base weights: \w{64} → \w{64}"),
    "config": (lambda settings, path: changed_model(settings, path, "config"), r"config: \w{64} → \w{64}"),
    "tokenizer": (lambda settings, path: changed_model(settings, path, "tokenizer"), r"tokenizer: \w{64} → \w{64}"),
}


@pytest.mark.parametrize("change, named", REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(settings, train_until, tmp_path, change, named):
    train_until(4, settings)
    folder = tmp_path / "out" / "unfinished_run"
    before = {path: path.read_bytes() for path in folder.rglob("*.pt")}
    with pytest.raises(UserError) as caught:
        train_bert_rerank.train({**settings, **change(settings, tmp_path), **RESUME})
    said = (rf"\S*checkpoint-00000002 is of another run; from it to this one:\n  {named}\n"
            r"Set that back, or take another output_dir.\n  to start over: .*")  # fmt: skip
    assert re.fullmatch(said, str(caught.value)), caught.value
    assert caught.value.exit_status == 2
    assert {path: path.read_bytes() for path in folder.rglob("*.pt")} == before


def test_names_logging_and_memory_options_may_change_and_are_said(settings, train_until, tmp_path, capsys):
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    train_until(6, settings)
    shutil.copytree(TINY, tmp_path / "copy")
    shutil.move(settings["train_dataset"], tmp_path / "moved.jsonl")
    (tmp_path / "out").rename(tmp_path / "out2")
    capsys.readouterr()
    changes = {"model_name_or_path": str(tmp_path / "copy"), "train_dataset": str(tmp_path / "moved.jsonl"),
               "output_dir": str(tmp_path / "out2"), "gradient_checkpointing": True, "save_total_limit": 1,
               "save_steps": 3}  # fmt: skip
    train_bert_rerank.train({**settings, **changes, **RESUME})
    out = capsys.readouterr().out
    said = out[out.index("Going on after step 4, from ") :]
    assert said.splitlines()[0].endswith("checkpoint-00000004, with other")
    assert all(f"  {key}: {settings.get(key, '')}" in said for key in changes)
    [rows, others] = [(tmp_path / name / "rows_to_check.jsonl").read_text("utf-8") for name in ("out2", "whole")]
    assert rows.replace("moved.jsonl", "train.jsonl") == others
    weights = [load_file(tmp_path / name / "final_model" / "model.safetensors") for name in ("out2", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert scalars_of(tmp_path / "out2") == scalars_of(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"micro_batch_tokens": 100}, {"batch_size": 1, "gradient_accumulation_steps": 8}])
def test_with_another_bound_the_same_samples_make_the_same_steps(
    settings, train_until, tmp_path, changes, without_dropout  # noqa: F811
):
    settings = {**settings, "model_name_or_path": without_dropout, "load_best_model_at_end": False}
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    train_until(6, settings)
    run = train_bert_rerank.train({**settings, **changes, **RESUME})
    assert run["micro_batch_tokens"] == changes.get("micro_batch_tokens", 64)
    check_agreement(tmp_path, without_dropout)


def check_agreement(tmp_path, model):
    """That the run in out agrees with that in whole but for rounding."""
    ours, theirs = scalars_of(tmp_path / "out"), scalars_of(tmp_path / "whole")
    assert ours["train/lr"] == theirs["train/lr"] and len(ours["train/lr"]) == 10
    for tag in ("train/loss", "train/grad_norm"):
        assert [value for _, value in ours[tag]] == pytest.approx([value for _, value in theirs[tag]], rel=1e-3)
    weights = [load_file(tmp_path / name / "final_model" / "model.safetensors") for name in ("out", "whole")]
    assert max(update_errors(*weights, load_file(f"{model}/model.safetensors")).values()) < 1e-2


def test_two_processes_go_on_where_one_stopped(settings, train_until, tmp_path, without_dropout):  # noqa: F811
    settings = {**settings, "model_name_or_path": without_dropout, "load_best_model_at_end": False}
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    train_until(6, settings)
    status, output = Process({**settings, **RESUME}, processes=2).end()
    assert status == 1 and "samples of a step: 8 → 16" in output, output
    assert "train_bert_rerank.py\", line" not in output, "a traceback"
    status, output = Process({**settings, **RESUME, "gradient_accumulation_steps": 2}, processes=2).end()
    assert status == 0, output
    assert "  processes: 1 → 2\n" in output and "  gradient_accumulation_steps: 4 → 2\n" in output
    check_agreement(tmp_path, without_dropout)


def test_the_bound_that_out_of_memory_left_is_in_force_again(settings, train_until, tmp_path, monkeypatch, capsys):
    from test_memory import fails_above

    settings = {**settings, "micro_batch_tokens": 512}
    fails_above(128, monkeypatch)
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    train_until(6, settings)
    capsys.readouterr()
    assert train_bert_rerank.train({**settings, **RESUME})["micro_batch_tokens"] == 128
    assert "Out of memory" not in capsys.readouterr().out
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_early_stopping_and_a_new_head_are_remembered(settings, train_until, tmp_path):
    shutil.copytree(TINY, tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "classifier" not in name},
              tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    settings = {**settings, "model_name_or_path": str(tmp_path / "plain"), "epochs": 9, "early_stopping_patience": 3,
                "lr": 1e-2}  # fmt: skip
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    report = json.loads((tmp_path / "whole" / "eval_report.json").read_text())
    last = report["history"][-1]["step"]
    assert last < 45
    train_until(last - 2, settings)
    train_until(last, {**settings, **RESUME})
    train_bert_rerank.train({**settings, **RESUME})
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


# ---- Steps that go wrong ---------------------------------------------------------------------------------------------
@pytest.fixture
def poisoned(tmp_path):
    """A model that a row with 毳 overflows, and no other: its weights are finite, its output is NaN."""
    shutil.copytree(TINY, tmp_path / "poisoned")
    tokenizer = json.loads((tmp_path / "poisoned" / "tokenizer.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "poisoned" / "model.safetensors")
    [name] = [name for name in weights if "word_embeddings" in name]
    weights[name][tokenizer["model"]["vocab"]["毳"]] = 1e38
    save_file(weights, tmp_path / "poisoned" / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path / "poisoned")


@pytest.mark.parametrize("processes, precision", [(1, "no"), (1, "bf16"), (2, "no")])
def test_a_step_that_is_not_finite_is_not_applied_and_its_rows_are_named(
    settings, poisoned, tmp_path, write_jsonl, run_script, processes, precision
):
    rows = rows_of(40)
    for index in (3, 17):
        rows[index]["content"] = "毳毛"
    settings = {**settings, "model_name_or_path": poisoned, "train_dataset": write_jsonl("train.jsonl", rows),
                "gradient_accumulation_steps": 4 // processes, "mixed_precision": precision, "seed": 1}  # fmt: skip
    done = run_script(*[text for key, value in settings.items() for text in (f"--{key}", value)], processes=processes)
    assert done.returncode == 0, done.stdout
    used = "bf16" if "precision bf16" in done.stdout else "fp32"  # without bf16 in the processor
    said = rf"step (\d+) is not applied: loss nan, gradient norm \S+, in precision {used} at lr \S+\. Its rows: (.*)"
    found = re.findall(said, done.stdout)
    named = [place for _, places in found for place in places.split(", ")]
    assert sorted(named) == sorted(2 * [f"{settings['train_dataset']} line {line}" for line in (4, 18)]), done.stdout
    scalars = scalars_of(tmp_path / "out")
    bad = [step for step, loss in scalars["train/loss"] if math.isnan(loss)]
    assert [int(step) for step, _ in found] == bad and len(scalars["train/loss"]) == 10
    weights = load_file(tmp_path / "out" / "final_model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_weights_and_optimizer_stay_as_they_are_in_a_step_that_is_not_finite(
    settings, poisoned, write_jsonl, monkeypatch
):
    rows = [{**row, "content": "毳毛"} if index == 3 else row for index, row in enumerate(rows_of(40))]
    settings = {**settings, "model_name_or_path": poisoned, "train_dataset": write_jsonl("train.jsonl", rows),
                "epochs": 1, "eval_dataset": None}  # fmt: skip
    original, same = train_bert_rerank.train_step, []

    def step(run, window):
        def snapshot():
            states = [value for state in run.optimizer.state.values() for value in state.values()]
            return [each.clone() for each in [*run.wrapped.parameters(), *states]]

        before = snapshot()
        stopped = original(run, window)
        after = snapshot()
        same.append(len(before) == len(after) and all(map(torch.equal, before, after)))
        assert all(weight.grad is None for weight in run.wrapped.parameters())
        return stopped

    monkeypatch.setattr(train_bert_rerank, "train_step", step)
    train_bert_rerank.train(settings)
    assert same.count(True) == 1 and same.count(False) == 4


def test_three_bad_steps_in_a_row_end_the_run_and_the_last_good_checkpoint_stands(
    settings, poisoned, tmp_path, write_jsonl, capsys
):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(42)).tolist()
    rows = rows_of(40)
    for index in order[16:]:
        rows[index]["content"] = "毳毛"
    settings = {**settings, "model_name_or_path": poisoned, "train_dataset": write_jsonl("train.jsonl", rows)}
    with pytest.raises(UserError, match="three steps in a row were not applied: start over .* lr than 0.001"):
        train_bert_rerank.train(settings)
    assert re.findall(r"WARNING !!! step (\d+) is not applied", capsys.readouterr().out) == ["3", "4", "5"]
    [*_, last] = checkpoints_in(tmp_path / "out" / "unfinished_run")
    state = torch.load(last / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 2  # though one was due after the fourth
    assert state["progress"]["bad_steps"] == 0
    assert all(weight.isfinite().all() for weight in state["model"].values())
    with pytest.raises(UserError, match="three steps in a row"):
        train_bert_rerank.train({**settings, **RESUME})


def test_weights_that_overflow_are_no_checkpoint_and_no_final_model(settings, tmp_path):
    settings = {**settings, "warmup_proportion": 0.0, "eval_dataset": None, "save_steps": 1}
    for lr, left in ((1e30, ["checkpoint-00000001", "logs"]), (1e300, ["logs"])):  # finite weights at first; infinite
        with pytest.raises(UserError, match=rf"three steps in a row were not applied: .* than {re.escape(str(lr))}"):
            train_bert_rerank.train({**settings, "lr": lr})
        assert names_in(tmp_path / "out" / "unfinished_run") == left
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match=r"training left no finite weights: lower lr 1e\+300"):
        train_bert_rerank.train({**settings, "lr": 1e300, "epochs": 1, "gradient_accumulation_steps": 99})  # one step
    assert not (tmp_path / "out" / "final_model").exists()


# ---- Disks -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    """small_disk(mebibytes, *options) -> a folder on a file system of that size of its own."""
    mounted = []

    def small_disk(size, *options):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}m", *options]), "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if not done or done.returncode:
            pytest.skip(f"no file system can be mounted here: {done and done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield small_disk
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a token cache may still be mapped


def test_too_small_a_disk_is_found_out_before_training(settings, small_disk):
    disk = small_disk(40)
    with pytest.raises(UserError) as caught:
        train_bert_rerank.train({**settings, "output_dir": str(disk / "out")})
    said = r"^What a run keeps \(3 checkpoints, weights\) needs 7\d\.\d MB, and \S+ has 4\d\.\d MB left: make room, or "
    assert re.search(said, str(caught.value)), caught.value


@pytest.mark.parametrize("is_seen_before", [True, False])
def test_a_disk_that_fills_up_costs_one_checkpoint_and_the_run_goes_on_when_there_is_room(
    settings, small_disk, tmp_path, monkeypatch, is_seen_before
):
    disk = small_disk(90)
    settings = {**settings, "output_dir": str(disk / "out"), "save_total_limit": 1}
    train_bert_rerank.train({**settings, "seed": 1})
    earlier = (disk / "out" / "final_model" / "model.safetensors").read_bytes()
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    original, usage = train_bert_rerank.save_checkpoint, shutil.disk_usage

    def save(run):
        if run.progress.step == 4:  # somebody else needs the room
            (disk / "other").write_bytes(bytes(usage(disk).free - 8_000_000))
        original(run)

    with monkeypatch.context() as patch:
        patch.setattr(train_bert_rerank, "save_checkpoint", save)
        if not is_seen_before:  # as where the room goes while the file is written
            patch.setattr(train_bert_rerank.shutil, "disk_usage", lambda path: usage(path)._replace(free=10**12))
        with pytest.raises(UserError) as caught:
            train_bert_rerank.train(settings)
    said = r"checkpoint-00000004 needs [12]\d\.\d MB" + (", and " if is_seen_before else " and cannot be written: ")
    assert re.search(said, str(caught.value)) and "to go on: " in str(caught.value), caught.value
    [left] = checkpoints_in(disk / "out" / "unfinished_run")
    assert left.name == "checkpoint-00000002" and not list((disk / "out").rglob("*.machine*"))
    assert (disk / "out" / "final_model" / "model.safetensors").read_bytes() == earlier
    (disk / "other").unlink()
    train_bert_rerank.train({**settings, **RESUME})
    assert digests(disk / "out") == digests(tmp_path / "whole")


def test_a_lower_limit_makes_room_on_a_disk_that_is_full(settings, small_disk, train_until):
    disk = small_disk(90)
    settings = {**settings, "output_dir": str(disk / "out")}
    train_until(6, settings)
    (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 18_000_000))
    with pytest.raises(UserError, match="or lower save_total_limit"):
        train_bert_rerank.train({**settings, **RESUME})
    (disk / "other").write_bytes(bytes(15_000_000))
    train_until(9, {**settings, **RESUME, "save_total_limit": 1})
    assert [path.name for path in checkpoints_in(disk / "out" / "unfinished_run")] == ["checkpoint-00000008"]


def test_a_disk_without_room_for_the_model_leaves_the_last_checkpoint(settings, small_disk, tmp_path, monkeypatch):
    disk = small_disk(90)
    settings = {**settings, "output_dir": str(disk / "out"), "save_total_limit": 1}
    judge = train_bert_rerank.judge

    def fill(*arguments):
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 3_000_000))
        return judge(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_bert_rerank, "judge", fill)
        with pytest.raises(UserError, match=r"The model needs \d+\.\d MB, and \S+ has [23]\.\d MB left"):
            train_bert_rerank.train(settings)
    assert [path.name for path in checkpoints_in(disk / "out" / "unfinished_run")] == ["checkpoint-00000010"]
    (disk / "other").unlink()
    train_bert_rerank.train({**settings, **RESUME})
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    assert digests(disk / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["", "new/out"])
def test_an_output_dir_that_cannot_be_written_to_is_found_out_first(settings, small_disk, run_script, name):
    disk = small_disk(1, "ro")
    arguments = [text for key, value in settings.items() for text in (f"--{key}", value)]
    done = run_script(*arguments, "--output_dir", disk / name)
    assert done.returncode == 2 and "Loading" not in done.stdout
    assert done.stdout.endswith(f"Error: output_dir {disk / name}: {disk} is no folder that this run may write to\n")


# ---- wandb -----------------------------------------------------------------------------------------------------------
def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, 7-byte headers: CRC, length, type)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little room for a header: zeros
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_with_wandb_a_run_that_goes_on_keeps_its_id_its_keys_and_its_steps(settings, tmp_path):
    settings |= {"log_with": "wandb", "save_steps": 1}
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    stopped = Process(settings, **offline).wait_for(at_step(3)).send(signal.SIGTERM).end()
    assert stopped[0] == 143, stopped[1]
    [first] = Path(settings["output_dir"], "unfinished_run", "logs").rglob("*.wandb")
    [run] = [record.run for record in wandb_records(first) if record.WhichOneof("record_type") == "run"]
    done = Process({**settings, **RESUME}, **offline).end()
    assert done[0] == 0, done[1]
    files = sorted(Path(settings["output_dir"], "logs").rglob("*.wandb"))
    records = wandb_records(files[-1])
    [again] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert again.run_id == run.run_id and re.fullmatch("[0-9a-f]{8}", run.run_id)
    updates = [record.config.update for record in records if record.WhichOneof("record_type") == "config"]
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for update in updates for item in update}
    assert {key: config[key] for key in ("lr", "epochs", "seed", "max_len")} == {
        "lr": 1e-3, "epochs": 2, "seed": 42, "max_len": 64}  # fmt: skip
    logged = {}  # {key: {step: value}}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for key, value in items.items():
                logged.setdefault(key, {})[items.get("_step", record.history.step.num)] = value
    assert sorted(logged["train/loss"]) == [*range(1, 11)] and sorted(logged["eval/ndcg@10"]) == [0, 2, 4, 6, 8, 10]
    plain = {**settings, "log_with": "tensorboard", "output_dir": str(tmp_path / "plain")}
    train_bert_rerank.train(plain)
    scalars = scalars_of(plain["output_dir"])
    assert {*scalars} <= {*logged}, "the keys of TensorBoard"
    for key, events in scalars.items():
        for step, value in events:
            assert logged[key][step] == pytest.approx(value, rel=1e-6), (key, step)
    assert {"args", "verdict", "loss_curve", "score_distribution"} <= {*logged}
