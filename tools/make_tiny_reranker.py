"""Build tiny_reranker/, a stand-in of a few MB for BAAI/bge-reranker-large, from nothing.

    python tools/make_tiny_reranker.py [--output_dir tiny_reranker] [--seed 42]

It has the classes, the special tokens and the pair template of bge-reranker-large, and it knows one thing: how much of
the query the document contains. Nothing is downloaded and there is no corpus: the training text is made of random
'words'. Two runs on one machine write the same bits. The figures of the model card are printed at the end.
"""

import argparse
import json
import math
import random
import string
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch.nn import functional as F
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

HIDDEN = 128
LAYERS = 3
HEADS = 4
HEAD_DIMS = 32
POSITIONS = 514
WORD_DIMS = 96  # of a hidden state those that say which token it is
POSITION_DIMS = 32  # and those that say where


# ----- Tokenizer -----
def gb2312_hanzi() -> str:
    """Return the 6,763 Chinese characters of GB 2312; five cells of their grid are empty."""
    grid = bytearray()
    for row in range(0xB0, 0xF8):
        for cell in range(0xA1, 0xFF):
            grid += bytes([row, cell])
    return grid.decode("gb2312", "ignore")


SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 3 are those of XLM-R
TOKEN_OF_ROLE = {
    "bos": "<s>",
    "cls": "<s>",
    "eos": "</s>",
    "sep": "</s>",
    "pad": "<pad>",
    "unk": "<unk>",
    "mask": "<mask>",
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ASCII = [chr(code) for code in range(32, 127) if not chr(code).isupper()]  # all is lowercased
PUNCTUATION = "。、《》〈〉「」『』【】〔〕“”‘’—–·¥°×±÷≤≥→•※"  # NFKC makes ASCII of the rest (，！？：；（）)
HANZI = gb2312_hanzi()
FIRST_ASCII = len(SPECIAL_TOKENS) + len(BYTES)  # its id


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: one token a character, bytes for others."""
    vocabulary = SPECIAL_TOKENS + BYTES + ASCII + list(PUNCTUATION) + list(HANZI)
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B:0 </s>:0",  # token type 0 throughout: XLM-R has one
        special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))

    config = {
        # Not XLMRobertaTokenizer: transformers 5 rebuilds that class as Unigram, and this
        # vocabulary would be lost.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": POSITIONS - 2,  # XLM-R counts positions from 2
        "clean_up_tokenization_spaces": False,
    }
    for role, token in TOKEN_OF_ROLE.items():
        config[f"{role}_token"] = token
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


# ----- Model -----
CLASS_SHARE = 0.3  # of a letter's or digit's embedding that all of them have in common


@torch.no_grad()
def make_model(vocab_size: int) -> XLMRobertaForSequenceClassification:
    """Return a model whose attention compares tokens from the start.

    From the usual initialisation it would not find out in thousands of steps that equal tokens
    matter. Here two heads of the first layer look at the previous and the next token, and the
    others of the first two layers, whose queries and keys are the same projection of the word,
    look at equal tokens elsewhere.
    """
    config = XLMRobertaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=POSITIONS,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        num_labels=1,
    )
    model = XLMRobertaForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)

    codes, to_previous = sinusoids()
    set_embeddings(model.roberta.embeddings, codes)
    *comparing, collecting = model.roberta.encoder.layer
    for index, layer in enumerate(comparing):
        set_values(layer.attention)
        for head in range(HEADS):
            rows = slice(head * HEAD_DIMS, (head + 1) * HEAD_DIMS)
            if index == 0 and head == 0:
                query, key = neighbour_head(to_previous)
            elif index == 0 and head == 1:
                query, key = neighbour_head(to_previous.T)  # its inverse, to the next
            else:
                query, key = equality_head()
            layer.attention.self.query.weight[rows] = query
            layer.attention.self.key.weight[rows] = key

    # The last layer collects for <s>: nearly even attention to begin with.
    set_values(collecting.attention)
    collecting.attention.self.query.weight.mul_(0.3)
    collecting.attention.self.key.weight.mul_(0.3)
    return model


def sinusoids() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the position codes [POSITIONS, POSITION_DIMS], and the matrix that steps back.

    The matrix [POSITION_DIMS, POSITION_DIMS] turns the code of p into that of p - 1.
    """
    highest, lowest = math.log10(2.0), math.log10(2 * math.pi / 1024)
    frequencies = torch.logspace(highest, lowest, POSITION_DIMS // 2)
    angles = torch.arange(POSITIONS).unsqueeze(1) * frequencies
    codes = torch.cat([angles.sin(), angles.cos()], dim=1)
    codes = math.sqrt(2) * codes  # unit variance, as the words have

    # sin(a - f) = cos f sin a - sin f cos a, and cos(a - f) = sin f sin a + cos f cos a
    cosine = frequencies.cos().diag()
    sine = frequencies.sin().diag()
    of_sines = torch.cat([cosine, -sine], dim=1)
    of_cosines = torch.cat([sine, cosine], dim=1)
    return codes, torch.cat([of_sines, of_cosines])


def set_embeddings(embeddings: torch.nn.Module, codes: torch.Tensor) -> None:
    """Set words to random vectors of equal norm, in dimensions of their own, positions to codes."""
    words = torch.randn(embeddings.word_embeddings.num_embeddings, WORD_DIMS)
    words -= words.mean(dim=1, keepdim=True)
    common = CLASS_SHARE * torch.randn(WORD_DIMS)  # what letters and digits share
    words[FIRST_ASCII : FIRST_ASCII + len(ASCII)] += common
    # Equal norms, and means of nearly 0: every token matches itself equally well.
    words *= math.sqrt(WORD_DIMS) / words.norm(dim=1, keepdim=True)

    embeddings.word_embeddings.weight.zero_()
    embeddings.position_embeddings.weight.zero_()
    embeddings.token_type_embeddings.weight.zero_()
    embeddings.word_embeddings.weight[:, :WORD_DIMS] = words
    embeddings.position_embeddings.weight[:, WORD_DIMS:] = codes


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    """Return a random orthogonal matrix [rows, columns]."""
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))


def set_values(attention: torch.nn.Module) -> None:
    """Let attention pass on what it finds whole, only turned."""
    attention.self.value.weight.copy_(orthogonal(HIDDEN, HIDDEN))
    attention.output.dense.weight.copy_(orthogonal(HIDDEN, HIDDEN))


def neighbour_head(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query and key weights [HEAD_DIMS, HIDDEN] of a head that looks one position away."""
    query = torch.zeros(HEAD_DIMS, HIDDEN)
    key = torch.zeros(HEAD_DIMS, HIDDEN)
    query[:, WORD_DIMS:] = 2.5 * step
    key[:, WORD_DIMS:] = 2.5 * torch.eye(POSITION_DIMS)
    return query, key


def equality_head() -> tuple[torch.Tensor, torch.Tensor]:
    """Return query and key weights [HEAD_DIMS, HIDDEN] of a head that looks at equal tokens."""
    query = torch.zeros(HEAD_DIMS, HIDDEN)
    key = torch.zeros(HEAD_DIMS, HIDDEN)
    same = 1.4 * orthogonal(HEAD_DIMS, WORD_DIMS)
    query[:, :WORD_DIMS] = same
    key[:, :WORD_DIMS] = same
    apart = 0.7 * orthogonal(HEAD_DIMS, POSITION_DIMS)
    query[:, WORD_DIMS:] = -apart  # opposite signs: rather a copy than itself
    key[:, WORD_DIMS:] = apart
    return query, key


# ----- Data -----
QUERIES = 16  # of a batch
PAIR_WEIGHT = 0.3  # what two neighbouring characters found together count, against single ones


def model_number(rng: random.Random) -> str:
    """Return a letter or two and some digits, such as 'ab120'."""
    letters = rng.choices(string.ascii_lowercase, k=rng.choice((1, 1, 2)))
    return "".join(letters) + str(rng.randint(1, 999))


def random_word(rng: random.Random, characters: str) -> str:
    """Return 1 to 3 Chinese characters.

    One time in five Latin letters, a number or a model number such as 'ab120'.
    """
    kind = rng.random()
    if kind < 0.05:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6)))
    if kind < 0.15:
        return model_number(rng)
    if kind < 0.2:
        return str(rng.randint(1, 9999))
    return "".join(rng.choices(characters, k=rng.choice((1, 2, 2, 2, 3))))


def random_words(rng: random.Random, characters: str, length: int) -> list[str]:
    """Return random words of `length` characters or a little more in all."""
    words = []
    while sum(map(len, words)) < length:
        words.append(random_word(rng, characters))
    return words


def join(rng: random.Random, words: list[str]) -> str:
    """Join words, now and then with a space, punctuation or 的 between them."""
    text = ""
    for word in words:
        text += word + rng.choice(("", "", "", "", "", "", " ", ",", "。", "、", "的", "?"))
    return text


def coverage(query: str, document: str) -> float:
    """Return how much of the query the document has, as a target in [0.05, 0.95].

    Spaces and punctuation are left out. Of "ab c" the document "xb ac" has all characters, but not
    the pair "ab": 0.05 + 0.9 × 0.7.
    """
    singles = [character for character in query if character.isalnum()]
    pairs = [query[place : place + 2] for place in range(len(query) - 1)]
    pairs = [pair for pair in pairs if pair.isalnum()]
    single = share_in(document, singles)
    pair = share_in(document, pairs)
    return 0.05 + 0.9 * ((1 - PAIR_WEIGHT) * single + PAIR_WEIGHT * pair)


def share_in(document: str, parts: list[str] | str) -> float:
    """Return the share of the parts that the document has; 0 of none."""
    return sum(part in document for part in parts) / max(len(parts), 1)


@dataclass
class Query:
    """What a query and the documents for it are made of."""
    characters: str  # that words are made of
    words: list[str]
    number: str  # a model number, "" for none
    place: int  # of the number among the words


@dataclass
class Candidates:
    """A query of some 5 to 30 characters and documents that hold a random share of its words."""
    query: str
    documents: list[str]
    number_shares: list[float]  # of its model number, whatever else they share; NaN: it has none


def make_candidates(rng: random.Random, documents: int, longest: int) -> Candidates:
    """Return a query with documents of up to `longest` characters and a little more."""
    query = make_query(rng)
    texts = [make_document(rng, query, longest) for _ in range(documents)]
    shares = [math.nan] * documents
    if query.number:
        shares = [share_in(text, query.number) for text in texts]

    words = list(query.words)
    if query.number:
        words.insert(query.place, query.number)
    return Candidates(join(rng, words)[:32], texts, shares)


def make_query(rng: random.Random) -> Query:
    """Return the parts of a query."""
    # Of few characters: words meet by accident.
    characters = "".join(rng.sample(HANZI, rng.choice((60, 200, 1000, len(HANZI)))))
    words = random_words(rng, characters, rng.randint(4, 24))
    number = model_number(rng) if rng.random() < 0.6 else ""
    place = rng.choice((0, rng.randint(0, len(words)), len(words)))
    return Query(characters, words, number, place)


def make_document(rng: random.Random, query: Query, longest: int) -> str:
    """Return a document: some of the query's words, a number, and other words."""
    kept = some_words(rng, query)
    if query.number and rng.random() < 0.5:
        kept.append(query.number)
    elif rng.random() < 0.7:
        kept.append(similar_number(rng, query.number))

    length = rng.randint(8, longest) - sum(map(len, kept))
    others = random_words(rng, query.characters, length)
    if rng.random() < 0.5:
        body = kept + others
        rng.shuffle(body)
    else:  # what is kept stands together
        place = rng.randint(0, len(others))
        body = others[:place] + kept + others[place:]
    return join(rng, body)


def some_words(rng: random.Random, query: Query) -> list[str]:
    """Return a random share of a query's words, and parts of others inside random words."""
    share = rng.random()
    kept = []
    for word in query.words:
        if rng.random() < share:
            kept.append(word)
        elif rng.random() < 0.3:
            kept.append(rng.choice(word) + random_word(rng, query.characters))
    return kept


def similar_number(rng: random.Random, number: str) -> str:
    """Return another model number, most often of the same letters."""
    letters = number.rstrip(string.digits) if rng.random() < 0.7 else ""
    if letters:
        return letters + str(rng.randint(1, 999))
    return model_number(rng)


@dataclass
class Batch:
    """B lists of candidates as tensors."""
    inputs: dict  # of the model: [B × documents, tokens]
    targets: torch.Tensor  # coverage [B, documents]
    number_shares: torch.Tensor  # how much of the query's model number it holds [B, documents]


def make_batch(rng: random.Random, tokenizer, documents: int) -> Batch:
    """Return a batch of QUERIES lists of so many documents."""
    longest = rng.choice((20, 40, 40, 60, 60, 100, 200))  # one for the batch: little padding
    lists = [make_candidates(rng, documents, longest) for _ in range(QUERIES)]
    queries, texts = [], []
    for candidates in lists:
        for document in candidates.documents:
            queries.append(candidates.query)
            texts.append(document)

    inputs = tokenizer(queries, texts, padding=True, truncation=True, return_tensors="pt")
    targets = torch.tensor(list(map(coverage, queries, texts))).view(QUERIES, documents)
    number_shares = torch.tensor([candidates.number_shares for candidates in lists])
    return Batch(inputs, targets, number_shares)


# ----- Training and measuring -----
STEPS = 600
DOCUMENTS = 4  # of a query
PEAK_LR = 1e-3
DROPOUT_STEPS = range(151, 351)  # once it has learned overlap, as fine-tuning will drop out as well
NUMBER_WEIGHT = 1.0  # of the loss of the second output


def train(model: XLMRobertaForSequenceClassification, tokenizer, seed: int) -> None:
    """Fit the coverage itself (BCE) and its differences within a list (RankNet), as soft labels.

    Beside it a second output, thrown away afterwards, learns how much of the query's model number
    the document holds. To the score it is worth no more than other characters, but <s> now keeps
    it apart from the rest, as a language model keeps names and numbers apart, and fine-tuning
    finds it there.
    """
    rng = random.Random(seed)
    number_head = torch.nn.Linear(HIDDEN, 1)
    parameters = [*model.parameters(), *number_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.1)
    model.eval()
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]

    for step in range(1, STEPS + 1):
        # Of hidden states only: dropout in attention, eval() throughout, is slow on CPU.
        for module in dropouts:
            module.train(step in DROPOUT_STEPS)

        batch = make_batch(rng, tokenizer, DOCUMENTS)
        hidden = model.roberta(**batch.inputs).last_hidden_state  # [B × documents, T, HIDDEN]
        logits = model.classifier(hidden).view_as(batch.targets)  # [B, documents]
        number_logits = number_head(hidden[:, 0]).view_as(batch.targets)  # [B, documents]

        loss = coverage_loss(logits, batch.targets)
        has_number = ~batch.number_shares.isnan()
        number_loss = F.binary_cross_entropy_with_logits(
            number_logits[has_number], batch.number_shares[has_number])
        loss = loss + NUMBER_WEIGHT * number_loss

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

        if step % 50 == 0:
            errors = (number_logits.sigmoid() - batch.number_shares)[has_number].abs()
            print(f"Step {step}/{STEPS}: loss {loss.item():.3f}, error of the second output "
                  f"{errors.mean():.2f}", flush=True)


def differences(values: torch.Tensor) -> torch.Tensor:
    """Return value i less value j of a list at [i, j]: [B, N] to [B, N, N]."""
    return values.unsqueeze(2) - values.unsqueeze(1)


def coverage_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return BCE plus RankNet of logits and targets [B, documents].

    Both are lowest at the same logits, since RankNet's labels are made of those of the targets;
    labels 0 and 1 would saturate the sigmoid.
    """
    best_logits = torch.logit(targets)
    pointwise = F.binary_cross_entropy_with_logits(logits, targets)
    pairwise = F.binary_cross_entropy_with_logits(
        differences(logits), torch.sigmoid(differences(best_logits)))
    return pointwise + pairwise


MEASURED_LISTS = 400


@torch.no_grad()
def measure(model: XLMRobertaForSequenceClassification, tokenizer, seed: int) -> None:
    """Print accuracy on generated lists of 8 documents that training has not seen."""
    rng = random.Random(f"held out {seed}")
    right = compared = 0
    gains, probabilities = [], []
    for _ in range(MEASURED_LISTS // QUERIES):
        batch = make_batch(rng, tokenizer, 8)
        logits = model(**batch.inputs).logits.view_as(batch.targets)  # [B, 8]
        is_clear = differences(batch.targets) > 0.1
        right += ((logits.unsqueeze(2) > logits.unsqueeze(1)) & is_clear).sum().item()
        compared += is_clear.sum().item()

        best = logits.gather(1, batch.targets.argmax(dim=1, keepdim=True))  # [B, 1]
        rank = (logits >= best).sum(dim=1)
        gains.append(1 / torch.log2(1 + rank))
        probabilities.append(logits.sigmoid().flatten())

    quantiles = torch.tensor([0.05, 0.95])
    low, high = torch.cat(probabilities).quantile(quantiles).tolist()
    chance = sum(1 / math.log2(1 + rank) for rank in range(1, 9)) / 8
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"Parameters: {size:,}, vocabulary: {len(tokenizer):,}")
    print(f"Held-out generated lists: {len(gains) * QUERIES} of 8 documents")
    print(f"Pairwise accuracy, coverage differs by more than 0.1: {right / compared:.4f} of "
          f"{compared:,} pairs")
    print(f"NDCG@10, relevant is what covers most: {torch.cat(gains).mean():.3f}, "
          f"chance {chance:.3f}")
    print(f"Probabilities, 5 % to 95 % quantile: {low:.2f} to {high:.2f}")


def main() -> None:
    """Build the tokenizer and the model, train, save, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("tiny_reranker"))
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    start = time.time()
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_tokenizer(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    model = make_model(len(tokenizer))
    train(model, tokenizer, args.seed)
    model.save_pretrained(args.output_dir)

    size = sum(file.stat().st_size for file in args.output_dir.iterdir()) / 1e6
    minutes = (time.time() - start) / 60
    print(f"Saved {args.output_dir} ({size:.1f} MB) after {minutes:.1f} minutes on one core")
    measure(model, tokenizer, args.seed)


if __name__ == "__main__":
    main()
