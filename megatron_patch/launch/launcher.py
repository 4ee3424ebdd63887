"""What a launcher is, and the arguments that launchers of different kinds share."""

from megatron_patch.launch.positional import Arg, Table
from megatron_patch.launch.unbuilt import Line
from megatron_patch.launch.values import WHOLE, one_of, whole


class Launcher:
    """What one script runs: the module that plans it, its tables, what it refuses for now, the families it serves.

    Several `tables` are spellings of one command that documents give; `format` is what a converter writes. `is_flags`:
    the table names `--flags`, and there are no positionals.
    """

    __slots__ = ("families", "format", "is_flags", "module", "tables", "unbuilt", "variables")

    def __init__(
        self,
        module: str,
        *tables: Table,
        variables: Table = (),
        unbuilt: tuple[Line, ...] = (),
        families: tuple[str, ...] = (),
        format: str = "",
        is_flags: bool = False,
    ) -> None:
        self.module, self.tables, self.variables, self.unbuilt = module, tables, variables, unbuilt
        self.families, self.format, self.is_flags = families, format, is_flags


def size(*names: str) -> Arg:
    """MODEL_SIZE of a launcher whose documents name these sizes."""
    return Arg("MODEL_SIZE", one_of(*names, "auto"), f"{', '.join(names)} or auto (from config.json)")


PP0_LAYERS = Arg("MP_PP0_LAYERS", whole, f"{WHOLE}: layers of the first pipeline stage", default="0")
