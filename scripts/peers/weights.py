"""Networks out of the race's files."""

from pathlib import Path

from safetensors.torch import load_file

from networks import Preconditioned, SongUNet


def build(work, mode, boundary, file=None, folder=None, trains=False):
    """The network of a row with the weights of `file`, placed and compiled as the mode says."""
    spec = work["network"]
    if spec["kind"] != "song_unet":
        raise ValueError(f"network {spec['kind']}: the peers have song_unet alone")
    net = SongUNet(spec, tuned=mode.tuned)
    if file is not None:
        net.load_state_dict(load_file(Path(folder) / file), strict=True)
    net = mode.place(net).requires_grad_(trains).train(trains)
    return net, Preconditioned(mode.wrap(net), work["precond"], boundary, mode)
