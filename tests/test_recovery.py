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

import accelerate
import pytest
import torch
from conftest import ROOT, command_line, rows_of, write_rows
from safetensors.torch import load_file, save_file
from test_training import scalars_of, update_errors, without_dropout  # noqa: F401

import train_bert_rerank
from train_bert_rerank import RESULTS, UserError, checkpoints_in

WRITTEN = [name for name in RESULTS if name not in ("fine_tuned_model", "logs", "run.json")]  # bits that are compared
RESUME = {"resume_from_checkpoint": "latest"}
pytestmark = pytest.mark.usefixtures("small_pictures")


def digests(output_dir):
    """{file: SHA-256} of what has to be the same in two runs, and the scalars that were logged."""
    files = [path for name in WRITTEN for path in [Path(output_dir, name), *Path(output_dir, name).glob("*")]]
    found = {str(path.relative_to(output_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in files if path.is_file()}  # fmt: skip
    assert "final_model/model.safetensors" in found
    return found, scalars_of(output_dir)


@pytest.fixture(scope="module")
def usual_settings(tmp_path_factory, small_model):
    """Settings of a run of two epochs with five steps each, evaluated and saved every second one."""
    folder = tmp_path_factory.mktemp("recovery")
    return {"model_name_or_path": small_model, "train_dataset": write_rows(folder / "train.jsonl", rows_of(40)),
            "eval_dataset": write_rows(folder / "eval.jsonl", rows_of(42, 21)), "output_dir": str(folder / "out"),
            "max_len": 64, "epochs": 2, "lr": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 4, "save_steps": 2,
            "eval_steps": 2, "mixed_precision": "no", "base_interpolation": (0.5,)}  # fmt: skip


@pytest.fixture
def settings(usual_settings, tmp_path):
    """The usual settings, with a folder of the test's own to write to."""
    return {**usual_settings, "output_dir": str(tmp_path / "out")}


class Killed(BaseException):
    """What a test raises in the place of a kill."""


def train_until(step, settings):
    """Train, and let the process 'die' in that step, before anything of it is applied."""
    steps_done = [0]
    log, clip = accelerate.Accelerator.log, accelerate.Accelerator.clip_grad_norm_

    def note_step(accelerator, values, step=None, **options):
        log(accelerator, values, step=step, **options)
        if "train/loss" in values:
            steps_done.append(step)

    def die(*arguments):
        if steps_done[-1] + 1 == step:
            raise Killed
        return clip(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "log", note_step)
        patch.setattr(accelerate.Accelerator, "clip_grad_norm_", die)
        with pytest.raises(Killed):
            train_bert_rerank.train(settings)


@pytest.fixture(scope="module")
def whole(usual_settings, small_pictures):
    """(output folder, what train() returned) of a run with the usual settings that nothing interrupted."""
    folder = Path(usual_settings["output_dir"]).with_name("whole")
    return folder, train_bert_rerank.train({**usual_settings, "output_dir": str(folder)})


@pytest.fixture(scope="module")
def killed_run(usual_settings, small_pictures):
    """The output folder of a run that was killed in its sixth step, with checkpoints of steps 2 and 4."""
    folder = Path(usual_settings["output_dir"]).with_name("killed")
    train_until(6, {**usual_settings, "output_dir": str(folder)})
    return folder


@pytest.fixture
def killed(killed_run, tmp_path):
    """A copy of that folder in the place of the test's output_dir, in which `settings` go on: unfinished_run."""
    shutil.copytree(killed_run, tmp_path / "out")
    return tmp_path / "out" / "unfinished_run"


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ---- Real processes, real signals ------------------------------------------------------------------------------------
class Process:
    """The script in a process of its own, or in several under torchrun, and what it prints."""

    def __init__(self, settings, processes=1, script=ROOT / "train_bert_rerank.py", **environment):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        self.popen = subprocess.Popen(
            [sys.executable, *launcher, str(script), *command_line(settings)], stdout=subprocess.PIPE,
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


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL


@pytest.mark.parametrize("processes, numbers", [
    (1, SIGNALS), pytest.param(2, SIGNALS, marks=pytest.mark.slow),
    pytest.param(3, SIGNALS, marks=pytest.mark.soak),
], ids=["1", "2", "3"])  # fmt: skip
def test_stopped_by_each_signal_and_killed_a_run_goes_on_to_the_same_bits(settings, tmp_path, processes, numbers):
    settings = {**settings, "epochs": 4, "save_steps": 3, "gradient_accumulation_steps": 6 // processes}
    status, whole = Process({**settings, "output_dir": tmp_path / "whole"}, processes).end()
    assert status == 0, whole
    assert whole.count(f"processes: {processes}") == 1
    for step, number in zip((3, 6, 9, 13), numbers, strict=False):
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


LONG_STEP = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_bert_rerank
calls, clip = [], train_bert_rerank.Accelerator.clip_grad_norm_
def clip_late(*arguments):
    calls.append(1)
    if len(calls) == 2:
        print("a step of a minute", flush=True)
        time.sleep(60)
    return clip(*arguments)
train_bert_rerank.Accelerator.clip_grad_norm_ = clip_late
train_bert_rerank.main()
"""


def test_a_second_signal_ends_the_run_at_once_and_writes_no_checkpoint(settings, tmp_path):
    """While the second step, which lasts a minute, is done."""
    (tmp_path / "long_step.py").write_text(LONG_STEP, encoding="utf-8")
    settings = {**settings, "eval_dataset": None, "save_steps": 1}
    run = Process(settings, script=tmp_path / "long_step.py").wait_for("a step of a minute").send(signal.SIGTERM)
    time.sleep(5.2)  # what comes sooner may be the same signal, by way of a launcher
    status, output = run.send(signal.SIGTERM).end()
    assert status == -signal.SIGTERM and "Stopped by" not in output, output
    assert names_in(tmp_path / "out" / "unfinished_run") == ["checkpoint-00000001", "logs"]


def test_with_nothing_to_evaluate_a_signal_ends_the_run_after_the_step_in_which_it_came(
    settings, monkeypatch, tmp_path
):
    backward, clip, steps, sent = accelerate.Accelerator.backward, accelerate.Accelerator.clip_grad_norm_, [], []

    def signalled_backward(*arguments):
        if len(steps) == 2 and not sent:  # in the third step
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*arguments)

    monkeypatch.setattr(accelerate.Accelerator, "backward", signalled_backward)
    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", lambda *each: (steps.append(1), clip(*each))[1])
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # one that comes too late is not to end the tests
    try:
        with pytest.raises(UserError, match="^Stopped by SIGTERM after step 3 of 10; checkpoints are in ") as caught:
            train_bert_rerank.train({**settings, "eval_dataset": None})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.exit_status == 143 and len(steps) == 3
    assert names_in(tmp_path / "out" / "unfinished_run") == ["checkpoint-00000002", "checkpoint-00000003", "logs"]


def test_a_signal_after_the_last_look_for_one_is_not_lost(settings, monkeypatch, tmp_path):
    clip, steps, received = accelerate.Accelerator.clip_grad_norm_, [], []

    def signalled(*arguments):
        steps.append(1)
        if len(steps) == 10:  # the last step has just asked whether there is one
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*arguments)

    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", signalled)
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(len(steps)))
    try:
        train_bert_rerank.train({**settings, "eval_dataset": None})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [10]  # by the handler of the caller, who lets the run go on
    assert (tmp_path / "out" / "final_model" / "model.safetensors").exists()


LONG_EVALUATION = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_bert_rerank
forward = train_bert_rerank.BertRerankerModel.forward
def late(model, *arguments):
    time.sleep(0.0 if model.training else 0.05)
    return forward(model, *arguments)
train_bert_rerank.BertRerankerModel.forward = late
train_bert_rerank.main()
"""


def test_a_signal_cuts_an_evaluation_short_and_the_next_run_does_it_again(settings, tmp_path, write_jsonl):
    """An evaluation of some 80 micro-batches, which lasts four seconds."""
    (tmp_path / "long_evaluation.py").write_text(LONG_EVALUATION, encoding="utf-8")
    settings = {**settings, "eval_steps": 5, "eval_dataset": write_jsonl("eval.jsonl", rows_of(200, 67)),
                "base_interpolation": []}  # fmt: skip
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    run = Process(settings, script=tmp_path / "long_evaluation.py").wait_for("Start training")
    status, output = run.wait_for(r"Scoring: +[1-9]\d?%").send(signal.SIGTERM).end()
    assert status == 143 and "Stopped by SIGTERM after step 5 of 10" in output and "Step 5, epoch" not in output, output
    assert names_in(tmp_path / "out" / "unfinished_run")[:2] == ["checkpoint-00000004", "checkpoint-00000005"]
    train_bert_rerank.train({**settings, **RESUME})
    ours, theirs = (json.loads((tmp_path / name / "eval_report.json").read_text()) for name in ("out", "whole"))
    assert ours == theirs and [point["step"] for point in ours["history"]] == [0, 5, 10]


def test_outside_of_training_a_signal_ends_the_run_at_once(settings, tmp_path):
    for number, status in ((signal.SIGINT, -2), (signal.SIGTERM, -15)):
        assert Process(settings).wait_for("Training Args").send(number).end()[0] == status
        assert not (tmp_path / "out" / "unfinished_run").exists()


def test_handlers_of_the_caller_are_back_after_a_run_and_another_thread_may_train(settings):
    import threading

    settings = {**settings, "epochs": 1, "eval_dataset": None}
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
import gc, json, os, shutil, sys
sys.path.insert(0, {root!r})
import train_bert_rerank
settings, folder = json.loads(sys.argv[1]), sys.argv[2]
train_bert_rerank.BertRerankerModel.from_pretrained(settings["model_name_or_path"])  # which imports more
import matplotlib.backends.backend_agg, matplotlib.figure
gc.freeze()  # the children need not look at what was imported
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


@pytest.mark.parametrize("chosen", [slice(1, None, 15), pytest.param(slice(1, None), marks=pytest.mark.soak)])
def test_cut_off_before_any_change_of_the_disk_the_next_run_ends_with_the_same_bits(
    settings, tmp_path, write_jsonl, chosen
):
    """It replaces an earlier run's results, of another seed and with one more, so that their moving is cut off too."""
    settings = {**settings, "train_dataset": write_jsonl("train.jsonl", rows_of(24)), "save_steps": 1, "eval_steps": 1,
                "eval_dataset": write_jsonl("eval.jsonl", rows_of(10, 5)), "epochs": 1, "save_total_limit": 1,
                "base_interpolation": [], "log_with": None}  # fmt: skip
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


@pytest.mark.slow  # killed at moments that are chosen, not drawn: the test above; and by signals, the first
def test_killed_five_times_at_random_a_run_ends_with_the_same_bits():
    command = [sys.executable, ROOT / "benchmarks" / "soak_kill.py", "--kills", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and '{"kills": 5, "unusable states": 0, ' in done.stdout, done.stdout + done.stderr


# ---- What a checkpoint is --------------------------------------------------------------------------------------------
def test_by_default_each_epoch_ends_with_a_checkpoint_and_the_newest_two_are_kept(settings, tmp_path):
    folder = tmp_path / "out" / "unfinished_run"
    settings = {**settings, "epochs": 4, "eval_dataset": None}
    train_until(16, {**settings, "save_steps": None})
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-00000010", "checkpoint-00000015"]
    settings = {**settings, "save_steps": 4, "save_total_limit": 1}
    train_until(16, {**settings, "overwrite_output_dir": True})
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-00000012"]
    train_bert_rerank.train({**settings, **RESUME})
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


def test_a_checkpoint_holds_no_code_and_one_that_does_is_refused_unread(settings, killed, tmp_path):
    state = killed / "checkpoint-00000004" / "state.pt"
    assert torch.load(state, weights_only=True)["progress"]["step"] == 4

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"step": 4, "harm": Harmful()}, state)
    with pytest.raises(UserError, match="checkpoint-00000004 and the best weights beside it cannot be read"):
        train_bert_rerank.train({**settings, **RESUME})
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"rubbish" * 99])
def test_a_spoilt_checkpoint_is_an_error_and_the_older_one_goes_on(settings, killed, whole, tmp_path, spoil):
    older, newer = checkpoints_in(killed)
    (newer / "state.pt").write_bytes(spoil((newer / "state.pt").read_bytes()))
    with pytest.raises(UserError, match="checkpoint-00000004 and the best weights beside it cannot be read"):
        train_bert_rerank.train({**settings, **RESUME})
    run = train_bert_rerank.train({**settings, "resume_from_checkpoint": str(older)})
    assert run["resumed_from"] == str(older)
    assert digests(tmp_path / "out") == digests(whole[0])


def test_a_half_written_checkpoint_is_never_taken_for_one_and_goes(settings, killed):
    before = names_in(killed)
    half = killed / "checkpoint-00000005" / "state.machine.7"
    half.parent.mkdir()
    half.write_bytes(b"half")
    (killed / "best_weights-00000005.machine.7").write_bytes(b"half")
    train_until(6, {**settings, **RESUME})
    assert names_in(killed) == before


def test_going_on_from_an_older_checkpoint_leaves_no_newer_one_that_latest_would_take(
    settings, killed, whole, tmp_path
):
    older, newer = checkpoints_in(killed)
    (newer / "state.pt").write_bytes(b"spoilt")
    (killed / "best_weights-00000005.pt").write_bytes(b"of a run that was cut off before its checkpoint")
    train_until(7, {**settings, "resume_from_checkpoint": str(older), "save_total_limit": 1})  # killed once more
    assert [path.name for path in checkpoints_in(killed)] == ["checkpoint-00000006"]
    train_bert_rerank.train({**settings, **RESUME})
    assert digests(tmp_path / "out") == digests(whole[0])


def test_copies_that_a_user_made_are_neither_taken_for_checkpoints_nor_removed(settings, killed):
    [older, newer] = checkpoints_in(killed)
    older.rename(killed / "keep")
    shutil.copytree(newer, killed / "checkpoint-backup")
    train_until(8, {**settings, "resume_from_checkpoint": str(killed / "keep")})
    assert {"keep", "checkpoint-backup"} <= set(names_in(killed))
    assert [path.name for path in checkpoints_in(killed)] == ["checkpoint-00000004", "checkpoint-00000006"]
    train_bert_rerank.train({**settings, **RESUME})
    assert names_in(killed) == ["checkpoint-backup", "keep"]


def test_a_checkpoint_that_another_run_has_written_meanwhile_is_not_thrown_away(
    settings, killed, tmp_path, monkeypatch
):
    killed.rename(tmp_path / "other")
    load = train_bert_rerank.load_base
    monkeypatch.setattr(train_bert_rerank, "load_base",
                        lambda args: ((tmp_path / "other").rename(tmp_path / "out" / "unfinished_run"), load(args))[1])
    with pytest.raises(UserError, match="checkpoint-00000004 has come meanwhile: another run writes to"):
        train_bert_rerank.train(settings)
    assert len(checkpoints_in(tmp_path / "out" / "unfinished_run")) == 2


def test_a_resumed_run_keeps_no_checkpoint_open(settings, killed, monkeypatch):
    maps, save = [], train_bert_rerank.save_checkpoint
    monkeypatch.setattr(train_bert_rerank, "save_checkpoint",
                        lambda *each: (save(*each), maps.append(Path("/proc/self/maps").read_text())))
    train_bert_rerank.train({**settings, **RESUME})
    assert maps and not any(".pt" in each for each in maps)


# ---- Which run goes on -----------------------------------------------------------------------------------------------
def test_latest_starts_afresh_where_there_is_no_checkpoint_and_says_so(settings, tmp_path, capsys):
    train_bert_rerank.train({**settings, **RESUME, "epochs": 1, "eval_dataset": None})
    assert f"No checkpoint in {tmp_path}/out/unfinished_run: starting afresh." in capsys.readouterr().out


def test_latest_on_a_finished_run_says_so_and_changes_nothing(settings, whole, tmp_path, run_main, capsys):
    shutil.copytree(whole[0], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status, output = run_main(*command_line({**settings, **RESUME}))
    assert status == 0 and "Loading" not in output
    assert "A run with these settings has ended (data are not compared)" in output
    again = train_bert_rerank.train({**settings, **RESUME, "save_steps": 1, "log_with": None})
    assert again == json.loads(json.dumps(whole[1]))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    other = train_bert_rerank.train({**settings, **RESUME, "lr": 1e-4})  # another run, as without "latest"
    assert other["args"]["lr"] == 1e-4 and "starting afresh" in capsys.readouterr().out


def test_an_unfinished_run_is_not_thrown_away_unasked(settings, killed, run_main):
    before = names_in(killed)
    status, output = run_main(*command_line(settings))
    assert status == 2 and "Loading" not in output
    assert re.search(r"Error: \S+/unfinished_run holds checkpoint-00000004 of a run that has not ended.\n"
                     r"  to go on: .* --resume_from_checkpoint latest\n"
                     r"  to start over: .* --overwrite_output_dir true .*\n  to keep it: +another --output_dir\n$",
                     output), output  # fmt: skip
    assert names_in(killed) == before
    train_until(3, {**settings, "overwrite_output_dir": True})
    assert names_in(killed) == ["checkpoint-00000002", "logs"]


def test_both_going_on_and_starting_over_is_an_error(settings):
    with pytest.raises(UserError, match="set one of them"):
        train_bert_rerank.train({**settings, **RESUME, "overwrite_output_dir": True})


def test_a_folder_that_is_no_checkpoint_is_an_error_that_names_those_there_are(settings, killed):
    with pytest.raises(UserError, match="nowhere is no checkpoint; there are: .*0002, .*checkpoint-00000004$"):
        train_bert_rerank.train({**settings, "resume_from_checkpoint": "nowhere"})


def test_a_checkpoint_that_was_copied_elsewhere_goes_on_in_another_output_dir(settings, killed, whole, tmp_path):
    saved = torch.load(killed / "checkpoint-00000004" / "state.pt", weights_only=True)
    best_weights = f"best_weights-{saved['progress']['best_step']:08}.pt"
    shutil.copytree(killed / "checkpoint-00000004", tmp_path / "copy" / "checkpoint-00000004")
    other = {**settings, "output_dir": str(tmp_path / "other"),
             "resume_from_checkpoint": str(tmp_path / "copy" / "checkpoint-00000004")}  # fmt: skip
    with pytest.raises(UserError, match="best weights beside it cannot be read: .*best_weights-0000000"):
        train_bert_rerank.train(other)
    shutil.copy(killed / best_weights, tmp_path / "copy")
    train_bert_rerank.train(other)
    assert digests(tmp_path / "other") == digests(whole[0])
    assert names_in(tmp_path / "copy") == [best_weights, "checkpoint-00000004"]


# ---- What may change, and what is refused ----------------------------------------------------------------------------
def changed_rows(path):
    rows = [{**rows_of(40)[0], "content": "Anders."}, *rows_of(40)[1:]]
    return {"train_dataset": write_rows(path / "train.jsonl", rows)}


def changed_eval_rows(path):
    rows = rows_of(42, 21)
    return {"eval_dataset": write_rows(path / "eval.jsonl", [{**rows[0], "label": 1 - rows[0]["label"]}, *rows[1:]])}


def changed_model(small_model, path, part):
    folder = path / "changed"
    shutil.copytree(small_model, folder)
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
    "rows": (lambda _, path: changed_rows(path), r"train rows: \w{64} → \w{64}"),
    "eval rows": (lambda _, path: changed_eval_rows(path), r"eval rows: \w{64} → \w{64}"),
    "no evaluation": (lambda *_: {"eval_dataset": None}, r"eval rows: \w{64} → \w{64}"),
    "samples": (lambda *_: {"batch_size": 4}, r"samples of a step: 8 → 16"),
    "weights": (lambda model, path: changed_model(model, path, "weights"), r"base weights: \w{64} → \w{64}"),
    "config": (lambda model, path: changed_model(model, path, "config"), r"config: \w{64} → \w{64}"),
    "tokenizer": (lambda model, path: changed_model(model, path, "tokenizer"), r"tokenizer: \w{64} → \w{64}"),
}


@pytest.mark.parametrize("change, named", REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    settings, killed, small_model, tmp_path, change, named
):
    before = {path: path.read_bytes() for path in killed.rglob("*.pt")}
    with pytest.raises(UserError) as caught:
        train_bert_rerank.train({**settings, **change(small_model, tmp_path), **RESUME})
    said = (rf"\S*checkpoint-00000004 is of another run; from it to this one:\n  {named}\n"
            r"Set that back, or take another output_dir.\n  to start over: .*")  # fmt: skip
    assert re.fullmatch(said, str(caught.value)), caught.value
    assert caught.value.exit_status == 2
    assert {path: path.read_bytes() for path in killed.rglob("*.pt")} == before


def test_names_logging_and_memory_options_may_change_and_are_said(settings, killed, whole, tmp_path, capsys):
    shutil.copytree(settings["model_name_or_path"], tmp_path / "copy")
    shutil.copy(settings["train_dataset"], tmp_path / "moved.jsonl")
    (tmp_path / "out").rename(tmp_path / "out2")
    changes = {"model_name_or_path": str(tmp_path / "copy"), "train_dataset": str(tmp_path / "moved.jsonl"),
               "output_dir": str(tmp_path / "out2"), "gradient_checkpointing": True, "save_total_limit": 1,
               "save_steps": 3}  # fmt: skip
    train_bert_rerank.train({**settings, **changes, **RESUME})
    out = capsys.readouterr().out
    said = out[out.index("Going on after step 4, from ") :]
    assert said.splitlines()[0].endswith("checkpoint-00000004, with other")
    former = {**settings, "output_dir": str(whole[0].with_name("killed"))}
    assert all(f"  {key}: {former.get(key, '')}" in said for key in changes)
    [rows, others] = [(folder / "rows_to_check.jsonl").read_text("utf-8") for folder in (tmp_path / "out2", whole[0])]
    assert rows.replace(changes["train_dataset"], settings["train_dataset"]) == others
    weights = [load_file(folder / "final_model" / "model.safetensors") for folder in (tmp_path / "out2", whole[0])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert scalars_of(tmp_path / "out2") == scalars_of(whole[0])


@pytest.fixture(scope="module")
def runs_without_dropout(usual_settings, without_dropout, small_pictures):  # noqa: F811
    """(settings of a run without dropout, folder of one that nothing interrupted, folder of one killed in step 6)"""
    settings = {**usual_settings, "model_name_or_path": without_dropout, "load_best_model_at_end": False}
    folders = [Path(usual_settings["output_dir"]).with_name(f"{name}_without_dropout") for name in ("whole", "killed")]
    train_bert_rerank.train({**settings, "output_dir": str(folders[0])})
    train_until(6, {**settings, "output_dir": str(folders[1])})
    return settings, *folders


@pytest.mark.parametrize("changes, bound", [
    ({"micro_batch_tokens": 100}, 100),
    ({"micro_batch_tokens": None}, 128),
    ({"micro_batch_tokens": None, "batch_size": 1, "gradient_accumulation_steps": 8}, 64),
])  # fmt: skip
def test_with_another_bound_the_same_samples_make_the_same_steps(runs_without_dropout, tmp_path, changes, bound):
    settings, whole, killed = runs_without_dropout
    shutil.copytree(killed, tmp_path / "out")
    run = train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "out"), **changes, **RESUME})
    assert run["micro_batch_tokens"] == bound
    check_agreement(tmp_path / "out", whole, settings["model_name_or_path"])


@pytest.mark.parametrize("bound, tokens", [(None, 128), (100, 100)])
def test_with_auto_a_checkpoint_goes_on_with_the_bound_that_it_has(settings, tmp_path, capsys, bound, tokens):
    settings = {**settings, "micro_batch_tokens": bound}  # None: as older versions had it
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    train_until(6, settings)
    capsys.readouterr()
    changed = {"micro_batch_tokens": "auto", "batch_size": 1, "gradient_accumulation_steps": 8}
    assert train_bert_rerank.train({**settings, **changed, **RESUME})["micro_batch_tokens"] == tokens
    assert f"micro-batches of up to {tokens} tokens, as the checkpoint has them" in capsys.readouterr().out
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_bound_of_batch_size_follows_another_batch_size(settings):
    settings = {**settings, "micro_batch_tokens": None}
    train_until(6, settings)
    changed = {"batch_size": 1, "gradient_accumulation_steps": 8}
    assert train_bert_rerank.train({**settings, **changed, **RESUME})["micro_batch_tokens"] == 64


def check_agreement(folder, other, model):
    """That the runs in two folders agree but for rounding."""
    ours, theirs = scalars_of(folder), scalars_of(other)
    assert ours["train/lr"] == theirs["train/lr"] and len(ours["train/lr"]) == 10
    for tag in ("train/loss", "train/grad_norm"):
        assert [value for _, value in ours[tag]] == pytest.approx([value for _, value in theirs[tag]], rel=1e-3)
    weights = [load_file(each / "final_model" / "model.safetensors") for each in (folder, other)]
    assert max(update_errors(*weights, load_file(f"{model}/model.safetensors")).values()) < 1e-2


def test_two_processes_go_on_where_one_stopped(runs_without_dropout, tmp_path):
    settings, whole, killed = runs_without_dropout
    shutil.copytree(killed, tmp_path / "out")
    settings = {**settings, "output_dir": str(tmp_path / "out"), "gradient_accumulation_steps": 2}
    status, output = Process({**settings, **RESUME}, processes=2).end()
    assert status == 0, output
    assert "  processes: 1 → 2\n" in output and "  gradient_accumulation_steps: 4 → 2\n" in output
    check_agreement(tmp_path / "out", whole, settings["model_name_or_path"])


def test_the_bound_that_out_of_memory_left_is_in_force_again(settings, tmp_path, monkeypatch, capsys):
    from test_memory import fails_above

    settings = {**settings, "micro_batch_tokens": 512}
    fails_above(128, monkeypatch)
    train_bert_rerank.train({**settings, "output_dir": str(tmp_path / "whole")})
    train_until(6, settings)
    capsys.readouterr()
    assert train_bert_rerank.train({**settings, **RESUME})["micro_batch_tokens"] == 128
    assert "Out of memory" not in capsys.readouterr().out
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_early_stopping_and_a_new_head_are_remembered(settings, small_model, tmp_path):
    shutil.copytree(small_model, tmp_path / "plain")
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
def poisoned(small_model, tmp_path):
    """A model that a row with 毳 overflows, and no other: its weights are finite, its output is NaN."""
    shutil.copytree(small_model, tmp_path / "poisoned")
    tokenizer = json.loads((tmp_path / "poisoned" / "tokenizer.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "poisoned" / "model.safetensors")
    [name] = [name for name in weights if "word_embeddings" in name]
    weights[name][tokenizer["model"]["vocab"]["毳"]] = 1e38
    save_file(weights, tmp_path / "poisoned" / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path / "poisoned")


@pytest.mark.parametrize("processes, precision", [(1, "no"), (1, "bf16"), (2, "no")])
def test_a_step_that_is_not_finite_is_not_applied_and_its_rows_are_named(
    settings, poisoned, tmp_path, write_jsonl, run_main, run_script, processes, precision
):
    rows = rows_of(40)
    for index in (3, 17):
        rows[index]["content"] = "毳毛"
    settings = {**settings, "model_name_or_path": poisoned, "train_dataset": write_jsonl("train.jsonl", rows),
                "gradient_accumulation_steps": 4 // processes, "mixed_precision": precision, "seed": 1}  # fmt: skip
    if processes == 1:
        status, output = run_main(*command_line(settings))
    else:
        done = run_script(*command_line(settings), processes=processes)
        status, output = done.returncode, done.stdout
    assert status == 0, output
    used = "bf16" if "precision bf16" in output else "fp32"  # without bf16 in the processor
    said = rf"step (\d+) is not applied: loss nan, gradient norm \S+, in precision {used} at lr \S+\. Its rows: (.*)"
    found = re.findall(said, output)
    named = [place for _, places in found for place in places.split(", ")]
    assert sorted(named) == sorted(2 * [f"{settings['train_dataset']} line {line}" for line in (4, 18)]), output
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
    disk = small_disk(4)
    with pytest.raises(UserError) as caught:
        train_bert_rerank.train({**settings, "output_dir": str(disk / "out")})
    said = r"^What a run keeps \(3 checkpoints, weights\) needs 7\.\d MB, and \S+ has 4\.\d MB left: make room, or "
    assert re.search(said, str(caught.value)), caught.value


@pytest.mark.parametrize("is_seen_before", [True, False])
def test_a_disk_that_fills_up_costs_one_checkpoint_and_the_run_goes_on_when_there_is_room(
    settings, whole, small_disk, monkeypatch, is_seen_before
):
    disk = small_disk(9)
    settings = {**settings, "output_dir": str(disk / "out"), "save_total_limit": 1}
    train_bert_rerank.train({**settings, "epochs": 1})
    earlier = (disk / "out" / "final_model" / "model.safetensors").read_bytes()
    original, usage = train_bert_rerank.save_checkpoint, shutil.disk_usage

    def save(run):
        if run.progress.step == 4:  # somebody else needs the room
            (disk / "other").write_bytes(bytes(usage(disk).free - 800_000))
        original(run)

    with monkeypatch.context() as patch:
        patch.setattr(train_bert_rerank, "save_checkpoint", save)
        if not is_seen_before:  # as where the room goes while the file is written
            patch.setattr(train_bert_rerank.shutil, "disk_usage", lambda path: usage(path)._replace(free=10**12))
        with pytest.raises(UserError) as caught:
            train_bert_rerank.train(settings)
    said = r"checkpoint-00000004 needs [12]\.\d MB" + (", and " if is_seen_before else " and cannot be written: ")
    assert re.search(said, str(caught.value)) and "to go on: " in str(caught.value), caught.value
    [left] = checkpoints_in(disk / "out" / "unfinished_run")
    assert left.name == "checkpoint-00000002" and not list((disk / "out").rglob("*.machine*"))
    assert (disk / "out" / "final_model" / "model.safetensors").read_bytes() == earlier
    (disk / "other").unlink()
    train_bert_rerank.train({**settings, **RESUME})
    assert digests(disk / "out") == digests(whole[0])


def test_a_lower_limit_makes_room_on_a_disk_that_is_full(settings, small_disk, killed_run):
    disk = small_disk(9)
    settings = {**settings, "output_dir": str(disk / "out")}
    shutil.copytree(killed_run, disk / "out")
    (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 1_800_000))
    with pytest.raises(UserError, match="or lower save_total_limit"):
        train_bert_rerank.train({**settings, **RESUME})
    (disk / "other").write_bytes(bytes(1_500_000))
    train_until(9, {**settings, **RESUME, "save_total_limit": 1})
    assert [path.name for path in checkpoints_in(disk / "out" / "unfinished_run")] == ["checkpoint-00000008"]


def test_a_disk_without_room_for_the_model_leaves_the_last_checkpoint(settings, whole, small_disk, monkeypatch):
    disk = small_disk(9)
    settings = {**settings, "output_dir": str(disk / "out"), "save_total_limit": 1}
    judge = train_bert_rerank.judge

    def fill(*arguments):
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
        return judge(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_bert_rerank, "judge", fill)
        with pytest.raises(UserError, match=r"The model needs \d+\.\d MB, and \S+ has 0\.[23] MB left"):
            train_bert_rerank.train(settings)
    assert [path.name for path in checkpoints_in(disk / "out" / "unfinished_run")] == ["checkpoint-00000010"]
    (disk / "other").unlink()
    train_bert_rerank.train({**settings, **RESUME})
    assert digests(disk / "out") == digests(whole[0])


@pytest.mark.parametrize("name", ["", "new/out"])
def test_an_output_dir_that_cannot_be_written_to_is_found_out_first(settings, small_disk, run_main, name):
    disk = small_disk(1, "ro")
    status, output = run_main(*command_line({**settings, "output_dir": disk / name}))
    assert status == 2 and "Loading" not in output
    assert output.endswith(f"Error: output_dir {disk / name}: {disk} is no folder that this run may write to\n")


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


@pytest.mark.slow
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


# ---- What a stop and a checkpoint need, and no more ------------------------------------------------------------------
def test_a_stop_on_a_full_disk_that_has_nothing_to_write_ends_as_a_stop(settings, monkeypatch):
    evaluate, usage = train_bert_rerank.evaluate, shutil.disk_usage

    def stopped(run, step=0, base_interpolation=0.0):
        if step == 0:
            return evaluate(run)
        assert checkpoints_in(run.folder)[-1].name.endswith("00000002")  # saved before it is evaluated
        monkeypatch.setattr(train_bert_rerank.shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
        return None  # as where a signal came meanwhile

    monkeypatch.setattr(train_bert_rerank, "evaluate", stopped)
    with pytest.raises(UserError, match="Stopped by SIGTERM after step 2 of 10") as stop:
        train_bert_rerank.train(settings)
    assert stop.value.exit_status == 128 + signal.SIGTERM


def test_a_checkpoint_holds_the_scores_of_the_base_and_the_best_evaluation_alone(killed, whole):
    [*_, last] = checkpoints_in(killed)
    candidates = torch.load(last / "state.pt", weights_only=True)["progress"]["candidates"]
    assert [candidate["step"] for candidate in candidates] == [0, 2]  # that of step 4 is evaluated after it is saved
    assert [candidate["scores"] is None for candidate in candidates] == [False, False]


def test_of_many_evaluations_the_results_come_out_though_only_two_keep_their_scores(settings, tmp_path, monkeypatch):
    kept, drop_scores = [], train_bert_rerank.drop_scores

    def note(candidates, args):
        drop_scores(candidates, args)
        kept.append([candidate.step for candidate in candidates if candidate.scores is not None])

    monkeypatch.setattr(train_bert_rerank, "drop_scores", note)
    report = train_bert_rerank.train({**settings, "eval_steps": 1})["report"]
    best = report["chosen"] if report["chosen"] != "base" else None
    assert len(kept) == 11 and all(len(steps) <= 2 and steps[0] == 0 for steps in kept)
    assert len(report["history"]) == 11
    if best:
        assert kept[-1] == [0, best["step"]]
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 42 and all(0 <= row["score_after"] <= 1 for row in rows)


@pytest.mark.parametrize("edit, is_said", [
    (("    return (len(groups) - 1)", "    return (len(groups) - 1)"), False),
    (('"save_steps": None,', '"save_steps": 2,'), False),
    (("class UserError(Exception):", "# edited\n\n\nclass UserError(Exception):"), True),
], ids=["as it was", "args edited", "code edited"])  # fmt: skip
def test_going_on_with_another_script_is_said(settings, killed, tmp_path, edit, is_said):
    source = (ROOT / "train_bert_rerank.py").read_text(encoding="utf-8")
    (tmp_path / "train_bert_rerank.py").write_text(source.replace(*edit), encoding="utf-8")
    command = [sys.executable, str(tmp_path / "train_bert_rerank.py"), *command_line({**settings, **RESUME})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert ("script_sha256: " in done.stdout) == is_said
    assert "Going on after step 4" in done.stdout


class CpuScaler:
    """Makes accelerators that scale gradients as in fp16, by torch's own scaler, on the CPU."""

    def __init__(self, monkeypatch):
        original = train_bert_rerank.make_accelerator

        def make(args, run_dir, precision):
            accelerator = original(args, run_dir, "no")
            accelerator.state._mixed_precision = "fp16"
            accelerator.native_amp = True
            accelerator.autocast_handler = accelerate.utils.AutocastKwargs(enabled=False)  # in fp32, but scaled
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
            return accelerator

        monkeypatch.setattr(train_bert_rerank, "make_accelerator", make)


def test_a_loss_that_is_not_finite_leaves_the_fp16_scaler_ready_for_the_next_step(
    settings, poisoned, write_jsonl, monkeypatch, capsys
):
    CpuScaler(monkeypatch)
    rows = [{**row, "content": "毳毛"} if index == 3 else row for index, row in enumerate(rows_of(40))]
    settings = {**settings, "model_name_or_path": poisoned, "train_dataset": write_jsonl("train.jsonl", rows),
                "epochs": 1, "eval_dataset": None}  # fmt: skip
    train_bert_rerank.train(settings)
    out = capsys.readouterr().out
    assert out.count("is not applied: loss nan") == 1 and "Model saved successfully!" in out


def test_three_losses_in_a_row_that_are_not_finite_end_a_run_in_fp16_too(settings, poisoned, write_jsonl, monkeypatch):
    CpuScaler(monkeypatch)
    rows = [{**row, "content": "毳毛"} for row in rows_of(40)]
    settings = {**settings, "model_name_or_path": poisoned, "train_dataset": write_jsonl("train.jsonl", rows)}
    with pytest.raises(UserError, match="three steps in a row were not applied"):
        train_bert_rerank.train({**settings, "eval_dataset": None})
