"""``quantization_config`` as the integrations need it: the format of a module, by the names that it goes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ..file_format import FORMAT_VERSION, check_version, format_json, read_format
from ..files import CheckpointError
from ..format import Format

_WILDCARDS = frozenset("*?[")


class Patterns:
    """Names and name patterns (fnmatch) of modules: the exact names in a set, since a model has hundreds of each."""

    def __init__(self, patterns: Iterable[str]) -> None:
        patterns = tuple(patterns)
        self._names = frozenset(patterns)
        self._globs = [p for p in patterns if _WILDCARDS & set(p)]

    def match(self, names: Iterable[str]) -> str | None:
        """The pattern that one of ``names`` is or matches; a name comes before a pattern."""
        names = tuple(names)
        exact = next((name for name in names if name in self._names), None)
        return exact or next((p for p in self._globs for name in names if fnmatchcase(name, p)), None)


@dataclass(frozen=True)
class Settings:
    """Which modules are packed, and how: ``default`` for all but those that ``overrides`` (name or pattern → format)
    or ``ignore`` (names or patterns of what stays float) name. ``ignore`` comes first."""

    default: Format
    overrides: Mapping[str, Format] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ignored", Patterns(self.ignore))
        object.__setattr__(self, "_overridden", Patterns(self.overrides))

    @classmethod
    def read(cls, where: str, configuration: object) -> Settings:
        """From the JSON of ``quantization_config`` or inq.json. Raises CheckpointError, with ``where`` in front."""
        # Whoever loads by these settings reads packed codes, and decodes none.
        check_version(where, configuration, FORMAT_VERSION)
        overrides, ignore = configuration.get("overrides") or {}, configuration.get("ignore") or []
        if not isinstance(overrides, dict) or not all(isinstance(value, dict) for value in overrides.values()):
            raise CheckpointError(f"{where}: overrides: expected an object of objects, got {str(overrides)[:80]}")
        if not isinstance(ignore, (list, tuple)) or not all(isinstance(name, str) for name in ignore):
            raise CheckpointError(f"{where}: ignore: expected a list of names, got {str(ignore)[:80]}")
        formats = {name: read_format(f"{where}: overrides: {name!r}", value) for name, value in overrides.items()}
        return cls(read_format(where, configuration), formats, tuple(ignore))

    def to_json(self) -> dict[str, object]:
        """The JSON again, without ``producer``, which says who wrote a file."""
        return {
            "quant_method": "inq",
            "format_version": FORMAT_VERSION,
            **format_json(self.default),
            "ignore": sorted(self.ignore),
            "overrides": {name: format_json(fmt) for name, fmt in self.overrides.items()},
        }

    def ignored(self, *names: str) -> str | None:
        """Which entry of ``ignore`` keeps the module of these names float, or None."""
        return self._ignored.match(names)

    def format_of(self, *names: str) -> Format | None:
        """The format of the module that goes by ``names`` (here, in files, …); None: it stays float."""
        if self.ignored(*names) is not None:
            return None
        pattern = self._overridden.match(names)
        return self.default if pattern is None else self.overrides[pattern]
