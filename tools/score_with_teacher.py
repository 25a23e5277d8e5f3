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
import shlex
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert_data import check_output  # noqa: E402

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


# ---- Pairs -----------------------------------------------------------------------------------
def parse_unlabelled(line, min_label, max_label):
    """As parse_line(), of a line whose labels may be missing; those that are there are replaced."""
    try:
        line = with_zero_labels(line)
    except (ValueError, RecursionError, AttributeError, TypeError):
        pass  # a bad line: parse_line() says why
    shape, rows = parse_line(line, min_label, max_label)
    return shape.removesuffix(", label"), rows


def with_zero_labels(line):
    """A line of JSON with label 0 wherever parse_line() wants one."""
    sample = json.loads(line.decode("utf-8"))
    for key in ("label", "pos_scores", "neg_scores"):
        sample.pop(key, None)
    if sample.get("hits"):
        for hit in sample["hits"]:
            hit["label"] = 0
    elif "content" in sample:
        sample["label"] = 0
    return json.dumps(sample).encode()


def read_pairs(paths, digest=None):
    """Yield the (query, content) pairs of files; all their bytes go into `digest`."""
    for path in paths:
        rows = read_rows(path, -math.inf, math.inf, digest, parse_unlabelled)
        for query, content, _, _ in rows:
            yield query, content


# ---- The teacher -----------------------------------------------------------------------------
def load_teacher(name, max_len):
    """The teacher, cutting pairs at `max_len` tokens, on the accelerator if there is one.

    UserError if it is none.
    """
    model = BertRerankerModel.from_pretrained(name).eval()
    if model.new_weights:
        raise UserError(f"{name} is no reranker: it lacks {', '.join(model.new_weights)}")
    if not 8 <= max_len <= model.max_len:
        raise UserError(f"max_len {max_len}: it should be 8 or more, and {name} takes "
                        f"{model.max_len}")
    model.tokenizer.model_max_length = max_len
    if torch.accelerator.is_available():
        return model.to(torch.accelerator.current_accelerator())
    return model.to("cpu")


# ---- Scoring, which goes on where it was -----------------------------------------------------
# OUTPUT.unfinished holds a key of all that scores depend on, then a line of JSON for each block
# of scores.
BLOCK = 2048  # pairs


def key_of(digest, model, options):
    """The first line of a sidecar: `digest`, of the data, with the teacher and its settings."""
    digest.update(model.plain_tokenizer.to_str().encode())
    digest.update(model.model.config.to_json_string().encode())
    digest.update(repr((options.max_len, options.batch_size)).encode())
    for weight in model.state_dict().values():
        digest.update(weight.cpu().numpy())
    return digest.hexdigest().encode()


def resume(sidecar, key, total):
    """Let the sidecar end behind the last whole block of an earlier call; returns its scores.

    UserError where that call was of other data, another teacher or other settings, or what it left
    are not the scores of `total` pairs or fewer.
    """
    first_line = key + b"\n"
    content = b""
    if sidecar.exists():
        content = sidecar.read_bytes()
    if first_line.startswith(content):  # that call ended before it had written more
        content = first_line
    if not content.startswith(first_line):
        raise UserError(f"{sidecar} is of a call with other data, teacher or settings: remove it, "
                        "or take another --output")

    content = content[: content.rfind(b"\n") + 1]  # a line may have been cut off
    scores = []
    try:
        for line in content.splitlines()[1:]:
            scores += scores_in(line)
        if len(scores) > total:
            raise ValueError("more scores than pairs")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{sidecar} is damaged: remove it, and the pairs are scored again "
                        f"({error})") from error
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    sidecar.write_bytes(content)
    return scores


def scores_in(line):
    """The scores in a line of a sidecar; ValueError where it holds anything else."""
    scores = json.loads(line)
    if not isinstance(scores, list):
        raise ValueError("a line is no list")
    for score in scores:
        if not isinstance(score, float):
            raise ValueError(f"{str(score)[:40]} is no score")
    return scores


def score_rest(model, done, total, options):
    """Yield the scores of one block of pairs after the other, without the first `done` pairs."""
    pairs = islice(read_pairs(options.inputs), done, None)
    with tqdm(desc="Scoring", total=total, initial=done, unit=" pairs") as bar:
        while block := list(islice(pairs, BLOCK)):
            probabilities = model.predict(block, options.batch_size, False)
            yield [round(probability, 6) for probability in probabilities.tolist()]
            bar.update(len(block))


# ---- Output ----------------------------------------------------------------------------------
def write(output, pairs, scores):
    """Write pairs with their scores as labels to `output`, gzip where its name ends so."""
    with whole_file(output) as raw:
        is_gzip = output.suffix == ".gz"
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_gzip else nullcontext(raw) as file:
            for (query, content), label in zip(pairs, scores, strict=True):
                row = {"query": query, "content": content, "label": label}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def say_probabilities(scores):
    """Say how the scores are spread over tenths of the scale."""
    counts, _ = np.histogram(scores, np.linspace(0, 1, 11))
    shares = []
    for tenth, count in enumerate(counts):
        low, high = tenth / 10, (tenth + 1) / 10
        shares.append(f"{low:.1f}–{high:.1f} {count / len(scores):.1%}")
    say("probabilities: " + ", ".join(shares))


# ---- A run -----------------------------------------------------------------------------------
def score(options):
    """Write options.output from the files options.inputs."""
    output = Path(options.output)
    check_output(options.output)
    if options.batch_size < 1:
        raise UserError(f"batch_size {options.batch_size}: it should be 1 or more")
    sidecar = output.with_name(f"{output.name}.unfinished")
    if output.exists():
        raise UserError(f"{output} exists already: remove it, or take another --output")

    seed_everything(0)
    model = load_teacher(options.teacher, options.max_len)
    digest = hashlib.sha256()
    total = sum(1 for _ in read_pairs(options.inputs, digest))
    if not total:
        raise UserError(f"{', '.join(options.inputs)}: no pairs. {ADVICE}")
    scores = resume(sidecar, key_of(digest, model, options), total)

    start = time.perf_counter()
    done = len(scores)
    with open(sidecar, "ab") as file:
        for block in score_rest(model, done, total, options):
            file.write(json.dumps(block).encode() + b"\n")
            file.flush()
            scores += block
    seconds = time.perf_counter() - start

    write(output, read_pairs(options.inputs), scores)
    sidecar.unlink()
    rest = total - done
    if rest > 0:
        say(f"{rest} pairs in {seconds:.1f} s, {rest / seconds:.1f} a second")
    say_probabilities(scores)
    say(f"Next: python train_bert_rerank.py --train_dataset {shlex.quote(str(output))}")


def main():
    """Parse the command line and score; a user's mistake is one message and exit status 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="JSONL, plain or gzip; labels may be missing")
    parser.add_argument("--teacher", required=True,
                        help="the reranker that scores: hub name or local folder")
    parser.add_argument("--output", required=True,
                        help="JSONL file to write; compressed if its name ends in .gz")
    parser.add_argument("--max_len", type=int, default=512,
                        help="tokens of a pair for the teacher (default 512)")
    parser.add_argument("--batch_size", type=int, default=32,
                        help="times max_len tokens at once (default 32)")
    options = parser.parse_args()
    try:
        score(options)
    except (UserError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from where it was.")


if __name__ == "__main__":
    main()
