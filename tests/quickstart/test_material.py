"""The quickstart's corpus, tokenizer, fine-tuning records and evaluation task."""

import ast
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from examples.quickstart import corpus, task, tokenizer
from examples.quickstart.docstrings import documented_functions
from examples.quickstart.instructions import record

LIBRARY = Path(ast.__file__).parent


@pytest.fixture(scope="module")
def documents():
    """Training and held-out documents of the interpreter that runs the tests."""
    return corpus.split(corpus.documents(LIBRARY))


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    """512 pieces trained on one module."""
    directory = tmp_path_factory.mktemp("quickstart") / "tokenizer"
    tokenizer.save(tokenizer.lines_of([Path(ast.__file__).read_text(encoding="utf-8")]), directory, vocabulary=512)
    return directory


def test_no_document_is_on_both_sides_and_none_is_a_test(documents):
    training, held_out = documents
    assert len(held_out) > 40
    assert not {d["text"] for d in training} & {d["text"] for d in held_out}
    assert not [d["name"] for d in training + held_out if "test" in Path(d["name"]).parts]


def test_a_held_out_copy_of_a_training_file_is_dropped():
    same = [{"name": name, "text": "x = 1\n"} for name in ("a.py", "b.py", "c.py", "d.py", "e.py", "f.py", "g.py")]
    same += [{"name": f"m{i}.py", "text": "x = 1\n"} for i in range(40)]
    assert {corpus.is_held_out(d["name"]) for d in same} == {True, False}
    assert corpus.split(same)[1] == []


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn x\n", "  1234 + 56", "naïve 你好 🙂", "a  b\n\n\n    c", "    a", ""]
)
def test_the_saved_tokenizer_encodes_as_sentencepiece_does(tokenizer_directory, text):
    loaded = AutoTokenizer.from_pretrained(tokenizer_directory)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_directory / "tokenizer.model"))
    ids = loaded(text, add_special_tokens=False).input_ids
    assert ids == reference.encode(text)
    assert loaded.decode(ids) == text


def test_the_saved_tokenizer_has_the_special_tokens_and_size_of_a_llama_tokenizer(tokenizer_directory):
    loaded = AutoTokenizer.from_pretrained(tokenizer_directory)
    assert loaded.is_fast
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, 2, 512)


def test_an_interrupted_tokenizer_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match=r"[Vv]ocab"):
        tokenizer.save(["far too little text"], tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []


def test_a_record_asks_for_the_second_half_of_the_first_sentence():
    source = 'def area(width, height=1):\n    """Return the area\n    of one rectangle.\n\n    More."""\n'
    (function,) = documented_functions([{"name": "a.py", "text": source}])
    assert record(function)["input"] == "def area(width, height=1):\nReturn the area"
    assert record(function)["output"] == "of one rectangle."


def test_task_items_are_balanced_and_offer_one_right_order_of_the_same_words(documents):
    items = task.items(*documents)
    assert len(items) >= 200
    assert set(Counter(item["answer"] for item in items).values()) == {len(items) // 4}
    for item in items:
        assert len(set(item["choices"])) == 4
        assert len({tuple(sorted(choice.split(" "))) for choice in item["choices"]}) == 1


def test_no_task_item_stands_in_the_training_documents(documents):
    training, held_out = documents
    known = "\n".join(" ".join(document["text"].split()) for document in training)
    for item in task.items(training, held_out):
        opening = item["context"].split('"""', 1)[1]
        assert f"{opening} {item['choices'][item['answer']]}" not in known


def test_too_few_items_are_refused(documents):
    training, held_out = documents
    with pytest.raises(ValueError, match="a score needs at least 200"):
        task.items(training, held_out[:3])
