"""Scores of our checkpoints beside those of lm-eval's own `hf` model, on tasks of every kind of request."""

import json
import os
import shutil
import subprocess
import sys

import lm_eval
import pytest
import torch
import transformers
from lm_eval.tasks import TaskManager

import megatron_patch.evaluate.lm as lm
from megatron_patch.evaluate.__main__ import main

WORDS = ["import", "return", "class Signature", "None of these", "self._parameters", "def"]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} Answer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": "\n  - metric: acc\n  - metric: acc_norm",
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": '{until: ["e"], max_gen_toks: 6}',
        "metric_list": "\n  - metric: exact_match",
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": '""',
        "doc_to_target": "{{text}}",
        "metric_list": "\n  - metric: bits_per_byte",
    },
}


@pytest.fixture(scope="module")
def checkpoint(tokenizer_directory, tmp_path_factory):
    """A tiny random Mistral with a window shorter than the texts, saved by transformers, and a tokenizer beside it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(directory)
    shutil.copytree(tokenizer_directory, directory, dirs_exist_ok=True)
    return str(directory)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of task files, each over the same ten short texts and one that is too long for the model."""
    directory = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": " ".join(WORDS[n % 6 :] * (n % 3 + 1)), "choices": WORDS[n % 4 : n % 4 + 3], "answer": n % 3}
        for n in range(10)
    ]
    lines = directory / "documents.jsonl"
    lines.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, fields in TASKS.items():
        fields = {"task": name, "dataset_path": "json", "test_split": "test"} | fields
        fields["dataset_kwargs"] = f"{{data_files: {{test: '{lines}'}}}}"
        (directory / f"{name}.yaml").write_text("".join(f"{key}: {_yaml(value)}\n" for key, value in fields.items()))
    return str(directory)


def _yaml(value: str) -> str:
    return value if value[0] in "\n{" and "{{" not in value else value if value == '""' else json.dumps(value)


def results(model, tasks: str, **arguments):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, batch_size=4, **arguments
    )
    responses = {
        task: [[response for (response,) in sample["resps"]] for sample in samples]
        for task, samples in found["samples"].items()
    }
    return found["results"], responses


@pytest.fixture(scope="module")
def ours(checkpoint, tasks):
    return results("megatron_patch", tasks, model_args=f"checkpoint={checkpoint}")


def test_every_score_and_every_text_is_that_of_the_hf_model(ours, checkpoint, tasks):
    our_scores, our_responses = ours
    their_scores, their_responses = results("hf", tasks, model_args=f"pretrained={checkpoint}", device="cpu")
    for task in TASKS:
        scores = {name: value for name, value in their_scores[task].items() if isinstance(value, float)}
        assert scores
        for name, value in scores.items():
            assert f"{our_scores[task][name]:.4f}" == f"{value:.4f}", f"{task}: {name}"
    assert our_responses["write"] == their_responses["write"]
    assert any(text for (text,) in our_responses["write"])
    for mine, yours in zip(our_responses["choose"], their_responses["choose"], strict=True):
        assert [flag for _, flag in mine] == [flag for _, flag in yours]
        assert [value for value, _ in mine] == pytest.approx([value for value, _ in yours], abs=1e-4)


def test_the_command_line_on_two_ranks_tells_the_same_scores_once(ours, checkpoint, tasks, tmp_path):
    here = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *here, "--nproc-per-node", "2"]
    command += ["-m", "megatron_patch.evaluate", "--model_args", f"checkpoint={checkpoint},tp=2"]
    command += ["--tasks", ",".join(TASKS), "--include_path", tasks, "--batch_size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    told = sorted((row[5], float(row[7])) for row in table[2:])
    scores, _ = ours
    wanted = [(name, value) for task in TASKS for name, value in scores[task].items() if isinstance(value, float)]
    for (name, shown), (metric, value) in zip(told, sorted(wanted), strict=True):
        assert metric.startswith(name)
        assert shown == pytest.approx(value, abs=6e-4), "the table's writer may show three digits"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": "auto"}, "--batch_size auto must be a whole number of texts"),
        ({"checkpoint": "/nowhere"}, "/nowhere"),
        ({"checkpoint": ""}, "--model_args names no checkpoint; allowed: checkpoint=DIR and tokenizer, tp"),
        ({"dtype": "bfloat16"}, "--model_args has the unknown dtype; allowed: .* precision"),
        ({"tp": "two"}, "--model_args tp is two; allowed: a whole number of ranks ≥ 1"),
        ({"pp": 0}, "--model_args pp is 0; allowed: a whole number of ranks ≥ 1"),
        ({"tp": 3}, "num_attention_heads 4 is not a multiple of tensor_model_parallel_size 3"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, sentence, checkpoint):
    with pytest.raises((ValueError, OSError), match=sentence):
        lm.CheckpointLM(**{"checkpoint": checkpoint} | arguments)


def test_without_the_hub_a_task_of_the_hub_names_the_local_ones(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setitem(os.environ, "HF_ENDPOINT", "https://hub.invalid")
    assert main(["--model_args", f"checkpoint={checkpoint}", "--tasks", "mmlu_anatomy"]) == 2
    assert "the tasks mmlu_local, ceval-valid_local, cmmlu_local read files" in capsys.readouterr().err


def test_temperature_and_sampling_are_understood_as_transformers_does():
    assert lm.choice({})["do_sample"] is False
    assert lm.choice({"temperature": 0.5}) == {"do_sample": True, "temperature": 0.5}
    assert lm.choice({"do_sample": True, "top_k": "5"}) == {"do_sample": True, "temperature": 1.0, "top_k": 5}
    with pytest.raises(ValueError, match="--gen_kwargs repetition_penalty is not known"):
        lm.choice({"repetition_penalty": 2})
