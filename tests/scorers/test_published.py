"""Published reward models on tiny stand-ins: the usage code of their cards, written again, gives the same scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm_standin import StandIn

from stepkd.errors import ConfigError, DataError, ModelError, UnreadableSolution
from stepkd.sampling.config import VLLMServer
from stepkd.scorers.load import TRLPRM, MathShepherdPRM, QwenPRM, load_scorer
from stepkd.scorers.prm import PRMScorer
from stepkd.scorers.published import recognise
from stepkd.scorers.scorer import Solutions, score_one

Sharpen = Callable[[Any], Any]
QUESTIONS = ["Ann has 3 ducks and buys 4. How many?", "What is 7 x 8?"]
SOLUTIONS = [
    [
        ["She has 3 ducks.", "She buys 4 + 3 - 0 more.", "The answer is 7"],
        ["The answer is 12"],
        ["3", "4", "7", "7 - 7"],
    ],
    [["7 x 8 = 54.", "So the answer is 54"], ["It is 56."]],
]
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip


def written(ends: str = "") -> list[Solutions]:
    """The solutions as problems; ``ends`` is what our segmenters leave at a step's end."""
    return [
        Solutions({"id": f"q{q}", "prompt": question}, [[step + ends for step in steps] for steps in SOLUTIONS[q]])
        for q, question in enumerate(QUESTIONS)
    ]


def load_prm(path: str) -> PRMScorer:
    scorer = load_scorer(path)
    assert isinstance(scorer, PRMScorer)
    return scorer


def load_apart(path: str) -> PRMScorer:
    """Prompts are read again for every solution."""
    scorer = load_prm(path)
    scorer.max_rows, scorer.shared_prefix = 2, False
    return scorer


def assert_scores(scorer: PRMScorer, reference: Callable[[str, Sequence[str]], list[float]]) -> None:
    """The scorer agrees with the card, whatever the white space at the steps' ends."""
    expected = [
        [reference(question, steps) for steps in solutions]
        for question, solutions in zip(QUESTIONS, SOLUTIONS, strict=True)
    ]
    values = [value for problem in expected for scores in problem for value in scores]
    assert len(values) == 11
    assert max(values) - min(values) > 0.02, "scores that tell steps apart"
    assert abs(values[0] - 0.5) > 1e-3, "classes in the other order would give 1 - p"
    for ends in ("", "\n", "\n\n"):
        found = scorer.score(written(ends))
        assert [value for problem in found for scores in problem for value in scores] == pytest.approx(values, abs=2e-5)


def assert_not_scored(scorer: PRMScorer, marked: str) -> None:
    """A solution with the marker in a step has no scores; the one beside it has its own."""
    with pytest.raises(UnreadableSolution, match=r"the step marker .* is in the solution itself"):
        scorer.encoder.layout([marked, "c"])
    marks, correct = scorer.score([Solutions({"id": "x", "prompt": "x"}, [[marked, "c"], ["a", "c"]])])[0]
    assert [math.isnan(value) for value in marks] == [True, True]
    assert correct == pytest.approx(score_one(scorer, "x", ["a", "c"]), abs=2e-5)


# --- Math-Shepherd -------------------------------------------------------------------------------------------------


def sentencepiece_like(style: str) -> Any:
    """Llama's tokenizer in small: pieces with a begin-of-word mark, bytes for the rest, a begin-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(0x21, 0x7F)] + ["к", "и"]
    merges = [("▁", "к"), ("▁к", "и"), ("▁", "+"), ("▁", "-"), ("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("e", "r")]
    merges += [("▁", "и"), (".", "▁T"), ("▁", "S"), ("▁S", "h"), ("d", "u")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("style", ["normalizer", "metaspace"])
def test_math_shepherd(tmp_path: Path, sharpened: Sharpen, style: str) -> None:
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    folder = tmp_path / "math-shepherd-mistral-7b-prm"
    tokenizer = sentencepiece_like(style)
    torch.manual_seed(1)
    model = sharpened(MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=None, **SHAPE))).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def card(question: str, steps: Sequence[str]) -> list[float]:
        candidates = tokenizer.encode("+ -")[1:]
        tag = tokenizer.encode("ки")[-1]
        assert len(candidates) == 2
        solution = "\n".join(f"{step} ки" for step in steps)
        ids = torch.tensor([tokenizer.encode(f"{question} {solution}")])
        with torch.no_grad():
            scores = model(ids).logits[:, :, candidates].softmax(dim=-1)[:, :, 0]
        return scores[ids == tag].tolist()

    assert recognise(str(folder)) == "math-shepherd"
    scorer = load_prm(str(folder))
    assert scorer.meaning == "value", "Monte-Carlo labels"
    assert_scores(scorer, card)
    assert_scores(load_apart(str(folder)), card)
    assert_not_scored(scorer, "a ки b")


def test_math_shepherd_layout_on_a_byte_level_tokenizer(tmp_path: Path, sharpened: Sharpen) -> None:
    """There the space between question and solution has to be written."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = byte_level(bos=None)
    tokenizer.add_tokens(["ки"])
    torch.manual_seed(1)
    model = sharpened(Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **SHAPE))).eval()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    scorer = load_scorer(MathShepherdPRM(str(tmp_path / "m")))
    encode = scorer.encoder.layout(["So it is", "Done"])
    assert tokenizer.decode(encode.ids) == " So it isки\nDoneки"


# --- ASPRM -----------------------------------------------------------------------------------------------------------

CUTS = [[" \n", "If 3", " and 4.\n", "#### 7"], ["  Two", "blanks"], [" It is 7.\nSo", " then"], ["The answer is 7"]]
"""As AdaptiveStep cuts: within lines, with the blanks of the text; the last one as other segmenters leave it."""


def with_mistrals_ids(tokenizer: Any) -> Any:
    """The same pieces, tag and label letters under their ids in Mistral's tokenizer."""
    from transformers import PreTrainedTokenizerFast

    written = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = written["model"]["vocab"]
    pieces |= {"▁к": 1878, "▁и": 839, "▁ки": 12902}
    pieces |= {f"<{i}>": i for i in sorted({*range(12902)} - {*pieces.values()})}
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(written)), unk_token="<unk>",
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


@pytest.mark.parametrize("base", ["normalizer", "metaspace", "byte level"])
def test_asprm(tmp_path: Path, sharpened: Sharpen, base: str) -> None:
    """The released text (a blank on both sides of every tag, a blank first segment with a tag of its own) and ids."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "ASPRM-L"
    if base != "byte level":
        tokenizer, (good, bad, tag) = with_mistrals_ids(sentencepiece_like(base)), (1878, 839, 12902)
    else:
        tokenizer = byte_level(bos="<s>", adds_bos=True)
        tokenizer.add_tokens([" ки", " к", " и"])
        tag, good, bad = (tokenizer.convert_tokens_to_ids(text) for text in (" ки", " к", " и"))
    torch.manual_seed(1)
    model = sharpened(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE))).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def served(question: str, steps: Sequence[str]) -> list[float]:
        text = "".join(f"{step} ки " for step in steps)
        ids = torch.tensor([tokenizer.encode(question + (text if text.startswith(" ") else f" {text}"))])
        with torch.no_grad():
            scores = model(ids).logits[:, :, [good, bad]].softmax(dim=-1)[:, :, 0]
        return scores[ids == tag].tolist()

    assert recognise(str(folder)) == "asprm"
    scorer = load_prm(str(folder))
    assert (scorer.meaning, scorer.encoder.marker_id) == ("value", tag)
    assert scorer.policy.require_step_head().ids.labels == (bad, good)
    expected = [served(QUESTIONS[0], steps) for steps in CUTS]
    assert [len(each) for each in expected] == [4, 2, 2, 1]
    values = [value for each in expected for value in each]
    assert max(values) - min(values) > 0.02
    for each in (scorer, load_apart(str(folder))):
        found = each.score([Solutions({"id": "q", "prompt": QUESTIONS[0]}, CUTS)])[0]
        assert [value for scores in found for value in scores] == pytest.approx(values, abs=2e-5)
    assert_not_scored(scorer, "a ки b")


# --- Qwen2.5-Math-PRM ----------------------------------------------------------------------------------------------


def byte_level(bos: str | None, *, adds_bos: bool = False) -> Any:
    """A byte-level BPE in small, with Qwen's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>", "<s>"]
    corpus = [*QUESTIONS, *(f"{step}.\n\n{step}\n" for solutions in SOLUTIONS for steps in solutions for step in steps)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*corpus, SYSTEM, "system\nuser\nassistant\n"] * 3, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=bos
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


class ProcessReward(nn.Module):
    """The architecture of the card's remote code, as its weights' names tell it."""

    def __init__(self, vocab_size: int) -> None:
        from transformers import Qwen2Config, Qwen2Model

        super().__init__()
        self.config = Qwen2Config(vocab_size=vocab_size, tie_word_embeddings=False, **SHAPE)
        self.model = Qwen2Model(self.config)
        hidden = self.config.hidden_size
        self.score = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.score(self.model(ids).last_hidden_state)
        return logits


def save_qwen(folder: Path, sharpened: Sharpen) -> tuple[ProcessReward, Any]:
    """Two weight files with an index, and code that must never run."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = byte_level(bos=None)
    torch.manual_seed(1)
    model = sharpened(ProcessReward(len(tokenizer))).eval()
    folder.mkdir()
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    parts = {
        "model-00001-of-00002.safetensors": {k: v for k, v in weights.items() if not k.startswith("score.2")},
        "model-00002-of-00002.safetensors": {k: v for k, v in weights.items() if k.startswith("score.2")},
    }
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = model.config.to_dict() | {
        "architectures": ["Qwen2ForProcessRewardModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
            "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
        },
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_qwen2_rm.py", "modeling_qwen2_rm.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')\n")
    tokenizer.save_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


def test_qwen_prm(tmp_path: Path, sharpened: Sharpen) -> None:
    model, tokenizer = save_qwen(tmp_path / "m", sharpened)

    def card(question: str, steps: Sequence[str]) -> list[float]:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        ids = torch.tensor([tokenizer.encode(text)])
        separator = tokenizer.encode("<extra_0>")[0]
        with torch.no_grad():
            probabilities = model(ids).softmax(dim=-1)
        return probabilities[ids == separator][:, 1].tolist()

    assert recognise(str(tmp_path / "m")) == "qwen-prm"
    scorer = load_prm(str(tmp_path / "m"))
    assert scorer.meaning == "correctness"
    assert_scores(scorer, card)
    assert_scores(load_apart(str(tmp_path / "m")), card)
    assert scorer.policy.causal_lm.lm_head.weight is scorer.policy.causal_lm.get_input_embeddings().weight
    assert_not_scored(scorer, "a <extra_0> b")


def test_a_qwen_prm_on_a_server_scores_as_in_this_process(tmp_path: Path, sharpened: Sharpen) -> None:
    """By /pooling, at every marker, also where a prompt holds some; a server that looks at another tag is told."""
    path = str(tmp_path / "m")
    save_qwen(tmp_path / "m", sharpened)
    here, marked = load_prm(path), Solutions({"id": "m", "prompt": "what is <extra_0>?"}, [["one", "two"]])
    server = StandIn(here.policy, path)
    try:
        there = load_scorer(QwenPRM(path, engine=VLLMServer(server.address)))
        assert isinstance(there, PRMScorer)
        assert there.policy.device.type == "meta"
        for problems in (written(), written("\n"), [marked]):
            pairs = zip(here.score(problems), there.score(problems), strict=True)
            for expected, found in pairs:
                for a, b in zip(expected, found, strict=True):
                    assert b == pytest.approx(a, abs=1e-5)
        assert_not_scored(there, "a <extra_0> b")
        assert there.provenance()["engine"]["vllm"] == "0.0"
        server.spoil = lambda answer: {"data": [{"data": answer["data"][0]["data"][:-1]}]}
        with pytest.raises(
            ModelError, match=r"gives 0 scores for 1 step markers .* --runner pooling .*step_tag_id\": 3"
        ):
            there.score([Solutions({"id": "x", "prompt": "x"}, [["a"]])])
    finally:
        server.close()


def test_load_scorer_knows_published_models(tmp_path: Path, sharpened: Sharpen) -> None:
    save_qwen(tmp_path / "m", sharpened)
    expected = load_prm(str(tmp_path / "m")).score(written())
    for text in (str(tmp_path / "m"), f"qwen-prm:{tmp_path / 'm'}"):
        scorer = load_scorer(text)
        assert scorer.score(written()) == expected
        assert scorer.provenance()["model"] == str(tmp_path / "m")


# --- TRL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", ["none", "not added", "added"])
def test_trl_token_classification(tmp_path: Path, sharpened: Sharpen, bos: str) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer, Qwen2Config, Qwen2ForTokenClassification

    tokenizer = byte_level(bos=None if bos == "none" else "<s>", adds_bos=bos == "added")
    torch.manual_seed(1)
    config = Qwen2Config(vocab_size=len(tokenizer), num_labels=2, **SHAPE)
    sharpened(Qwen2ForTokenClassification(config)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "m").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (tokenizer("x")["input_ids"][0] == 4) == (bos == "added")

    def trained_on(question: str, steps: Sequence[str]) -> list[float]:
        ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        ids = ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
        labelled = []
        for step in steps:
            ids = ids + tokenizer(step, add_special_tokens=False)["input_ids"]
            ids = ids + tokenizer.encode("\n", add_special_tokens=False)
            labelled.append(len(ids) - 1)
        with torch.no_grad():
            return model(torch.tensor([ids])).logits.softmax(-1)[0, labelled, 1].tolist()

    assert recognise(str(tmp_path / "m")) == "trl"
    scorer = load_prm(str(tmp_path / "m"))
    assert_scores(scorer, trained_on)
    lines = ["First\nsecond.", "Third"]  # a newline inside a step is not a separator
    assert score_one(scorer, "p", lines) == pytest.approx(trained_on("p", lines), abs=2e-5)
    other = load_scorer(TRLPRM(str(tmp_path / "m"), separator="."))
    assert score_one(other, "p", lines) != pytest.approx(score_one(scorer, "p", lines))
    with pytest.raises(ConfigError, match="step marker"):
        load_scorer(TRLPRM(str(tmp_path / "m"), separator="\n1. "))
    for steps, message in ((["a", " "], "step 2 has no text"), ([], "a solution without steps")):
        with pytest.raises(DataError, match=message):
            score_one(scorer, "p", steps)


def test_a_head_without_bias_has_a_bias_of_zero(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForTokenClassification

    tokenizer = byte_level(bos=None)
    model = LlamaForTokenClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=2, **SHAPE))
    nn.init.zeros_(model.score.bias)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    expected = load_prm(str(tmp_path / "m")).score(written())
    file = tmp_path / "m" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "score.bias"}, file, metadata={"format": "pt"})
    assert load_prm(str(tmp_path / "m")).score(written()) == expected


# --- what cannot be loaded -----------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForTokenClassification

    tokenizer = byte_level(bos=None)
    folder = tmp_path / "m"
    model = LlamaForTokenClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=2, **SHAPE))

    def save() -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save()
    rewrite(folder, lambda w: {k: v for k, v in w.items() if not k.startswith("score.")})
    with pytest.raises(ModelError, match=r"with a 'score' head: missing \[\], unknown \[\], head \[\]"):
        load_prm(str(folder))
    save()
    rewrite(folder, lambda w: {k: v for k, v in w.items() if "layers.1.mlp.up_proj" not in k})
    with pytest.raises(ModelError, match=r"missing \['model.layers.1.mlp.up_proj.weight'\]"):
        load_prm(str(folder))
    save()
    rewrite(folder, lambda w: w | {"v_head.weight": torch.zeros(1, 32)})
    with pytest.raises(ModelError, match=r"unknown \['v_head.weight'\]"):
        load_prm(str(folder))
    save()
    rewrite(folder, lambda w: w | {"score.weight": torch.zeros(3, 32), "score.bias": torch.zeros(3)})
    with pytest.raises(ModelError, match=r"expected score.weight with two classes"):
        load_prm(str(folder))
    with pytest.raises(ModelError, match=r"expected score.2.weight with two classes"):
        load_scorer(QwenPRM(str(folder)))
    save()
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot load the reward model"):
        load_prm(str(folder))


def test_unknown_paths_and_kinds(tmp_path: Path) -> None:
    assert recognise(str(tmp_path)) is None
    with pytest.raises(ModelError, match="no model folder at"):
        recognise(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("[1]")
    assert recognise(str(tmp_path)) is None
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForPrmModel"]}')
    assert recognise(str(tmp_path)) is None
    with pytest.raises(ModelError, match="no folder 'no-such-organisation/prm' here"):
        load_scorer("qwen-prm:no-such-organisation/prm")
