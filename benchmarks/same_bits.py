"""Do two runs, and one that was stopped twice and went on, end with the same bits on this machine?

    python benchmarks/same_bits.py                                     # no, bf16 and fp16, one process
    python benchmarks/same_bits.py --mixed_precision bf16 --processes 2

Compared are weights, pictures, report, predictions and logged scalars, speed aside, of runs on tiny_reranker. fp16
needs a GPU; the number of steps that its scaler left out is printed, since they are part of what a resumed run has to
remember."""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from soak_kill import ROOT, bits, command_line, printed


def run_to(folder, name, stops, processes, **settings):
    """Run, with a SIGTERM when each of the steps `stops` is done, until it ends by itself."""
    settings = {**settings, "resume_from_checkpoint": "latest", "save_steps": 5, "eval_steps": 13, "epochs": 4}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, ROOT / "train_bert_rerank.py", *command_line(name, settings)]
    for step in [*stops, None]:
        with open(folder / f"{name}.txt", "ab") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        is_done = re.compile(rf"Training: [^\r\n]*\| {step}/\d+ \[")
        while step and process.poll() is None and not is_done.search(printed(folder, name)):
            time.sleep(0.02)
        if step:
            process.send_signal(signal.SIGTERM)
        if process.wait() != (0 if not step else 143 if processes == 1 else 1):
            sys.exit(printed(folder, name)[-3000:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixed_precision", nargs="+", default=["no", "bf16", "fp16"])
    parser.add_argument("--processes", type=int, default=1)
    asked = parser.parse_args()
    print("| precision | where | repeated | stopped twice and gone on | steps left out |")
    print("| --- | --- | --- | --- | --- |")
    are_same = True
    for precision in asked.mixed_precision:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            rows = (ROOT / "default_eval_data.jsonl").read_text(encoding="utf-8").splitlines()[: 25 * 8]
            (folder / "eval.jsonl").write_text("\n".join(rows), encoding="utf-8")
            for name, stops in (("whole", []), ("again", []), ("stopped", [8, 22])):
                run_to(folder, name, stops, asked.processes, mixed_precision=precision)
            whole, again, stopped = (bits(folder / name) for name in ("whole", "again", "stopped"))
            run = json.loads((folder / "whole" / "run.json").read_text(encoding="utf-8"))
            left_out = re.search(r"(\d+) steps were left out", printed(folder, "stopped"))
        same = [{True: "the same bits", False: "OTHER BITS"}[whole == other] for other in (again, stopped)]
        are_same &= whole == again == stopped
        device, left_out = run["hardware"].rpartition(", ")[2], left_out[1] if left_out else 0
        where = f"{device}, torch {run['versions']['torch']}, processes: {run['processes']}"
        print(f"| {run['precision']} | {where} | {same[0]} | {same[1]} | {left_out} |", flush=True)
    sys.exit(not are_same)


if __name__ == "__main__":
    main()
