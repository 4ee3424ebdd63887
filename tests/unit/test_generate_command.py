"""The command as it is typed: what it prints, what it refuses, and a conversation in this process."""

import io
import json
import sys

import pytest
import torch
from speaking import write_speaker

from megatron_patch.generate import __main__ as command
from megatron_patch.generate.asking import asked_alone, resolve_asking
from megatron_patch.generate.chat import chat
from megatron_patch.inference.decoding import Decoding
from megatron_patch.inference.engine import open_engine


@pytest.fixture(scope="module")
def speaker(tmp_path_factory, tokenizer_directory):
    torch.set_num_threads(1)
    return write_speaker(tmp_path_factory.mktemp("speaker"), tokenizer_directory)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command without its signal handlers; returns its status, standard output and error."""
    monkeypatch.setattr(command.signal, "signal", lambda number, handler: None)

    def run(*words):
        status = command.main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_answers_are_printed_as_json_in_the_order_of_the_prompts(run, speaker, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"def f{number}(x):"}) + "\n" for number in range(3)))
    how = ("--checkpoint", speaker, "--max-new-tokens", 5, "--inference-prompt-type", "none", "--json")
    status, out, _ = run(*how, "--prompts", path, "--batch-size", 2)
    records = [json.loads(line) for line in out.splitlines()]
    assert (status, [record["prompt"] for record in records]) == (0, [f"def f{number}(x):" for number in range(3)])
    engine = open_engine(speaker)
    prompt = engine.tokenizer("def f1(x):").input_ids
    (wanted,) = engine.generate([prompt], Decoding(max_new_tokens=5))
    assert (records[1]["tokens"], records[1]["text"]) == (list(wanted.tokens), wanted.text)


def test_every_task_answers(run, speaker):
    tasks = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "return_output_log_probs")
    status, out, _ = run("--checkpoint", speaker, "--prompt", "import os", "--max-new-tokens", 4, "--task", *tasks)
    assert status == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("── ")] == list(tasks)
    assert out.count("You: import os\nAnswer: ") == len(tasks)
    assert out.count("Score: -") == 2 and out.count("Sum of log-probabilities: -") == 1


def test_a_length_bounds_prompt_and_answer_where_no_number_of_new_tokens_does(run, speaker):
    how = ("--checkpoint", speaker, "--inference-prompt-type", "none", "--json", "--max-length", 9)
    record = json.loads(run(*how, "--max-new-tokens", 0, "--prompt", "import os")[1])
    prompt = len(open_engine(speaker).tokenizer("import os").input_ids)
    assert len(record["tokens"]) == 9 - prompt


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--prompt", "a", "--task", "sing"), "invalid choice: 'sing'"),
        ((), "nothing to answer: give --prompt TEXT, --prompts FILE, or --chat"),
        (("--prompt", "a", "--top-p", "2"), "'2' is not a number above 0, at most 1"),
        (("--prompt", "a", "--tp", "0"), "'0' is not a number of at least 1"),
        (("--chat", "--hf-chat-template", "--inference-prompt-type", "mistral"), "name two templates"),
        (("--prompt", "a", "--max-new-tokens", "0", "--max-length", "0"), "one of them must allow a token"),
    ],
)
def test_a_wrong_command_line_is_refused(speaker, capsys, words, sentence):
    with pytest.raises(SystemExit) as ended:
        command.main(["--checkpoint", str(speaker), *words])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--prompt", "a", "--tp", 2), "tp 2 × pp 1 × cp 1 = 2 does not divide 1 ranks"),
        (("--prompt", "a" * 300), "leaves no room for an answer within 200; shorten it"),
        (("--prompt", "a", "--tokenizer", "/nowhere"), "tokenizer directory '/nowhere' does not exist"),
        (("--prompts", "/nowhere.jsonl"), "No such file or directory: '/nowhere.jsonl'"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence_and_status_2(run, speaker, words, sentence):
    status, out, err = run("--checkpoint", speaker, "--inference-prompt-type", "none", *words)
    assert (status, out) == (2, "")
    assert sentence in err and err.count("\n") == 1


def talk(monkeypatch, capsys, speaker, lines, **how):
    """What a conversation of these lines prints, and what was asked of the engine."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    engine = open_engine(speaker)
    asking = resolve_asking(engine.tokenizer, "mistral", "mistral", wants_own=False)
    asked, generate = [], engine.generate

    def noted(prompts, *rest, **more):
        asked.append(prompts[0])
        return generate(prompts, *rest, **more)

    monkeypatch.setattr(engine, "generate", noted)
    chat(engine, asking, Decoding(max_new_tokens=8, stop_ids=(), **how), None)
    return capsys.readouterr().out, asked, asking


def test_a_conversation_remembers_until_it_is_told_to_forget(monkeypatch, capsys, speaker):
    out, asked, asking = talk(monkeypatch, capsys, speaker, "hi\n\nwhat? 世界\nclear\nhi\nquit\nnever\n".encode())
    (first, second, third) = asked
    assert first == third == asking.tokens(asked_alone("hi"))
    said = asking.tokenizer.decode(second)
    assert said.startswith("<s> [INST] hi [/INST]") and said.endswith("[INST] what? 世界 [/INST]")
    answers = [line.partition("Answer: ")[2] for line in out.splitlines() if "Answer: " in line]
    assert len(answers) == 3 and answers[0] == answers[2]
    assert answers[0].strip() in said, "what was streamed is what is remembered"
    assert "never" not in out and out.endswith("You: \n")


def test_the_end_of_the_input_ends_a_conversation(monkeypatch, capsys, speaker):
    out, asked, _ = talk(monkeypatch, capsys, speaker, b"hi")
    assert len(asked) == 1 and out.endswith("You: \n")


def test_a_conversation_that_has_become_too_long_goes_on_after_clear(monkeypatch, capsys, speaker):
    out, asked, _ = talk(monkeypatch, capsys, speaker, b"%s\nhi\n" % (b"x" * 300))
    assert "leaves no room for an answer within 200; shorten it; clear or new begins anew)" in out
    assert len(asked) == 2 and len(asked[1]) < 30
