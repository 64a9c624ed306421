"""The gradient of one step in fp64 over its ranks: `gradients.py BASE OUT TRAINED`; rank 0 writes it.

TRAINED: adapter or full, on any number of ranks.

It needs the tests of the decoder on its path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_architectures import examples, load
from test_executions import adapted

from luthier.data.collate import collate
from luthier.data.pack import schedule
from luthier.parallel import connect
from luthier.types import Plan


def main(base: Path, out: Path, trained: str) -> None:
    """Every rank runs its passes of at most 16 tokens, with dropout; the gradients are summed as training sums them."""
    torch.set_num_threads(1)
    with connect() as comm:
        decoder = (load(base, trained=True) if trained == "full" else adapted(base)).train()
        rows = examples()
        total = sum(sum(row.weights[1:]) for row in rows)
        passes = schedule([row.length for row in rows], Plan("cpu", 16, "decoder"), comm.world)[comm.rank]
        for indices in passes:
            batch = collate([rows[i] for i in indices], 5)
            weight = batch.target_weight[batch.supervised].double()
            (-(decoder.logprobs(batch) * weight).sum() / total).backward()
        named = dict(decoder.named_parameters())
        comm.sum_gradients(list(named.values()))
        if comm.rank == 0:
            found = {name: weight.grad for name, weight in named.items() if weight.grad is not None}
            save_file({**found, "passes": torch.tensor(len(passes))}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
