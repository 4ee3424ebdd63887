"""Sentences: where the rule cuts, that nothing is lost, and that long texts take time in proportion."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.sentences import split_sentences


@pytest.mark.parametrize(
    "text",
    [
        "One here.|Two there!|Is it three?|Yes…|Four",
        "It costs 3.14 dollars.|Version 2.0 follows.",
        "Dr. J. Smith of the U.S. Army came.|He left (at 5 p.m. sharp).|“Why?”|“Because.”",
        "Use a list, e.g. Fig. 3 or No. 7, cf. Smith.|I said no.|Then what?",
        "1. Boil water.|2. Add tea.",
        "Wait... and see.|Who?!|Me.",
        "the end of line.|Next one\nis wrapped.",
        "A heading|Its paragraph.|Another",
        "今天很好。|我们走吧！|好“是。”|真的？|pi is 3.",
        "هل أنت هنا؟|نعم.",
        "यह एक है।|यह दो है।",
        "Über alles gesprochen.|Änderungen folgen.",
        "no marks at all",
        "ends here.",
    ],
)
def test_sentences_end_where_a_reader_would_say(text):
    expected = text.split("|")
    joined = text.replace("A heading|", "A heading\n\n").replace("paragraph.|", "paragraph.\n \n")
    joined = joined.replace("。|", "。").replace("！|", "！").replace("”|真", "”真").replace("2. Add", "2. Add")
    joined = joined.replace("|2. Add", "\n2. Add").replace("|", "  ")
    assert split_sentences(joined) == expected
    assert "".join(split_sentences(joined, keep_space=True)) == joined


@pytest.mark.parametrize("text", ["", " \n\n "])
def test_no_text_has_no_sentence(text):
    assert split_sentences(text) == []
    assert "".join(split_sentences(text, keep_space=True)) == text


@given(st.text("aA1.!?。” \n\t", max_size=60))
def test_nothing_but_space_is_ever_lost(text):
    assert "".join(split_sentences(text, keep_space=True)) == text
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@pytest.mark.parametrize("unit", [".", " ", "\n ", "a. ", "A. b", "”)", ".”", "9", "9. ", "。"])
def test_time_grows_with_the_length_and_no_faster(unit):
    def seconds(count):
        started = time.process_time()
        split_sentences(unit * count)
        return time.process_time() - started

    assert seconds(100_000) < 20 * seconds(10_000) + 0.5
