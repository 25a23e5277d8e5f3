"""Where people run it: notebooks, zip files, pipes that nobody reads, folders of other machines, names of another
encoding, a process that does other things too, an environment made for accelerate."""

import builtins
import errno
import json
import logging
import mmap
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, rows_of, write_rows

import train_bert_rerank
from train_bert_rerank import BertRerankerModel, UserError, flush_to_disk, json_bytes, seed_everything, train

SCRIPT = ROOT / "train_bert_rerank.py"
GBK = os.fsdecode("数据".encode("gbk"))  # as Python has a name whose bytes are no UTF-8
pytestmark = pytest.mark.usefixtures("small_pictures")


@pytest.fixture
def settings(small_model, tmp_path):
    """Settings of a run of a second, into out/ of the test's folder."""
    return {"model_name_or_path": small_model, "train_dataset": write_rows(tmp_path / "rows.jsonl", rows_of(16, 4)),
            "eval_proportion": 0.5, "epochs": 1, "max_len": 32, "mixed_precision": "no", "base_interpolation": (),
            "log_with": None, "output_dir": str(tmp_path / "out")}  # fmt: skip


def weights_of(settings):
    """The bytes of the weights that a run left."""
    return Path(settings["output_dir"], "final_model", "model.safetensors").read_bytes()


def is_complete(settings):
    """Whether a run with these settings has ended well."""
    return Path(settings["output_dir"], "run.json").exists()


def python(arguments, tmp_path, **options):
    """Popen of this Python in the test's folder."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=tmp_path, text=True, encoding="utf-8", **options)


# ---- Output that nobody reads ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_goes_on_to_its_end_when_nobody_reads_its_output_any_more(settings, tmp_path, merged):
    stderr = subprocess.STDOUT if merged else subprocess.DEVNULL
    process = python([SCRIPT, *command_line(settings)], tmp_path, stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdout.readline().startswith("Training Args")
    process.stdout.close()
    assert process.wait(300) == 0 and is_complete(settings)


@pytest.mark.slow
def test_a_run_goes_on_to_its_end_when_its_terminal_has_gone(settings, tmp_path):
    ours, theirs = pty.openpty()
    process = python([SCRIPT, *command_line(settings)], tmp_path, stdin=subprocess.DEVNULL, stdout=theirs,
                     stderr=theirs, start_new_session=True)  # fmt: skip
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert process.wait(300) == 0 and is_complete(settings)


@pytest.mark.parametrize("closed", [
    ">&-", pytest.param("2>&-", marks=pytest.mark.slow), pytest.param("<&- >&- 2>&-", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_needs_no_output(settings, tmp_path, closed):
    command = subprocess.list2cmdline([sys.executable, str(SCRIPT)])
    options = [f"'{text}'" for text in command_line(settings)]
    done = subprocess.run(["bash", "-c", f"{command} {' '.join(options)} {closed}"], cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and is_complete(settings)


@pytest.mark.slow
def test_a_full_disk_behind_the_output_is_one_error(settings, tmp_path):
    with open("/dev/full", "w") as full:
        process = python([SCRIPT, *command_line(settings)], tmp_path, stdout=full, stderr=subprocess.PIPE)
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and errors.splitlines() == [
        "Error: [Errno 28] No space left on device: 'output of this command'"
    ]


@pytest.mark.slow
def test_train_in_a_users_own_program_says_what_its_terminal_cannot_show_with_question_marks(settings, tmp_path):
    settings["output_dir"] = str(tmp_path / "输出")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from train_bert_rerank import train; train({settings!r})"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = python(["-c", code], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    assert "/??" in process.communicate(timeout=300)[0] and process.returncode == 0 and is_complete(settings)


# ---- Where the source is ---------------------------------------------------------------------------------------------
CALL = "import train_bert_rerank; train_bert_rerank.main()"


def run_elsewhere(arguments, tmp_path, **options):
    """(exit status, lines printed) of this Python, which finds modules in the test's folder."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = python(arguments, tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    return process.wait(300), process.stdout.read().splitlines()


def test_a_run_from_a_zip_file_reads_its_settings_there(settings, tmp_path):
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.write(SCRIPT, "train_bert_rerank.py")
    code = f"import sys; sys.path.insert(0, 'code.zip'); {CALL}"
    status, lines = run_elsewhere(["-c", code, *command_line(settings)], tmp_path)
    assert status == 0 and is_complete(settings), lines[-1]


def test_a_compiled_file_alone_loads_models_and_says_that_the_settings_are_missing(small_model, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    code = "import py_compile; py_compile.compile('train_bert_rerank.py', 'code.pyc')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    (tmp_path / "train_bert_rerank.py").unlink()
    (tmp_path / "code.pyc").rename(tmp_path / "train_bert_rerank.pyc")
    code = f"from train_bert_rerank import *; BertRerankerModel.from_pretrained({small_model!r}).predict(('', ''))"
    assert run_elsewhere(["-c", code], tmp_path)[0] == 0
    status, lines = run_elsewhere(["-c", CALL, "--help"], tmp_path)
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("Error: the source of main(), where the settings stand, is missing")


@pytest.mark.slow
def test_source_from_standard_input_or_exec_is_one_error_that_says_what_is_missing(tmp_path):
    with open(SCRIPT) as source:
        status, lines = run_elsewhere(["-", "--epochs", "1"], tmp_path, stdin=source)
    assert status == 2 and len(lines) == 1 and "source of main()" in lines[0]
    status, lines = run_elsewhere(["-c", f"exec(open({str(SCRIPT)!r}, encoding='utf-8').read())"], tmp_path)
    assert status == 2 and len(lines) == 1 and "source of main()" in lines[0]


def test_a_main_of_a_users_own_in_place_of_the_scripts_is_one_error(monkeypatch, settings):
    monkeypatch.setattr(train_bert_rerank, "main", test_a_main_of_a_users_own_in_place_of_the_scripts_is_one_error)
    with pytest.raises(UserError, match="another main\\(\\) has taken its place"):
        train(settings)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["run", "train twice", "main after import", "pasted, train", "pasted, main"])
def test_a_notebook_gives_the_weights_and_the_text_of_the_command(way, small_model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import notebooks

    values, weights, text = notebooks.prepare(tmp_path, small_model)
    found_weights, found_text = notebooks.outcome_of(way, tmp_path, values)
    assert found_weights == weights and found_text.endswith(text)


def test_main_in_a_kernel_or_console_takes_its_arguments_for_no_settings(monkeypatch, settings):
    monkeypatch.setattr(train_bert_rerank, "train", lambda args: given.update(args))
    given = {}
    main_module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main_module)
    monkeypatch.setattr(builtins, "get_ipython", object, raising=False)
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "/run/kernel-1.json"])
    train_bert_rerank.main()
    assert set(given) == set(train_bert_rerank.read_settings()) and given["epochs"] == 3

    monkeypatch.setattr(sys, "argv", ["train_bert_rerank.py", "--epochs", "7"])
    main_module.__file__ = "train_bert_rerank.py"  # as with %run
    train_bert_rerank.main()
    assert given["epochs"] == 7
    del main_module.__file__
    monkeypatch.delattr(builtins, "get_ipython")  # as with python -c, or where another program embeds Python
    monkeypatch.setattr(sys, "argv", ["-c", "--epochs", "8"])
    train_bert_rerank.main()
    assert given["epochs"] == 8


def test_main_needs_no_file_behind_the_output_nor_the_main_thread(run_main, settings):
    statuses = []

    def run():
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            statuses.append(run_main(*command_line(settings))[0])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert statuses == [0] and is_complete(settings)


# ---- A process that does other things too ----------------------------------------------------------------------------
def state_of_process():
    """All that a run might change in its process, by name."""
    backends = torch.backends
    state = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "matmul": (backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "streams": (sys.stdout, sys.stderr),
        "logging": logging.getLogger("transformers").level,
        "environment": dict(os.environ),
    }
    if hasattr(backends.cudnn, "conv"):
        places = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul)
        state["fp32_precision"] = [place.fp32_precision for place in places]
    return state


@pytest.fixture
def state_of_a_users_own(monkeypatch):
    """A process whose settings are none that a run would set."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    precision = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("medium")
    random.seed(7)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("changes", [{}, {"epochs": 0}, {"max_len": 10**6}, {"train_dataset": "missing"}],
                         ids=["ended", "evaluated", "refused later", "refused at once"])  # fmt: skip
def test_train_leaves_its_process_as_it_was(settings, changes, state_of_a_users_own):
    before = state_of_process()
    with suppress(UserError):
        train({**settings, **changes})
    after = state_of_process()
    assert {key for key in before if before[key] != after[key]} == set()


def test_main_leaves_the_handler_of_ctrl_c_and_the_verbosity_of_transformers_as_they_were(run_main):
    before = state_of_process()
    assert run_main("--train_dataset", "missing")[0] == 1
    assert {key for key in before if before[key] != state_of_process()[key]} <= {"streams"}  # pytest's own


def test_seed_everything_itself_stays_in_force():
    seed_everything(1)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch before 2.9 has no such names")
@pytest.mark.slow
def test_a_process_that_sets_precision_by_its_newer_name_keeps_it(settings, tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
torch.backends.cuda.matmul.fp32_precision = "tf32"
from train_bert_rerank import train
train({settings!r})
assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""
    process = python(["-c", code], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.wait(300) == 0, process.stdout.read()


# ---- Threads ---------------------------------------------------------------------------------------------------------
def test_threads_that_share_a_model_get_the_scores_that_each_would_get_alone(small_model):
    model = BertRerankerModel.from_pretrained(small_model)
    model.tokenizer("a", truncation=True, max_length=4, padding="max_length")  # leaves it cutting and padding
    lists = [[(row["query"], row["content"] * 5) for row in rows_of(20)][number:] for number in range(8)]
    expected = [model.predict(pairs) for pairs in lists]
    model.tokenizer("a", truncation=True, max_length=4, padding="max_length")
    wrong, started = [], threading.Barrier(8)

    def score(number):
        started.wait()
        for _ in range(15):
            try:
                if not np.array_equal(model.predict(lists[number]), expected[number]):
                    wrong.append("other scores")
                model.rank("问", [document for _, document in lists[number]])
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=score, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- Names of another encoding ---------------------------------------------------------------------------------------
def test_a_data_file_whose_name_is_no_utf_8_is_named_in_all_that_a_run_writes(settings, tmp_path):
    settings["train_dataset"] = write_rows(tmp_path / f"{GBK}.jsonl", rows_of(16, 4))
    train({**settings, "log_with": "tensorboard"})
    out = Path(settings["output_dir"])
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["file"] for row in rows} == {settings["train_dataset"]}
    assert json.loads((out / "run.json").read_bytes())["args"]["train_dataset"] == settings["train_dataset"]
    assert json.loads((out / "eval_report.json").read_bytes())["dataset"] == settings["train_dataset"]


@pytest.mark.parametrize("value", [GBK, {"a": [f"x{GBK}y", "模型"]}, "\ud800", "\\udcca", "𠮷", 'a"\n\\'])
def test_what_is_written_as_json_is_valid_utf_8_and_reads_back_the_same(value):
    assert json.loads(json_bytes(value).decode("utf-8")) == value


@pytest.mark.parametrize("key", ["model_name_or_path", "output_dir", "train_dataset", "query_format"])
def test_a_name_that_a_library_cannot_take_is_refused_at_once(settings, tmp_path, key):
    path = str(tmp_path / GBK) + ("{}" if key == "query_format" else "")
    with pytest.raises(UserError, match=f"^{key} .*: its bytes are no text in utf-8.*PYTHONUTF8=1"):
        train({**settings, "log_with": "wandb" if key == "train_dataset" else None, key: path})


# ---- File systems of other machines ----------------------------------------------------------------------------------
def refuse(number, only=lambda _: True):
    """A function that raises OSError `number`, without a path, as system calls do."""

    def call(descriptor, *_, **__):
        if only(descriptor):
            raise OSError(number, os.strerror(number))

    return call


def is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_a_run_ends_well_where_folders_cannot_be_flushed_nor_files_mapped(settings, monkeypatch, capsys, number):
    train(settings)
    expected = weights_of(settings)
    monkeypatch.setattr(os, "fsync", refuse(number, is_folder))
    monkeypatch.setattr(mmap, "mmap", refuse(number if number != errno.EBADF else errno.ENODEV))
    train(settings)
    assert weights_of(settings) == expected
    assert "cannot be mapped into memory there" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_ends_the_run_and_is_named(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=str(tmp_path)) as failure:
        flush_to_disk(tmp_path)
    assert failure.value.errno == number and os.listdir("/proc/self/fd") == descriptors, "left open"


def test_no_memory_to_map_a_file_into_is_no_file_system_without_mapping(settings, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", refuse(errno.ENOMEM))
    with pytest.raises(OSError, match="Cannot allocate memory"):
        train(settings)


# ---- accelerate's environment ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("variable, value", [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8"), ("ACCELERATE_MIXED_PRECISION", "fp16"),
    ("ACCELERATE_MIXED_PRECISION", "fp8"), ("ACCELERATE_DOWNCAST_BF16", "true"), ("ACCELERATE_DEBUG_MODE", "true"),
    ("ACCELERATE_GRADIENT_CLIPPING", "0.001"), ("ACCELERATE_DYNAMO_BACKEND", "NO"), ("ACCELERATE_USE_FSDP", "False"),
    ("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO"), ("FORK_LAUNCHED", "1"),
])  # fmt: skip
def test_what_accelerate_finds_in_the_environment_changes_no_weight(settings, monkeypatch, variable, value):
    train(settings)
    expected = weights_of(settings)
    monkeypatch.setenv(variable, value)
    train(settings)
    assert weights_of(settings) == expected


@pytest.mark.parametrize("variable, value", [
    ("ACCELERATE_USE_FSDP", "True"), ("ACCELERATE_USE_FSDP", "1"), ("ACCELERATE_USE_DEEPSPEED", "true"),
    ("ACCELERATE_USE_MEGATRON_LM", "true"), ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
    ("ACCELERATE_USE_TP", "true"), ("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "DATA_PARALLEL"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"), ("ACCELERATE_FP8_BACKEND", "TE"), ("ACCELERATE_TORCH_DEVICE", "cuda:1"),
])  # fmt: skip
def test_what_accelerate_is_asked_for_in_vain_is_refused_by_name(run_main, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    status, text = run_main()
    assert status == 2 and text.startswith("Error: accelerate asks for ") and f"unset {variable}" in text


def test_the_cpu_is_refused_by_name_only_where_it_is_not_what_the_run_would_take(monkeypatch, settings):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(UserError, match="unset ACCELERATE_USE_CPU"):
        train(settings)


# ---- In whatever mode the caller is ----------------------------------------------------------------------------------
@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype, "it is the caller's"
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        assert torch.empty(0).device.type == device, "it is the caller's"
        torch.set_default_device(None)


MODES = {
    "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16), "default device": lambda: default_device("meta"),
}  # fmt: skip


@pytest.fixture(scope="module")
def usual_weights(small_model, tmp_path_factory):
    """The weights that a run leaves that is started from no mode at all."""
    folder = tmp_path_factory.mktemp("usual")
    settings = {"model_name_or_path": small_model, "train_dataset": write_rows(folder / "rows.jsonl", rows_of(16, 4)),
                "eval_proportion": 0.5, "epochs": 1, "max_len": 32, "mixed_precision": "no", "base_interpolation": (),
                "log_with": None, "output_dir": str(folder / "out")}  # fmt: skip
    train(settings)
    return weights_of(settings)


@pytest.mark.parametrize("mode", MODES)
def test_train_gives_the_same_weights_in_whatever_mode_of_torch_it_is_called(settings, usual_weights, mode):
    with MODES[mode]():
        train(settings)
    assert weights_of(settings) == usual_weights


def test_in_a_callers_autocast_each_step_in_bf16_computes_with_the_weights_of_the_step_before(settings, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    settings = {**settings, "mixed_precision": "bf16", "lr": 1e-2, "epochs": 3, "eval_dataset": None}
    train(settings)
    expected = weights_of(settings)
    with torch.autocast("cpu", torch.bfloat16):
        train(settings)
    assert weights_of(settings) == expected
    casts = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: casts.append(clear()))
    train(settings)
    assert len(casts) >= 6, "the casts of each forward are let go"


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "default float64", "default float16"])
def test_a_model_is_loaded_and_scores_the_same_in_whatever_mode_of_torch(small_model, mode):
    pairs = [("问", "答" * 9), ("怎么办", "请看说明书。")]
    expected = BertRerankerModel.from_pretrained(small_model).predict(pairs)
    with MODES[mode]():
        scores = BertRerankerModel.from_pretrained(small_model).predict(pairs)
    assert scores.tolist() == expected.tolist()


def test_of_two_runs_in_two_threads_the_second_is_refused_and_the_first_is_what_it_would_be_alone(
    settings, usual_weights, monkeypatch
):
    refusals, original = [], train_bert_rerank.fit_bias

    def beside(run):
        def second():
            try:
                train({**settings, "output_dir": settings["output_dir"] + "_second"})
            except UserError as error:
                refusals.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return original(run)

    monkeypatch.setattr(train_bert_rerank, "fit_bias", beside)
    train(settings)
    assert refusals == ["a run is going on in this process: begin another when it has ended"]
    assert weights_of(settings) == usual_weights and not Path(settings["output_dir"] + "_second").exists()
    monkeypatch.undo()
    train({**settings, "output_dir": settings["output_dir"] + "_third"})


class Tee:
    """An output of a user's own, with no more than print() needs."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_an_output_of_a_users_own_that_can_only_write_and_flush_is_enough(settings):
    tee = Tee()
    with redirect_stdout(tee):
        train(settings)
    assert "Model saved successfully!\n" in tee.text
    closed = StringIO()
    closed.close()
    with redirect_stdout(closed):
        train({**settings, "output_dir": settings["output_dir"] + "_closed"})


@pytest.mark.parametrize("link", ["nowhere", "itself"])
def test_an_output_folder_behind_a_link_that_leads_nowhere_is_refused_before_anything_is_loaded(
    settings, tmp_path, capsys, link
):
    (tmp_path / "link").symlink_to("link" if link == "itself" else "/nonexistent/disk")
    for output_dir in ("link", "link/below"):
        with pytest.raises(UserError, match="output_dir .*link.* is no folder that this run may write to") as refusal:
            train({**settings, "output_dir": str(tmp_path / output_dir)})
        assert refusal.value.exit_status == 2
    assert "Loading data" not in capsys.readouterr().err


def test_a_stop_whose_checkpoint_finds_no_room_names_both(settings, monkeypatch):
    train_step, usage = train_bert_rerank.train_step, shutil.disk_usage

    def stopped(run, window):
        train_step(run, window)
        monkeypatch.setattr(train_bert_rerank.shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
        return True  # as where a signal has come

    monkeypatch.setattr(train_bert_rerank, "train_step", stopped)
    said = "Stopped by SIGTERM after step 1 of .*, of which there is no checkpoint: checkpoint-00000001 needs"
    with pytest.raises(UserError, match=said):
        train(settings)
