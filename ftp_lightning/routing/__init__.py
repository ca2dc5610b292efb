"""Which tokens enter a block: one router = one class = one file."""

from ftp_lightning.routing.base import Router, RoutingContext
from ftp_lightning.routing.dynamic import DynamicRouter
from ftp_lightning.routing.fixed import FixedRouter
from ftp_lightning.routing.random import RandomRouter
from ftp_lightning.routing.static import StaticRouter

ROUTERS: dict[str, type[Router]] = {"static": StaticRouter, "random": RandomRouter, "dynamic": DynamicRouter}
"""Routers that a pruned folder may name; the keys are what its JSON and the command line say."""

__all__ = ["ROUTERS", "DynamicRouter", "FixedRouter", "RandomRouter", "Router", "RoutingContext", "StaticRouter"]
