"""From the start of the process to the first optimizer step, against the imports that no such script can do without.

    python benchmarks/start_up.py [--rounds 7]

The script's own main() on tiny_reranker and the default rows, without evaluation and with the default one, which scores
162 queries before the first step; and a process that only imports torch, accelerate, AutoModelForSequenceClassification
and AutoTokenizer, and the two classes that these make of tiny_reranker. One after the other, each first in its turn,
after one round that is not counted. Seconds are medians, with lowest and highest, from before the process is asked for;
a ratio is the median of those of the rounds. Also says when the imports of the script itself were done, and which heavy
packages were loaded at the first step. One run, to see where its time goes, with a profiler in front:

    python -X importtime benchmarks/start_up.py run --eval_dataset None --output_dir out
    py-spy record --native -o profile.svg -- python benchmarks/start_up.py run --eval_dataset None --output_dir out
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HEAVY = ("matplotlib", "wandb", "tensorboard", "datasets", "sklearn", "scipy", "pandas")
IMPORTS = """
import json, time
import torch, accelerate
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from {} import {}
from {} import {}
print(json.dumps({{"end": time.monotonic()}}))
"""


def run():
    """main() until its first optimizer step; prints when that was, when the imports were done, and what was loaded."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import train_bert_rerank
    imported = time.monotonic()

    def stop(*_):
        loaded = [package for package in HEAVY if package in sys.modules]
        print(json.dumps({"end": time.monotonic(), "imported": imported, "loaded": loaded}), flush=True)
        os._exit(0)

    register_optimizer_step_post_hook(stop)
    sys.argv = ["train_bert_rerank.py", "--model_name_or_path", str(ROOT / "tiny_reranker"), *sys.argv[2:]]
    train_bert_rerank.main()


def imports_alone():
    """The program that only imports what tiny_reranker needs."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    classes = [type(each.from_pretrained(ROOT / "tiny_reranker"))
               for each in (AutoModelForSequenceClassification, AutoTokenizer)]  # fmt: skip
    return IMPORTS.format(*(name for each in classes for name in (each.__module__, each.__name__)))


def main():
    """Time the three, round by round, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        script = [__file__, "run", "--output_dir", f"{folder}/out"]
        programs = {"imports alone": ["-c", imports_alone()], "first step": [*script, "--eval_dataset", "None"],
                    "first step, with an evaluation before it": script}  # fmt: skip
        names, loaded = list(programs), {}
        seconds, imported = ({name: [] for name in programs} for _ in range(2))
        for turn in range(rounds + 1):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                started = time.monotonic()
                done = subprocess.run([sys.executable, *programs[name]], cwd=ROOT, stdout=subprocess.PIPE, check=True,
                                      stderr=subprocess.DEVNULL, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                if turn:
                    seconds[name].append(found["end"] - started)
                    imported[name].append(found.get("imported", found["end"]) - started)
                loaded[name] = found.get("loaded")
    print("| | s | imports done after, s | ratio to the imports alone |\n| --- | --- | --- | --- |")
    for name in names:
        ratios = [own / least for own, least in zip(seconds[name], seconds["imports alone"], strict=True)]
        cells = [f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
                 for each in (seconds[name], imported[name], ratios)]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nLoaded at the first step, of {', '.join(HEAVY)}: {', '.join(loaded['first step']) or 'none'}.")


if __name__ == "__main__":
    run() if sys.argv[1:2] == ["run"] else main()
