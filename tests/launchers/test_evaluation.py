"""ModelLink's evaluation script through a shell: its plan, and a table with every subject and their total."""

import csv
import re

import pytest
from commands import ROOT, through_shell
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, set_seed

SCRIPT = ROOT / "examples/mistral/evaluate_mistral_7b_ptd.sh"
SUBJECTS = re.findall(r"subject: (\w+)", (ROOT / "toolkits/evaluation/tasks/mmlu_local.yaml").read_text())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A tiny model that knows letters and digits, and MMLU with one question for each subject."""
    directory = tmp_path_factory.mktemp("a workplace")
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *"ABCD", "Answer", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(directory / "model")
    set_seed(0)
    config = MistralConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(directory / "model")
    for split, count in (("dev", 5), ("test", 1)):
        (directory / "mmlu data" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with (directory / f"mmlu data/{split}/{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([[f"question {n}", *"wxyz", "A"] for n in range(count)])
    return directory


def test_the_documented_script_is_one_command_for_eight_ranks(tmp_path):
    status, plan, _ = through_shell("dash", SCRIPT, [], tmp_path, MP_DRY_RUN="1")
    assert status == 0
    assert plan["command"][plan["command"].index("--nproc-per-node") + 1] == "8"
    assert plan["environment"]["MP_EVAL_DATA"] == str(tmp_path / "mmlu/data")
    assert '"tp": 8' in plan["command"][plan["command"].index("--model_args") + 1]
    assert [name for name in plan["warnings"] if "mmlu/data" in name]


def test_every_subject_and_the_total_are_told_by_a_run_on_two_ranks(workplace):
    variables = {"CHECKPOINT": "model", "TOKENIZER_MODEL": "model", "DATA_PATH": "./mmlu data/test/"}
    ranks = {"GPUS_PER_NODE": "2", "TP": "2"}
    status, told, error = through_shell("dash", SCRIPT, ["--bf16", "false"], workplace, **variables, **ranks)
    assert status == 0, error
    rows = [[cell.strip(" -") for cell in line.split("|")] for line in told.splitlines() if line.startswith("|")]
    scores = {row[1]: float(row[7]) for row in rows if row[5] == "acc"}
    assert set(scores) == {"mmlu_local", *SUBJECTS}
    subjects = [scores[subject] for subject in SUBJECTS]
    assert scores["mmlu_local"] == pytest.approx(sum(subjects) / len(subjects), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "gsm8k"], "--task is 'gsm8k'; allowed: mmlu, ceval, cmmlu"),
        (["--limits", "3"], "unknown option '--limits'; did you mean --limit?"),
        (["--tensor-model-parallel-size", "3"], "8 ranks (GPUS_PER_NODE) cannot be shared by models on 3 × 1 ranks"),
        (["--load", "nowhere"], "directory 'nowhere' does not exist"),
    ],
)
def test_a_wrong_flag_is_named(arguments, sentence, tmp_path):
    status, _, error = through_shell("dash", SCRIPT, arguments, tmp_path)
    assert status == 2
    assert sentence in error
