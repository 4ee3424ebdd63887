"""MODEL_SIZE and a checkpoint directory, together one architecture."""

from megatron_patch.families.resolve import Resolved, from_checkpoint, preset
from megatron_patch.launch.positional import Request, UsageError, place


def resolve_size(request: Request, directory: str | None, size: str = "") -> tuple[Resolved, list[str]]:
    """The architecture, and what is not there yet. `directory` is None where nothing is loaded, `size` is MODEL_SIZE.

    A size has an architecture of its own where the checkpoint is missing. Raises UsageError for `auto` without a
    checkpoint, ValueError for a checkpoint that contradicts the size.
    """
    size = size or request.values["MODEL_SIZE"]
    if directory is None:
        if size == "auto":
            where = place(request.table, "MODEL_SIZE")
            raise UsageError(f"{where} is 'auto', which reads a checkpoint's config.json, and the checkpoint is none")
        return preset(request.families, size), []
    try:
        return from_checkpoint(request.families, size, directory), []
    except FileNotFoundError as error:
        if size == "auto":
            raise
        return preset(request.families, size), [str(error)]
