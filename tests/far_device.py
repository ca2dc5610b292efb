"""A device that is not there: tensors whose numbers lie on the CPU and who say they lie on far:0.

As with a GPU, whatever brings its tensors together with those of the CPU (but for a scalar) is an error; only copies
may cross. So a model dispatched over both runs here with its true numbers. Registering it changes this process for
good: what uses it runs in one of its own (`tests/spread_over_two_devices.py`).
"""

import torch
from torch.utils import backend_registration as backends
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

NAME = "far:0"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
crossings: list[tuple[str, str]] = []
"""(from, to) of every copy that crossed."""


class Far(torch.Tensor):
    """Numbers on the CPU that lie on `place`."""

    @staticmethod
    def __new__(cls, numbers, place):
        about = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, device=place, **about)

    def __init__(self, numbers, place):
        self.numbers = numbers

    def __repr__(self):
        return f"{self.device}: {self.numbers}"

    def tolist(self):
        return self.numbers.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Making(TorchDispatchMode):
    """Within, tensors are made where they are wanted."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    if func is aten._fused_sdp_choice.default:
        return 0  # the kernel in plain sums: no other is known for such a device
    places, plain = set(), False  # where its tensors lie, and whether one of them on the CPU is more than a number

    def bare(x):
        nonlocal plain
        if isinstance(x, Far):
            places.add(x.device)
            return x.numbers
        plain = plain or (isinstance(x, torch.Tensor) and x.dim() > 0)
        return x

    inner_args, inner_kwargs = tree_map(bare, args), tree_map(bare, kwargs)
    wanted = kwargs.get("device")
    if func in COPIES:
        place = torch.device(wanted) if wanted is not None else args[0].device
        source = (args[1] if func is aten.copy_.default else args[0]).device
        if source != place:
            crossings.append((str(source), str(place)))
    else:
        if places and plain:
            raise RuntimeError(f"{func}: tensors on {NAME} and on the CPU")
        place = torch.device(wanted) if wanted is not None else next(iter(places), torch.device("cpu"))
    if wanted is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if place.type == "far":
        out = tree_map(lambda x: Far(x, place) if isinstance(x, torch.Tensor) else x, out)
    elif func is aten._to_copy.default and isinstance(args[0], Far) and out is args[0].numbers:
        out = out.clone()
    return return_and_correct_aliasing(func, args, kwargs, out)


class _Module(backends._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def register() -> None:
    """Make the device known, to this process for good."""
    backends._setup_privateuseone_for_python_backend("far", backend_module=_Module())
    made = torch.tensor

    def tensor(data, *, dtype=None, device=None, requires_grad=False):
        """The real one fills the device below the dispatcher."""
        here = made(data, dtype=dtype)
        return (here if device is None else here.to(device)).requires_grad_(requires_grad)

    torch.tensor = tensor
