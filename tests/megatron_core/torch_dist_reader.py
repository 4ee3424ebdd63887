"""Megatron-Core reads our distributed checkpoints and writes them itself: `torch_dist_reader.py CASES.json`.

As `reader.py`, and a case may have a `layout` (Megatron's arguments), which need not be that of the checkpoint, and
`save`, a directory where Megatron-Core writes what it read. With `singleton` it does so with a name for every layer,
expert and half of a SwiGLU.
"""

import json
import sys
from pathlib import Path

import reader
import torch


def load_and_save(case, args, models) -> None:
    """Load the way Megatron does, by the checkpoint's own content metadata, and with nothing missing or left over."""
    from megatron.core import dist_checkpointing

    directory = str(reader.latest(case["root"]))
    assert dist_checkpointing.check_is_distributed_checkpoint(directory)
    common = dist_checkpointing.load_common_state_dict(directory)
    [model] = models
    wanted = model.sharded_state_dict(metadata=dist_checkpointing.load_content_metadata(preloaded_state_dict=common))
    state, unasked, absent = dist_checkpointing.load(wanted, directory, strict="return_all")
    unasked = [name for name in unasked if not name.endswith("_extra_state")]  # Transformer Engine has more of those
    assert not absent and not unasked, (absent, unasked)
    reader.load(model, {name: value for name, value in state.items() if name not in common})
    if "save" in case:
        save(case, args, model)


def save(case, args, model) -> None:
    """Write the model at the case's layout."""
    from megatron.core import dist_checkpointing

    directory, content = Path(case["save"]) / "iter_0000007", {"singleton_local_shards": case["singleton"]}
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
        (directory.parent / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 7, **model.sharded_state_dict(metadata=content)}
    dist_checkpointing.save(state, str(directory), content_metadata=content)


if __name__ == "__main__":
    torch.set_num_threads(1)
    reader.pretend_cuda_is_the_cpu()
    for each in json.loads(Path(sys.argv[1]).read_text()):
        reader.run(each, load_and_save)
