"""YAML as it is read here: a small regular file, every key once, no value that another part of it stands for a lot.

Numbers are those of YAML 1.2, so that 1e-4 is a number and 1:30 and 2024-01-01 are text.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

from latentdiff.errors import InputError

MAX_BYTES = 2**20
MAX_NODES = 50_000  # with those that an alias repeats
MAX_DEPTH = 32
OTHER = ("int", "float", "timestamp")  # which YAML 1.1 sees where 1.2 sees text, or text where it sees a number
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 60


# libyaml's parser, in C, reads a megabyte in seconds, whatever is in it; the other takes minutes.
SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(SafeLoader):  # type: ignore[misc, valid-type]
    """Build plain Python values; a key that is there twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (an instance variable, by its stubs)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in OTHER]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; see `yaml.SafeLoader`."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(problem=f"key {short(key.value)} is there twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_document(self, node: yaml.Node) -> Any:
        """Return the value of a document whose size has been looked at."""
        _size(node, {}, 0)
        return super().construct_document(node)


class Dumper(yaml.SafeDumper):
    """Write what `Loader`, and others, read as what it was."""


NUMBERS = {
    "int": r"[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}",
    "float": r"[-+]?(\.[0-9]{1,400}|[0-9]{1,400}(\.[0-9]{0,400})?)([eE][-+]?[0-9]{1,9})?|[-+]?\.(?i:inf)|\.(?i:nan)",
}
for name, pattern in NUMBERS.items():
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), list("-+.0123456789"))
Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, 0 if node.value.startswith(("0o", "0x")) else 10),
)


def read_yaml(file: str | Path) -> Any:
    """Read a YAML file of at most `MAX_BYTES`.

    Raises:
        InputError: no such file, not a regular one, too large, or not YAML.
    """
    path, name = Path(file), short(str(file))
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        content = b""
        if regular:
            with path.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # the latter of a name with NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read config {name}: {reason}; see configs/ for examples") from error
    if not regular or len(content) > MAX_BYTES:
        raise InputError(f"config {name} must be a file of at most {MAX_BYTES} bytes; see configs/ for examples")
    try:
        return parse_yaml(content.decode("utf-8-sig"), str(file))
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not YAML: {str(error)[-80:]}") from error


def parse_yaml(text: str, name: str) -> Any:
    """Return the value that a text describes.

    Args:
        name: how messages call the text.

    Raises:
        InputError: it is not YAML, or would become too large.
    """
    try:
        return yaml.load(text, Loader)  # noqa: S506  (a safe one)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{short(name)} is not YAML: {' '.join(str(error).split())[:160]}") from error


def dump_yaml(tree: object) -> str:
    """Return a tree as YAML, keys in their order."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)


def short(value: object) -> str:
    """Return a value as messages show it: its beginning, however large it is."""
    return SHORT.repr(value)


def _size(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return how many nodes a value has, written out."""
    if id(node) in sizes:
        return sizes[id(node)]
    if depth > MAX_DEPTH:  # or it holds itself
        raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    size = 1 + sum(_size(part, sizes, depth + 1) for part in parts)
    if size > MAX_NODES:
        raise yaml.YAMLError(f"it has more than {MAX_NODES} values")
    sizes[id(node)] = size
    return size
