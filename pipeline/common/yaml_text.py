"""YAML as configs are written in it: the library's, but a key that stands there twice is an error, not the last one."""

from typing import Any

import yaml

from pipeline.common.errors import ConfigError

_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, source: str) -> Any:
    """The content of one YAML document.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is none.
        ConfigError: a mapping in it has a key twice, or one that is no text; `source` is said to hold it.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_keys(root, source, set())
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node, source: str, seen: set[int]) -> None:
    """In the tree of nodes: what an alias or a merge repeats has each of its keys once there."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _check_keys(one, source, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                _check_key(key, source, lines)
            _check_keys(value, source, seen)


def _check_key(key: yaml.Node, source: str, lines: dict[str, int]) -> None:
    """`lines` has those of the mapping so far, and where they stand."""
    line = key.start_mark.line + 1
    if key.tag != _TEXT:
        named = f" {key.value}" if isinstance(key, yaml.ScalarNode) else ""
        raise ConfigError(f"{source}: line {line}: the key{named} is no text; if it is meant as one, put it in quotes")
    if key.value in lines:
        raise ConfigError(
            f"{source}: line {line}: the key {key.value} stands in line {lines[key.value]} already; keep one"
        )
    lines[key.value] = line
