"""All methods by name: the one list that `evaluate`, the studies and the comparison with peers read."""

from ftp_lightning.baselines.allocated import BlockInfluence, Default, Dynamic, FirstDense, Static, Uniform
from ftp_lightning.baselines.block_pruner import BlockPruner
from ftp_lightning.baselines.deletion_random import DeletionRandom
from ftp_lightning.baselines.deletion_recent import DeletionRecent
from ftp_lightning.baselines.deletion_surprisal import DeletionSurprisal
from ftp_lightning.baselines.fast_kv import FastKV
from ftp_lightning.baselines.ffn_only import FfnOnly
from ftp_lightning.baselines.gem_filter import GemFilter
from ftp_lightning.baselines.last_block import LastBlockFree
from ftp_lightning.baselines.late_blocks import LateBlocks
from ftp_lightning.baselines.lazy_llm import LazyLLM
from ftp_lightning.baselines.mixture_of_depths import MixtureOfDepths
from ftp_lightning.baselines.peer import Peer, best_form, first_dense
from ftp_lightning.baselines.random_tokens import RandomTokens
from ftp_lightning.baselines.recent_sink import RecentSink
from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.baselines.short_gpt import ShortGPT
from ftp_lightning.baselines.skip_gpt import SkipGPT
from ftp_lightning.baselines.spatten import SpAtten
from ftp_lightning.baselines.zero_tprune import ZeroTPrune

_ALL = (
    Uniform, Default, FirstDense, BlockInfluence, LateBlocks, LastBlockFree, DeletionRecent, DeletionRandom,
    DeletionSurprisal, ShortGPT, BlockPruner, RandomTokens, RecentSink, LazyLLM, FastKV, GemFilter, MixtureOfDepths,
    SkipGPT, FfnOnly, SpAtten, ZeroTPrune, Static, Dynamic,
)  # fmt: skip
METHODS: dict[str, Peer] = {method.name: method() for method in _ALL}
"""By name, in the order of the tables; the last two are FTP's own."""

__all__ = ["METHODS", "Peer", "Profile", "Setting", "best_form", "first_dense"]
