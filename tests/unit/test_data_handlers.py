"""ModelLink's handlers: what each makes of the records it is for, and how it says that it cannot."""

import json

import pytest

from megatron_patch.data.handlers import HANDLERS, resolve_handler
from megatron_patch.data.prompts import Conversation, Turn

BELLE = "Human:one\nAssistant:two Human: inside\nHuman:three\nthree more\nAssistant:"
MOSS = {
    "turn_1": {"Human": "<|Human|>: ask <eoh> this<eoh>\n", "MOSS": "<|MOSS|>: say\nthat <eom>\n", "Commands": ""},
    "turn_2": None,
    "turn_10": {"Human": "<|Human|>: more<eoh>", "MOSS": "<|MOSS|>: less<eom>"},
}
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def read(name, record, map_keys=None):
    handler = resolve_handler(name, map_keys and json.dumps(map_keys))
    return handler.read(record, handler.columns)


def single(question, answer, about="", system=None):
    return Conversation(system, (Turn(question, about, answer),))


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("General", {"instruction": "q", "input": "i", "output": "a"}, single("q", "a", "i")),
        ("General", {"instruction": "q", "output": "a", "history": [["x", "y"]]}, single("q", "a")),
        ("General", {"instruction": "q", "input": None, "output": ""}, single("q", "")),
        ("AlpacaStyle", {"instruction": "q", "output": "a", "system": "s"}, single("q", "a", system="s")),
        ("AlpacaStyle", {"instruction": "q", "output": "a", "system": ""}, single("q", "a")),
        (
            "AlpacaStyle",
            {"instruction": "q", "input": "i", "output": "a", "history": [["one", "two"], ["three", "four"]]},
            Conversation(None, (Turn("one", "", "two"), Turn("three", "", "four"), Turn("q", "i", "a"))),
        ),
        ("SharegptStyle", {"conversations": SHARED, "system": "s"}, single("q", "a", system="s")),
        (
            "BelleMultiTurn",
            {"instruction": BELLE, "output": " four "},
            Conversation(None, (Turn("one", "", "two Human: inside"), Turn("three\nthree more", "", "four"))),
        ),
        ("BelleMultiTurn", {"instruction": "Human: one", "output": "two"}, single("one", "two")),
        (
            "LeetcodePython",
            {"code_with_problem": "# Sum\nAdd.\n```python\npass```", "code_only": "pass", "explanation_only": "Why."},
            single("# Sum\nAdd.", "pass\nWhy."),
        ),
        (
            "MOSS",
            {"chat": MOSS},
            Conversation(None, (Turn("ask <eoh> this", "", "say\nthat"), Turn("more", "", "less"))),
        ),
    ],
)
def test_records_become_conversations(name, record, expected):
    assert read(f"{name}InstructionHandler", record) == expected


def test_both_handlers_of_moss_read_the_same():
    assert read("MOSSMultiTurnHandler", {"chat": MOSS}) == read("MOSSInstructionHandler", {"chat": MOSS})


@pytest.mark.parametrize(
    ("record", "end"),
    [
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "### Instruction:\nq\n\n### Input:\ni\n\n### Response: ASSISTANT: a",
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "### Instruction:\nq\n\n### Response: ASSISTANT: a"),
    ],
)
def test_an_empty_input_leaves_nothing_in_an_alpaca_text(record, end):
    text = read("AlpacaPretrainHandler", record)
    assert text.startswith("A chat between a curious user") and text.endswith(f"request.\n\n{end}")


def test_stack_overflows_records_become_texts():
    record = {"title": "lists", "question_body": "How?", "answer_body": "So."}
    text = "In python, lists\n### Question:\nHow?\n### Response:\nSo.\n"
    assert read("StackOverflowPythonPretrainHandler", record) == text
    assert [name for name, handler in HANDLERS.items() if handler.is_text] == [
        *("AlpacaPretrainHandler", "StackOverflowPythonPretrainHandler")
    ]


def test_columns_and_roles_may_have_other_names():
    record = {"ask": "q", "about": "i", "say": "a", "input": "unused"}
    named = {"prompt": "ask", "query": "about", "response": "say"}
    assert read("AlpacaStyleInstructionHandler", record, named) == single("q", "a", "i")
    assert read("GeneralInstructionHandler", record, named | {"query": ""}) == single("q", "a")
    messages = [{"who": "boss", "text": "s"}, {"who": "me", "text": "q"}, {"who": "you", "text": "a"}]
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "me", "assistant_tag": "you", "system_tag": "boss"}
    found = read("SharegptStyleInstructionHandler", {"talk": messages}, {"messages": "talk", "tags": tags})
    assert found == single("q", "a", system="s")


def test_openais_messages_are_read_too():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read("SharegptStyleInstructionHandler", {"messages": messages}, {"messages": "messages"}) == single("q", "a")


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("GeneralInstruction", {"instruction": "q"}, r"no output among its keys \(instruction\)"),
        ("GeneralInstruction", {"instruction": "q", "input": 3, "output": "a"}, "input is int, not text"),
        ("AlpacaStyleInstruction", {"instruction": "q", "output": ["a", "b"]}, "output is list, not text"),
        (
            "AlpacaStyleInstruction",
            {"instruction": "q", "output": "a", "history": [["x"]]},
            "history is no list of pairs",
        ),
        (
            "AlpacaStyleInstruction",
            {"instruction": "q", "output": "a", "history": [["x", 3]]},
            "answer is int, not text",
        ),
        ("SharegptStyleInstruction", {"conversations": "q"}, "conversations is str, not a list of messages"),
        ("SharegptStyleInstruction", {"conversations": SHARED[1:]}, "message 1 .* is of the assistant"),
        ("SharegptStyleInstruction", {"conversations": [{"from": "bot", "value": "a"}]}, "'bot', not one of"),
        ("BelleMultiTurnInstruction", {"instruction": "hello", "output": "a"}, "begins with 'hello', not with Human:"),
        (
            "BelleMultiTurnInstruction",
            {"instruction": "Human:a\nHuman:b\nAssistant:", "output": "c"},
            r"do not take turns \(Human, Human, Assistant\)",
        ),
        ("MOSSMultiTurn", {"chat": "hello"}, "chat is str, not an object of turns"),
        ("MOSSMultiTurn", {"chat": {"turn_1": None}}, "chat holds no turn"),
        ("MOSSInstruction", {"chat": {"turn_1": {"Human": "q"}}}, "no MOSS among its keys"),
        ("LeetcodePythonInstruction", {"code_only": "pass"}, "no code_with_problem among its keys"),
        ("StackOverflowPythonPretrain", {"title": "t"}, "no question_body among its keys"),
    ],
)
def test_what_a_record_lacks_is_said(name, record, message):
    with pytest.raises(ValueError, match=message):
        read(f"{name}Handler", record)


@pytest.mark.parametrize(
    ("name", "map_keys", "message"),
    [
        ("os", None, "handler 'os' is not one of GeneralInstructionHandler, "),
        ("MOSSMultiTurnHandler", "{", "is not JSON"),
        ("MOSSMultiTurnHandler", "[]", "list instead of an object"),
        ("MOSSMultiTurnHandler", '{"prompt": "x"}', "MOSSMultiTurnHandler has no 'prompt', only chat"),
        ("MOSSMultiTurnHandler", '{"chat": 3}', "chat is 3, not the name of a column"),
        ("SharegptStyleInstructionHandler", '{"tags": 3}', "has no 'tags'"),
    ],
)
def test_what_cannot_be_a_handler_is_refused(name, map_keys, message):
    with pytest.raises(ValueError, match=message):
        resolve_handler(name, map_keys)
