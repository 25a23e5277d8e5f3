"""The default run and a part of the tests under the oldest and the newest supported packages.

    python benchmarks/versions.py                                      # OLDEST and NEWEST, below
    python benchmarks/versions.py "python3.12 torch==2.13.0" "python3.11 transformers==5.0.0 accelerate==1.10.0"

Each argument is one combination: an interpreter (a name on PATH, or a path), then requirements as pip takes them; what
they leave open is what pip chooses within requirements.txt. Each combination gets a virtual environment and a copy of
the repository of its own, which are removed at the end: 6 GB at a time where pip takes torch with CUDA. In the copy run
the README's default command with --epochs 1, and the tests of training (without those of two processes), windows,
inference and the model. Prints a Markdown table and below it each test that failed, with the error; exits 1 if one did.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "python3.11 torch==2.6.0 transformers==4.51.3 accelerate==1.6.0 sentence-transformers==5.1.0"
NEWEST = "python3.11"
FOR_TESTS = ("pytest", "pytest-xdist", "hypothesis", "scikit-learn", "ir-measures", "sentence-transformers")
TESTS = ("tests/test_training.py", "tests/test_windows.py", "tests/test_inference.py", "tests/test_model.py")
SHOWN = ("torch", "transformers", "accelerate", "sentence-transformers", "numpy")
VERSIONS = f"""
import importlib.metadata, json, platform
print(json.dumps([platform.python_version(), *map(importlib.metadata.version, {SHOWN})]))
"""
# Wide, so that pytest's summary has the error beside each name; one thread, so that figures can be compared.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "400"}


def call(*command, cwd=ROOT):
    """Run a command; returns CompletedProcess with stdout and stderr in one text."""
    return subprocess.run(list(map(str, command)), cwd=cwd, env=ENVIRONMENT, text=True, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def try_combination(interpreter, requirements, folder):
    """One combination in `folder`: (cells of its row, lines that say what failed)."""
    python, copy = folder / "venv/bin/python", folder / "copy"
    installed = call(interpreter, "-m", "venv", folder / "venv")
    if installed.returncode == 0:
        installed = call(python, "-m", "pip", "install", "-q", *requirements, "-r", "requirements.txt", *FOR_TESTS)
    if installed.returncode:
        named = " ".join([interpreter, *requirements])
        return [named, *[""] * len(SHOWN), "not installed", ""], installed.stdout.splitlines()[-5:]
    versions = json.loads(call(python, "-c", VERSIONS).stdout)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "output*", "__pycache__"))
    command = re.search(r"&& python (train_bert_rerank\.py .*)", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    run = call(python, *command.split(), "--epochs", "1", "--output_dir", folder / "out", cwd=copy)
    if run.returncode:
        change, failed = f"exit status {run.returncode}", run.stdout.splitlines()[-5:]
    else:
        report = json.loads((folder / "out/eval_report.json").read_text(encoding="utf-8"))
        change, failed = " → ".join(f"{report[when]['ndcg@10']:.4f}" for when in ("before", "after")), []
    tests = call(python, "-m", "pytest", "-q", "--tb=no", *TESTS, cwd=copy).stdout.splitlines()
    failed += [line for line in tests if line.startswith(("FAILED", "ERROR"))]
    return [*versions, change, tests[-1].strip("= ")], failed


def main():
    """Try the combinations, one after the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("combinations", nargs="*", default=[OLDEST, NEWEST], metavar="'PYTHON REQUIREMENT …'")
    combinations = [each.split() for each in parser.parse_args().combinations]
    for number, words in enumerate(combinations, 1):
        if not words or not shutil.which(words[0]):
            raise SystemExit(f"Error: combination {number}: {words[0] if words else 'nothing'!r} is no interpreter on "
                             "PATH. Write for example 'python3.12 torch==2.13.0'.")  # fmt: skip
    rows = []
    for interpreter, *requirements in tqdm(combinations, desc="Combinations"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(try_combination(interpreter, requirements, Path(folder)))
    print(f"| Python | {' | '.join(SHOWN)} | NDCG@10 of the default run, one epoch | tests |")
    print("| --- " * (len(SHOWN) + 3) + "|")
    for cells, _ in rows:
        print(f"| {' | '.join(cells)} |")
    for cells, failed in rows:
        if failed:
            print(f"\n{' '.join(cells[:2])}:", *failed, sep="\n")
    sys.exit(any(failed for _, failed in rows))


if __name__ == "__main__":
    main()
