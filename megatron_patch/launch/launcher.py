"""What a launcher is, and the arguments that launchers of different kinds share."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_patch.launch.positional import Arg, Table
from megatron_patch.launch.values import WHOLE, one_of, whole


class Launcher:
    """What one script runs: the module that plans it, its tables, the families it serves.

    Several `tables` are spellings of one command that documents give; `format` is what a converter writes. `is_flags`:
    the table names `--flags`, and there are no positionals. Of a training launcher, `implied` are the values that its
    table has no argument for, `flags` the settings of the trainer that it changes (`{NAME}` stands for an argument),
    and `title` is what its runs are called.
    """

    __slots__ = ("families", "flags", "format", "implied", "is_flags", "module", "tables", "title", "variables")

    def __init__(
        self,
        module: str,
        *tables: Table,
        variables: Table = (),
        families: tuple[str, ...] = (),
        format: str = "",
        is_flags: bool = False,
        implied: Mapping[str, object] = MappingProxyType({}),
        flags: tuple[str, ...] = (),
        title: str = "",
    ) -> None:
        self.module, self.tables, self.variables = module, tables, variables
        self.families, self.format, self.is_flags = families, format, is_flags
        self.implied, self.flags, self.title = implied, flags, title


def size(*names: str, formerly: Mapping[str, str] = MappingProxyType({})) -> Arg:
    """MODEL_SIZE of a launcher whose documents name these sizes; `formerly` are names that some of them had once."""

    def parse(text: str) -> str:
        name = one_of(*names, *formerly, "auto")(text)
        return formerly.get(name, name)

    told = "".join(f"; {old} is {name}" for old, name in formerly.items())
    return Arg("MODEL_SIZE", parse, f"{', '.join(names)} or auto (from config.json){told}")


PP0_LAYERS = Arg("MP_PP0_LAYERS", whole, f"{WHOLE}: layers of the first pipeline stage", default="0")
