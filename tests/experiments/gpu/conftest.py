from dataclasses import asdict, replace

import pytest
import torch

from experiments.gpu.pieces import PIECES
from experiments.gpu.record import DONE, Record, close

CPU = torch.device("cpu")
CARD = {"name": "NVIDIA H200", "memory": 150 * 2**30, "driver": "580.1", "cuda": "13.0", "triton": "3.6.0"}


def measure_toy(path, name, **changes):
    """Measures a piece in this process, and returns its record."""
    (piece,) = (each for each in PIECES if each.name == name)
    sizes = replace(piece.toy, **changes)
    piece.measure(sizes, CPU, Record(path, name, CARD, asdict(sizes), is_toy=True))
    return close(path, name, DONE, None, 3.0)


@pytest.fixture(scope="session")
def toy_record(tmp_path_factory):
    """A piece's record at toy sizes, measured once."""
    folder, records = tmp_path_factory.mktemp("records"), {}

    def record(name):
        if name not in records:
            records[name] = measure_toy(folder / f"{name}.json", name)
        return records[name]

    return record
