"""Where the time of one optimizer step goes, read from a trace of torch.profiler in Chrome's format.

On a GPU the processor starts kernels and the card runs them later. A kernel belongs to the section
of the step in which the processor started it, whichever thread that was: autograd has its own. On a
CPU, where nothing is started for later, operations take the place of kernels, each with the time
that it did not spend in others.
"""

import gzip
import json
from collections import Counter
from dataclasses import dataclass, field

PREFIX = "step: "  # of the names of sections, so that torch's own annotations are told apart
WHOLE = PREFIX + "whole"
CARD = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of what the card does
LAUNCH = ("cuda_runtime", "cuda_driver")  # of the processor's calls that start it or wait for it


@dataclass
class Section:
    """A part of the step on the processor; times in microseconds."""

    name: str
    start: float
    end: float
    own: float  # without the sections within it


@dataclass
class Kernel:
    """A piece of work of the card, on a CPU an operation; times in microseconds."""

    name: str
    start: float
    end: float
    own: float  # without what it calls, on a CPU
    launched: float  # when the processor started it
    is_embedding: bool  # whether an operation on the embeddings' gradient started it


@dataclass
class StepProfile:
    """What summarize() finds; times in milliseconds."""

    step: float  # on the processor
    busy: float  # of the card: time in which it ran at least one kernel
    count: int  # of kernels
    micro_batches: int
    sections: dict = field(default_factory=dict)  # name: [processor, of it waiting, card]
    embedding: float = 0.0  # of the card's time in backward: the embeddings' gradient
    kernels: list = field(default_factory=list)  # [name, time, count], longest first


def has_card(events):
    """Whether the profiler saw a card at work."""
    return any(event.get("cat") in CARD for event in events)


def read_events(path):
    """The complete events ("ph": "X") of a trace file in gzip."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def with_own_times(events):
    """[(event, its duration without the events within it)], each before those within it."""
    ordered = sorted(events, key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    own = [event["dur"] for event in ordered]
    around = []  # numbers of the events that the next one may lie within, outermost first
    for number, event in enumerate(ordered):
        while around and not begins_within(event, ordered[around[-1]]):
            around.pop()
        if around:
            own[around[-1]] -= event["dur"]
        around.append(number)
    return list(zip(ordered, own, strict=True))


def begins_within(event, outer):
    """Whether an event begins within another of the same thread."""
    if event["tid"] != outer["tid"]:
        return False
    return outer["ts"] <= event["ts"] < outer["ts"] + outer["dur"]


def sections_of(events):
    """The Sections of the step, each before those within it."""
    labels = []
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX):
            labels.append(event)
    sections = []
    for event, own in with_own_times(labels):
        sections.append(Section(event["name"], event["ts"], event["ts"] + event["dur"], own))
    return sections


def section_at(sections, moment):
    """The section that a moment lies in, the innermost; None: it lies in none."""
    for section in reversed(sections):
        if section.start <= moment < section.end:
            return section
    return None


def kernels_of_card(events, shape):
    """The Kernels of a card, by start; `shape` is that of the embeddings, [V, H]."""
    on_embeddings = operations_on_embeddings(events, shape)
    operation_of = {}  # by the number that a call to CUDA shares with the operation that makes it
    for event in events:
        if event.get("cat") == "cpu_op":
            operation_of[event.get("args", {}).get("External id")] = event
    launches = launches_of(events)

    kernels = []
    for event in events:
        if event.get("cat") not in CARD:
            continue
        launch = launches.get(event["args"].get("correlation"))
        if launch is None:
            continue  # it was started before the profiler was
        operation = operation_of.get(launch["args"].get("External id"), launch)
        is_embedding = any(begins_within(operation, outer) for outer in on_embeddings)
        kernels.append(Kernel(event["name"], event["ts"], event["ts"] + event["dur"], event["dur"],
                              launch["ts"], is_embedding))  # fmt: skip
    return sorted(kernels, key=lambda kernel: kernel.start)


def kernels_of_cpu(events, shape):
    """The operations of a CPU as Kernels, by start; `shape` is that of the embeddings, [V, H]."""
    on_embeddings = operations_on_embeddings(events, shape)
    operations = [event for event in events if event.get("cat") == "cpu_op"]
    kernels = []
    for event, own in with_own_times(operations):
        is_embedding = any(begins_within(event, outer) for outer in on_embeddings)
        kernels.append(Kernel(event["name"], event["ts"], event["ts"] + event["dur"], own,
                              event["ts"], is_embedding))  # fmt: skip
    return sorted(kernels, key=lambda kernel: kernel.start)


def operations_on_embeddings(events, shape):
    """The operations that compute the embeddings' gradient or add to it: tensors of `shape`."""
    found = []
    for event in events:
        if event.get("cat") == "cpu_op":
            shapes = event.get("args", {}).get("Input Dims", [])
            if event["name"] == "aten::embedding_dense_backward" or list(shape) in shapes:
                found.append(event)
    return found


def launches_of(events):
    """The calls by which the processor starts the card's work, by the number that both share."""
    launches = {}
    for event in events:
        if event.get("cat") in LAUNCH and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = event
    return launches


def waits_of(events):
    """The calls in which the processor waits for the card: to synchronise, or for a copy from it,
    which into ordinary memory is over when the call is."""
    waits = []
    for event in events:
        if event.get("cat") in LAUNCH and "Synchronize" in event["name"]:
            waits.append(event)
    launches = launches_of(events)
    for event in events:
        if event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"]:
            call = launches.get(event["args"].get("correlation"))
            if call:
                waits.append(call)
    return waits


def busy_time(kernels):
    """How long at least one of the kernels, ordered by start, ran."""
    total, end = 0.0, 0.0
    for kernel in kernels:
        total += max(0.0, kernel.end - max(end, kernel.start))
        end = max(end, kernel.end)
    return total


def summarize(events, shape):
    """The StepProfile of a trace with labelled sections; `shape` of the embeddings, [V, H]."""
    sections = sections_of(events)
    [whole] = [section for section in sections if section.name == WHOLE]
    found = kernels_of_card(events, shape) if has_card(events) else kernels_of_cpu(events, shape)
    kernels = []
    for kernel in found:
        if whole.start <= kernel.launched < whole.end:
            kernels.append(kernel)

    profile = StepProfile(
        step=(whole.end - whole.start) / 1000,
        busy=busy_time(kernels) / 1000,
        count=len(kernels),
        micro_batches=sum(section.name == PREFIX + "forward" for section in sections),
    )
    processor, waiting, card = Counter(), Counter(), Counter()
    for section in sections:
        processor[section.name] += section.own / 1000
    for event in waits_of(events):
        section = section_at(sections, event["ts"])
        if section:
            waiting[section.name] += event["dur"] / 1000
    durations, counts = Counter(), Counter()
    for kernel in kernels:
        name = section_at(sections, kernel.launched).name
        card[name] += kernel.own / 1000
        if kernel.is_embedding and name == PREFIX + "backward":
            profile.embedding += kernel.own / 1000
        durations[kernel.name] += kernel.own / 1000
        counts[kernel.name] += 1

    for name in [*(name for name in processor if name != WHOLE), WHOLE]:
        title = "the rest" if name == WHOLE else name.removeprefix(PREFIX)
        profile.sections[title] = [processor[name], waiting[name], card[name]]
    for name, duration in durations.most_common(15):
        profile.kernels.append([name, duration, counts[name]])
    return profile
