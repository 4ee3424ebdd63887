"""The vocabulary a model family is declared in: Key (config), Rule (weights), Family (both).

Everything here is data. `checkpoint` gives it meaning for tensors and `model` for modules;
neither adds a per-family branch.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from megatron_patch.config.model import ModelConfig

# What a value may be, by field; bool is no number here.
TYPES = {item.name: get_args(item.type) or (item.type,) for item in fields(ModelConfig)}
DEFAULTS = {item.name: item.default for item in fields(ModelConfig)}

LARGEST = 2**31 - 1  # of a size: products of three still fit into what files and tensors count with
SHOWN = 60  # characters of a wrong value in a message

# Settings whose absence is a meaning: a null in config.json switches them off.
OPTIONAL = frozenset(name for name, types in TYPES.items() if type(None) in types)


@dataclass(frozen=True)
class Key:
    """One ModelConfig field as a Hugging Face `config.json` spells it.

    `hf` lists the spellings, the one we write first; a dot descends (`rope_parameters.rope_theta`). Without spellings
    the family has one value, `default` or `of_config`. `default` is what transformers assumes when no spelling is
    present, `of_config` computes it from the file. `read` turns the file's value (or default) into the field's where
    they differ, `write` turns the field back; `holds` is the type of the file's value where it is not the field's.
    """

    hf: tuple[str, ...]
    default: Any = None
    of_config: Callable[[Mapping[str, Any]], Any] | None = None
    is_shape: bool = False  # a preset that disagrees cannot describe these weights
    read: Callable[[Any, Mapping[str, Any]], Any] | None = None
    write: Callable[[ModelConfig], Any] | None = None
    holds: type | None = None
    only_when: tuple[str, tuple[Any, ...]] | None = None  # (an earlier field, its values that give this one a meaning)

    @property
    def is_required(self) -> bool:
        """Whether `config.json` must name it."""
        return self.default is None and self.of_config is None

    def found(self, hf: Mapping[str, Any]) -> Any:
        """The value that `hf` holds; None where it holds none. Raises ValueError when two spellings disagree."""
        held = {name: value for name in self.hf if (value := _descend(hf, name)) is not None}
        if any(value != other for value, other in itertools.combinations(held.values(), 2)):
            spelled = " and ".join(f"{name} is {shown(value)}" for name, value in held.items())
            raise ValueError(f"config.json: {spelled}; they are one setting, so remove the wrong one")
        return next(iter(held.values()), None)

    def resolve(self, hf: Mapping[str, Any]) -> Any:
        """The field's value: as found in `hf`, or the default."""
        value = self.found(hf)
        if value is None:
            is_null = any(name in hf for name in self.hf)  # an explicit null switches the feature off
            is_computed = self.of_config is not None and (is_null or self.default is None)
            value = self.of_config(hf) if is_computed else None if is_null else self.default
        return self.read(value, hf) if self.read and value is not None else value

    def written(self, field: str, config: ModelConfig) -> Any:
        """The value of `field` as the file holds it."""
        return self.write(config) if self.write else getattr(config, field)

    def is_used(self, values: Mapping[str, Any]) -> bool:
        """Whether a model with these field `values` has this setting at all."""
        return self.only_when is None or values[self.only_when[0]] in self.only_when[1]


@dataclass(frozen=True)
class Rule:
    """One mcore parameter and the Hugging Face tensors it is made of.

    `{l}` is the layer, `{e}` the routed expert. `layout` says how the parts become one tensor, `shard` where tensor
    parallelism cuts it, `shape` its full size without vocabulary padding, `layers` which layers have it.
    """

    mcore: str
    hf: tuple[str, ...]
    shape: Callable[[ModelConfig], tuple[int, ...]]
    layout: str = "copy"  # copy | qkv | gate_up
    shard: str | None = None  # None (replicated) | column | row | vocab (column, rows padded to divide)
    layers: str = "all"  # all | dense | moe


@dataclass(frozen=True, kw_only=True)
class Family:
    """A page of data about one architecture.

    `expects` lists config values that change the mathematics and the ones supported (of a list, each element);
    `extras` are keys of a written `config.json` that no field stands for; `prompt_type` names the template of
    fine-tuning records when the tokenizer brings none.
    """

    name: str
    architecture: str  # config.json: architectures[0]
    model_type: str  # config.json: model_type
    keys: dict[str, Key]
    rules: Callable[[ModelConfig], list[Rule]]
    sizes: dict[str, dict[str, Any]]  # config.json fragments
    expects: dict[str, tuple[Any, ...]]
    prompt_type: str
    extras: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}

    def config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json` (or a size). Raises ValueError for a missing key or an unsupported value."""
        _check_not_quantised(hf)
        spellings = [name for key in self.keys.values() for name in key.hf]
        _check_tables(hf, {name.partition(".")[0] for name in (*spellings, *self.expects) if "." in name})
        for name, allowed in self.expects.items():
            value = _descend(hf, name)
            if value is not None and not _is_among(value, allowed):
                raise ValueError(f"config.json: {name} is {shown(value)}; {self.name} supports {_listed(allowed)}")
        for field, key in self.keys.items():
            _check_type(field, key, key.found(hf))
        always = [key for key in self.keys.values() if key.is_required and key.only_when is None]
        self._check_given([key for key in always if key.found(hf) is None])
        values: dict[str, Any] = {}
        for field, key in self.keys.items():
            if key.is_used(values):
                values[field] = key.resolve(hf)
        nulls = [field for field, value in values.items() if value is None]
        self._check_given([self.keys[f] for f in nulls if f not in OPTIONAL or self.keys[f].is_required])
        return ModelConfig(**{field: float(v) if TYPES[field] == (float,) else v for field, v in values.items()})

    def hf_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The `config.json` of weights that started here, in the spelling every transformers release reads.

        Raises ValueError when two fields that the file has one key for differ.
        """
        hf: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": dtype,
            **self.extras(config),
        }
        for field, key in self.keys.items():
            if key.hf and key.is_used(vars(config)):
                _place(hf, key.hf[0], key.written(field, config))
        return hf

    def restated(self, hf: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """`hf`, made to say `config`: untouched where it already does, in the spellings that it uses where not."""
        result = json.loads(json.dumps(hf))
        read = vars(self.config(hf))
        if all(read[field] == value for field, value in vars(config).items() if field in self.keys):
            return result
        ours = self.hf_config(config, dtype="")
        for key in self.keys.values():
            if key.hf and key.is_used(vars(config)):
                held = [name for name in key.hf if _descend(hf, name) is not None]
                for name in held or key.hf[:1]:
                    _replace(result, name, _descend(ours, key.hf[0]))
        return result

    def _check_given(self, lacking: list[Key]) -> None:
        if lacking:
            names = ", ".join(key.hf[0] for key in lacking)
            raise ValueError(f"config.json: {names} missing or null; {self.name} needs a value")


def _check_not_quantised(hf: Mapping[str, Any]) -> None:
    for name in ("quantization_config", "compression_config"):
        found = hf.get(name)
        if found:
            method = found.get("quant_method") if isinstance(found, Mapping) else found
            raise ValueError(
                f"config.json: {name} says that the weights are quantised ({shown(method)}); take the checkpoint in "
                "fp32, fp16 or bf16, or remove the key where they are in one of these"
            )


def _check_tables(hf: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError where a table is none, or holds tables of its own, as one per kind of layer."""
    for name in sorted(names):
        table = hf.get(name)
        if table is not None and not isinstance(table, Mapping):
            raise ValueError(f"config.json: {name} is {shown(table)}; an object is needed")
        for inner, value in (table or {}).items():
            if isinstance(value, Mapping):
                raise ValueError(f"config.json: {name}.{inner} is {shown(value)}; one setting for all layers is needed")


def _check_type(field: str, key: Key, value: Any) -> None:
    wanted = key.holds or next(kind for kind in TYPES[field] if kind is not type(None))
    kinds = (int, float) if wanted is float else (wanted,)
    is_zero_a_choice = DEFAULTS[field] == 0  # 0 is a size or a factor only where it means that there is none
    if value is not None and (type(value) not in kinds or not _is_in_range(value, wanted, is_zero_a_choice)):
        noun = {
            int: f"a whole number from {0 if is_zero_a_choice else 1} to {LARGEST}",
            float: f"a finite number {'of 0 or more' if is_zero_a_choice else 'above 0'}",
            bool: "true or false",
            str: "a text",
        }[wanted]
        raise ValueError(f"config.json: {key.hf[0]} is {shown(value)}; {noun} is needed")


def _is_in_range(value: Any, wanted: type, is_zero_a_choice: bool) -> bool:
    if wanted not in (int, float):
        return True
    most = LARGEST if wanted is int else sys.float_info.max
    return (value > 0 or (value == 0 and is_zero_a_choice)) and value <= most


def shown(value: Any) -> str:
    """`value` in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _descend(hf: Mapping[str, Any], name: str) -> Any:
    value: Any = hf
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _place(hf: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    if path and value is None:  # a null inside a table is left out, and with it a table that says nothing
        return
    for part in path:
        hf = hf.setdefault(part, {})
    if hf.get(last, value) != value:
        raise ValueError(f"config.json has one {name} for settings that differ here: {hf[last]!r} and {value!r}")
    hf[last] = value


def _replace(hf: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        hf = hf.setdefault(part, {})
    hf[last] = value


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return value in allowed or (isinstance(value, list) and value != [] and all(item in allowed for item in value))


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)
