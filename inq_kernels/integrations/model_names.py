"""The names of a transformers model's modules: in the model, in its files, with and without the base's prefix."""

from __future__ import annotations

from collections.abc import Iterable

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.quantizers_utils import should_convert_module

from .settings import Patterns


class Names:
    """Names of ``model``'s modules. Some models rename their tensors as they are read: files, and so the configuration
    that ``inq quantize`` writes, have the old ones."""

    def __init__(self, model) -> None:
        self._model = model
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._back = [c.reverse_transform() for c in reversed(conversions) if isinstance(c, WeightRenaming)]

    @property
    def tied(self) -> frozenset[str]:
        """Parameters that share their values with another module's."""
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        return frozenset(tied) | frozenset(tied.values())

    def in_files(self, module: str) -> str:
        """The module's name in the files that ``save_pretrained`` writes."""
        key = f"{module}.weight"
        for renaming in self._back:
            key, _ = renaming.rename_source_key(key)
        return key.removesuffix(".weight")

    def of(self, module: str) -> tuple[str, ...]:
        """All names of a module, the likeliest first: a base model's files may come from a model with a head, and the
        other way round."""
        names, prefix = [], f"{self._model.base_model_prefix}."
        for name in dict.fromkeys((module, self.in_files(module))):
            other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
            names += [name, other] if prefix != "." else [name]
        return tuple(dict.fromkeys(names))

    def check_patterns(self, where: str, patterns: Iterable[str]) -> None:
        """A pattern that matches no module is a typing mistake, and an error."""
        everything = [name for module, _ in self._model.named_modules() for name in self.of(module)]
        for pattern in patterns:
            if Patterns([pattern]).match(everything) is None:
                modules = [name for name, module in self._model.named_modules() if module._parameters]
                raise ValueError(
                    f"{where}: expected a pattern that matches a module, got {pattern!r}; there are {modules}"
                )

    def kept_float(self, quantizer) -> list[str]:
        """What transformers' quantizers leave alone unless told otherwise."""
        return quantizer.get_modules_to_not_convert(self._model, None, self._model._keep_in_fp32_modules)

    def is_kept_float(self, module: str, kept: list[str]) -> bool:
        return not should_convert_module(module, kept)
