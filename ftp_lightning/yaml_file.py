"""YAML that a user has written, read in one pass that cannot explode and loses no key."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from ftp_lightning.errors import UserError

DEEPEST, MOST_ALIASES, MOST_KEYS = 40, 100, 10_000
"""How deep YAML may nest, how often it may refer back, and how many keys a map may have with those that it merges
[ours]: a few lines of references or merges expand to gigabytes."""
_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(text: str, path: str) -> Any:
    """The value of YAML from `path`. UserError where it goes beyond the limits, or says a key twice; YAMLError,
    ValueError or RecursionError where it is broken."""
    loader = _Loader(text, path)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which checks each node before anything is built of it."""

    def __init__(self, text: str, path: str):
        super().__init__(text)
        self.path, self.depth, self.aliases = path, 0, 0
        self.keys: dict[int, int] = {}  # of each map, by its node: how many keys it has with those that it merges

    def compose_node(self, parent: Any, index: Any) -> Any:
        nests = self.check_event(yaml.CollectionStartEvent)
        self.depth += nests
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.depth > DEEPEST:
            raise UserError(f"{self.path} nests deeper than {DEEPEST} levels\nSettings need two or three.")
        if self.aliases > MOST_ALIASES:
            raise UserError(f"{self.path} refers back to itself more than {MOST_ALIASES} times\nWrite the values out.")
        node = super().compose_node(parent, index)
        self.depth -= nests
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        counts = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key.value, str))
        if twice := next((key for (_, key), count in counts.items() if count > 1), None):
            raise UserError(f"{self.path} says {twice[:80]} twice\nLeave one of them out.")
        self.keys[id(node)] = sum(self._merged(value) if key.tag == _MERGE else 1 for key, value in node.value)
        if self.keys[id(node)] > MOST_KEYS:
            raise UserError(f"{self.path} merges more than {MOST_KEYS} keys into one map\nWrite the values out.")
        return node

    def _merged(self, value: Any) -> int:
        """How many keys the maps have that `<<` names."""
        maps = value.value if isinstance(value, yaml.SequenceNode) else [value]
        return sum(self.keys.get(id(one), 0) for one in maps)
