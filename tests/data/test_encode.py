"""Rows to ids: the boundary rule, the end rule, sampled ids, truncation, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError, DataError
from stepkd.models.spec import tiny_tokenizer
from stepkd.steps.segment import get_segmenter, spans_from_ends, step_ends

PLAIN = PromptTemplate(style="plain", plain="{prompt}")
ROW = {"id": "r", "prompt": "1+2=\n", "solution": "1+2=3\n3\n#### 3"}


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def bpe() -> Any:
    """Byte-level BPE whose merges cross word and line ends, so that tokens straddle prompt and completion."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["A: 7 apples"] * 50 + ["x: 7 apples", "Q: B"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", clean_up_tokenization_spaces=False
    )


def with_specials(tokenizer: Any, single: str) -> Any:
    """A copy of a tokenizer that puts special tokens around every text, as Llama (bos) and T5 (eos) do."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    names = ["<eos>", "<bos>"]
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", clean_up_tokenization_spaces=False
    )


def make(tokenizer: Any, template: PromptTemplate = PLAIN, segmenter: str = "newline", **settings: Any) -> Encoder:
    return Encoder(tokenizer, template, get_segmenter(segmenter), **settings)


def encode(encoder: Encoder, row: dict[str, Any]) -> Completion:
    example = encoder.example(row)
    assert example is not None
    assert spans_from_ends(step_ends(example.spans), len(example.token_ids)) == list(example.spans)
    return example


# ---- the boundary rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gsm8k", "math", "plain", "task"])
def test_separate_training_ids_are_the_inference_ids(tiny: Any, name: str) -> None:
    encoder = make(tiny, get_template(name))
    prompt = encoder.prompt_example({"id": "r", "prompt": ROW["prompt"]})
    example = encode(encoder, ROW)
    assert example.prompt_ids.tolist() == prompt.prompt_ids.tolist()
    assert (len(prompt.token_ids), prompt.spans) == (0, ())
    assert tiny.decode(list(example.prompt_ids)) == get_template(name).render(ROW, tiny)
    assert tiny.decode(list(example.token_ids[:-1])) == ROW["solution"]
    assert example.length == len(example.prompt_ids) + len(example.token_ids)
    assert example.row is ROW


def test_separate_holds_where_bpe_would_merge_across(bpe: Any) -> None:
    row = {"id": "r", "prompt": "A:", "solution": " 7 apples"}
    whole = bpe("A: 7 apples", add_special_tokens=False)["input_ids"]
    encoder = make(bpe)
    example = encode(encoder, row)
    assert (
        tuple(example.prompt_ids) == encoder.prompt_ids(row) == tuple(bpe("A:", add_special_tokens=False)["input_ids"])
    )
    assert (*example.prompt_ids, *example.token_ids[:-1]) != tuple(whole), "the test needs a straddling merge"
    assert bpe.decode(list(example.token_ids[:-1])) == row["solution"]


# ---- the end rule --------------------------------------------------------------------------------------------------


def test_end_token_once_and_in_the_last_step(tiny: Any) -> None:
    example = encode(make(tiny), ROW)
    eos = tiny.eos_token_id
    assert example.token_ids.tolist().count(eos) == 1
    assert example.token_ids[-1] == eos
    assert [tiny.decode(list(example.token_ids[a:b])) for a, b in example.spans] == [
        "1+2=3\n",
        "3\n",
        "#### 3<eos>",
    ]


def test_end_token_is_not_doubled(tiny: Any) -> None:
    twice = encode(make(tiny), ROW | {"solution": ROW["solution"] + "<eos>"})
    assert twice.token_ids.tolist() == encode(make(tiny), ROW).token_ids.tolist()


def test_chat_prompt_has_one_bos(bpe: Any) -> None:
    tokenizer = with_specials(bpe, "<bos> $A")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %} A:"
    ids = make(tokenizer, PromptTemplate(style="chat")).prompt_ids({"id": "r", "prompt": "Q"})
    assert ids.count(tokenizer.bos_token_id) == 1
    plain = make(tokenizer, PLAIN).prompt_ids({"id": "r", "prompt": "Q"})
    assert plain == (tokenizer.bos_token_id, *bpe("Q")["input_ids"])


@pytest.mark.parametrize("prompt", ["Q: B", "Q: B<eos>"])
def test_tokenizer_that_ends_every_text_by_itself(bpe: Any, prompt: str) -> None:
    tokenizer = with_specials(bpe, "<bos> $A <eos>")
    own = tuple(bpe(prompt, add_special_tokens=False)["input_ids"])
    encoder = make(tokenizer)
    assert encoder.prompt_ids({"id": "r", "prompt": prompt}) == (tokenizer.bos_token_id, *own)
    example = encode(encoder, {"id": "r", "prompt": prompt, "solution": "\nB"})
    assert tuple(example.prompt_ids) == (tokenizer.bos_token_id, *own)
    assert example.token_ids.tolist().count(tokenizer.eos_token_id) == 1


# ---- sampled ids ---------------------------------------------------------------------------------------------------


def test_sampled_ids_survive_a_non_canonical_tokenisation(bpe: Any) -> None:
    text = "A: 7 apples"
    canonical = tuple(bpe(text, add_special_tokens=False)["input_ids"])
    spelled = tuple(
        bpe.convert_tokens_to_ids(token) for token in bpe.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]
    )
    assert canonical != spelled
    assert bpe.decode(list(spelled)) == text
    example = encode(make(bpe), {"id": "r", "prompt": "Q", "token_ids": list(spelled), "solution": "ignored"})
    assert tuple(example.token_ids) == spelled


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_nothing_is_appended_to_a_completion(tiny: Any, finish: str) -> None:
    ids = tiny("3\n#### 3")["input_ids"] + ([tiny.eos_token_id] if finish == "stop" else [])
    example = encode(make(tiny), {"id": "r", "prompt": "1", "token_ids": ids, "finish": finish})
    assert list(example.token_ids) == ids


def test_step_ends_of_a_completion_are_kept(tiny: Any) -> None:
    row = {"id": "r", "prompt": "1", "token_ids": tiny("a\nb\nc")["input_ids"]}
    assert encode(make(tiny), row).spans == ((0, 2), (2, 4), (4, 5))
    assert encode(make(tiny), row | {"step_ends": [1, 5]}).spans == ((0, 1), (1, 5))


@pytest.mark.parametrize(
    ("ends", "message"),
    [([2, 9], "must end at the number of token_ids, 5"), ([3, 3, 5], "strictly increasing"), ([], "zero steps")],
)
def test_step_ends_that_do_not_partition(tiny: Any, ends: list[int], message: str) -> None:
    row = {"id": "r7", "prompt": "1", "token_ids": tiny("a\nb\nc")["input_ids"], "step_ends": ends}
    with pytest.raises(DataError, match=rf"^r7, column 'step_ends': .*{message}"):
        make(tiny).example(row)


def test_confidence_segmenters_see_the_logprobs(tiny: Any) -> None:
    class LowConfidence:
        def ends(self, completion: Any) -> list[int]:
            return [i for i, logprob in enumerate(completion.logprobs) if logprob < -1]

    row = {"id": "r", "prompt": "1", "token_ids": tiny("abcd")["input_ids"], "logprobs": [0.0, 0.0, -2.0, 0.0]}
    example = Encoder(tiny, PLAIN, LowConfidence()).example(row)
    assert example is not None
    assert example.spans == ((0, 2), (2, 4))


# ---- truncation ----------------------------------------------------------------------------------------------------


def test_truncation_keeps_whole_steps_and_counts(tiny: Any) -> None:
    full = encode(make(tiny), ROW)
    for max_length in range(len(full.prompt_ids) + 1, full.length + 2):
        encoder = make(tiny, max_length=max_length)
        example = encoder.example(ROW)
        fitting = [span for span in full.spans if len(full.prompt_ids) + span[1] <= max_length]
        if not fitting:
            assert example is None
            assert encoder.counts["rows_without_a_whole_step"] == 1
            continue
        assert example is not None
        assert example.spans == tuple(fitting)
        assert example.token_ids.tolist() == full.token_ids[: fitting[-1][1]].tolist()
        assert encoder.counts["steps_dropped"] == 3 - len(fitting)
        assert encoder.counts["rows_truncated"] == (len(fitting) < 3)


def test_rows_that_do_not_fit_are_left_out(tiny: Any) -> None:
    encoder = make(tiny, max_length=9)
    short = {"id": "s", "prompt": "1", "solution": "2"}
    assert [example.id for example in encoder.examples([ROW, short])] == ["s"]
    assert encoder.counts["rows_without_a_whole_step"] == 1
    with pytest.raises(DataError, match="no row fits into max_length=9 tokens with at least one whole step"):
        encoder.examples([ROW])


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1" * 40, "solution": "2"}, "^bad, column 'prompt': the prompt has 40 tokens and max_length is 32"),
        ({"prompt": "", "solution": "2"}, "bad, column 'prompt': must be text or chat messages, found"),
        ({"prompt": "1\ud8002", "solution": "2"}, "^bad, column 'prompt': character 2 of .* surrogate pair"),
        ({"prompt": "1", "solution": ""}, "^bad, column 'solution': the completion has no steps"),
        ({"prompt": "1", "completion": ""}, "^bad, column 'completion': the completion has no steps"),
        ({"prompt": "1", "token_ids": []}, "^bad, column 'token_ids': the completion has no steps"),
        ({"prompt": "1"}, "^bad, column 'solution': no text to train on: the row needs a 'solution'"),
        ({"prompt": "1", "solution": 7}, "^bad, column 'solution': no text to train on"),
        ({"prompt": "1", "solution": "a\udc00"}, "lone surrogate"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode() if isinstance(value, dict) else "",
)
def test_bad_rows(tiny: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(tiny, max_length=32).example({"id": "bad", **row})


def test_prompt_without_tokens() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    with pytest.raises(DataError, match=r"^r, column 'prompt': the prompt has no tokens"):
        make(tokenizer).prompt_ids({"id": "r", "prompt": " "})


def test_bad_settings(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="max_length=1: at least one prompt and one completion token"):
        make(tiny, max_length=1)


def test_a_prompt_with_room_for_exactly_one_token(tiny: Any) -> None:
    encoder = make(tiny, max_length=3)
    assert len(encode(encoder, {"id": "r", "prompt": "12", "token_ids": tiny("3")["input_ids"]}).token_ids) == 1
