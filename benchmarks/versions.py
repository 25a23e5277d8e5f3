"""Exercise the oldest and the newest supported packages, and the supported Pythons, each in an environment of its own.

    python benchmarks/versions.py                       # all of COMBINATIONS whose Python is installed
    python benchmarks/versions.py "python3.12 torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0"

For each it makes a virtual environment, installs the packages and the rest of requirements.txt, runs the first command
of README.md with one epoch, and then the tests that need little else; it prints a row of a Markdown table. On Linux
some versions of torch come with several GB of CUDA; the environments are removed.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMBINATIONS = [
    "python3.11 torch==2.6.0 transformers==4.51.3 accelerate==1.6.0 sentence-transformers==4.1.0",
    "python3.11 torch==2.13.0 transformers==4.51.3 accelerate==1.6.0 sentence-transformers==4.1.0",
    "python3.11 torch==2.14.1 transformers==5.24.0 accelerate==1.15.0 sentence-transformers==6.2.0",
    "python3.10 torch==2.13.0 transformers==4.57.6 accelerate==1.15.0 sentence-transformers==5.2.0",
    "python3.12 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 sentence-transformers==6.2.0",
    "python3.13 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 sentence-transformers==6.2.0",
]
RUN = ("train_bert_rerank.py --model_name_or_path tiny_reranker --lr 3e-4 --epochs 1 --mixed_precision no "
       "--output_dir output")
TESTS = ["tests/test_windows.py", "tests/test_inference.py", "tests/test_verdict.py"]


def run(*command, **options):
    """The standard output, or where the command fails its exit status and the end of all that it printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    said = (done.stdout + done.stderr)[-600:]
    return f"exit status {done.returncode}: {said}" if done.returncode else done.stdout


def exercise(combination, folder):
    """A row of the table: the combination, NDCG@10 of the run, what pytest said last."""
    python, *packages = combination.split()
    own, clone = folder / "env" / "bin" / "python", folder / "clone"
    run(python, "-m", "venv", folder / "env")
    torch = [each for each in packages if each.startswith("torch==")]
    for wanted in (torch, [*packages, "-r", ROOT / "requirements.txt", "pytest", "hypothesis", "scikit-learn",
                           "ir-measures"]):  # fmt: skip
        if (found := run(own, "-m", "pip", "install", "--quiet", *wanted)).startswith("exit status"):
            return f"| {combination} | not installed: {found.splitlines()[-1][:200]} | |"
    run("git", "clone", "--quiet", ROOT, clone)
    trained = run(own, *RUN.split(), cwd=clone)
    figures = re.search(r"^ndcg@10 .*", trained, re.M)
    tested = run(own, "-m", "pytest", "-q", "-o", "addopts=", *TESTS, cwd=clone).strip().splitlines()
    print(*tested[-12:-1], sep="\n", file=sys.stderr)
    return f"| {combination} | {figures[0] if figures else trained[-300:]} | {tested[-1]} |"


if __name__ == "__main__":
    print("| Python and packages | the default run, one epoch | tests |\n| --- | --- | --- |")
    for each in sys.argv[1:] or COMBINATIONS:
        if shutil.which(each.split()[0]):
            with tempfile.TemporaryDirectory() as folder:
                print(exercise(each, Path(folder)), flush=True)
