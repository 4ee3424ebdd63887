"""Fine-tuning records: what is learned is the answer and its end marker, and nothing else."""

import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from megatron_patch.data import instructions
from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.inputs import read_rows
from megatron_patch.data.instructions import InstructionDataset, material_of
from megatron_patch.data.prompts import PROMPTS, Conversation, Rendered, Renderer, Turn, ask
from megatron_patch.data.records import resolve_names
from megatron_patch.data.tokenizer import load_tokenizer

# A Mistral-like conversation; transformers itself marks what stands between the generation tags.
MARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECORDS = [
    {"instruction": "def f(x):", "output": "return x"},
    {"query": "name", "input": "a value", "content": "two\nlines  and  spaces "},
    {"instruction": "marker", "input": None, "response": "first [/INST] then [INST] again </s> end"},
    {"instruction": "[/INST] in the question", "output": "é 世界 �"},
    {"instruction": "nothing", "output": ""},
]


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


def dataset(tmp_path, tokenizer, records, *, prompt_type=None, length=256, lines=False):
    path = tmp_path / "records.json"
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return InstructionDataset(
        material_of([path], tokenizer, resolve_renderer(prompt_type, tokenizer, "mistral")), length=length
    )


def answer_of(record):
    return next(record[key] for key in ("output", "content", "response") if key in record)


def question_of(record):
    question = record.get("instruction", record.get("query"))
    return f"{question}\n{record['input']}" if record.get("input") else question


def learned(sample):
    return sample.labels[sample.loss_mask > 0]


@pytest.mark.parametrize("record", RECORDS, ids=answer_of)
@pytest.mark.parametrize("lines", [False, True])
def test_the_family_template_learns_the_answer_and_eos(record, lines, tmp_path, tokenizer):
    sample = dataset(tmp_path, tokenizer, [record], lines=lines)[0]
    text = f"[INST] {question_of(record)} [/INST] {answer_of(record)}</s>"
    ids = tokenizer(text).input_ids  # BOS as at generation
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    prompt = tokenizer(f"[INST] {question_of(record)} [/INST]").input_ids
    assert ids[: len(prompt)] == prompt
    assert sample.tokens[: len(ids)].tolist() == ids
    assert sample.labels[: len(ids) - 1].tolist() == ids[1:]
    assert np.flatnonzero(sample.loss_mask).tolist() == list(range(len(prompt) - 1, len(ids) - 1))
    assert (sample.tokens.dtype, sample.loss_mask.dtype, len(sample.labels)) == (np.int64, np.float32, 256)


@pytest.mark.parametrize("record", RECORDS, ids=answer_of)
def test_a_chat_template_learns_what_transformers_marks(record, tmp_path, tokenizer):
    tokenizer.chat_template = MARKED
    turns = [
        {"role": "user", "content": question_of(record)},
        {"role": "assistant", "content": answer_of(record)},
    ]
    marked = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    sample = dataset(tmp_path, tokenizer, [record])[0]
    count = len(marked["input_ids"])
    assert sample.tokens[:count].tolist() == marked["input_ids"]
    assert sample.loss_mask[: count - 1].astype(int).tolist() == marked["assistant_masks"][1:]
    assert not sample.loss_mask[count - 1 :].any()


@pytest.mark.parametrize("answer", ["yes", " spaced \n", "x <|im_end|> y"])
def test_a_template_that_trims_and_ends_with_its_own_marker_learns_that_marker(answer, tmp_path, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    sample = dataset(tmp_path, tokenizer, [{"instruction": "q", "output": answer}])[0]
    wanted = tokenizer(f"<|im_start|>assistant\n{answer.strip()}<|im_end|>", add_special_tokens=False).input_ids
    skipped = len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids)
    assert learned(sample).tolist() == wanted[skipped:]


def test_a_template_without_end_marker_gets_eos(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    sample = dataset(tmp_path, tokenizer, [{"instruction": "q", "output": "yes"}])[0]
    assert tokenizer.decode(learned(sample)) == "assistant: yes</s>"


@pytest.mark.parametrize("pad", ["</s>", "<unk>", None])
def test_eos_is_learned_and_padding_is_not_whatever_the_padding_is(pad, tmp_path, tokenizer):
    tokenizer.pad_token = pad
    sample = dataset(tmp_path, tokenizer, [{"instruction": "q", "output": "yes"}])[0]
    last = np.flatnonzero(sample.loss_mask)[-1]
    assert sample.labels[last] == tokenizer.eos_token_id
    assert (sample.tokens[last + 2 :] == tokenizer.convert_tokens_to_ids(pad or "</s>")).all()


def test_a_long_answer_is_cut_and_a_long_prompt_left_out(tmp_path, tokenizer):
    prompt = len(tokenizer("[INST] q [/INST]").input_ids)
    records = [{"instruction": "q", "output": "word " * 99}, {"instruction": "long " * 99, "output": "lost"}]
    ids = tokenizer(f"[INST] q [/INST] {'word ' * 99}</s>").input_ids
    for room in (0, 3):
        cut = dataset(tmp_path, tokenizer, records, length=prompt + room)
        assert (len(cut), cut.skipped) == (1, 1)
        assert learned(cut[0]).tolist() == ids[prompt : prompt + room + 1]
    with pytest.raises(ValueError, match=f"none of 2 records has a prompt of at most {prompt - 1} tokens"):
        dataset(tmp_path, tokenizer, records, length=prompt - 1)


def test_records_keep_their_own_tokens(tmp_path, tokenizer):
    together = dataset(tmp_path, tokenizer, RECORDS)
    apart = [dataset(tmp_path, tokenizer, [record])[0] for record in RECORDS]
    for one, other in zip((together[i] for i in range(len(RECORDS))), apart, strict=True):
        assert [part.tolist() for part in one[:3]] == [part.tolist() for part in other[:3]]


def test_a_token_across_the_boundary_is_learned_and_what_the_tokenizer_appends_is_not(tmp_path, tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    text, path = "def return", tmp_path / "records.json"
    path.write_text('[{"instruction": "q", "output": "a"}]')
    renderer = Renderer(
        lambda record: Rendered(text, ((text.index("return") + 3, len(text)),)), adds_special_tokens=True, template=""
    )
    sample = InstructionDataset(material_of([path], tokenizer, renderer), length=16)[0]
    assert tokenizer.convert_ids_to_tokens(sample.tokens[:4]) == ["<s>", "▁def", "▁return", "</s>"]
    assert np.flatnonzero(sample.loss_mask).tolist() == [1]


def test_alpaca_has_an_input_section_only_with_input(tokenizer):
    both = ask(PROMPTS["alpaca"], "add", "{1} and 2")
    assert both.startswith("Below is an instruction that describes a task, paired with an input")
    assert both.endswith("### Instruction:\nadd\n\n### Input:\n{1} and 2\n\n### Response:\n")
    renderer = resolve_renderer("alpaca", tokenizer, "mistral")
    rendered = renderer.render(Conversation(None, (Turn("add", "", "{3}"),)))
    ((begin, end),) = rendered.learned
    assert "Input" not in rendered.text and rendered.text[begin:end] == "{3}</s>"


def test_a_named_template_wins_over_the_tokenizers(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    sample = dataset(tmp_path, tokenizer, [{"instruction": "q", "output": "yes"}], prompt_type="empty")[0]
    assert tokenizer.decode(sample.tokens[sample.tokens != tokenizer.eos_token_id]).startswith("<s> q\nyes")


def test_an_unknown_template_is_named(tokenizer):
    with pytest.raises(ValueError, match="prompt type 'mixtrall' is not one of mistral, mixtral, alpaca, "):
        resolve_renderer("mixtrall", tokenizer, "mistral")


def test_a_template_that_asks_one_way_and_answers_another_is_refused(tokenizer):
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    with pytest.raises(ValueError, match="generation prompt does not begin the conversation; name a template"):
        resolve_renderer(None, tokenizer, "mistral")


def test_an_answer_that_the_template_rewrites_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = MARKED.replace("message.content }}{{ eos", "message.content.split('#')[-1] }}{{ eos")
    with pytest.raises(ValueError, match=r"record 1: the chat template rewrites the answer 'a # b'"):
        dataset(tmp_path, tokenizer, [{"instruction": "q", "output": "a # b"}])


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        resolve_renderer("mistral", tokenizer, "mistral")


GOOD = '{"instruction": "q", "output": "a"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"instruction": "q"}]', r"record 1: no output or content or .* among its keys \(instruction\)"),
        (GOOD + '{"output": "a"}', "line 2: no instruction or query"),
        (GOOD + '\n{"instruction": "q", "output": 3}', "line 3: output is int, not text"),
        ('{"instruction": "q", "input": ["x"], "output": "a"}', "line 1: input is list, not text"),
        (GOOD + "{'instruction'}", "line 2, column 2: Expecting property name"),
        ('[{"instruction": "q", "output": "a"}', r"line 1, column \d+: Expecting"),
        ("[3]", "record 1: int instead of an object"),
        ('"text"', "line 1: str instead of an object"),
        (GOOD + '{"a":' * 100_000, "line 2: maximum recursion depth"),
        ("[" * 100_000, "maximum recursion depth"),
        (GOOD + '{"n": ' + "9" * 5000 + "}", "line 2: Exceeds the limit"),
        (
            GOOD + r'{"instruction": "a \ud83d", "output": "b"}',
            r"line 2: character 3 is '\\ud83d', half of a surrogate",
        ),
        ("", "holds no record"),
    ],
    ids=range(13),
)
def test_a_malformed_record_is_named_by_file_and_place(text, message, tmp_path, tokenizer):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json[,:]? {message}"):
        InstructionDataset(material_of([path], tokenizer, resolve_renderer(None, tokenizer, "mistral")), length=64)


def test_text_that_is_not_utf8_is_named(tmp_path, tokenizer):
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"instruction": "caf\xe9", "output": "a"}')
    with pytest.raises(ValueError, match=r"bad\.json, line 1, column 21: the byte 0xe9 is not UTF-8"):
        InstructionDataset(material_of([path], tokenizer, resolve_renderer(None, tokenizer, "mistral")), length=64)


def test_a_missing_file_is_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"absent\.json' is no file"):
        InstructionDataset(
            material_of([tmp_path / "absent.json"], tokenizer, resolve_renderer(None, tokenizer, "empty")), length=64
        )


def test_records_are_tokenised_once_per_file_tokenizer_template_and_length(tmp_path, tokenizer, monkeypatch):
    path, cache = tmp_path / "records.json", str(tmp_path / "cache")
    path.write_text(json.dumps(RECORDS))
    read = []

    def noted(path, *arguments):
        read.append(path)
        return read_rows(path, *arguments)

    monkeypatch.setattr(instructions, "read_rows", noted)

    def opened(prompt_type="mistral", length=256, map_keys=None):
        renderer = resolve_renderer(prompt_type, tokenizer, "mistral")
        material = material_of([path], tokenizer, renderer, resolve_names(map_keys))
        return InstructionDataset(material, length=length, cache_path=cache)

    first, again = opened(), opened()
    assert len(read) == 1
    for number in range(len(first)):
        assert all((one == other).all() for one, other in zip(first[number][:3], again[number][:3], strict=True))
    plain = InstructionDataset(
        material_of([path], tokenizer, resolve_renderer("mistral", tokenizer, "mistral")), length=256
    )
    assert [plain.tokens(number) for number in range(5)] == [again.tokens(number) for number in range(5)]
    read.clear()
    short = opened(length=22)
    assert short.skipped == opened(length=22).skipped == len(RECORDS) - len(short) > 0
    opened("empty")
    opened(map_keys='{"query": ""}')
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    opened()
    path.write_text(json.dumps(RECORDS[:2]))
    assert len(opened()) == 2
    assert len(read) == 5
