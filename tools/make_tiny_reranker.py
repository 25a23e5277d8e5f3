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
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch.nn import functional as F
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 3 are those of XLM-R
GB2312 = bytes(byte for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF) for byte in (row, cell))
HANZI = GB2312.decode("gb2312", "ignore")  # 6,763 characters; five cells of the grid are empty
ASCII = [chr(code) for code in range(32, 127) if not chr(code).isupper()]  # the tokenizer lowercases
PUNCTUATION = "。、《》〈〉「」『』【】〔〕“”‘’—–·¥°×±÷≤≥→•※"  # NFKC turns the rest (，！？：；（）) into ASCII

HIDDEN, LAYERS, HEADS, HEAD_DIMS = 128, 3, 4, 32
WORD_DIMS, POSITION_DIMS, POSITIONS = 96, 32, 514
STEPS, QUERIES, DOCUMENTS, PEAK_LR = 600, 16, 4, 1e-3
DROPOUT_STEPS = range(151, 351)  # once it has learned overlap, as fine-tuning will drop out as well
CLASS_SHARE = 0.3  # of a letter's or digit's embedding that all of them have in common
NUMBER_WEIGHT = 1.0  # of the loss of the second output
PAIR_WEIGHT = 0.3  # what two neighbouring characters found together count, against single ones


# ----- Tokenizer -----
def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: one token a character, bytes for unknown ones."""
    vocabulary = SPECIAL_TOKENS + [f"<0x{byte:02X}>" for byte in range(256)] + ASCII + list(PUNCTUATION) + list(HANZI)
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
        # Not XLMRobertaTokenizer: transformers 5 rebuilds that class as Unigram, and this vocabulary would be lost.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": POSITIONS - 2,  # XLM-R counts positions from 2
        "clean_up_tokenization_spaces": False,
    }
    roles = zip(("bos", "cls", "eos", "sep", "pad", "unk", "mask"), (0, 0, 2, 2, 1, 3, 4), strict=True)
    config |= {f"{role}_token": SPECIAL_TOKENS[index] for role, index in roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ----- Model -----
def orthogonal(rows: int, columns: int) -> torch.Tensor:
    """Return a random orthogonal matrix [rows, columns]."""
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))


def sinusoids() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the position codes [POSITIONS, 32] and the matrix [32, 32] that turns the code of p into that of p - 1."""
    frequencies = torch.logspace(math.log10(2.0), math.log10(2 * math.pi / 1024), POSITION_DIMS // 2)
    angles = torch.arange(POSITIONS).unsqueeze(1) * frequencies
    codes = math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)  # unit variance, as the words have
    cosine, sine = frequencies.cos().diag(), frequencies.sin().diag()
    return codes, torch.cat([torch.cat([cosine, -sine], dim=1), torch.cat([sine, cosine], dim=1)])


@torch.no_grad()
def make_model(vocab_size: int) -> XLMRobertaForSequenceClassification:
    """Return a model whose attention compares tokens from the start.

    From the usual initialisation it would not find out in thousands of steps that equal tokens matter. Here two heads
    of the first layer look at the previous and the next token, and the others of the first two layers, whose queries
    and keys are the same projection of the word, look at equal tokens elsewhere.
    """
    config = XLMRobertaConfig(
        vocab_size=vocab_size, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN, max_position_embeddings=POSITIONS, type_vocab_size=1, layer_norm_eps=1e-5,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    model = XLMRobertaForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)

    codes, previous = sinusoids()
    words = torch.randn(vocab_size, WORD_DIMS)
    words -= words.mean(dim=1, keepdim=True)  # equal means and norms: every token matches itself equally well
    words[5 + 256 : 5 + 256 + len(ASCII)] += CLASS_SHARE * torch.randn(WORD_DIMS)  # what letters and digits share
    words *= math.sqrt(WORD_DIMS) / words.norm(dim=1, keepdim=True)
    embeddings = model.roberta.embeddings
    for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
        table.weight.zero_()
    embeddings.word_embeddings.weight[:, :WORD_DIMS] = words
    embeddings.position_embeddings.weight[:, WORD_DIMS:] = codes

    for index, layer in enumerate(model.roberta.encoder.layer):
        attention = layer.attention.self
        attention.value.weight.copy_(orthogonal(HIDDEN, HIDDEN))
        layer.attention.output.dense.weight.copy_(orthogonal(HIDDEN, HIDDEN))
        if index == LAYERS - 1:  # the last layer collects for <s>: nearly even attention to begin with
            attention.query.weight.mul_(0.3)
            attention.key.weight.mul_(0.3)
            continue
        for head in range(HEADS):
            query, key = torch.zeros(HEAD_DIMS, HIDDEN), torch.zeros(HEAD_DIMS, HIDDEN)
            if index == 0 and head < 2:
                key[:, WORD_DIMS:] = 2.5 * torch.eye(POSITION_DIMS)
                query[:, WORD_DIMS:] = 2.5 * (previous if head == 0 else previous.T)
            else:
                query[:, :WORD_DIMS] = key[:, :WORD_DIMS] = 1.4 * orthogonal(HEAD_DIMS, WORD_DIMS)
                apart = 0.7 * orthogonal(HEAD_DIMS, POSITION_DIMS)  # opposite signs: rather a copy than itself
                query[:, WORD_DIMS:], key[:, WORD_DIMS:] = -apart, apart
            rows = slice(head * HEAD_DIMS, (head + 1) * HEAD_DIMS)
            attention.query.weight[rows], attention.key.weight[rows] = query, key
    return model


# ----- Data -----
def random_word(rng: random.Random, characters: str) -> str:
    """Return 1 to 3 Chinese characters; one time in five Latin letters, a number or a model number such as 'ab120'."""
    kind = rng.random()
    if kind < 0.05:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6)))
    if kind < 0.15:
        return model_number(rng)
    if kind < 0.2:
        return str(rng.randint(1, 9999))
    return "".join(rng.choices(characters, k=rng.choice((1, 2, 2, 2, 3))))


def model_number(rng: random.Random) -> str:
    """Return a letter or two and some digits, such as 'ab120'."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.choice((1, 1, 2)))) + str(rng.randint(1, 999))


def random_words(rng: random.Random, characters: str, length: int) -> list[str]:
    """Return random words of `length` characters or a little more in all."""
    words = []
    while sum(map(len, words)) < length:
        words.append(random_word(rng, characters))
    return words


def join(rng: random.Random, words: list[str]) -> str:
    """Join words, now and then with a space, punctuation or 的 between them."""
    return "".join(word + rng.choice(("", "", "", "", "", "", " ", ",", "。", "、", "的", "?")) for word in words)


def coverage(query: str, document: str) -> float:
    """Return how much of the query the document has, spaces and punctuation left out, as a target in [0.05, 0.95]."""
    singles = [character for character in query if character.isalnum()]
    pairs = [query[i : i + 2] for i in range(len(query) - 1) if query[i : i + 2].isalnum()]
    single = sum(character in document for character in singles) / len(singles)
    pair = sum(two in document for two in pairs) / max(len(pairs), 1)
    return 0.05 + 0.9 * ((1 - PAIR_WEIGHT) * single + PAIR_WEIGHT * pair)


def make_candidates(rng: random.Random, documents: int, longest: int) -> tuple[str, list[str], list[float]]:
    """Return a query of some 5 to 30 characters, documents that hold a random share of its words, and how much of its
    model number each of them holds (NaN where it has none), whatever else they share."""
    characters = "".join(rng.sample(HANZI, rng.choice((60, 200, 1000, len(HANZI)))))  # few: they meet by accident
    words = random_words(rng, characters, rng.randint(4, 24))
    number = model_number(rng) if rng.random() < 0.6 else ""
    place = rng.choice((0, rng.randint(0, len(words)), len(words)))
    candidates, found = [], []
    for _ in range(documents):
        share, kept = rng.random(), []
        for word in words:
            if rng.random() < share:
                kept.append(word)
            elif rng.random() < 0.3:  # a part of the word inside another one
                kept.append(rng.choice(word) + random_word(rng, characters))
        if number and rng.random() < 0.5:
            kept.append(number)
        elif rng.random() < 0.7:  # another number, most often of the same letters
            letters = number.rstrip(string.digits) if rng.random() < 0.7 else ""
            kept.append(letters + str(rng.randint(1, 999)) if letters else model_number(rng))
        kept_length = sum(map(len, kept))
        others = random_words(rng, characters, rng.randint(8, longest) - kept_length)
        if rng.random() < 0.5:
            body = kept + others
            rng.shuffle(body)
        else:
            at = rng.randint(0, len(others))
            body = others[:at] + kept + others[at:]
        candidates.append(join(rng, body))
        found.append(sum(each in candidates[-1] for each in number) / len(number) if number else math.nan)
    return join(rng, words[:place] + [number] * bool(number) + words[place:])[:32], candidates, found


def make_batch(rng: random.Random, tokenizer, queries: int, documents: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Return the model's inputs for queries × documents pairs, their targets and how much of the model number each
    document holds, both [queries, documents]."""
    longest = rng.choice((20, 40, 40, 60, 60, 100, 200))  # one for the batch: little padding
    lists = [make_candidates(rng, documents, longest) for _ in range(queries)]
    pairs = [(query, document) for query, candidates, _ in lists for document in candidates]
    targets = torch.tensor([coverage(*pair) for pair in pairs]).view(queries, documents)
    inputs = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, truncation=True, return_tensors="pt")
    return inputs, targets, torch.tensor([found for *_, found in lists])


# ----- Training and measuring -----
def train(model: XLMRobertaForSequenceClassification, tokenizer, seed: int) -> None:
    """Fit the coverage itself (BCE with soft labels) and its differences within a list (RankNet with soft labels).

    Beside it a second output, thrown away afterwards, learns how much of the query's model number the document holds.
    To the score it is worth no more than other characters, but <s> now keeps it apart from the rest, as a language
    model keeps names and numbers apart, and fine-tuning finds it there.
    """
    rng = random.Random(seed)
    number_head = torch.nn.Linear(HIDDEN, 1)
    parameters = [*model.parameters(), *number_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.1)
    model.eval()
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for step in range(1, STEPS + 1):
        for module in dropouts:  # of hidden states only: dropout in attention, eval() throughout, is slow on CPU
            module.train(step in DROPOUT_STEPS)
        inputs, targets, found = make_batch(rng, tokenizer, QUERIES, DOCUMENTS)
        hidden = model.roberta(**inputs).last_hidden_state  # [queries × documents, tokens, HIDDEN]
        logits = model.classifier(hidden).view_as(targets)  # [queries, documents]
        found_logits = number_head(hidden[:, 0]).view_as(targets)
        wanted = torch.logit(targets)  # the optimum of both losses: RankNet with hard labels would saturate the sigmoid
        loss = F.binary_cross_entropy_with_logits(logits, targets) + F.binary_cross_entropy_with_logits(
            logits.unsqueeze(2) - logits.unsqueeze(1), torch.sigmoid(wanted.unsqueeze(2) - wanted.unsqueeze(1))
        )
        asked = ~found.isnan()
        loss = loss + NUMBER_WEIGHT * F.binary_cross_entropy_with_logits(found_logits[asked], found[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            error = (found_logits.sigmoid() - found)[asked].abs().mean()
            print(f"Step {step}/{STEPS}: loss {loss.item():.3f}, error of the second output {error:.2f}", flush=True)


@torch.no_grad()
def measure(model: XLMRobertaForSequenceClassification, tokenizer, seed: int, lists: int = 400) -> None:
    """Print accuracy on generated lists of 8 documents that training has not seen."""
    rng = random.Random(f"held out {seed}")
    right = compared = 0
    gains, probabilities = [], []
    for _ in range(lists // QUERIES):
        inputs, targets, _ = make_batch(rng, tokenizer, QUERIES, 8)
        logits = model(**inputs).logits.view_as(targets)
        clear = targets.unsqueeze(2) - targets.unsqueeze(1) > 0.1
        right += ((logits.unsqueeze(2) > logits.unsqueeze(1)) & clear).sum().item()
        compared += clear.sum().item()
        best = logits.gather(1, targets.argmax(dim=1, keepdim=True))  # [queries, 1]
        gains.append(1 / torch.log2(1 + (logits >= best).sum(dim=1)))
        probabilities.append(logits.sigmoid().flatten())
    low, high = torch.cat(probabilities).quantile(torch.tensor([0.05, 0.95])).tolist()
    chance = sum(1 / math.log2(1 + rank) for rank in range(1, 9)) / 8
    print(f"Parameters: {sum(parameter.numel() for parameter in model.parameters()):,}, vocabulary: {len(tokenizer):,}")
    print(f"Held-out generated lists: {len(gains) * QUERIES} of 8 documents")
    print(f"Pairwise accuracy, coverage differs by more than 0.1: {right / compared:.4f} of {compared:,} pairs")
    print(f"NDCG@10, relevant is what covers most: {torch.cat(gains).mean():.3f}, chance {chance:.3f}")
    print(f"Probabilities, 5 % to 95 % quantile: {low:.2f} to {high:.2f}")


def main() -> None:
    """Build the tokenizer and the model, train, save, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    print(f"Saved {args.output_dir} ({size:.1f} MB) after {(time.time() - start) / 60:.1f} minutes on one core")
    measure(model, tokenizer, args.seed)


if __name__ == "__main__":
    main()
