"""What goes wrong on purpose, what the script says then, what is left, and whether the run goes on to the same bits.

    python benchmarks/faults.py                   # prints the table of benchmarks/faults.md
    python benchmarks/faults.py "a checkpoint"    # only the rows with these words

Real command lines, signals, file systems and processes. Those with a file system of their own need root and Linux."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from soak_kill import ROOT, bits, command_line, printed

RESUME = {"resume_from_checkpoint": "latest"}
SCRIPT = ROOT / "train_bert_rerank.py"


def launch(folder, name, processes=1, **settings):
    """Start a run into `name`, with what it prints in name.txt."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, SCRIPT, *command_line(name, settings)]
    with open(folder / f"{name}.txt", "ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


STEP_3 = r"Training: [^\r\n]*\| 3/\d+ \["


def stopped(number, at=STEP_3, processes=1, to=lambda process: [process.pid]):
    """A fault: a run that receives the signal `number` once it has printed `at`."""
    def fault(folder, name):
        process = launch(folder, name, processes, save_steps=2)
        while process.poll() is None and not re.search(at, printed(folder, name)):
            time.sleep(0.01)
        for each in to(process):
            os.kill(each, number)
        return process.wait()
    return fault


def changed(change=lambda folder: {}, **settings):
    """A fault: a run that was killed is gone on with after `change`, or with other `settings`."""
    def fault(folder, name):
        stopped(signal.SIGKILL)(folder, name)
        return launch(folder, name, **RESUME, **change(folder), **settings).wait()
    return fault


def first(change=lambda folder: {}, **settings):
    """A fault: a run of its own with these settings."""
    return lambda folder, name: launch(folder, name, **{**settings, **change(folder)}).wait()


def twice(**settings):
    """A fault: a run that has ended is started again."""
    def fault(folder, name):
        launch(folder, name).wait()
        return launch(folder, name, **settings).wait()
    return fault


def on_disk(megabytes, options="rw", fill=None):
    """A fault: output_dir on a file system of that size, which somebody fills up to `fill` MB once training goes on."""
    def fault(folder, name):
        disk = folder / name
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,{options}", "none", disk], check=True)
        process = launch(folder, name, save_steps=2, save_total_limit=1)
        while fill and process.poll() is None and not re.search(STEP_3, printed(folder, name)):
            time.sleep(0.01)
        if fill:
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - fill * 1_000_000))
        status = process.wait()
        if fill:
            (disk / "other").unlink()
        return status
    return fault


def other_rows(folder):
    rows = (ROOT / "default_train_data.jsonl").read_text(encoding="utf-8").replace("1}", "0}", 1)
    (folder / "other_train.jsonl").write_text(rows, encoding="utf-8")
    return {"train_dataset": "other_train.jsonl"}


def bad_rows(count):
    """The training rows with one that overflows the model in `count` of them, and that model."""
    def change(folder):
        shutil.copytree(ROOT / "tiny_reranker", folder / "overflowing", dirs_exist_ok=True)
        tokenizer = json.loads((folder / "overflowing" / "tokenizer.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "overflowing" / "model.safetensors")
        [name] = [name for name in weights if "word_embeddings" in name]
        weights[name][tokenizer["model"]["vocab"]["毳"]] = 1e38
        save_file(weights, folder / "overflowing" / "model.safetensors", metadata={"format": "pt"})
        rows = [json.loads(line) for line in (ROOT / "default_train_data.jsonl").read_text("utf-8").splitlines()]
        for row in rows[:count]:
            row["content"] = "毳毛"
        (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {"model_name_or_path": "overflowing", "train_dataset": "bad.jsonl"}
    return change


def other_model(part):
    def change(folder):
        shutil.copytree(ROOT / "tiny_reranker", folder / part, dirs_exist_ok=True)
        if part == "weights":
            weights = load_file(folder / part / "model.safetensors")
            weights["classifier.out_proj.bias"] += 1
            save_file(weights, folder / part / "model.safetensors", metadata={"format": "pt"})
        else:
            text = (folder / part / "tokenizer.json").read_text(encoding="utf-8")
            tokenizer = json.loads(text) | {"normalizer": {"type": "NFC"}}
            (folder / part / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        return {"model_name_or_path": part}
    return change


def spoilt(write):
    """A change: the newest checkpoint's file is spoilt."""
    def change(folder):
        write(max(folder.glob("*/unfinished_run/checkpoint-*/state.pt"), key=lambda each: each.stat().st_mtime))
        return {}
    return change


class Code:
    def __reduce__(self):
        return os.mkdir, ("code was run",)


def one_worker(process):
    """The second of the processes that torchrun started."""
    return [int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[1])]


SCORING = r"Step 5, epoch 1[\s\S]*Scoring: +\d|\| 4/\d+ [\s\S]*Scoring: +\d"
FAULTS = {  # what happens: the fault, and whether the run is then gone on with
    "SIGTERM while training": (stopped(signal.SIGTERM), True),
    "SIGINT (Ctrl-C) while training": (stopped(signal.SIGINT), True),
    "SIGUSR1 while training": (stopped(signal.SIGUSR1), True),
    "SIGTERM during an evaluation": (stopped(signal.SIGTERM, at=SCORING), True),
    "SIGTERM before training": (stopped(signal.SIGTERM, at="Training Args"), True),
    "SIGKILL while training": (stopped(signal.SIGKILL), True),
    "two processes: SIGTERM to torchrun": (stopped(signal.SIGTERM, processes=2), False),
    "two processes: SIGTERM to one of them": (stopped(signal.SIGTERM, processes=2, to=one_worker), False),
    "two processes: SIGKILL to one of them": (stopped(signal.SIGKILL, processes=2, to=one_worker), False),
    "a disk too small from the start": (on_disk(30), False),
    "a disk that fills up while training": (on_disk(100, fill=3), True),
    "a read-only disk": (on_disk(5, "ro"), False),
    "started again without a word, unfinished": (lambda folder, name: (
        stopped(signal.SIGKILL)(folder, name), launch(folder, name).wait())[1], True),
    "started again with latest, ended": (twice(**RESUME), False),
    "started with latest, nothing there": (first(**RESUME), False),
    "both going on and starting over": (first(**RESUME, overwrite_output_dir=True), False),
    "another lr": (changed(lr=1e-4), True),
    "more epochs": (changed(epochs=2), True),
    "other training rows": (changed(other_rows), True),
    "other base weights": (changed(other_model("weights")), True),
    "another tokenizer": (changed(other_model("tokenizer")), True),
    "more samples a step": (changed(batch_size=4), True),
    "the same samples a step in other batches": (changed(batch_size=4, gradient_accumulation_steps=4), False),
    "a checkpoint cut off": (changed(spoilt(lambda path: path.write_bytes(path.read_bytes()[:99999]))), False),
    "a checkpoint with code": (changed(spoilt(lambda path: torch.save({"step": Code()}, path))), False),
    "a row that overflows the model": (first(bad_rows(1)), False),
    "rows that do, in all steps": (first(bad_rows(198)), False),
    "lr 1e30": (first(lr=1e30, eval_dataset=None), False),
}


def main():
    print("| what happens | exit status | what is said last | checkpoints left | goes on to the same bits |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = (ROOT / "default_eval_data.jsonl").read_text(encoding="utf-8").splitlines()[: 20 * 8]
        (folder / "eval.jsonl").write_text("\n".join(rows), encoding="utf-8")
        launch(folder, "whole").wait()
        whole, are_same = bits(folder / "whole"), True
        wanted = {what: fault for what, fault in FAULTS.items() if all(words in what for words in sys.argv[1:])}
        for number, (what, (fault, is_gone_on_with)) in enumerate(wanted.items()):
            name = f"run{number}"
            status = fault(folder, name)
            said = printed(folder, name)
            first_words = "Error: |Stopped by |A run with|No checkpoint|Verdict|!!! WARNING !!! step"
            kept = re.findall(rf"^(?:{first_words}).*(?:\n  (?!to )\w.*)?", said, re.M)
            assert not re.search(r'train_bert_rerank\.py", line', said) and not (folder / "code was run").exists(), said
            left = ", ".join(each.parent.name.removeprefix("checkpoint-").lstrip("0") for each in
                             sorted((folder / name / "unfinished_run").glob("checkpoint-*/state.pt"))) or "none"
            ended = ""
            if is_gone_on_with:
                launch(folder, name, **RESUME, save_steps=2).wait()
                is_same = (folder / name / "run.json").exists() and bits(folder / name) == whole
                are_same &= is_same
                ended = "yes" if is_same else "NO"
            shown = " … ".join(kept[:1] + kept[-1:] if len(kept) > 1 else kept).replace("|", "/").replace("\n", " ")
            shown = re.sub(r"\w{64}", lambda found: f"{found[0][:8]}…", shown)
            shown = shown.replace(f"{folder}/", "").replace(f"{ROOT}/", "")
            print(f"| {what} | {status} | {shown[:300]} | {left} | {ended} |", flush=True)
            if (folder / name).is_mount():
                subprocess.run(["umount", folder / name], check=True)
    sys.exit(not are_same)


if __name__ == "__main__":
    main()
