"""Which tokens enter a block: one router = one class = one file."""

import inspect

from ftp_lightning.errors import UserError
from ftp_lightning.routing.base import BUILT_IN, OWN_ROUTERS, Router, RoutingContext
from ftp_lightning.routing.dynamic import DynamicRouter
from ftp_lightning.routing.fixed import FixedRouter
from ftp_lightning.routing.hidden import HiddenRouter
from ftp_lightning.routing.hidden_factors import HiddenFactorsRouter
from ftp_lightning.routing.local import LocalRouter
from ftp_lightning.routing.one_pass import OnePassRouter
from ftp_lightning.routing.projected import ProjectedRouter
from ftp_lightning.routing.projected_once import ProjectedOnceRouter
from ftp_lightning.routing.random import RandomRouter
from ftp_lightning.routing.recurrent import RecurrentRouter
from ftp_lightning.routing.static import StaticRouter
from ftp_lightning.routing.untrained import UntrainedRouter

ROUTERS: dict[str, type[Router]] = {
    "static": StaticRouter,
    "random": RandomRouter,
    "dynamic": DynamicRouter,
    "local": LocalRouter,
    "recurrent": RecurrentRouter,
    "hidden": HiddenRouter,
    "hidden+factors": HiddenFactorsRouter,
    "one_pass": OnePassRouter,
    "projected": ProjectedRouter,
    "projected_once": ProjectedOnceRouter,
    "untrained": UntrainedRouter,
}
"""The built-in routers that a pruned folder may name; the keys are what its JSON and the command line say."""
BUILT_IN.update(ROUTERS)


def stored_name(router: Router) -> str:
    """What a pruned folder calls the class of `router`; UserError where it is neither built-in nor registered."""
    for name, kind in [*ROUTERS.items(), *OWN_ROUTERS.items()]:
        if type(router) is kind and router_class(name) is kind:
            return name
    raise UserError(
        f"a {type(router).__name__} cannot be stored; stored routers are {', '.join(ROUTERS)}, and classes of your own."
    )


def router_class(name: str) -> type[Router]:
    """The class that a pruned folder calls `name`: built-in, or defined outside of this package.

    Nothing is imported here: a folder may come from anybody, and importing a module runs it. UserError for a name that
    no class has.
    """
    kind = ROUTERS.get(name) or OWN_ROUTERS.get(name)
    if kind is None:
        raise UserError(
            f"router {str(name)[:80]!r} is unknown, must be one of {', '.join(ROUTERS)}.\n"
            "If it is a class of your own, import the module that defines it first."
        )
    return kind


def make_router(name: str, num_blocks: int, hidden_size: int, **options) -> Router:
    """The router called `name`, given those of the arguments that it takes.

    Args:
        num_blocks, hidden_size: of the model.
        options: `width`, `names`, `seed`; None leaves the router's own default.

    Raises:
        UserError: an unknown name. TypeError: an option that no router takes.
    """
    if name not in ROUTERS:
        raise UserError(f"router {name!r} is unknown; choose one of {', '.join(ROUTERS)}.")
    taken = {router: set(inspect.signature(router).parameters) for router in ROUTERS.values()}
    if unknown := set(options) - set().union(*taken.values()):
        raise TypeError(f"no router takes {', '.join(sorted(unknown))}")
    given = {"num_blocks": num_blocks, "hidden_size": hidden_size, **options}
    router = ROUTERS[name]
    return router(**{key: value for key, value in given.items() if key in taken[router] and value is not None})


__all__ = [
    "ROUTERS",
    "DynamicRouter",
    "FixedRouter",
    "HiddenFactorsRouter",
    "HiddenRouter",
    "LocalRouter",
    "OnePassRouter",
    "ProjectedOnceRouter",
    "ProjectedRouter",
    "RandomRouter",
    "RecurrentRouter",
    "Router",
    "RoutingContext",
    "StaticRouter",
    "UntrainedRouter",
    "make_router",
    "router_class",
    "stored_name",
]
