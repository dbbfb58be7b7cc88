"""Parses YAML like PyYAML, except that a duplicate key is an error."""

from typing import Any

import yaml

from pipeline.common.errors import ConfigError

_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, source: str) -> Any:
    """Return the content of one YAML document.

    Args:
        text: the document.
        source: name of the document for errors.

    Raises:
        yaml.YAMLError: the text is not YAML. ValueError and RecursionError occur too.
        ConfigError: a mapping has a duplicate key, or a key that is not text.
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
    """Check the keys of all mappings below a YAML node. Aliased nodes are visited once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, source, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                _check_key(key, source, lines)
            _check_keys(value, source, seen)


def _check_key(key: yaml.Node, source: str, lines: dict[str, int]) -> None:
    """Check one key of a mapping. `lines` maps the previous keys to their lines."""
    line = key.start_mark.line + 1
    if key.tag != _TEXT:
        named = f" {key.value}" if isinstance(key, yaml.ScalarNode) else ""
        raise ConfigError(f"{source}: line {line}: the key{named} is not text; to use it as text, put it in quotes")
    if key.value in lines:
        raise ConfigError(
            f"{source}: line {line}: duplicate key {key.value}, first in line {lines[key.value]}; remove one"
        )
    lines[key.value] = line
