"""Let the probabilities of a fine-tuned reranker mean what they say, without changing how it ranks.

    python tools/calibrate.py my_reranker/final_model --data eval.jsonl --output calibrated_model
    python train_bert_rerank.py --epochs 0 --model_name_or_path calibrated_model \\
        --eval_dataset unseen.jsonl

After fine-tuning, of the rows with a probability of 0.8 often far fewer than 80 % are relevant. A
slope and an offset of the logit mend that (Platt 1999, Probabilistic Outputs for Support Vector
Machines; his smoothed targets keep them finite where all labels are told apart). They are fitted on
all rows and folded into the model's last linear layer, so that any software that loads the new
folder gives the mended probabilities. The slope is above 0, so that no ranking changes.

`--data` has any shape that train_bert_rerank.py evaluates on, plain or gzip, with labels from
--min_label to --max_label. Take evaluation data: of the rows that it was trained on a model is too
sure, and a fit to them would keep it so.

Printed is what the probabilities are worth before and after. "After" is cross-fitted: each of five
folds of the queries is measured with the slope and the offset of the other four. A probability then
is that of being labelled relevant in lists like these (of graded labels: the expected label, on a
scale from 0 to 1). In lists with another share of relevant rows it does not hold.

OUTPUT has what FOLDER has, except weights in other formats, and subfolders; its model card tells
what was done. It is there whole or not at all.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert_data import scale_of  # noqa: E402

from train_bert_rerank import (  # noqa: E402
    ENOUGH,
    HIGH,
    BertRerankerModel,
    NoRoomError,
    UserError,
    brier_score,
    calibration_of,
    candidate_lists,
    fingerprints,
    flush_to_disk,
    load_file,
    parse_candidates,
    printable,
    probabilities_of,
    probe_logits,
    probes_of,
    read_rows,
    require_whole_lists,
    rounding_of,
    say,
    seed_everything,
    warn_of_spellings,
)

SEED = 42  # of the folds, and of the intervals
FOLDS = 5


# ---- Rows ------------------------------------------------------------------------------------
@dataclass
class LabelledRows:
    """N rows of a file that is evaluated on."""
    path: str
    pairs: list  # N (query, document)
    lines: np.ndarray  # [N] where they stand in the file
    labels: np.ndarray  # [N] from 0 to 1
    lists: list  # the row numbers of each query, however it is written

    def is_graded(self):
        """Whether a label is neither of the ends of the scale."""
        return bool(((self.labels > 0) & (self.labels < 1)).any())


def read_labelled(options):
    """The LabelledRows of options.data; UserError, by line, for what no run would evaluate on."""
    path, low, high = options.data, options.min_label, options.max_label
    scale = {"min_label": low, "max_label": high}
    rows, _ = load_file(path, 0, scale, parse_candidates)
    warn_of_spellings(rows, [path])
    require_whole_lists(rows, [path], (low + high) / 2)

    pairs = [(query, content) for query, content, *_ in read_rows(path, low, high)]
    if [fingerprints(*pair)[1] for pair in pairs] != rows["pair"].tolist():
        raise UserError(f"{path} has changed while it was read: start again when it is whole")
    labels = ((rows["label"] - low) / (high - low)).astype(np.float32)  # as a run has them
    lists = candidate_lists(rows["query"].tolist(), labels)["all"]
    return LabelledRows(path, pairs, rows["line"], labels.astype(np.float64), lists)


def require_enough(rows):
    """UserError where too few queries have relevant and irrelevant rows."""
    is_relevant = rows.labels >= 0.5
    telling = 0
    for numbers in rows.lists:
        if 0 < is_relevant[numbers].sum() < len(numbers):
            telling += 1
    if telling < ENOUGH["queries"]:
        raise UserError(
            f"{rows.path}: of {len(rows.lists)} queries {telling} have both a relevant row (a "
            "label in the upper half of the scale from --min_label to --max_label) and an "
            f"irrelevant one. {ENOUGH['queries']} or more are needed: add queries with candidates "
            "of both kinds")


# ---- The model -------------------------------------------------------------------------------
def require_saved_model(folder):
    """UserError where `folder` is none, or holds no model."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder: name that of a saved model, as final_model is")
    if Path(folder, "config.json").is_file():
        return
    inner = Path(folder, "final_model")
    if (inner / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: did you mean {inner}?")
    raise UserError(
        f"{folder} has no config.json: name the folder of a saved model, as final_model is")


def load_reranker(folder):
    """The model of a folder, on the accelerator if there is one; UserError where it is no trained
    reranker."""
    model = BertRerankerModel.from_pretrained(folder).eval()
    if model.new_weights:
        raise UserError(f"{folder} is no reranker: it lacks {', '.join(model.new_weights)}. "
                        "Fine-tune it first, and calibrate its final_model")
    if torch.accelerator.is_available():
        return model.to(torch.accelerator.current_accelerator())
    return model.to("cpu")


def head_of(model):
    """(name, module) of the linear layer whose output [P, 1] the logits of P pairs are. UserError,
    by name, where the last one is another layer, or has no bias."""
    names = {}
    outputs = {}  # of the linear layers, in the order in which they are computed

    def keep(module, _, output):
        outputs[module] = output

    hooks = []
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            names[module] = name
            hooks.append(module.register_forward_hook(keep))
    pairs, encoded = probes_of(model)
    logits = probe_logits(model, encoded, len(pairs))
    for hook in hooks:
        hook.remove()

    architecture = type(model.model).__name__
    if not logits.isfinite().all():
        raise UserError(f"this {architecture} gives logits that are no finite numbers: its weights "
                        "are damaged")
    for module, output in outputs.items():
        is_head = torch.equal(output, logits[:, None])
        if is_head and module.bias is not None:
            return names[module], module
    there_is = "it has none"
    if outputs:
        last = list(outputs)[-1]
        there_is = f"its last linear layer is {names[last]}, {last}"
    raise UserError(
        f"{architecture} cannot be calibrated here: slope and offset are folded into a linear "
        f"layer with a bias whose one output the logit is, and {there_is}")


def require_text_left(model, rows):
    """UserError, by line, where cutting leaves nothing but blanks of a document."""
    if model.long_documents == "best_passage":
        return
    encoded = model.encode(rows.pairs, model.max_len)
    for line, pair, encoded_pair in zip(rows.lines, rows.pairs, encoded, strict=True):
        if model.is_cut_to_blanks(*pair, encoded_pair):
            raise UserError(f"{rows.path}: line {line}: content begins with so many blanks that "
                            f"{model.max_len} tokens hold nothing else of it: take them out")


def logits_of(model, rows, batch_size):
    """Logits [N] of rows in float64; UserError where a row cannot be scored, or has no finite
    logit."""
    try:
        logits, _ = model.best_logits(rows.pairs, batch_size, True)
    except NoRoomError as error:
        raise UserError(f"{place_without_room(model, rows)}: {error}") from error
    logits = logits.cpu().double().numpy()
    ill = np.flatnonzero(~np.isfinite(logits))
    if len(ill):
        raise UserError(f"{rows.path}: line {rows.lines[ill[0]]} has a logit that is no finite "
                        f"number, and {len(ill) - 1} other rows have: are the weights damaged?")
    return logits


def place_without_room(model, rows):
    """File and line of the first row whose query leaves a passage no room."""
    number = 0
    try:
        for _ in model.encode_passages(rows.pairs, model.max_len):
            number += 1
    except NoRoomError:
        pass
    return f"{rows.path}: line {rows.lines[number]}"


# ---- Slope and offset ------------------------------------------------------------------------
class Line(NamedTuple):
    """What makes calibrated logits of logits."""
    slope: float
    offset: float

    def of(self, logits):
        """The calibrated logits [N] of logits [N]."""
        return self.slope * logits + self.offset


def fit(logits, labels):
    """The Line by which the probabilities of logits [N] fit labels [N] in [0, 1] best. UserError
    where its slope is not above 0.

    The cross-entropy is minimal, with Platt's targets: of the N+ relevant rows (N+ + 1) / (N+ + 2),
    of the N- irrelevant ones 1 / (N- + 2). A label between is as much of the one and of the
    other."""
    if np.ptp(logits) <= rounding_of(logits):
        raise UserError("the model gives all rows the same logit: there is nothing to calibrate")
    relevant = labels.sum()
    irrelevant = len(labels) - relevant
    of_relevant = (relevant + 1) / (relevant + 2)
    of_irrelevant = 1 / (irrelevant + 2)
    targets = torch.from_numpy(labels * of_relevant + (1 - labels) * of_irrelevant)

    # Standardised, whatever the scale of the logits is: then slope and offset are of one size.
    mean, deviation = logits.mean(), logits.std()
    standardised = torch.from_numpy((logits - mean) / deviation)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        calibrated = weights[0] * standardised + weights[1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(calibrated, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    slope = weights[0].item() / deviation
    if not slope > 0:
        raise UserError(
            f"the slope that fits {len(labels)} of the rows is {slope:.4g}, with which the ranking "
            "would turn over: rows with higher logits are not relevant more often. Are labels "
            "swapped, or are these data of another kind than the model was made for?")
    return Line(slope, weights[1].item() - slope * mean)


def cross_fitted(logits, labels, lists):
    """The calibrated logits [N]: of each fold of the queries, whose rows `lists` has, by the Line
    of the other folds."""
    order = np.random.default_rng(SEED).permutation(len(lists))
    calibrated = np.empty(len(logits))
    for queries in np.array_split(order, FOLDS):
        measured = np.concatenate([lists[query] for query in queries])
        is_fitted = np.ones(len(logits), dtype=bool)
        is_fitted[measured] = False
        line = fit(logits[is_fitted], labels[is_fitted])
        calibrated[measured] = line.of(logits[measured])
    return calibrated


# ---- Folding ---------------------------------------------------------------------------------
def fold(line, head):
    """Let a linear layer give the calibrated logits; computed in float64."""
    with torch.no_grad():
        head.weight.copy_(head.weight.double() * line.slope)
        head.bias.copy_(line.of(head.bias.double()))


def require_folded(before, after, line, head_name):
    """UserError unless the logits [N] `after` folding are those that `line` makes of those
    `before`, but for rounding."""
    expected = line.of(before)
    # Rounding is as large as the terms are, which may be larger than their sum: logits around 50
    # have an offset of about -50 times the slope.
    tolerance = 1e-5 * (1 + np.abs(line.slope * before))
    off = np.flatnonzero(np.abs(after - expected) > tolerance)
    if len(off):
        raise UserError(
            f"slope {line.slope:.6g} and offset {line.offset:.6g} cannot be folded into "
            f"{head_name}: a logit is {after[off[0]]:.6f} then and should be "
            f"{expected[off[0]]:.6f}. Does another layer of the model use its weights?")


def require_same_ranking(before, after, rows):
    """UserError, by lines, where two rows of a query are in another order by logits [N] `after`
    than by those `before`."""
    turned = turned_over(before, after, rows.lists)
    if turned is not None:
        first, second = rows.lines[turned]
        raise UserError(
            f"calibrated, the model would rank lines {first} and {second} of {rows.path} in "
            "another order, by rounding: its logits hardly tell relevant from irrelevant rows. Is "
            "this the right --data?")


def turned_over(before, after, lists):
    """The numbers [2] of two rows of a query of which one is higher beyond rounding by logits [N]
    `before`, and not by those `after`; None where there are none."""
    for numbers in lists:
        rising = numbers[np.argsort(before[numbers])]
        is_apart = np.diff(before[rising]) > rounding_of(before)
        turned = np.flatnonzero(is_apart & (np.diff(after[rising]) <= 0))
        if len(turned):
            return rising[turned[0] : turned[0] + 2]
    return None


# ---- What it is worth ------------------------------------------------------------------------
def figures_of(before, after, rows):
    """What the probabilities of logits [N] `before` and `after` are worth: [(what, the one, the
    other), …] as texts."""
    measured = []
    for logits in (before, after):
        measured.append(calibration_of(logits, rows.labels, rows.lists, SEED))
    names = ("Brier score", "calibration error, 95 % interval", f"rows with {HIGH} or more")
    columns = [texts_of(calibration, rows.is_graded()) for calibration in measured]
    return list(zip(names, *columns, strict=True))


def texts_of(calibration, is_graded):
    """The figures of a calibration, as calibration_of() measures it."""
    low, high = calibration["ci95"]
    of_high = calibration["high"]
    share = "none"
    if of_high["rows"]:
        share = f"{of_high['rows']}, {of_high['label']:.0%} relevant"
        if is_graded:
            share = f"{of_high['rows']}, mean label {of_high['label']:.2f}"
    error = f"{calibration['error']:.3f} [{low:.3f}, {high:.3f}]"
    return f"{calibration['brier']:.3f}", error, share


def meaning_of(rows):
    """What a calibrated probability is, as a sentence."""
    what = "the probability of being labelled relevant"
    share = f"{rows.labels.mean():.0%} of the rows relevant"
    if rows.is_graded():
        what = "the expected label, on a scale from 0 to 1,"
        share = f"a mean label of {rows.labels.mean():.2f}"
    per_query = len(rows.pairs) / len(rows.lists)
    return (f"The score is {what} in lists like these ({per_query:.1f} rows of a query on "
            f"average, {share}), not in other lists.")


# ---- Output ----------------------------------------------------------------------------------
CARD = """

## Calibrated probabilities

The sigmoid of the logit is calibrated with {rows} rows of {queries} queries of {data}:
slope {slope:.6g} and offset {offset:.6g} (Platt 1999) are folded into the last linear layer,
`{head}`. The ranking is that of the model before, of which all else in this card speaks.
{meaning}

| | before | after, cross-fitted by query |
| --- | --- | --- |
{table}
"""
NEW_CARD = """# {name}

A cross-encoder for reranking, calibrated by tools/calibrate.py of train_bert_rerank.
"""
# Of what a model's folder may hold, what other libraries read beside the weights.
COPIED = (".json", ".jinja", ".md", ".model", ".txt", "")


def card_of(line, head_name, figures, rows):
    """The section of the model card; it names no path."""
    table = "\n".join(f"| {what} | {before} | {after} |" for what, before, after in figures)
    return CARD.format(
        rows=len(rows.pairs), queries=len(rows.lists), data=printable(Path(rows.path).name),
        slope=line.slope, offset=line.offset, head=head_name, meaning=meaning_of(rows), table=table)


def check_output(name, folder):
    """UserError where no new folder `name` can be made, or it would lie in the model's `folder`."""
    output = Path(name)
    if os.path.lexists(output):
        raise UserError(f"{output} exists already: take another --output")
    if Path(folder).resolve() in output.resolve().parents:
        raise UserError(f"--output {output} lies inside of {folder}: name a folder outside of it")
    try:
        with unfinished_folder(output):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {output} cannot be made: {output.parent} should be a folder "
                        f"that can be written to ({reason})") from error


@contextmanager
def unfinished_folder(output):
    """An empty folder on the disk of `output`, which is removed unless it was moved."""
    # Inside of a temporary one, since that is closed to other users.
    with tempfile.TemporaryDirectory(prefix=".calibrate-", dir=output.parent) as holder:
        folder = Path(holder, output.name)
        folder.mkdir()
        yield folder


def copy_other_files(source, folder):
    """Copy what `source` has beside what is in `folder`. Say what is not copied: weights in other
    formats, which are not calibrated, and subfolders."""
    left = []
    for path in sorted(Path(source).iterdir()):
        is_written_anew = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if is_written_anew or (folder / path.name).exists():
            continue
        if path.is_file() and path.suffix in COPIED:
            shutil.copyfile(path, folder / path.name)
        else:
            left.append(path.name)
    if left:
        say(f"Not copied from {source}, since the weights as they were may be in them: "
            f"{', '.join(left)}")


def write(output, model, source, card):
    """Write the folder `output`, whole or not at all, with a section in its model card."""
    with unfinished_folder(output) as folder:
        model.save_pretrained(folder)
        copy_other_files(source, folder)
        readme = folder / "README.md"
        if not readme.exists():
            readme.write_text(NEW_CARD.format(name=printable(output.name)), "utf-8")
        with open(readme, "ab") as file:
            file.write(card.encode())
        flush_to_disk(*folder.iterdir(), folder)
        os.rename(folder, output)
        flush_to_disk(output.parent)


def say_outcome(line, head_name, figures, rows, is_better):
    """Say what was fitted, what it is worth and what it means."""
    say(f"{'':34}{'before':24}after, cross-fitted by query")
    for what, before, after in figures:
        say(f"{what:34}{before:24}{after}")
    say(f"Fitted on all {len(rows.pairs)} rows of {len(rows.lists)} queries: slope "
        f"{line.slope:.6g}, offset {line.offset:.6g}; folded into {head_name}.")
    say(meaning_of(rows))
    if not is_better:
        say("!!! NOT BETTER !!! On queries that were not fitted the Brier score is no lower after "
            "than before: keep the model as it was.")


def say_next(model, options):
    """Say the command that evaluates the new folder."""
    command = ["python", "train_bert_rerank.py", "--epochs", "0", "--model_name_or_path",
               options.output, "--max_len", str(model.max_len), "--eval_dataset", "unseen.jsonl",
               "--output_dir", "evaluation"]
    if (options.min_label, options.max_label) != (0, 1):
        command += [f"--min_label={options.min_label}", f"--max_label={options.max_label}"]
    say(f"Next, on queries that were not used here: {shlex.join(command)}")


# ---- A run -----------------------------------------------------------------------------------
def calibrate(options):
    """Write options.output as the command line says."""
    require_saved_model(options.folder)
    check_output(options.output, options.folder)
    seed_everything(SEED)
    model = load_reranker(options.folder)
    head_name, head = head_of(model)
    rows = read_labelled(options)
    require_enough(rows)
    require_text_left(model, rows)

    before = logits_of(model, rows, options.batch_size)
    line = fit(before, rows.labels)
    calibrated = cross_fitted(before, rows.labels, rows.lists)
    figures = figures_of(before, calibrated, rows)
    fold(line, head)
    after = logits_of(model, rows, options.batch_size)
    require_folded(before, after, line, head_name)
    require_same_ranking(before, after, rows)

    # Elsewhere the sigmoid is applied where the config says so, as train_bert_rerank.py has it.
    activation = {"activation_fn": "torch.nn.Sigmoid"}
    model.model.config.update({"problem_type": None, "sentence_transformers": activation})
    card = card_of(line, head_name, figures, rows)
    write(Path(options.output), model, options.folder, card)
    briers = []
    for logits in (before, calibrated):
        briers.append(brier_score(probabilities_of(logits), rows.labels))
    say_outcome(line, head_name, figures, rows, is_better=briers[1] < briers[0])
    say_next(model, options)


# ---- Command line ----------------------------------------------------------------------------
def parse_command_line():
    """The options, as argparse gives them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="of the model: final_model of a run")
    add("--data", required=True, help="JSONL rows with labels, plain or gzip")
    add("--output", required=True, help="folder to write; it should not be there yet")
    add("--min_label", type=float, default=0.0, help="of irrelevant documents (default 0)")
    add("--max_label", type=float, default=1.0, help="of fully relevant documents (default 1)")
    add("--batch_size", type=int, default=32,
        help="pairs scored at once, of the longest (default 32)")

    return parser.parse_args()


def check_options(options):
    """UserError where options cannot be meant."""
    for name in ("folder", "data", "output"):
        if not getattr(options, name).strip():
            raise UserError(f"{name} is empty: it should be a path")
    if options.batch_size < 1:
        raise UserError(f"batch_size {options.batch_size}: it should be 1 or more")


def main():
    """Parse the command line and calibrate; a user's mistake is one message and exit status 1."""
    options = parse_command_line()
    try:
        options.min_label, options.max_label = scale_of(options)
        check_options(options)
        calibrate(options)
    except (UserError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is written.")


if __name__ == "__main__":
    main()
