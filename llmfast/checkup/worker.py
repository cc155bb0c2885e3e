"""The process of one section: `python -m llmfast.checkup.worker SECTION --journal FILE`.

It notes each case in the journal before it begins, so that the parent of a dead process knows which case killed it and
can start another one after that case.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from llmfast.checkup.record import Case, Journal
from llmfast.checkup.sections import named

BROKEN_DEVICE = 75  # exit code: after an illegal access nothing in this process works any more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases of a section from number `--first` on; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="full")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that share the cases")
    parser.add_argument("--process", type=int, default=0, help="which of them this is")
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args(arguments)
    device, journal = torch.device(args.device), Journal(args.journal)
    end = time.monotonic() + args.seconds
    for index, case in enumerate(named(args.section).cases(device, args.size)):
        if index < args.first or index % args.processes != args.process:
            continue
        if time.monotonic() > end:
            journal.write("skip", case.name, index, why="no time left")
        elif case.gpu_bytes > (free := free_bytes(device)):
            journal.write("skip", case.name, index, why=f"needs {case.gpu_bytes} bytes, and {free} are free")
        else:
            run(case, index, journal)
            if not device_works(device):
                return BROKEN_DEVICE
    return 0


def run(case: Case, index: int, journal: Journal) -> None:
    """Run a case and write what it finds; an exception is a finding too."""
    journal.write("begin", case.name, index, seconds=case.seconds)
    start = time.monotonic()
    try:
        for found in case.run():
            journal.write("finding", case.name, index, what=found.what, ok=found.ok, figures=found.figures)
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-3:]
        places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in where]
        figures = {"error": f"{type(e).__name__}: {e}"[:2000], "where": " < ".join(reversed(places))}
        journal.write("finding", case.name, index, what="raised", ok=False, figures=figures)
    journal.write("end", case.name, index, seconds=time.monotonic() - start)
    gc.collect()


def free_bytes(device: torch.device) -> int:
    """Return the memory that a case may take."""
    if device.type != "cuda":
        return 1 << 62
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def device_works(device: torch.device) -> bool:
    """Return whether the device still answers."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
