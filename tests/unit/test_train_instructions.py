"""Whole runs on ModelLink's instruction data, held against runs on the raw records that it was made of."""

import dataclasses
import json

import pytest
import torch
from tiny_training import lines, tiny_run

from megatron_patch.config.data import DataConfig
from megatron_patch.data.index_header import check_instruction_files
from megatron_patch.data.preprocess_instructions import main
from megatron_patch.parallel.mesh import single_process
from megatron_patch.train.loop import train

LENGTH = 600
RECORDS = [{"instruction": f"n{number}", "input": "", "output": "yes " * (number % 7)} for number in range(12)]


@pytest.fixture
def fine_tuning(tmp_path, tokenizer_directory):
    """Makes a run whose every batch is all of the records, in a directory of its own."""
    torch.set_num_threads(1)
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS))

    def make(name: str, *options: str, **data) -> object:
        directory = tmp_path / name
        directory.mkdir()
        run, prefix, count = tiny_run(directory, tokenizer_directory), str(path), len(RECORDS)
        if data.get("is_instruction_dataset"):
            prefix = str(directory / "alpaca")
            arguments = ["--input", str(path), "--output-prefix", prefix, "--handler", "GeneralInstructionHandler"]
            assert main([*arguments, "--tokenizer-model", str(tokenizer_directory), "--append-eod", *options]) == 0
            count = check_instruction_files(prefix).sequences
        return dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, max_position_embeddings=LENGTH, init_method_std=0.5),
            data=DataConfig(
                train_data_path=(prefix,),
                valid_data_path=(prefix,),
                split="100,0,0",
                seq_length=LENGTH,
                max_padding_length=LENGTH,
                tokenizer_model=str(tokenizer_directory),
                **data,
            ),
            train_iters=3,
            eval_iters=0,
            global_batch_size=count,
            micro_batch_size=1,
        )

    return make


def losses(run):
    train(run, single_process())
    found = [line["lm loss"] for line in lines(run) if "lm loss" in line]
    assert len(found) == run.train_iters
    return found


def test_instruction_data_is_trained_on_as_the_records_that_it_was_made_of(fine_tuning):
    raw = losses(fine_tuning("raw", dataset="JSON-SFT", prompt_type="modellink"))
    alone = losses(fine_tuning("alone", is_instruction_dataset=True))
    packed = fine_tuning("packed", "--pack", "--seq-length", str(LENGTH), is_instruction_dataset=True, sft_packing=True)
    assert packed.global_batch_size < len(RECORDS)
    assert alone == pytest.approx(raw, rel=1e-6)
    assert losses(packed) == pytest.approx(raw, rel=1e-6)
    assert len(set(raw)) > 1


def test_a_stopped_run_goes_on_as_if_it_had_not(fine_tuning):
    def smaller(name):
        run = fine_tuning(name, is_instruction_dataset=True)
        return dataclasses.replace(run, global_batch_size=4, train_iters=4)

    whole = losses(smaller("whole"))
    run = smaller("parts")
    losses(dataclasses.replace(run, train_iters=2))
    train(run, single_process())
    found = {line["iteration"]: line["lm loss"] for line in lines(run) if "lm loss" in line}
    assert [found[iteration] for iteration in (1, 2, 3, 4)] == whole
