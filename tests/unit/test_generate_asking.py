"""Questions become the tokens that training would have put in front of the answer."""

import json

import pytest

from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.prompts import PROMPTS, Conversation, Turn
from megatron_patch.data.tokenizer import load_tokenizer
from megatron_patch.generate.asking import asked_alone, read_questions, resolve_asking

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TALK = Conversation(None, (Turn("one?", "", "First."), Turn("two?", "", "Second.")))


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


def trained_on(tokenizer, renderer, talk):
    """The ids of a training text up to where its last answer begins."""
    rendered = renderer.render(talk)
    text = rendered.text[: rendered.learned[-1][0]]
    return tokenizer(text, add_special_tokens=renderer.adds_special_tokens).input_ids


@pytest.mark.parametrize("name", ["mistral", "alpaca", "llama2", "modellink", "deepseek2"])
def test_a_question_is_asked_as_training_asked_it_with_one_bos(tokenizer, name):
    asking = resolve_asking(tokenizer, name, "alpaca", wants_own=False)
    renderer = resolve_renderer(name, tokenizer, "alpaca")
    for talk in (TALK, asked_alone("what?"), asked_alone("what?", "Be brief.")):
        ids = asking.tokens(talk)
        assert ids == trained_on(tokenizer, renderer, talk)
        between = len(talk.turns) - 1 if "{bos}" in PROMPTS[name].between else 0  # this template separates turns by it
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1 + between
    assert asking.stops((9,)) == ((9, tokenizer.eos_token_id), ())


def test_the_tokenizers_own_template_comes_first_and_brings_the_only_bos(tokenizer):
    tokenizer.chat_template = LLAMA
    own = resolve_asking(tokenizer, None, "alpaca", wants_own=True)
    ids = own.tokens(TALK)
    assert tokenizer.decode(ids) == "<s>[INST] one? [/INST] First.</s>[INST] two? [/INST]"
    assert ids.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = None
    family = resolve_asking(tokenizer, None, "alpaca", wants_own=False)
    assert "### Instruction:\ntwo?" in tokenizer.decode(family.tokens(TALK))


def test_a_template_without_bos_gets_none(tokenizer):
    tokenizer.chat_template = CHATML
    ids = resolve_asking(tokenizer, None, "alpaca", wants_own=False).tokens(TALK)
    assert ids == trained_on(tokenizer, resolve_renderer(None, tokenizer, "alpaca"), TALK)
    assert tokenizer.bos_token_id not in ids


def test_an_end_that_is_a_token_is_one_and_another_is_a_text(tokenizer):
    tokenizer.chat_template = CHATML
    assert resolve_asking(tokenizer, None, "alpaca", wants_own=False).stops((2,)) == ((2,), ("<|im_end|>",))
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    number = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert resolve_asking(tokenizer, None, "alpaca", wants_own=False).stops((2,)) == ((2, number), ())


def test_text_goes_on_as_it_stands_where_no_template_is_wanted(tokenizer):
    asking = resolve_asking(tokenizer, "none", "alpaca", wants_own=False)
    assert asking.tokens(asked_alone("def f(x):")) == tokenizer("def f(x):").input_ids
    assert asking.stops((2,)) == ((2,), ())


@pytest.mark.parametrize(
    ("name", "wants_own", "sentence"),
    [
        ("llama", False, "--inference-prompt-type is 'llama'; there are mistral, .*, none"),
        (None, True, "--hf-chat-template: the tokenizer in .* has no chat template"),
        ("chatml", False, "ends answers with '<|im_end|>', which is no token"),
    ],
)
def test_a_template_that_is_not_there_is_named(tokenizer, name, wants_own, sentence):
    with pytest.raises(ValueError, match=sentence.replace("|", r"\|")):
        resolve_asking(tokenizer, name, "alpaca", wants_own=wants_own)


def test_questions_are_read_from_prompts_and_messages(tmp_path):
    path = tmp_path / "q.jsonl"
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    records = [{"prompt": "first"}, {"prompt": "second", "system": "S"}, {"messages": messages}]
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    first, second, third = read_questions(path, "told")
    assert (first.system, first.turns[-1].question) == ("told", "first")
    assert (second.system, second.turns[-1].question) == ("S", "second")
    assert [turn.question for turn in third.turns] == ["a", "c"] and third.turns[0].answer == "b"
    path.write_text('{"prompt": "fine"}\n{"question": 1}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: "):
        list(read_questions(path, None))
