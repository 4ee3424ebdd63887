"""Whole fine-tuning runs in one process: raw records and `.bin/.idx` samples, alone and packed."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import lines, tiny_run

from megatron_patch.config.data import DataConfig
from megatron_patch.data.preprocess_sft import main
from megatron_patch.parallel.mesh import Axis, single_process
from megatron_patch.train import loop
from megatron_patch.train.loop import train

LENGTH = 96
RECORDS = [{"instruction": f"n{number}", "output": "yes " * (number % 7)} for number in range(20)]


@pytest.fixture
def fine_tuning(tmp_path, tokenizer_directory):
    """Makes a run of the records, in a directory of its own."""
    torch.set_num_threads(1)
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS))

    def make(name: str, dataset: str, *, sft_packing: bool):
        directory = tmp_path / name
        directory.mkdir()
        run = tiny_run(directory, tokenizer_directory)
        data = path
        if dataset == "MMAP-SFT":
            arguments = ["--input", str(path), "--output-prefix", str(directory / "sft"), "--seq-length", str(LENGTH)]
            arguments += ["--tokenizer-model", str(tokenizer_directory), "--family-prompt", "mistral"]
            assert main([*arguments, *["--pack"] * sft_packing]) == 0
            data = directory / "sft_text_document"
        return dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, max_position_embeddings=LENGTH),
            data=DataConfig(
                train_data_path=(str(data),),
                valid_data_path=(str(data),),
                split="60,40,0",
                dataset=dataset,
                seq_length=LENGTH,
                max_padding_length=LENGTH,
                sft_packing=sft_packing,
                tokenizer_model=str(tokenizer_directory),
            ),
        )

    return make


def losses(run):
    """Training losses of a whole run, which must have been logged for every iteration."""
    train(run, single_process())
    found = [line["lm loss"] for line in lines(run) if "lm loss" in line]
    assert len(found) == run.train_iters and np.isfinite(found).all()
    return found


def test_records_and_the_samples_made_of_them_train_alike(fine_tuning):
    raw = losses(fine_tuning("raw", "JSON-SFT", sft_packing=False))
    made = losses(fine_tuning("made", "MMAP-SFT", sft_packing=False))
    assert made == pytest.approx(raw, rel=1e-5)
    assert len(set(raw)) == 4


def test_raw_records_are_shown_as_the_run_will_learn_them(fine_tuning, capsys):
    run = fine_tuning("raw", "JSON-SFT", sft_packing=True)
    train(dataclasses.replace(run, train_iters=1, data=dataclasses.replace(run.data, show_samples=2)), single_process())
    assert capsys.readouterr().out.startswith("<s> [INST] n0 [/INST]⟦ </s>⟧\n\n<s> [INST] n1 [/INST]⟦ yes </s>⟧\n\n")


def test_one_rank_says_what_is_left_out_and_what_has_no_effect(fine_tuning, caplog):
    run = fine_tuning("raw", "JSON-SFT", sft_packing=False)
    Path(run.data.train_data_path[0]).write_text(json.dumps([*RECORDS, {"query": "n " * LENGTH, "output": "lost"}]))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, dataloader_type="cyclic"))
    alone = single_process()
    for rank in range(2):
        loop._batches(run, dataclasses.replace(alone, rank=rank, tp=Axis(rank, 2)), 0)
    effect, left_out = (record.getMessage() for record in caplog.records)
    assert effect.startswith("--dataloader-type cyclic has no effect in fine-tuning")
    assert "1 of 21 records left out" in left_out


@pytest.mark.parametrize("dataset", ["JSON-SFT", "MMAP-SFT"])
def test_a_packed_run_that_was_stopped_goes_on_as_if_it_had_not(dataset, fine_tuning):
    whole = losses(fine_tuning("whole", dataset, sft_packing=True))
    run = fine_tuning("parts", dataset, sft_packing=True)
    losses(dataclasses.replace(run, train_iters=2))
    train(run, single_process())
    found = {line["iteration"]: line["lm loss"] for line in lines(run) if "lm loss" in line}
    assert [found[iteration] for iteration in (1, 2, 3, 4)] == whole
