"""The vocabulary a model family is declared in: Key (config), Rule (weights), Family (both).

Everything here is data. `checkpoint` gives it meaning for tensors and `model` for modules;
neither adds a per-family branch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from megatron_patch.config.model import ModelConfig

# Settings whose absence is a meaning: a null in config.json switches them off.
OPTIONAL = frozenset(item.name for item in fields(ModelConfig) if item.default is None)
KINDS = MappingProxyType({item.name: item.type for item in fields(ModelConfig)})


@dataclass(frozen=True)
class Key:
    """One ModelConfig field as a Hugging Face `config.json` spells it.

    `hf` lists the spellings, newest last; a dot descends (`rope_parameters.rope_theta`). `default` is what
    transformers assumes when no spelling is present, `of_config` computes it from the file where it depends on it.
    """

    hf: tuple[str, ...]
    default: Any = None
    of_config: Callable[[Mapping[str, Any]], Any] | None = None
    is_shape: bool = False  # a preset that disagrees cannot describe these weights

    @property
    def is_required(self) -> bool:
        """Whether `config.json` must name it."""
        return self.default is None and self.of_config is None

    def found(self, hf: Mapping[str, Any]) -> Any:
        """The value that `hf` holds; None where it holds none."""
        values = [value for name in self.hf if (value := _descend(hf, name)) is not None]
        return values[-1] if values else None

    def read(self, hf: Mapping[str, Any]) -> Any:
        """The value in `hf`, or the default."""
        found = self.found(hf)
        if found is not None:
            return found
        if any(name in hf for name in self.hf):  # an explicit null switches the feature off
            return self.of_config(hf) if self.of_config else None
        return self.of_config(hf) if self.of_config else self.default


@dataclass(frozen=True)
class Rule:
    """One mcore parameter and the Hugging Face tensors it is made of.

    `{l}` is the layer. `layout` says how the parts become one tensor, `shard` where tensor parallelism cuts it,
    `shape` its full size without vocabulary padding.
    """

    mcore: str
    hf: tuple[str, ...]
    shape: Callable[[ModelConfig], tuple[int, ...]]
    layout: str = "copy"  # copy | qkv | gate_up
    shard: str | None = None  # None (replicated) | column | row | vocab (column, rows padded to divide)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A page of data about one architecture.

    `expects` lists config values that change the mathematics and have only one supported value; `prompt_type` names
    the template of fine-tuning records when the tokenizer brings none.
    """

    name: str
    architecture: str  # config.json: architectures[0]
    keys: dict[str, Key]
    rules: Callable[[ModelConfig], list[Rule]]
    sizes: dict[str, dict[str, Any]]  # config.json fragments
    expects: dict[str, tuple[Any, ...]]
    prompt_type: str

    def config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json` (or a size). Raises ValueError for a missing key or an unsupported value."""
        for name, allowed in self.expects.items():
            value = _descend(hf, name)
            if value is not None and value not in allowed:
                raise ValueError(f"config.json: {name} is {value!r}; {self.name} supports {_listed(allowed)}")
        missing = [key.hf[0] for key in self.keys.values() if key.is_required and key.read(hf) is None]
        if missing:
            raise ValueError(f"config.json: {', '.join(missing)} missing; {self.name} cannot be sized without")
        for field, key in self.keys.items():
            _check_kind(key.hf[0], key.found(hf), KINDS[field])
        values = {field: key.read(hf) for field, key in self.keys.items()}
        null = [key.hf[0] for field, key in self.keys.items() if values[field] is None and field not in OPTIONAL]
        if null:
            raise ValueError(f"config.json: {', '.join(null)} is null; {self.name} needs a value")
        return ModelConfig(**values)

    def hf_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The `config.json` of weights that started here, in the spelling every transformers release reads."""
        keys = {key.hf[0]: getattr(config, field) for field, key in self.keys.items()}
        return {"architectures": [self.architecture], "model_type": self.name, "torch_dtype": dtype, **keys}


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError unless `value` is of a field's `kind`: bool, float, or int (≥ 1, also where it is optional)."""
    if value is None:
        return
    if kind is bool:
        fits, needed = isinstance(value, bool), "true or false"
    elif kind is float:
        fits, needed = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        fits, needed = isinstance(value, int) and not isinstance(value, bool) and value >= 1, "a whole number ≥ 1"
    if not fits:
        raise ValueError(f"config.json: {name} is {value!r}; {needed} is needed")


def _descend(hf: Mapping[str, Any], name: str) -> Any:
    value: Any = hf
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)
