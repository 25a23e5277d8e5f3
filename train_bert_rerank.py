"""Fine-tune a BERT-family cross-encoder reranker on (query, content, label) rows; measure whether its ranking rose.

Edit the `args` dict in main(), at the end, and run the file, or override settings on the command line (`--help`). For
inference: `from train_bert_rerank import BertRerankerModel`. The code stands in the order in which a run meets it."""

import argparse
import ast
import gzip
import hashlib
import importlib.util
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
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from itertools import compress, islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, gather_object, release_memory, set_seed
from huggingface_hub import EvalResult, HfApi, ModelCardData, errors, try_to_load_from_cache
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

ADVICE = 'Each line should be a JSON object in UTF-8: {"query": "…", "content": "…", "label": 1}'
LONGEST_LINE = 16 << 20  # bytes; the tokenizer takes 60 times as much memory and more
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # torchrun and accelerate launch set RANK
RESULTS = ["final_model", "fine_tuned_model", "logs", "loss_curve.png", "score_distribution.png", "eval_report.json",
           "predictions.jsonl", "rows_to_check.jsonl", "run.json"]  # moved in this order: run.json marks a finished run
received_signals: list[tuple[int, float]] = []  # (number, time) of those that a training loop is to act on
DIGITS = "[0-9]" * 8  # of a step, in the names of checkpoints and best weights
MICRO_BATCH_COST = {"cpu": 16, "cuda": 256, "mps": 256}  # what one more micro-batch costs, in padded tokens
MICRO_BATCH_TOKENS = {"cpu": 1024, "mps": 4096}  # micro_batch_tokens "auto" without a memory of the device's own
OUT_OF_MEMORY = "out of memory", "ALLOC_FAILED", "you tried to allocate"  # CUDA and MPS, cuBLAS, the CPU's allocator
# A row without its texts: number of its file and in its file, line, fingerprints of query and pair, label as it stands.
ROW = np.dtype([("file", "i4"), ("number", "i8"), ("line", "i8"), ("query", "u8"), ("pair", "u8"), ("label", "f8")])


class UserError(Exception):
    """A mistake that the user can mend: main() prints the message, no traceback, and exits with `exit_status`."""
    def __init__(self, message, exit_status=1):
        super().__init__(message)
        self.exit_status = exit_status


def printable(text):
    """`text` with what could steer a terminal or reorder what it shows as escapes: file names come from anywhere."""
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in str(text))


def say(message):
    """Print once, however many processes there are, above a bar that stands."""
    if IS_MAIN_PROCESS:
        tqdm.write(printable(message), file=sys.stdout)
        sys.stdout.flush()


def remove(path):
    """Remove a file, a link, or a folder with all that is in it."""
    (shutil.rmtree if path.is_dir() and not path.is_symlink() else os.remove)(path)


def flush_to_disk(*paths):
    """Let files, and the names in folders, survive a power cut."""
    for path in paths:
        with suppress(PermissionError, FileNotFoundError):  # Windows opens no folder; a log may be gone
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            os.fsync(descriptor)
            os.close(descriptor)


@contextmanager
def whole_file(path):
    """A file to write to under another name, renamed once all of it is on disk: `path` is whole or not there."""
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


# ---- Reproducibility -------------------------------------------------------------------------------------------------
def seed_everything(seed: int) -> None:
    """Seed random, numpy, torch and CUDA and turn on determinism; call it before CUDA starts, for cuBLAS's variable."""
    set_seed(seed, deterministic=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # of no use here
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.cuda.is_available() and workspace not in (":4096:8", ":16:8"):
        say(f"CUBLAS_WORKSPACE_CONFIG={workspace} is not deterministic to PyTorch: :4096:8 is used instead.")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def supported_precision(mixed_precision, device):
    """`mixed_precision` where `device` computes in it natively, else "no" (fp32), which is said."""
    bf16 = {"cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
            "mps": torch.backends.mps.is_available() and torch.backends.mps.is_macos_or_newer(14, 0),
            "cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()}
    if {"no": True, "fp16": device.type != "cpu", "bf16": bf16[device.type]}[mixed_precision]:
        return mixed_precision
    say(f"mixed_precision {mixed_precision} is not native to this {device.type} device: computing in fp32.")
    return "no"


# ---- Model -----------------------------------------------------------------------------------------------------------
def first_token_attention(self, hidden_states, attention_mask=None, *_, **__):
    """The forward of transformers' BertAttention and its likes, for the first token alone: [B, T, H] to [B, 1, H]."""
    first, own = hidden_states[:, :1], self.self
    projections = (own.query, first), (own.key, hidden_states), (own.value, hidden_states)
    heads = [layer(each).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2) for layer, each in projections]
    mask = None if attention_mask is None else attention_mask[:, :, :1]  # [B, 1, 1, T]
    context = torch.nn.functional.scaled_dot_product_attention(*heads, mask, own.dropout.p * own.training)
    return self.output(context.transpose(1, 2).flatten(2), first), None


def first_token_only(model):
    """Let the last layer of `model` compute only the first token, all that the heads of these architectures read."""
    config = model.config
    if config.model_type in ("bert", "roberta", "xlm-roberta") and config._attn_implementation == "sdpa" and (
            getattr(config, "position_embedding_type", "absolute") == "absolute" and not config.is_decoder):
        attention = model.base_model.encoder.layer[-1].attention
        attention.forward = partial(first_token_attention, attention)


class BertRerankerModel(torch.nn.Module):
    """A cross-encoder with one logit per (query, document) pair, and its tokenizer.
    `new_weights` names what the checkpoint lacked (a plain encoder's head) and torch's random generator filled in.
    An encoded pair is (ids, boundary, cut): int32 token ids with special tokens, how many lie in the first segment, and
    whether nothing (0), the document (1) or the query as well (2) was cut."""
    def __init__(self, model, tokenizer, new_weights=()):
        super().__init__()
        self.model, self.tokenizer, self.new_weights = model, tokenizer, new_weights
        first_token_only(model)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, revision: str | None = None, trust_remote_code: bool = False):
        """Load as fp32 from a folder, else a complete local cache, else the hub; UserError where none has the model."""
        name, options = model_name_or_path, {"revision": revision, "trust_remote_code": trust_remote_code}
        for local_only in (True, False):
            options["local_files_only"] = local_only
            adapter = {} if version("transformers").startswith("4.") else {"local_files_only": local_only}
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, **options)
                if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes one up without files
                    raise OSError("the files of its tokenizer are missing")
                model, info = AutoModelForSequenceClassification.from_pretrained(  # with peft it looks for an adapter
                    name, num_labels=1, ignore_mismatched_sizes=True, output_loading_info=True, adapter_kwargs=adapter,
                    **options)
                break
            except Exception as error:  # the loaders raise a dozen types for files that are not what they expect
                if Path(name).is_dir() or not local_only or not isinstance(error, OSError | ValueError):
                    raise UserError(f"cannot load {name}: {type(error).__name__}: {str(error)[:500]}") from error
            try:
                HfApi().model_info(name, revision=revision, timeout=6)  # is it there, and does the hub answer soon?
            except (errors.HfHubHTTPError, errors.HFValidationError) as error:
                raise UserError(f"{name} is no local folder; the hub says: {str(error).splitlines()[0]}") from error
            except Exception as error:  # name resolution, proxy, TLS, timeout, offline mode
                raise UserError(
                    f"{name} is no folder, not in the cache, and the hub is out of reach ({type(error).__name__}).\n"
                    "  - pass a local copy:       --model_name_or_path path/to/the/folder\n"
                    "  - use a mirror of the hub: HF_ENDPOINT=https://hf-mirror.com python train_bert_rerank.py\n"
                    "  - try without a download:  --model_name_or_path tiny_reranker") from error
        if model.config.is_encoder_decoder or not tokenizer.is_fast:
            raise UserError(f"{name} is no BERT-family encoder with a fast tokenizer, but {model.config.model_type}.")
        if tokenizer.pad_token_id is None or len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise UserError(f"{name} has another model's tokenizer: no padding, or more tokens than embeddings")
        mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]  # transformers 4, 5
        new_weights = sorted([*info["missing_keys"], *mismatched])
        lost = [key for key in new_weights if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
        lost += [key for key in sorted(info["unexpected_keys"]) if ".layer." in key]
        if lost:
            raise UserError(f"{name} or its config.json lacks {len(lost)} weights of its encoder: {lost[0]} …")
        return cls(model.float(), tokenizer, new_weights)  # a checkpoint in fp16 is trained in fp32 too

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors) and tokenizer as transformers does; the inverse of from_pretrained."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer_config.json")  # with the name that servers with transformers 4 know as well
        path.write_text(path.read_text("utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")

    @property
    def max_len(self) -> int:
        """Tokens that a pair may have, special tokens included (of XLM-R's 514 positions 512 are usable)."""
        tables = [module for name, module in self.model.named_modules()
                  if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)]
        usable = [each.num_embeddings - (0 if each.padding_idx is None else each.padding_idx + 1) for each in tables]
        return min(int(self.tokenizer.model_max_length), 10**9, *usable)

    @property
    def formats(self):
        """query_format and document_format as the config holds them."""
        return [getattr(self.model.config, key, "{}") for key in ("query_format", "document_format")]

    @property
    def plain_tokenizer(self):
        """The tokenizers.Tokenizer underneath, which neither cuts nor pads."""
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        return self.tokenizer.backend_tokenizer

    def encode(self, pairs, max_len):
        """Yield an encoded pair of at most `max_len` tokens for each (query, document) pair. The document is cut; a
        query only where it leaves no room, down to room for one token of the document."""
        tokenizer, pairs = self.plain_tokenizer, iter(pairs)  # transformers' "only_second" raises at too long a query
        room = max_len - tokenizer.num_special_tokens_to_add(is_pair=True)
        while chunk := list(islice(pairs, 1000)):
            sides = [tokenizer.encode_batch_fast([form.replace("{}", text) for text in texts], add_special_tokens=False)
                     for form, texts in zip(self.formats, zip(*chunk, strict=True), strict=True)]
            for query, document in zip(*sides, strict=True):
                cut = (len(query) + len(document) > room) * (1 + (len(query) >= room))
                if cut:
                    query.truncate(room - 1)
                    for spare in (room, 1, 0):  # in steps: a cut keeps the rest too, in pieces as short as what stays
                        document.truncate(room - len(query) + spare)
                pair = tokenizer.post_process(query, document)
                yield np.array(pair.ids, dtype=np.int32), pair.type_ids.count(0), cut

    def collate(self, encoded):
        """Pad B encoded pairs to the longest of them: a dict of tensors [B, T]."""
        lengths, boundaries = torch.tensor([(len(ids), boundary) for ids, boundary, _ in encoded]).T[:, :, None]
        rows = [torch.tensor(ids, dtype=torch.long) for ids, *_ in encoded]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, True, self.tokenizer.pad_token_id)
        positions = torch.arange(input_ids.shape[1])
        batch = {"input_ids": input_ids, "attention_mask": (positions < lengths).long()}
        if "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = (positions >= boundaries) * batch["attention_mask"]
        return batch

    def preprocess(self, pairs: Sequence, max_len: int = 512) -> dict[str, torch.Tensor]:
        """Tokenise and pad B (query, document) pairs: a dict of tensors [B, T] with T at most `max_len`."""
        return self.collate(list(self.encode(pairs, max_len)))

    def forward(self, batch: dict[str, torch.Tensor], labels: torch.Tensor | None = None) -> dict:
        """Return {"logits": [B, 1], "loss": mean BCE with logits against `labels` [B] in [0, 1], or None}."""
        device, is_cuda = self.model.device, self.model.device.type == "cuda"
        def move(tensor):  # from pinned memory, without waiting: the GPU computes while the next batch is made
            return (tensor.pin_memory() if is_cuda and not tensor.is_cuda else tensor).to(device, non_blocking=is_cuda)
        logits = self.model(**{name: move(tensor) for name, tensor in batch.items()}).logits.float()
        loss = None if labels is None else torch.nn.BCEWithLogitsLoss()(logits.squeeze(-1), move(labels).to(logits))
        return {"logits": logits, "loss": loss}

    @torch.inference_mode()
    def score(self, encoded, max_tokens, show_progress_bar=None, accelerator=None):
        """Logits [N] in fp32 of N encoded pairs, in micro-batches of at most `max_tokens` padded tokens. Processes of
        an `accelerator` share them out, whole: their number changes no score. All get all; None: one has a signal."""
        self.eval()
        lengths = np.array([len(ids) for ids, *_ in encoded], dtype=np.int64)
        [micro_batches] = plan_window(lengths, max_tokens, MICRO_BATCH_COST[self.model.device.type])
        logits = torch.zeros(len(encoded) + 1, device=self.model.device)  # the last: how many processes have a signal
        own = micro_batches[accelerator.process_index :: accelerator.num_processes] if accelerator else micro_batches
        parts = [self(self.collate([encoded[index] for index in indices]))["logits"].squeeze(-1)
                 for indices in tqdm(own, desc="Scoring", disable=not show_progress_bar, leave=None)
                 if not received_signals]  # after a signal none
        logits[np.concatenate([lengths[:0], *own[: len(parts)]])] = torch.cat([logits[:0], *parts])
        logits[-1] = bool(received_signals)
        logits = accelerator.reduce(logits, "sum") if accelerator else logits
        return None if logits[-1] else logits[:-1]

    def predict(self, inputs: Sequence, batch_size: int = 32, show_progress_bar: bool | None = None,
                activation_fn: Callable | None = None, convert_to_numpy: bool = True, convert_to_tensor: bool = False):
        """Scores [N] of N (query, document) pairs, or of one: arguments and results as in CrossEncoder.predict.
        `activation_fn` None is the sigmoid; pairs of over `self.max_len` tokens lose the end of their document."""
        is_single = len(inputs) > 0 and isinstance(inputs[0], str)
        encoded = list(self.encode([inputs] if is_single else inputs, self.max_len))
        logits = self.score(encoded, batch_size * self.max_len, show_progress_bar)
        scores = (activation_fn or torch.sigmoid)(logits)
        if not convert_to_tensor:
            scores = scores.cpu().numpy() if convert_to_numpy else list(scores)
        return scores[0] if is_single else scores

    def rank(self, query: str, documents: Sequence[str], top_k: int | None = None, return_documents: bool = False,
             batch_size: int = 32, show_progress_bar: bool | None = None,
             activation_fn: Callable | None = None) -> list[dict]:
        """Documents, best first, as [{"corpus_id", "score"[, "text"]}]: as in CrossEncoder.rank."""
        scores = self.predict([(query, each) for each in documents], batch_size, show_progress_bar, activation_fn)
        hits = [{"corpus_id": index, "score": score, **({"text": documents[index]} if return_documents else {})}
                for index, score in enumerate(scores.tolist())]
        return sorted(hits, key=lambda hit: hit["score"], reverse=True)[:top_k]


# ---- Data ------------------------------------------------------------------------------------------------------------
def parse_line(line, min_label, max_label):
    """The shape and the (query, content, label) rows of a JSONL line; ValueError says what is wrong. The shapes:
    {"query", "content", "label"} and {"query", "hits": [{"content", "label"}, …]}, RAG-Retrieval's two, and {"query",
    "pos": […], "neg": […]}, FlagEmbedding's, where "pos_scores" and "neg_scores", if there, are the labels."""
    try:
        sample = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError as well
        raise ValueError(f"not JSON in UTF-8 ({str(error).replace('line 1 column', 'column')})") from error
    if not isinstance(sample, dict):
        raise ValueError("not a JSON object")
    sample = {key: value for key, value in sample.items() if value is not None}
    shapes = [names for names in (("content", "label"), ("pos", "neg", "pos_scores", "neg_scores"), ("hits",))
              if {*names} & {*sample}]
    if len(shapes) > 1:
        raise ValueError("two shapes at once: keep either content and label, or pos and neg, or hits")
    pos, neg, hits, *scores = (sample.get(key, []) for key in ("pos", "neg", "hits", "pos_scores", "neg_scores"))
    if not all(isinstance(each, list) for each in (pos, neg, hits, *scores)) or (
            not all(isinstance(hit, dict) for hit in hits)):
        raise ValueError('pos and neg should be lists of texts, hits a list of {"content": "…", "label": 1}')
    if any(scores) and [len(each) for each in scores] != [len(pos), len(neg)]:
        raise ValueError("pos_scores and neg_scores should have a number for each text of pos and neg")
    labels = scores[0] + scores[1] or [max_label] * len(pos) + [min_label] * len(neg)
    rows = [(sample.get("query"), *pair) for pair in zip(pos + neg, labels, strict=True)]
    rows += [(sample.get("query"), hit.get("content"), hit.get("label")) for hit in hits or [sample] * (not rows)]
    for query, content, label in rows:
        for key, text in (("query", query), ("content", content)):
            if not isinstance(text, str):
                raise ValueError(f"{key} is missing" if text is None else f"{key} is no text: {json.dumps(text)[:40]}")
            if not text.strip():
                raise ValueError(f"{key} is blank")
            text.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
        if type(label) not in (int, float):
            advice = "drop the quotes" if isinstance(label, str) else "it should be a number"
            raise ValueError("label is missing" if label is None else f"label is {json.dumps(label)[:40]}: {advice}")
        if not min_label <= label <= max_label:  # true for NaN and infinity as well
            raise ValueError(f"label {str(label)[:40]} is outside [{min_label}, {max_label}] (min_label, max_label)")
    return ", ".join(["query", *(key for key in shapes[0] if key in sample)]), rows


def read_rows(path, min_label, max_label, digest=None, parse=parse_line):
    """Yield (query, content, label, line) of each row of a JSONL file, plain or gzip, as `parse` has them. UserError
    after the last line: the first ten bad ones. With `digest` a bar is shown, and all bytes go into the digest."""
    bad, bad_count, shapes = "", 0, {}
    foreign = ("\nData of another shape (CSV, TSV, parquet, other keys, a data set's folder): "
               + shlex.join(["python", "tools/convert_data.py", path, "--output", f"{Path(path).stem}_rows.jsonl"]))
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would be waited for
            raise OSError("no regular file: save it as one" + foreign * os.path.isdir(path))
        with open(path, "rb") as raw, tqdm(desc="Loading data", total=os.path.getsize(path), unit="B", unit_scale=True,
                                           disable=not (digest and IS_MAIN_PROCESS)) as bar:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            file = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MB. {ADVICE}{foreign}")
                if digest:
                    digest.update(line)
                    bar.update(raw.tell() - bar.n)
                line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
                if not line:
                    continue
                try:
                    shape, rows = parse(line, min_label, max_label)
                    shapes[shape] = shapes.get(shape, 0) + 1
                    yield from ((*row, number) for row in rows)
                except ValueError as error:
                    bad_count += 1
                    bad += f"\n  line {number}: {error}" if bad_count <= 10 else ""
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if bad:
        bad += f"\n  … and {bad_count - 10} more" * (bad_count > 10) + f"\n{ADVICE}" + foreign * (not shapes)
        raise UserError(f"{path}: {bad_count} bad line{'s' * (bad_count > 1)}{bad}")
    if digest and shapes:
        say(f"{path}: " + ", ".join(f"{count} × {{{shape}}}" for shape, count in shapes.items()))


def fingerprints(query, content):
    """64 bits of a query, and of it and a document together: the same in every run and process."""
    of_query = hashlib.blake2b(query.encode(), digest_size=8).digest()
    of_pair = hashlib.blake2b(content.encode(), digest_size=8, key=of_query).digest()
    return int.from_bytes(of_query, "little"), int.from_bytes(of_pair, "little")


def load_file(path, file, args):
    """The rows of a JSONL file as ROW [N] with file number `file`, without their texts, and its SHA-256."""
    digest = hashlib.sha256()
    found = enumerate(read_rows(path, args["min_label"], args["max_label"], digest))
    rows = np.fromiter(((file, number, line, *fingerprints(query, content), label)
                        for number, (query, content, label, line) in found), dtype=ROW)
    if not len(rows):
        raise UserError(f"{path}: no rows. {ADVICE}")
    say("----- Label Distribution -----")
    labels, counts = np.unique(rows["label"].round(2) + 0.0, return_counts=True)
    for index in np.sort(np.argsort(-counts, kind="stable")[:20]):
        say(f"Label {labels[index]:.2f}: {counts[index]} ({counts[index] / len(rows):.2%})")
    return rows, digest.hexdigest()


def load_data(args):
    """Train rows and eval rows (none: no evaluation) as ROW [N], the paths of their files, and {path: SHA-256}."""
    is_one, eval_path = isinstance(args["train_dataset"], str), args["eval_dataset"]
    paths = [args["train_dataset"]] if is_one else args["train_dataset"]
    sibling = Path(os.path.dirname(paths[0]), os.path.basename(paths[0]).replace("train", "eval"))
    if eval_path == "auto" and is_one and sibling != Path(paths[0]) and sibling.is_file():
        eval_path = str(sibling)
    eval_paths = [] if eval_path in ("auto", None) else [eval_path]
    paths = [*(paths if args["epochs"] or not eval_paths else []), *eval_paths]
    files, sha256 = zip(*(load_file(path, file, args) for file, path in enumerate(paths)), strict=True)
    rows = np.concatenate(files)
    is_eval = rows["file"] >= len(paths) - len(eval_paths)
    if eval_path == "auto":
        queries, first = np.unique(rows["query"], return_index=True)
        count = min(math.ceil(len(queries) * args["eval_proportion"]), len(queries) - 1)
        is_eval = np.isin(rows["query"], random.Random(args["seed"]).sample(list(queries[first.argsort()]), count))
    source = "held out of the train data" if eval_path == "auto" else f"of {eval_path}"
    say(f"Evaluating on {len(np.unique(rows['query'][is_eval]))} queries ({is_eval.sum()} rows) {source}."
        if is_eval.any() else "No evaluation: nothing will be claimed about the ranking.")
    return rows[~is_eval], rows[is_eval], paths, dict(zip(paths, sha256, strict=True))


def check_rows(train_rows, eval_rows, middle):
    """Warn, with counts, of what is allowed in data but seldom meant; labels from `middle` on are relevant."""
    total, relevant = len(train_rows), (train_rows["label"] >= middle).sum()
    rows = train_rows[np.lexsort((train_rows["label"], train_rows["pair"]))]
    same_pair, same_label = (rows[key][1:] == rows[key][:-1] for key in ("pair", "label"))
    for count, what in [
        ((same_pair & same_label).sum(), "train rows are exact duplicates of others"),
        (len(np.unique(rows["pair"][1:][same_pair & ~same_label])), "train pairs have contradicting labels"),
        (len(np.intersect1d(rows["query"], eval_rows["query"])), "queries are in both train and eval data"),
        (total * (len(np.unique(rows["label"])) == 1), "train rows, all there are, have one and the same label"),
        (total * (0 < relevant * 20 < total), f"train rows have only {relevant} relevant ones among them")]:
        if count:
            say(f"Warning: {count} {what}.")


class RerankDataset:
    """N rows: a sequence of encoded pairs, with `labels` [N] in [0, 1] and `lengths` [N] in tokens. prepare() gives the
    eval data `lists`, of candidate_lists(), and `metric`, that of METRICS by which weights are compared.
    The token ids of all rows stand one after the other in an int32 file, `cache`, then their lengths, boundaries, cuts.
    It is mapped into memory, so that the processes of a machine share it, and named by all that it depends on."""
    def __init__(self, rows, paths, name, model, args):
        self.rows, self.paths, self.args = rows, paths, args
        scale = args["max_label"] - args["min_label"]
        self.labels = torch.from_numpy((rows["label"] - args["min_label"]) / scale).float()
        facts = repr((model.plain_tokenizer.to_str(), model.model.config.to_json_string(), version("tokenizers"),
                      args["max_len"], "format 1")).encode()  # of this file and of what encode() makes
        self.cache = Path(args["output_dir"], "cache", f"{hashlib.sha256(rows.tobytes() + facts).hexdigest()}.tokens")
        if not self.cache.exists():
            columns = np.zeros((3, len(rows) + 1), dtype=np.int32)  # one more: an empty file could not be mapped
            encoded = tqdm(model.encode(self.pairs(), args["max_len"]), f"Tokenizing {name} data", len(rows),
                           disable=not (IS_MAIN_PROCESS and len(rows)))
            with whole_file(self.cache) as file:
                for number, (ids, boundary, cut) in enumerate(encoded):
                    columns[:, number] = len(ids), boundary, cut
                    file.write(ids)
                file.write(columns)
        self.tokens = np.asarray(np.memmap(self.cache, np.int32, "r"))
        self.lengths, self.boundaries, cut = self.tokens[-3 * len(rows) - 3 :].reshape(3, -1)[:, :-1]
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        if cut.any():
            say(f"Warning: max_len truncates {(cut > 0).sum()} {name} pairs ({(cut > 0).mean():.2%}), "
                f"in {(cut > 1).sum()} the query too.")

    def pairs(self, chosen=slice(None)):
        """Yield the texts (query, content) of the rows `chosen` (ascending), read anew; UserError if they changed."""
        rows = self.rows[chosen]
        for file in np.unique(rows["file"]):
            part, path = rows[rows["file"] == file], self.paths[file]
            is_chosen = np.isin(np.arange(part["number"][-1] + 1), part["number"]).tolist()
            found = compress(read_rows(path, self.args["min_label"], self.args["max_label"]), is_chosen)
            for pair, row in zip_longest(part["pair"].tolist(), found):
                if not row or fingerprints(*row[:2])[1] != pair:
                    raise UserError(f"{path} has changed since this run loaded it, or can be read only once")
                yield row[:2]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        end = self.ends[index]
        return self.tokens[end - self.lengths[index] : end], self.boundaries[index], None  # what was cut was said


# ---- Windows ---------------------------------------------------------------------------------------------------------
def cut_window(lengths, max_tokens, batch_cost):
    """Cut ascending `lengths` into runs [(cost, start, end)] of at most `max_tokens` padded tokens each, at least cost.
    A run costs its padded tokens plus `batch_cost`; a sample longer than the bound stands alone. Dynamic programming
    over the ends of runs is exact: one of the best ways to group samples has contiguous runs of sorted lengths."""
    least, start_of, count = np.zeros(len(lengths) + 1, dtype=np.int64), [0], np.arange(len(lengths) + 1)
    for end, longest in enumerate(lengths.tolist(), start=1):  # least[end]: of the best cut of lengths[:end]
        first = max(0, end - max(1, max_tokens // longest))
        costs = least[first:end] - count[first:end] * longest
        best = int(costs.argmin())
        least[end] = costs[best] + end * longest + batch_cost
        start_of.append(first + best)
    runs, end = [], len(lengths)
    while end:
        runs.append((least[end] - least[start_of[end]], start_of[end], end))
        end = start_of[end]
    return runs


def plan_window(lengths, max_tokens, batch_cost, num_processes=1):
    """Each process's micro-batches (index arrays into `lengths`), so that the slowest is as fast as may be: the best of
    cuts under smaller and smaller bounds, dealt out costliest first, each to the least loaded (Graham's LPT rule)."""
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    bound, deals = max_tokens, []
    while True:
        loads, deal = [0] * num_processes, [[] for _ in range(num_processes)]
        for cost, start, end in sorted(cut_window(lengths, bound, batch_cost), reverse=True):
            process = loads.index(min(loads))
            loads[process] += cost
            deal[process].append(order[start:end])
        deals.append((max(loads), deal))
        # Balanced to 2 %, or as fine as the longest sample allows: still smaller micro-batches would only add cost.
        if max(loads) * num_processes <= 1.02 * sum(loads) or bound <= lengths[-1]:
            return min(deals, key=lambda each: each[0])[1]
        bound = max(bound * 7 // 8, lengths[-1])


def epoch_windows(count, samples_per_step, generator):
    """An epoch's windows, each the row numbers of an optimizer step: a new random permutation of `count`, in pieces."""
    return [each.numpy() for each in torch.randperm(count, generator=generator).split(min(count, samples_per_step))]


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def tie_groups(scores):
    """Group [N] of each score, 0 for the best, and the sizes of the groups [G]. Scores that differ by rounding only are
    ties: metrics give them what random order gives on average (McSherry and Najork 2008)."""
    tolerance, order = 1e-6 * max(10.0, np.abs(scores).max()), np.argsort(-scores)
    falling, group = scores[order], np.empty(len(scores), dtype=np.int64)
    starts = np.append(True, falling[:-1] - falling[1:] > tolerance)
    below = falling[starts][np.cumsum(starts) - 1] - falling  # how far below its group's best score each stands:
    starts |= np.diff(np.floor(below / (10 * tolerance)), prepend=0) != 0  # dense scores are no endless tie
    group[order] = np.cumsum(starts) - 1
    return group, np.bincount(group)


def ndcg_at_k(labels, scores, k=10):
    """NDCG@k of one query, linear gain as in trec_eval; labels [N] in [0, 1], not all 0."""
    discounts = (np.arange(len(labels)) < k) / np.log2(np.arange(2, len(labels) + 2))
    group, sizes = tie_groups(scores)
    mean_discounts = np.bincount(np.sort(group), discounts) / sizes
    return (labels * mean_discounts[group]).sum() / (np.sort(labels)[::-1] * discounts).sum()


def mrr_at_k(labels, scores, k=10):
    """Reciprocal rank of the first label ≥ 0.5 of one query, 0 beyond k."""
    group, sizes = tie_groups(scores)
    first = group[labels >= 0.5].min()
    start, size, hits = sizes[:first].sum(), sizes[first], (labels[group == first] >= 0.5).sum()
    # In random order, the first of `hits` among `size` stands at `place` in comb(size - place, hits - 1) cases.
    return sum(math.comb(size - place, hits - 1) / math.comb(size, hits) / (start + place)
               for place in range(1, min(size - hits + 1, k - start) + 1))


def average_precision(labels, scores):
    """Mean precision at the rows with a label ≥ 0.5: of one query's rows, for MAP, or of all pairs. 0 without any."""
    group, sizes = tie_groups(scores)
    hits, starts = np.bincount(group, labels >= 0.5), np.cumsum(sizes) - sizes
    hits_before, group = np.cumsum(hits) - hits, np.sort(group)  # now the group of each place
    others = np.arange(len(scores)) - starts[group]  # rows of the same group that stand before the place
    found = hits_before[group] + 1 + others * (hits[group] - 1) / np.maximum(sizes[group] - 1, 1)
    return (hits / sizes)[group] @ (found / np.arange(1, len(scores) + 1)) / max(hits.sum(), 1)


def best_f1(labels, scores):
    """Highest F1 of 'relevant from a threshold on' over all pairs, and that threshold, as a score."""
    group, sizes = tie_groups(scores)
    hits = np.cumsum(np.bincount(group, labels >= 0.5))
    f1 = 2 * hits / (np.cumsum(sizes) + max(hits[-1], 1))
    last_above = scores[group == f1.argmax()].min()
    return f1.max(), (last_above + scores[group > f1.argmax()].max(initial=-np.inf)) / 2


RANKING = {"ndcg@10": ndcg_at_k, "mrr@10": mrr_at_k, "map": average_precision, "hit@1": partial(mrr_at_k, k=1)}
METRICS = (*RANKING, "average_precision", "best_f1")  # means over queries, then those over all pairs


def candidate_lists(queries, labels):
    """{metric: the candidate lists (row numbers [C] of a query) that say something of it}: those with different labels
    for NDCG, with relevant and irrelevant rows for the other metrics of a ranking, all for average precision."""
    lists = {}
    for index, query in enumerate(queries):
        lists.setdefault(query, []).append(index)
    lists = list(map(np.array, lists.values()))
    graded = [rows for rows in lists if labels[rows].min() < labels[rows].max()]
    binary = [rows for rows in lists if 0 < (labels[rows] >= 0.5).sum() < len(rows)]
    return {"all": lists, "ndcg@10": graded, "mrr@10": binary, "map": binary, "hit@1": binary,
            "average_precision": lists if 0 < (labels >= 0.5).sum() < len(labels) else []}


def metric_values(metric, lists, labels, scores):
    """Values [V] whose mean is the metric: one of each list; of average precision over pairs, which is no mean, centred
    pseudo-values of a jackknife that leaves out each of up to 100 groups of queries in turn (Tukey 1958)."""
    if metric in RANKING:
        return np.array([RANKING[metric](labels[rows], scores[rows]) for rows in lists])
    groups = [np.concatenate(lists[first::100]) for first in range(min(100, len(lists)))]
    rests = [average_precision(np.delete(labels, out), np.delete(scores, out)) for out in groups if groups[1:]] or [0]
    return average_precision(labels, scores) + (len(groups) - 1) * (np.mean(rests) - rests)


def measure(lists, labels, scores):
    """All metrics, and the health of the probabilities: "spread", highest less lowest of a query, on average; share
    "saturated", < 0.01 or > 0.99; means of "relevant" and "irrelevant" rows. None where no rows say anything."""
    values = {metric: metric_values(metric, lists[metric], labels, scores) for metric in RANKING}
    if lists["average_precision"]:
        values |= {"average_precision": average_precision(labels, scores), "best_f1": best_f1(labels, scores)[0]}
    probabilities = torch.from_numpy(scores).sigmoid().numpy()
    spreads = [np.ptp(probabilities[rows]) for rows in lists["all"] if len(rows) > 1]
    health = {"spread": spreads or np.ptp(probabilities), "saturated": np.abs(probabilities - 0.5) > 0.49,
              "relevant": probabilities[labels >= 0.5], "irrelevant": probabilities[labels < 0.5]}
    means = {key: float(np.mean(each)) if np.size(each) else None for key, each in {**values, **health}.items()}
    return {key: means.get(key) for key in METRICS}, {key: means[key] for key in health}


def evaluate(accelerator, model, dataset, args, max_tokens, step=0, epoch=0, base_interpolation=0.0):
    """Score `dataset`, say and log what came out, warn where it looks ill. Returns a candidate: {"step", "epoch",
    "base_interpolation", "scores": logits [N], "metrics", "values" [V] and "quality", their mean rounded lest noise
    decides, of dataset.metric, "logged": scalars}; None where a signal cut it short. Where weights or scores are not
    finite, metrics are None and quality is -inf, but at step 0 that is a UserError."""
    logits = model.score(dataset, max_tokens, IS_MAIN_PROCESS, accelerator)
    if logits is None:
        return None
    scores, labels = logits.cpu().double().numpy(), dataset.labels.numpy()
    name = f"Step {step}, epoch {epoch}" if step else args["model_name_or_path"]
    name += f", mixed with {base_interpolation:.0%} of the base" if base_interpolation else ""
    found = {"metrics": dict.fromkeys(METRICS), "quality": -math.inf, "logged": {}}
    ill = "weights or scores are not finite"
    if np.isfinite(scores).all() and all(weight.isfinite().all() for weight in model.parameters()):
        metrics, health = measure(dataset.lists, labels, scores)
        values = metric_values(dataset.metric, dataset.lists[dataset.metric], labels, scores)
        numbers = {key: value for key, value in {**metrics, **health}.items() if value is not None}
        found = {"metrics": metrics, "values": torch.from_numpy(values), "quality": round(float(values.mean()), 9),
                 "logged": {f"eval/{key}": value for key, value in numbers.items() if not base_interpolation}}
        say(f"{name}: " + ", ".join(f"{key} {numbers[key]:.4f}" for key in (dataset.metric, *health) if key in numbers))
        ill = ("the scores of a query's rows are nearly alike" if health["spread"] < 0.01 else
               "irrelevant rows score higher" * (numbers.get("irrelevant", 0) > numbers.get("relevant", 1)))
    elif not step:
        raise UserError(f"{name} gives no finite scores: mend it, or try --mixed_precision no")
    if ill and (step or not model.new_weights):
        causes = f"lr {args['lr']} too high, " * (step > 0) + "labels swapped or constant, wrong min_label or max_label"
        say(f"!!! WARNING !!! {name}: {ill}. Likely causes: {causes}")
    accelerator.log(found["logged"], step=step)
    return {"step": step, "epoch": epoch, "base_interpolation": base_interpolation, "scores": torch.from_numpy(scores),
            **found}


def host_copy(model):
    """A copy of the weights that are trained, in host memory."""
    return {name: each.detach().to("cpu", copy=True) for name, each in model.named_parameters() if each.requires_grad}


def set_weights(model, weights, base_interpolation):
    """Put (1 − w) · fine-tuned + w · base of `weights`, (fine-tuned, base), into `model`, one tensor after the other
    (WiSE-FT, Wortsman et al. 2022; LM-Cocktail, Xiao et al. 2024). 0 and 1 give exactly the one and the other."""
    fine_tuned, base = weights
    for name, tuned in fine_tuned.items():
        model.get_parameter(name).data.copy_(torch.lerp(tuned, base[name], base_interpolation))


def cross_fit(base, candidates, seed):
    """Differences [V] of the metric's values between best candidate and base: chosen on one half of the queries,
    measured on the other, and the reverse, since the queries that chose it flatter it."""
    differences = np.array([np.asarray(each["values"]) - np.asarray(base["values"]) for each in candidates])
    order = np.random.default_rng(seed).permutation(len(base["values"]))
    halves = order[0::2], order[1::2]
    best = [differences[:, half].mean(axis=1).round(9).argmax() for half in halves]  # of equals the first
    return np.append(differences[best[1], halves[0]], differences[best[0], halves[1]])


def confidence_interval(differences, seed):
    """95 % interval [low, high] of the mean of differences [V]: the symmetric bootstrap-t (Hall 1988), whose coverage
    holds (benchmarks/coverage.py); None where fewer than six differ from 0, since then that of no interval does."""
    count, differing = len(differences), differences[np.abs(differences) > 1e-9]
    if len(differing) < 6:
        return None
    mean, error, quantile = differences.mean(), differences.std(ddof=1) / math.sqrt(count), 1.96
    if len(differing) <= 1000:  # beyond, the bootstrap finds 1.96 as well; all zeros are drawn as one value
        shares = np.append(np.full(len(differing), 1 / count), 1 - len(differing) / count)
        weights = np.random.default_rng(seed).multinomial(count, shares, 1999) / count  # [resamples, values]
        centred = np.append(differing, 0) - mean
        shifts = weights @ centred
        variances = np.maximum(weights @ centred**2 - shifts**2, 1e-12 * error**2 + 1e-30)
        quantile = np.sort(np.abs(shifts) / np.sqrt(variances / (count - 1)))[1899]
    return [float(mean - quantile * error), float(mean + quantile * error)]


def judge(candidates, dataset, args):
    """Of the candidates, the base first: the report that eval_report.json holds, the best fine-tuned one, and what goes
    into final_model: it, or the base if it ranks below that on average over 20 or more queries."""
    base, *tuned = candidates
    tuned = [each for each in (tuned if args["load_best_model_at_end"] else tuned[-1:]) if each["quality"] > -math.inf]
    best = max(tuned or [base], key=lambda candidate: candidate["quality"])  # of equals the first: the less mixed
    metric, labels, queries = dataset.metric, dataset.labels.numpy(), len(dataset.lists[dataset.metric])
    is_enough = queries >= 20 and (metric in RANKING or 20 <= (labels >= 0.5).sum() <= len(labels) - 20)
    after = base if is_enough and args["load_best_model_at_end"] and best["quality"] < base["quality"] else best
    differences = cross_fit(base, tuned or [base], args["seed"]) if queries >= 4 else np.array([])
    is_counted = queries >= 4 and metric in RANKING
    up, down = ((sign * differences > 1e-9).sum().item() if is_counted else None for sign in (1, -1))
    ci95 = confidence_interval(differences, args["seed"]) if is_enough else None
    return {
        "dataset": dataset.paths[dataset.rows["file"][0]], "queries": queries,
        "queries_left_out": len(dataset.lists["all"]) - queries,
        "metric": metric, "before": base["metrics"], "after": after["metrics"], "fine_tuned": best["metrics"],
        "delta": {"mean": float(differences.mean()) if queries >= 4 else None, "ci95": ci95,
                  "queries_up": up, "queries_down": down},
        "verdict": "too few" if not ci95 else "better" if ci95[0] > 0 else "worse" if ci95[1] < 0 else "unclear",
        "threshold": after["metrics"]["best_f1"] and torch.tensor(
            best_f1(labels, np.asarray(after["scores"]))[1]).sigmoid().item(),
        "history": [{"step": each["step"], "epoch": each["epoch"], **each["metrics"]} for each in candidates
                    if not each["base_interpolation"]],
        "chosen": "base" if after is base else {key: after[key] for key in ("step", "base_interpolation")},
    }, best, after


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
# A run may differ from its checkpoint in what is compared by what it stands for, files and samples of a step …
NAMES = ("model_name_or_path", "revision", "trust_remote_code", "train_dataset", "eval_dataset", "batch_size",
         "gradient_accumulation_steps")
# … and in what changes no result, but for rounding.
NEUTRAL = ("micro_batch_tokens", "gradient_checkpointing", "log_with", "output_dir", "save_steps", "save_total_limit",
           "resume_from_checkpoint", "overwrite_output_dir")
CHOICES = ("  to go on:      the same command with --resume_from_checkpoint latest\n"
           "  to start over: the same command with --overwrite_output_dir true (and without --resume_from_checkpoint)")


@contextmanager
def noted_signals():
    """Within it a first SIGTERM, SIGINT, SIGHUP or SIGUSR1 is noted in `received_signals`. One over 5 s later ends the
    process at once, as outside (launchers pass on what may have arrived already). In a thread of a user's own it does
    nothing: Python gives signals to the main thread."""
    def note(number, _):
        received_signals.append((number, time.monotonic()))
        if received_signals[-1][1] - received_signals[0][1] > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
    is_main_thread = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if is_main_thread else ()
    before = {number: signal.signal(number, note) for name in names if (number := getattr(signal, name, None))
              and signal.getsignal(number) != signal.SIG_IGN}  # as nohup and a script's & have it
    try:
        yield
    finally:
        late, received_signals[:] = received_signals[:1], []
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, _ in late:  # after the last step, where nothing looks any more
        signal.raise_signal(number)


def checkpoints_in(run_dir):
    """The checkpoints of an unfinished run, oldest first; a folder without its state.pt is none."""
    return sorted(each.parent for each in run_dir.glob(f"checkpoint-{DIGITS}/state.pt"))


def written_in(run_dir):
    """What runs leave in `run_dir`, complete or not: checkpoints, best weights, results."""
    found = [each for pattern in (f"checkpoint-{DIGITS}", f"best_weights-{DIGITS}.*", "run.*")
             for each in run_dir.glob(pattern)]
    return found + [run_dir / name for name in RESULTS[:-1] if os.path.lexists(run_dir / name)]


def keep_newest(run_dir, limit):
    """Remove all checkpoints but the `limit` newest, and as many best weights: each checkpoint brings one at most."""
    for old in [*checkpoints_in(run_dir)[:-limit], *sorted(run_dir.glob(f"best_weights-{DIGITS}.pt"))[:-limit]]:
        remove(old)


def changes(old, new):
    """["key: old → new", …] of what two dicts both have, compared as JSON."""
    old, new = json.loads(json.dumps([old, new]))
    return [f"{key}: {value} → {new[key]}" for key, value in old.items() if new.get(key, value) != value]


def require_space(folder, needed, what):
    """UserError unless the disk of `folder` has `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{what} needs {needed / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB left: make room, "
                        f"or lower save_total_limit.\n{CHOICES}")


def save_checkpoint(accelerator, model, optimizer, run_dir, limit, state):
    """Write `state`, of all processes, with trained weights, optimizer and scaler as checkpoint-STEP/state.pt, and the
    best weights so far beside it, unless this run did so already; then let go of all but the `limit` newest. A step is
    saved before it is evaluated. Data order and dropout follow from seed, process and step: no random state is kept."""
    row_sums = accelerator.reduce(state["row_sums"].to(accelerator.device), "sum").cpu()
    if not IS_MAIN_PROCESS or not all(weight.isfinite().all() for weight in model.parameters()):
        return
    saved = {**state, "row_sums": row_sums, "best_weights": None, "optimizer": optimizer.state_dict(),
             "model": {name: each.detach() for name, each in model.named_parameters() if each.requires_grad},
             "scaler": accelerator.scaler and accelerator.scaler.state_dict()}
    folder, best = run_dir / f"checkpoint-{state['step']:08}", run_dir / f"best_weights-{state['best_step']:08}.pt"
    new = {best: state["best_weights"], folder / "state.pt": saved}
    new = {path: content for path, content in new.items() if content and not path.exists()}
    size = sum(weight.nbytes for weight in saved["model"].values()) * (3 + (best in new))  # AdamW's state is two more
    keep_newest(run_dir, limit)  # more may be there, where a resumed run has another limit
    require_space(run_dir, size, folder.name)
    try:
        for path, content in new.items():
            with whole_file(path) as file:
                torch.save(content, file)
    except (OSError, RuntimeError) as error:  # the second is torch's where the disk is full
        raise UserError(f"{folder} needs {size / 1e6:,.1f} MB and cannot be written: {error}\n{CHOICES}") from error
    keep_newest(run_dir, limit)


def load_checkpoint(folder, args, facts):
    """The state that save_checkpoint() wrote; UserError where it is of another run. Says what differs otherwise."""
    try:
        saved = torch.load(folder / "state.pt", "cpu", weights_only=True)
        if saved["best_step"] and args["load_best_model_at_end"]:
            best = folder.parent / f"best_weights-{saved['best_step']:08}.pt"
            saved["best_weights"] = torch.load(best, "cpu", weights_only=True)
        old = {**saved["facts"], **saved["facts"]["identity"], **saved["args"]}
    except Exception as error:  # torch.load raises a dozen types for files that are not what it expects
        raise UserError(f"{folder} and the best weights beside it cannot be read: {type(error).__name__}: "
                        f"{str(error).partition('. ')[0]}\n"
                        "(Of several machines each has to see output_dir.)") from error
    strict = {key: value for key, value in args.items() if key not in NAMES + NEUTRAL}
    if other := changes(old, {**strict, **facts["identity"]}):
        raise UserError("\n  ".join([f"{folder} is of another run; from it to this one:", *other]) +
                        f"\nSet that back, or take another output_dir.\n{CHOICES.splitlines()[1]}", exit_status=2)
    new = {**args, "resume_from_checkpoint": old["resume_from_checkpoint"]}  # all that may differ, and where it runs
    other = changes(old, new | {key: facts[key] for key in ("processes", "precision", "versions", "hardware")})
    say("\n  ".join([f"Going on after step {saved['step']}, from {folder}" + ", with other" * bool(other), *other]))
    return saved


def publish(run_dir):
    """Move the results of a complete run, one with a run.json, up into output_dir, in the place of an earlier one's.
    Cut off anywhere, the next call goes on with it: run.json comes last."""
    if (run_dir / "run.json").exists():
        for each in written_in(run_dir):
            if each.name not in RESULTS:  # checkpoints and best weights have done their service
                remove(each)
        written = json.loads((run_dir / "run.json").read_text("utf-8")).get("results", RESULTS)
        for name in RESULTS:
            new, old = run_dir / name, run_dir.with_name(name)
            if os.path.lexists(old) and (new.exists() or name not in written):
                say(f"{old}, of an earlier run, is {'replaced' if new.exists() else 'removed'}.")
                remove(old)
            if new.exists():
                new.rename(old)
    with suppress(OSError):  # not there, or not empty
        run_dir.rmdir()


def find_checkpoint(args, run_dir):
    """The checkpoint to go on from; None to start afresh; the run.json of a run that is asked for again but has ended.
    UserError where a run could not write, or something would be lost."""
    existing = next(each for each in run_dir.parents if each.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"output_dir {run_dir.parent}: {existing} is no folder that this run may write to", 2)
    if not args["epochs"]:
        return None
    publish(run_dir)
    ended, checkpoints, wanted = run_dir.with_name("run.json"), checkpoints_in(run_dir), args["resume_from_checkpoint"]
    if not ended.exists() and any(run_dir.with_name(name).exists() for name in RESULTS):
        raise UserError(f"{run_dir.parent} holds a model or logs that no run left there: take another output_dir", 2)
    if wanted == "latest":
        settings = {key: value for key, value in args.items() if key not in NEUTRAL}
        if checkpoints or ended.exists() and not changes(json.loads(ended.read_text("utf-8"))["args"], settings):
            return (checkpoints or [ended])[-1]
        say(f"No checkpoint in {run_dir}: starting afresh.")
    elif wanted and not Path(wanted, "state.pt").is_file():
        raise UserError(f"{wanted} is no checkpoint; there are: {', '.join(map(str, checkpoints)) or 'none'}", 2)
    elif checkpoints and not args["overwrite_output_dir"] and (
            not wanted or Path(wanted).resolve().parent != run_dir.resolve()):
        raise UserError(f"{run_dir} holds {checkpoints[-1].name} of a run that has not ended.\n{CHOICES}\n"
                        "  to keep it:    another --output_dir", exit_status=2)
    return Path(wanted) if wanted not in (None, "latest") else None


# ---- Training --------------------------------------------------------------------------------------------------------
def learning_rate(step, total_steps, peak, warmup_proportion):
    """The rate of step 1…total_steps: linear warm-up over ceil(warmup_proportion × them), then cosine, 0 after them."""
    warmup = math.ceil(warmup_proportion * total_steps)
    decayed = (step - 1 - warmup) / max(1, total_steps - warmup)
    return peak * (step / warmup if step <= warmup else (1 + math.cos(math.pi * decayed)) / 2)


def fit_bias(accelerator, model, dataset, max_tokens):
    """Where the logits of 256 training rows stand over 2 off the labels as a whole, as after a listwise loss, shift the
    head's bias, which changes no ranking, lest the first steps' gradient go into it. Returns {name: bias before}."""
    stride = math.ceil(len(dataset) / 256)
    sample = [dataset[index] for index in range(0, len(dataset), stride)]
    logits = model.score(sample, max_tokens, accelerator=accelerator).cpu().double()
    shifts = torch.arange(-100, 100, 0.1).double() - logits.median()
    means, target = (logits[:, None] + shifts).sigmoid().mean(0), dataset.labels[::stride].mean().clamp(0.01, 0.99)
    shift = shifts[(means - target).abs().argmin()].item()
    biases = [(name, bias) for name, bias in model.named_parameters() if name.endswith("bias") and bias.numel() == 1]
    if not biases or not abs(shift) > 2:
        return {}
    say(f"The logits stand {-shift:+.1f} off the labels: the head's bias is shifted by as much before training.")
    name, bias = biases[-1]
    before = {name: bias.detach().clone()}
    bias.data += shift
    return before


def backpropagate(accelerator, model, dataset, window_size, micro_batches, results):
    """Backpropagate the mean BCE over a window, of all processes; append (its share of the loss, probabilities [B]) of
    each micro-batch to `results`. A generator: it yields once, before the backward that waits for all processes."""
    collate, is_idle = accelerator.unwrap_model(model).collate, not micro_batches
    # DDP needs a backward of every process: one without a sample of the window takes a row that weighs nothing.
    for number, indices in enumerate(micro_batches or [np.array([0])], start=1):
        with accelerator.no_sync(model), ExitStack() as stack:
            output = model(collate([dataset[index] for index in indices]), dataset.labels[indices])
            loss = output["loss"] * (0.0 if is_idle else len(indices) / window_size)
            if number >= len(micro_batches):  # once a window
                yield
                stack.enter_context(accelerator.trigger_sync_in_backward(model))
            accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean over the processes
        results.append((loss.detach(), output["logits"].detach().sigmoid().flatten()[is_idle:]))


def train_window(accelerator, model, dataset, window, max_tokens, seed):
    """Backpropagate a `window` (row numbers) in micro-batches of at most `max_tokens` padded tokens, dropping out as
    `seed` says. Where any process runs out of memory, all halve the bound and do the window again, but not where they
    wait for each other already. Returns [loss, processes with a signal]; own rows, their probabilities; the bound."""
    device, processes, lengths = accelerator.device, accelerator.num_processes, dataset.lengths[window]
    model.train()
    while True:
        torch.manual_seed(seed)
        plan = plan_window(lengths, max_tokens, MICRO_BATCH_COST[device.type], processes)[accelerator.process_index]
        micro_batches, results, failed = [window[indices] for indices in plan], [], False
        attempt = backpropagate(accelerator, model, dataset, len(window), micro_batches, results)
        for is_synchronised in (False, True):
            try:
                failed or next(attempt, None)
            except RuntimeError as error:
                if not any(words in str(error) for words in OUT_OF_MEMORY) or is_synchronised and processes > 1:
                    raise  # in the second case the others wait in vain, and the launcher ends them
                failed = True
            if processes > 1 and not is_synchronised:  # all go on, or none
                failed = accelerator.reduce(torch.tensor(float(failed), device=device), "sum").item() > 0
        if not failed:
            losses, probabilities = zip(*results, strict=True)
            rows = np.concatenate([window[:0], *micro_batches])
            totals = torch.stack([sum(losses), losses[0].new_tensor(bool(received_signals))])
            return accelerator.reduce(totals, "sum"), rows, torch.cat(probabilities), max_tokens
        if max_tokens <= lengths.max():
            raise UserError(f"out of memory at {max_tokens} tokens, and one pair has {lengths.max()}: lower max_len, "
                            "or try --gradient_checkpointing true, --freeze_embeddings true, --mixed_precision bf16")
        max_tokens, attempt, results = max_tokens // 2, None, None
        model.zero_grad()
        release_memory()


def largest_micro_batch(accelerator, wrapped, dataset, samples):
    """What micro_batch_tokens "auto" stands for: MICRO_BATCH_TOKENS, or on a GPU the largest power of two at which a
    window of the longest row alone is trained beside the optimizer's state and a spare tenth of the memory."""
    if accelerator.device.type in MICRO_BATCH_TOKENS:
        return MICRO_BATCH_TOKENS[accelerator.device.type]
    trained = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
    spare = torch.empty(8 * trained + torch.cuda.mem_get_info()[1] // 10, dtype=torch.uint8, device=accelerator.device)
    window = np.full(samples, dataset.lengths.argmax())
    max_tokens = 1 << int(math.ceil(samples / accelerator.num_processes) * dataset.lengths.max() - 1).bit_length()
    *_, max_tokens = train_window(accelerator, wrapped, dataset, window, max_tokens, seed=0)  # halves it until it fits
    del spare
    wrapped.zero_grad()
    release_memory()
    torch.cuda.reset_peak_memory_stats()  # run.json tells that of training
    return max_tokens


def train_step(accelerator, wrapped, optimizer, dataset, window, epoch, lr, args, state):
    """The next optimizer step, with what it gives added to `state`; returns whether a signal asks to stop. A step whose
    loss or gradient is not finite is not applied, and the third in a row is a UserError; gradients in fp16 are left to
    the scaler, which finds its scale by letting them overflow."""
    step, bound = state["step"] + 1, state["max_tokens"]
    seed = np.random.SeedSequence([args["seed"], accelerator.process_index, step]).generate_state(1).item()
    totals, rows, probabilities, state["max_tokens"] = train_window(
        accelerator, wrapped, dataset, window, bound, seed)  # each process drops out on its own
    if state["max_tokens"] < bound:
        say(f"Out of memory: step {step} was done again; micro-batches now have at most {state['max_tokens']} tokens. "
            f"--micro_batch_tokens {state['max_tokens']} does so from the start.")
    grad_norm = accelerator.clip_grad_norm_(wrapped.parameters(), args["max_grad_norm"] or math.inf)
    numbers = torch.cat([totals, grad_norm[None], probabilities]).cpu()  # waits for the device, once a step
    loss, signals, grad_norm = numbers[:3].tolist()
    is_good = math.isfinite(loss) and (accelerator.scaler or math.isfinite(grad_norm))
    if is_good:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        # In steps of 2^-30: sums of integers are the same in every order, so over any number of processes.
        state["row_sums"][rows] += torch.nn.functional.pad(numbers[3:, None] * 2**30, (0, 1), value=1).long()
    optimizer.zero_grad()
    state["step"], state["bad_steps"] = step, 0 if is_good else state["bad_steps"] + 1
    state["overflows"] += is_good and not math.isfinite(grad_norm)
    state["history"].append((step, epoch, loss, lr, grad_norm))
    accelerator.log({"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm}, step=step)
    if not is_good:
        suspects = gather_object(rows[~np.isfinite(numbers[3:].numpy())].tolist()) or window
        where = dataset.rows[["file", "line"]][np.sort(suspects)[:10]].tolist()
        say(f"!!! WARNING !!! step {step} is not applied: loss {loss}, gradient norm {grad_norm}, in precision "
            f"{accelerator.mixed_precision.replace('no', 'fp32')} at lr {lr:.2e}. Its rows: "
            + ", ".join(f"{dataset.paths[file]} line {line}" for file, line in where))
    if state["bad_steps"] == 3:
        raise UserError("three steps in a row were not applied: start over (--overwrite_output_dir true) with a lower "
                        f"lr than {args['lr']}, without the rows that are named, or in another precision")
    return signals > 0


def fine_tune(accelerator, wrapped, optimizer, train_data, eval_data, run_dir, args, state):
    """Train on from `state`, which is kept up to date, and save checkpoints; evaluate at each epoch's end or every
    `eval_steps`, then mixtures of the best weights with the base's. Returns (best, base weights) in host memory, or
    None where the last weights are kept."""
    model, samples_per_step = accelerator.unwrap_model(wrapped), state["facts"]["identity"]["samples of a step"]
    steps_per_epoch = math.ceil(len(train_data) / samples_per_step)
    total_steps, eval_steps = args["epochs"] * steps_per_epoch, args["eval_steps"] or steps_per_epoch
    base_weights = host_copy(model) if eval_data and args["load_best_model_at_end"] else None
    done, seen, seconds, order = state["step"], 0, 0.0, torch.Generator().manual_seed(args["seed"])
    if done:  # on from a checkpoint, with all that was logged
        model.load_state_dict(state.pop("model"), strict=False)
        optimizer.load_state_dict(state.pop("optimizer"))
        if state["scaler"] and accelerator.scaler:
            accelerator.scaler.load_state_dict(state["scaler"])
        state["row_sums"] = state["row_sums"] * IS_MAIN_PROCESS  # those of all processes, once
        evaluations = {each["step"]: each["logged"] for each in state["candidates"]}
        for step, _, *values in [(0, 0), *state["history"]]:
            scalars = dict(zip(("train/loss", "train/lr", "train/grad_norm"), values, strict=False))
            accelerator.log({**scalars, **evaluations.get(step, {})}, step=step)
    save = partial(save_checkpoint, accelerator, model, optimizer, run_dir, args["save_total_limit"], state)
    windows = (each for _ in range(args["epochs"]) for each in epoch_windows(len(train_data), samples_per_step, order))
    windows, candidates, owes_checkpoint = islice(windows, done, None), state["candidates"], False
    if accelerator.num_processes > 1:  # DDP orders its sums anew after a first backward: let that weigh nothing
        list(backpropagate(accelerator, wrapped, train_data, 1, [], []))
        optimizer.zero_grad()
    with noted_signals(), tqdm(desc="Training", total=total_steps, initial=done, disable=not IS_MAIN_PROCESS) as bar:
        for step in range(max(1, done), total_steps + 1):
            epoch, is_stopped = math.ceil(step / steps_per_epoch), False
            if step > done:  # else a checkpoint's step, of which the evaluation alone is left
                started, window = time.perf_counter(), next(windows)
                lr = learning_rate(step, total_steps, args["lr"], args["warmup_proportion"])
                is_stopped = train_step(accelerator, wrapped, optimizer, train_data, window, epoch, lr, args, state)
                seen, seconds = seen + len(window), seconds + time.perf_counter() - started
                owes_checkpoint |= step % (args["save_steps"] or steps_per_epoch) == 0 or step == total_steps
                if owes_checkpoint and not state["bad_steps"]:  # nor would weights that overflow be good to go on from
                    save()
                    owes_checkpoint = False
            if eval_data and not is_stopped and (step % eval_steps == 0 or step == total_steps):
                candidate = evaluate(accelerator, model, eval_data, args, state["max_tokens"], step, epoch)
                is_stopped = candidate is None
                candidates += [candidate] * (not is_stopped)
                if not is_stopped and all(candidate["quality"] > each["quality"] for each in candidates[1:-1]):
                    state["best_step"], state["best_weights"] = step, None  # the former go before the new ones come
                    state["best_weights"] = base_weights and host_copy(model)
            if is_stopped:
                save()
                accelerator.wait_for_everyone()  # as soon as one process leaves, a launcher ends the others
                number = [*received_signals, (signal.SIGTERM, 0)][0][0]  # another process may have received it
                raise UserError(f"Stopped by {signal.Signals(number).name} after step {step} of {total_steps}; "
                                f"checkpoints are in {run_dir}.\n{CHOICES}", exit_status=128 + number)
            newest = f", {eval_data.metric} {candidates[-1]['quality']:.4f}" if eval_data else ""
            _, _, loss, lr, _ = state["history"][-1]
            bar.set_postfix_str(f"epoch {epoch}/{args['epochs']}, loss {loss:.4f}, lr {lr:.2e}, "
                                f"{seen / max(seconds, 1e-9):.1f} pairs/s{newest}")
            bar.update(step - bar.n)
            worse = sum(each["step"] > state["best_step"] for each in candidates)  # evaluations since the best
            if step < total_steps and worse >= (args["early_stopping_patience"] or math.inf):
                say(f"No better evaluation since step {state['best_step']}: stopping early.")
                bar.total = step  # nothing is left to do
                break
    if state["overflows"]:
        say(f"{state['overflows']} steps were left out by the fp16 scaler, as is usual while it finds its scale.")
    for mix in args["base_interpolation"] if base_weights and not model.new_weights else ():
        set_weights(model, (state["best_weights"], base_weights), mix)
        step, epoch = state["best_step"], math.ceil(state["best_step"] / steps_per_epoch)
        candidates.append(evaluate(accelerator, model, eval_data, args, state["max_tokens"], step, epoch, mix))
    state["row_sums"] = accelerator.reduce(state["row_sums"].to(accelerator.device), "sum").cpu().numpy()
    return base_weights and (state["best_weights"], base_weights)


def draw_loss_curve(history, report, path):
    """Draw the loss, its moving mean, the learning rate and the ends of epochs; below, evaluations and final_model."""
    from matplotlib.figure import Figure
    steps, epochs, losses, rates, _ = np.transpose(history)
    half = math.ceil(len(steps) / 40)
    smooth = [np.nanmean(losses[max(0, index - half) : index + half + 1]) for index in range(len(losses))]
    ends = np.flatnonzero(np.diff(epochs)) + 1.5
    figure = Figure(figsize=(9, 7.5 if report else 4.5), dpi=120, layout="constrained")
    axes, *below = figure.subplots(2 if report else 1, sharex=True, squeeze=False)[:, 0]
    axes.vlines(ends, 0, 1, transform=axes.get_xaxis_transform(), color="0.8", linestyle=":", label="end of an epoch")
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="loss of a step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2.5, label=f"mean of {2 * half + 1} steps")
    axes.set(ylabel="training loss (BCE)", ylim=(0, None))
    right = axes.twinx()
    right.plot(steps, rates, color="tab:orange", label="learning rate")
    right.set(ylabel="learning rate", ylim=(0, None))
    for panel in below:
        metric, kept_step = report["metric"], 0 if report["chosen"] == "base" else report["chosen"]["step"]
        panel.plot(*np.transpose([(p["step"], p[metric]) for p in report["history"]]), "go-", label="evaluation")
        panel.plot(kept_step, report["after"][metric], "r*", markersize=16, label="final_model")
        panel.set(ylabel=metric)
    (below or [axes])[0].set_xlabel("optimizer step (0: base model)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def write_rows(path, dataset, chosen, **columns):
    """Write the rows `chosen` (their numbers [M]) as JSONL, each with its value of the `columns` [M]."""
    try:
        texts = dict(zip(np.sort(chosen).tolist(), dataset.pairs(np.sort(chosen)), strict=True))
    except UserError as error:  # no reason to lose what was trained
        return say(f"Warning: {path.name} is not written: {error}")
    with open(path, "w", encoding="utf-8") as file:
        for place, number in enumerate(chosen.tolist()):
            origin, _, line, *_, label = dataset.rows[number].item()
            row = dict(zip(("query", "content"), texts[number], strict=True), file=dataset.paths[origin], line=line,
                       label=int(label) if label.is_integer() else label,
                       **{key: column[place].item() for key, column in columns.items()})
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_evaluation(folder, dataset, report, scores):
    """Write eval_report.json, predictions.jsonl, score_distribution.png; `scores`: {title: logits [N]}, base first."""
    from matplotlib.figure import Figure
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval_report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False), "utf-8")
    columns = [logits.sigmoid().numpy() for logits in scores.values()]  # probabilities
    write_rows(folder / "predictions.jsonl", dataset, np.arange(len(dataset)), score_before=columns[0],
               score_after=columns[-1])
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    sides = [np.flatnonzero(dataset.labels < 0.5), np.flatnonzero(dataset.labels >= 0.5)]
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, title, column in zip(panels, scores, columns, strict=True):
        axes.hist([column[rows] for rows in sides], np.linspace(0, 1, 21), color=["tab:orange", "tab:blue"],
                  weights=[np.full(len(rows), 100 / max(len(rows), 1)) for rows in sides],
                  label=[f"{len(sides[0])} irrelevant rows", f"{len(sides[1])} relevant rows"])
        axes.set(title=title, xlabel="probability of being relevant, by the model", ylabel="share of these rows, %")
        axes.legend()
    figure.savefig(folder / "score_distribution.png")


def write_rows_to_check(path, dataset, row_sums):
    """The training rows whose label the model contradicted on average over the epochs, worst first: mean probability of
    the label less that of the other (AUM, Pleiss et al. 2020; Dataset Cartography, Swayamdipta et al. 2020)."""
    sums, counts = row_sums.T
    means = sums / 2**30 / np.maximum(counts, 1)
    margins = (2 * dataset.labels.numpy() - 1) * (2 * means - 1) * (counts > 0)  # unseen where training stopped early
    chosen = np.argsort(margins, kind="stable")[: (margins < 0).sum()]
    write_rows(path, dataset, chosen, mean_probability=means[chosen])


def verdict_text(report, args):
    """All metrics, then what final_model holds, and last the verdict and what to try next, as lines."""
    before, tuned, delta, metric, chosen = map(report.get, ("before", "fine_tuned", "delta", "metric", "chosen"))
    keys = [key for key in METRICS if before[key] is not None]
    if not args["epochs"]:
        return "\n".join(f"{key:17}  {before[key]:.4f}" for key in keys)
    lines = [f"{key:17}  {before[key]:.4f} → {tuned[key]:.4f}, {tuned[key] - before[key]:+.4f}" for key in keys]
    if chosen == "base":
        lines += [f"!!! FINE-TUNING DID NOT HELP !!! final_model holds {args['model_name_or_path']} with unchanged "
                  "weights; the fine-tuned ones, in fine_tuned_model, rank these queries worse."]
    else:
        lines += [f"final_model: step {chosen['step']}, with {chosen['base_interpolation']:.0%} of the base mixed in."]
        if tuned[metric] < before[metric] - 1e-9:
            lines += ["!!! WARNING !!! final_model ranks these queries worse than the base."]
    counts = {"up": delta["queries_up"], "down": delta["queries_down"], "left out": report["queries_left_out"] or None}
    counts = ", ".join(f"{count} {key}" for key, count in counts.items() if count is not None)
    found = f"{report['queries']} queries" + f" ({counts})" * (counts != "")
    if delta["ci95"]:
        was, (low, high) = before[metric], delta["ci95"]
        found = (f"{metric.upper()} {was:.3f} → {was + delta['mean']:.3f}, {delta['mean']:+.3f} cross-fitted, "
                 f"95 % interval [{low:+.3f}, {high:+.3f}] over {found}")
    verdict, advice = {
        "better": ("better", "evaluate final_model once more, with --epochs 0, on a file that was never looked at"),
        "unclear": ("no clear difference", "more evaluation queries; more, harder training rows; other lr, epochs"),
        "worse": ("WORSE", f"look for wrong labels; then a lower lr than {args['lr']} or fewer epochs"),
        "too few": ("too few queries to tell", "evaluate on more: 20 or more, better 100, of which 6 or more change"),
    }[report["verdict"]]
    return "\n".join([*lines, f"Verdict: {verdict}. {found}.", f"Next: {advice}."])


def language_of(texts):
    """"ja", "ko" or "zh" by the script of `texts`, "en" by its commonest words; None where it is none of them."""
    text = " ".join(texts).lower()
    for code, script in {"ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7a3]", "zh": "[\u4e00-\u9fff]"}.items():
        if len(re.findall(script, text)) * 10 > sum(map(str.isalpha, text)):
            return code
    words, common = re.findall(r"\w+", text), {"the", "and", "of", "to", "with", "what", "how", "are", "this", "from"}
    return "en" if sum(word in common for word in words) * 10 > len(words) else None


def write_model_card(folder, model, report, args, facts, verdict):
    """Write README.md: metadata as the hub reads it, the verdict, use in four libraries, settings. It names no path."""
    name, formats = args["model_name_or_path"], model.formats
    title = Path(name).name + (", unchanged" if report and report["chosen"] == "base" else ", fine-tuned")
    settings = {key: value for key, value in args.items() if key not in NAMES + NEUTRAL}
    settings |= {"samples of a step": facts["identity"]["samples of a step"], **facts["versions"]}
    results = [EvalResult("text-ranking", "custom", Path(report["dataset"]).name, key, round(value, 4))
               for key, value in report["after"].items() if value is not None] if report else None
    card = ModelCardData(language=facts["language"], base_model=None if Path(name).is_dir() else name,
                         pipeline_tag="text-ranking", library_name="sentence-transformers", model_name=title,
                         tags=["cross-encoder", "reranker", "train_bert_rerank"], eval_results=results)
    query, document = (side if form == "{}" else f"{form!r}.replace('{{}}', {side})"
                       for form, side in zip(formats, ("query", "document"), strict=True))
    text = f"""---\n{card.to_yaml()}\n---

# {title}

A cross-encoder for reranking.
```
{verdict}
```

## Usage

It scores queries as `{formats[0]}` and documents as `{formats[1]}`, with the text for `{{}}`. train_bert_rerank sees to
this by itself, and cuts documents to fit, not the query; for other libraries make the texts so, as below.
```python
from train_bert_rerank import BertRerankerModel
from sentence_transformers import CrossEncoder
from FlagEmbedding import FlagReranker
from transformers import pipeline
query, documents, folder = "…", ["…", "…"], "final_model"  # or its name on the hub
print(BertRerankerModel.from_pretrained(folder).rank(query, documents))
pairs = [({query}, {document}) for document in documents]
print(CrossEncoder(folder).predict(pairs))
print(FlagReranker(folder, normalize=True, max_length={model.tokenizer.model_max_length}).compute_score(pairs))
print(pipeline("text-classification", folder, truncation="only_second")([dict(text=q, text_pair=d) for q, d in pairs]))
```

## Training
```
{chr(10).join(f"{key}: {value}" for key, value in settings.items())}
```
"""
    (folder / "README.md").write_text(printable(text), "utf-8")


def log_outcome(accelerator, run_dir, step, verdict):
    """Put the verdict and the pictures beside the logged scalars."""
    from matplotlib.image import imread
    accelerator.log({"verdict": "\n".join(f"    {line}" for line in verdict.splitlines())}, step=step)  # no Markdown
    images = {path.stem: imread(path)[None, ..., :3] for path in run_dir.glob("*.png")} if IS_MAIN_PROCESS else {}
    for tracker in accelerator.trackers:  # of images [1, height, width, RGB]
        tracker.log_images(images, step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))


def load_base(args):
    """The model that training starts from, with max_len and formats as `args` says."""
    name, max_len = args["model_name_or_path"], args["max_len"]
    model = BertRerankerModel.from_pretrained(name, args["revision"], args["trust_remote_code"])
    if model.new_weights:
        say(f"Not in {name}, so drawn with seed {args['seed']}: {', '.join(model.new_weights)}")
    if max_len > model.max_len:
        raise UserError(f"max_len {max_len}: {name} takes {model.max_len} (positions, model_max_length)", exit_status=2)
    model.tokenizer.model_max_length = max_len
    model.model.config.update({key: args[key] for key in ("query_format", "document_format") if args[key] != "{}"})
    vars(model.model.config).pop("sbert_ce_default_activation_function", None)  # pipelines, CrossEncoder: sigmoid
    model.model.config.update({"problem_type": None, "sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}})
    return model


def describe(args, model, train_rows, eval_rows, data_sha256):
    """What run.json tells of a run, and under "identity" what a resumed run has to share with its checkpoint."""
    name, state = args["model_name_or_path"], PartialState()
    config = json.dumps(model.model.config.to_dict() | {"transformers_version": "", "_name_or_path": ""}, default=str)
    hashes = {key: hashlib.sha256(part) for key, part in {
        "train rows": train_rows, "eval rows": eval_rows, "config": config.encode(),
        "tokenizer": model.plain_tokenizer.to_str().encode(), "base weights": b""}.items()}
    for weight in model.state_dict().values():
        hashes["base weights"].update(weight.numpy())
    identity = {key: digest.hexdigest() for key, digest in hashes.items()}
    identity["samples of a step"] = args["batch_size"] * args["gradient_accumulation_steps"] * state.num_processes
    cached = not Path(name).is_dir() and try_to_load_from_cache(name, "config.json", revision=args["revision"])
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--verify", "HEAD"]
    device = torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type
    return {
        "data_sha256": data_sha256, "base_sha256": identity["base weights"], "python": platform.python_version(),
        "base_revision": Path(cached).parent.name if cached else None, "processes": state.num_processes,
        "precision": supported_precision(args["mixed_precision"], state.device), "identity": identity,
        "versions": {each: version(each) for each in ("torch", "transformers", "tokenizers", "accelerate", "numpy")},
        "hardware": f"{platform.platform()}, {device}",
        "git_revision": shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()}


def prepare(args, run_dir, checkpoint):
    """What comes before the first evaluation: the accelerator, the model wrapped for it, optimizer, train data, eval
    data (None: nothing can be measured), and the state to train on from, that of the `checkpoint` if there is one."""
    state, gpus = PartialState(), torch.cuda.device_count()
    if gpus > state.num_processes == 1:
        say(f"Using 1 GPU of {gpus}; all: accelerate launch --num_processes {gpus} {subprocess.list2cmdline(sys.argv)}")
    train_rows, eval_rows, paths, data_sha256 = load_data(args)
    check_rows(train_rows, eval_rows, (args["min_label"] + args["max_label"]) / 2)
    model = load_base(args)
    facts = describe(args, model, train_rows, eval_rows, data_sha256)
    saved = checkpoint and load_checkpoint(checkpoint, args, facts)
    with state.local_main_process_first():  # it writes what the others then find
        train_data, eval_data = (RerankDataset(rows, paths, part, model, args)
                                 for part, rows in (("train", train_rows), ("eval", eval_rows)))
    facts["language"] = language_of(query for query, _ in islice(train_data.pairs(), 500))
    wanted = args["metric_for_best_model"].replace("auto", "ndcg@10 average_precision").split()
    eval_data.lists = candidate_lists(eval_rows["query"].tolist(), eval_data.labels.numpy())
    eval_data.metric = next((metric for metric in wanted if eval_data.lists[metric]), None)
    if not eval_data.metric and (len(eval_rows) or not args["epochs"]):
        message = f"there are no eval rows with labels to measure {' or '.join(wanted)} by"
        if args["eval_dataset"] != "auto" or not args["epochs"]:
            raise UserError(f"{message}: give others, or train with --eval_dataset None", exit_status=2)
        say(f"Warning: {message}: no evaluation, and nothing will be claimed about the ranking.")
    elif len(eval_rows) and args["epochs"] and len(eval_data.lists[eval_data.metric]) < 20:
        say(f"Warning: {len(eval_data.lists[eval_data.metric])} eval queries are too few: a verdict takes 20.")
    model.model.get_input_embeddings().requires_grad_(not args["freeze_embeddings"])
    trained = [each for each in model.parameters() if each.requires_grad]
    if IS_MAIN_PROCESS and args["epochs"]:
        for stale in {*train_data.cache.parent.glob("?" * 64 + ".*")} - {train_data.cache, eval_data.cache}:
            with suppress(PermissionError):  # Windows keeps what is still mapped
                stale.unlink()
        newest, kept = checkpoints_in(run_dir)[-1:], []
        if newest not in ([], [checkpoint]) and args["resume_from_checkpoint"] in (None, "latest") and (
                not args["overwrite_output_dir"]):
            raise UserError(f"{newest[0]} has come meanwhile: another run writes to {run_dir.parent}")
        if checkpoint and checkpoint.resolve().parent == run_dir.resolve():  # what is newer is done again, if need be
            limits = f"checkpoint-{saved['step']:08}", f"best_weights-{saved['best_step']:08}.pt"
            kept = [each for each in checkpoints_in(run_dir) if each.name <= limits[0]]
            kept += [each for each in run_dir.glob(f"best_weights-{DIGITS}.pt") if each.name <= limits[1]]
        for each in written_in(run_dir):
            if each not in kept:
                remove(each)
        (run_dir / "logs").mkdir(parents=True)
        count = max(1, args["save_total_limit"] + 1 - len(checkpoints_in(run_dir)))  # just before an old one goes
        size = sum(each.nbytes for each in trained) * 4 * count + sum(each.nbytes for each in model.parameters()) * 2
        require_space(run_dir, size, f"What a run keeps ({count} checkpoints, weights)")
    accelerator = Accelerator(cpu=state.device.type == "cpu", mixed_precision=facts["precision"],
                              log_with=args["log_with"] if args["epochs"] else None, project_dir=run_dir / "logs",
                              kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])  # constants
    run_id = saved["run_id"] if saved else os.urandom(4).hex()
    wandb = {"dir": str(run_dir / "logs"), "id": run_id, "resume": "allow" if saved else None}
    accelerator.init_trackers("train_bert_rerank", args if args["log_with"] == "wandb" else None, {"wandb": wandb})
    accelerator.log({"args": "\n".join(f"    {key}: {value!r}" for key, value in args.items())}, step=0)
    if args["gradient_checkpointing"]:
        name_of_4 = model.model.gradient_checkpointing_enable  # transformers 5.2x deprecates it
        getattr(model.model, "activation_checkpointing_enable", name_of_4)({"use_reentrant": False})
    groups = [{"params": [each for each in trained if (each.ndim > 1) == decay],  # biases, LayerNorm: False
               "weight_decay": decay * args["weight_decay"]} for decay in (True, False)]
    optimizer = torch.optim.AdamW(groups, args["lr"], (0.9, 0.999), 1e-8, fused=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    is_same_bound = saved and all(saved["args"][key] == args[key] for key in ("micro_batch_tokens", "batch_size"))
    max_tokens = args["micro_batch_tokens"] or args["batch_size"] * args["max_len"]
    if is_same_bound:
        max_tokens = saved["facts"]["micro_batch_tokens"]
    elif max_tokens == "auto" and args["epochs"]:
        max_tokens = largest_micro_batch(accelerator, wrapped, train_data, facts["identity"]["samples of a step"])
    facts["micro_batch_tokens"] = max_tokens = 32 * args["max_len"] if max_tokens == "auto" else max_tokens
    say(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters, device {accelerator.device}, "
        f"precision {facts['precision'].replace('no', 'fp32')}, processes: {state.num_processes}, "
        f"micro-batches of {max_tokens} tokens")
    fresh = {"step": 0, "best_step": 0, "best_weights": None, "bad_steps": 0, "overflows": 0, "history": [],
             "candidates": [], "run_id": run_id, "row_sums": torch.zeros(len(train_data), 2, dtype=torch.long)}
    state = {**(saved or fresh), "args": args, "facts": facts}
    state["max_tokens"] = saved["max_tokens"] if is_same_bound else max_tokens
    return accelerator, wrapped, optimizer, train_data, eval_data if eval_data.metric else None, state


def train(args: dict) -> dict:
    """Fine-tune as `args` says (keys left out take their values in main()), or with 0 epochs evaluate alone. Returns
    what run.json holds (not with 0 epochs) and, as "report", what eval_report.json holds (None without evaluation)."""
    args = check_settings(args)
    say(f"Training Args: {args}")
    seed_everything(args["seed"])
    AcceleratorState._reset_state(reset_partial_state=True)  # so that train() can be called again, as in a notebook
    # Unless told, accelerate overlooks the other CPU processes. A day: others wait while one tokenises or saves.
    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    run_dir = Path(args["output_dir"], "unfinished_run" if args["epochs"] else "evaluation")
    [checkpoint, *_] = gather_object([find_checkpoint(args, run_dir) if IS_MAIN_PROCESS else None])
    if checkpoint and checkpoint.name == "run.json":
        say(f"A run with these settings has ended (data are not compared), and its results are in {run_dir.parent}; "
            "--resume_from_checkpoint None starts anew.")
        report = checkpoint.with_name("eval_report.json")
        report = json.loads(report.read_text("utf-8")) if report.exists() else None
        return {**json.loads(checkpoint.read_text("utf-8")), "report": report}
    clock = [time.perf_counter()]
    accelerator, wrapped, optimizer, train_data, eval_data, state = prepare(args, run_dir, checkpoint)
    model, max_tokens = accelerator.unwrap_model(wrapped), state["facts"]["micro_batch_tokens"]
    if eval_data and not state["step"]:
        state["candidates"] = [evaluate(accelerator, model, eval_data, args, max_tokens)]
    base = eval_data and state["candidates"][0]
    if not args["epochs"]:
        report, *_ = judge([base], eval_data, args)
        if IS_MAIN_PROCESS:
            write_evaluation(run_dir, eval_data, report, {"the model as it is": base["scores"]})
        say(verdict_text(report, args))
        return {"report": report}
    shifted = fit_bias(accelerator, model, train_data, max_tokens)
    clock.append(time.perf_counter())
    say(f"Start training for {args['epochs']} epochs ...")
    weights = fine_tune(accelerator, wrapped, optimizer, train_data, eval_data, run_dir, args, state)
    clock.append(time.perf_counter())
    say("Training finished! Saving model ...")
    report, best, after = judge(state["candidates"], eval_data, args) if eval_data else ({}, {}, {})
    verdict = verdict_text(report, args) if report else "Not evaluated: nothing is claimed about its ranking."
    if report:
        numbers = {f"eval/after/{key}": value for key, value in after["metrics"].items() if value is not None}
        accelerator.log({**numbers, "eval/delta": report["delta"]["mean"] or 0.0}, step=state["step"])
    if weights:
        set_weights(model, weights, best["base_interpolation"])
    if best is base or not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"training left no finite weights: lower lr {args['lr']}, or mixed_precision no")
    if IS_MAIN_PROCESS:
        size = sum(weight.nbytes for weight in model.parameters()) * (1 + (after is base))
        require_space(run_dir, size, "The model")
        if after is base:
            model.save_pretrained(run_dir / "fine_tuned_model")
            set_weights(model, weights, 1.0)
            model.load_state_dict(shifted, strict=False)  # the base as it was
        model.save_pretrained(run_dir / "final_model")
        write_model_card(run_dir / "final_model", model, report, args, state["facts"], verdict)
        draw_loss_curve(state["history"], report, run_dir / "loss_curve.png")
        write_rows_to_check(run_dir / "rows_to_check.jsonl", train_data, state["row_sums"])
        if report:
            scores = {"before: base model": base["scores"], "after: final_model": after["scores"]}
            write_evaluation(run_dir, eval_data, report, scores)
    log_outcome(accelerator, run_dir, state["step"], verdict)
    say("Model saved successfully!")
    rss = importlib.import_module("resource").getrusage(0).ru_maxrss * 1024 if sys.platform == "linux" else None
    run = {"args": args, **state["facts"], "micro_batch_tokens": state["max_tokens"],
           "resumed_from": checkpoint and str(checkpoint),
           "seconds": {"preparation": clock[1] - clock[0], "training": clock[2] - clock[1]},
           "results": [name for name in RESULTS if name == "run.json" or (run_dir / name).exists()],
           "peak_memory_bytes": torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else rss}
    wrapped, optimizer = accelerator.free_memory(wrapped, optimizer)  # DDP must go before its group, or gloo may hang
    accelerator.end_training()
    if IS_MAIN_PROCESS:
        flush_to_disk(*run_dir.rglob("*"), run_dir)
        with whole_file(run_dir / "run.json") as file:  # from here on the run is complete
            file.write(json.dumps(run, indent=2, ensure_ascii=False).encode())
        publish(run_dir)
    if report:
        say(verdict)
    return {**run, "report": report or None}


# ---- Settings --------------------------------------------------------------------------------------------------------
def read_settings():
    """{key: (kinds, meaning, default)} from the `args` literal in main(), the only place where they stand."""
    source = Path(__file__).read_text(encoding="utf-8")
    [function] = [node for node in ast.parse(source).body if getattr(node, "name", None) == "main"]
    literal, settings = next(each for each in ast.walk(function) if isinstance(each, ast.Dict)), {}
    for key, value in zip(literal.keys, literal.values, strict=True):
        rest = source.splitlines()[value.end_lineno - 1].encode()[value.end_col_offset :].decode()
        kinds, _, meaning = rest.partition("#")[2].partition(":")
        default = eval(compile(ast.Expression(value), __file__, "eval"))  # an edited value may read 2 * 256
        if not meaning or not kinds.strip().startswith(("str", "bool", "int", "float", "tuple", '"')):
            raise UserError(f"{key.value} in main() has lost its comment `# kinds: meaning`, which is read too", 2)
        settings[key.value] = (kinds.strip().split(" | "), meaning.strip(), default)
    return settings


def fits(value, kind):
    """Whether `value` is of a kind as main() writes them: str, list, bool, None, "fp16", int 1.., float 0..1."""
    name, _, bounds = kind.partition(" ")
    low, _, high = bounds.partition("..")
    if name in ("int", "float"):
        is_number = type(value) is int or type(value) is float and name == "float"
        return is_number and float(low or -sys.float_info.max) <= value <= float(high or sys.float_info.max)
    if name in ("list", "tuple"):  # of paths, at least one; of numbers, in JSON a list as well
        each = "str" if name == "list" else f"float {bounds}"
        is_list = type(value).__name__ in ("list", name) and (len(value) > 0 or name == "tuple")
        return is_list and all(fits(item, each) for item in value)
    is_fit = value == name.strip('"') if name.startswith('"') else type(value).__name__.removesuffix("Type") == name
    return is_fit and "\0" not in str(value)  # which no path may hold


def check_settings(args):
    """`args` with the keys that it leaves out; UserError (exit status 2) for an unknown key or an unfit value."""
    settings = read_settings()
    args = {**{key: default for key, (_, _, default) in settings.items()}, **args}
    for key, value in args.items():
        if key not in settings:
            raise UserError(f"unknown setting {key}; the nearest is {get_close_matches(key, settings, 1, 0)[0]}", 2)
        if not any(fits(value, kind) for kind in settings[key][0]):
            raise UserError(f"{key} should be {' or '.join(settings[key][0])}, not {value!r}", exit_status=2)
    if args["min_label"] >= args["max_label"]:
        raise UserError(f"min_label {args['min_label']} is not below max_label {args['max_label']}", exit_status=2)
    if any(args[key].count("{}") != 1 for key in ("query_format", "document_format")):
        raise UserError("query_format and document_format should each hold {} once, where the text goes", exit_status=2)
    if args["resume_from_checkpoint"] and args["overwrite_output_dir"]:
        raise UserError("resume_from_checkpoint goes on and overwrite_output_dir starts over: set one of them", 2)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # its processes must all do the same forwards: they would hang
        raise UserError("accelerate asks for FSDP, which this script cannot use: launch with torchrun, or --multi_gpu, "
                        "which overrides it; what saves memory: docs/scaling.md", exit_status=2)
    for package in filter(None, ("matplotlib", args["log_with"])):
        if not getattr(importlib.util.find_spec(package), "origin", None):
            raise UserError(f"the package {package} is missing: pip install {package}", exit_status=2)
    return args


def parse_command_line(argv):
    """The settings that `--key value` overrides; --help prints them all."""
    settings = read_settings()
    parser = argparse.ArgumentParser(usage="%(prog)s [--key value ...]", allow_abbrev=False, description=__doc__)
    for key, (kinds, meaning, default) in settings.items():
        text = f"{meaning} ({' or '.join(kinds)}; default {default!r})".replace("%", "%%")
        parser.add_argument(f"--{key}", metavar="", default=argparse.SUPPRESS, help=text)
    given, unknown = parser.parse_known_args(argv)
    overrides = {key.partition("=")[0][2:] if key.startswith("--") else repr(key): None for key in unknown[:1]}
    for key, text in vars(given).items():
        try:
            value = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = text
        overrides[key] = value if any(fits(value, kind) for kind in settings[key][0]) else text
    return overrides


def main():
    """Edit the values of `args` and run. The comments, `# kinds: meaning`, are read too: keep them."""
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
        "epochs": 3,  # int 0..: passes over the training rows; 0: evaluate the model as it is, and no more
        "lr": 1e-5,  # float 0..: peak learning rate
        "batch_size": 2,  # int 1..: batch_size * max_len padded tokens are the bound of a micro-batch, hence its memory
        "gradient_accumulation_steps": 8,  # int 1..: batch_size * this * processes are the samples of an optimizer step
        "micro_batch_tokens": None,  # int 1.. | "auto" | None: that bound itself; auto: what the GPU's memory can hold
        "gradient_checkpointing": False,  # bool: compute activations again rather than keep them: slower, less memory
        "freeze_embeddings": False,  # bool: do not train the word embeddings, nearly half of bge-reranker-large
        "warmup_proportion": 0.1,  # float 0..1: share of the steps in which the learning rate rises
        "weight_decay": 0.01,  # float 0..: of AdamW, not on biases and LayerNorm
        "max_grad_norm": 1.0,  # float 0..: gradients are clipped to this norm; 0: never
        "eval_steps": None,  # int 1.. | None: evaluate every so many optimizer steps; None: at the end of each epoch
        "metric_for_best_model": "auto",  # "auto" | "ndcg@10" | "mrr@10" | "map" | "average_precision": best is best in
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
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside of training Ctrl-C ends a run at once, with no traceback
    logging.set_verbosity_error()  # transformers prints names out of a checkpoint unescaped; the run tells what matters
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show must not end a run
    try:
        train({**args, **parse_command_line(sys.argv[1:])})
    except (UserError, OSError) as error:  # a full disk, a folder without permission
        status = getattr(error, "exit_status", 1)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
            print(f"{'Error: ' * (status < 128)}{printable(error)}", file=sys.stderr)
        sys.exit(status)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "by peer" not in str(error):
            raise
        sys.exit(f"Error: another process of this run has ended: {error}\n{CHOICES}")


if __name__ == "__main__":
    main()
