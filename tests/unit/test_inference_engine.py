"""What an engine answers, beside transformers' own generation on the same files."""

import dataclasses

import pytest
import torch
from beside_transformers import peer
from conversions import run
from speaking import write_speaker

import megatron_patch.inference.engine as engine_module
from megatron_patch.inference.decoding import Decoding
from megatron_patch.inference.engine import open_engine
from megatron_patch.inference.scoring import score

FAMILIES = [
    ("mistral", {"sliding_window": 5}),
    ("mixtral", {"sliding_window": 6}),
    ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }}),
    ("qwen1_5", {}),
    ("qwen1_5", {"tie_word_embeddings": True}),
    ("qwen1_5_moe", {}),
    ("deepseek_v2", {}),
    ("deepseek_v2", {"q_lora_rank": 20}),
]  # fmt: skip
PROMPTS = [[5, 9, 30, 14], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70], [99, 4]]
STOPS, PAD = [2, *range(40, 50)], 1
GREEDY = Decoding(max_new_tokens=20)


def both(directory, family, **options):
    """transformers' model, and an engine of the files that it writes. Each ends a text at any of STOPS."""
    torch.set_num_threads(1)
    theirs = peer(family, **options).eval()
    theirs.generation_config.eos_token_id = STOPS
    theirs.save_pretrained(directory)
    return theirs, open_engine(directory)


def transformers_answer(theirs, prompt, **how):
    """What transformers writes after `prompt`, without the padding, and its scores if there are any."""
    settings = {"pad_token_id": PAD, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    found = theirs.generate(torch.tensor([prompt]), **settings, **how)
    scores = [None] * len(found.sequences) if how.get("num_beams", 1) == 1 else found.sequences_scores.tolist()
    rows = [row[len(prompt) :].tolist() for row in found.sequences]
    ends = [next((place for place, token in enumerate(row, 1) if token in STOPS), None) for row in rows]
    return [(row[:end], score) for row, end, score in zip(rows, ends, scores, strict=True)]


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_a_greedy_answer_is_that_of_transformers_token_for_token(tmp_path, family, options):
    theirs, engine = both(tmp_path, family, **options)
    assert engine.stop_ids == tuple(STOPS)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        ((wanted, _),) = transformers_answer(theirs, prompt, max_new_tokens=20)
        assert list(completion.tokens) == wanted
        assert completion.is_stopped == (wanted[-1] in STOPS)
        assert [completion] == alike(engine.generate([prompt], GREEDY), completion), "a batch is not its rows"


def alike(found, completion):
    """`found` with `completion`'s log-probabilities, once these are shown to be the same up to rounding."""
    assert found[0].log_probs == pytest.approx(completion.log_probs, abs=1e-4)
    return [dataclasses.replace(one, log_probs=completion.log_probs) for one in found]


@pytest.mark.parametrize(("family", "options"), [FAMILIES[0], FAMILIES[-1]])
def test_beams_are_those_of_transformers_with_their_scores(tmp_path, family, options):
    theirs, engine = both(tmp_path, family, **options)
    stopped = set()
    for beams, penalty in ((2, 1.0), (3, 0.0), (4, 2.0)):
        how = {"max_new_tokens": 12, "num_beams": beams, "length_penalty": penalty, "num_return_sequences": 2}
        found = engine.generate(PROMPTS, Decoding(**how))
        for number, prompt in enumerate(PROMPTS):
            ours = found[2 * number : 2 * number + 2]
            for completion, (tokens, total) in zip(ours, transformers_answer(theirs, prompt, **how), strict=True):
                assert list(completion.tokens) == tokens
                assert completion.score == pytest.approx(total, abs=1e-4)
                stopped.add(completion.is_stopped)
    assert stopped == {True, False}, "the case no longer has both a beam that ends and one that is cut"


def test_likelihoods_are_sums_of_transformers_log_probabilities(tmp_path):
    theirs, engine = both(tmp_path, "mistral", sliding_window=5, max_position_embeddings=16)
    pairs = [([5, 9], [30]), ([4] * 9, [8, 10, 12]), ([3, 4, 5, 6] * 5, [9, 11]), ([70], [71, 72, 73, 74])]
    greedy = engine.generate([[5, 9]], Decoding(max_new_tokens=3))[0].tokens
    pairs.append(([5, 9], list(greedy)))
    found = engine.log_likelihoods(pairs, batch_size=2)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        tokens = torch.tensor([context + continuation])[:, -17:]  # the model sees at most 16, and is asked for the last
        with torch.no_grad():
            log_probs = theirs(tokens[:, :-1]).logits[0, -len(continuation) :].log_softmax(-1)
        wanted = log_probs[range(len(continuation)), continuation].sum().item()
        assert value == pytest.approx(wanted, abs=1e-4)
        assert is_greedy == (log_probs.argmax(-1).tolist() == continuation)
    assert found[-1][1], "what greedy decoding writes is the likeliest"


def test_the_log_probabilities_of_an_answer_are_the_models_own(tmp_path):
    _, engine = both(tmp_path, "llama")
    how = Decoding(max_new_tokens=6, do_sample=True, temperature=3.0, top_k=9)
    for completion in engine.generate([PROMPTS[0]], dataclasses.replace(how, num_return_sequences=3)):
        ((value, _),) = engine.log_likelihoods([(PROMPTS[0], completion.tokens)], 1)
        assert sum(completion.log_probs) == pytest.approx(value, abs=1e-3)


def test_drawn_rows_do_not_depend_on_their_batch(tmp_path):
    _, engine = both(tmp_path, "mistral", sliding_window=5)
    how = Decoding(max_new_tokens=10, do_sample=True, seed=5)
    first, second, third = engine.generate([PROMPTS[0]] * 3, how)
    assert len({first.tokens, second.tokens, third.tokens}) == 3
    assert engine.generate([PROMPTS[0]], how)[0].tokens == first.tokens
    several = engine.generate([PROMPTS[0]], dataclasses.replace(how, num_return_sequences=3))
    assert [row.tokens for row in several] == [first.tokens, second.tokens, third.tokens]
    assert engine.generate([PROMPTS[0]], dataclasses.replace(how, seed=6))[0].tokens != first.tokens


def test_drawn_beams_repeat_with_their_seed_and_differ_from_the_likeliest(tmp_path):
    _, engine = both(tmp_path, "mistral", sliding_window=5)
    how = Decoding(max_new_tokens=8, num_beams=3, do_sample=True, temperature=2.0)
    once, again = (engine.generate(PROMPTS[:1], how)[0] for _ in range(2))
    assert once == again
    assert once.tokens != engine.generate(PROMPTS[:1], dataclasses.replace(how, do_sample=False))[0].tokens


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([[]], GREEDY, "prompt 0 is empty"),
        ([[4], [101]], GREEDY, "token ids must be 0 to 100"),
        ([[4] * 64], GREEDY, "a prompt of 64 tokens leaves no room for an answer within 64"),
        ([[4] * 9], Decoding(max_new_tokens=0, max_length=9), "leaves no room for an answer within 9"),
        ([[4]], Decoding(stop_strings=("x",)), "stop strings need a tokenizer"),
        ([[4]], Decoding(num_beams=40), "num_beams 40 is too many for a vocabulary of 101"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_named(tmp_path, prompts, options, sentence):
    _, engine = both(tmp_path, "llama")
    with pytest.raises(ValueError, match=sentence):
        engine.generate(prompts, options)


def test_an_answer_stops_where_the_model_can_see_no_further(tmp_path):
    _, engine = both(tmp_path, "llama")
    (completion,) = engine.generate([[4] * 60], Decoding(max_new_tokens=100, stop_ids=()))
    assert (len(completion.tokens), completion.is_stopped) == (4, False)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"tp": 4}, "num_query_groups 2 is not a multiple of tensor_model_parallel_size 4"),
        ({"pp": 3}, "2 layers cannot be shared equally by 3 pipeline stages"),
        ({"tp": 2}, "tp 2 × pp 1 × cp 1 = 2 does not divide 1 ranks"),
        ({"ep": 2}, "expert_model_parallel_size 2 shares out experts, and the model has none"),
        ({"precision": "fp16"}, "precision is 'fp16'; a model answers in fp32 or bf16"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(tmp_path, how, sentence):
    peer("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        open_engine(tmp_path, **how)


@pytest.mark.parametrize(
    "words", [("mcore", "--tp", 2, "--pp", 2), ("dcp",), ("torch_dist",), ("modellink", "--tp", 2)]
)
def test_any_format_and_layout_answers_alike(tmp_path, tokenizer_directory, words):
    source = write_speaker(tmp_path / "hf", tokenizer_directory)
    assert run(source, tmp_path / "other", "--format", *words) == 0
    wanted, found = (open_engine(place).generate(PROMPTS, GREEDY) for place in (source, tmp_path / "other"))
    assert [(one.tokens, one.text) for one in found] == [(one.tokens, one.text) for one in wanted]


def test_what_ends_a_text_is_read_from_the_checkpoint_or_its_damage_is_named(tmp_path):
    peer("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert open_engine(tmp_path).stop_ids == (9,)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
        open_engine(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_bfloat16_answers_but_routes_in_float32(tmp_path, family):
    peer(family).save_pretrained(tmp_path)
    engine = open_engine(tmp_path, precision="bf16")
    types = {name.endswith("router.weight"): p.dtype for name, p in engine.forward.model.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    assert len(engine.generate(PROMPTS, Decoding(max_new_tokens=4, stop_ids=()))[2].tokens) == 4


def test_a_stop_string_ends_a_row_and_its_text_alone(tmp_path, tokenizer_directory):
    engine = open_engine(write_speaker(tmp_path, tokenizer_directory))
    whole = engine.generate(PROMPTS[:2], Decoding(max_new_tokens=30, stop_ids=()))
    text = whole[0].text
    stop = text[len(text) // 2 :][:3]
    found = engine.generate(PROMPTS[:2], Decoding(max_new_tokens=30, stop_ids=(), stop_strings=(stop,)))
    assert found[0].text == text[: text.index(stop)]
    assert found[0].is_stopped and len(found[0].tokens) < 30
    assert stop in whole[1].text or found[1].tokens == whole[1].tokens


def test_choices_of_one_question_are_one_row_of_one_pass(tmp_path, monkeypatch):
    _, engine = both(tmp_path, "mistral", sliding_window=5)
    context, other = [5, 9, 30, 14], [60, 61]
    pairs = [(context, [7]), (other, [8, 9]), (context, [8]), (context, [14, 7]), (context, [9]), (other, [8, 10])]
    alone = [engine.log_likelihoods([pair], 1)[0] for pair in pairs]
    passed = []
    monkeypatch.setattr(engine_module, "score", lambda forward, rows: passed.append(rows) or score(forward, rows))
    together = engine.log_likelihoods(pairs, 8)
    assert [flag for _, flag in together] == [flag for _, flag in alone]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-5)
    assert [[row.ends for row in rows] for rows in passed] == [[(7,), (7, 8, 9), (9, 10)]]
