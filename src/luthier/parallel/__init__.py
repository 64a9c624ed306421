"""Several processes that train one model together, as torchrun starts them. Light: torch comes with `connect`.

Each rank runs its share of the passes of every step; their gradients are summed, so all make the same update. What the
rest asks of ranks is `luthier.train.comm.Comm`; nothing outside this package talks to other processes.
"""

from luthier.parallel.connect import connect, in_turn
from luthier.parallel.place import Place, place

__all__ = ["Place", "connect", "in_turn", "place"]
