"""Saving and loading the state of a run: weights, averages, target and optimiser, with torch.save and torch.load."""

import torch

from train import TrainRow


class CheckpointRow(TrainRow):
    def __init__(self, folder, row, mode):
        super().__init__(folder, "ct", mode)
        self.items, self.loads = 1, row == "checkpoint-load"
        self.file = self.folder / f"peer-{mode.letter}.pt"
        # Moments exist once a step was taken.
        self.step()
        self.save()

    def save(self):
        state = {
            "net": self.net.state_dict(),
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "step": 1,
        }
        if self.target_net is not None:
            state["target"] = self.target_net.state_dict()
        torch.save(state, self.file)

    def load(self):
        state = torch.load(self.file, map_location="cpu", mmap=self.mode.tuned or None)
        self.net.load_state_dict(state["net"])
        if self.target_net is not None:
            self.target_net.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for average, saved in zip(self.averages, state["averages"]):
                for kept, new in zip(average, saved):
                    kept.copy_(new)

    def timed(self, count, clock):
        """A file that is in the way is removed outside of the clock, as on the other side."""
        seconds = 0.0
        for _ in range(count):
            if not self.loads:
                self.file.unlink(missing_ok=True)
            begin = clock()
            self.load() if self.loads else self.save()
            seconds += clock() - begin
        return seconds

    def check(self):
        return {}
