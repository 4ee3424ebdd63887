"""Conversations of several turns, in every spelling and template: every answer is learned, and nothing else."""

import json

import numpy as np
import pytest

from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.instructions import InstructionDataset, material_of
from megatron_patch.data.prompts import PROMPTS, Conversation, Turn, ask
from megatron_patch.data.records import conversation, resolve_names
from megatron_patch.data.tokenizer import load_tokenizer

MARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}<<{{ message.content }}>>"
    "{% elif message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [("one?", "first"), ("[/INST] two", "second [/INST] and [INST] third </s> end"), ("three\n", "")]
MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ENDS = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "modellink": "\n</s>"}


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def chatty(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    return tokenizer


def openai(talk, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in talk:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def sharegpt(talk, system=None):
    turns = [{"from": "system", "value": system}] if system else []
    for question, answer in talk:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "conversations": turns}


def sample_of(tmp_path, tokenizer, record, prompt_type=None, length=400):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return InstructionDataset(
        material_of([path], tokenizer, resolve_renderer(prompt_type, tokenizer, "mistral")), length=length
    )[0]


def learned_runs(sample):
    """The labels of every run of learned positions."""
    positions = np.flatnonzero(sample.loss_mask)
    return [sample.labels[run].tolist() for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)]


@pytest.mark.parametrize("spelling", [openai, sharegpt])
@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_chat_template_learns_in_every_turn_what_transformers_marks(spelling, system, tmp_path, tokenizer):
    tokenizer.chat_template = MARKED
    marked = tokenizer.apply_chat_template(
        openai(TALK, system)["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    sample = sample_of(tmp_path, tokenizer, spelling(TALK, system))
    count = len(marked["input_ids"]) - 1
    assert sum(marked["assistant_masks"]) > 9
    assert sample.tokens[:count].tolist() == marked["input_ids"][:-1]
    assert sample.labels[:count].tolist() == marked["input_ids"][1:]
    assert sample.loss_mask.astype(int)[:count].tolist() == marked["assistant_masks"][1:]
    assert not sample.loss_mask[count:].any()


@pytest.mark.parametrize("length", range(20, 90, 7))
def test_truncation_keeps_the_marks_of_what_remains(length, tmp_path, tokenizer):
    whole = sample_of(tmp_path, tokenizer, openai(TALK), "mistral")
    cut = sample_of(tmp_path, tokenizer, openai(TALK), "mistral", length)
    assert all((one == other[:length]).all() for one, other in zip(cut[:3], whole[:3], strict=True))


def test_every_answer_of_a_trimming_template_ends_with_its_own_marker(tmp_path, chatty):
    chatty.chat_template = CHATML
    sample = sample_of(tmp_path, chatty, openai([("q", " spaced\n"), ("q", "has <|im_end|> in it")]))
    runs = [chatty.decode(run) for run in learned_runs(sample)]
    assert runs == ["spaced<|im_end|>", "has <|im_end|> in it<|im_end|>"]


def test_what_a_template_asks_after_the_last_answer_is_not_learned(tmp_path, chatty):
    """Llama 3's first template ends every conversation with the beginning of another answer."""
    chatty.chat_template = (
        "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    )
    sample = sample_of(tmp_path, chatty, openai([("q", "one"), ("r", "two")]))
    assert [chatty.decode(run) for run in learned_runs(sample)] == ["one<|eot_id|>", "two<|eot_id|>"]


def test_an_answer_that_its_template_does_not_end_is_learned_alone(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\n' }}{% endfor %}"
    )
    sample = sample_of(tmp_path, tokenizer, openai([("q", "one"), ("r", "two")]))
    assert [tokenizer.decode(run) for run in learned_runs(sample)] == ["assistant: one", "assistant: two</s>"]


@pytest.mark.parametrize("name", PROMPTS)
def test_every_template_learns_the_answers_and_their_end(name, tmp_path, chatty):
    chatty.pad_token = chatty.eos_token
    sample = sample_of(tmp_path, chatty, openai([("one", "first"), ("two", "second"), ("three", "x")]), name)
    texts = [chatty.decode(run) for run in learned_runs(sample)]
    assert [text.replace(" ", "") for text in texts] == [
        f"{answer}{ENDS.get(name, '</s>')}" for answer in ("first", "second", "x")
    ]


@pytest.mark.parametrize("name", PROMPTS)
def test_what_inference_asks_is_the_beginning_of_what_training_showed(name, tmp_path, chatty):
    renderer = resolve_renderer(name, chatty, "mistral")
    for system in (None, "", "be brief"):
        rendered = renderer.render(Conversation(system, (Turn("why", "this", "because"),)))
        assert rendered.text[: rendered.learned[0][0]] == ask(PROMPTS[name], "why", "this", system)
        assert ("be brief" in rendered.text) == (system == "be brief")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mistral", "[INST] S\n\nq [/INST] a</s>[INST] r [/INST] b</s>"),
        ("llama2", "[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST] b </s>"),
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
        ),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nr<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
        ),
        ("deepseek2", "S\n\nUser: q\n\nAssistant: a</s>User: r\n\nAssistant: b</s>"),
    ],
)
def test_templates_are_those_of_the_published_models(name, text, chatty):
    rendered = resolve_renderer(name, chatty, "mistral").render(
        Conversation("S", (Turn("q", "", "a"), Turn("r", "", "b")))
    )
    assert rendered.text == text


def test_a_template_whose_end_is_no_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"'chatml' ends answers with '<\|im_end\|>', which is no token"):
        resolve_renderer("chatml", tokenizer, "mistral")


def test_a_template_that_refuses_a_system_text_is_named(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + MARKED
    )
    with pytest.raises(ValueError, match=r"line 1: the chat template in .* refuses the conversation \(no system\)"):
        sample_of(tmp_path, tokenizer, openai(TALK, "be brief"))


def test_a_template_that_drops_an_earlier_answer_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = MARKED.replace("message.content }}{{ eos", "loop.last and message.content or '' }}{{ eos")
    with pytest.raises(ValueError, match="line 1: the chat template does not render every answer once"):
        sample_of(tmp_path, tokenizer, openai(TALK))


def test_a_mark_like_ours_in_a_question_is_not_taken_for_an_answer(tmp_path, tokenizer):
    tokenizer.chat_template = MARKED
    with pytest.raises(ValueError, match="does not render every answer once"):
        sample_of(tmp_path, tokenizer, openai([("\ue000answer 0\ue001", "a")]))


@pytest.mark.parametrize("keys", [("instruction", "output"), ("prompt", "completion"), ("question", "answer")])
def test_alpaca_keys_have_synonyms_and_a_system(keys):
    record = {keys[0]: "q", keys[1]: "a", "system": "s", "input": None}
    assert conversation(record) == Conversation("s", (Turn("q", "", "a"),))


def test_what_was_said_before_is_learned_too_unless_no_key_holds_it():
    record = {"instruction": "q", "output": "a", "history": [["one", "two"], ["three", "four"]]}
    before, last = (Turn("one", "", "two"), Turn("three", "", "four")), Turn("q", "", "a")
    assert conversation(record) == Conversation(None, (*before, last))
    for empty in ([], None):
        assert conversation({**record, "history": empty}) == Conversation(None, (last,))
    assert conversation(record, resolve_names('{"history": ""}')) == Conversation(None, (last,))


def test_a_question_that_nobody_answers_is_left_out():
    assert conversation(sharegpt([("q", "a"), ("r", "b")])) == conversation(
        {"conversations": [*sharegpt([("q", "a"), ("r", "b")])["conversations"], {"from": "human", "value": "bye"}]}
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hello"}, "messages is str, not a list"),
        ({"messages": ["hello"]}, "messages: message 1 is str, not an object"),
        ({"messages": []}, "messages holds no answer"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "conversations holds no answer"),
        ({"conversations": [{"from": "gpt", "value": "q"}]}, "message 1 after the system's is of the assistant, not"),
        ({"conversations": [{"from": "robot", "value": "q"}]}, "message 1: from is 'robot', not one of system"),
        (openai([("q", None)]), "message 2: content is NoneType, not text"),
        ({"messages": [{"role": "user"}]}, "message 1: no content among its keys"),
        ({"instruction": "q", "output": "a", "system": 3}, "system is int, not text"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history is no list of pairs"),
    ],
)
def test_a_malformed_conversation_is_explained(record, message):
    with pytest.raises(ValueError, match=message):
        conversation(record)


@pytest.mark.parametrize(
    ("map_keys", "record", "expected"),
    [
        ({"prompt": "q"}, {"q": "a", "instruction": "x", "output": "b", "messages": []}, (None, "a", "", "b")),
        ({"response": "r"}, {"query": "a", "input": "c", "output": "x", "r": "b"}, (None, "a", "c", "b")),
        ({"query": "", "system": ""}, {"query": "a", "input": "x", "output": "b", "system": "x"}, (None, "a", "", "b")),
        ({"query": "about"}, {"prompt": "a", "input": "x", "answer": "b"}, (None, "a", "", "b")),
        ({"system": "s"}, {"s": "z", "system": "x", "prompt": "a", "answer": "b"}, ("z", "a", "", "b")),
        (
            {"messages": "chat"},
            {"messages": [], "chat": [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}]},
            (None, "a", "", "b"),
        ),
    ],
)
def test_parts_stand_under_the_keys_that_are_named(map_keys, record, expected):
    found = conversation(record, resolve_names(json.dumps(map_keys)))
    assert (found.system, *found.turns[0]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt=q", "is not JSON"),
        ("[1]", "list instead of an object"),
        ('{"prompt": 3}', "is no JSON object of names"),
        ("{}", "is no JSON object of names"),
        ('{"query": "", "response": ""}', "names nothing for response"),
        ('{"tools": "h"}', "names 'tools', which is not one of prompt, query, response, system, history, messages"),
        ('{"messages": "m", "response": "r"}', "names messages and response"),
    ],
)
def test_key_maps_that_say_something_else_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        resolve_names(text)


def test_without_the_named_key_a_record_is_refused():
    with pytest.raises(ValueError, match=r"no r among its keys \(instruction, output\)"):
        conversation({"instruction": "a", "output": "b"}, resolve_names('{"response": "r"}'))
