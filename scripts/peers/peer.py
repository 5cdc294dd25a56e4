"""A peer of the race: reads one command a line, answers one line of JSON each.

    prepare ROW    builds what the row needs, in place of the row before
    check          does the row's work once on the files that both sides share, and says what came of it
    run N          does it N times: {"seconds": …, "items": …}
    memory         the most memory that this process has held so far, in bytes
    quit

Called as: peer.py FOLDER MODE DTYPE THREADS DEVICE
"""

import json
import sys
import time

import torch

from modes import Mode


def row_of(name, mode):
    """What a row does not need is not imported: it would count as memory of the row."""
    if mode.letter == "d":
        from sample import DiffusersRow as row
    elif name.startswith(("sample-", "heun-", "adm-")):
        from sample import SampleRow as row
    elif name.startswith("checkpoint-"):
        from checkpoint import CheckpointRow as row
    elif name == "data":
        from data import DataRow as row
    elif name == "fid":
        from fid_stats import FidRow as row
    elif name == "update":
        from train import UpdateRow as row
    else:
        from train import TrainRow as row
    return row


def peak_memory():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class Peer:
    def __init__(self, folder, letter, dtype, threads, device):
        torch.set_num_threads(int(threads))
        # As EDM's training loop has it; a process that makes one picture would only lose by it.
        torch.backends.cudnn.benchmark = True
        self.folder, self.mode, self.row = folder, Mode.of(letter, device, dtype), None

    def prepare(self, name):
        self.row = None
        # Before the row's own modules and tensors: what every process with this interpreter and torch holds.
        self.base = peak_memory()
        self.row = row_of(name, self.mode)(self.folder, name, self.mode)
        return {"dtype": self.mode.dtype_name, "torch": torch.__version__}

    def check(self):
        return self.row.check()

    def run(self, count):
        count, clock = int(count), time.perf_counter
        if hasattr(self.row, "timed"):
            seconds = self.row.timed(count, clock)
        else:
            begin = clock()
            self.row.run(count)
            seconds = clock() - begin
        return {"seconds": seconds, "items": self.row.items * count}

    def memory(self):
        if self.mode.device.type == "cuda":
            return {"bytes": torch.cuda.max_memory_reserved(), "base": 0}
        return {"bytes": peak_memory(), "base": self.base}


def main():
    peer = Peer(*sys.argv[1:])
    for line in sys.stdin:
        command, *words = line.split()
        if command == "quit":
            return
        try:
            answer = getattr(peer, command)(*words)
        except Exception as error:
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"[:500]}
        print(json.dumps(answer), flush=True)


main()
