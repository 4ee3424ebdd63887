"""What the agent tells of the ranks that it starts."""

from megatron_patch.train.agent import ending


def test_only_ranks_that_train_are_said_to_save():
    assert "save" in ending("megatron_patch.train")
    assert "save" not in ending("megatron_patch.generate")
