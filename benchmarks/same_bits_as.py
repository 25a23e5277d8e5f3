"""Does the default run of this checkout end with the same bits as that of another one, an earlier version of it?

    git worktree add ../before COMMIT
    python benchmarks/same_bits_as.py ../before

The README's default run, in both checkouts: with one process, with two, and with one that is stopped by SIGTERM, killed
by SIGKILL, and goes on each time. Compared are weights, model card, pictures, report, predictions, rows to check and
the logged scalars, speed aside. The exit status is 1 where anything differs."""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from soak_kill import ROOT, bits

SETTINGS = [
    "--model_name_or_path", "tiny_reranker", "--lr", "3e-4", "--epochs", "10", "--mixed_precision", "no",
    "--resume_from_checkpoint", "latest",
]  # fmt: skip
STOPS = [(30, signal.SIGTERM), (75, signal.SIGKILL)]  # when this step is done, of the 130


def start(checkout, output_dir, processes, log):
    """The default run of a `checkout`, which prints into the file `log`."""
    launcher = []
    samples = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        samples = ["--gradient_accumulation_steps", str(8 // processes)]

    command = [
        sys.executable, *launcher, "train_bert_rerank.py", *SETTINGS, *samples, "--output_dir", str(output_dir),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        command, cwd=checkout, stdout=log, stderr=subprocess.STDOUT, env=environment
    )


def run(checkout, output_dir, processes=1, stops=()):
    """Run to the end, with a signal whenever one of the steps of `stops` is done; its bits, by name."""
    path = output_dir.with_suffix(".txt")
    with open(path, "wb") as log:
        for step, number in stops:
            process = start(checkout, output_dir, processes, log)
            is_done = re.compile(rf"Training: [^\r\n]*\| {step}/\d+ \[")
            while process.poll() is None and not is_done.search(path.read_text("utf-8")):
                time.sleep(0.02)
            process.send_signal(number)
            process.wait()

        if start(checkout, output_dir, processes, log).wait() != 0:
            sys.exit(path.read_text("utf-8")[-3000:])

    resumed = path.read_text("utf-8").count("Going on after step")
    if resumed != len(stops):
        sys.exit(f"{checkout}: resumed {resumed} times, not {len(stops)}")
    return bits(output_dir)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a checkout of an earlier version")
    other = parser.parse_args().other.resolve()

    kinds = {
        "one process": {},
        "two processes": {"processes": 2},
        "stopped, killed, gone on": {"stops": STOPS},
    }
    differing = 0
    print("| default run | files and series of scalars | the same bits | others |")
    print("| --- | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        for number, (kind, options) in enumerate(kinds.items()):
            here = run(ROOT, Path(temporary, f"here{number}"), **options)
            there = run(other, Path(temporary, f"there{number}"), **options)
            others = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
            same = len({*here, *there}) - len(others)
            print(f"| {kind} | {len(here)} | {same} | {', '.join(others)} |", flush=True)
            differing += len(others)

    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
