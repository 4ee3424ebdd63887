"""MODEL_SIZE and a checkpoint directory, together one architecture."""

from megatron_patch.families.resolve import Resolved, from_checkpoint, preset
from megatron_patch.launch.positional import UsageError


def resolve_size(
    families: tuple[str, ...], size: str, directory: str | None, where: str = "MODEL_SIZE"
) -> tuple[Resolved, list[str]]:
    """The architecture, and what is not there yet. `directory` is None where nothing is loaded, `where` names `size`.

    A size has an architecture of its own where the checkpoint is missing. Raises UsageError for `auto` without a
    checkpoint, ValueError for a checkpoint that contradicts the size.
    """
    if directory is None:
        if size == "auto":
            raise UsageError(
                f"{where} is 'auto', which reads a checkpoint's config.json, and the checkpoint is none; "
                "name a size, or the directory of a checkpoint"
            )
        return preset(families, size), []
    try:
        return from_checkpoint(families, size, directory), []
    except FileNotFoundError as error:
        if size == "auto":
            raise
        return preset(families, size), [str(error)]
