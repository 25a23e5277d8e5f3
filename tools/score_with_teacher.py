"""Label pairs with a teacher's probabilities, to train a smaller reranker on them (distillation).

    python tools/score_with_teacher.py pairs.jsonl --teacher BAAI/bge-reranker-v2-m3 --output scored.jsonl
    python train_bert_rerank.py --model_name_or_path BAAI/bge-reranker-base --train_dataset scored.jsonl

An input has any shape that train_bert_rerank.py reads, plain or gzip; labels may be missing, and those that are there
are not looked at. The output has a row {"query", "content", "label"} for each pair, in their order, the label being the
sigmoid of the teacher's logit with six decimals (binary cross-entropy is minimal where the student gives the same
probability: Hinton et al. 2015, with temperature 1).

Pairs are scored in blocks of 2,048, within which they are sorted by length, so that little is padded. A call that was
interrupted goes on behind its last whole block, from OUTPUT.unfinished, and gives the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import math
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import (  # noqa: E402
    ADVICE,
    BertRerankerModel,
    UserError,
    parse_line,
    printable,
    read_rows,
    say,
    seed_everything,
    whole_file,
)

BLOCK = 2048


def parse_unlabelled(line, min_label, max_label):
    """As parse_line(), of a line whose labels may be missing; those that are there are replaced."""
    with_labels = line
    try:
        sample = json.loads(line.decode("utf-8"))
        for key in ("label", "pos_scores", "neg_scores"):
            sample.pop(key, None)
        for each in sample.get("hits") or [sample] * ("content" in sample):
            each["label"] = 0
        with_labels = json.dumps(sample).encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        pass  # parse_line says why
    shape, rows = parse_line(with_labels, min_label, max_label)
    return shape.removesuffix(", label"), rows


def read_pairs(path, digest=None):
    """Yield the (query, content) pairs of a file, as read_rows() does."""
    return (row[:2] for row in read_rows(path, -math.inf, math.inf, digest, parse_unlabelled))


def load_teacher(name, max_len):
    """The teacher, cutting pairs at `max_len` tokens, on the accelerator if there is one; UserError if it is none."""
    model = BertRerankerModel.from_pretrained(name).eval()
    if model.new_weights:
        raise UserError(f"{name} is no reranker: it lacks {', '.join(model.new_weights)}")
    if not 8 <= max_len <= model.max_len:
        raise UserError(f"max_len {max_len}: it should be 8 or more, and {name} takes {model.max_len}")
    model.tokenizer.model_max_length = max_len
    return model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def score(options):
    """Write options.output from the files options.inputs."""
    output = Path(options.output)
    sidecar = output.with_name(f"{output.name}.unfinished")
    if output.exists():
        raise UserError(f"{output} exists already: remove it, or take another --output")
    seed_everything(0)
    model, digest = load_teacher(options.teacher, options.max_len), hashlib.sha256()
    total = sum(1 for path in options.inputs for _ in read_pairs(path, digest))
    if not total:
        raise UserError(f"{', '.join(options.inputs)}: no pairs. {ADVICE}")
    digest.update(model.plain_tokenizer.to_str().encode() + model.model.config.to_json_string().encode())
    digest.update(repr((options.max_len, options.batch_size)).encode())
    for weight in model.state_dict().values():
        digest.update(weight.cpu().numpy())
    key = digest.hexdigest().encode()
    found = sidecar.read_bytes() if sidecar.exists() else key + b"\n"
    found = found[: found.rfind(b"\n") + 1]  # a line may have been cut off
    first, *lines = found.splitlines()
    if first != key:
        raise UserError(f"{sidecar} is of a call with other data, teacher or settings: remove it, or take another "
                        "--output")
    scores, start = [score for line in lines for score in json.loads(line)], time.perf_counter()
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    sidecar.write_bytes(found)
    done, pairs = len(scores), (pair for path in options.inputs for pair in read_pairs(path))
    with open(sidecar, "ab") as file, tqdm(desc="Scoring", total=total, initial=done, unit=" pairs") as bar:
        rest = islice(pairs, done, None)
        while block := list(islice(rest, BLOCK)):
            new = [round(each, 6) for each in model.predict(block, options.batch_size, False).tolist()]
            file.write(json.dumps(new).encode() + b"\n")
            file.flush()
            scores += new
            bar.update(len(block))
    seconds, pairs = time.perf_counter() - start, (pair for path in options.inputs for pair in read_pairs(path))
    with whole_file(output) as raw, (gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if output.suffix == ".gz" else
                                     nullcontext(raw)) as file:  # fmt: skip
        for (query, content), label in zip(pairs, scores, strict=True):
            row = {"query": query, "content": content, "label": label}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    sidecar.unlink()
    if total > done:
        say(f"{total - done} pairs in {seconds:.1f} s, {(total - done) / seconds:.1f} a second")
    counts = np.histogram(scores, np.linspace(0, 1, 11))[0]
    say("probabilities: " + ", ".join(f"{place / 10:.1f}–{(place + 1) / 10:.1f} {count / total:.1%}"
                                      for place, count in enumerate(counts)))  # fmt: skip
    say(f"Next: python train_bert_rerank.py --train_dataset {output}")


def main():
    """Parse the command line and score; a user's mistake is one message and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="JSONL, plain or gzip; labels may be missing")
    parser.add_argument("--teacher", required=True, help="the reranker that scores: hub name or local folder")
    parser.add_argument("--output", required=True, help="JSONL file to write; compressed if its name ends in .gz")
    parser.add_argument("--max_len", type=int, default=512, help="tokens of a pair for the teacher (default 512)")
    parser.add_argument("--batch_size", type=int, default=32, help="times max_len tokens at once (default 32)")
    options = parser.parse_args()
    try:
        score(options)
    except (UserError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")


if __name__ == "__main__":
    main()
