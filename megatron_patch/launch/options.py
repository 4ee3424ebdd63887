"""What follows the positionals: `--flag value` settings that override the derived ones."""

from collections.abc import Iterable, Mapping, Sequence

from megatron_patch.config.flags import known_flags, unknown_flag, updated
from megatron_patch.config.run import RunConfig
from megatron_patch.launch.positional import UsageError

IMPLIED = ("--finetune",)  # what documents add, and every run does that starts from weights


def check_options(options: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError for the first flag that is not `known`, with the nearest one that is."""
    known = list(known)
    for name in names(options):
        if name not in known:
            raise UsageError(unknown_flag(name, known))


def option_value(options: Sequence[str], name: str) -> str | None:
    """What follows `name` in `options`; None where it is not there."""
    for number, text in enumerate(options, 1):
        flag, has_value, value = text.partition("=")
        if flag == name:
            return value if has_value else next(iter(options[number:]), None)
    return None


def settings() -> list[str]:
    """Every flag of a training run, switches in both directions."""
    flags = known_flags()
    return [*flags, *("--no-" + flag.removeprefix("--") for flag in flags), *IMPLIED]


def overridden(run: RunConfig, options: list[str], elsewhere: Mapping[str, str]) -> RunConfig:
    """`run` with known `options` applied; `elsewhere` maps flags that a positional decides to that positional."""
    for name in names(options):
        if name in elsewhere:
            raise UsageError(f"{name} follows from {elsewhere[name]}; set that instead")
    changes = [text for text in options if text not in IMPLIED]
    return updated(run, changes) if changes else run


def names(options: Iterable[str]) -> list[str]:
    """The flags among `options`."""
    return [text.split("=")[0] for text in options if text.startswith("--")]
