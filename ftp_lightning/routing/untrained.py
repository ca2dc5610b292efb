"""A router for those who train nothing: the mean of the factors it sees. [ours]"""

from __future__ import annotations

from torch import Tensor

from ftp_lightning.routing.base import Needs, Router, RoutingContext
from ftp_lightning.routing.learned import factors, known_factors, read_attention


class UntrainedRouter(Router):
    """score = mean of the factors; by default (i/(T-1) + rank of the attention received) / 2, from 0 to 1 [ours].

    Later tokens first, as in the static router, but a token that others attend to may stand up to the whole prompt
    earlier. Without attention it is the static router's order.

    Args: names, the factors, a subset of `learned.FACTORS`.
    """

    ranks_only = True

    def __init__(self, names: tuple[str, ...] = ("position", "rank")):
        super().__init__()
        self.names = known_factors(names)

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # here the factors say it
        return Needs(attention=read_attention(self.names))

    def score(self, context: RoutingContext) -> Tensor:
        return factors(context, self.names).mean(dim=-1)

    def config(self) -> dict:
        return {"names": list(self.names)}
