"""Fine-tune a BERT-family cross-encoder reranker on (query, content, label) rows; measure whether its ranking rose.

Edit the `args` dict in main(), at the end, and run the file, or override settings on the command line (`--help`). For
inference: `from train_bert_rerank import BertRerankerModel`. The code stands in the order in which a run meets it."""

import argparse
import ast
import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

ADVICE = 'Each line should be a JSON object in UTF-8: {"query": "…", "content": "…", "label": 1}'
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # torchrun and accelerate launch set RANK
MICRO_BATCH_COST = {"cpu": 16, "cuda": 256, "mps": 256}  # what one more micro-batch costs, in padded tokens


class UserError(Exception):
    """A mistake that the user can mend: main() prints the message, no traceback, and exits with `exit_status`."""
    def __init__(self, message, exit_status=1):
        super().__init__(message)
        self.exit_status = exit_status


def say(message):
    """Print once, however many processes there are."""
    if IS_MAIN_PROCESS:
        print(message, flush=True)


# ---- Reproducibility -------------------------------------------------------------------------------------------------
def seed_everything(seed):
    """Seed random, numpy, torch and CUDA and turn on determinism; call it before CUDA starts, for cuBLAS's variable."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.cuda.is_available() and workspace not in (":4096:8", ":16:8"):
        say(f"CUBLAS_WORKSPACE_CONFIG={workspace} is not deterministic to PyTorch: :4096:8 is used instead.")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def supported_precision(mixed_precision, device):
    """`mixed_precision` where `device` computes in it natively, else "no" (fp32), which is said."""
    bf16 = {
        "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": torch.backends.mps.is_available() and torch.backends.mps.is_macos_or_newer(14, 0),
        "cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    }
    if {"no": True, "fp16": device.type != "cpu", "bf16": bf16[device.type]}[mixed_precision]:
        return mixed_precision
    say(f"mixed_precision {mixed_precision} is not native to this {device.type} device: computing in fp32.")
    return "no"


# ---- Model -----------------------------------------------------------------------------------------------------------
class BertRerankerModel(torch.nn.Module):
    """A cross-encoder with one logit per (query, document) pair, and its tokenizer.
    `new_weights` names what the checkpoint lacked (a plain encoder's head) and torch's random generator filled in.
    An encoded pair is (ids, boundary): int32 token ids with special tokens, and how many lie in the first segment."""

    def __init__(self, model, tokenizer, new_weights=()):
        super().__init__()
        self.model, self.tokenizer, self.new_weights = model, tokenizer, new_weights
        self.loss = torch.nn.BCEWithLogitsLoss()

    @classmethod
    def from_pretrained(cls, model_name_or_path, revision=None, trust_remote_code=False):
        """Load as fp32 from a folder, else a complete local cache, else the hub; UserError where none has the model."""
        name, options = model_name_or_path, {"revision": revision, "trust_remote_code": trust_remote_code}
        for local_only in (True, False):
            options["local_files_only"] = local_only
            try:
                config = AutoConfig.from_pretrained(name, num_labels=1, **options)
                tokenizer = AutoTokenizer.from_pretrained(name, **options)
                if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes one up without files
                    raise OSError("the files of its tokenizer are missing")
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
                )
                break
            except Exception as error:  # the loaders raise a dozen types for files that are not what they expect
                if Path(name).is_dir() or not local_only or not isinstance(error, OSError | ValueError):
                    raise UserError(f"cannot load {name}: {type(error).__name__}: {str(error)[:500]}") from error
            check_hub(name, revision)
        if config.is_encoder_decoder or not tokenizer.is_fast:
            raise UserError(f"{name} is no BERT-family encoder with a fast tokenizer, but {config.model_type}.")
        new_weights = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        lost = [key for key in new_weights if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
        if lost:
            raise UserError(f"{name} lacks {len(lost)} weights of its encoder, {lost[0]} among them.")
        return cls(model.float(), tokenizer, new_weights)  # a checkpoint in fp16 is trained in fp32 too

    def save_pretrained(self, folder):
        """Write model (safetensors) and tokenizer as transformers does; the inverse of from_pretrained."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def max_len(self):
        """Tokens that a pair may have, special tokens included (of XLM-R's 514 positions 512 are usable)."""
        limits = [min(int(self.tokenizer.model_max_length), 10**9)]
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
                limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        return min(limits)

    def encode(self, pairs, max_len):
        """Tokenise N (query, document) pairs to at most `max_len` tokens. The document is cut; a query only where it
        leaves no room, down to room for one token of the document. Returns [N encoded], pairs cut, queries cut."""
        tokenizer = self.tokenizer.backend_tokenizer  # transformers' "only_second" raises where the query is too long
        tokenizer.no_truncation()
        tokenizer.no_padding()
        room = max_len - tokenizer.num_special_tokens_to_add(is_pair=True)
        sides = []
        for key, texts in zip(("query_format", "document_format"), zip(*pairs, strict=True), strict=True):
            texts = [getattr(self.model.config, key, "{}").replace("{}", text) for text in texts]
            sides.append(tokenizer.encode_batch(texts, add_special_tokens=False))
        encoded, cut, query_cut = [], 0, 0
        for query, document in zip(*sides, strict=True):
            if len(query) + len(document) > room:
                cut, query_cut = cut + 1, query_cut + (len(query) >= room)
                query.truncate(room - 1)
                for spare in (room, 1, 0):  # in steps: a cut keeps the rest in pieces as short as what stays, thousands
                    document.truncate(room - len(query) + spare)
            pair = tokenizer.post_process(query, document)
            encoded.append((np.array(pair.ids, dtype=np.int32), pair.type_ids.count(0)))
        return encoded, cut, query_cut

    def collate(self, encoded):
        """Pad B encoded pairs to the longest of them: a dict of tensors [B, T]."""
        lengths = np.array([[len(ids)] for ids, _ in encoded])
        positions = np.arange(lengths.max())
        input_ids = np.full((len(encoded), len(positions)), self.tokenizer.pad_token_id)
        for row, (ids, _) in zip(input_ids, encoded, strict=True):
            row[: len(ids)] = ids
        batch = {"input_ids": input_ids, "attention_mask": positions < lengths}
        if "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = (positions >= [[boundary] for _, boundary in encoded]) & (positions < lengths)
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}

    def preprocess(self, pairs, max_len=512):
        """Tokenise and pad B (query, document) pairs: a dict of tensors [B, T] with T at most `max_len`."""
        return self.collate(self.encode(pairs, max_len)[0])

    def forward(self, batch, labels=None):
        """Return {"logits": [B, 1], "loss": mean BCE with logits against `labels` [B] in [0, 1], or None}."""
        logits = self.model(**{name: tensor.to(self.model.device) for name, tensor in batch.items()}).logits.float()
        loss = None if labels is None else self.loss(logits.squeeze(-1), labels.to(logits))
        return {"logits": logits, "loss": loss}

    @torch.inference_mode()
    def score(self, encoded, max_tokens, process_index=0, num_processes=1, show_progress_bar=None):
        """Logits [N] in fp32 of N encoded pairs, in micro-batches of at most `max_tokens` padded tokens. Of several
        processes each computes whole micro-batches; the logits of the others stay 0."""
        self.eval()
        device = self.model.device
        lengths = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
        [micro_batches] = plan_window(lengths, max_tokens, MICRO_BATCH_COST[device.type])
        logits = torch.zeros(len(encoded), device=device)
        for indices in tqdm(micro_batches[process_index::num_processes], desc="Scoring", disable=not show_progress_bar):
            output = self(self.collate([encoded[index] for index in indices]))
            logits[torch.from_numpy(indices).to(device)] = output["logits"].squeeze(-1)
        return logits

    def predict(self, inputs, batch_size=32, show_progress_bar=None, activation_fn=None, convert_to_numpy=True,
                convert_to_tensor=False):
        """Scores [N] of N (query, document) pairs, or of one: arguments and results as in CrossEncoder.predict.
        `activation_fn` None is the sigmoid; pairs of over `self.max_len` tokens lose the end of their document."""
        is_single = len(inputs) > 0 and isinstance(inputs[0], str)
        encoded = self.encode([inputs] if is_single else inputs, self.max_len)[0] if len(inputs) else []
        logits = self.score(encoded, batch_size * self.max_len, show_progress_bar=show_progress_bar)
        scores = (activation_fn or torch.sigmoid)(logits)
        if not convert_to_tensor:
            scores = scores.cpu().numpy() if convert_to_numpy else list(scores)
        return scores[0] if is_single else scores

    def rank(self, query, documents, top_k=None, return_documents=False, **predict_options):
        """Documents, best first, as [{"corpus_id", "score"[, "text"]}]: as in CrossEncoder.rank."""
        scores = self.predict([(query, document) for document in documents], **predict_options).tolist()
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
        texts = [{"text": document} if return_documents else {} for document in documents]
        return [{"corpus_id": index, "score": scores[index], **texts[index]} for index in order]


def check_hub(name, revision):
    """Raise UserError where the hub does not have the model or does not answer within some ten seconds."""
    try:
        HfApi().model_info(name, revision=revision, timeout=6)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"{name} is no local folder, and the hub refuses it: {str(error).splitlines()[0]}") from error
    except Exception as error:  # name resolution, proxy, TLS, timeout, offline mode: the hub is out of reach
        raise UserError(
            f"{name} is no folder, not in the cache, and the hub is out of reach ({type(error).__name__}). Either\n"
            "  - pass a local copy:       --model_name_or_path path/to/the/folder\n"
            "  - use a mirror of the hub: HF_ENDPOINT=https://hf-mirror.com python train_bert_rerank.py\n"
            "  - try without a download:  --model_name_or_path tiny_reranker"
        ) from error


# ---- Data ------------------------------------------------------------------------------------------------------------
def parse_line(line, min_label, max_label):
    """The (query, content, label) rows of a JSONL line; ValueError says what is wrong. The shapes: {"query", "content",
    "label"}, {"query", "pos": […], "neg": […]}, {"query", "hits": [{"content", "label"}, …]}."""
    try:
        sample = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError as well
        raise ValueError(f"not JSON in UTF-8 ({str(error).replace('line 1 column', 'column')})") from error
    if not isinstance(sample, dict):
        raise ValueError("not a JSON object")
    if sum(any(key in sample for key in shape) for shape in (("content",), ("pos", "neg"), ("hits",))) > 1:
        raise ValueError("two shapes at once: keep either content, or pos and neg, or hits")
    lists = [sample.get(key, []) for key in ("pos", "neg", "hits")]
    if not all(isinstance(each, list) for each in lists) or not all(isinstance(hit, dict) for hit in lists[2]):
        raise ValueError('pos and neg should be lists of texts, hits a list of {"content": "…", "label": 1}')
    hits = [{"content": text, "label": label} for texts, label in zip(lists, (max_label, min_label), strict=False)
            for text in texts] or lists[2] or [sample]
    rows = [(sample.get("query"), hit.get("content"), hit.get("label")) for hit in hits]
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
            raise ValueError(f"label {label} is outside [{min_label}, {max_label}] (min_label, max_label)")
    return rows


def read_rows(path, min_label, max_label):
    """Rows [(query, content, label)] and SHA-256 of a JSONL file, plain or gzip; UserError shows ten bad lines."""
    rows, bad, digest = [], [], hashlib.sha256()
    try:
        with open(path, "rb") as raw, tqdm(desc="Loading data", total=os.path.getsize(path), unit="B", unit_scale=True,
                                           disable=not IS_MAIN_PROCESS) as bar:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if is_gzip else raw, start=1):
                digest.update(line)
                bar.update(raw.tell() - bar.n)
                line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
                try:
                    rows += parse_line(line, min_label, max_label) if line else []
                except ValueError as error:
                    bad.append(f"\n  line {number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if bad:
        more = f"\n  … and {len(bad) - 10} more" * (len(bad) > 10)
        raise UserError(f"{path}: {len(bad)} bad line{'s' * (len(bad) > 1)}{''.join(bad[:10])}{more}\n{ADVICE}")
    if not rows:
        raise UserError(f"{path}: no rows. {ADVICE}")
    say("----- Label Distribution -----")
    for label, count in sorted(Counter(round(label, 2) + 0.0 for *_, label in rows).most_common(20)):
        say(f"Label {label:.2f}: {count} ({count / len(rows):.2%})")
    return rows, digest.hexdigest()


def load_data(args):
    """Train rows, eval rows (none: no evaluation) and {path: SHA-256}; says where the eval rows come from."""
    is_one, eval_path = isinstance(args["train_dataset"], str), args["eval_dataset"]
    paths = [args["train_dataset"]] if is_one else args["train_dataset"]
    sibling = Path(os.path.dirname(paths[0]), os.path.basename(paths[0]).replace("train", "eval"))
    if eval_path == "auto" and is_one and sibling != Path(paths[0]) and sibling.is_file():
        eval_path = str(sibling)
    eval_paths = [] if eval_path in ("auto", None) else [eval_path]
    files = {path: read_rows(path, args["min_label"], args["max_label"]) for path in [*paths, *eval_paths]}
    train_rows, eval_rows = ([row for path in each for row in files[path][0]] for each in (paths, eval_paths))
    if eval_path == "auto":
        queries = list(dict.fromkeys(query for query, *_ in train_rows))
        count = min(math.ceil(len(queries) * args["eval_proportion"]), len(queries) - 1)
        held_out = set(random.Random(args["seed"]).sample(queries, count))
        eval_rows = [row for row in train_rows if row[0] in held_out]
        train_rows = [row for row in train_rows if row[0] not in held_out]
    source = "held out of the train data" if eval_path == "auto" else f"of {eval_path}"
    say(f"Evaluating on {len({query for query, *_ in eval_rows})} queries ({len(eval_rows)} rows) {source}."
        if eval_rows else "No evaluation: nothing will be claimed about the ranking.")
    return train_rows, eval_rows, {path: sha256 for path, (_, sha256) in files.items()}


def check_rows(train_rows, eval_rows, middle):
    """Warn, with counts, of what is allowed in data but seldom meant; labels from `middle` on are relevant."""
    distinct, total = set(train_rows), len(train_rows)
    relevant = sum(label >= middle for *_, label in train_rows)
    for count, what in [
        (total - len(distinct), "train rows are exact duplicates of others"),
        (sum(n > 1 for n in Counter(row[:2] for row in distinct).values()), "train pairs have contradicting labels"),
        (len({row[0] for row in distinct} & {row[0] for row in eval_rows}), "queries are in both train and eval data"),
        (total * (len({row[2] for row in distinct}) == 1), "train rows, all there are, have one and the same label"),
        (total * (0 < relevant * 20 < total), f"train rows have only {relevant} relevant ones among them"),
    ]:
        if count:
            say(f"Warning: {count} {what}.")


class RerankDataset:
    """N rows tokenised once: `encoded` pairs, their `lengths` [N] in tokens, and `labels` [N] scaled to [0, 1]."""

    def __init__(self, rows, name, model, args):
        self.queries, self.encoded, cut, query_cut = [query for query, *_ in rows], [], 0, 0
        scale = args["max_label"] - args["min_label"]
        self.labels = torch.tensor([(label - args["min_label"]) / scale for *_, label in rows])
        for start in tqdm(range(0, len(rows), 1000), f"Tokenizing {name} data", disable=not (IS_MAIN_PROCESS and rows)):
            chunk = model.encode([row[:2] for row in rows[start : start + 1000]], args["max_len"])
            self.encoded += chunk[0]
            cut, query_cut = cut + chunk[1], query_cut + chunk[2]
        self.lengths = np.array([len(ids) for ids, _ in self.encoded])
        if cut:
            say(f"Warning: max_len truncates {cut} {name} pairs ({cut / len(rows):.2%}), in {query_cut} the query too.")


# ---- Windows ---------------------------------------------------------------------------------------------------------
def cut_window(lengths, max_tokens, batch_cost):
    """Cut ascending `lengths` into runs [(start, end)] of at most `max_tokens` padded tokens each, at the least cost.
    A run costs its padded tokens plus `batch_cost`; a sample longer than the bound stands alone. Dynamic programming
    over the ends of runs is exact: one of the best ways to group samples has contiguous runs of sorted lengths."""
    least = np.zeros(len(lengths) + 1, dtype=np.int64)  # least[end]: cost of the best cut of lengths[:end]
    start_of = [0] * (len(lengths) + 1)
    for end in range(1, len(lengths) + 1):
        longest = lengths[end - 1]
        first = max(0, end - max(1, max_tokens // longest))
        costs = least[first:end] + (end - np.arange(first, end)) * longest + batch_cost
        least[end], start_of[end] = costs.min(), first + int(costs.argmin())
    runs, end = [], len(lengths)
    while end:
        runs.append((start_of[end], end))
        end = start_of[end]
    return runs


def plan_window(lengths, max_tokens, batch_cost, num_processes=1):
    """Each process's micro-batches (index arrays into `lengths`), so that the slowest process is as fast as may be.
    The cuts under smaller and smaller bounds are dealt out, the costliest micro-batch first, each to the least loaded
    process (Graham's LPT rule); the deal whose largest load is smallest wins."""
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    bound, least = max_tokens, math.inf
    while True:
        loads, deal = [0] * num_processes, [[] for _ in range(num_processes)]
        runs = cut_window(lengths, bound, batch_cost)
        for cost, start, end in sorted(((e - s) * int(lengths[e - 1]) + batch_cost, s, e) for s, e in runs)[::-1]:
            process = loads.index(min(loads))
            loads[process] += cost
            deal[process].append(order[start:end])
        if max(loads) < least:
            least, plan = max(loads), deal
        # Balanced to 2 %, or as fine as the longest sample allows: still smaller micro-batches would only add cost.
        if max(loads) * num_processes <= 1.02 * sum(loads) or bound <= lengths[-1]:
            return plan
        bound = max(bound * 7 // 8, lengths[-1])


def epoch_windows(lengths, samples_per_step, generator, num_processes=1, process_index=0, **planning):
    """Yield an epoch's windows: (samples in the window, this process's micro-batches of row numbers). A window is the
    samples of one optimizer step, consecutive in a new random permutation; the last one may be smaller."""
    permutation = torch.randperm(len(lengths), generator=generator).numpy()
    for window in np.split(permutation, range(samples_per_step, len(lengths), samples_per_step)):
        plan = plan_window(lengths[window], num_processes=num_processes, **planning)
        yield len(window), [window[indices] for indices in plan[process_index]]


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def ndcg_at_k(labels, scores, k=10):
    """NDCG@k of one query, linear gain as in trec_eval. Scores that differ by rounding only are ties, and ties get
    what random order gives on average: each of them the mean discount of their places."""
    discounts = (np.arange(len(labels)) < k) / np.log2(np.arange(2, len(labels) + 2))
    _, group, sizes = np.unique(-np.round(scores, 5), return_inverse=True, return_counts=True)  # 0: the best scores
    mean_discounts = np.bincount(np.sort(group), discounts) / sizes
    return (labels * mean_discounts[group]).sum() / (np.sort(labels)[::-1] * discounts).sum()


def mrr_at_k(labels, scores, k=10):
    """Reciprocal rank of the first label ≥ 0.5 of one query, 0 beyond k; ties as in ndcg_at_k."""
    _, group = np.unique(-np.round(scores, 5), return_inverse=True)
    first = group[labels >= 0.5].min()
    start, size, hits = (group < first).sum(), (group == first).sum(), (labels[group == first] >= 0.5).sum()
    # In random order, the first of `hits` among `size` stands at `place` in comb(size - place, hits - 1) cases.
    return sum(math.comb(size - place, hits - 1) / math.comb(size, hits) / (start + place)
               for place in range(1, min(size - hits + 1, k - start) + 1))


def ranking_metrics(queries, labels, scores):
    """Mean NDCG@10 over queries with different labels, mean MRR@10 over those with relevant and irrelevant rows; None
    over no query. `queries`: N texts, `labels` [N] in [0, 1], `scores` [N]."""
    rows_of = {}
    for row, query in enumerate(queries):
        rows_of.setdefault(query, []).append(row)
    groups = [(labels[rows], scores[rows]) for rows in rows_of.values()]
    ndcg = [ndcg_at_k(label, score) for label, score in groups if label.min() < label.max()]
    mrr = [mrr_at_k(label, score) for label, score in groups if label.min() < 0.5 <= label.max()]
    return {"NDCG@10": float(np.mean(ndcg)) if ndcg else None, "MRR@10": float(np.mean(mrr)) if mrr else None,
            "queries": len(ndcg), "queries_left_out": len(groups) - len(ndcg)}


def evaluate(accelerator, model, dataset, max_tokens):
    """ranking_metrics of `model`; micro-batches go whole to the processes, so that their number changes no score."""
    scores = model.score(dataset.encoded, max_tokens, accelerator.process_index, accelerator.num_processes,
                         show_progress_bar=IS_MAIN_PROCESS and len(dataset.encoded) > 0)
    return ranking_metrics(dataset.queries, dataset.labels.numpy(), accelerator.reduce(scores, "sum").cpu().numpy())


# ---- Training --------------------------------------------------------------------------------------------------------
def learning_rate(step, total_steps, peak, warmup_proportion):
    """The rate of step 1…total_steps: linear warm-up over ceil(warmup_proportion × them), then cosine, 0 after them."""
    warmup = math.ceil(warmup_proportion * total_steps)
    decayed = (step - 1 - warmup) / max(1, total_steps - warmup)
    return peak * (step / warmup if step <= warmup else (1 + math.cos(math.pi * decayed)) / 2)


def start_accelerator(args, run_dir):
    """The Accelerator for the hardware at hand, with its log under `run_dir`."""
    AcceleratorState._reset_state(reset_partial_state=True)  # so that train() can be called again, as in a notebook
    cpu = not torch.accelerator.is_available()  # unless told, accelerate overlooks the other CPU processes
    state, gpus = PartialState(cpu=cpu), torch.cuda.device_count()
    if gpus > state.num_processes == 1:
        say(f"Using 1 GPU of {gpus}; all: accelerate launch --num_processes {gpus} {subprocess.list2cmdline(sys.argv)}")
    logs, config = run_dir / "logs", args if args["log_with"] == "wandb" else None  # TensorBoard takes no list
    accelerator = Accelerator(cpu=cpu, mixed_precision=supported_precision(args["mixed_precision"], state.device),
                              log_with=args["log_with"], project_dir=logs)
    accelerator.init_trackers("train_bert_rerank", config, {"wandb": {"dir": str(logs)}})
    return accelerator


def run_steps(accelerator, model, optimizer, dataset, args):
    """The training loop: a step takes the mean BCE over exactly the samples of its window, over all processes.
    Returns [{"step", "epoch", "loss", "lr", "grad_norm"}], one for each optimizer step."""
    processes, collate = accelerator.num_processes, accelerator.unwrap_model(model).collate
    samples_per_step = args["batch_size"] * args["gradient_accumulation_steps"] * processes
    total_steps = args["epochs"] * math.ceil(len(dataset.lengths) / samples_per_step)
    history, seen, started, order = [], 0, time.perf_counter(), torch.Generator().manual_seed(args["seed"])
    bar = tqdm(desc="Training", total=total_steps, disable=not IS_MAIN_PROCESS)
    model.train()
    for epoch in range(1, args["epochs"] + 1):
        for window_size, micro_batches in epoch_windows(
            dataset.lengths, samples_per_step, order, processes, accelerator.process_index,
            max_tokens=args["batch_size"] * args["max_len"], batch_cost=MICRO_BATCH_COST[accelerator.device.type],
        ):
            # DDP needs a backward of every process: one without a sample of the window takes a row that weighs nothing.
            weights = [len(indices) / window_size for indices in micro_batches] or [0.0]
            window_loss = torch.zeros((), device=accelerator.device)
            for number, indices in enumerate(micro_batches or [np.array([0])], start=1):
                # Gradients are exchanged once a window, with the last micro-batch; DDP takes their mean over processes.
                with contextlib.nullcontext() if number == len(weights) else accelerator.no_sync(model):
                    batch = collate([dataset.encoded[index] for index in indices])
                    loss = model(batch, dataset.labels[indices])["loss"] * weights[number - 1]
                    accelerator.backward(loss * processes)
                window_loss += loss.detach()
            step = len(history) + 1
            lr = learning_rate(step, total_steps, args["lr"], args["warmup_proportion"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args["max_grad_norm"] or math.inf).item()
            optimizer.step()
            optimizer.zero_grad()
            loss = accelerator.reduce(window_loss, "sum").item()
            if not math.isfinite(loss):
                raise UserError(f"the loss of step {step} is {loss}: lower lr {args['lr']}, or mixed_precision no")
            accelerator.log({"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm}, step=step)
            history.append({"step": step, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": grad_norm})
            seen += window_size
            speed = seen / (time.perf_counter() - started)
            bar.set_postfix_str(f"epoch {epoch}/{args['epochs']}, loss {loss:.4f}, lr {lr:.2e}, {speed:.1f} pairs/s")
            bar.update()
    bar.close()
    return history


def draw_loss_curve(history, path):
    """Draw the loss of each step, its moving mean, the learning rate and the ends of epochs."""
    from matplotlib.figure import Figure
    steps, losses, rates = (np.array([point[key] for point in history]) for key in ("step", "loss", "lr"))
    half = math.ceil(len(steps) / 40)
    smooth = [losses[max(0, index - half) : index + half + 1].mean() for index in range(len(losses))]
    ends = np.flatnonzero(np.diff([point["epoch"] for point in history])) + 1.5
    axes = Figure(figsize=(9, 4.5), dpi=120, layout="constrained").subplots()
    axes.vlines(ends, 0, 1, transform=axes.get_xaxis_transform(), color="0.8", linestyle=":", label="end of an epoch")
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="loss of a step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2.5, label=f"mean of {2 * half + 1} steps")
    axes.set(xlabel="optimizer step", ylabel="training loss (BCE)", ylim=(0, None))
    right = axes.twinx()
    right.plot(steps, rates, color="tab:orange", label="learning rate")
    right.set(ylabel="learning rate", ylim=(0, None))
    axes.figure.legend(loc="outside upper center", ncols=4, frameon=False)
    axes.figure.savefig(path)


def describe_machine(accelerator):
    """What run.json says of versions, hardware and memory."""
    is_cuda = accelerator.device.type == "cuda"
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--verify", "HEAD"]
    rss = importlib.import_module("resource").getrusage(0).ru_maxrss * 1024 if sys.platform == "linux" else None
    packages = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
    return {
        "processes": accelerator.num_processes, "precision": accelerator.mixed_precision,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_cuda else rss,
        "hardware": f"{platform.platform()}, {torch.cuda.get_device_name() if is_cuda else accelerator.device}",
        "python": platform.python_version(), "versions": {each: importlib.metadata.version(each) for each in packages},
        "git_revision": shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def train(args):
    """Fine-tune as `args` says (keys left out take their values in main()); returns what run.json holds."""
    args = check_settings(args)
    say(f"Training Args: {args}")
    name, max_len, output_dir = args["model_name_or_path"], args["max_len"], Path(args["output_dir"])
    run_dir = output_dir / "unfinished_run"  # what is in it moves up into output_dir once all of it is complete
    stray = not (output_dir / "run.json").exists() and any((output_dir / n).exists() for n in ("final_model", "logs"))
    if stray or output_dir.is_file() or (run_dir / "run.json").exists():
        raise UserError(f"{output_dir} is a file, or holds a model, logs or a run to keep: take another output_dir", 2)
    seed_everything(args["seed"])
    clock = [time.perf_counter()]
    train_rows, eval_rows, data_sha256 = load_data(args)
    check_rows(train_rows, eval_rows, (args["min_label"] + args["max_label"]) / 2)
    model = BertRerankerModel.from_pretrained(name, args["revision"], args["trust_remote_code"])
    if model.new_weights:
        say(f"Not in {name}, so drawn with seed {args['seed']}: {', '.join(model.new_weights)}")
    if max_len > model.max_len:
        raise UserError(f"max_len {max_len}: {name} takes {model.max_len} (positions, model_max_length)", exit_status=2)
    model.tokenizer.model_max_length = max_len
    model.model.config.update({key: args[key] for key in ("query_format", "document_format")})
    base_sha256 = hashlib.sha256()
    for weight in model.state_dict().values():
        base_sha256.update(weight.numpy())
    train_data, eval_data = (RerankDataset(*part, model, args) for part in ((train_rows, "train"), (eval_rows, "eval")))
    if IS_MAIN_PROCESS:
        shutil.rmtree(run_dir, ignore_errors=True)
        (run_dir / "logs").mkdir(parents=True)
    accelerator = start_accelerator(args, run_dir)
    groups = [{"params": [weight for weight in model.parameters() if (weight.ndim > 1) == decay],
               "weight_decay": decay * args["weight_decay"]} for decay in (True, False)]  # biases, LayerNorm: False
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, args["lr"], (0.9, 0.999), 1e-8))
    say(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters, device {accelerator.device}, "
        f"precision {accelerator.mixed_precision.replace('no', 'fp32')}, processes: {accelerator.num_processes}")
    before = evaluate(accelerator, model, eval_data, args["batch_size"] * max_len)
    torch.manual_seed(args["seed"] + accelerator.process_index)  # each process drops out on its own
    clock.append(time.perf_counter())
    say(f"Start training for {args['epochs']} epochs ...")
    history = run_steps(accelerator, wrapped, optimizer, train_data, args)
    clock.append(time.perf_counter())
    say("Training finished! Saving model ...")
    if IS_MAIN_PROCESS:
        model.save_pretrained(run_dir / "final_model")
        draw_loss_curve(history, run_dir / "loss_curve.png")
    say("Model saved successfully!")
    after = evaluate(accelerator, model, eval_data, args["batch_size"] * max_len)
    run = {
        "args": args, "before": before, "after": after, "data_sha256": data_sha256,
        "base_sha256": base_sha256.hexdigest(), "base_revision": None if Path(name).is_dir() else
        Path(try_to_load_from_cache(name, "config.json", revision=args["revision"]) or "").parent.name,
        "seconds": {"preparation": clock[1] - clock[0], "training": clock[2] - clock[1]},
        **describe_machine(accelerator),
    }
    accelerator.end_training()
    if IS_MAIN_PROCESS:
        (run_dir / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False), encoding="utf-8")
        for result in sorted(run_dir.iterdir(), key=lambda path: path.name == "run.json"):  # it last
            target = output_dir / result.name
            if os.path.lexists(target):
                say(f"{target} replaces that of an earlier run.")
                (shutil.rmtree if target.is_dir() and not target.is_symlink() else os.remove)(target)
            result.rename(target)
        run_dir.rmdir()
    if eval_rows and before["NDCG@10"] is None:
        say("No query of the evaluation has rows with different labels: nothing is claimed about the ranking.")
    for key, was, now in [(key, before[key], after[key]) for key in ("NDCG@10", "MRR@10") if before[key] is not None]:
        say(f"{key:10} before {was:.4f}   after {now:.4f}   change {now - was:+.4f}")
    return run


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
        if not meaning or not kinds.strip().startswith(("str", "bool", "int", "float", '"')):
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
    if name == "list":  # of paths
        return type(value) is list and value != [] and all(type(path) is str for path in value)
    return value == name.strip('"') if name.startswith('"') else type(value).__name__.removesuffix("Type") == name


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
            value = json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
        except ValueError:
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
        "query_format": "{}",  # str: what is made of a query, also at inference, such as "query: {}"
        "document_format": "{}",  # str: the same of a document
        "epochs": 3,  # int 1..: passes over the training rows
        "lr": 1e-5,  # float 0..: peak learning rate
        "batch_size": 2,  # int 1..: batch_size * max_len tokens are the bound of one forward pass, hence its memory
        "gradient_accumulation_steps": 8,  # int 1..: batch_size * this * processes are the samples of an optimizer step
        "warmup_proportion": 0.1,  # float 0..1: share of the steps in which the learning rate rises
        "weight_decay": 0.01,  # float 0..: of AdamW, not on biases and LayerNorm
        "max_grad_norm": 1.0,  # float 0..: gradients are clipped to this norm; 0: never
        "seed": 42,  # int 0..4294967295: the same seed gives the same bits on the same machine
        "mixed_precision": "bf16",  # "bf16" | "fp16" | "no": of the computation; the weights stay fp32
        "log_with": "tensorboard",  # "tensorboard" | "wandb" | None: where train/loss, train/lr, train/grad_norm go
    }
    try:
        train({**args, **parse_command_line(sys.argv[1:])})
    except (UserError, OSError) as error:  # a full disk, a folder without permission
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
            print(f"Error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))


if __name__ == "__main__":
    main()
