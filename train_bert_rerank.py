"""Fine-tune a BERT-family cross-encoder reranker on (query, content, label) rows; measure whether
its ranking rose.

Edit the `args` dict in main(), at the end, and run the file, or override settings on the command
line (`--help`). For inference: `from train_bert_rerank import BertRerankerModel`. The code stands
in the order in which a run meets it."""

# The sections:
#   Settings          what the user asks for, checked
#   Reproducibility   seeds, determinism, precision
#   The run folder    what runs leave there, and where this one begins
#   Data              JSONL files to rows, without their texts
#   Model             the cross-encoder, also for inference
#   Tokenised data    rows to token ids, in a file
#   Windows           the samples of an optimizer step, cut into micro-batches
#   Metrics           of a ranking, with ties
#   Calibration       what a probability is worth
#   The retriever     its own order, and mixtures with the model's scores
#   The run           what is in memory while a run lasts
#   Preparation       all that comes before the first evaluation
#   Evaluation        scores, and what they say
#   Checkpoints       written, and gone on from
#   Training step     forward, backward, clip, step
#   Training          all steps, with evaluations and checkpoints between them
#   Verdict           did the ranking become better, and which weights are kept?
#   Results           report, pictures, lists, model card
#   train() and main()

import argparse
import ast
import builtins
import errno
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from functools import cached_property, partial
from importlib.metadata import version
from itertools import compress, islice, tee, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    gather_object,
    release_memory,
    set_seed,
)
from huggingface_hub import EvalResult, HfApi, ModelCardData, errors, try_to_load_from_cache
from numpy.lib.recfunctions import repack_fields
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging
from transformers.utils import cached_file


class UserError(Exception):
    """A mistake that the user can mend: main() prints the message alone and exits with
    `exit_status`."""

    def __init__(self, message, exit_status=1):
        super().__init__(message)
        self.exit_status = exit_status


def printable(text):
    """`text` with what could steer a terminal, or reorder what it shows, as escapes: names come
    from anywhere."""
    characters = []
    for character in str(text):
        if character.isprintable() or character == "\n":
            characters.append(character)
        else:
            characters.append(ascii(character)[1:-1])
    return "".join(characters)


def is_main_process():
    """Whether this process prints and writes for all of a run. Outside of one it does too:
    accelerate knows of no processes then, and asking it would look for some."""
    if not PartialState._shared_state:
        return True
    return PartialState().is_main_process


def is_first_of_machine():
    """Whether this process says for all of its machine what ended them."""
    if PartialState._shared_state:
        return PartialState().is_local_main_process
    # They have not found each other: torchrun, which accelerate launch runs as well, tells.
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    return not is_launched or os.environ.get("LOCAL_RANK", "0") == "0"


def say(message):
    """Print once, however many processes there are, above a bar that stands; what the terminal
    cannot show as "?". Nothing where there is no output, or nobody reads it any more."""
    if sys.stdout is None:  # closed, as under pythonw
        return
    if is_main_process():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a user's own object has none
        text = printable(message).encode(encoding, "replace").decode(encoding)
        with suppress(BrokenPipeError):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


class LastingFile(io.FileIO):
    """An output that takes, and drops, what nobody reads any more: the pipe's reader has ended
    (`| head`), or the terminal has gone."""

    def write(self, data):
        """Write bytes; returns how many were taken."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a full disk is no such case
                raise OSError(error.errno, error.strerror, "output of this command") from error
            return memoryview(data).nbytes


def lasting(stream, errors):
    """A text stream to where `stream` writes that outlasts its reader; `stream` itself where it is
    no file, as in a notebook; one to nowhere where it is closed."""
    if stream is None or getattr(stream, "closed", False):
        return open(os.devnull, "w", encoding="utf-8")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # without a buffer there is none between
    if type(raw) is not io.FileIO:  # as of a Windows console, or one that lasts already
        return stream
    stream.flush()
    # With no buffer between, nothing is left to be written later, where nobody would see it fail.
    file = LastingFile(raw.fileno(), "w", closefd=False)
    return io.TextIOWrapper(file, encoding=stream.encoding, errors=errors, write_through=True)


@contextmanager
def lasting_output():
    """Within it neither a reader that ends nor a character that a terminal cannot show ends a
    run."""
    before = sys.stdout, sys.stderr
    sys.stdout = lasting(sys.stdout, "replace")
    sys.stderr = lasting(sys.stderr, "backslashreplace")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


# ---- Settings ------------------------------------------------------------------------------------
# The settings that name files and folders.
PATHS = (
    "model_name_or_path", "train_dataset", "eval_dataset", "output_dir", "resume_from_checkpoint",
)  # fmt: skip
# What transformers and others call a setting.
OTHER_SETTINGS = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "max_length": "max_len",
    "max_seq_length": "max_len", "per_device_train_batch_size": "batch_size",
    "warmup_ratio": "warmup_proportion", "model": "model_name_or_path",
    "train_file": "train_dataset", "validation_file": "eval_dataset", "report_to": "log_with",
}  # fmt: skip
HOW_LISTS_ARE_WRITTEN = """'["a.jsonl", "b.jsonl"]'"""


class Setting(NamedTuple):
    """A key of `args` in main(), as it stands there."""

    kinds: list[str]  # what a value may be, such as ["int 1..", "None"]
    meaning: str
    default: object


def read_source():
    """The lines of what main() stands in, a file, a zip file's member or a notebook's cell, and the
    `args` literal in them. UserError where there is no source, or none with that literal."""
    try:
        lines, _ = inspect.findsource(inspect.unwrap(main))
    except (OSError, TypeError) as error:  # a .pyc alone, `python -`, exec(); compiled to C
        raise UserError(
            f"the source of main(), where the settings stand, is missing ({error}): put "
            "train_bert_rerank.py beside what was made of it, and run or import that file",
            2,
        ) from error

    for node in ast.parse("".join(lines)).body:
        if getattr(node, "name", None) == "main":
            for part in ast.walk(node):
                if isinstance(part, ast.Dict):
                    return lines, part
    raise UserError(
        "the source of main() holds no `args`, where the settings stand: it has been edited, or "
        "another main() has taken its place",
        2,
    )


def read_settings():
    """{key: Setting} from the `args` literal in main(), the only place where defaults and meanings
    stand."""
    lines, literal = read_source()
    settings = {}
    for key, value in zip(literal.keys, literal.values, strict=True):
        line = lines[value.end_lineno - 1].encode()
        behind_value = line[value.end_col_offset :].decode()
        kinds, _, meaning = behind_value.partition("#")[2].partition(":")
        kinds, meaning = kinds.strip(), meaning.strip()
        if not meaning or not kinds.startswith(("str", "bool", "int", "float", "tuple", '"')):
            raise UserError(
                f"{key.value} in main() has lost its comment `# kinds: meaning`, which is read too",
                2,
            )
        # Evaluated rather than read as a literal: an edited value may be 2 * 256.
        default = eval(compile(ast.Expression(value), "args in main()", "eval"))
        settings[key.value] = Setting(kinds.split(" | "), meaning, default)
    return settings


def fits(value, kind):
    """Whether `value` is of a kind as main() writes them: str, list, bool, None, "fp16", "ndcg@k"
    with a number for k, int 1.., float 0..1."""
    name, _, bounds = kind.partition(" ")
    if name.startswith('"'):
        pattern = name.strip('"').replace("@k", "@[1-9][0-9]{0,5}")
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None
    if name in ("int", "float"):
        return is_number_within(value, name, bounds)
    if name == "list":  # of paths, at least one
        return type(value) is list and len(value) > 0 and all(fits(path, "str") for path in value)
    if name == "tuple":  # of numbers; in JSON it is a list
        is_sequence = type(value) in (list, tuple)
        return is_sequence and all(fits(number, f"float {bounds}") for number in value)
    if name == "str":
        return type(value) is str and "\0" not in value  # which no path may hold
    if name == "bool":
        return type(value) is bool
    return name == "None" and value is None


def is_number_within(value, name, bounds):
    """Whether `value` is an "int", or a "float" (for which an int does), within bounds as in "1.."
    or "0..1"."""
    if type(value) is not int and not (type(value) is float and name == "float"):
        return False
    low, _, high = bounds.partition("..")
    return float(low or -sys.float_info.max) <= value <= float(high or sys.float_info.max)


def check_settings(args):
    """`args` with the keys that it leaves out; UserError (exit status 2) for what cannot be
    meant."""
    settings = read_settings()
    defaults = {key: setting.default for key, setting in settings.items()}
    args = {**defaults, **args}
    args = {key: as_read(value) for key, value in args.items()}

    for key, value in args.items():
        if key not in settings:
            raise UserError(f"unknown setting {key}; the nearest is {nearest_to(key, settings)}", 2)
        kinds = settings[key].kinds
        if not any(fits(value, kind) for kind in kinds):
            raise UserError(f"{key} should be {' or '.join(kinds)}, not {value!r}", 2)
        check_name(key, value, kinds)
    for key in PATHS:
        args[key] = with_home(args[key])

    if args["min_label"] >= args["max_label"]:
        raise UserError(
            f"min_label {args['min_label']} is not below max_label {args['max_label']}", 2
        )
    for key in ("query_format", "document_format"):
        if args[key].count("{}") != 1:
            raise UserError(
                "query_format and document_format should each hold {} once, where the text goes", 2
            )
    if args["resume_from_checkpoint"] and args["overwrite_output_dir"]:
        raise UserError(
            "resume_from_checkpoint goes on and overwrite_output_dir starts over: set one of them",
            2,
        )
    check_installation(args)
    return args


def nearest_to(key, settings):
    """The setting that `key` was perhaps meant for."""
    name = str(key).lower().replace("-", "_")
    [nearest] = get_close_matches(name, [*settings, *OTHER_SETTINGS], n=1, cutoff=0)
    return OTHER_SETTINGS.get(nearest, nearest)


def as_read(value):
    """A value of a dict as the command line would have it: a path as text, a number of numpy's as
    one of Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [as_read(element) for element in value]
    return value


def check_name(key, value, kinds):
    """UserError (exit status 2) for a text that names nothing: an empty one, a None or a list that
    came as a text."""
    if isinstance(value, list):
        for path in value:
            check_name(key, path, kinds)
    if not isinstance(value, str):
        return
    if not value.strip():
        raise UserError(f"{key} is empty: it should be {' or '.join(kinds)}", 2)
    if key not in PATHS:
        return

    if value.lower() in ("none", "null") and "None" not in kinds:
        raise UserError(f"{key} cannot be None; of a file or folder of that name: ./{value}", 2)
    # An empty list, one that the shell took the quotes off, two names with a comma.
    is_like_a_list = value.startswith("[") or "," in value
    if "list" in kinds and is_like_a_list and not os.path.exists(with_home(value)):
        raise UserError(
            f"{key} {value}: there is no such file; a list is written --{key} "
            f"{HOW_LISTS_ARE_WRITTEN}",
            2,
        )


def with_home(path):
    """A path, or a list of them, with the home folder for a ~ at the start, which no shell has
    replaced behind a "="."""
    if isinstance(path, list):
        return [os.path.expanduser(each) for each in path]
    if isinstance(path, str):
        return os.path.expanduser(path)
    return path


def check_installation(args):
    """UserError where what the run needs is not installed, or it is launched in a way that it
    cannot use."""
    check_environment()
    check_names(args)
    packages = ["matplotlib"]
    if args["log_with"]:
        packages.append(args["log_with"])
    for package in packages:
        specification = importlib.util.find_spec(package)
        # A folder of that name, as wandb leaves, has none.
        if not getattr(specification, "origin", None):
            raise UserError(f"the package {package} is missing: pip install {package}", 2)


# What variables, set by `accelerate config` or by hand, make of any script that uses accelerate,
# and this one cannot be: processes under FSDP, say, must all do the same forwards, and with windows
# of unequal size they would hang. (Mixed precision and gradient accumulation have settings here,
# and accelerate is told those.)
NOT_USABLE = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of its own",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "SageMaker's own parallelism",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
    "ACCELERATE_FP8_BACKEND": "fp8",
}
OFF = ("", "no", "false", "0", "n", "f", "off")  # as accelerate reads them


def check_environment():
    """UserError where accelerate's variables ask for what this script cannot do."""
    for variable, what in NOT_USABLE.items():
        value = os.environ.get(variable, "")
        if value.lower() not in OFF:
            raise UserError(
                f"accelerate asks for {what}, which this script cannot use: unset {variable} (it "
                f"is {value}), or launch with torchrun, or --multi_gpu, which overrides it; what "
                "saves memory: docs/scaling.md",
                2,
            )

    uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() not in OFF
    if uses_cpu and torch.accelerator.is_available():
        raise UserError(
            "accelerate asks for the CPU: unset ACCELERATE_USE_CPU, and set CUDA_VISIBLE_DEVICES "
            "to nothing, which hides the GPUs",
            2,
        )
    device = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device:
        raise UserError(
            f"accelerate asks for the device {device}: unset ACCELERATE_TORCH_DEVICE; "
            "CUDA_VISIBLE_DEVICES chooses among GPUs",
            2,
        )


def check_names(args):
    """UserError where a setting goes to a library that takes text alone (tokenizers, TensorBoard,
    wandb), and its bytes are none in this process's encoding."""
    keys = ["model_name_or_path", "output_dir", "query_format", "document_format"]
    if args["log_with"] == "wandb":
        keys += ["train_dataset", "eval_dataset"]
    for key in keys:
        try:
            json.dumps(args[key], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{key} {args[key]}: its bytes are no text in {sys.getfilesystemencoding()}, the "
                "encoding here: change it, or, if it is shown well elsewhere, set PYTHONUTF8=1",
                2,
            ) from error


def parse_command_line(argv):
    """The settings that `--key value` overrides; --help prints them all."""
    settings = read_settings()
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--key value ...]", allow_abbrev=False, description=__doc__
    )
    for key, setting in settings.items():
        text = f"{setting.meaning} ({' or '.join(setting.kinds)}; default {setting.default!r})"
        parser.add_argument(
            f"--{key}", metavar="", default=argparse.SUPPRESS, help=text.replace("%", "%%")
        )
    known, unknown = parser.parse_known_args(argv)

    overrides = {}
    for argument in unknown[:1]:
        if not re.match("--[^=]", argument):
            raise UserError(
                f"{argument!r} belongs to no setting: each is written --key value, and a list "
                f"--train_dataset {HOW_LISTS_ARE_WRITTEN}",
                2,
            )
        # check_settings() refuses it, with the nearest key.
        overrides[argument.partition("=")[0][2:]] = None
    for key, text in vars(known).items():
        overrides[key] = typed(text, settings[key].kinds)
    return overrides


def typed(text, kinds):
    """What `text` stands for on the command line, if it is of one of the `kinds`, else the text
    itself. Words are read in any case of letters."""
    words = {"true": "True", "false": "False", "none": "None", "null": "None"}
    try:
        value = ast.literal_eval(words.get(text.lower(), text))
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # a path, a name
        return text
    if any(fits(value, kind) for kind in kinds):
        return value
    return text


# ---- Reproducibility -----------------------------------------------------------------------------
def seed_everything(seed: int) -> None:
    """Seed random, numpy, torch and CUDA and turn on determinism; call it before CUDA starts, for
    cuBLAS's variable."""
    set_seed(seed, deterministic=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")  # no TF32 on a GPU, no bf16 on a CPU
    # Deterministic mode would also write NaN into each new tensor, to show reads of what was never
    # written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.cuda.is_available() and workspace not in (":4096:8", ":16:8"):
        say(
            f"CUBLAS_WORKSPACE_CONFIG={workspace} is not deterministic to PyTorch: "
            ":4096:8 is used instead."
        )
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def switches_of_torch():
    """[(where, name, value)] of what seed_everything() sets for the whole process."""
    cudnn = torch.backends.cudnn
    places = [
        (cudnn, "deterministic"),
        (cudnn, "benchmark"),
        (cudnn, "allow_tf32"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    ]
    if hasattr(cudnn, "conv"):  # the newer names, which older PyTorch lacks
        matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        for where in (cudnn.conv, cudnn.rnn, *matmuls):
            places.append((where, "fp32_precision"))

    switches = []
    for where, name in places:
        # Where the process has used the newer name, the older is not to be had.
        with suppress(RuntimeError):
            switches.append((where, name, getattr(where, name)))
    return switches


ONE_RUN = threading.Lock()  # seeds and switches are those of the process
LOCKED_FOLDERS: list[int] = []  # file descriptors of the folders that the run has for itself


@contextmanager
def only_run_of_process():
    """Within it no other run can begin in this process; UserError where one is going on."""
    if not ONE_RUN.acquire(blocking=False):
        raise UserError("a run is going on in this process: begin another when it has ended", 2)
    try:
        yield
    finally:
        while LOCKED_FOLDERS:
            os.close(LOCKED_FOLDERS.pop())
        ONE_RUN.release()


@contextmanager
def usual_modes_of_torch():
    """Within it PyTorch computes as in a new process, whatever modes the caller is in: with
    gradients, in fp32 on the CPU unless told, without autocast."""
    with ExitStack() as modes:
        modes.enter_context(fp32_by_default())
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        if torch.empty(0).device.type != "cpu":
            modes.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            # Only a caller's is switched off: within any other, that of a step would go on with the
            # weights that it has cast before. So it would within this one, but for the cache.
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False, cache_enabled=False))
        yield


@contextmanager
def fp32_by_default():
    """Within it new tensors are fp32 unless told, whatever a caller has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def process_as_before():
    """Whatever a run sets for the whole process is as before at its end: determinism and precision
    of PyTorch, random states, what accelerate knows of processes, the variable of cuBLAS."""
    states_of_accelerate = []  # of all its objects: a caller's Accelerator reads them
    for state in (PartialState, AcceleratorState, GradientState):
        states_of_accelerate.append((state._shared_state, dict(state._shared_state)))
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switches = switches_of_torch()
    matmul_precision = None
    with suppress(RuntimeError):  # the same of older and newer names
        matmul_precision = torch.get_float32_matmul_precision()
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        yield
    finally:
        for state, before in states_of_accelerate:
            state.clear()
            state.update(before)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        if matmul_precision:
            torch.set_float32_matmul_precision(matmul_precision)
        for where, name, value in switches:
            setattr(where, name, value)

        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        torch.set_rng_state(random_states[2])
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if workspace is not None:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def has_native_bf16(device):
    """Whether `device` computes in bf16 itself, rather than by way of fp32, which would be slow."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_available() and torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False  # nothing is known of others


def supported_precision(mixed_precision, device):
    """`mixed_precision` where `device` computes in it natively, else "no" (fp32), which is said."""
    is_supported = {
        "no": True,
        "fp16": device.type != "cpu",
        "bf16": has_native_bf16(device),
    }
    if is_supported[mixed_precision]:
        return mixed_precision
    say(
        f"mixed_precision {mixed_precision} is not native to this {device.type} device: "
        "computing in fp32."
    )
    return "no"


# ---- The run folder ------------------------------------------------------------------------------
# A run writes into output_dir/unfinished_run. Its results are moved up into output_dir when all of
# them are complete, in this order, so that whoever finds run.json there finds a finished run.
RESULTS = [
    "final_model", "fine_tuned_model", "logs", "loss_curve.png", "score_distribution.png",
    "eval_report.json", "predictions.jsonl", "rows_to_check.jsonl", "run.json",
]  # fmt: skip
DIGITS = "[0-9]" * 8  # of a step, in the names of checkpoints and best weights
CHOICES = (
    "  to go on:      the same command with --resume_from_checkpoint latest\n"
    "  to start over: the same command with --overwrite_output_dir true "
    "(and without --resume_from_checkpoint)"
)
# A resumed run may differ from its checkpoint in what is compared by what it stands for, files and
# samples of a step …
NAMES = (
    "model_name_or_path", "revision", "trust_remote_code", "train_dataset", "eval_dataset",
    "batch_size", "gradient_accumulation_steps",
)  # fmt: skip
# … and in what changes no result, but for rounding.
NEUTRAL = (
    "micro_batch_tokens", "gradient_checkpointing", "log_with", "output_dir", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "overwrite_output_dir",
)  # fmt: skip


def remove(path):
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.remove(path)


# What file systems of other machines, and those in user space, answer where they cannot do a thing
# at all: a folder to be flushed on CIFS, vboxsf or sshfs, a file to be mapped on many under FUSE.
NOT_SUPPORTED = (
    errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF,
)  # fmt: skip


def flush_to_disk(*paths):
    """Let files, and the names in folders, survive a power cut, where the file system can; OSError
    where it fails."""
    for path in paths:
        # Windows opens no folder; a log may be gone.
        with suppress(PermissionError, FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise OSError(error.errno, error.strerror, str(path)) from error
            finally:
                os.close(descriptor)


def json_bytes(value, indent=None):
    """`value` as JSON in UTF-8. Of a path whose bytes are no UTF-8, as an older archive or a disk
    from Windows has them, they stand as escapes, which json.loads() reads as Python's own path."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


@contextmanager
def whole_file(path):
    """A file to write to under another name, renamed once all of it is on disk: `path` is whole or
    not there."""
    unfinished = path.with_suffix(f".{platform.node()}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(unfinished, "wb") as file:
            yield file
        flush_to_disk(unfinished)
        os.replace(unfinished, path)
        flush_to_disk(path.parent, path.parent.parent)
    finally:
        unfinished.unlink(missing_ok=True)
        with suppress(OSError):  # folders that hold nothing now
            path.parent.rmdir()
            path.parent.parent.rmdir()


def checkpoints_in(run_dir):
    """The checkpoints of an unfinished run, oldest first; a folder without its state.pt is none."""
    states = run_dir.glob(f"checkpoint-{DIGITS}/state.pt")
    return sorted(state.parent for state in states)


def best_weights_in(run_dir):
    """The files of best weights of an unfinished run, oldest first."""
    return sorted(run_dir.glob(f"best_weights-{DIGITS}.pt"))


def written_in(run_dir):
    """What runs leave in `run_dir`, complete or not: checkpoints, best weights, results."""
    paths = []
    for pattern in (f"checkpoint-{DIGITS}", f"best_weights-{DIGITS}.*", "run.*"):
        paths += run_dir.glob(pattern)
    for name in RESULTS[:-1]:
        if os.path.lexists(run_dir / name):
            paths.append(run_dir / name)
    return paths


def require_writable(run_dir):
    """UserError where `run_dir` is there and cannot be written to, or could not be made."""
    # A link that leads nowhere, as to a disk that is not there, is in the way too.
    existing = next(folder for folder in run_dir.parents if os.path.lexists(folder))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(
            f"output_dir {run_dir.parent}: {existing} is no folder that this run may write to", 2
        )


def lock_folder(folder):
    """Have `folder` for this run, until it ends in whatever way; UserError where another has it: a
    second process that knows nothing of this one, as under `srun -n 2`."""
    if not importlib.util.find_spec("fcntl"):  # Windows locks no folders
        return
    fcntl = importlib.import_module("fcntl")
    descriptor = os.open(folder, os.O_RDONLY)
    LOCKED_FOLDERS.append(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another run is writing to {folder}: take another output_dir, or, for processes of "
            "one run, launch them with torchrun or accelerate launch",
            2,
        ) from error
    except OSError as error:
        if error.errno not in NOT_SUPPORTED + (errno.ENOLCK,):
            raise


def require_space(folder, needed, what):
    """UserError unless the disk of `folder` has `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} needs {needed / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB left: "
            f"make room, or lower save_total_limit.\n{CHOICES}"
        )


def publish(run_dir):
    """Move the results of a complete run, one with a run.json, up into output_dir, in the place of
    an earlier one's.

    Cut off anywhere, the next call goes on with it: run.json comes last."""
    if (run_dir / "run.json").exists():
        for path in written_in(run_dir):
            if path.name not in RESULTS:  # checkpoints and best weights have done their service
                remove(path)

        run = json.loads((run_dir / "run.json").read_text("utf-8"))
        written = run.get("results", RESULTS)
        for name in RESULTS:
            replace_result(run_dir / name, run_dir.with_name(name), name in written)
    with suppress(OSError):  # not there, or not empty
        run_dir.rmdir()


def replace_result(result, published, is_written):
    """Move a `result` to where it is `published`; remove an earlier run's where this run has not
    written its own."""
    is_there = result.exists()
    was_moved = is_written and not is_there  # by a call that was cut off
    if os.path.lexists(published) and not was_moved:
        say(f"{published}, of an earlier run, is {'replaced' if is_there else 'removed'}.")
        remove(published)
    if is_there:
        result.rename(published)


def decisive_settings(args):
    """The settings that a resumed run has to share with its checkpoint as they stand."""
    return {key: value for key, value in args.items() if key not in NAMES + NEUTRAL}


def changes(before, after):
    """["key: before → after", …] of what two dicts both have, compared as JSON."""
    before, after = json.loads(json.dumps([before, after]))
    lines = []
    for key, value in before.items():
        if key in after and after[key] != value:
            lines.append(f"{key}: {value} → {after[key]}")
    return lines


def find_ended_run(args, run_dir):
    """The run.json of a finished run that "latest" asks for again; None where there is none.

    UserError where output_dir has results, but none that a run finished."""
    ended = run_dir.with_name("run.json")
    if not ended.exists():
        if any(run_dir.with_name(name).exists() for name in RESULTS):
            raise UserError(
                f"{run_dir.parent} holds a model or logs that no run left there: "
                "take another output_dir",
                2,
            )
        return None
    if args["resume_from_checkpoint"] != "latest" or checkpoints_in(run_dir):
        return None
    before = json.loads(ended.read_text("utf-8"))["args"]
    settings = {key: value for key, value in args.items() if key not in NEUTRAL}
    is_same_run = settings.keys() <= before.keys() and not changes(before, settings)
    return ended if is_same_run else None


def find_checkpoint(args, run_dir):
    """The folder of the checkpoint to go on from; None to start afresh. UserError where one would
    be lost."""
    wanted = args["resume_from_checkpoint"]
    checkpoints = checkpoints_in(run_dir)
    if wanted == "latest":
        if checkpoints:
            return checkpoints[-1]
        say(f"No checkpoint in {run_dir}: starting afresh.")
        return None

    if wanted and not Path(wanted, "state.pt").is_file():
        names = ", ".join(map(str, checkpoints)) or "none"
        raise UserError(f"{wanted} is no checkpoint; there are: {names}", 2)
    is_from_here = bool(wanted) and Path(wanted).resolve().parent == run_dir.resolve()
    if checkpoints and not is_from_here and not args["overwrite_output_dir"]:
        raise UserError(
            f"{run_dir} holds {checkpoints[-1].name} of a run that has not ended.\n{CHOICES}\n"
            "  to keep it:    another --output_dir",
            2,
        )
    return None if wanted is None else Path(wanted)


# ---- Data ----------------------------------------------------------------------------------------
ADVICE = (
    'Each line should be a JSON object in UTF-8: {"query": "…", "content": "…", "label": 1}'
)
LONGEST_LINE = 16 << 20  # bytes; the tokenizer takes 60 times as much memory and more
# A row without its texts: number of its file and in its file, line, fingerprints of query and pair,
# label as it stands there; where it is evaluated on, the retriever's score, and how many documents
# are relevant to its query in all.
ROW = np.dtype([
    ("file", "i4"), ("number", "i8"), ("line", "i8"),
    ("query", "u8"), ("pair", "u8"), ("label", "f8"),
    ("score", "f8"), ("relevant", "i8"),
])  # fmt: skip
NOT_THERE = (math.nan, -1)  # score and number of relevant documents of a row that has neither
# While data are loaded: and what tells the ways apart in which one query is written.
LOADED_ROW = np.dtype([*ROW.descr, ("spelling", "u4")])
# What shows nothing of its own: control characters that are no white space, soft hyphens, joiners
# of graphemes, marks and embeddings of direction, zero-width spaces, joiners and non-joiners, word
# joiners, byte-order marks, and selectors of a variant of the character before. Format characters
# that show (Arabic number signs) or tell flags apart (tags) are not among them, and fillers of
# Hangul are letters.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u180b-\u180f"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
# The keys that tell the three shapes of a line apart.
ONE_ROW = ("content", "label")
TEXT_LISTS = ("pos", "neg", "pos_scores", "neg_scores")
HITS = ("hits",)
# What others call these keys, which a message then names.
OTHER_NAMES = {
    "question": "query", "search": "query", "anchor": "query",
    "text": "content", "passage": "content", "document": "content", "doc": "content",
    "answer": "content", "score": "label", "relevance": "label", "target": "label",
    "positive": "pos", "positives": "pos", "positive_passages": "pos",
    "negative": "neg", "negatives": "neg", "negative_passages": "neg",
}  # fmt: skip
MEANT_FOR_CONTENT = ("content", "pos", "neg", "hits")  # any of them gives a query its texts
GIVE_IT_ROWS = "give the query a text at least, or take the line out"
SHOULD_BE_LISTS = (
    'pos and neg should be lists of texts, hits a list of {"content": "…", "label": 1}'
)


def parse_line(line, min_label, max_label):
    """The shape and the (query, content, label) rows of a JSONL line; ValueError says what is
    wrong.

    The shapes: {"query", "content", "label"} and {"query", "hits": [{"content", "label"}, …]},
    RAG-Retrieval's two, and {"query", "pos": […], "neg": […]}, FlagEmbedding's, where "pos_scores"
    and "neg_scores", if there, are the labels."""
    return rows_of_sample(decode_line(line), min_label, max_label)


def rows_of_sample(sample, min_label, max_label):
    """What parse_line() returns, of the JSON object of a line."""
    shapes = [keys for keys in (ONE_ROW, TEXT_LISTS, HITS) if not sample.keys().isdisjoint(keys)]
    if len(shapes) > 1:
        raise ValueError(
            "two shapes at once: keep either content and label, or pos and neg, or hits"
        )

    judged = []  # (content, label)
    if shapes == [TEXT_LISTS]:
        judged = judged_of_text_lists(sample, min_label, max_label)
    elif shapes == [HITS]:
        judged = judged_of_hits(sample)
    else:
        require_keys(sample, ("query", "content", "label"))
        judged = [(sample["content"], sample["label"])]

    require_keys(sample, ("query",))
    query = sample["query"]
    for content, label in judged:
        check_text("query", query)
        check_text("content", content)
        check_label(label, min_label, max_label)
    [keys] = shapes
    shape = ", ".join(["query", *(key for key in keys if key in sample)])
    return shape, [(query, content, label) for content, label in judged]


def parse_candidates(line, min_label, max_label):
    """As parse_line(), of a line that is evaluated on: its rows are (query, content, label, score,
    relevant), with the retriever's score of the pair, and the number of documents that are relevant
    to the query, found or not, which a list of hits may tell; NOT_THERE without."""
    sample = decode_line(line)
    shape, rows = rows_of_sample(sample, min_label, max_label)
    scores, relevant = [None] * len(rows), None
    if "hits" in sample:
        scores = [hit.get("score") for hit in sample["hits"]]
        relevant = sample.get("relevant")
    elif "content" in sample:
        scores = [sample.get("score")]

    no_score, no_number = NOT_THERE
    if relevant is None:
        relevant = no_number
    else:
        check_relevant(relevant)
    candidates = []
    for row, score in zip(rows, scores, strict=True):
        if score is None:
            score = no_score
        else:
            check_score(score)
        candidates.append((*row, score, relevant))
    return shape, candidates


def decode_line(line):
    """The JSON object of a line, without the keys that are null."""
    try:
        sample = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError as well
        reason = str(error).replace("line 1 column", "column")
        raise ValueError(f"not JSON in UTF-8 ({reason})") from error
    if not isinstance(sample, dict):
        raise ValueError("not a JSON object")
    return {key: value for key, value in sample.items() if value is not None}


def require_keys(sample, keys):
    """ValueError for the first of the `keys` that `sample` lacks or has null at, with the key that
    may have been meant for it."""
    for key in keys:
        if sample.get(key) is not None:
            continue
        message = f"{key} is missing"
        wanted = MEANT_FOR_CONTENT if key == "content" else (key,)
        for name in sample:
            meant = meant_by(name)
            if name != meant and meant in wanted:
                message += f': should "{name[:40]}" read "{meant}"?'
                break
        raise ValueError(message)


def meant_by(name):
    """The key that `name` of a line is, or was perhaps meant for; None where it is like none."""
    name = name.strip().lower()
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    nearest = get_close_matches(name, ("query", *ONE_ROW, *TEXT_LISTS, *HITS), n=1, cutoff=0.8)
    return nearest[0] if nearest else None


def judged_of_text_lists(sample, min_label, max_label):
    """[(content, label), …] of {"pos": […], "neg": […]}."""
    pos, neg, pos_scores, neg_scores = (sample.get(key, []) for key in TEXT_LISTS)
    if not all(isinstance(values, list) for values in (pos, neg, pos_scores, neg_scores)):
        raise ValueError(SHOULD_BE_LISTS)
    if not pos and not neg:
        raise ValueError(f"pos and neg are empty: {GIVE_IT_ROWS}")
    for key, texts in (("pos", pos), ("neg", neg)):
        for place, text in enumerate(texts):
            try:
                check_text("content", text)
            except ValueError as error:
                raise ValueError(f"{error} ({key}[{place}])") from error
    if pos_scores or neg_scores:
        if len(pos_scores) != len(pos) or len(neg_scores) != len(neg):
            raise ValueError(
                "pos_scores and neg_scores should have a number for each text of pos and neg"
            )
        labels = pos_scores + neg_scores
    else:
        labels = [max_label for _ in pos] + [min_label for _ in neg]
    return list(zip(pos + neg, labels, strict=True))


def judged_of_hits(sample):
    """[(content, label), …] of {"hits": [{"content", "label"}, …]}."""
    hits = sample["hits"]
    if not isinstance(hits, list) or not all(isinstance(hit, dict) for hit in hits):
        raise ValueError(SHOULD_BE_LISTS)
    if not hits:
        raise ValueError(f"hits is empty: {GIVE_IT_ROWS}")
    for hit in hits:
        require_keys(hit, ONE_ROW)
    return [(hit["content"], hit["label"]) for hit in hits]


def check_text(key, text):
    """ValueError unless `text` is one that can be scored."""
    if text is None:
        raise ValueError(f"{key} is missing")
    if not isinstance(text, str):
        raise ValueError(f"{key} is no text: {json.dumps(text)[:40]}")
    if is_blank(text):
        raise ValueError(f"{key} is blank")
    text.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair


def is_blank(text):
    """Whether nothing of `text` shows."""
    return not INVISIBLE.sub("", text).strip()


def check_label(label, min_label, max_label):
    """ValueError unless `label` is a number from `min_label` to `max_label`."""
    if label is None:
        raise ValueError("label is missing")
    if isinstance(label, str):
        raise ValueError(f"label is {json.dumps(label)[:40]}: drop the quotes")
    if type(label) not in (int, float):
        raise ValueError(f"label is {json.dumps(label)[:40]}: it should be a number")
    if not min_label <= label <= max_label:  # true for NaN and infinity as well
        raise ValueError(
            f"label {str(label)[:40]} is outside [{min_label}, {max_label}] (min_label, max_label)"
        )


def check_score(score):
    """ValueError unless `score`, the retriever's, is a finite number."""
    if isinstance(score, str):
        raise ValueError(
            f"score is {json.dumps(score)[:40]}: drop the quotes, or call the key something else "
            "if it is no retriever's score"
        )
    if type(score) not in (int, float):
        raise ValueError(
            f"score is {json.dumps(score)[:40]}: it should be a number, the retriever's"
        )
    if not is_finite(score):
        raise ValueError(f"score is {str(score)[:40]}: it should be a finite number")


def is_finite(number):
    """Whether a number is neither NaN nor infinite, nor a whole one too large for a float."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def check_relevant(relevant):
    """ValueError unless `relevant` is a number of documents."""
    if type(relevant) is not int or not 0 <= relevant < 1 << 63:
        raise ValueError(
            f"relevant is {json.dumps(relevant)[:40]}: it should be a whole number, of the documents "
            "that are relevant to the query, found or not"
        )


class BadLines:
    """The lines of a file that are wrong: how many, and the first ten with what is wrong."""

    def __init__(self):
        self.count = 0
        self.first = []

    def add(self, number, error):
        """Count line `number`; one of the first ten is kept with its `error`."""
        self.count += 1
        if self.count <= 10:
            self.first.append(f"  line {number}: {error}")

    def message(self, path, advice=ADVICE):
        """What a user is told of the file `path`."""
        plural = "" if self.count == 1 else "s"
        lines = [f"{path}: {self.count} bad line{plural}", *self.first]
        if self.count > 10:
            lines.append(f"  … and {self.count - 10} more")
        return "\n".join([*lines, advice])


def advice_on_conversion(path):
    """What to do with data that are of no shape that is read here."""
    command = ["python", "tools/convert_data.py", path, "--output", f"{Path(path).stem}_rows.jsonl"]
    return (
        "\nData of another shape (CSV, TSV, parquet, other keys, a data set's folder): "
        + shlex.join(command)
    )


def read_rows(path, min_label, max_label, digest=None, parse=parse_line):
    """Yield (query, content, label, line number) of each row of a JSONL file, plain or gzip, as
    `parse` has them: with parse_candidates() there are score and relevant before the number.

    UserError after the last line: the first ten bad ones. With `digest` a bar is shown, and all
    bytes go into the digest."""
    bad_lines = BadLines()
    shapes = {}  # how many lines there are of each
    for number, line in read_lines(path, digest):
        try:
            shape, rows = parse(line, min_label, max_label)
        except ValueError as error:
            bad_lines.add(number, error)
            continue
        shapes[shape] = shapes.get(shape, 0) + 1
        for row in rows:
            yield *row, number

    if bad_lines.count:
        message = bad_lines.message(path)
        if not shapes:
            message += advice_on_conversion(path)
        raise UserError(message)
    if digest and shapes:
        counts = [f"{count} × {{{shape}}}" for shape, count in shapes.items()]
        say(f"{path}: {', '.join(counts)}")


def read_lines(path, digest):
    """Yield (number, bytes) of each line that is not blank; UserError where the file cannot be
    read, or a line is too long to be one."""
    if os.path.isdir(path):
        raise UserError(
            f"{path}: cannot be read: no regular file: save it as one{advice_on_conversion(path)}"
        )
    if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would be waited for
        raise UserError(f"{path}: cannot be read: no regular file: save it as one")
    try:
        size = os.path.getsize(path)
        is_silent = not (digest and is_main_process())
        bar = tqdm(desc="Loading data", total=size, unit="B", unit_scale=True, disable=is_silent)
        with open(path, "rb") as raw, bar:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            file = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            next_line = partial(file.readline, LONGEST_LINE + 1)
            for number, line in enumerate(iter(next_line, b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MB. "
                        f"{ADVICE}{advice_on_conversion(path)}"
                    )
                if digest:
                    digest.update(line)
                    bar.update(raw.tell() - bar.n)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
                line = line.strip()
                if line:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from error


def normal_form(query):
    """What the ways have in common in which one query is written: Unicode NFC without invisible
    characters, each run of white space of any kind as one space, none at the ends."""
    visible = INVISIBLE.sub("", query)
    return " ".join(unicodedata.normalize("NFC", visible).split())


def fingerprints(query, content):
    """64 bits of a query, in whichever way it is written, and of it and a document together, as
    they stand: the same in every run and process."""
    written = hashlib.blake2b(query.encode(), digest_size=8).digest()
    of_pair = hashlib.blake2b(content.encode(), digest_size=8, key=written).digest()
    of_query = hashlib.blake2b(normal_form(query).encode(), digest_size=8).digest()
    return int.from_bytes(of_query, "little"), int.from_bytes(of_pair, "little")


def load_file(path, file, args, parse=parse_line):
    """The rows of a JSONL file as LOADED_ROW [N] with file number `file`, without their texts, and
    its SHA-256. `parse` is parse_line or parse_candidates."""
    digest = hashlib.sha256()

    def records():
        rows = read_rows(path, args["min_label"], args["max_label"], digest, parse)
        for number, (query, content, label, *retrieved, line) in enumerate(rows):
            spelling = zlib.crc32(query.encode())
            score, relevant = retrieved or NOT_THERE
            prints = fingerprints(query, content)
            yield file, number, line, *prints, label, score, relevant, spelling

    rows = np.fromiter(records(), dtype=LOADED_ROW)
    if not len(rows):
        raise UserError(f"{path}: no rows. {ADVICE}")

    say("----- Label Distribution -----")
    labels, counts = np.unique(rows["label"].round(2) + 0.0, return_counts=True)
    commonest = np.argsort(-counts, kind="stable")[:20]
    for index in np.sort(commonest):
        share = counts[index] / len(rows)
        say(f"Label {labels[index]:.2f}: {counts[index]} ({share:.2%})")
    return rows, digest.hexdigest()


def load_data(args):
    """Train rows and eval rows (none: no evaluation) as ROW [N], the paths of their files, and
    {path: SHA-256}."""
    train_paths = args["train_dataset"]
    if isinstance(train_paths, str):
        train_paths = [train_paths]
    eval_path = args["eval_dataset"]
    if eval_path == "auto":
        eval_path = eval_file_beside(args["train_dataset"]) or "auto"

    paths = list(train_paths)
    is_eval_file = eval_path not in ("auto", None)
    if is_eval_file:
        if not args["epochs"]:  # what would be trained on need not be read
            paths = []
        paths.append(eval_path)

    rows_of_files, sha256 = [], []
    for file, path in enumerate(paths):
        # The retriever's scores count where rows of the file are evaluated on.
        is_evaluated = eval_path in (path, "auto")
        parse = parse_candidates if is_evaluated else parse_line
        rows, digest = load_file(path, file, args, parse)
        rows_of_files.append(rows)
        sha256.append(digest)
    rows = np.concatenate(rows_of_files)
    warn_of_spellings(rows, paths)
    rows = repack_fields(rows[list(ROW.names)])  # as ROW
    if is_eval_file:
        is_eval = rows["file"] == len(paths) - 1
        source = f"of {eval_path}"
    elif eval_path == "auto":
        is_eval = is_held_out(rows, args)
        source = "held out of the train data"
    else:
        is_eval = np.zeros(len(rows), dtype=bool)

    # Held out are queries whole, so that it makes no difference which these are.
    evaluated = rows if eval_path == "auto" else rows[is_eval]
    require_whole_lists(evaluated, paths, (args["min_label"] + args["max_label"]) / 2)
    if is_eval.any():
        queries = len(np.unique(rows["query"][is_eval]))
        say(f"Evaluating on {queries} queries ({is_eval.sum()} rows) {source}.")
    else:
        say("No evaluation: nothing will be claimed about the ranking.")
    return rows[~is_eval], rows[is_eval], paths, dict(zip(paths, sha256, strict=True))


def warn_of_spellings(rows, paths):
    """Warn, with a count and an example, of queries that are written in several ways: LOADED_ROW
    [N] of the files `paths`."""
    rows = rows[np.lexsort((rows["spelling"], rows["query"]))]
    is_same_query = rows["query"][1:] == rows["query"][:-1]  # as the row before
    is_other_spelling = rows["spelling"][1:] != rows["spelling"][:-1]
    variants = np.flatnonzero(is_same_query & is_other_spelling)
    if not len(variants):
        return

    first = variants[0]
    places = []
    for row in rows[first : first + 2]:
        places.append(f"line {row['line']} of {paths[row['file']]}")
    count = len(np.unique(rows["query"][variants]))
    total = len(rows) - is_same_query.sum()
    say(
        f"Warning: {count} of {total} queries are written in several ways "
        f"({count + len(variants)} in all), which differ in white space, invisible characters or "
        f"Unicode form alone ({' and '.join(places)}, for one): each counts as one query."
    )


def require_whole_lists(rows, paths, middle):
    """UserError, with the lines, where a query has the retriever's scores of some of its rows only,
    or more than one number of relevant documents, or one that its documents with labels from
    `middle` on exceed."""
    _, no_number = NOT_THERE
    is_scored = ~np.isnan(rows["score"])
    relevant = rows["relevant"]
    if not is_scored.any() and (relevant == no_number).all():
        return

    _, query_of_row = np.unique(rows["query"], return_inverse=True)
    count = np.bincount(query_of_row)
    scored = np.bincount(query_of_row, is_scored)
    is_part = (scored > 0) & (scored < count)

    most = np.full(len(count), no_number)
    np.maximum.at(most, query_of_row, relevant)
    is_other = (relevant != no_number) & (relevant != most[query_of_row])
    is_relevant = rows["label"] >= middle
    _, documents = np.unique(rows["pair"][is_relevant], return_index=True)  # each counts once
    found = np.bincount(query_of_row[is_relevant][documents], minlength=len(count))
    is_exceeded = (most >= 0) & (found > most)

    lacks_score = is_part[query_of_row] & ~is_scored
    problems = [
        (lacks_score, "score is missing, and other rows of its query have one"),
        (is_other, "relevant is less than on another line of its query"),
        (is_exceeded[query_of_row], "relevant is less than the relevant documents that are here"),
    ]
    for file, path in enumerate(paths):
        bad_lines = BadLines()
        for is_bad, problem in problems:
            for line in np.unique(rows["line"][is_bad & (rows["file"] == file)]):
                bad_lines.add(line, problem)
        if bad_lines.count:
            advice = (
                "Give all rows of a query the retriever's score, or none, and a query one number "
                '"relevant", that of its relevant documents, found or not.'
            )
            raise UserError(bad_lines.message(path, advice))


def eval_file_beside(train_dataset):
    """The file beside `train_dataset` that is named alike, with "eval" for "train"; None where
    there is none."""
    if not isinstance(train_dataset, str):
        return None
    folder, name = os.path.split(train_dataset)
    sibling = Path(folder, name.replace("train", "eval"))
    if sibling != Path(train_dataset) and sibling.is_file():
        return str(sibling)
    return None


def is_held_out(rows, args):
    """Which rows [N] belong to the queries, eval_proportion of all, that are drawn to be evaluated
    on."""
    queries, first = np.unique(rows["query"], return_index=True)
    in_order_of_file = list(queries[first.argsort()])
    count = math.ceil(len(queries) * args["eval_proportion"])
    count = min(count, len(queries) - 1)  # one query at least is trained on
    drawn = random.Random(args["seed"]).sample(in_order_of_file, count)
    return np.isin(rows["query"], drawn)


def check_rows(train_rows, eval_rows, middle):
    """Warn, with counts, of what is allowed in data but seldom meant; labels from `middle` on are
    relevant."""
    rows = train_rows[np.lexsort((train_rows["label"], train_rows["pair"]))]
    is_same_pair = rows["pair"][1:] == rows["pair"][:-1]  # as the row before
    is_same_label = rows["label"][1:] == rows["label"][:-1]

    warnings = []  # (count, of what)
    duplicates = (is_same_pair & is_same_label).sum()
    warnings.append((duplicates, "train rows are exact duplicates of others"))
    contradicting = np.unique(rows["pair"][1:][is_same_pair & ~is_same_label])
    warnings.append((len(contradicting), "train pairs have contradicting labels"))
    in_both = np.intersect1d(rows["query"], eval_rows["query"])
    warnings.append((len(in_both), "queries are in both train and eval data"))
    if len(np.unique(rows["label"])) == 1:
        warnings.append((len(rows), "train rows, all there are, have one and the same label"))
    relevant = (rows["label"] >= middle).sum()
    if 0 < relevant * 20 < len(rows):
        what = f"train rows have only {relevant} relevant ones among them"
        warnings.append((len(rows), what))

    for count, what in warnings:
        if count:
            say(f"Warning: {count} {what}.")


# ---- Model ---------------------------------------------------------------------------------------
TOKENIZER_LOCK = threading.Lock()  # a tokenizer in use by one thread cannot be changed by another


# What the multiplying units of one multiprocessor do, TFLOP/s in 16 and in 32 bits, by compute
# capability: NVIDIA's figures of a card (dense, sums in fp32, no TF32) over its multiprocessors.
# In 16 bits a GeForce does half of it.
MULTIPROCESSOR_RATES = {
    (7, 0): (1.56, 0.196),  # V100: 125 and 15.7, 80 multiprocessors
    (7, 5): (1.62, 0.202),  # T4: 65 and 8.1, 40
    (8, 0): (2.89, 0.181),  # A100: 312 and 19.5, 108
    (8, 6): (1.73, 0.434),  # GeForce RTX 3090: 71 and 35.6, 82; A10: 125 and 31.2, 72
    (8, 9): (2.57, 0.645),  # GeForce RTX 4090: 165 and 82.6, 128; L40S: 362 and 91.6, 142
    (9, 0): (7.49, 0.507),  # H100, H200: 989 and 67, 132
    (10, 0): (15.2, 0.541),  # B200: 2,250 and 80, 148
    (12, 0): (2.47, 0.617),  # GeForce RTX 5090: 210 and 105, 170
}
# On an H200, at bge-reranker-large's shape in bf16, a micro-batch of 1,024 tokens took 100 ms. Of
# these 6 ms are arithmetic at a third of the card's rate; in the other 94 ms the processor started
# the kernels of 24 layers, forward and backward.
SHARE_OF_RATE = 1 / 3
SECONDS_TO_START_A_LAYER = 0.094 / 24


class CardRate(NamedTuple):
    """What a GPU computes at best, as its maker has it."""

    flops: float  # a second
    capability: tuple[int, int]  # of MULTIPROCESSOR_RATES


def card_rate(card, precision):
    """The CardRate of a `card`, what torch.cuda.get_device_properties() tells of it, in
    "bf16", "fp16" or "no" (fp32). One of unknown compute capability has the rates of the nearest
    older one. Nothing is timed, and no current clock is read: two runs must agree."""
    own = (card.major, card.minor)
    not_newer = [capability for capability in MULTIPROCESSOR_RATES if capability <= own]
    capability = max(not_newer, default=min(MULTIPROCESSOR_RATES))
    half, single = MULTIPROCESSOR_RATES[capability]
    if "GeForce" in card.name:
        half /= 2
    rate = single if precision == "no" else half
    return CardRate(rate * 1e12 * card.multi_processor_count, capability)


def operations(model, tokens, squared_lengths):
    """Floating-point operations to train transformers' `model` on pairs of so many tokens, and so
    large a sum of their squared lengths: two for a weight and a token forward and four backward,
    embeddings aside, and attention (Chowdhery et al. 2022, PaLM, appendix B). The last layer counts
    in full, though first_token_only() lets it compute less."""
    weights = sum(weight.numel() for weight in model.parameters())
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            weights -= module.weight.numel()
    config = model.config.get_text_config()
    of_attention = 12 * config.num_hidden_layers * config.hidden_size
    return 6 * weights * tokens + of_attention * squared_lengths


def has_known_rate(device):
    """Whether card_rate() can tell of a `device`: ROCm's, which are called cuda too, number their
    capabilities otherwise."""
    return device.type == "cuda" and torch.version.hip is None


def micro_batch_cost(model, device, precision):
    """What one more micro-batch of transformers' `model` costs, in padded tokens: as many as a GPU
    computes while the processor starts the kernels of one."""
    if device.type == "cpu":
        return 16  # measured at 6 layers of 384
    if not has_known_rate(device):
        return 256  # a guess
    rate = SHARE_OF_RATE * card_rate(torch.cuda.get_device_properties(device), precision).flops
    seconds = SECONDS_TO_START_A_LAYER * model.config.get_text_config().num_hidden_layers
    return round(seconds * rate / operations(model, tokens=1, squared_lengths=0))


def first_token_attention(self, hidden_states, attention_mask=None, *_, **__):
    """The forward of transformers' BertAttention and its likes, for the first token alone: [B, T,
    H] to [B, 1, H]."""
    attention = self.self  # BertSelfAttention, of which `self` is the BertAttention

    def heads_of(layer, states):  # [B, T, H] to [B, heads, T, H / heads]
        return layer(states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    first = hidden_states[:, :1]
    queries = heads_of(attention.query, first)
    keys = heads_of(attention.key, hidden_states)
    values = heads_of(attention.value, hidden_states)
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :1]  # [B, 1, 1, T]
    dropout = attention.dropout.p if attention.training else 0.0
    context = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attention_mask, dropout
    )
    return self.output(context.transpose(1, 2).flatten(2), first), None


def first_token_only(model):
    """Let the last layer of `model` compute only the first token, all that the heads of these
    architectures read."""
    config = model.config
    if config.model_type not in ("bert", "roberta", "xlm-roberta") or config.is_decoder:
        return
    if config._attn_implementation != "sdpa":
        return
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return
    attention = model.base_model.encoder.layer[-1].attention
    attention.forward = partial(first_token_attention, attention)


def all_tokens(model):
    """Undo first_token_only()."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is first_token_attention:
            del module.forward


# Short pairs of different lengths, in two scripts: what a model and its tokenizer make of them when
# they are loaded tells whether they can be used.
PROBES = [
    ("怎么退款", "请在七天之内联系客服，说明订单号。"),
    ("How long is the warranty?", "2 years."),
    ("S35充不进电", "Wipe the contacts of the S35, then press it back. 请擦净触点，再试一次。" * 2),
    ("Is it new", "Yes, it is: 2026."),
]
FEWEST_TOKENS = 16  # of a passage, for it to say anything


class NoRoomError(UserError, ValueError):
    """A query that leaves a passage of its document fewer than these."""


def require_whole_in_transformers(name, revision, local_files_only):
    """UserError where sentence-transformers keeps part of a cross-encoder outside of the model that
    transformers loads: a head in layers of its own, or a prompt."""
    files = {}
    for file in ("modules.json", "config_sentence_transformers.json"):
        path = cached_file(
            name,
            file,
            revision=revision,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is None:
            return
        files[file] = Path(path).read_bytes()

    try:
        settings = dict(json.loads(files["config_sentence_transformers.json"]))
        modules = [dict(module)["type"] for module in json.loads(files["modules.json"])]
        modules = [name.rpartition(".")[2] for name in modules]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OSError(f"one of {', '.join(files)} is damaged ({error})") from error
    if settings.get("model_type") != "CrossEncoder":
        return
    if modules != ["Transformer"]:
        raise UserError(
            f"{name} is a cross-encoder of sentence-transformers that computes its score in "
            f"modules of theirs ({', '.join(modules)}): its trained head would be lost here. "
            "Fine-tune it with sentence-transformers, or start from its encoder with a new head: "
            "a copy of the folder without modules.json"
        )
    if settings.get("default_prompt_name"):
        prompt = settings["prompts"][settings["default_prompt_name"]]
        raise UserError(
            f"{name} is a cross-encoder for which sentence-transformers puts {prompt!r} before "
            "each query, and nobody else does: take default_prompt_name out of a copy's "
            f"config_sentence_transformers.json, and give --query_format {prompt + '{}'!r}"
        )


def require_vocabulary(tokenizer):
    """OSError where `tokenizer` knows nothing of PROBES: without its files, transformers 5 makes
    one up that has special tokens alone."""
    special = {*tokenizer.all_special_ids}
    for text in np.ravel(PROBES).tolist():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not special.issuperset(ids):
            return
    raise OSError("the files of its tokenizer are missing: it knows no token of ordinary texts")


def load_pretrained(name, revision, trust_remote_code, local_files_only):
    """(model, its tokenizer, what transformers tells of the loading) of a folder or hub name."""
    options = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "local_files_only": local_files_only,
    }
    require_whole_in_transformers(name, revision, local_files_only)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    require_vocabulary(tokenizer)

    # With peft installed transformers looks for an adapter too, and 5.x asks the hub for it unless
    # told.
    adapter = {}
    if not version("transformers").startswith("4."):
        adapter = {"local_files_only": local_files_only}
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=1,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        adapter_kwargs=adapter,
        **options,
    )
    return model, tokenizer, info


def require_on_hub(name, revision):
    """UserError unless the hub answers soon and has the model `name`."""
    try:
        HfApi().model_info(name, revision=revision, timeout=6)
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is no local folder; the hub says: {reason}") from error
    except Exception as error:  # name resolution, proxy, TLS, timeout, offline mode
        raise UserError(
            f"{name} is no folder, not in the cache, and the hub is out of reach "
            f"({type(error).__name__}).\n"
            "  - pass a local copy:       --model_name_or_path path/to/the/folder\n"
            "  - use a mirror of the hub: "
            "HF_ENDPOINT=https://hf-mirror.com python train_bert_rerank.py\n"
            "  - try without a download:  --model_name_or_path tiny_reranker"
        ) from error


def find_and_load(name, revision, trust_remote_code):
    """load_pretrained() from a folder, else a complete local cache, which asks no network, else the
    hub."""
    load = partial(load_pretrained, name, revision, trust_remote_code)
    try:
        return load(local_files_only=True)
    except (OSError, ValueError):  # not all of it is in the cache
        if Path(name).is_dir():
            raise
    require_on_hub(name, revision)
    return load(local_files_only=False)


def require_cross_encoder(name, model, tokenizer):
    """UserError where `model` is of a kind that cannot be used here, or the tokenizer is another
    model's."""
    if model.config.is_encoder_decoder or not tokenizer.is_fast:
        raise UserError(
            f"{name} is no BERT-family encoder with a fast tokenizer, "
            f"but {model.config.model_type}."
        )
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{name} has no padding token, which batches need, as is usual for decoders: name one "
            "of its vocabulary as pad_token in tokenizer_config.json"
        )
    embeddings = len(model.get_input_embeddings().weight)
    if len(tokenizer) > embeddings:
        raise UserError(
            f"{name} has another model's tokenizer: it has {len(tokenizer)} tokens, and the model "
            f"{embeddings} embeddings"
        )


def weights_drawn_at_random(name, model, info):
    """Names of the weights that the checkpoint lacks; UserError where some are the encoder's
    own."""
    names = list(info["missing_keys"])
    for key in info["mismatched_keys"]:  # transformers 4: (name, shape, shape)
        names.append(key if isinstance(key, str) else key[0])
    names.sort()

    encoder = f"{model.base_model_prefix}."
    lost = [key for key in names if key.startswith(encoder) and "pooler" not in key]
    # Of a layer for which the config has no room: of the encoder, or the model has the same weight
    # under other numbers.
    known = {without_numbers(key) for key in model.state_dict()}
    for key in sorted(info["unexpected_keys"]):
        if without_numbers(key) == key:
            continue
        is_known = known & {without_numbers(key), without_numbers(encoder + key)}
        if is_known or key.startswith(encoder):
            lost.append(key)
    if lost:
        raise UserError(
            f"{name} or its config.json lacks {len(lost)} weights of its encoder: {lost[0]} …"
        )
    return names


def without_numbers(key):
    """The name of a weight without the number of its layer."""
    return re.sub(r"\.\d+\.", ".N.", key)


def match_inputs(model, tokenizer):
    """Let `tokenizer` make what is made here, so that it makes that elsewhere too once it is saved:
    a mask, padding on the right, and no segment ids for a `model` that knows none, or one segment
    only. Name in the config what a decoder finds the end of a text by."""
    tokenizer.padding_side = "right"
    inputs = inspect.signature(model.forward).parameters
    if "attention_mask" in inputs and "attention_mask" not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]

    segments = 0
    if "token_type_ids" in inputs:
        segments = 2
    for name, module in model.named_modules():
        if name.endswith("token_type_embeddings") and isinstance(module, torch.nn.Embedding):
            segments = module.num_embeddings
    if segments < 2:
        names = tokenizer.model_input_names
        tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def require_same_scores(name, reranker):
    """UserError where `reranker` scores PROBES in a batch otherwise than transformers does one by
    one, beyond rounding. The short cut of the last layer is given up where it is what differs."""
    try:
        pairs, encoded = probes_of(reranker)
        with telling_head(reranker):
            expected = plain_logits(reranker, pairs)
            first_token_only(reranker.model)
            if agrees(probe_logits(reranker, encoded, len(pairs)), expected):
                return
            all_tokens(reranker.model)
            in_a_batch = probe_logits(reranker, encoded, len(pairs))
            one_by_one = probe_logits(reranker, encoded, 1)
    except Exception as error:  # whatever code and weights of a checkpoint come to
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(f"{name} cannot score pairs of texts: {reason}") from error
    if agrees(in_a_batch, expected):
        return

    scored, cause = one_by_one, "its tokens or segments are made in another way"
    if agrees(one_by_one, expected):
        scored, cause = in_a_batch, "padding, or chance, changes what it computes"
    worst = (scored - expected).abs().argmax()
    raise UserError(
        f"{name} ({reranker.model.config.model_type}) cannot be used: {cause}. "
        f"A pair has the score {scored[worst]:.4f} here and {expected[worst]:.4f} in transformers"
    )


@contextmanager
def telling_head(reranker):
    """Within it a last layer of zeros, which would score all alike whatever is computed before, is
    one that does not."""
    layers = [module for module in reranker.modules() if isinstance(module, torch.nn.Linear)]
    heads = [layer for layer in layers if layer.out_features == 1 and not layer.weight.any()]
    for head in heads:
        head.weight.data = torch.linspace(-1, 1, head.in_features)[None].to(head.weight)
    try:
        yield
    finally:
        for head in heads:
            head.weight.data.zero_()


def probes_of(reranker):
    """The P pairs of PROBES that the model can take whole, and what it encodes them to."""
    pairs, encoded = [], []
    for pair, encoding in zip(PROBES, reranker.encode(PROBES, reranker.max_len), strict=True):
        *_, cut = encoding
        if cut == 0:
            pairs.append(pair)
            encoded.append(encoding)
    if not pairs:
        raise ValueError(f"it takes {reranker.max_len} tokens, which is too few for a pair")
    return pairs, encoded


def plain_logits(reranker, pairs):
    """Logits [P] of P pairs as transformers gives them, one at a time."""
    query_format, document_format = reranker.formats
    logits = []
    for query, document in pairs:
        tokens = reranker.tokenizer(
            query_format.replace("{}", query),
            document_format.replace("{}", document),
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits.append(reranker.model(**tokens.to(reranker.model.device)).logits)
    return torch.cat(logits).flatten().float()


def probe_logits(reranker, encoded, batch_size):
    """Logits [P] of P encoded pairs as `reranker` gives them, padded in batches of `batch_size`."""
    batches = np.split(np.arange(len(encoded)), len(encoded) // batch_size)
    return torch.cat(list(reranker.score_batches(encoded, batches)))


def agrees(logits, expected):
    """Whether logits [P] are those expected, but for rounding."""
    # A caller may have let PyTorch multiply in less than fp32: what it then rounds is measured.
    matrix = torch.linspace(-1, 1, 64 * 64, dtype=torch.float32, device=logits.device)
    matrix = matrix.view(64, 64)
    exact = matrix.double() @ matrix.double()
    rounding = ((matrix @ matrix - exact).abs().max() / exact.abs().max()).item()
    tolerance = max(1e-4, 5 * rounding) * expected.nan_to_num().abs().max().item()
    return torch.allclose(logits, expected, rtol=0, atol=tolerance, equal_nan=True)


class BertRerankerModel(torch.nn.Module):
    """A cross-encoder with one logit per (query, document) pair, and its tokenizer.

    `new_weights` names what the checkpoint lacked (a plain encoder's head) and torch's random
    generator filled in; `has_other_head` tells of one of another size there. An encoded pair is
    (ids, boundary, cut): int32 token ids with special tokens, how many lie in the first segment,
    and whether nothing (0), the document (1) or the query as well (2) was cut."""

    def __init__(self, model, tokenizer, new_weights=()):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.new_weights = new_weights
        self.has_other_head = False
        self.scoring_costs = {}  # of one more micro-batch, by device and precision

    @classmethod
    @fp32_by_default()
    def from_pretrained(
        cls, model_name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
    ):
        """Load as fp32 from a folder, else a complete local cache, else the hub; UserError where
        none has the model."""
        name = model_name_or_path
        try:
            model, tokenizer, info = find_and_load(name, revision, trust_remote_code)
        except UserError:
            raise
        # The loaders raise a dozen types for files that are not what they expect.
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            raise UserError(f"cannot load {name}: {reason}") from error

        require_cross_encoder(name, model, tokenizer)
        new_weights = weights_drawn_at_random(name, model, info)
        match_inputs(model, tokenizer)
        # A checkpoint in fp16 is trained in fp32 too.
        reranker = cls(model.float(), tokenizer, new_weights)
        reranker.has_other_head = len(info["mismatched_keys"]) > 0
        require_same_scores(name, reranker)
        return reranker

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors) and tokenizer as transformers does; the inverse of
        from_pretrained."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        # Servers often have transformers 4: it does not know the class of a tokenizer that
        # transformers 5 names, and asks that one for segment ids unless it is told what is wanted.
        path = Path(folder, "tokenizer_config.json")
        config = json.loads(path.read_text("utf-8"))
        config["model_input_names"] = list(self.tokenizer.model_input_names)
        if config["tokenizer_class"] == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @property
    def max_len(self) -> int:
        """Tokens that a pair may have, special tokens included: those that there are positions for,
        or fewer where the tokenizer says so."""
        return min(int(self.tokenizer.model_max_length), self.positions)

    @property
    def positions(self) -> int:
        """Tokens that the model has positions for (of XLM-R's 514 512 are usable)."""
        limits = [10**9]
        for name, module in self.model.named_modules():
            kind = name.rpartition(".")[2]
            is_table = "position" in kind or kind == "wpe"  # the latter is GPT-2's
            if is_table and isinstance(module, torch.nn.Embedding):
                reserved = 0 if module.padding_idx is None else module.padding_idx + 1
                limits.append(module.num_embeddings - reserved)
                # OPT and its likes reserve some as well, and name what is left.
                limits.append(getattr(self.model.config, "max_position_embeddings", limits[-1]))
        return min(limits)

    @property
    def formats(self):
        """query_format and document_format as the config holds them."""
        config = self.model.config
        return [getattr(config, key, "{}") for key in ("query_format", "document_format")]

    @property
    def long_documents(self) -> str:
        """What is scored of a document that does not fit, as the config holds it: "cut", its
        beginning, or "best_passage". UserError for anything else."""
        way = getattr(self.model.config, "long_documents", None)
        if way is None:
            return "cut"
        if way not in ("cut", "best_passage"):
            raise UserError(
                f"long_documents in the model's config.json is {way!r}: it should be cut or "
                "best_passage (a run replaces it: --long_documents cut)"
            )
        return way

    @property
    def retriever_weight(self) -> float:
        """Share of the retriever's score where rank() mixes it in, as the config holds it; UserError
        for what is none."""
        weight = getattr(self.model.config, "retriever_weight", None)
        if weight is None:
            return 0.0
        if type(weight) not in (int, float) or not 0 <= weight <= 1:
            raise UserError(
                f"retriever_weight in the model's config.json is {weight!r}: it should be a number "
                "from 0 to 1"
            )
        return float(weight)

    @property
    def plain_tokenizer(self):
        """The tokenizers.Tokenizer underneath, which neither cuts nor pads. Several threads may use
        it: it is changed only where it would cut or pad, before any of them encodes."""
        tokenizer = self.tokenizer.backend_tokenizer
        with TOKENIZER_LOCK:
            if tokenizer.truncation is not None:
                tokenizer.no_truncation()
            if tokenizer.padding is not None:
                tokenizer.no_padding()
        return tokenizer

    def encode(self, pairs, max_len):
        """Yield an encoded pair of at most `max_len` tokens for each (query, document) pair. The
        document is cut; a query only where it leaves no room, down to room for one token of the
        document. ValueError for a `max_len` that leaves no room for a token of both."""
        tokenizer = self.plain_tokenizer
        tokens_of = partial(tokenizer.encode_batch_fast, add_special_tokens=False)
        special_tokens = tokenizer.num_special_tokens_to_add(is_pair=True)
        room = max_len - special_tokens
        if room < 2:
            raise ValueError(
                f"max_len {max_len} is too small: it takes {special_tokens + 2} tokens or more, "
                f"{special_tokens} special ones and one of the query and of the document each"
            )
        query_format, document_format = self.formats

        for chunk in in_chunks(pairs):
            queries, documents = zip(*chunk, strict=True)
            queries = tokens_of([query_format.replace("{}", text) for text in queries])
            documents = tokens_of([document_format.replace("{}", text) for text in documents])
            for query, document in zip(queries, documents, strict=True):
                cut = cut_to(room, query, document)
                pair = tokenizer.post_process(query, document)  # adds the special tokens
                yield np.array(pair.ids, dtype=np.int32), pair.type_ids.count(0), cut

    def is_cut_to_blanks(self, query, document, encoded):
        """Whether nothing but blanks, for which most tokenizers have no tokens, is left of a
        document: it begins with more of them than an encoded pair has room for."""
        ids, _, cut = encoded
        if cut != 1 or not is_blank(document[:1]):
            return False
        tokens_of = partial(self.plain_tokenizer.encode, add_special_tokens=False)
        query_format, document_format = self.formats
        left = len(ids) - self.plain_tokenizer.num_special_tokens_to_add(is_pair=True)
        left -= len(tokens_of(query_format.replace("{}", query)))
        if left < FEWEST_TOKENS:  # the query is the cause
            return False
        places = tokens_of(document_format.replace("{}", document)).offsets
        end = places[left - 1][1] - document_format.index("{}")
        return is_blank(document[: max(end, 0)])

    def encode_passages(self, pairs, max_len):
        """Yield, for each (query, document) pair, (places, encoded pairs) of its passages: places
        [P, 2] in the document, from character to character. One that fits is one passage.
        NoRoomError, a ValueError, where a query leaves them no room."""
        pairs, again = tee(pairs)
        for (query, document), encoded in zip(pairs, self.encode(again, max_len), strict=True):
            _, _, cut = encoded
            if not cut:
                yield [(0, len(document))], [encoded]
                continue
            places = self.places_of_passages(query, document, max_len)
            pieces = [(query, document[start:end]) for start, end in places]
            yield places, list(self.encode(pieces, max_len))

    def places_of_passages(self, query, document, max_len):
        """The places [P, 2] of overlapping passages of a document that does not fit. NoRoomError
        where the query leaves fewer than 16 tokens to each.

        They are pieces of its text, so that any software that is given one gives it the same score.
        A piece has as many tokens as fit; a quarter of them stand in the next one too. Blank ones
        are left out."""
        tokens_of = partial(self.plain_tokenizer.encode, add_special_tokens=False)
        query_format, document_format = self.formats
        special_tokens = self.plain_tokenizer.num_special_tokens_to_add(is_pair=True)
        whole_room = max_len - special_tokens - len(tokens_of(query_format.replace("{}", query)))
        room = whole_room - len(tokens_of(document_format.replace("{}", "")))
        if room < FEWEST_TOKENS:
            raise NoRoomError(
                f"max_len {max_len} leaves {max(room, 0)} tokens to a passage beside the query "
                f"{query[:40]!r}: best_passage takes {FEWEST_TOKENS} or more. Take a larger max_len, "
                'a shorter query, or long_documents "cut"'
            )

        tokens = tokens_of(document).offsets  # (start, end) of each in the text

        def fits(first, end):
            piece = document[tokens[first][0] : tokens[end - 1][1]]
            return len(tokens_of(document_format.replace("{}", piece))) <= whole_room

        overlap = room // 4
        places = []
        first, end = 0, 0
        while end < len(tokens):
            end = min(first + room, len(tokens))
            # A piece that begins or ends inside a word may have more tokens by itself.
            while not fits(first, end) and end > first + overlap + 1:
                end -= 1
            places.append((tokens[first][0], tokens[end - 1][1]))
            first = end - overlap
            # The next one begins at a later character: one may be many tokens.
            while first < end and tokens[first][0] <= places[-1][0]:
                first += 1
        telling = [place for place in places if document[slice(*place)].strip()]
        return telling or places[:1]

    def collate(self, encoded):
        """Pad B encoded pairs to the longest of them: a dict of tensors [B, T]."""
        rows = [torch.tensor(ids, dtype=torch.long) for ids, *_ in encoded]
        padding = self.tokenizer.pad_token_id
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

        positions = torch.arange(input_ids.shape[1])
        lengths = torch.tensor([len(ids) for ids, *_ in encoded])[:, None]
        batch = {"input_ids": input_ids, "attention_mask": (positions < lengths).long()}
        if "token_type_ids" in self.tokenizer.model_input_names:
            boundaries = torch.tensor([boundary for _, boundary, _ in encoded])[:, None]
            is_second = (positions >= boundaries) & (positions < lengths)
            batch["token_type_ids"] = is_second.long()
        return batch

    def preprocess(self, pairs: Sequence, max_len: int = 512) -> dict[str, torch.Tensor]:
        """Tokenise and pad B (query, document) pairs: a dict of tensors [B, T] with T at most
        `max_len`. TypeError or ValueError for what are no pairs, ValueError for a `max_len` that
        leaves no room, or that lets a pair have more tokens than the model has positions for."""
        check_whole_number("max_len", max_len)
        pairs = checked_pairs("pairs", pairs)
        if not pairs:
            raise ValueError("pairs is empty: there is nothing to make tensors of")

        encoded = list(self.encode(pairs, max_len))
        positions = self.positions
        for index, (ids, *_) in enumerate(encoded):
            if len(ids) > positions:
                raise ValueError(
                    f"pairs[{index}] has {len(ids)} tokens with max_len {max_len}, and this model "
                    f"has positions for {positions}: take max_len {self.max_len} (model.max_len)"
                )
        return self.collate(encoded)

    def to_device(self, tensor):
        """`tensor` on the model's device; a GPU gets it without waiting: it computes while the next
        batch is made."""
        device = self.model.device
        if device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    def forward(self, batch: dict[str, torch.Tensor], labels: torch.Tensor | None = None) -> dict:
        """Return {"logits": [B, 1], "loss": mean BCE with logits against `labels` [B] in [0, 1], or
        None}."""
        batch = {name: self.to_device(tensor) for name, tensor in batch.items()}
        logits = self.model(**batch).logits.float()
        loss = None
        if labels is not None:
            labels = self.to_device(labels).to(logits)
            loss = torch.nn.BCEWithLogitsLoss()(logits.squeeze(-1), labels)
        return {"logits": logits, "loss": loss}

    def scoring_batches(self, encoded, max_tokens, batch_cost):
        """The micro-batches, index arrays into N encoded pairs, of at most `max_tokens` padded
        tokens each, where one more costs `batch_cost` of these."""
        lengths = np.array([len(ids) for ids, *_ in encoded], dtype=np.int64)
        [micro_batches] = plan_window(lengths, max_tokens, batch_cost)
        return micro_batches

    @torch.inference_mode()
    def score_batches(self, encoded, micro_batches, show_progress_bar=None):
        """Yield the logits [B] in fp32 of each of the `micro_batches`."""
        self.eval()
        for indices in tqdm(
            micro_batches, desc="Scoring", disable=not show_progress_bar, leave=None
        ):
            batch = self.collate([encoded[index] for index in indices])
            yield self(batch)["logits"].squeeze(-1)

    def scoring_cost(self):
        """What one more micro-batch costs where the model scores as it is. Its weights are counted
        once, not for each query."""
        precision = "no" if self.model.dtype.itemsize > 2 else "bf16"
        key = (self.model.device, precision)
        if key not in self.scoring_costs:
            self.scoring_costs[key] = micro_batch_cost(self.model, *key)
        return self.scoring_costs[key]

    def score(self, encoded, max_tokens, show_progress_bar=None):
        """Logits [N] in fp32 of N encoded pairs, in micro-batches of at most `max_tokens` padded
        tokens."""
        micro_batches = self.scoring_batches(encoded, max_tokens, self.scoring_cost())
        parts = list(self.score_batches(encoded, micro_batches, show_progress_bar))
        return in_order_of_rows(len(encoded), micro_batches, parts, self.model.device)

    def predict(
        self,
        inputs: Sequence,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
    ):
        """Scores [N] of N (query, document) pairs, or of one: arguments and results as in
        CrossEncoder.predict.

        `activation_fn` None is the sigmoid. Pairs of over `self.max_len` tokens lose the end of
        their document, or have the score of its best passage, as the config's long_documents says.
        TypeError or ValueError for what are no pairs of texts."""
        is_single = is_one_pair(inputs)
        pairs = checked_pairs("inputs", [inputs] if is_single else inputs)
        logits, _ = self.best_logits(pairs, batch_size, show_progress_bar)

        activation = activation_fn or torch.sigmoid
        scores = activation(logits)
        if not convert_to_tensor:
            scores = scores.cpu().numpy() if convert_to_numpy else list(scores)
        return scores[0] if is_single else scores

    def best_logits(self, pairs, batch_size, show_progress_bar):
        """(logits [N] in fp32, places [N]) of N (query, document) pairs of texts, `batch_size` of
        the longest at once: of the best passage of each document, which stands there in it. Where
        documents are cut, no places."""
        check_whole_number("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it should be 1 or more")
        max_tokens = batch_size * self.max_len
        if self.long_documents == "cut":
            encoded = list(self.encode(pairs, self.max_len))
            return self.score(encoded, max_tokens, show_progress_bar), None

        encoded, places, counts = [], [], []
        for places_of_pair, passages in self.encode_passages(pairs, self.max_len):
            encoded += passages
            places += places_of_pair
            counts.append(len(passages))
        logits = self.score(encoded, max_tokens, show_progress_bar)
        best = best_passages(logits.cpu().numpy(), counts)
        return logits[best], [places[passage] for passage in best]

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable | None = None,
        retriever_scores: Sequence[float] | None = None,
        return_passages: bool = False,
    ) -> list[dict]:
        """Documents, best first, as [{"corpus_id", "score"[, "text"][, "passage"][,
        "mixed_score"]}]: as in CrossEncoder.rank. TypeError or ValueError for what are no texts.

        `return_passages`: of a model whose config has long_documents "best_passage", (start, end)
        of what was scored of the document, its text[start:end].

        With `retriever_scores`, one of each document, any scale, higher is better, the order is
        that of mixed_score: mixture() with the config's retriever_weight (0, the model's order,
        where it holds none). score stays the model's own."""
        if top_k is not None:
            check_whole_number("top_k", top_k)
        check_scorable("query", query)
        documents = in_a_list("documents", documents, "texts")
        for index, document in enumerate(documents):
            check_scorable(f"documents[{index}]", document)
        if retriever_scores is not None:
            retriever_scores = checked_scores(retriever_scores, len(documents))
        if return_passages and self.long_documents == "cut":
            raise ValueError(
                "return_passages: this model cuts long documents. One that was trained, or saved, "
                'with long_documents "best_passage" in its config scores their passages'
            )
        pairs = [(query, document) for document in documents]
        logits, places = self.best_logits(pairs, batch_size, show_progress_bar)
        activation = activation_fn or torch.sigmoid
        scores = activation(logits)

        hits = []
        for index, score in enumerate(scores.tolist()):
            hit = {"corpus_id": index, "score": score}
            if return_documents:
                hit["text"] = documents[index]
            if return_passages:
                hit["passage"] = places[index]
            hits.append(hit)
        hits.sort(key=lambda hit: hit["score"], reverse=True)
        if hits and retriever_scores is not None:
            logits = logits.cpu().double().numpy()
            mixed = mixture(logits, retriever_scores, self.retriever_weight)
            for hit in hits:
                hit["mixed_score"] = mixed[hit["corpus_id"]].item()
            # Of equals in the model's order.
            hits.sort(key=lambda hit: hit["mixed_score"], reverse=True)
        return hits[:top_k]


def mixture(logits, retriever_scores, weight):
    """(1 − weight) · model + weight · retriever: [N] of the model's logits and the retriever's
    scores of a query's N candidates, each standardised within the list, since their scales have
    nothing in common (a convex combination, as in Bruch, Gai and Ingber 2023).

    Logits 2, 0, 1 have mean 1 and standard deviation 0.82: standardised +1.22, -1.22, 0. BM25 of
    30, 20, 10: +1.22, 0, -1.22. Half of each: +1.22, -0.61, -0.61, so that the last two tie. A list
    of one, or whose scores are all alike, has 0 for each: it orders nothing."""
    model = standardised(logits, rounding_of(logits))
    retriever = standardised(retriever_scores, 0.0)  # whose exact order counts
    return (1 - weight) * model + weight * retriever


def standardised(scores, rounding):
    """`scores` [N] with mean 0 and standard deviation 1; all 0 where they differ by `rounding` at
    most."""
    largest = max(np.abs(scores).max(), sys.float_info.min)
    scores = scores / largest  # whose squares neither overflow nor vanish
    if np.ptp(scores) <= rounding / largest:
        return np.zeros(len(scores))
    return (scores - scores.mean()) / scores.std()


def checked_scores(scores, count):
    """The retriever's `scores` of `count` documents as float64 [count]; TypeError or ValueError for
    what are not as many finite numbers."""
    if isinstance(scores, torch.Tensor) and scores.dim() == 1:
        scores = scores.tolist()
    scores = in_a_list("retriever_scores", scores, "numbers")
    if len(scores) != count:
        raise ValueError(f"retriever_scores has {len(scores)} values for {count} documents")
    for index, score in enumerate(scores):
        is_number = isinstance(score, (int, float, np.integer, np.floating))
        if not is_number or isinstance(score, bool):
            raise TypeError(f"retriever_scores[{index}] should be a number, not {shown(score)}")
        if not is_finite(score):
            raise ValueError(
                f"retriever_scores[{index}] is {str(score)[:40]}: it should be a finite number"
            )
    return np.array(scores, dtype=np.float64)


PAIR = "a pair (query, document) of two texts"


def shown(value):
    """A `value` that does not fit, in a message: its type, and how it begins."""
    beginning = " ".join(repr(value)[:40].split())
    return f"{type(value).__name__} {beginning}"


def check_whole_number(name, value):
    """TypeError unless `value` is a whole number."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} should be a whole number, not {shown(value)}")


def check_scorable(name, text):
    """TypeError unless `text` is one, ValueError for half of a surrogate pair, which no tokenizer
    takes. An empty text can be scored."""
    if not isinstance(text, str):
        raise TypeError(f"{name} should be a text, not {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no text that can be written in UTF-8: {error}") from error


def in_a_list(name, values, elements):
    """What stands in order in `values`, as a list: of a list, an array, a column, a generator.
    TypeError, which says what the `elements` should be, for what has no order, a text or a
    table."""
    has_no_order = isinstance(values, (str, bytes, dict, set)) or not isinstance(values, Iterable)
    is_table = hasattr(values, "columns")  # of pandas: its elements are the names of its columns
    is_single = getattr(values, "shape", None) == ()  # of numpy and torch: a number
    if has_no_order or is_table or is_single:
        raise TypeError(f"{name} should be a list of {elements}, not {shown(values)}")
    return list(values)


def is_one_pair(inputs):
    """Whether `inputs` is a pair itself, as (query, document) is, rather than a list of pairs."""
    if not isinstance(inputs, (list, tuple, np.ndarray)) or len(inputs) != 2:
        return False
    return any(isinstance(text, str) for text in inputs)


def checked_pairs(name, pairs):
    """`pairs`, which a caller knows by `name`, as a list of pairs of two texts each. TypeError or
    ValueError names the first that is none."""
    pairs = in_a_list(name, pairs, "(query, document) pairs")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple, np.ndarray)):
            raise TypeError(f"{name}[{index}] should be {PAIR}, not {shown(pair)}")
        if len(pair) != 2:
            raise ValueError(f"{name}[{index}] should be {PAIR}, not {len(pair)} values")
        query, document = pair
        check_scorable(f"the query of {name}[{index}]", query)
        check_scorable(f"the document of {name}[{index}]", document)
    return pairs


def in_chunks(pairs):
    """Yield (query, document) pairs in lists of up to 1,000, of long documents fewer: token ids are
    small, but until they are taken out of a tokenizer's Encoding they take 100 times their text."""
    chunk, characters = [], 0
    for pair in pairs:
        chunk.append(pair)
        characters += len(pair[1])
        if len(chunk) == 1000 or characters > 1_000_000:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def cut_to(room, query, document):
    """Cut a pair of tokenizers.Encoding to `room` tokens, in place: 0 where it fits, 1 where the
    document is cut, 2 where the query is too."""
    if len(query) + len(document) <= room:
        return 0
    cut = 2 if len(query) >= room else 1
    query.truncate(room - 1)
    # An Encoding keeps what its last cut took off, in pieces as long as what stays, and
    # post_process() works on each of them. A long document, of which few tokens stay, is cut in
    # steps, the last of which takes one token off.
    left = room - len(query)
    for length in (left + room, left + 1, left):
        document.truncate(length)
    return cut


def in_order_of_rows(count, micro_batches, parts, device):
    """The logits [count] of which `parts` are those of `micro_batches`; 0 for what is in none."""
    logits = torch.zeros(count, dtype=torch.float32, device=device)
    if parts:
        logits[np.concatenate(micro_batches)] = torch.cat(parts)
    return logits


def best_passages(logits, counts):
    """The numbers [N] of the best passages, of the logits [P] of all, of which N documents have
    `counts` [N] each, one after the other."""
    best, first = [], 0
    for count in counts:
        best.append(first + int(logits[first : first + count].argmax()))
        first += count
    return best


def trained_weights(model):
    """{name: weight} of the weights that are trained, as tensors without a gradient that share
    their memory."""
    weights = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weights[name] = weight.detach()
    return weights


def bytes_of(weights):
    """The memory that tensors take."""
    return sum(weight.nbytes for weight in weights)


def has_finite_weights(model):
    """Whether no weight of `model` is NaN or infinite."""
    return all(weight.isfinite().all() for weight in model.parameters())


# ---- Tokenised data ------------------------------------------------------------------------------
def tokenizer_text(model):
    """What tells the tokenizer of a BertRerankerModel from others, as text."""
    try:
        return model.plain_tokenizer.to_str()
    except Exception:  # there is no narrower one: a part is written in Python, as RoFormer's
        vocabulary = sorted(model.tokenizer.get_vocab().items())
        return repr((type(model.tokenizer).__name__, vocabulary))


class RerankDataset:
    """N rows with `labels` [N] in [0, 1]: a sequence of encoded pairs, of `lengths` in tokens, one
    of each row. Of eval rows scored by their best passage it is as many as passages [P], `counts`
    [N] of each row.

    The token ids of all pairs stand one after the other in an int32 file, `cache`; then their
    lengths, boundaries and cuts, [3, P + 1]; then the counts, [N + 1]. It is mapped into memory, so
    that the processes of a machine share it, and named by all that it depends on."""

    def __init__(self, rows, paths, name, model, args):
        self.rows = rows
        self.paths = paths
        self.args = args
        scale = args["max_label"] - args["min_label"]
        self.labels = torch.from_numpy((rows["label"] - args["min_label"]) / scale).float()
        self.retriever_weight = model.retriever_weight
        # Training sees the beginning.
        self.by_passages = name == "eval" and model.long_documents == "best_passage"

        self.cache = self.cache_file(model)
        if not self.cache.exists():
            self.tokenize(name, model)
        self.tokens = tokens_in(self.cache)
        ends = len(self.tokens) - len(rows) - 1
        self.counts = self.tokens[ends:-1]
        columns = self.tokens[ends - 3 * (self.counts.sum() + 1) : ends].reshape(3, -1)
        self.lengths, self.boundaries, cuts = columns[:, :-1]
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        self.mention_long_documents(name, cuts)

    def mention_long_documents(self, name, cuts):
        """Say how many pairs do not fit, and what becomes of them."""
        if self.by_passages:
            long = self.counts > 1
            if long.any():
                say(
                    f"{long.sum()} {name} pairs ({long.mean():.2%}) do not fit max_len: the best of "
                    f"their passages counts, of {self.counts[long].mean():.1f} on average."
                )
            return
        if cuts.any():
            truncated = cuts > 0
            advice = "training sees the beginning of a document, whatever long_documents is"
            if name == "eval":
                advice = "--long_documents best_passage scores all of a document"
            say(
                f"Warning: max_len truncates {truncated.sum()} {name} pairs "
                f"({truncated.mean():.2%}), in {(cuts > 1).sum()} the query too; {advice}."
            )

    def cache_file(self, model):
        """Where the token ids of these rows stand, or will."""
        depends_on = (
            tokenizer_text(model),
            model.model.config.to_json_string(),
            version("tokenizers"),
            self.args["max_len"],
            "format 2",  # of the file and of what encode() makes
        )
        digest = hashlib.sha256(self.rows.tobytes() + repr(depends_on).encode())
        return Path(self.args["output_dir"], "cache", f"{digest.hexdigest()}.tokens")

    def tokenize(self, name, model):
        """Write the cache file."""
        count = len(self.rows)
        columns = array("i")  # length, boundary, cut of each encoded pair
        counts = np.zeros(count + 1, dtype=np.int32)
        encoded = tqdm(
            self.encoded(model),
            desc=f"Tokenizing {name} data",
            total=count,
            disable=not (is_main_process() and count),
        )
        with whole_file(self.cache) as file:
            for number, passages in enumerate(encoded):
                counts[number] = len(passages)
                for ids, boundary, cut in passages:
                    columns.extend((len(ids), boundary, cut))
                    file.write(ids)
            # One more than there are, since an empty file could not be mapped.
            columns.extend((0, 0, 0))
            file.write(np.array(columns, dtype=np.int32).reshape(-1, 3).T.tobytes())
            file.write(counts)

    def encoded(self, model):
        """Yield the encoded pairs of each row: one, or its passages. UserError, by line, where a
        query leaves these no room, or max_len nothing but blanks of a document."""
        max_len = self.args["max_len"]
        if self.by_passages:
            all_passages = model.encode_passages(self.pairs(), max_len)
            for row in self.rows:
                try:
                    _, passages = next(all_passages)
                except NoRoomError as error:
                    raise UserError(f"{self.place_of(row)}: {error}") from error
                yield passages
            return

        pairs, again = tee(self.pairs())
        for row, pair, encoded in zip(self.rows, pairs, model.encode(again, max_len), strict=True):
            if model.is_cut_to_blanks(*pair, encoded):
                raise UserError(
                    f"{self.place_of(row)}: content begins with so many blanks that max_len leaves "
                    "nothing else of it: take them out"
                )
            yield [encoded]

    def place_of(self, row):
        """File and line of one of the rows, for messages."""
        return f"{self.paths[row['file']]}: line {row['line']}"

    def pairs(self, chosen=slice(None)):
        """Yield the texts (query, content) of the rows `chosen` (ascending), read anew; UserError
        if they changed."""
        rows = self.rows[chosen]
        low, high = self.args["min_label"], self.args["max_label"]
        for file in np.unique(rows["file"]):
            path = self.paths[file]
            rows_of_file = rows[rows["file"] == file]
            numbers = rows_of_file["number"]
            is_chosen = np.isin(np.arange(numbers[-1] + 1), numbers).tolist()
            read_again = compress(read_rows(path, low, high), is_chosen)
            for pair, row in zip_longest(rows_of_file["pair"].tolist(), read_again):
                if row is None or fingerprints(row[0], row[1])[1] != pair:
                    raise UserError(
                        f"{path} has changed since this run loaded it, or can be read only once"
                    )
                yield row[:2]

    @cached_property
    def lists(self):
        """The candidate lists by which each metric is measured, as candidate_lists() has them."""
        return self.lists_of(slice(None))

    def lists_of(self, chosen):
        """candidate_lists() of the rows `chosen`."""
        queries = self.rows["query"][chosen].tolist()
        labels = self.labels.numpy()[chosen]
        return candidate_lists(queries, labels, self.args["metric_for_best_model"])

    @cached_property
    def retrieved(self):
        """The rows that have the retriever's score; None where none has."""
        rows = np.flatnonzero(~np.isnan(self.rows["score"]))
        if not len(rows):
            return None
        return Retrieved(
            rows=rows,
            scores=self.rows["score"][rows],
            labels=self.labels.numpy()[rows],
            lists=self.lists_of(rows),
            weight=self.retriever_weight,
        )

    def logits_of_rows(self, logits):
        """The logits [N] of the rows, of those [P] of all encoded pairs."""
        return logits[best_passages(logits.numpy(), self.counts)] if self.by_passages else logits

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        end = self.ends[index]
        ids = self.tokens[end - self.lengths[index] : end]
        return ids, self.boundaries[index], None  # what was cut was said


def tokens_in(cache):
    """The int32 numbers of a token file, mapped into memory; read into it, which each process does
    for itself, where the file system maps no files."""
    try:
        return np.asarray(np.memmap(cache, np.int32, "r"))
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        megabytes = cache.stat().st_size / 1e6
        say(
            f"{cache} cannot be mapped into memory there ({error.strerror}): each process reads "
            f"its {megabytes:,.1f} MB; an output_dir on a local disk would spare that."
        )
        return np.fromfile(cache, np.int32)


# ---- Windows -------------------------------------------------------------------------------------
# A window holds the samples of one optimizer step. Inside it their order does not matter to the
# gradient, so they are sorted by length and cut into micro-batches, each padded to its longest,
# that waste little on padding.
def epoch_windows(count, samples_per_step, generator, query_of_row=None):
    """An epoch's windows, each the row numbers of an optimizer step: a new random permutation of
    `count`, in pieces. With `query_of_row` [count], numbers from 0 on, the rows of each query stand
    together, in a random order too, lest a window's end cut the same ones off each time."""
    rows = torch.randperm(count, generator=generator)
    if query_of_row is not None:
        place_of_query = torch.randperm(query_of_row.max() + 1, generator=generator)
        places = place_of_query[torch.from_numpy(query_of_row)[rows]]
        rows = rows[places.argsort(stable=True)]
    return [window.numpy() for window in rows.split(min(count, samples_per_step))]


class TrainLists:
    """The lists of the train rows that a listwise loss learns from: all rows of a query, where
    their labels differ and one is relevant, its label not below `middle`."""

    def __init__(self, rows, middle):
        _, self.query_of_row = np.unique(rows["query"], return_inverse=True)
        self.sizes = np.bincount(self.query_of_row)  # of each query
        highest = np.full(len(self.sizes), -math.inf)
        lowest = np.full(len(self.sizes), math.inf)
        np.maximum.at(highest, self.query_of_row, rows["label"])
        np.minimum.at(lowest, self.query_of_row, rows["label"])
        self.teaches = (highest >= middle) & (lowest < highest)

    def whole_in(self, window):
        """The lists of which a `window` (row numbers) has all rows, index arrays into it."""
        query_of_row = self.query_of_row[window]
        lists = []
        for query in np.unique(query_of_row):
            indices = np.flatnonzero(query_of_row == query)
            if self.teaches[query] and len(indices) == self.sizes[query]:
                lists.append(indices)
        return lists

    def count_whole(self, samples_per_step, seed):
        """How many are whole in a window of the first epoch."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.query_of_row)
        windows = epoch_windows(count, samples_per_step, generator, self.query_of_row)
        queries = self.query_of_row[np.concatenate(windows)]
        first = np.flatnonzero(np.diff(queries, prepend=-1))  # where each list begins
        query_of_list = queries[first]
        last = first + self.sizes[query_of_list] - 1
        is_whole = first // samples_per_step == last // samples_per_step
        return (is_whole & self.teaches[query_of_list]).sum()


class Cut(NamedTuple):
    """A micro-batch lengths[start:end] of a window, and what it costs in padded tokens."""

    cost: int
    start: int
    end: int


def cut_window(lengths, max_tokens, batch_cost):
    """Cut ascending `lengths` into micro-batches of at most `max_tokens` padded tokens each, at
    least total cost.

    A micro-batch costs its padded tokens plus `batch_cost`; a sample longer than the bound stands
    alone. Of lengths 3, 5 and 9 with a bound of 20 and a cost of 4 for each micro-batch: {3, 5, 9}
    would take 27 tokens and is too large, {3} {5, 9} costs 3 + 4 + 18 + 4 = 29, and {3, 5} {9}
    costs 10 + 4 + 9 + 4 = 27, which is the best.

    One of the best ways to group samples has contiguous runs of sorted lengths. So the best cut of
    the first `end` samples is, for some `start`, that of the first `start` and one more
    micro-batch: dynamic programming."""
    count = len(lengths)
    positions = np.arange(count + 1)
    least = np.zeros(count + 1, dtype=np.int64)  # least[end]: cost of the best cut of lengths[:end]
    # Where the last micro-batch of that cut begins.
    best_start = np.zeros(count + 1, dtype=np.int64)
    for end, longest in enumerate(lengths.tolist(), start=1):
        most_samples = max(1, max_tokens // longest)
        first = max(0, end - most_samples)
        padded_tokens = (end - positions[first:end]) * longest
        costs = least[first:end] + padded_tokens + batch_cost
        best = int(costs.argmin())
        least[end] = costs[best]
        best_start[end] = first + best

    cuts = []
    end = count
    while end > 0:
        start = best_start[end]
        cuts.append(Cut(least[end] - least[start], start, end))
        end = start
    return cuts


def plan_window(lengths, max_tokens, batch_cost, num_processes=1):
    """Each process's micro-batches (index arrays into `lengths`), so that the slowest is as fast as
    may be.

    The best of cuts under smaller and smaller bounds, each dealt out costliest first, to the least
    loaded process (Graham's LPT rule): one cut into two micro-batches of 600 and 200 tokens keeps
    two processes busy for 600; a smaller bound may give 300, 300 and 200, which takes 500."""
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    bound = max_tokens
    best_deal = None
    best_load = math.inf
    while True:
        loads = [0 for _ in range(num_processes)]
        deal = [[] for _ in range(num_processes)]
        for cut in sorted(cut_window(lengths, bound, batch_cost), reverse=True):
            process = loads.index(min(loads))
            loads[process] += cut.cost
            deal[process].append(order[cut.start : cut.end])
        if max(loads) < best_load:
            best_load = max(loads)
            best_deal = deal

        # Balanced to 2 %, or as fine as the longest sample allows: smaller micro-batches would only
        # add cost.
        is_balanced = max(loads) * num_processes <= 1.02 * sum(loads)
        if is_balanced or bound <= lengths[-1]:
            return best_deal
        bound = max(bound * 7 // 8, lengths[-1])


# ---- Metrics -------------------------------------------------------------------------------------
def tie_groups(scores):
    """Group [N] of each score, 0 for the best, and the sizes of the groups [G].

    Scores that differ by rounding only are ties, and metrics give them what random order gives on
    average (McSherry and Najork 2008). Three documents tie for places 2 to 4, one of them relevant:
    it stands at each of these places as often, so that its expected discount is the mean of those
    of places 2, 3 and 4, and its expected reciprocal rank (1/2 + 1/3 + 1/4) / 3."""
    tolerance = rounding_of(scores)
    order = np.argsort(-scores)
    falling = scores[order]
    is_first = np.append(True, falling[:-1] - falling[1:] > tolerance)  # of its group

    # Scores that lie dense, each within the tolerance of the next, are no endless tie: a group is
    # cut again at the first score that is 10 tolerances or more below its highest, 20, and so on.
    # In tolerances: 0, -0.9, -1.8, … -20.7 would be one group of 24, and becomes two of 12 and 11,
    # and a last one.
    group_of_place = np.cumsum(is_first) - 1
    below_first = falling[is_first][group_of_place] - falling
    is_first |= np.diff(np.floor(below_first / (10 * tolerance)), prepend=0) != 0

    group = np.empty(len(scores), dtype=np.int64)
    group[order] = np.cumsum(is_first) - 1
    return group, np.bincount(group)


def rounding_of(scores):
    """Up to which difference the scores of a model count as equal."""
    return 1e-6 * max(10.0, np.abs(scores).max())


def ndcg_at_k(labels, scores, k=10, not_found=0):
    """NDCG@k of one query, linear gain as in trec_eval; labels [N] in [0, 1], not all 0. The ideal
    order also has `not_found` documents with label 1, which are not among those that are ranked."""
    of_all = np.append(labels, np.ones(min(not_found, k), labels.dtype))
    weights = discounts(len(of_all), k)
    gain = expected_gain(labels, scores, weights[: len(labels)])
    ideal = (np.sort(of_all)[::-1] * weights).sum()
    return gain / ideal


def discounts(count, k):
    """What a document counts at each of the places [N] of a ranking, by its place: 0 beyond k."""
    places = np.arange(1, count + 1)
    return (places <= k) / np.log2(places + 1)


def expected_gain(gains, scores, weights):
    """Sum of the gains [N] of one query's rows, each times the weight [N] of its place: of tied
    rows the mean over the places that they share."""
    group, sizes = tie_groups(scores)
    mean_weights = np.bincount(np.sort(group), weights) / sizes
    return (gains * mean_weights[group]).sum()


def recall_at_k(labels, scores, k=10):
    """Share of the rows with a label ≥ 0.5 of one query that stand among its first k."""
    relevant = labels >= 0.5
    is_first = np.arange(len(labels)) < k
    return expected_gain(relevant, scores, is_first) / relevant.sum()


def mrr_at_k(labels, scores, k=10):
    """Reciprocal rank of the first label ≥ 0.5 of one query, 0 beyond k."""
    mean = 0
    for place, probability in places_of_first(labels, scores, k):
        mean += probability / place
    return mean


def hit_at_k(labels, scores, k=10):
    """Whether a label ≥ 0.5 stands among the first k of one query: of ties the probability."""
    return sum(probability for _, probability in places_of_first(labels, scores, k))


def places_of_first(labels, scores, k):
    """Yield the places up to k at which the first label ≥ 0.5 of one query may stand, each with its
    probability."""
    group, sizes = tie_groups(scores)
    relevant = labels >= 0.5
    first_group = group[relevant].min()  # that holds a relevant row
    above = sizes[:first_group].sum()
    size = sizes[first_group]
    hits = relevant[group == first_group].sum()

    # In random order the first of `hits` relevant rows among `size` stands at `place` in comb(size
    # - place, hits - 1) of comb(size, hits) cases: the others stand behind it. Of 2 among 3: place
    # 1 in 2 cases of 3, place 2 in 1.
    last_place = min(size - hits + 1, k - above)
    for place in range(1, last_place + 1):
        yield above + place, math.comb(size - place, hits - 1) / math.comb(size, hits)


def average_precision(labels, scores):
    """Mean precision at the rows with a label ≥ 0.5: of one query's rows, for MAP, or of all pairs.
    0 without any."""
    group, sizes = tie_groups(scores)
    hits = np.bincount(group, labels >= 0.5)  # relevant rows of each group
    hits_above = np.cumsum(hits) - hits
    rows_above = np.cumsum(sizes) - sizes

    # Of each place: its group, and how many rows of the same group stand before it.
    places = np.arange(1, len(scores) + 1)
    group_of_place = np.sort(group)
    before = places - 1 - rows_above[group_of_place]

    # A relevant row at a place has as many hits down to it as the groups above hold, itself, and,
    # of the rows of its own group before it, the share that is relevant among all others of the
    # group. Of 3 tied rows with 2 relevant, at place 3: 0 + 1 + 2 · 1/2 = 2, for one other of two
    # is relevant, and both stand before it. (The tests take the mean over all orders instead.)
    other_hits = hits[group_of_place] - 1
    other_rows = np.maximum(sizes[group_of_place] - 1, 1)
    hits_at_place = hits_above[group_of_place] + 1 + before * other_hits / other_rows
    # Probability that a relevant row stands at the place.
    is_relevant = (hits / sizes)[group_of_place]
    return is_relevant @ (hits_at_place / places) / max(hits.sum(), 1)


def best_f1(labels, scores):
    """Highest F1 of 'relevant from a threshold on' over all pairs, and that threshold, as a
    score."""
    group, sizes = tie_groups(scores)
    hits = np.cumsum(np.bincount(group, labels >= 0.5))  # among the rows down to each group
    f1 = 2 * hits / (np.cumsum(sizes) + max(hits[-1], 1))
    best = f1.argmax()

    # Half-way between the last score that counts as relevant and the first that does not.
    last_above = scores[group == best].min()
    first_below = scores[group > best].max() if best < group.max() else -np.inf
    return f1.max(), (last_above + first_below) / 2


# Metrics of a ranking are means over queries of a function of a query's labels and scores. Those
# that end in @k take any k.
AT_K = {"ndcg": ndcg_at_k, "mrr": mrr_at_k, "hit": hit_at_k, "recall": recall_at_k}
RANKING = ("ndcg@10", "ndcg@5", "mrr@10", "map", "hit@1", "hit@3", "recall@10")
# What is always reported; the last two are of all pairs together.
METRICS = (*RANKING, "average_precision", "best_f1")


def ranking_metric(name):
    """The function of labels [N] and scores [N] of one query that a metric's name, such as ndcg@5,
    stands for; None where it stands for none."""
    if name == "map":
        return average_precision
    kind, _, k = name.partition("@")
    return partial(AT_K[kind], k=int(k)) if kind in AT_K else None


def candidate_lists(queries, labels, wanted="auto"):
    """{metric: the candidate lists (row numbers [C] of a query) that say something of it}: those
    with different labels for NDCG, with relevant and irrelevant rows for the other metrics of a
    ranking, all for average precision. The metrics are those that are reported: METRICS, and
    `wanted` if it is another one of a ranking."""
    rows_of_query = {}
    for index, query in enumerate(queries):
        rows_of_query.setdefault(query, []).append(index)
    lists = [np.array(rows) for rows in rows_of_query.values()]

    graded = [rows for rows in lists if labels[rows].min() < labels[rows].max()]
    relevant = labels >= 0.5
    binary = [rows for rows in lists if 0 < relevant[rows].sum() < len(rows)]
    has_both = 0 < relevant.sum() < len(labels)
    names = list(RANKING)
    if wanted not in names and ranking_metric(wanted):
        names.append(wanted)

    lists_of = {"all": lists}
    for name in names:
        lists_of[name] = graded if name.startswith("ndcg") else binary
    lists_of["average_precision"] = lists if has_both else []
    return lists_of


def metric_values(metric, lists, labels, scores):
    """Values [V] whose mean is the metric, as differences and their interval are made of: of a
    metric of a ranking one of each list; of average precision over pairs, which is no mean,
    pseudo-values of a jackknife (Tukey 1958)."""
    function = ranking_metric(metric)
    if function:
        return np.array([function(labels[rows], scores[rows]) for rows in lists])
    return jackknife_values(lists, labels, scores)


def jackknife_values(lists, labels, scores):
    """Pseudo-values [V] of the average precision of all pairs, one of each of up to V = 100 groups
    of queries.

    A group's is what leaving it out takes away: of 10 groups with an average precision of 0.80 in
    all, one without which it is 0.79 counts 0.80 + 9 · (0.795 - 0.79) = 0.845 where the mean of the
    ten such rests is 0.795. Their mean is 0.80, and their spread is that of average precision from
    sample to sample of queries."""
    groups = [np.concatenate(lists[first::100]) for first in range(min(100, len(lists)))]
    whole = average_precision(labels, scores)
    if len(groups) == 1:  # without it there is nothing left
        return np.array([whole])
    rests = []
    for rows in groups:
        rests.append(average_precision(np.delete(labels, rows), np.delete(scores, rows)))
    taken_away = np.mean(rests) - rests
    return whole + (len(groups) - 1) * taken_away


def metrics_in(lists):
    """The names of what is measured by candidate_lists(), in the order of a report."""
    return [*(name for name in lists if name != "all"), "best_f1"]


def metrics_of(lists, labels, scores):
    """{metric: its value of scores [N]} by candidate_lists(); None where no rows say anything."""
    metrics = dict.fromkeys(metrics_in(lists))
    for metric in metrics:
        if ranking_metric(metric):
            values = metric_values(metric, lists[metric], labels, scores)
            metrics[metric] = mean_or_none(values)
    if lists["average_precision"]:
        metrics["average_precision"] = float(average_precision(labels, scores))
        metrics["best_f1"] = float(best_f1(labels, scores)[0])
    return metrics


def measure(lists, labels, scores):
    """All metrics of logits [N], and the health of the probabilities: "spread", highest less lowest
    of a query, on average; share "saturated", < 0.01 or > 0.99; means of "relevant" and
    "irrelevant" rows; Brier score and calibration error. None where no rows say anything."""
    probabilities = probabilities_of(scores)
    spreads = [np.ptp(probabilities[rows]) for rows in lists["all"] if len(rows) > 1]
    health = {
        "spread": mean_or_none(spreads or np.ptp(probabilities)),
        "saturated": mean_or_none(np.abs(probabilities - 0.5) > 0.49),
        "relevant": mean_or_none(probabilities[labels >= 0.5]),
        "irrelevant": mean_or_none(probabilities[labels < 0.5]),
        "brier": brier_score(probabilities, labels),
        "calibration_error": Reliability(probabilities, labels, lists["all"]).error,
    }
    return metrics_of(lists, labels, scores), health


def probabilities_of(scores):
    """The probabilities [N] of logits [N] in fp64."""
    return torch.from_numpy(np.asarray(scores)).sigmoid().numpy()


def mean_or_none(values):
    """The mean of numbers as a float; None of none."""
    return float(np.mean(values)) if np.size(values) else None


# ---- Calibration ---------------------------------------------------------------------------------
# Of the rows with a probability of 0.8, 80 % should be relevant; of graded labels, scaled to
# [0, 1], 0.8 should be the mean.
BINS = 10
LEVEL_DRAWS = 200
INTERVAL_DRAWS = 1000
PRECISIONS = (0.5, 0.8, 0.9)  # for which the report has thresholds
HIGH = 0.8  # a run says what a probability from here on was worth
WORTH_MENDING = 0.05  # the calibration error from which on, beyond doubt, a run names the tool


def brier_score(probabilities, labels):
    """Mean squared difference of probabilities [N] and labels [N] (Brier 1950)."""
    return float(np.mean((probabilities - labels) ** 2))


class Reliability:
    """How far probabilities [N] are from labels [N] in bins of as many rows each, as in a
    reliability diagram; equal probabilities share a bin. `lists`: the rows of each of Q queries,
    which are drawn, or not, together."""

    def __init__(self, probabilities, labels, lists):
        edges = np.quantile(probabilities, np.arange(1, BINS) / BINS)
        self.bins = np.searchsorted(edges, probabilities, side="right")  # [N]
        self.differences = probabilities - labels  # [N]
        self.query = np.empty(len(labels), dtype=np.int64)  # [N]
        for number, rows in enumerate(lists):
            self.query[rows] = number
        self.raw_error = np.abs(np.bincount(self.bins, self.differences)).sum() / len(labels)

    def means(self, values):
        """The mean of `values` [N] in each bin that has rows."""
        counts = np.bincount(self.bins)
        sums = np.bincount(self.bins, values)
        return sums[counts > 0] / counts[counts > 0]

    def table(self, values):
        """The sums [Q, BINS] of `values` [N] by query and bin, and [Q] how many rows a query has.
        Queries stand by these, not as in the file, whose order is to change no draw."""
        cells = self.query * BINS + self.bins
        rows = np.bincount(self.query)
        sums = np.bincount(cells, values, len(rows) * BINS).reshape(-1, BINS)
        order = np.lexsort(sums.round(9).T)
        return sums[order], rows[order]

    @cached_property
    def level(self):
        """What the error would be on average if the probabilities were right: in each bin the rows
        keep their differences, less the mean of them, and each query's turn over by chance. (Labels
        drawn by the probabilities would take a query's rows for independent, of which often exactly
        one is relevant, and grades for 0 or 1.)"""
        means = np.bincount(self.bins, self.differences) / np.maximum(np.bincount(self.bins), 1)
        chance, rows = self.table(self.differences - means[self.bins])
        generator = np.random.default_rng(0)  # the same draws for whatever is compared
        errors = []
        for _ in range(LEVEL_DRAWS):
            signs = generator.choice([-1.0, 1.0], len(rows))
            errors.append(np.abs(signs @ chance).sum() / rows.sum())
        return float(np.mean(errors))

    @cached_property
    def error(self):
        """The expected calibration error, mean |probability − label| of the bins, without what
        chance puts into it. Squares are subtracted, as of variances: the level itself would take a
        true 0.12 of 20 queries down to 0.06 (benchmarks/calibration.py). None of fewer queries, of
        which chance cannot be told."""
        if self.query.max() + 1 < ENOUGH["queries"]:
            return None
        return without_level(self.raw_error, self.level)

    def ci95(self, seed):
        """95 % interval [low, high] of the error: its quantiles where queries are drawn anew, by
        which chance comes into the error a second time. None where the error is."""
        if self.error is None:
            return None
        differences, rows = self.table(self.differences)
        generator = np.random.default_rng(seed)
        shares = np.full(len(rows), 1 / len(rows))
        errors = []
        for _ in range(INTERVAL_DRAWS):
            times_drawn = generator.multinomial(len(rows), shares).astype(float)
            error = np.abs(times_drawn @ differences).sum() / (times_drawn @ rows)
            errors.append(without_level(error, math.sqrt(2) * self.level))
        low, high = np.quantile(errors, [0.025, 0.975]).tolist()
        # Queries that hardly differ bring less chance in than the level takes out.
        return [min(low, self.error), max(high, self.error)]


def without_level(error, level):
    """An error without the share that chance has in it."""
    return math.sqrt(max(error**2 - level**2, 0))


def calibration_of(scores, labels, lists, seed):
    """What the report says of the probabilities of logits [N]: Brier score, calibration error with
    its interval, the bins, and what rows from 0.8 on are worth."""
    probabilities = probabilities_of(scores)
    reliability = Reliability(probabilities, labels, lists)
    high = labels[probabilities >= HIGH]
    return {
        "brier": brier_score(probabilities, labels),
        "error": reliability.error,
        "ci95": reliability.ci95(seed),
        "raw_error": float(reliability.raw_error),
        "level": reliability.level,
        "bins": {
            "rows": np.unique(reliability.bins, return_counts=True)[1].tolist(),
            "probability": reliability.means(probabilities).tolist(),
            "label": reliability.means(labels).tolist(),
        },
        "high": {"from": HIGH, "rows": len(high), "label": mean_or_none(high)},
        "graded": bool(((labels > 0) & (labels < 1)).any()),
    }


def threshold_for(precision, labels, scores):
    """The lowest score from which on so large a share of the rows is relevant, half-way to the next
    lower one; None where there is none."""
    group, sizes = tie_groups(scores)
    hits = np.cumsum(np.bincount(group, labels >= 0.5))  # among the rows down to each group
    reached = np.flatnonzero(hits >= precision * np.cumsum(sizes) - 1e-9)
    if not len(reached):
        return None
    last = reached[-1]
    lowest = scores[group == last].min()
    below = scores[group > last]
    return (lowest + below.max()) / 2 if len(below) else lowest


def cross_fit_threshold(precision, labels, probabilities, lists, seed):
    """What the report says of a threshold for `precision`: the probability to take rows from, and
    of such thresholds, on the half of the queries that did not choose them, how many rows they
    take, precision and recall. None where it is not reached: by all rows, by a half, or, beyond
    chance, by what is taken, of which fewer than 20 rows show nothing."""
    if len(lists) < FEWEST_TO_HALVE:
        return None
    first_half, second_half = halves(len(lists), seed)
    first = np.concatenate([lists[query] for query in first_half])
    second = np.concatenate([lists[query] for query in second_half])
    threshold = threshold_for(precision, labels, probabilities)
    chosen_on_first = threshold_for(precision, labels[first], probabilities[first])
    chosen_on_second = threshold_for(precision, labels[second], probabilities[second])
    if None in (threshold, chosen_on_first, chosen_on_second):
        return None

    is_taken = np.empty(len(labels), dtype=bool)
    is_taken[first] = probabilities[first] >= chosen_on_second
    is_taken[second] = probabilities[second] >= chosen_on_first
    is_relevant = labels >= 0.5
    taken, hits = is_taken.sum(), is_relevant[is_taken].sum()
    # Of 95 % of the samples of rows of that precision as many are relevant.
    fewest = taken * precision - 1.645 * math.sqrt(taken * precision * (1 - precision))
    if taken < ENOUGH["relevant rows"] or hits < fewest:
        return None
    return {
        "threshold": float(threshold),
        "rows": int(taken),
        "precision": float(hits / taken),
        "recall": float(hits / is_relevant.sum()),
    }


# ---- The retriever -------------------------------------------------------------------------------
SHARES = tuple(tenth / 10 for tenth in range(11))  # of the retriever in a mixture, that are tried


@dataclass
class Retrieved:
    """M rows of the eval data with the retriever's score: a search before it is reranked."""

    rows: np.ndarray  # [M], their numbers
    scores: np.ndarray  # [M], the retriever's, higher is better
    labels: np.ndarray  # [M]
    lists: dict  # candidate_lists() of these rows
    weight: float  # the retriever_weight of the model's config; 0: a share is to be chosen

    @property
    def shares(self):
        """The shares [S] of the retriever that are measured: from 0, the model alone, to 1, the
        retriever alone."""
        return (0.0, self.weight, 1.0) if self.weight else SHARES

    @property
    def choices(self):
        """The places in `shares` of those that a mixture may have."""
        return [1] if self.weight else list(range(len(SHARES)))

    @cached_property
    def order(self):
        """The retriever's scores [M] as places within each query's list, from the worst, 0: whatever
        their scale, and only equal scores are ties. Scores of two queries say nothing together."""
        order = np.empty(len(self.scores))
        for rows in self.lists["all"]:
            _, order[rows] = np.unique(self.scores[rows], return_inverse=True)
        return order

    def mixed(self, scores, share):
        """The retriever's `share` mixed into logits of all rows [N]: [M]. 0 and 1 give exactly the
        one and the other."""
        logits = scores[self.rows]
        if share == 0:
            return logits
        if share == 1:
            return self.order
        mixed = np.empty(len(logits))
        for rows in self.lists["all"]:
            mixed[rows] = mixture(logits[rows], self.scores[rows], share)
        return mixed

    def values_of(self, metric, scores):
        """metric_values() [S, V'] of logits of all rows [N], mixed with each share."""
        values = []
        for share in self.shares:
            mixed = self.mixed(scores, share)
            values.append(metric_values(metric, self.lists[metric], self.labels, mixed))
        return np.array(values)

    def metrics_with(self, scores, share):
        """All metrics of a ranking, of logits [N] mixed with the retriever's `share`; those of all
        pairs together are None."""
        no_pairs = {**self.lists, "average_precision": []}
        return metrics_of(no_pairs, self.labels, self.mixed(scores, share))


def metric_of_search(metric):
    """The metric by which a model is compared with a retriever, where weights are compared by
    `metric`: one of a ranking, since over all pairs a retriever's scores cannot be compared."""
    return metric if ranking_metric(metric) else "ndcg@10"


def mention_retriever(dataset, metric):
    """Say how many eval queries have the retriever's scores, and what its order is worth."""
    retrieved = dataset.retrieved
    if retrieved is None:
        return
    metric = metric_of_search(metric)
    count = f"{len(retrieved.lists['all'])} of {len(dataset.lists['all'])} eval queries"
    lists = retrieved.lists[metric]
    worth = "none of them can be ranked"
    if lists:
        value = metric_values(metric, lists, retrieved.labels, retrieved.order).mean()
        worth = f"its order has {metric} {value:.4f}"
    say(f"There are the retriever's scores for {count}: {worth}.")


# ---- The run -------------------------------------------------------------------------------------
class StopRequest:
    """A signal that asks training to stop, noted until training looks."""

    SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows has the first two

    def __init__(self):
        self.arrivals = []  # (signal number, time in seconds)

    @property
    def is_made(self):
        """Whether a signal has arrived."""
        return len(self.arrivals) > 0

    @property
    def signal_number(self):
        """The first signal's; SIGTERM where another process received one."""
        return self.arrivals[0][0] if self.arrivals else signal.SIGTERM

    def note(self, number, _frame):
        """Handle a signal: note it. One over 5 s after the first ends the process at once, as it
        would outside of training; one before is what launchers pass on of what may have arrived
        already."""
        now = time.monotonic()
        self.arrivals.append((number, now))
        _, first_time = self.arrivals[0]
        if now - first_time > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextmanager
    def noted(self):
        """Within it signals are noted. In a thread of a user's own nothing is: Python gives them to
        the main one."""
        handlers_before = {}
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                number = getattr(signal, name, None)
                # SIG_IGN: so nohup and a script's & have it.
                if number is None or signal.getsignal(number) == signal.SIG_IGN:
                    continue
                handlers_before[number] = signal.signal(number, self.note)
        try:
            yield
        finally:
            late = self.arrivals[:1]
            self.arrivals.clear()
            for number, handler in handlers_before.items():
                signal.signal(number, handler)
        # Only where the loop came to its end: a signal after the last step, for which nobody looked.
        for number, _ in late:
            signal.raise_signal(number)


@dataclass
class Candidate:
    """Weights that were evaluated: the base, those after a step, or a mixture of both."""

    step: int  # 0: the base
    epoch: int
    base_interpolation: float  # share of the base
    scores: torch.Tensor | None  # logits [N] of the eval rows, float64; None: no longer needed
    # Of weights or scores that are not finite there are no values, and the metrics are None:
    metrics: dict = field(default_factory=dict)
    values: torch.Tensor | None = None  # [V], those of metric_values()
    with_retriever: torch.Tensor | None = None  # [S, V'], those of Retrieved.values_of()
    quality: float = -math.inf  # their mean, rounded lest noise decides which candidate is best
    has_new_head: bool = False  # whether its head was drawn at random and never trained
    logged: dict = field(default_factory=dict)  # scalars, by name


@dataclass
class Progress:
    """How far a run has come: all that a checkpoint holds beside weights, optimizer and scaler."""

    run_id: str  # wandb's
    max_tokens: int  # bound of a micro-batch; out-of-memory lowers it
    # [N, 2] of each train row: sum of its probabilities × 2^30, and how often it was seen.
    row_sums: torch.Tensor
    step: int = 0  # the last that was done
    best_step: int = 0  # of the best evaluation since training began
    bad_steps: int = 0  # in a row, up to now, that were not applied
    overflows: int = 0  # steps that the fp16 scaler left out
    # (step, epoch, loss, lr, gradient norm) of each step.
    history: list = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)  # the base first


@dataclass
class Checkpoint:
    """What save_checkpoint() wrote: plain dicts and tensors, which are read without running
    code."""

    folder: Path
    args: dict
    identity: dict
    record: dict
    progress: Progress
    model: dict  # {name: trained weight}
    optimizer: dict
    scaler: dict | None  # of fp16
    best_weights: dict | None  # {name: trained weight}, from a file of their own


@dataclass
class Throughput:
    """What the steps of this process have trained since it began, with the others' share, and how
    long they took."""

    pairs: int = 0
    tokens: int = 0  # without padding
    squared_lengths: int = 0  # the sum of them
    seconds: float = 0.0


@dataclass
class Run:
    """A run in memory: what is asked of it, what it computes with, and how far it has come."""

    args: dict
    folder: Path  # that it writes to, in output_dir
    identity: dict  # what a resumed run has to share with its checkpoint
    record: dict  # what run.json tells besides
    accelerator: Accelerator
    model: BertRerankerModel
    wrapped: torch.nn.Module  # the model as it is trained: in DDP where there are several processes
    optimizer: torch.optim.Optimizer
    train_data: RerankDataset
    lists: TrainLists | None  # of the train rows; None: the loss takes none
    eval_data: RerankDataset | None  # None: nothing can be measured
    metric: str | None  # of METRICS, by which weights are compared
    progress: Progress
    checkpoint: Checkpoint | None = None  # to go on from, until its weights are in the model
    stop: StopRequest = field(default_factory=StopRequest)
    throughput: Throughput = field(default_factory=Throughput)
    # {name: the base's bias}, where fit_bias() shifted it.
    unshifted_bias: dict = field(default_factory=dict)
    # {name: trained weight} in host memory; None: the last weights are kept.
    base_weights: dict | None = None
    best_weights: dict | None = None
    owes_checkpoint: bool = False  # one is due, once a step is good

    @property
    def samples_per_step(self):
        """Train rows of an optimizer step, of all processes."""
        return self.identity["samples of a step"]

    @property
    def steps_per_epoch(self):
        """Optimizer steps of an epoch; the last may have fewer rows."""
        return math.ceil(len(self.train_data) / self.samples_per_step)

    @property
    def total_steps(self):
        """Optimizer steps of the whole run."""
        return self.args["epochs"] * self.steps_per_epoch

    def lists_in(self, window):
        """The lists that the loss takes of a `window` (row numbers), index arrays into it."""
        return self.lists.whole_in(window) if self.lists else []

    def epoch_of(self, step):
        """The epoch, from 1 on, that a step is in; 0 of step 0."""
        return math.ceil(step / self.steps_per_epoch) if step else 0


def any_process(accelerator, is_so):
    """Whether `is_so` in any of the processes: all of them have to ask."""
    if accelerator.num_processes == 1:
        return is_so
    count = torch.tensor(float(is_so), device=accelerator.device)
    return accelerator.reduce(count, "sum").item() > 0


# ---- Preparation ---------------------------------------------------------------------------------
# What micro_batch_tokens "auto" stands for: on a CPU, whose cache keeps so many; elsewhere, for a
# step of 16 rows of 512 tokens to take two micro-batches. On CUDA it may be more, or less.
CPU_TOKENS = 1024
ENOUGH_TOKENS = 4096
MEMORY_SHARE = 0.9  # of a GPU's memory, that a run may take


# What a launcher tells a process of itself and the others.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start_processes():
    """Let accelerate find the processes and the device of this run. UserError where it cannot, or
    finds fewer than a launcher has announced: each would train alone, and all write to one folder.
    """
    # A caller's, whose settings may be others, comes back when the run has ended.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # Unless told, accelerate overlooks the other CPU processes.
    is_cpu = not torch.accelerator.is_available()
    one_day = timedelta(days=1)  # others wait while one tokenises or saves
    variables = {}  # as they are now: accelerate fills in what is missing
    for name in LAUNCHER_VARIABLES:
        if os.environ.get(name):
            variables[name] = os.environ[name]
        else:  # what is empty is as good as not there, but accelerate would read a number
            os.environ.pop(name, None)
    try:
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        count = PartialState(cpu=is_cpu, timeout=one_day).num_processes
    except (ValueError, RuntimeError) as error:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(variables)
        problem = f"the processes cannot start: {error}"
        raise UserError(launch_advice(problem, variables), 2) from error

    if torch.distributed.is_initialized() and count != torch.distributed.get_world_size():
        raise UserError(
            f"there is a process group of {torch.distributed.get_world_size()}, which cannot be "
            "used: set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each process "
            "before train(), as torchrun does",
            2,
        )
    if count != announced:
        problem = f"{announced} processes are announced, {count} found"
        raise UserError(launch_advice(problem, variables), 2)


def launch_advice(problem, variables):
    """What a user is told where `variables`, {name: value}, are a launcher's, but not all of it."""
    found = [f"{name}={value}" for name, value in variables.items()]
    return (
        f"{problem}.\n"
        f"The environment has {', '.join(found) or 'none of the variables of a launcher'}.\n"
        "  one process:      unset them (env -u RANK -u WORLD_SIZE -u LOCAL_RANK python …)\n"
        "  several of them:  torchrun or accelerate launch, which set them all (docs/scaling.md)"
    )


def mention_idle_gpus():
    """Say how all GPUs are used, where plain `python` uses one of several."""
    gpus = torch.cuda.device_count()
    if gpus > PartialState().num_processes == 1:
        command = subprocess.list2cmdline(sys.argv)
        say(f"Using 1 GPU of {gpus}; all: accelerate launch --num_processes {gpus} {command}")


def prepare(args, run_dir, checkpoint_folder):
    """What comes before the first evaluation: the Run, with `progress` at the checkpoint's if there
    is one."""
    mention_idle_gpus()
    train_rows, eval_rows, paths, data_sha256 = load_data(args)
    check_rows(train_rows, eval_rows, (args["min_label"] + args["max_label"]) / 2)
    model = load_base(args)
    identity = identity_of(args, model, train_rows, eval_rows)
    record = record_of(args, identity, data_sha256)
    checkpoint = None
    if checkpoint_folder:
        checkpoint = load_checkpoint(checkpoint_folder, args, identity, record)
    lists = lists_for_loss(train_rows, args, identity["samples of a step"])

    # The first process of a machine writes the token ids that the others then find.
    with PartialState().local_main_process_first():
        train_data = RerankDataset(train_rows, paths, "train", model, args)
        eval_data = RerankDataset(eval_rows, paths, "eval", model, args)
    record["language"] = language_of(query for query, _ in islice(train_data.pairs(), 500))
    metric = choose_metric(eval_data, args)
    if metric:
        mention_retriever(eval_data, metric)
    if args["freeze_embeddings"]:
        model.model.get_input_embeddings().requires_grad_(False)
    if args["epochs"]:
        freeze_weights_without_gradient(model)
    if args["gradient_checkpointing"]:
        keep_few_activations(model.model)

    if is_main_process() and args["epochs"]:
        remove_stale_caches(train_data.cache, eval_data.cache)
        claim_run_folder(run_dir, checkpoint, args)
        require_space_for_run(run_dir, model, args)
    accelerator = make_accelerator(args, run_dir, record["precision"])
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, args))

    run = Run(
        args=args,
        folder=run_dir,
        identity=identity,
        record=record,
        accelerator=accelerator,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        train_data=train_data,
        lists=lists,
        eval_data=eval_data if metric else None,
        metric=metric,
        progress=checkpoint.progress if checkpoint else first_progress(train_data),
        checkpoint=checkpoint,
    )
    start_loggers(run)
    bound = choose_bound(run)
    parameters = sum(weight.numel() for weight in model.parameters())
    say(
        f"{parameters / 1e6:.1f} M parameters, device {accelerator.device}, "
        f"precision {record['precision'].replace('no', 'fp32')}, "
        f"processes: {accelerator.num_processes}, {bound}"
    )
    return run


def load_base(args):
    """The model that training starts from, with max_len and formats as `args` says."""
    name, max_len = args["model_name_or_path"], args["max_len"]
    model = BertRerankerModel.from_pretrained(name, args["revision"], args["trust_remote_code"])
    if model.new_weights:
        names = ", ".join(model.new_weights)
        say(f"Not in {name}, so drawn with seed {args['seed']}: {names}")
    if model.has_other_head:
        say("The head that is there has another number of outputs than one: it is not used.")
    if max_len > model.max_len:
        raise UserError(
            f"max_len {max_len}: {name} takes {model.max_len} (positions, model_max_length)", 2
        )

    model.tokenizer.model_max_length = max_len
    config = model.model.config
    if args["epochs"]:
        vars(config).pop("retriever_weight", None)  # this run finds one, where it has scores
    for key in ("query_format", "document_format"):
        if args[key] != "{}":
            config.update({key: args[key]})
    require_room_beside_formats(model, max_len)
    if args["long_documents"]:
        config.update({"long_documents": args["long_documents"]})
    # Pipelines and CrossEncoder apply the sigmoid to a logit where the config says so, in a word of
    # today; one of yesterday would go before it.
    vars(config).pop("sbert_ce_default_activation_function", None)
    activation = {"activation_fn": "torch.nn.Sigmoid"}
    config.update({"problem_type": None, "sentence_transformers": activation})
    return model


def require_room_beside_formats(model, max_len):
    """UserError where query_format and document_format leave the texts hardly a token."""
    taken = 0
    for form in model.formats:
        text = form.replace("{}", "")
        taken += len(model.plain_tokenizer.encode(text, add_special_tokens=False))
    room = max_len - model.plain_tokenizer.num_special_tokens_to_add(is_pair=True) - taken
    if taken and room < FEWEST_TOKENS:
        raise UserError(
            f"query_format and document_format take {taken} of max_len {max_len} tokens: shorten "
            "them, or take a larger max_len",
            2,
        )


def identity_of(args, model, train_rows, eval_rows):
    """What a resumed run has to share with its checkpoint beside its args: checksums of what it
    computes with, and the samples of a step."""
    config = model.model.config.to_dict()
    config.update({"transformers_version": "", "_name_or_path": ""})
    base_weights = hashlib.sha256()
    for weight in model.state_dict().values():
        base_weights.update(weight.numpy())

    processes = PartialState().num_processes
    return {
        "train rows": hashlib.sha256(train_rows).hexdigest(),
        "eval rows": hashlib.sha256(eval_rows).hexdigest(),
        "config": hashlib.sha256(json.dumps(config, default=str).encode()).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer_text(model).encode()).hexdigest(),
        "base weights": base_weights.hexdigest(),
        "samples of a step": args["batch_size"] * args["gradient_accumulation_steps"] * processes,
    }


def record_of(args, identity, data_sha256):
    """What run.json tells of a run, besides its args: with what, on what and where it was made."""
    state = PartialState()
    device = state.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name()
    packages = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
    return {
        "data_sha256": data_sha256,
        "base_sha256": identity["base weights"],
        "python": platform.python_version(),
        "base_revision": revision_in_cache(args),
        "processes": state.num_processes,
        "precision": supported_precision(args["mixed_precision"], state.device),
        "identity": identity,
        "versions": {package: version(package) for package in packages},
        "hardware": f"{platform.platform()}, {device}",
        "git_revision": git_revision(),
        "script_sha256": script_sha256(),
    }


def revision_in_cache(args):
    """The hub's commit that the base is of; None of a local folder."""
    name = args["model_name_or_path"]
    if Path(name).is_dir():
        return None
    config = try_to_load_from_cache(name, "config.json", revision=args["revision"])
    return Path(config).parent.name if config else None


def git_revision():
    """The commit of the repository that this file lies in; "" outside of one, as in a notebook's
    cell or a zip file, None without git."""
    if not shutil.which("git"):
        return None
    folder = str(Path(git_revision.__code__.co_filename).resolve().parent)
    command = ["git", "-C", folder, "rev-parse", "--verify", "HEAD"]
    # What git complains of may name paths that are no text.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip()


def script_sha256():
    """A checksum of this script but for its settings, which are compared one by one."""
    lines, literal = read_source()
    code = lines[: literal.lineno - 1] + lines[literal.end_lineno :]
    return hashlib.sha256("".join(code).encode()).hexdigest()


def lists_for_loss(rows, args, samples_per_step):
    """The TrainLists of the train rows, whose number is said; None where the loss takes none.
    UserError where there is none to take."""
    if not args["listwise_weight"] or not args["epochs"]:
        return None
    lists = TrainLists(rows, (args["min_label"] + args["max_label"]) / 2)
    sizes = lists.sizes[lists.teaches]
    if not len(sizes):
        raise UserError(
            "listwise_weight has nothing to weigh: no query of the train data has rows with "
            "different labels, one of them relevant. Set it to 0.",
            2,
        )
    if sizes.min() > samples_per_step:
        raise UserError(
            f"listwise_weight has nothing to weigh: the smallest list has {sizes.min()} rows, an "
            f"optimizer step {samples_per_step}. Raise batch_size, or set listwise_weight to 0.",
            2,
        )
    whole = lists.count_whole(samples_per_step, args["seed"])
    warning = "Warning: " if whole < len(sizes) / 2 else ""
    say(
        f"{warning}{len(sizes)} of {len(lists.sizes)} train queries have rows with different labels, "
        "one of them relevant. The listwise loss takes those that are whole in a step of "
        f"{samples_per_step} rows, in the first epoch {whole}."
    )
    if warning:
        say(
            f"The longest list has {sizes.max()} rows: a batch_size that makes a step several times "
            "as long takes in most."
        )
    return lists


def language_of(texts):
    """"ja", "ko" or "zh" by the script of `texts`, "en" by its commonest words; None where it is
    none of them."""
    text = " ".join(texts).lower()
    letters = sum(map(str.isalpha, text))
    scripts = {"ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7a3]", "zh": "[\u4e00-\u9fff]"}
    for code, script in scripts.items():
        if len(re.findall(script, text)) * 10 > letters:
            return code
    common = {"the", "and", "of", "to", "with", "what", "how", "are", "this", "from"}
    words = re.findall(r"\w+", text)
    if sum(word in common for word in words) * 10 > len(words):
        return "en"
    return None


# What a verdict takes: with fewer no interval would hold what it promises.
ENOUGH = {
    "queries": 20,
    "relevant rows": 20,  # these two with average precision over all pairs
    "irrelevant rows": 20,
    "queries that changed": 6,
}


def too_few_of(eval_data, metric):
    """{what: how many there are} of what the eval data have too few of for a verdict by `metric`,
    as ENOUGH names it."""
    counts = {"queries": len(eval_data.lists[metric])}
    if not ranking_metric(metric):  # of all pairs together
        relevant = int((eval_data.labels >= 0.5).sum())
        counts["relevant rows"] = relevant
        counts["irrelevant rows"] = len(eval_data.labels) - relevant
    return {what: count for what, count in counts.items() if count < ENOUGH[what]}


def explain_average_precision(lists):
    """Say why nothing can be ranked in the candidate `lists`, so that all pairs are measured
    together."""
    rows_of_longest = max(len(rows) for rows in lists)
    if rows_of_longest == 1:
        why = "each of them has one row"
        hint = "if one query should have several, its text has to be the same in each"
    else:
        why = "all rows of a query have one and the same label"
        hint = "give queries both relevant and irrelevant rows"
    say(
        f"Warning: none of the {len(lists)} eval queries can be ranked, for {why}: measured by "
        f"average precision over all pairs, rather than by NDCG@10; {hint}."
    )


def choose_metric(eval_data, args):
    """The metric by which weights are compared; None where there is nothing to measure."""
    wanted = [args["metric_for_best_model"]]
    if wanted == ["auto"]:
        wanted = ["ndcg@10", "average_precision"]
    for metric in wanted:
        if eval_data.lists[metric]:
            if metric != wanted[0]:
                explain_average_precision(eval_data.lists["all"])
            too_few = too_few_of(eval_data, metric) if args["epochs"] else {}
            for what, count in too_few.items():
                say(f"Warning: {count} eval {what} are too few: a verdict takes {ENOUGH[what]}.")
            return metric

    if len(eval_data) or not args["epochs"]:
        message = f"there are no eval rows with labels to measure {' or '.join(wanted)} by"
        others = [metric for metric in METRICS if eval_data.lists.get(metric)]
        if others:
            message += f" (there are for {', '.join(others)})"
        if args["eval_dataset"] != "auto" or not args["epochs"]:
            raise UserError(f"{message}: give others, or train with --eval_dataset None", 2)
        say(f"Warning: {message}: no evaluation, and nothing will be claimed about the ranking.")
    return None


def freeze_weights_without_gradient(model):
    """Freeze what no score depends on, such as the embedding of a mask: DDP would wait for its
    gradient."""
    logits = model.eval()(model.preprocess(PROBES[:1], model.max_len))["logits"]
    reached, functions = set(), {logits.grad_fn}
    while functions:  # from the logits back to the leaves of autograd's graph
        function = functions.pop()
        reached.add(function)
        inputs = {each for each, _ in function.next_functions}
        functions |= inputs - reached - {None}

    weights = {function.variable for function in reached if hasattr(function, "variable")}
    for weight in model.parameters():
        if weight not in weights:
            weight.requires_grad_(False)


def keep_few_activations(model):
    """Let `model` compute activations again in the backward rather than keep them; UserError where
    its architecture has no such thing."""
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"gradient_checkpointing: transformers has none for {model.config.model_type} models: "
            "leave it False",
            2,
        )
    name_of_4 = model.gradient_checkpointing_enable  # transformers 5.2x deprecates it
    enable = getattr(model, "activation_checkpointing_enable", name_of_4)
    enable({"use_reentrant": False})


def remove_stale_caches(*kept):
    """Remove the token files of other data and settings, which the folder would otherwise
    collect, and what whole_file() left of one where a run was killed."""
    folder = kept[0].parent
    for path in folder.glob("?" * 64 + ".*"):
        if path not in kept:
            with suppress(PermissionError):  # Windows keeps what is still mapped
                path.unlink()


def claim_run_folder(run_dir, checkpoint, args):
    """Empty the run's folder but for what this run goes on from. UserError where another run is
    writing there, or has written a checkpoint since find_checkpoint() looked."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock_folder(run_dir.parent)
    newest = checkpoints_in(run_dir)[-1:]
    is_known = newest == [] or (checkpoint and newest == [checkpoint.folder])
    # A checkpoint that is asked for by name may well be older than the newest.
    may_be_older = args["resume_from_checkpoint"] not in (None, "latest")
    if not (is_known or may_be_older or args["overwrite_output_dir"]):
        raise UserError(
            f"{newest[0]} has come meanwhile: another run writes to {run_dir.parent}"
        )

    kept = []
    if checkpoint and checkpoint.folder.resolve().parent == run_dir.resolve():
        # What is newer is done again, if need be.
        newest_checkpoint = f"checkpoint-{checkpoint.progress.step:08}"
        kept += [path for path in checkpoints_in(run_dir) if path.name <= newest_checkpoint]
        newest_best = f"best_weights-{checkpoint.progress.best_step:08}.pt"
        kept += [path for path in best_weights_in(run_dir) if path.name <= newest_best]
    for path in written_in(run_dir):
        if path not in kept:
            remove(path)
    (run_dir / "logs").mkdir(parents=True)


def require_space_for_run(run_dir, model, args):
    """UserError unless the disk has room for the checkpoints and the weights that this run will
    add."""
    # Just before an old checkpoint goes there is one more than the limit.
    count = max(1, args["save_total_limit"] + 1 - len(checkpoints_in(run_dir)))
    trained = bytes_of(trained_weights(model).values())
    weights = bytes_of(model.parameters())
    # A checkpoint: weights, AdamW's two moments, the best weights. At the end: final_model,
    # fine_tuned_model.
    needed = count * 4 * trained + 2 * weights
    require_space(run_dir, needed, f"What a run keeps ({count} checkpoints, weights)")


def make_accelerator(args, run_dir, precision):
    """The Accelerator, which knows processes, device, precision and loggers."""
    return Accelerator(
        cpu=PartialState().device.type == "cpu",
        mixed_precision=precision,
        log_with=args["log_with"] if args["epochs"] else None,
        project_dir=run_dir / "logs",
        # Windows accumulate gradients here; unless told, accelerate asks the environment, and
        # divides by the steps that it finds.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Buffers, position ids and the like, are constants.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def make_optimizer(model, args):
    """AdamW over the weights that are trained, with no decay on biases and LayerNorm, which have
    one dimension."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim > 1]
    vectors = [weight for weight in trained if weight.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": args["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args["lr"], betas=(0.9, 0.999), eps=1e-8, fused=True)


def first_progress(train_data):
    """The progress of a run that begins; choose_bound() sets its max_tokens."""
    row_sums = torch.zeros(len(train_data), 2, dtype=torch.long)
    return Progress(run_id=os.urandom(4).hex(), max_tokens=0, row_sums=row_sums)


def start_loggers(run):
    """Start TensorBoard or wandb, in the run's folder, with the args as the first that is
    logged."""
    args = run.args
    wandb = {
        "dir": str(run.folder / "logs"),
        "id": run.progress.run_id,
        "resume": "allow" if run.checkpoint else None,
    }
    config = args if args["log_with"] == "wandb" else None
    run.accelerator.init_trackers("train_bert_rerank", config, {"wandb": wandb})
    # TensorBoard takes text for Markdown, and shows what is indented by four as it is.
    lines = [f"    {key}: {value!r}" for key, value in args.items()]
    run.accelerator.log({"args": "\n".join(lines)}, step=0)


def choose_bound(run):
    """Set what one more micro-batch costs and the bound of each, in padded tokens; returns what is
    to be said of it. A checkpoint's bound stays, with what out-of-memory left of it, unless the
    settings ask for another."""
    args, record, progress = run.args, run.record, run.progress
    device = run.accelerator.device
    cost = micro_batch_cost(run.model.model, device, record["precision"])
    record["micro_batch_cost"] = min(gather_object([cost]))  # all plan alike, on unlike cards too
    if has_known_rate(device):
        mention_unknown_card(torch.cuda.get_device_properties(device), record["precision"])

    is_auto = args["micro_batch_tokens"] == "auto"
    needs = ""
    if run.checkpoint and (is_auto or has_same_bound(run.checkpoint.args, args)):
        record["micro_batch_tokens"] = run.checkpoint.record["micro_batch_tokens"]
        return f"micro-batches of up to {progress.max_tokens:,} tokens, as the checkpoint has them"
    if not is_auto:
        bound = args["micro_batch_tokens"] or args["batch_size"] * args["max_len"]
    elif device.type == "cpu":
        bound = CPU_TOKENS
    elif device.type != "cuda":
        bound = ENOUGH_TOKENS
    elif args["epochs"]:
        bound, needed, memory = largest_micro_batch(run)
        needs = f"; needs {needed / 1e9:.1f} of {memory / 1e9:.1f} GB"
    else:
        bound = 32 * args["max_len"]  # as many pairs as in predict()
    record["micro_batch_tokens"] = bound
    progress.max_tokens = bound
    return f"micro-batches of up to {bound:,} tokens{needs}"


def has_same_bound(args, others):
    """Whether two args ask for the same bound of a micro-batch."""
    keys = ["micro_batch_tokens"]
    if args["micro_batch_tokens"] is None:
        keys += ["batch_size", "max_len"]
    return all(args[key] == others[key] for key in keys)


def mention_unknown_card(card, precision):
    """Say where the rates of another card than this one are taken."""
    capability = card_rate(card, precision).capability
    if capability != (card.major, card.minor):
        say(
            f"{card.name}: the rates of compute capability {card.major}.{card.minor} are not "
            f"known, those of {capability[0]}.{capability[1]} are taken to cut micro-batches."
        )


def largest_micro_batch(run):
    """What micro_batch_tokens "auto" stands for on a GPU, the bytes that a run needs with it, and
    those of the GPU: as many times the longest row as MEMORY_SHARE of all its memory holds beside
    the optimizer's state, found by real passes. What others hold there does not count; where they
    leave too little it is a UserError."""
    accelerator = run.accelerator
    free, memory = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved()  # by this process
    free, memory = map(min, zip(*gather_object([(free, memory)]), strict=True))
    limit = int(MEMORY_SHARE * memory)
    optimizer_state = 2 * bytes_of(trained_weights(run.model).values())  # two moments
    reserve = partial(torch.empty, optimizer_state, dtype=torch.uint8, device=accelerator.device)
    reserved, is_done = unless_out_of_memory(reserve)
    if any_process(accelerator, not is_done):
        raise UserError(
            f"the GPU has no room for the optimizer: {optimizer_state / 1e9:.1f} GB are needed "
            f"beside weights and gradients, and {free / 1e9:.1f} of {memory / 1e9:.1f} GB are "
            "there for all of them: end what else runs there, take a smaller model, or try "
            "--freeze_embeddings true"
        )

    longest = int(run.train_data.lengths.max())
    samples = min(run.samples_per_step, len(run.train_data))
    samples = math.ceil(samples / accelerator.num_processes)
    most = most_rows(samples, longest, run.record["micro_batch_cost"])
    needed = {}  # bytes, by the rows of a micro-batch

    def fits(rows):
        if extrapolated(needed, rows) > limit:
            return False
        needed[rows] = memory_of(run, rows)
        # Windows lets a program go on in the host's memory, slowly.
        if free < limit and needed[rows] > free:
            raise UserError(crowded(needed, longest, free, memory))
        return needed[rows] <= limit

    rows = largest(most, fits) or 1
    if needed[rows] == math.inf:
        raise UserError(no_room_for_a_pair(longest, longest))
    del reserved
    run.wrapped.zero_grad()
    release_memory()
    torch.cuda.reset_peak_memory_stats()  # run.json tells that of training
    return rows * longest, needed[rows], memory


def most_rows(samples, longest, batch_cost):
    """The most rows of `longest` tokens each for a micro-batch: all samples of a step, up to
    ENOUGH_TOKENS or twice what one more micro-batch costs, whichever is more. While a card computes
    so many, the processor has started the next: larger ones would only pad more."""
    tokens = max(ENOUGH_TOKENS, 2 * batch_cost)
    return min(samples, max(1, tokens // longest))


def largest(most, fits):
    """The largest number from 0 to `most` that `fits`, or up to a quarter less: doubled until one
    does not, and then halfway between."""
    low = 0
    while low < most:
        number = min(max(1, 2 * low), most)
        if not fits(number):
            break
        low = number
    else:
        return most

    high = number
    while high - low > max(1, low // 4):
        number = (low + high) // 2
        if fits(number):
            low = number
        else:
            high = number
    return low


def extrapolated(needed, rows):
    """What a micro-batch of so many `rows` will need, by a straight line through the two largest of
    which it is known, {rows: bytes}; 0 where there are no two."""
    known = sorted(count for count, size in needed.items() if size < math.inf)
    if len(known) < 2:
        return 0
    fewer, more = known[-2:]
    of_a_row = (needed[more] - needed[fewer]) / (more - fewer)
    return needed[more] + of_a_row * (rows - more)


def memory_of(run, rows):
    """The bytes in use, at most, while micro-batches of so many times the longest row are trained,
    on the fullest GPU; infinite where memory ran out."""
    micro_batch = np.full(rows, run.train_data.lengths.argmax())
    torch.cuda.reset_peak_memory_stats()
    run.model.train()
    # The backward of the second finds a gradient there; that of the last is left out.
    passes = partial(forward_backward, run, [micro_batch] * 3, 3 * rows)
    result, is_done = unless_out_of_memory(passes)
    del result  # and with it the activations
    release_memory()
    peak = torch.cuda.max_memory_allocated() if is_done else math.inf
    return max(gather_object([peak]))


def no_room_for_a_pair(bound, longest):
    """What a user is told where a pair of `longest` tokens does not fit, tried with a `bound`."""
    return (
        f"out of memory at {bound} tokens, and one pair has {longest}: "
        "lower max_len, or try --gradient_checkpointing true, --freeze_embeddings true, "
        "--mixed_precision bf16"
    )


def crowded(needed, longest, free, memory):
    """What a user is told where other programs hold memory that a run would use; `needed` bytes
    by the rows of a micro-batch, each `longest` tokens."""
    rows = max((rows for rows, size in needed.items() if size <= free), default=None)
    advice = "--freeze_embeddings true or --gradient_checkpointing true, which need less"
    if rows:
        advice = f"--micro_batch_tokens {rows * longest}, which needs {needed[rows] / 1e9:.1f} GB"
    return (
        f"other programs hold memory of the GPU: this run would use up to "
        f"{MEMORY_SHARE * memory / 1e9:.1f} of {memory / 1e9:.1f} GB, and {free / 1e9:.1f} are "
        f"free for it: end what else runs there, or take {advice}"
    )


# ---- Evaluation ----------------------------------------------------------------------------------
def score_together(run, encoded, max_tokens, show_progress_bar=False):
    """Logits [N] in fp32 of N encoded pairs, the same in all processes; None where one of them has
    a stop request.

    The processes share out micro-batches, whole, so that their number changes no score but for
    rounding."""
    accelerator = run.accelerator
    batch_cost = run.record["micro_batch_cost"]
    micro_batches = run.model.scoring_batches(encoded, max_tokens, batch_cost)
    mine = micro_batches[accelerator.process_index :: accelerator.num_processes]
    parts = []
    for logits in run.model.score_batches(encoded, mine, show_progress_bar):
        parts.append(logits)
        if run.stop.is_made:
            break
    if any_process(accelerator, run.stop.is_made):
        return None
    logits = in_order_of_rows(len(encoded), mine, parts, accelerator.device)
    return accelerator.reduce(logits, "sum")  # 0 for the rows of others


def evaluate(run, step=0, base_interpolation=0.0):
    """Score the eval data, say and log what came out, warn where it looks ill: the Candidate, None
    where a stop request cut it short. Weights or scores that are not finite are a UserError at step
    0."""
    args, dataset = run.args, run.eval_data
    logits = score_together(run, dataset, run.progress.max_tokens, is_main_process())
    if logits is None:
        return None
    scores = dataset.logits_of_rows(logits.cpu().double())
    metrics = dict.fromkeys(metrics_in(dataset.lists))
    candidate = Candidate(step, run.epoch_of(step), base_interpolation, scores, metrics)
    if step == 0:
        candidate.has_new_head = len(run.model.new_weights) > 0
    title = f"Step {step}, epoch {candidate.epoch}" if step else args["model_name_or_path"]
    if base_interpolation:
        title += f", mixed with {base_interpolation:.0%} of the base"

    if scores.isfinite().all() and has_finite_weights(run.model):
        health = fill_in(candidate, dataset, run.metric)
        shown = {run.metric: candidate.metrics[run.metric], **health}
        numbers = [f"{key} {value:.4f}" for key, value in shown.items() if value is not None]
        say(f"{title}: {', '.join(numbers)}")
        illness = illness_of(health)
    elif step:
        illness = "weights or scores are not finite"
    else:
        raise UserError(f"{title} gives no finite scores: mend it, or try --mixed_precision no")

    if illness and (step or not run.model.new_weights):
        causes = "labels swapped or constant, wrong min_label or max_label"
        if step:
            causes = f"lr {args['lr']} too high, {causes}"
        say(f"!!! WARNING !!! {title}: {illness}. Likely causes: {causes}")
    run.accelerator.log(candidate.logged, step=step)
    return candidate


def fill_in(candidate, dataset, metric):
    """Measure a candidate by its scores, which are finite; returns the health of its
    probabilities."""
    labels, scores = dataset.labels.numpy(), candidate.scores.numpy()
    candidate.metrics, health = measure(dataset.lists, labels, scores)
    values = metric_values(metric, dataset.lists[metric], labels, scores)
    candidate.values = torch.from_numpy(values)
    candidate.quality = round(float(values.mean()), 9)
    if dataset.retrieved:
        with_retriever = dataset.retrieved.values_of(metric_of_search(metric), scores)
        candidate.with_retriever = torch.from_numpy(with_retriever)
    # A mixture is not logged: its step in the log is that of what it is made of.
    if not candidate.base_interpolation:
        for key, value in {**candidate.metrics, **health}.items():
            if value is not None:
                candidate.logged[f"eval/{key}"] = value
    return health


def illness_of(health):
    """What looks ill in probabilities; None where nothing does."""
    if health["spread"] < 0.01:
        return "the scores of a query's rows are nearly alike"
    relevant, irrelevant = health["relevant"], health["irrelevant"]
    if relevant is not None and irrelevant is not None and irrelevant > relevant:
        return "irrelevant rows score higher"
    return None


# ---- Checkpoints ---------------------------------------------------------------------------------
def host_copy(model):
    """{name: weight} of the weights that are trained, copied into host memory."""
    copies = {}
    for name, weight in trained_weights(model).items():
        copies[name] = weight.to("cpu", copy=True)
    return copies


def keep_newest(run_dir, limit):
    """Remove all checkpoints but the `limit` newest, and as many best weights: each checkpoint
    brings one at most."""
    for path in [*checkpoints_in(run_dir)[:-limit], *best_weights_in(run_dir)[:-limit]]:
        remove(path)


def save_checkpoint(run):
    """Write checkpoint-STEP/state.pt, what class Checkpoint holds, and the best weights so far
    beside it, unless this run did so already; then let go of all but the save_total_limit newest.

    A step is saved before it is evaluated. Data order and dropout follow from seed, process and
    step: no random state is kept."""
    progress = run.progress
    accelerator = run.accelerator
    row_sums = accelerator.reduce(progress.row_sums.to(accelerator.device), "sum").cpu()
    if not is_main_process() or not has_finite_weights(run.model):
        return

    weights = trained_weights(run.model)
    state = {
        "args": run.args,
        "identity": run.identity,
        "record": run.record,
        "progress": {
            **vars(progress),
            "row_sums": row_sums,
            "candidates": [vars(candidate) for candidate in progress.candidates],
        },
        "model": weights,
        "optimizer": run.optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    folder = run.folder / f"checkpoint-{progress.step:08}"
    best = run.folder / f"best_weights-{progress.best_step:08}.pt"
    size = 0
    files = {}
    if run.best_weights and not best.exists():
        files[best] = run.best_weights
        size += bytes_of(weights.values())
    if not (folder / "state.pt").exists():
        files[folder / "state.pt"] = state
        size += 3 * bytes_of(weights.values())  # AdamW's state is twice the weights

    limit = run.args["save_total_limit"]
    keep_newest(run.folder, limit)  # more may be there, where a resumed run has another limit
    if files:
        require_space(run.folder, size, folder.name)
    try:
        for path, content in files.items():
            with whole_file(path) as file:
                torch.save(content, file)
    except (OSError, RuntimeError) as error:  # the second is torch's where the disk is full
        raise UserError(
            f"{folder} needs {size / 1e6:,.1f} MB and cannot be written: {error}\n{CHOICES}"
        ) from error
    keep_newest(run.folder, limit)


def load_checkpoint(folder, args, identity, record):
    """The Checkpoint in `folder`; UserError where it is of another run than `args` and `identity`
    tell of. Says what differs otherwise."""
    try:
        state = torch.load(folder / "state.pt", "cpu", weights_only=True)
        new_settings = args.keys() - state["args"].keys()
        if new_settings:
            raise ValueError(f"it is older than {', '.join(sorted(new_settings))}")
        candidates = [Candidate(**candidate) for candidate in state["progress"]["candidates"]]
        progress = Progress(**{**state.pop("progress"), "candidates": candidates})
        best_weights = None
        if progress.best_step and args["load_best_model_at_end"]:
            path = folder.parent / f"best_weights-{progress.best_step:08}.pt"
            best_weights = torch.load(path, "cpu", weights_only=True)
        checkpoint = Checkpoint(folder, progress=progress, best_weights=best_weights, **state)
    # torch.load raises a dozen types for files that are not what it expects.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        raise UserError(
            f"{folder} and the best weights beside it cannot be read: {reason}\n"
            "(Of several machines each has to see output_dir. An earlier version's is not read.)"
        ) from error

    before = {**checkpoint.identity, **checkpoint.args}
    differences = changes(before, {**decisive_settings(args), **identity})
    if differences:
        lines = [f"{folder} is of another run; from it to this one:", *differences]
        to_go_on = CHOICES.splitlines()[1]
        raise UserError(
            "\n  ".join(lines) + f"\nSet that back, or take another output_dir.\n{to_go_on}", 2
        )

    # All that may differ, and where it runs.
    environment = ("processes", "precision", "versions", "hardware", "script_sha256")
    now = {**args, **{key: record[key] for key in environment}}
    now["resume_from_checkpoint"] = checkpoint.args["resume_from_checkpoint"]
    differences = changes({**checkpoint.record, **checkpoint.args}, now)
    lines = [f"Going on after step {progress.step}, from {folder}", *differences]
    if differences:
        lines[0] += ", with other"
    say("\n  ".join(lines))
    return checkpoint


def restore(run):
    """Go on from the run's checkpoint: its weights and optimizer in place of the base's, all that
    was logged in the log again."""
    checkpoint = run.checkpoint
    run.model.load_state_dict(checkpoint.model, strict=False)
    run.optimizer.load_state_dict(checkpoint.optimizer)
    if checkpoint.scaler and run.accelerator.scaler:
        run.accelerator.scaler.load_state_dict(checkpoint.scaler)
    run.best_weights = checkpoint.best_weights
    run.checkpoint = None  # what it holds is memory that is no longer needed

    progress = run.progress
    # The checkpoint has those of all processes, and they are summed up again.
    if not is_main_process():
        progress.row_sums.zero_()
    scalars = {candidate.step: dict(candidate.logged) for candidate in progress.candidates}
    for step, _, loss, lr, grad_norm in progress.history:
        scalars.setdefault(step, {}).update(scalars_of_step(loss, lr, grad_norm))
    for step in sorted(scalars):
        run.accelerator.log(scalars[step], step=step)


def scalars_of_step(loss, lr, grad_norm):
    """What is logged of an optimizer step."""
    return {"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm}


# ---- Training step -------------------------------------------------------------------------------
# With several processes each does its own micro-batches and adds up their gradient by itself
# (no_sync). Its last backward exchanges the sums (trigger_sync_in_backward), and DDP divides them
# by the number of processes P. So that a window of N samples has the mean of them all, a
# micro-batch of B samples has the weight B / N, and each backward is of P times that.
OUT_OF_MEMORY = (  # in the messages of CUDA and MPS, of cuBLAS, of the CPU's allocator
    "out of memory", "ALLOC_FAILED", "you tried to allocate",
)  # fmt: skip
FRACTION = 2**30  # row sums are counted in steps of 1 / FRACTION


def learning_rate(step, total_steps, peak, warmup_proportion):
    """The rate of step 1…total_steps: linear warm-up over ceil(warmup_proportion × them), then
    cosine, 0 after them.

    Of 50 steps with a warm-up of 0.1 five rise: 0.2, 0.4, … 1.0 of the peak."""
    warmup = math.ceil(warmup_proportion * total_steps)
    if step <= warmup:
        return peak * (step / warmup)
    decayed = (step - 1 - warmup) / max(1, total_steps - warmup)
    return peak * ((1 + math.cos(math.pi * decayed)) / 2)


@dataclass
class WindowResult:
    """What a process's forward and backward passes over its share of a window gave."""

    rows: np.ndarray  # [M] numbers of its train rows
    probabilities: torch.Tensor  # [M]
    loss: torch.Tensor  # its share of the window's loss
    last_loss: torch.Tensor | None  # of the last micro-batch, whose backward is still to come


def listwise_loss(logits, labels, lists):
    """Mean over `lists`, index arrays into logits [N] and labels [N], of the cross-entropy between
    the softmax of a list's logits and its labels, divided by their sum (Bruch et al. 2019).

    Of three rows with equal logits and the labels 1, 0, 0 it is log 3."""
    losses = []
    for indices in lists:
        shares = labels[indices] / labels[indices].sum()
        losses.append(torch.nn.functional.cross_entropy(logits[indices], shares))
    return torch.stack(losses).mean()


@torch.no_grad()
def logits_of_window(run, window, micro_batches):
    """Logits [N] of a window's rows in this process's `micro_batches`, index arrays into it; 0 of
    the others."""
    dataset = run.train_data
    parts = []
    for indices in micro_batches:
        batch = run.model.collate([dataset[row] for row in window[indices]])
        parts.append(run.wrapped(batch)["logits"].flatten())
    return in_order_of_rows(len(window), micro_batches, parts, run.accelerator.device)


def list_loss_and_gradient(run, window, lists, logits):
    """The listwise loss of a window's `lists`, times its weight, and its gradient [N] with respect
    to the window's `logits` [N]."""
    logits = logits.cpu().requires_grad_()
    loss = listwise_loss(logits, run.train_data.labels[window], lists)
    loss = run.args["listwise_weight"] * loss
    [gradient] = torch.autograd.grad(loss, logits)
    return loss.detach().to(run.accelerator.device), gradient.to(run.accelerator.device)


def forward_backward(run, micro_batches, window_size, list_gradients=()):
    """Forward and backward passes over micro-batches (row numbers) of a window of `window_size`
    samples, of the mean BCE over all of it; the last backward, for which the processes wait for
    each other, is left to the caller. `list_gradients`, of a listwise loss with respect to the
    logits [B] of each micro-batch, are passed back too; empty where there is none."""
    is_idle = not micro_batches
    if is_idle:  # DDP needs a backward of every process: a row that weighs nothing
        micro_batches = [np.array([0])]

    dataset, accelerator = run.train_data, run.accelerator
    losses, probabilities = [], []
    for number, rows in enumerate(micro_batches):
        batch = run.model.collate([dataset[row] for row in rows])
        weight = 0.0 if is_idle else len(rows) / window_size
        with accelerator.no_sync(run.wrapped):
            output = run.wrapped(batch, dataset.labels[rows])
            loss = output["loss"] * weight
            losses.append(loss.detach())
            if list_gradients:
                # A sum whose gradient with respect to each logit is the one given.
                loss = loss + (output["logits"].flatten() * list_gradients[number]).sum()
            if number + 1 < len(micro_batches):
                accelerator.backward(loss * accelerator.num_processes)
        probabilities.append(output["logits"].detach().sigmoid().flatten())

    rows = np.concatenate(micro_batches)
    probabilities = torch.cat(probabilities)
    if is_idle:
        rows, probabilities = rows[:0], probabilities[:0]
    return WindowResult(rows, probabilities, sum(losses), last_loss=loss)


def last_backward(run, result):
    """The last backward pass of a window, after which the gradient is the mean over all
    processes."""
    with run.accelerator.trigger_sync_in_backward(run.wrapped):
        run.accelerator.backward(result.last_loss * run.accelerator.num_processes)
    result.last_loss = None  # and with it the activations


def unless_out_of_memory(function, *arguments):
    """(what `function` returns, True), or (None, False) where memory ran out."""
    try:
        return function(*arguments), True
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return None, False


def all_unless_out_of_memory(accelerator, function, *arguments):
    """(what `function` returns, True), or (None, False) where memory ran out in any process: all go
    on, or none."""
    result, is_done = unless_out_of_memory(function, *arguments)
    if any_process(accelerator, not is_done):
        return None, False
    return result, True


def try_window(run, window, micro_batches, seed):
    """Backpropagate a `window` (row numbers) in this process's `micro_batches`, index arrays into
    it, dropping out as `seed` says: a WindowResult, or None where any process ran out of memory.

    A listwise loss takes the rows of a list together, which may stand in several micro-batches and
    processes. So the logits of all come first, in passes that keep no activations. They give the
    gradient with respect to each logit, which the same passes, with the same dropout, then pass
    back (GradCache, Gao et al. 2021)."""
    accelerator = run.accelerator
    lists = run.lists_in(window)
    list_loss, list_gradients = 0.0, []
    if lists:
        torch.manual_seed(seed)
        logits, is_done = all_unless_out_of_memory(
            accelerator, logits_of_window, run, window, micro_batches
        )
        if not is_done:
            return None
        logits = accelerator.reduce(logits, "sum")
        list_loss, gradient = list_loss_and_gradient(run, window, lists, logits)
        list_gradients = [gradient[indices] for indices in micro_batches]

    torch.manual_seed(seed)
    rows = [window[indices] for indices in micro_batches]
    result, is_done = all_unless_out_of_memory(
        accelerator, forward_backward, run, rows, len(window), list_gradients
    )
    if is_done and accelerator.num_processes > 1:
        # Out of memory here, where the others wait already, ends the run.
        last_backward(run, result)
    elif is_done:
        _, is_done = unless_out_of_memory(last_backward, run, result)
    if not is_done:
        return None
    result.loss += list_loss / accelerator.num_processes
    return result


def train_window(run, window, seed):
    """try_window() in micro-batches of at most progress.max_tokens padded tokens: a WindowResult.
    Where any process runs out of memory, all halve the bound and do the window again."""
    accelerator, progress = run.accelerator, run.progress
    lengths = run.train_data.lengths[window]
    batch_cost = run.record["micro_batch_cost"]
    run.model.train()
    while True:
        plan = plan_window(lengths, progress.max_tokens, batch_cost, accelerator.num_processes)
        result = try_window(run, window, plan[accelerator.process_index], seed)
        if result is not None:
            return result

        if progress.max_tokens <= lengths.max():
            raise UserError(no_room_for_a_pair(progress.max_tokens, lengths.max()))
        progress.max_tokens //= 2
        run.wrapped.zero_grad()
        release_memory()


def train_step(run, window):
    """The next optimizer step, on the rows of a `window`; returns whether a stop request has come
    to any process.

    A step whose loss or gradient is not finite is not applied, and the third in a row is a
    UserError; gradients in fp16 are left to the scaler, which finds its scale by letting them
    overflow."""
    args, accelerator, optimizer, progress = run.args, run.accelerator, run.optimizer, run.progress
    step = progress.step + 1
    lr = learning_rate(step, run.total_steps, args["lr"], args["warmup_proportion"])
    bound = progress.max_tokens
    result = train_window(run, window, dropout_seed(run, step))  # forward and backward
    if progress.max_tokens < bound:
        say(
            f"Out of memory: step {step} was done again; micro-batches now have at most "
            f"{progress.max_tokens} tokens. --micro_batch_tokens {progress.max_tokens} "
            "does so from the start."
        )
    totals = torch.stack([result.loss, result.loss.new_tensor(float(run.stop.is_made))])
    totals = accelerator.reduce(totals, "sum")
    max_grad_norm = args["max_grad_norm"] or math.inf
    grad_norm = accelerator.clip_grad_norm_(run.wrapped.parameters(), max_grad_norm)

    # The one wait for the device in a step, but for that of a listwise loss.
    numbers = torch.cat([totals, grad_norm[None], result.probabilities]).cpu()
    loss, stop_requests, grad_norm = numbers[:3].tolist()
    probabilities = numbers[3:]
    has_finite_gradient = math.isfinite(grad_norm)
    is_good = math.isfinite(loss) and (has_finite_gradient or accelerator.scaler is not None)
    if is_good:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # of a step that is left out, which clipping has begun
    optimizer.zero_grad()

    progress.step = step
    progress.history.append((step, run.epoch_of(step), loss, lr, grad_norm))
    accelerator.log(scalars_of_step(loss, lr, grad_norm), step=step)
    if is_good:
        progress.bad_steps = 0
        progress.overflows += not has_finite_gradient
        add_to_row_sums(progress.row_sums, result.rows, probabilities)
    else:
        progress.bad_steps += 1
        report_bad_step(run, window, result.rows[~np.isfinite(probabilities.numpy())])
    return stop_requests > 0


def dropout_seed(run, step):
    """What a step drops out by: each process on its own, and the same when a resumed run comes to
    it."""
    entropy = [run.args["seed"], run.accelerator.process_index, step]
    return np.random.SeedSequence(entropy).generate_state(1).item()


def add_to_row_sums(row_sums, rows, probabilities):
    """Add `probabilities` [M] of `rows` [M], and that they were seen, to row_sums [N, 2].

    As integers: their sum is the same in every order, so over any number of processes and after any
    resuming."""
    row_sums[rows, 0] += (probabilities * FRACTION).long()
    row_sums[rows, 1] += 1


def report_bad_step(run, window, suspects):
    """Say which rows a step that is not applied had, or which of them have no finite score; the
    third in a row ends the run."""
    step, _, loss, lr, grad_norm = run.progress.history[-1]
    suspects = gather_object(suspects.tolist()) or window  # one list of those of all processes
    dataset = run.train_data
    names = []
    for file, line in dataset.rows[["file", "line"]][np.sort(suspects)[:10]].tolist():
        names.append(f"{dataset.paths[file]} line {line}")
    precision = run.accelerator.mixed_precision.replace("no", "fp32")
    say(
        f"!!! WARNING !!! step {step} is not applied: loss {loss}, gradient norm {grad_norm}, "
        f"in precision {precision} at lr {lr:.2e}. Its rows: {', '.join(names)}"
    )
    if run.progress.bad_steps == 3:
        raise UserError(
            "three steps in a row were not applied: start over (--overwrite_output_dir true) with "
            f"a lower lr than {run.args['lr']}, without the rows that are named, "
            "or in another precision"
        )


# ---- Training ------------------------------------------------------------------------------------
FEWEST_ROWS = 100  # from whose loss it can be told whether anything is learnt


def head_bias(model):
    """(name, parameter [1]) of the bias of a BertRerankerModel's head; None where it has none."""
    biases = []
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.numel() == 1:
            biases.append((name, parameter))
    return biases[-1] if biases else None


def fit_bias(run):
    """Bring the head's bias to the labels, which changes no ranking: lest the first steps' gradient
    go into it. A new head starts at their log-odds, a trained one is shifted where it stands over 2
    off."""
    named_bias = head_bias(run.model)
    if named_bias is None:
        return
    name, bias = named_bias
    is_new = name.removeprefix("model.") in run.model.new_weights
    labels = run.train_data.labels
    if is_new:
        log_odds = torch.logit(labels.double().mean(), eps=0.5 / len(labels)).item()
        say(f"The new head starts at the log-odds of the labels, {log_odds:+.1f}.")
        shift = log_odds - bias.item()
    else:
        shift = shift_to_labels(run)
        if not abs(shift) > 2:  # NaN as well
            return
        say(
            f"The logits stand {-shift:+.1f} off the labels: "
            "the head's bias is shifted by as much before training."
        )
    run.unshifted_bias = {name: bias.detach().clone()}
    bias.data += shift


def shift_to_labels(run):
    """What brings the logits of 256 training rows to the labels as a whole: they stand off after a
    listwise loss."""
    dataset = run.train_data
    # Drawn, since every nth row of lists of n would be the relevant one of each.
    generator = torch.Generator().manual_seed(run.args["seed"])
    rows = torch.randperm(len(dataset), generator=generator)[:256].sort().values.tolist()
    sample = [dataset[row] for row in rows]
    logits = score_together(run, sample, run.record["micro_batch_tokens"]).cpu().double()

    # Of shifts in steps of 0.1, around the one that brings the median to 0, that after which the
    # mean probability is nearest to the mean label.
    shifts = torch.arange(-100, 100, 0.1).double() - logits.median()
    means = (logits[:, None] + shifts).sigmoid().mean(0)
    target = dataset.labels[rows].mean().clamp(0.01, 0.99)
    return shifts[(means - target).abs().argmin()].item()


def set_weights(model, weights, base_interpolation):
    """Put (1 − w) · fine-tuned + w · base of `weights`, (fine-tuned, base), into `model`, one
    tensor after the other (WiSE-FT, Wortsman et al. 2022; LM-Cocktail, Xiao et al. 2024). 0 and 1
    give exactly the one and the other."""
    fine_tuned, base = weights
    for name, weight in fine_tuned.items():
        mixture = torch.lerp(weight, base[name], base_interpolation)
        model.get_parameter(name).data.copy_(mixture)


def windows_from(run, first_step):
    """Yield the windows of the steps from `first_step` on, one permutation of the train rows, or
    of queries where the loss takes lists, after the other."""
    generator = torch.Generator().manual_seed(run.args["seed"])
    count = len(run.train_data)
    query_of_row = run.lists.query_of_row if run.lists else None
    step = 0
    for _ in range(run.args["epochs"]):
        for window in epoch_windows(count, run.samples_per_step, generator, query_of_row):
            step += 1
            if step >= first_step:
                yield window


def fine_tune(run):
    """Train on from `run.progress`, which is kept up to date, and save checkpoints; evaluate at
    each epoch's end or every `eval_steps`, then mixtures of the best weights with the base's."""
    progress = run.progress
    if run.eval_data and run.args["load_best_model_at_end"]:
        run.base_weights = host_copy(run.model)  # with the bias as fit_bias() left it
    if run.checkpoint:
        restore(run)
    # DDP orders its sums anew after a first backward: let that weigh nothing.
    if run.accelerator.num_processes > 1:
        last_backward(run, forward_backward(run, [], window_size=1))
        run.optimizer.zero_grad()

    windows = windows_from(run, progress.step + 1)
    bar = tqdm(
        desc="Training",
        total=run.total_steps,
        initial=progress.step,
        disable=not is_main_process(),
    )
    with run.stop.noted(), bar:
        if progress.step:  # a checkpoint's, which was saved before it was evaluated
            evaluate_if_due(run)
        while progress.step < run.total_steps and not is_out_of_patience(run):
            started = time.perf_counter()
            window = next(windows)
            is_asked_to_stop = train_step(run, window)
            note_throughput(run, window, time.perf_counter() - started)
            warn_if_nothing_is_learnt(run)
            if is_asked_to_stop:
                stop_with_checkpoint(run)
            save_if_due(run)
            evaluate_if_due(run)
            show_progress(run, bar)

        if progress.step < run.total_steps:
            say(f"No better evaluation since step {progress.best_step}: stopping early.")
            bar.total = progress.step  # nothing is left to do

    if progress.overflows:
        say(
            f"{progress.overflows} steps were left out by the fp16 scaler, "
            "as is usual while it finds its scale."
        )
    evaluate_mixtures(run)
    row_sums = progress.row_sums.to(run.accelerator.device)
    progress.row_sums = run.accelerator.reduce(row_sums, "sum").cpu()


def warn_if_nothing_is_learnt(run):
    """After a third of the steps, say where the loss of the last half of these is not clearly below
    that of a constant answer, the mean label."""
    step = run.progress.step
    if step != run.total_steps // 3:
        return
    first = step // 2
    windows = list(islice(windows_from(run, first + 1), step - first))
    losses = np.array([loss for _, _, loss, *_ in run.progress.history[first:]])
    sizes = np.array([len(window) for window in windows])
    is_finite = np.isfinite(losses)
    if sizes[is_finite].sum() < FEWEST_ROWS:
        return

    loss = np.average(losses[is_finite], weights=sizes[is_finite])
    labels = run.train_data.labels
    of_constant = loss_of(run, windows, labels.mean().expand_as(labels))
    # Soft labels, which are no 0 and 1, leave a loss to the best of models too: their entropy.
    to_gain = of_constant - loss_of(run, windows, labels)
    if to_gain > 1e-4 and of_constant - loss < 0.03 * to_gain:  # labels all alike teach nothing
        say(
            f"Warning: after {step} of {run.total_steps} steps the loss, {loss:.4f}, is not clearly "
            f"below that of a constant answer, {of_constant:.4f}: nothing has been learnt yet. If "
            f"evaluations do not rise either, try a higher lr than {run.args['lr']}, more epochs, "
            "fewer irrelevant rows for each relevant one, or a base with a trained head."
        )


def loss_of(run, windows, probabilities):
    """The mean loss of the rows of `windows`, where the train rows have `probabilities` [N]."""
    labels = run.train_data.labels
    logits = probabilities.clamp(min=1e-30).log()  # the softmax of which divides them by their sum
    of_lists = 0.0
    for window in windows:
        lists = run.lists_in(window)
        if lists:
            loss = listwise_loss(logits[window], labels[window], lists).item()
            of_lists += len(window) * loss

    rows = np.concatenate(windows)
    of_rows = torch.nn.functional.binary_cross_entropy(probabilities[rows], labels[rows]).item()
    return of_rows + run.args["listwise_weight"] * of_lists / len(rows)


def stop_with_checkpoint(run):
    """End the process, as a stop request asks, with a checkpoint."""
    number = run.stop.signal_number
    stopped = (
        f"Stopped by {signal.Signals(number).name} after step {run.progress.step} "
        f"of {run.total_steps}"
    )
    try:
        save_checkpoint(run)
    except UserError as error:
        raise UserError(f"{stopped}, of which there is no checkpoint: {error}") from error
    run.accelerator.wait_for_everyone()  # as soon as one process leaves, a launcher ends the others
    raise UserError(
        f"{stopped}; checkpoints are in {run.folder}.\n{CHOICES}", exit_status=128 + number
    )


def save_if_due(run):
    """Save a checkpoint every `save_steps`, or at the end of each epoch, and after the last
    step."""
    step = run.progress.step
    save_steps = run.args["save_steps"] or run.steps_per_epoch
    if step % save_steps == 0 or step == run.total_steps:
        run.owes_checkpoint = True
    # Weights with which steps come to nothing would not be good to go on from: those of the next
    # good step are.
    if run.owes_checkpoint and not run.progress.bad_steps:
        save_checkpoint(run)
        run.owes_checkpoint = False


def evaluate_if_due(run):
    """Evaluate every `eval_steps`, or at the end of each epoch, and after the last step."""
    step = run.progress.step
    eval_steps = run.args["eval_steps"] or run.steps_per_epoch
    is_due = step % eval_steps == 0 or step == run.total_steps
    if run.eval_data and is_due:
        candidate = evaluate(run, step)
        if candidate is None:
            stop_with_checkpoint(run)
        add_candidate(run, candidate)


def add_candidate(run, candidate):
    """Add an evaluation; where it is the best since training began, keep the weights."""
    progress = run.progress
    earlier = progress.candidates[1:]
    progress.candidates.append(candidate)
    drop_scores(progress.candidates, run.args)
    if all(candidate.quality > other.quality for other in earlier):
        progress.best_step = candidate.step
        run.best_weights = None  # the former go before the new ones come
        if run.base_weights:
            run.best_weights = host_copy(run.model)


def is_out_of_patience(run):
    """Whether there were early_stopping_patience evaluations since the best."""
    patience = run.args["early_stopping_patience"]
    if patience is None:
        return False
    best_step = run.progress.best_step
    since_best = sum(candidate.step > best_step for candidate in run.progress.candidates)
    return since_best >= patience


def note_throughput(run, window, seconds):
    """Count a step on a `window`, which took so long, and log its speed: a scalar that two runs do
    not share."""
    lengths = run.train_data.lengths[window]
    throughput = run.throughput
    throughput.pairs += len(window)
    throughput.tokens += int(lengths.sum())
    throughput.squared_lengths += int((lengths**2).sum())
    throughput.seconds += seconds
    logged = {"time/tokens_per_second": float(lengths.sum() / seconds)}
    run.accelerator.log(logged, step=run.progress.step)


def show_progress(run, bar):
    """Bring the bar up to the last step that was done."""
    step, epoch, loss, lr, _ = run.progress.history[-1]
    throughput = run.throughput
    text = (
        f"epoch {epoch}/{run.args['epochs']}, loss {loss:.4f}, lr {lr:.2e}, "
        f"{throughput.pairs / throughput.seconds:.1f} pairs/s, "
        f"{throughput.tokens / throughput.seconds:,.0f} tokens/s"
    )
    if run.eval_data:
        text += f", {run.metric} {run.progress.candidates[-1].quality:.4f}"
    bar.set_postfix_str(text)
    bar.update(step - bar.n)


def evaluate_mixtures(run):
    """Evaluate mixtures of the best weights with the base's, unless the base has a head that was
    never trained."""
    if not run.base_weights or run.model.new_weights:
        return
    for share in run.args["base_interpolation"]:
        set_weights(run.model, (run.best_weights, run.base_weights), share)
        candidate = evaluate(run, run.progress.best_step, share)
        run.progress.candidates.append(candidate)
        drop_scores(run.progress.candidates, run.args)


def drop_scores(candidates, args):
    """Let go of the scores of all candidates but the base and the best: no result is made of them.
    """
    base, *_ = candidates
    best, _ = best_of(candidates, args)
    for candidate in candidates:
        if candidate is not best and candidate is not base:
            candidate.scores = None


def best_of(candidates, args):
    """Of candidates, the base first: the best fine-tuned one, and all that it was chosen from. Both
    are the base where no fine-tuned one has finite scores."""
    base, *tuned = candidates
    if not args["load_best_model_at_end"]:
        tuned = tuned[-1:]
    tuned = [candidate for candidate in tuned if candidate.quality > -math.inf]
    if not tuned:
        tuned = [base]
    # The first of equals, so the less mixed.
    return max(tuned, key=lambda candidate: candidate.quality), tuned


# ---- Verdict -------------------------------------------------------------------------------------
def halves(count, seed):
    """The numbers of `count` queries, at random in two halves."""
    order = np.random.default_rng(seed).permutation(count)
    return order[0::2], order[1::2]


def best_of_rows(values):
    """The number of the row with the highest mean of `values` [C, V]: of equals the first."""
    return values.mean(axis=1).round(9).argmax()


def cross_fit(gains, seed):
    """The gains [V] of the best of C candidates, of whose `gains` [C, V] each is that of one query:
    chosen on one half of the queries, measured on the other, and the reverse, since the queries
    that chose it flatter it.

    Two candidates gain 0.3 and 0 on the first half of the queries, 0.1 and 0.2 on the second. The
    first is chosen on the first half, and its gain on the second counts, 0.1; the second is chosen
    on the second half, and counts 0 on the first: 0.05 on average, where the best on all queries,
    the first, would claim 0.2."""
    first_half, second_half = halves(gains.shape[1], seed)
    chosen_on_first = best_of_rows(gains[:, first_half])
    chosen_on_second = best_of_rows(gains[:, second_half])
    return np.append(gains[chosen_on_second, first_half], gains[chosen_on_first, second_half])


def cross_fit_mixture(values, choices, seed):
    """The gains of a mixture over the model alone and over the retriever alone, each [V], of
    `values` [C, S, V], those of C candidates with S shares of the retriever, first 0, last 1. As in
    cross_fit(), one half of the queries chooses what a run chooses, the best candidate, then the
    best of the shares that there are `choices` of, and the other half measures."""
    first_half, second_half = halves(values.shape[2], seed)
    over_model, over_retriever = [], []
    for half, other_half in ((second_half, first_half), (first_half, second_half)):
        candidate = values[best_of_rows(values[:, 0, half])]
        share = choices[best_of_rows(candidate[choices][:, half])]
        mixed = candidate[share, other_half]
        over_model.append(mixed - candidate[0, other_half])
        over_retriever.append(mixed - candidate[-1, other_half])
    return np.concatenate(over_model), np.concatenate(over_retriever)


def confidence_interval(differences, seed):
    """95 % interval [low, high] of the mean of differences [V]: the symmetric bootstrap-t (Hall
    1988), whose coverage holds (benchmarks/coverage.py); None where fewer than six differ from 0,
    since then that of no interval does.

    Queries are drawn anew from the queries at hand, as many, 1,999 times. Each time the mean moves
    by so many of its own standard errors; what 95 % of the draws stay below takes the place of the
    1.96 of a normal distribution, and is larger where few queries make up the difference: of 20
    queries with 7 that differ it may be 2.3."""
    count = len(differences)
    differing = differences[np.abs(differences) > 1e-9]
    if len(differing) < 6:
        return None
    mean = differences.mean()
    error = differences.std(ddof=1) / math.sqrt(count)
    quantile = 1.96
    if len(differing) <= 1000:  # beyond, the bootstrap finds 1.96 as well
        quantile = bootstrap_quantile(differences, error, seed)
    return [float(mean - quantile * error), float(mean + quantile * error)]


RESAMPLES = 1999  # the 1,900th of them in order is the 95 % quantile: (1,999 + 1) · 0.95


def bootstrap_quantile(differences, error, seed):
    """Within how many standard errors of the mean of `differences` [V] 95 % of the samples have
    theirs; `error` is the standard error of that mean."""
    count = len(differences)
    differing = differences[np.abs(differences) > 1e-9]

    # A sample draws `count` of the differences with replacement: how often it has each is
    # multinomial. All zeros together count as one value: which of them is drawn changes no sum.
    values = np.append(differing, 0)  # [D + 1]
    shares = np.append(np.full(len(differing), 1 / count), 1 - len(differing) / count)
    times_drawn = np.random.default_rng(seed).multinomial(count, shares, RESAMPLES)
    weights = times_drawn / count  # [RESAMPLES, D + 1]

    # Of each sample: how far its mean is off, and its own standard error.
    centred = values - differences.mean()
    shifts = weights @ centred
    variances = weights @ centred**2 - shifts**2
    variances = np.maximum(variances, 1e-12 * error**2 + 1e-30)  # a sample of one value has none
    errors = np.sqrt(variances / (count - 1))
    in_order = np.sort(np.abs(shifts) / errors)
    return in_order[1900 - 1]


def judge(candidates, dataset, metric, args):
    """Of the candidates, the base first: the report that eval_report.json holds, the best
    fine-tuned one, and what goes into final_model: it, or the base if it ranks below that on
    average over 20 or more queries."""
    base = candidates[0]
    best, tuned = best_of(candidates, args)

    labels = dataset.labels.numpy()
    queries = len(dataset.lists[metric])
    too_few = too_few_of(dataset, metric)
    is_enough = not too_few
    eligible, kept = tuned, best  # for final_model, and in it
    if is_enough and args["load_best_model_at_end"]:
        eligible = [*tuned, base]
        if best.quality < base.quality:
            kept = base

    gains = None
    if queries >= FEWEST_TO_HALVE:
        values = np.array([np.asarray(candidate.values) for candidate in tuned])
        gains = cross_fit(values - np.asarray(base.values), args["seed"])
    gain = comparison(gains, too_few, args["seed"])
    delta = {key: gain[key] for key in NO_DELTA}
    if not ranking_metric(metric):
        delta.update(queries_up=None, queries_down=None)  # gains are those of groups of queries

    history = []
    for candidate in candidates:
        if not candidate.base_interpolation:
            history.append({"step": candidate.step, "epoch": candidate.epoch, **candidate.metrics})
    chosen = "base"
    if kept is not base:
        chosen = {"step": kept.step, "base_interpolation": kept.base_interpolation}
    report = {
        "dataset": dataset.paths[dataset.rows["file"][0]],
        "queries": queries,
        "queries_left_out": len(dataset.lists["all"]) - queries,
        "metric": metric,
        "before": base.metrics,
        "after": kept.metrics,
        "fine_tuned": best.metrics,
        "delta": delta,
        "verdict": gain["verdict"],
        "too_few": gain["too_few"],
        "threshold": threshold_of(kept, labels),
        "thresholds": thresholds_of(kept, dataset, args["seed"]),
        "calibration": calibrations_of(base, kept, dataset, args["seed"]),
        "history": history,
        "chosen": chosen,
        "base_has_new_head": base.has_new_head,
        "retriever": None,
        "against_retriever": None,
        "mixed": None,
    }
    if dataset.retrieved and dataset.retrieved.lists[metric_of_search(metric)]:
        report.update(judge_search(eligible, kept, dataset.retrieved, metric, args["seed"]))
    report["all_relevant"] = over_all_relevant(dataset, report, base, kept)
    return report, best, kept


FEWEST_TO_HALVE = 4  # queries
NO_DELTA = {"mean": None, "ci95": None, "queries_up": None, "queries_down": None}


def judge_search(eligible, kept, retrieved, metric, seed):
    """What the report says of the retriever: its metrics, how `kept`, chosen from the candidates
    that were `eligible`, compares with it, and what a mixture of both gains."""
    metric = metric_of_search(metric)
    queries = len(retrieved.lists[metric])
    values = np.array([np.asarray(candidate.with_retriever) for candidate in eligible])
    gains = over_model = over_retriever = None
    if queries >= FEWEST_TO_HALVE:
        gains = cross_fit(values[:, 0] - values[:, -1], seed)
        over_model, over_retriever = cross_fit_mixture(values, retrieved.choices, seed)

    scores, values_of_kept = np.asarray(kept.scores), np.asarray(kept.with_retriever)
    best = retrieved.choices[best_of_rows(values_of_kept[retrieved.choices])]
    weight = retrieved.shares[best]
    lengths = [len(rows) for rows in retrieved.lists[metric]]
    too_few = too_few_of(retrieved, metric)
    gain_over_model = comparison(over_model, too_few, seed)
    return {
        "retriever": retrieved.metrics_with(scores, 1),
        "against_retriever": {
            "metric": metric,
            "queries": queries,
            "after": float(values_of_kept[0].mean()),  # of these queries
            **comparison(gains, too_few, seed),
        },
        "mixed": {
            "weight": weight,
            "candidates": float(np.median(lengths)),
            "metrics": retrieved.metrics_with(scores, weight),
            "delta": gain_over_model,
            "verdict": gain_over_model["verdict"],
            "against_retriever": comparison(over_retriever, too_few, seed),
        },
    }


def comparison(gains, too_few, seed):
    """What the report says of gains [V], None where there are too few queries to halve: mean,
    interval and verdict, and what there are `too_few` of for these, {what: how many there are}."""
    gain, too_few = dict(NO_DELTA), dict(too_few)
    if gains is not None:
        gain["mean"] = float(gains.mean())
        gain["queries_up"] = (gains > 1e-9).sum().item()
        gain["queries_down"] = (gains < -1e-9).sum().item()
        if not too_few:
            gain["ci95"] = confidence_interval(gains, seed)
            if gain["ci95"] is None:
                too_few["queries that changed"] = gain["queries_up"] + gain["queries_down"]
    return {**gain, "verdict": verdict_of(gain["ci95"]), "too_few": too_few}


def weight_to_save(report):
    """The share of the retriever that final_model's config is to hold: 0 where a mixture is not
    clearly better than the model alone; None where there are no scores of a retriever."""
    mixed = report.get("mixed")
    if not mixed:
        return None
    return mixed["weight"] if mixed["verdict"] == "better" else 0.0


def over_all_relevant(dataset, report, base, kept):
    """NDCG@10 with the ideal order of all relevant documents, those too that the retriever did not
    find, which count as fully relevant, over the queries that tell their number; None where none
    does."""
    labels, retrieved = dataset.labels.numpy(), dataset.retrieved
    lists = []  # (rows, number of relevant documents)
    for rows in dataset.lists["all"]:
        relevant = int(dataset.rows["relevant"][rows].max())
        if relevant > 0:
            lists.append((rows, relevant))
    if not lists:
        return None

    orders = {"before": np.asarray(base.scores), "after": np.asarray(kept.scores)}
    is_scored = ~np.isnan(np.concatenate([dataset.rows["score"][rows] for rows, _ in lists]))
    if report["retriever"] and is_scored.all():
        for name, share in (("retriever", 1), ("mixed", report["mixed"]["weight"])):
            orders[name] = np.zeros(len(labels))
            orders[name][retrieved.rows] = retrieved.mixed(orders["after"], share)
    orders["ceiling"] = labels  # what the best of rerankers would make of these candidates

    means = {}
    for name, order in orders.items():
        values = []
        for rows, relevant in lists:
            # A document that stands twice in a list may make it more.
            not_found = max(relevant - (labels[rows] >= 0.5).sum(), 0)
            values.append(ndcg_at_k(labels[rows], order[rows], not_found=not_found))
        means[name] = float(np.mean(values))
    return {
        "queries": len(lists),
        "relevant": sum(relevant for _, relevant in lists),
        "found": int(sum((labels[rows] >= 0.5).sum() for rows, _ in lists)),
        "ndcg@10": means,
    }


def verdict_of(ci95):
    """What the interval of the gain says."""
    if not ci95:
        return "too few"
    low, high = ci95
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "unclear"


def threshold_of(candidate, labels):
    """The probability from which on to take a row for relevant, for the best F1; None where nothing
    says which."""
    if not candidate.metrics["best_f1"]:
        return None
    _, score = best_f1(labels, np.asarray(candidate.scores))
    return torch.tensor(score).sigmoid().item()


def calibrations_of(base, kept, dataset, seed):
    """What calibration_of() says before and after, which are the same where the base is kept."""
    labels, lists = dataset.labels.numpy(), dataset.lists["all"]
    before = calibration_of(base.scores, labels, lists, seed)
    after = before
    if kept is not base:
        after = calibration_of(kept.scores, labels, lists, seed)
    return {"before": before, "after": after}


def thresholds_of(candidate, dataset, seed):
    """{precision: what cross_fit_threshold() says of it}, as JSON has it."""
    labels, lists = dataset.labels.numpy(), dataset.lists["all"]
    # Not the logits: of two high ones, which fp32 has the same probability for, no threshold parts.
    probabilities = probabilities_of(candidate.scores)
    thresholds = {}
    for precision in PRECISIONS:
        found = cross_fit_threshold(precision, labels, probabilities, lists, seed)
        thresholds[str(precision)] = found
    return thresholds


def verdict_text(report, args):
    """All metrics, then what final_model holds, and last the verdicts and what to try next, as
    lines."""
    before, tuned, metric = report["before"], report["fine_tuned"], report["metric"]
    lines = [*table_lines(report, args), probability_line(report, args)]
    if not args["epochs"]:
        lines += search_lines(report, args)
        return "\n".join(lines)

    chosen = report["chosen"]
    if chosen == "base":
        lines.append(
            f"!!! FINE-TUNING DID NOT HELP !!! final_model holds {base_name(args)} with unchanged "
            "weights; the fine-tuned ones, in fine_tuned_model, rank these queries worse."
        )
    else:
        share = f"{chosen['base_interpolation']:.0%}"
        lines.append(f"final_model: step {chosen['step']}, with {share} of the base mixed in.")
        if tuned[metric] < before[metric] - 1e-9:
            lines.append("!!! WARNING !!! final_model ranks these queries worse than the base.")

    verdict, advice = {
        "better": (
            "better",
            "evaluate final_model once more, with --epochs 0, on a file that was never looked at",
        ),
        "unclear": (
            "no clear difference",
            "more evaluation queries; more, harder training rows; other lr, epochs",
        ),
        "worse": (
            "WORSE",
            f"look for wrong labels; then a lower lr than {args['lr']} or fewer epochs",
        ),
        "too few": (
            f"too few {' and '.join(report['too_few'])} to tell",
            advice_on_too_few(report["too_few"]),
        ),
    }[report["verdict"]]
    lines.append(f"Verdict: {verdict}. {evidence_text(report)}.")
    if report["base_has_new_head"]:
        lines.append(
            "The base could not rank: its head was drawn at random. What is better than chance "
            "need not be good: compare it with a trained reranker "
            "(--epochs 0 --model_name_or_path BAAI/bge-reranker-base)."
        )
    lines += search_lines(report, args)
    if report["against_retriever"] and report["against_retriever"]["verdict"] == "worse":
        advice = "train on what this retriever finds, with hard negatives (docs/retriever.md)"
    lines.append(f"Next: {advice}.")
    return "\n".join(lines)


def name_of_model(args):
    """What stands for the model that a report is about."""
    return "final_model" if args["epochs"] else "the model"


def table_lines(report, args):
    """A line for each metric: before and after, and what the retriever's own order and the mixture
    with it have, where there are its scores."""
    before, tuned, against = report["before"], report["fine_tuned"], report["against_retriever"]
    columns = {}
    if against:
        # Not all queries need to have its scores.
        of_queries = ""
        if against["queries"] != report["queries"]:
            of_queries = f" ({against['queries']} queries)"
        columns[f"retriever{of_queries}"] = report["retriever"]
        columns[f"{name_of_model(args)} mixed with it"] = report["mixed"]["metrics"]

    lines = []
    for key, value in before.items():
        if value is None:
            continue
        line = f"{key:17}  {value:.4f}"
        if args["epochs"]:
            line += f" → {tuned[key]:.4f}, {tuned[key] - value:+.4f}"
        for name, metrics in columns.items():
            if metrics[key] is not None:
                line += f"; {name} {metrics[key]:.4f}"
        lines.append(line)
    return lines


def search_lines(report, args):
    """The verdict on the model against the retriever's own order, that on both together, and how
    much any reranker misses, as lines; none where nothing is known of a retriever."""
    lines = []
    name, against = name_of_model(args), report["against_retriever"]
    if against:
        retriever = report["retriever"][against["metric"]]
        if against["after"] < retriever - 1e-9 or against["verdict"] == "worse":
            line = (
                f"!!! WORSE THAN THE RETRIEVER !!! {name} ranks worse than the order in which the "
                "retriever gave these documents."
            )
            if against["verdict"] == "worse":
                line += " Put to work as it is, it makes the search worse."
            lines.append(line)
        evidence = count_text(against["queries"], against)
        if against["ci95"]:
            evidence = f"{gain_text(against['metric'], retriever, against)} over {evidence}"
        lines.append(f"Against the retriever: {words_of(against)}. {evidence}.")
        lines.append(mixed_line(report["mixed"], name))
        weight = weight_to_save(report)
        if weight and args["epochs"]:  # else nothing is saved
            lines.append(f"retriever_weight {weight}: so rank(…, retriever_scores=…) mixes.")
    if report["all_relevant"]:
        lines.append(all_relevant_line(report["all_relevant"]))
    return lines


def words_of(comparison):
    """A verdict on a retriever in words."""
    words = {"better": "better", "unclear": "no clear difference", "worse": "WORSE"}
    too_few = f"too few {' and '.join(comparison['too_few'])} to tell"
    return words.get(comparison["verdict"], too_few)


def mixed_line(mixed, name):
    """The verdict on the mixture of a model, which `name` stands for, and the retriever."""
    weight = mixed["weight"]
    if weight == 0:
        return f"Mixed: with no share of the retriever it ranks better than {name} alone."
    parts = []
    for other, gain in ((name, mixed["delta"]), ("the retriever", mixed["against_retriever"])):
        part = f"against {other} alone {words_of(gain)}"
        if gain["ci95"]:
            part += f", {interval_text(gain)}"
        parts.append(part)
    return (
        f"Mixed with {weight:.0%} of the retriever: {'; '.join(parts)}. "
        f"On lists of {mixed['candidates']:.0f} candidates."
    )


def all_relevant_line(of_all):
    """NDCG@10 where what the retriever did not find counts as well."""
    values = of_all["ndcg@10"]
    columns = [f"{values['before']:.3f}"]
    if values["after"] != values["before"]:
        columns = [f"{values['before']:.3f} → {values['after']:.3f}"]
    for key in ("retriever", "mixed"):
        if key in values:
            columns.append(f"{key} {values[key]:.3f}")
    return (
        f"Of {of_all['relevant']} relevant documents of {of_all['queries']} queries "
        f"{of_all['found']} are among the candidates. NDCG@10 by all of them: "
        f"{', '.join(columns)}; no reranker can have more than {values['ceiling']:.3f}."
    )


def probability_line(report, args):
    """What the probabilities are worth: how far they are from what was relevant, and how much was
    where they are high."""
    calibration = report["calibration"]["after"]
    parts = [f"Probabilities of {name_of_model(args)}: Brier score {calibration['brier']:.3f}, "]
    advice = ""
    if calibration["ci95"]:
        low, high = calibration["ci95"]
        interval = f"95 % interval [{low:.3f}, {high:.3f}]"
        parts.append(f"calibration error {calibration['error']:.3f}, {interval}.")
        if low > WORTH_MENDING:
            advice = " tools/calibrate.py may mend them."
    else:
        parts.append("too few queries for a calibration error.")
    of_high = calibration["high"]
    parts.append(f" Rows with {of_high['from']} or more: {of_high['rows']}")
    if of_high["rows"] and calibration["graded"]:
        parts.append(f", mean label {of_high['label']:.2f} on a scale from 0 to 1")
    elif of_high["rows"]:
        relevant = round(of_high["label"] * of_high["rows"])
        parts.append(f", {relevant} of them relevant ({of_high['label']:.0%})")
    return "".join(parts) + "." + advice


def base_name(args):
    """The base as others may read it: its name on the hub, or of its folder without the path."""
    name = args["model_name_or_path"]
    return Path(name).resolve().name if Path(name).is_dir() else name


def advice_on_too_few(too_few):
    """How many it takes of what there are `too_few` of, {what: how many there are}."""
    parts = []
    for what, count in too_few.items():
        parts.append(f"{ENOUGH[what]} or more {what} ({count} here)")
    return f"evaluate on more data: a verdict takes {' and '.join(parts)}, better 5 times as many"


def evidence_text(report):
    """On how many queries the verdict stands, and the gain with its interval where there is one."""
    delta = report["delta"]
    queries = count_text(report["queries"], delta, report["queries_left_out"])
    if delta["ci95"]:
        metric = report["metric"]
        return f"{gain_text(metric, report['before'][metric], delta)} over {queries}"
    for what, count in report["too_few"].items():
        if what != "queries":  # which stand there already
            queries += f", {count} {what}"
    return queries


def count_text(queries, delta, left_out=0):
    """How many queries there are, and what became of them."""
    counts = []
    for count, what in (
        (delta["queries_up"], "up"),
        (delta["queries_down"], "down"),
        (left_out or None, "left out"),
    ):
        if count is not None:
            counts.append(f"{count} {what}")
    if not counts:
        return f"{queries} queries"
    return f"{queries} queries ({', '.join(counts)})"


def gain_text(metric, before, delta):
    """A gain in a metric, over its value `before`, with its interval."""
    mean = delta["mean"]
    return f"{metric.upper()} {before:.3f} → {before + mean:.3f}, {interval_text(delta)}"


def interval_text(delta):
    """A gain and its interval alone."""
    low, high = delta["ci95"]
    return f"{delta['mean']:+.3f} cross-fitted, 95 % interval [{low:+.3f}, {high:+.3f}]"


@dataclass
class Outcome:
    """What came of a run."""

    report: dict  # what eval_report.json holds; {}: nothing was measured
    best: Candidate | None  # fine-tuned
    kept: Candidate | None  # in final_model: the best, or the base
    text: str  # for people: metrics and verdict

    @property
    def is_base(self):
        """Whether final_model is to hold the base, since it ranks better."""
        return self.kept is not None and self.kept.step == 0


def conclude(run):
    """The Outcome of training. UserError where it left no finite weights."""
    outcome = Outcome({}, None, None, "Not evaluated: nothing is claimed about its ranking.")
    if run.eval_data:
        candidates = run.progress.candidates
        report, best, kept = judge(candidates, run.eval_data, run.metric, run.args)
        outcome = Outcome(report, best, kept, verdict_text(report, run.args))
        numbers = {}
        if report["delta"]["mean"] is not None:
            numbers["eval/delta"] = report["delta"]["mean"]
        if report["against_retriever"] and report["against_retriever"]["mean"] is not None:
            numbers["eval/delta_over_retriever"] = report["against_retriever"]["mean"]
        for key, value in kept.metrics.items():
            if value is not None:
                numbers[f"eval/after/{key}"] = value
        run.accelerator.log(numbers, step=run.progress.step)

    has_best = outcome.best is None or outcome.best.step > 0
    if run.base_weights and has_best:
        weights = (run.best_weights, run.base_weights)
        set_weights(run.model, weights, outcome.best.base_interpolation)
    if not has_best or not has_finite_weights(run.model):
        raise UserError(
            f"training left no finite weights: lower lr {run.args['lr']}, or mixed_precision no"
        )
    return outcome


# ---- Results -------------------------------------------------------------------------------------
def write_results(run, outcome):
    """Write all results of a run but run.json into its folder; the model's weights are the
    fine-tuned ones."""
    folder, model = run.folder, run.model
    size = bytes_of(model.parameters())
    require_space(folder, size * (2 if outcome.is_base else 1), "The model")
    if outcome.is_base:
        model.save_pretrained(folder / "fine_tuned_model")
        set_weights(model, (run.best_weights, run.base_weights), 1.0)
        model.load_state_dict(run.unshifted_bias, strict=False)  # the base as it was
    weight = weight_to_save(outcome.report)
    if weight is not None:
        model.model.config.update({"retriever_weight": weight})
    model.save_pretrained(folder / "final_model")
    write_model_card(run, outcome)

    draw_loss_curve(run.progress.history, outcome.report, folder / "loss_curve.png")
    row_sums = run.progress.row_sums.numpy()
    write_rows_to_check(folder / "rows_to_check.jsonl", run.train_data, row_sums)
    if outcome.report:
        scores = {
            "before: base model": run.progress.candidates[0].scores,
            "after: final_model": outcome.kept.scores,
        }
        write_evaluation(folder, run.eval_data, outcome.report, scores)


def draw_loss_curve(history, report, path):
    """Draw the loss, its moving mean, the learning rate and the ends of epochs; below, evaluations
    and final_model."""
    from matplotlib.figure import Figure

    steps, epochs, losses, rates, _ = np.transpose(history)
    half = math.ceil(len(steps) / 40)
    smooth = []
    for index in range(len(losses)):
        smooth.append(np.nanmean(losses[max(0, index - half) : index + half + 1]))
    epoch_ends = np.flatnonzero(np.diff(epochs)) + 1.5

    figure = Figure(figsize=(9, 7.5 if report else 4.5), dpi=120, layout="constrained")
    panels = figure.subplots(2 if report else 1, sharex=True, squeeze=False)[:, 0]
    axes = panels[0]
    axes.vlines(
        epoch_ends,
        0,
        1,
        transform=axes.get_xaxis_transform(),
        color="0.8",
        linestyle=":",
        label="end of an epoch",
    )
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="loss of a step")
    label = f"mean of {2 * half + 1} steps"
    axes.plot(steps, smooth, color="tab:blue", linewidth=2.5, label=label)
    axes.set(ylabel="training loss (BCE)", ylim=(0, None))
    right = axes.twinx()
    right.plot(steps, rates, color="tab:orange", label="learning rate")
    right.set(ylabel="learning rate", ylim=(0, None))

    if report:
        draw_evaluations(panels[1], report)
    panels[-1].set_xlabel("optimizer step (0: base model)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def draw_evaluations(axes, report):
    """Draw the metric of each evaluation, and that of final_model."""
    metric = report["metric"]
    steps = [evaluation["step"] for evaluation in report["history"]]
    values = [evaluation[metric] for evaluation in report["history"]]
    values = np.array(values, dtype=float)  # None, of weights that are not finite, leaves a gap
    kept_step = 0 if report["chosen"] == "base" else report["chosen"]["step"]
    axes.plot(steps, values, "go-", label="evaluation")
    axes.plot(kept_step, report["after"][metric], "r*", markersize=16, label="final_model")
    if report["retriever"] and report["retriever"][metric] is not None:
        value = report["retriever"][metric]
        label = f"the retriever's own order ({report['against_retriever']['queries']} queries)"
        axes.axhline(value, color="tab:gray", linestyle="--", label=label)
    axes.set(ylabel=metric)


def write_rows(path, dataset, chosen, **columns):
    """Write the rows `chosen` (their numbers [M]) as JSONL, each with its value of the `columns`
    [M]."""
    ascending = np.sort(chosen)
    try:
        texts = dict(zip(ascending.tolist(), dataset.pairs(ascending), strict=True))
    except UserError as error:  # no reason to lose what was trained
        say(f"Warning: {path.name} is not written: {error}")
        return

    with open(path, "wb") as file:
        for place, number in enumerate(chosen.tolist()):
            query, content = texts[number]
            origin = dataset.rows[number]
            label = origin["label"].item()
            row = {
                "query": query,
                "content": content,
                "file": dataset.paths[origin["file"]],
                "line": origin["line"].item(),
                "label": int(label) if label.is_integer() else label,
            }
            for key, column in columns.items():
                row[key] = column[place].item()
            file.write(json_bytes(row) + b"\n")


def write_evaluation(folder, dataset, report, scores):
    """Write eval_report.json, predictions.jsonl, score_distribution.png; `scores`: {title: logits
    [N]}, base first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval_report.json").write_bytes(json_bytes(report, indent=2))

    probabilities = {title: logits.sigmoid().numpy() for title, logits in scores.items()}
    columns = list(probabilities.values())
    all_rows = np.arange(len(dataset.rows))
    path = folder / "predictions.jsonl"
    write_rows(path, dataset, all_rows, score_before=columns[0], score_after=columns[-1])
    path = folder / "score_distribution.png"
    draw_score_distribution(probabilities, dataset.labels, report["calibration"], path)


def draw_score_distribution(probabilities, labels, calibration, path):
    """Draw, beside each other, histograms of `probabilities`, {title: [N]}, of relevant and of
    irrelevant rows, and how many were relevant of those with a probability."""
    from matplotlib.figure import Figure

    irrelevant, relevant = np.flatnonzero(labels < 0.5), np.flatnonzero(labels >= 0.5)
    sides = [irrelevant, relevant]
    # What a row counts in the bars, in percent of its side.
    percent = [np.full(len(rows), 100 / max(len(rows), 1)) for rows in sides]
    count = len(probabilities)
    figure = Figure(figsize=(4.5 * (count + 1), 4), dpi=120, layout="constrained")
    *panels, last = figure.subplots(1, count + 1, squeeze=False)[0]
    for axes, (title, values) in zip(panels, probabilities.items(), strict=True):
        axes.sharey(panels[0])
        axes.hist(
            [values[rows] for rows in sides],
            bins=np.linspace(0, 1, 21),
            weights=percent,
            color=["tab:orange", "tab:blue"],
            label=[f"{len(irrelevant)} irrelevant rows", f"{len(relevant)} relevant rows"],
        )
        axes.set(
            title=title,
            xlabel="probability of being relevant, by the model",
            ylabel="share of these rows, %",
        )
        axes.legend()
    draw_reliability(last, list(probabilities), calibration)
    figure.savefig(path)


def draw_reliability(axes, titles, calibration):
    """Draw the mean label of rows over their mean probability: on the diagonal where these are
    right. One of `titles` alone is that of the model as it is."""
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="where they are right")
    columns = (calibration["before"], calibration["after"])[-len(titles) :]
    colors = ("0.4", "tab:green")[-len(titles) :]
    for title, values, color in zip(titles, columns, colors, strict=True):
        bins = values["bins"]
        label = title
        if values["error"] is not None:
            label += f": error {values['error']:.3f}"
        axes.plot(bins["probability"], bins["label"], "o-", color=color, label=label)
    axes.set(
        title="are the probabilities right?",
        xlabel="probability of being relevant, by the model",
        ylabel="share that is relevant (mean label)",
    )
    axes.legend()


def write_rows_to_check(path, dataset, row_sums):
    """The training rows whose label the model contradicted on average over the epochs, worst first:
    mean probability of the label less that of the other (AUM, Pleiss et al. 2020; Dataset
    Cartography, Swayamdipta et al. 2020)."""
    sums, counts = row_sums.T
    means = sums / FRACTION / np.maximum(counts, 1)
    # From 1, sure of the label, to -1, sure of the other: a row labelled 1 with a mean of 0.2 has 1
    # · (0.4 - 1) = -0.6.
    margins = (2 * dataset.labels.numpy() - 1) * (2 * means - 1)
    margins[counts == 0] = 0  # never seen, where training stopped early
    worst_first = np.argsort(margins, kind="stable")
    contradicted = worst_first[: (margins < 0).sum()]
    write_rows(path, dataset, contradicted, mean_probability=means[contradicted])


CARD = """---
{metadata}
---

# {title}

A cross-encoder for reranking.
```
{verdict}
```

## Usage

It scores queries as `{query_format}` and documents as `{document_format}`, \
with the text for `{{}}`. train_bert_rerank sees to
this by itself, and {to_fit}, not the query; \
for other libraries make the texts so, as below.
```python
from train_bert_rerank import BertRerankerModel
from sentence_transformers import CrossEncoder
from FlagEmbedding import FlagReranker
from transformers import pipeline
query, documents, folder = "…", ["…", "…"], "final_model"  # or its name on the hub
print(BertRerankerModel.from_pretrained(folder).rank(query, documents))
pairs = [({query}, {document}) for document in documents]
print(CrossEncoder(folder).predict(pairs))
print(FlagReranker(folder, normalize=True, max_length={max_length}).compute_score(pairs))
print(pipeline("text-classification", folder, truncation="only_second")\
([dict(text=q, text_pair=d) for q, d in pairs]))
```

{long_documents}{mixture}## Training
```
{settings}
```
"""
PASSAGES_IN_CARD = """## Long documents

Of a document that does not fit beside its query in {max_length} tokens the best of overlapping
passages was scored. `predict` and `rank` of train_bert_rerank do so. Other software scores its
beginning, unless it is given the passages, of which the largest score counts (after the lines above):
```python
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
def tokens_of(text):
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
def passages(query, document):
    text, special = document, tokenizer.num_special_tokens_to_add(pair=True)
    whole_room = {max_length} - special - len(tokens_of({query}))
    if len(tokens_of({document})) <= whole_room:
        return [text]
    room = whole_room - len(tokens_of({empty_document}))
    if room < 16:
        raise ValueError("the query leaves a passage fewer than 16 tokens")
    tokens, overlap = tokens_of(text), room // 4
    pieces, begun, first, end = [], -1, 0, 0
    while end < len(tokens):
        end = min(first + room, len(tokens))
        document = text[tokens[first][0] : tokens[end - 1][1]]
        while len(tokens_of({document})) > whole_room and end > first + overlap + 1:
            end -= 1
            document = text[tokens[first][0] : tokens[end - 1][1]]
        pieces.append(document)
        begun, first = tokens[first][0], end - overlap
        while first < end and tokens[first][0] <= begun:
            first += 1
    return [piece for piece in pieces if piece.strip()] or pieces[:1]
model = CrossEncoder(folder)
for text in documents:
    print(model.predict([({query}, {document}) for document in passages(query, text)]).max())
```

"""
MIXTURE_IN_CARD = """## With a retriever

Mixed with {weight:.0%} of the score of the retriever that had found the documents, it ranked the
held-out queries better than alone, on lists of about {candidates:.0f} candidates.
`rank(query, documents, retriever_scores=scores)` does that; with other software, of the candidates
of one query:
```python
import numpy as np
def standardised(scores):
    scores = np.asarray(scores, dtype=float)
    return (scores - scores.mean()) / (scores.std() or 1)
# logits: the model's scores before the sigmoid. Ask for them raw: of a probability p they are
# log(p / (1 - p)), which is lost where p was rounded to 0 or 1.
mixed = {model_share} * standardised(logits) + {weight} * standardised(retriever_scores)
```

"""


def write_model_card(run, outcome):
    """Write README.md: metadata as the hub reads it, the verdict, use in four libraries, settings.
    It names no path."""
    args, report = run.args, outcome.report
    name = base_name(args)
    title = Path(name).name + (", unchanged" if outcome.is_base else ", fine-tuned")
    results = None
    if report:
        dataset = Path(report["dataset"]).name
        results = []
        for key, value in report["after"].items():
            if value is not None:
                results.append(EvalResult("text-ranking", "custom", dataset, key, round(value, 4)))
    metadata = ModelCardData(
        language=run.record["language"],
        base_model=None if Path(args["model_name_or_path"]).is_dir() else name,
        pipeline_tag="text-ranking",
        library_name="sentence-transformers",
        model_name=title,
        tags=["cross-encoder", "reranker", "train_bert_rerank"],
        eval_results=results,
    )

    settings = decisive_settings(args)
    settings["samples of a step"] = run.samples_per_step
    settings.update(run.record["versions"])
    query_format, document_format = run.model.formats
    formats = {
        "query": formatted("query", query_format),
        "document": formatted("document", document_format),
        "empty_document": repr(document_format.replace("{}", "")),
        "max_length": run.model.tokenizer.model_max_length,
    }
    to_fit = "cuts documents to fit"
    long_documents = ""
    if run.model.long_documents == "best_passage":
        to_fit = "splits documents to fit"
        long_documents = PASSAGES_IN_CARD.format(**formats)
    mixture = ""
    if weight_to_save(report):
        mixed = report["mixed"]
        mixture = MIXTURE_IN_CARD.format(**mixed, model_share=round(1 - mixed["weight"], 9))
    text = CARD.format(
        to_fit=to_fit,
        long_documents=long_documents,
        mixture=mixture,
        metadata=metadata.to_yaml(),
        title=title,
        verdict=outcome.text,
        query_format=query_format,
        document_format=document_format,
        **formats,
        settings="\n".join(f"{key}: {value}" for key, value in settings.items()),
    )
    (run.folder / "final_model" / "README.md").write_text(printable(text), "utf-8")


def formatted(variable, form):
    """The Python expression that puts the text of a `variable` into a format."""
    if form == "{}":
        return variable
    return f"{form!r}.replace('{{}}', {variable})"


def log_outcome(run, text):
    """Put the verdict and the pictures beside the logged scalars."""
    from matplotlib.image import imread

    step = run.progress.step
    lines = [f"    {line}" for line in text.splitlines()]  # so indented, they are no Markdown
    run.accelerator.log({"verdict": "\n".join(lines)}, step=step)

    images = {}  # [1, height, width, RGB]
    if is_main_process():
        for path in run.folder.glob("*.png"):
            images[path.stem] = imread(path)[None, ..., :3]
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images(images, step, dataformats="NHWC")
        else:
            tracker.log_images(images, step)


def peak_memory(device):
    """The most bytes that the GPU, or this process where there is none, has had in use; None where
    nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return None
    resource = importlib.import_module("resource")  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def speed_of(run):
    """What run.json tells of the speed of training; nothing where this process did no step. Model
    FLOPs utilisation is of real tokens, padding left out, and of the GPUs' rate at best."""
    throughput = run.throughput
    if not throughput.seconds:
        return {}
    speed = {"tokens_per_second": throughput.tokens / throughput.seconds}
    device = run.accelerator.device
    if has_known_rate(device):
        card = torch.cuda.get_device_properties(device)
        rate = card_rate(card, run.record["precision"]).flops * run.accelerator.num_processes
        counted = operations(run.model.model, throughput.tokens, throughput.squared_lengths)
        speed["model_flops_utilisation"] = counted / throughput.seconds / rate
    return speed


def end_run(run):
    """Let go of the loggers and of DDP, not of the processes' group: another train() in these
    processes could begin none, and it may be a caller's. main() ends it."""
    # DDP must go before its group, or gloo may hang.
    run.wrapped, run.optimizer = run.accelerator.free_memory(run.wrapped, run.optimizer)
    if torch.distributed.is_initialized():  # which end_training() would end
        for tracker in run.accelerator.trackers:
            tracker.finish()
    else:
        run.accelerator.end_training()


# ---- train() and main() --------------------------------------------------------------------------
@only_run_of_process()
@lasting_output()
@process_as_before()
@usual_modes_of_torch()
def train(args: dict) -> dict:
    """Fine-tune as `args` says (keys left out take their values in main()), or with 0 epochs
    evaluate alone. Returns what run.json holds (not with 0 epochs) and, as "report", what
    eval_report.json holds (None without evaluation)."""
    args = check_settings(args)
    seed_everything(args["seed"])
    start_processes()
    say(f"Training Args: {args}")
    run_dir = Path(args["output_dir"], "unfinished_run" if args["epochs"] else "evaluation")
    ended_run, checkpoint_folder = find_beginning(args, run_dir)
    if ended_run:
        return results_of(ended_run)

    started = time.perf_counter()
    run = prepare(args, run_dir, checkpoint_folder)
    if run.eval_data and not run.progress.step:
        run.progress.candidates = [evaluate(run)]
    if not args["epochs"]:
        return report_base(run)
    fit_bias(run)

    say(f"Start training for {args['epochs']} epochs ...")
    training_started = time.perf_counter()
    fine_tune(run)
    training_ended = time.perf_counter()

    say("Training finished! Saving model ...")
    outcome = conclude(run)
    if is_main_process():
        write_results(run, outcome)
    log_outcome(run, outcome.text)
    say("Model saved successfully!")
    record = {
        "args": args,
        **run.record,
        "micro_batch_tokens": run.progress.max_tokens,
        "resumed_from": str(checkpoint_folder) if checkpoint_folder else None,
        "seconds": {
            "preparation": training_started - started,
            "training": training_ended - training_started,
        },
        "results": [name for name in RESULTS if name == "run.json" or (run_dir / name).exists()],
        "peak_memory_bytes": peak_memory(run.accelerator.device),
        **speed_of(run),
    }
    end_run(run)
    if is_main_process():
        flush_to_disk(*run_dir.rglob("*"), run_dir)
        with whole_file(run_dir / "run.json") as file:  # from here on the run is complete
            file.write(json_bytes(record, indent=2))
        publish(run_dir)
    if outcome.report:
        say(outcome.text)
    return {**record, "report": outcome.report or None}


def find_beginning(args, run_dir):
    """(run.json of a run that ended and is asked for again, folder of a checkpoint), each or None,
    as the main process finds them. UserError where this run could not write, or something would be
    lost."""
    beginning = (None, None)
    if is_main_process():
        require_writable(run_dir)
        if args["epochs"]:
            publish(run_dir)
            ended_run = find_ended_run(args, run_dir)
            beginning = (ended_run, None if ended_run else find_checkpoint(args, run_dir))
    return gather_object([beginning])[0]


def results_of(ended_run):
    """What train() returned of a run that ended, from its run.json and what lies beside it."""
    say(
        f"A run with these settings has ended (data are not compared), and its results are in "
        f"{ended_run.parent}; --resume_from_checkpoint None starts anew."
    )
    path = ended_run.with_name("eval_report.json")
    report = json.loads(path.read_text("utf-8")) if path.exists() else None
    return {**json.loads(ended_run.read_text("utf-8")), "report": report}


def report_base(run):
    """What train() returns where nothing is trained: the report on the model as it is, which is
    written and said."""
    [base] = run.progress.candidates
    report, *_ = judge([base], run.eval_data, run.metric, run.args)
    if is_main_process():
        scores = {"the model as it is": base.scores}
        write_evaluation(run.folder, run.eval_data, report, scores)
    end_run(run)
    say(verdict_text(report, run.args))
    return {"report": report}


def is_command():
    """Whether the arguments of this process are settings: the kernel of a notebook, or a console of
    IPython, has arguments of its own, unless a file is run in it."""
    is_ipython = hasattr(builtins, "get_ipython")
    return not is_ipython or hasattr(sys.modules["__main__"], "__file__")


@contextmanager
def manners_of_a_command():
    """Within it Ctrl-C ends the process at once, with no traceback, but a notebook's kernel, and
    transformers, which prints names out of a checkpoint unescaped, tells of errors alone."""
    handler = signal.getsignal(signal.SIGINT)
    is_plain = handler is signal.default_int_handler and not hasattr(builtins, "get_ipython")
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_plain and is_main_thread:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if is_plain and is_main_thread:
            signal.signal(signal.SIGINT, handler)


@lasting_output()
@manners_of_a_command()
def main():
    """Edit the values of `args` and run. The comments, `# kinds: meaning`, are read too: keep
    them."""
    args = {
        "model_name_or_path": "BAAI/bge-reranker-large",  # str: hub name or local folder of a reranker or plain encoder
        "revision": None,  # str | None: branch, tag or commit of the hub model
        "trust_remote_code": False,  # bool: run code from the checkpoint; never needed for BERT-family models
        "train_dataset": "default_train_data.jsonl",  # str | list: JSONL file, plain or gzip, or a list of them
        "eval_dataset": "auto",  # str | None: a file; auto: *eval* beside *train*, else held out; None: no evaluation
        "eval_proportion": 0.1,  # float 0..1: share of the train queries that auto holds out, by query
        "output_dir": "./output_bge_reranker_large_finetuned",  # str: all that a run writes is in this folder
        "max_len": 512,  # int 8..: tokens of a pair, special tokens included; the document is cut, not the query
        "min_label": 0,  # float: label in the data that means irrelevant
        "max_label": 1,  # float: label in the data that means fully relevant
        "query_format": "{}",  # str: what a query becomes, at inference too, such as "query: {}"; "{}": as saved
        "document_format": "{}",  # str: the same for a document
        "long_documents": None,  # "cut" | "best_passage" | None: what is scored of one that does not fit
        "epochs": 3,  # int 0..: passes over the training rows; 0: evaluate the model as it is, and no more
        "lr": 1e-5,  # float 0..: peak learning rate
        "listwise_weight": 0.0,  # float 0..100: weight of a softmax loss over each query's rows, beside BCE; 0: none
        "batch_size": 2,  # int 1..: batch_size * gradient_accumulation_steps * processes: samples of an optimizer step
        "gradient_accumulation_steps": 8,  # int 1..: the other factor of these; memory is bounded by the next setting
        "micro_batch_tokens": "auto",  # int 1.. | "auto" | None: tokens at once; auto: as fit; None: batch_size*max_len
        "gradient_checkpointing": False,  # bool: compute activations again rather than keep them: slower, less memory
        "freeze_embeddings": False,  # bool: do not train the word embeddings, nearly half of bge-reranker-large
        "warmup_proportion": 0.1,  # float 0..1: share of the steps in which the learning rate rises
        "weight_decay": 0.01,  # float 0..: of AdamW, not on biases and LayerNorm
        "max_grad_norm": 1.0,  # float 0..: gradients are clipped to this norm; 0: never
        "eval_steps": None,  # int 1.. | None: evaluate every so many optimizer steps; None: at the end of each epoch
        "metric_for_best_model":
            "auto",  # "auto" | "ndcg@k" | "mrr@k" | "hit@k" | "recall@k" | "map" | "average_precision": best is best in
        "load_best_model_at_end": True,  # bool: keep the best weights, not the last; the base's where all rank below it
        "save_steps": None,  # int 1.. | None: write a checkpoint every so many steps; None: at the end of each epoch
        "save_total_limit": 2,  # int 1..: checkpoints that are kept; a run that ends well removes them all
        "resume_from_checkpoint": None,  # str | None: go on from this folder; latest: the newest, or afresh without one
        "overwrite_output_dir": False,  # bool: throw the checkpoints of an unfinished run in output_dir away
        "early_stopping_patience": None,  # int 1.. | None: stop after so many evaluations without a better one
        "base_interpolation": (0.25, 0.5, 0.75),  # tuple 0.01..0.99: shares of the base to mix into the best weights
        "seed": 42,  # int 0..4294967295: the same seed gives the same bits on the same machine
        "mixed_precision": "bf16",  # "bf16" | "fp16" | "no": of the computation; the weights stay fp32
        "log_with": "tensorboard",  # "tensorboard" | "wandb" | None: where train/loss, train/lr, train/grad_norm go
    }
    arguments = sys.argv[1:] if is_command() else []
    try:
        train({**args, **parse_command_line(arguments)})
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (UserError, OSError) as error:  # a full disk, a folder without permission
        status = getattr(error, "exit_status", 1)
        if is_first_of_machine():
            is_stopped = status >= 128  # by a signal, which is no error
            print(printable(error) if is_stopped else f"Error: {printable(error)}", file=sys.stderr)
        sys.exit(status)
    except RuntimeError as error:
        # gloo says "Connection closed by peer", or reset, where another process has gone.
        if "by peer" not in str(error) or not torch.distributed.is_initialized():
            raise
        sys.exit(f"Error: another process of this run has ended: {error}\n{CHOICES}")


if __name__ == "__main__":
    main()
