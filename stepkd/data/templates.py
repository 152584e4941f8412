"""Prompt templates: from a row to the exact text that a model is given.

The rendered text ends where the completion begins, in training as in sampling. Placeholders are replaced literally,
so braces in a template or a problem (``\\boxed{}``) need no escaping.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from stepkd.data.rows import did_you_mean, filled_text, shown
from stepkd.errors import ConfigError, DataError
from stepkd.settings import build_settings
from stepkd.yaml_files import read_yaml

Style = Literal["chat", "plain"]
Message = dict[str, str]

_STYLES = ("chat", "plain", "auto")
_PLACEHOLDER = "{prompt}"
_ANSWER_PLACEHOLDER = "{answer}"
_OWN_CHAT_KWARGS = {"tokenize", "add_generation_prompt", "continue_final_message", "return_tensors", "return_dict"}


@dataclass(frozen=True)
class Exemplar:
    """A worked example, written for this project (from no dataset)."""

    prompt: str
    """The problem."""
    reasoning: str
    """The solution, one step per line, without the answer line."""
    answer: str
    """The final number."""


_EXEMPLARS = """
A ferry carries 18 cars on each morning trip and 12 cars on each afternoon trip. On Saturday it makes 3 morning
trips and 4 afternoon trips. How many cars does it carry on Saturday?

The morning trips carry 3 * 18 = 54 cars.
The afternoon trips carry 4 * 12 = 48 cars.
Together they carry 54 + 48 = 102 cars.

102

---

Ines is tiling a hallway that is 9 metres long and 2 metres wide. Each square metre takes 25 tiles, and tiles come
in boxes of 50. How many boxes does she need?

The hallway has an area of 9 * 2 = 18 square metres.
It takes 18 * 25 = 450 tiles.
That is 450 / 50 = 9 boxes.

9

---

A choir sells tickets at $14 for adults and half that price for children. It sells 60 tickets, of which one third
are for children, and pays $180 for the hall. How many dollars are left?

A child's ticket costs 14 / 2 = 7 dollars.
There are 60 / 3 = 20 children's tickets and 60 - 20 = 40 adult tickets.
The adults pay 40 * 14 = 560 dollars and the children 20 * 7 = 140 dollars.
The choir takes 560 + 140 = 700 dollars.
After the hall, 700 - 180 = 520 dollars are left.

520

---

Marek's phone battery was full at noon. It lost 20% of its charge by 3 o'clock and then 4 percentage points every
hour. What percentage of charge was left at 8 o'clock?

At 3 o'clock the charge was 100 - 20 = 80 percent.
From 3 to 8 o'clock there are 8 - 3 = 5 hours.
In that time it lost 5 * 4 = 20 percentage points.
So 80 - 20 = 60 percent was left.

60
"""
EXEMPLARS = tuple(
    Exemplar(prompt.replace("\n", " "), reasoning, answer)
    for prompt, reasoning, answer in (each.strip().split("\n\n") for each in _EXEMPLARS.split("---"))
)
"""Worked word problems for few-shot prompts, in the order in which ``few_shot: n`` takes them."""


@dataclass(frozen=True)
class PromptTemplate:
    """How a row's prompt becomes the text a model is given."""

    style: Literal["chat", "plain", "auto"] = "auto"
    """`chat`: the tokenizer's chat template; `plain`: text only; `auto`: chat if the tokenizer has a chat template."""
    system: str | None = None
    """System message; in plain style a first paragraph. None: none of ours."""
    user: str = _PLACEHOLDER
    """Chat style: the user message; must hold `{prompt}` once. Prompts that are chat messages do not pass through."""
    plain: str = _PLACEHOLDER
    """Plain style: the text of one problem; must hold `{prompt}` once and end where the solution begins."""
    few_shot: int | list[dict[str, str]] = 0
    """Worked examples shown first: how many of the built-in ones (0 to 4), or a list of {prompt, solution}."""
    answer_line: str = "#### {answer}"
    """Last line of the built-in examples' solutions; must hold `{answer}` once."""
    separator: str = "\n\n"
    """Plain style: what stands between the system text, the examples and the problem."""
    answer_prefix: str = ""
    """Start of the assistant's answer, put after the prompt as it is; the model goes on from there."""
    chat_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, for example `enable_thinking: false`."""

    def __post_init__(self) -> None:
        if self.style not in _STYLES:
            raise ConfigError(f"style={self.style!r} of a prompt template; {did_you_mean(str(self.style), _STYLES)}")
        for name in ("user", "plain", "answer_line"):
            placeholder = _ANSWER_PLACEHOLDER if name == "answer_line" else _PLACEHOLDER
            count = getattr(self, name).count(placeholder)
            if count != 1:
                raise ConfigError(f"{name} of a prompt template must hold {placeholder} once, found {count} times")
        own = sorted(_OWN_CHAT_KWARGS & set(self.chat_kwargs))
        if own:
            raise ConfigError(f"chat_kwargs must not set {', '.join(own)}: the template sets it itself")
        _check_few_shot(self.few_shot)

    def resolved_style(self, tokenizer: Any) -> Style:
        """Return "chat" or "plain" for a tokenizer.

        Args:
            tokenizer: a transformers tokenizer.

        Raises:
            ConfigError: chat style was asked for and the tokenizer has no chat template.
        """
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if self.style == "chat" and not has_chat:
            raise ConfigError(
                f"style 'chat', but the tokenizer {_name(tokenizer)} has no chat template; use 'plain' (or "
                "'auto'), or a model with a chat template"
            )
        return "chat" if has_chat and self.style != "plain" else "plain"

    def adds_special_tokens(self, tokenizer: Any) -> bool:
        """Whether the rendered text must be tokenised with ``add_special_tokens=True``.

        A chat template writes the model's begin-of-sequence token itself, a plain text does not have one yet. Adding
        it to a chat text gives two, which costs accuracy without any message. A plain template that starts with the
        token's own text is not given a second one either.

        Args:
            tokenizer: a transformers tokenizer.

        Returns:
            True for plain text without a begin-of-sequence token. A tokenizer that also *ends* texts by itself (an
            eos or separator) still does so then: drop what it put after the text.
        """
        if self.resolved_style(tokenizer) == "chat":
            return False
        bos = getattr(tokenizer, "bos_token", None)
        first = self.system if self.system is not None else self.plain
        return not (bos and first.startswith(bos))

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> str:
        """Return the text that a model is given for a row, ready for tokenisation.

        Args:
            row: needs ``prompt``, text or chat messages. Chat messages are used as they are; the system message and
                the worked examples are put before them where they have no system message of their own.
            tokenizer: a transformers tokenizer.

        Returns:
            The text; the completion follows directly.

        Raises:
            DataError: no usable prompt in the row.
            ConfigError: the style does not fit the tokenizer, or its chat template refuses the messages.
        """
        prompt = row.get("prompt")
        if not prompt or not isinstance(prompt, str | list):
            raise DataError(
                f"must be text or chat messages, found {shown(prompt)}", path=_row_name(row), column="prompt"
            )
        if self.resolved_style(tokenizer) == "plain":
            return self._plain_text(_only_text(prompt, row)) + self.answer_prefix
        try:
            text = tokenizer.apply_chat_template(
                self._messages(prompt), tokenize=False, add_generation_prompt=True, **self.chat_kwargs
            )
        except Exception as error:  # templates raise Jinja errors of their own making ("System role not supported")
            raise ConfigError(
                f"the chat template of {_name(tokenizer)} refuses the messages: {error}; drop the system message, "
                "check chat_kwargs, or use style 'plain'"
            ) from error
        return str(text) + self.answer_prefix

    def end_id(self, tokenizer: Any) -> int:
        """The token that ends a completion: in chat style what the chat template writes behind an answer."""
        end = turn_end(tokenizer) if self.resolved_style(tokenizer) == "chat" else None
        return int(tokenizer.eos_token_id if end is None else end)

    def prompt_id(self, tokenizer: Any | None = None) -> str:
        """Return a short stable hash of everything that shapes the text, to be recorded with results.

        Args:
            tokenizer: when given, the resolved style and the tokenizer's chat template count too.

        Returns:
            12 hexadecimal digits.
        """
        shape = asdict(self) | {"few_shot": self._examples()}
        if not shape["few_shot"]:
            del shape["answer_line"]
        if tokenizer is not None:
            shape["style"] = self.resolved_style(tokenizer)
            if shape["style"] == "chat":
                shape["chat_template"] = tokenizer.chat_template
        text = json.dumps(shape, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def _examples(self) -> list[Message]:
        if isinstance(self.few_shot, list):
            return [{"prompt": item["prompt"], "solution": item["solution"]} for item in self.few_shot]
        return [
            {
                "prompt": example.prompt,
                "solution": f"{example.reasoning}\n{self.answer_line.replace(_ANSWER_PLACEHOLDER, example.answer)}",
            }
            for example in EXEMPLARS[: self.few_shot]
        ]

    def _plain_text(self, prompt: str) -> str:
        parts = [] if self.system is None else [self.system]
        for item in self._examples():
            parts.append(self.plain.replace(_PLACEHOLDER, item["prompt"]) + item["solution"])
        parts.append(self.plain.replace(_PLACEHOLDER, prompt))
        return self.separator.join(parts)

    def _messages(self, prompt: str | list[Message]) -> list[Message]:
        before: list[Message] = []
        if isinstance(prompt, list) and prompt[0].get("role") == "system":
            before, prompt = [prompt[0]], prompt[1:]
        elif self.system is not None:
            before = [{"role": "system", "content": self.system}]
        for item in self._examples():
            before.append({"role": "user", "content": self.user.replace(_PLACEHOLDER, item["prompt"])})
            before.append({"role": "assistant", "content": item["solution"]})
        if isinstance(prompt, list):
            return before + prompt
        return [*before, {"role": "user", "content": self.user.replace(_PLACEHOLDER, prompt)}]


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which a tokenizer's chat template ends an answer; None: there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return _turn_end(tokenizer, str(template)) if template else None


def end_ids(tokenizer: Any) -> frozenset[int]:
    """Every token that may end a completion, as far as a tokenizer says: its end token, and the chat template's."""
    return frozenset(int(each) for each in (tokenizer.eos_token_id, turn_end(tokenizer)) if each is not None)


@lru_cache(maxsize=8)
def _turn_end(tokenizer: Any, chat_template: str) -> int | None:
    probe = [{"role": role, "content": text} for role, text in (("user", "Question"), ("assistant", "Answer"))]
    written = ""
    for messages in ([{"role": "system", "content": "System"}, *probe], probe):
        with contextlib.suppress(Exception):  # errors of a template's own making; `render` says so when it is used
            written = str(tokenizer.apply_chat_template(messages, tokenize=False))
    _, found, behind = written.rpartition("Answer")
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    special = {token for token, each in tokenizer.added_tokens_decoder.items() if each.special}
    return next((token for token in ids if token in special or token == tokenizer.eos_token_id), None)


_FIELDS = [each.name for each in fields(PromptTemplate)]


def _check_few_shot(few_shot: object) -> None:
    if isinstance(few_shot, bool) or not isinstance(few_shot, int | list):
        raise ConfigError(f"few_shot must be a number or a list of {{prompt, solution}}, found {shown(few_shot)}")
    if isinstance(few_shot, int):
        if not 0 <= few_shot <= len(EXEMPLARS):
            raise ConfigError(
                f"few_shot={few_shot}: there are {len(EXEMPLARS)} built-in examples, so 0 to {len(EXEMPLARS)}"
            )
        return
    for number, item in enumerate(few_shot, start=1):
        if not isinstance(item, Mapping) or set(item) != {"prompt", "solution"}:
            raise ConfigError(f"few_shot example {number} must have 'prompt' and 'solution' only, found {shown(item)}")
        for name in ("prompt", "solution"):
            wrong = filled_text(item[name])
            if wrong is not None:
                raise ConfigError(f"few_shot example {number}: {name} {wrong}")


def _only_text(prompt: str | list[Message], row: Mapping[str, Any]) -> str:
    """The text of a plain prompt; a lone user message counts as text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return prompt[0]["content"]
    raise DataError(
        f"holds {len(prompt)} chat messages, which plain style cannot write; use style 'chat', or text prompts",
        path=_row_name(row),
        column="prompt",
    )


def _row_name(row: Mapping[str, Any]) -> str | None:
    return f"row {row['id']}" if "id" in row else None


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


TEMPLATES: dict[str, PromptTemplate] = {
    "gsm8k": PromptTemplate(
        user="{prompt}\n\nSolve this step by step, one step per line. "
        "Then write the final answer as a number on a last line of its own, after '#### '.",
        plain="Question: {prompt}\nAnswer:\n",
    ),
    "math": PromptTemplate(
        user="{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        plain="Problem: {prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
        "\nSolution:\n",
        answer_line="The final answer is $\\boxed{{answer}}$.",
    ),
    "plain": PromptTemplate(style="plain", plain="Question: {prompt}\nAnswer:\n"),
    "task": PromptTemplate(style="plain"),
}
"""Built-in templates by name; `task` adds nothing to the prompt (tiny world)."""


def get_template(template: str | Path | PromptTemplate) -> PromptTemplate:
    """Return a template given by name, as a file, or as such.

    Args:
        template: a name in ``TEMPLATES``, the path of a YAML or JSON file with the fields of :class:`PromptTemplate`,
            or a template.

    Raises:
        ConfigError: no template of that name, or a field of the file that is wrong.
        DataError: a file that cannot be read.
    """
    if isinstance(template, PromptTemplate):
        return template
    if isinstance(template, str) and template in TEMPLATES:
        return TEMPLATES[template]
    path = Path(template).expanduser()
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        return read_template(path)
    raise ConfigError(
        f"no prompt template named {str(template)!r}; {did_you_mean(str(template), TEMPLATES)}, or the path of a YAML "
        "file"
    )


def read_template(path: Path) -> PromptTemplate:
    """The template that a YAML or JSON file holds; see :func:`get_template`."""
    raw = read_yaml(path, "prompt template")
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError(f"{path}: no prompt template: must be keys with values ({', '.join(_FIELDS)})")
    try:
        return build_settings(PromptTemplate, raw, str(path))
    except ConfigError as error:
        problem = str(error)
    raise ConfigError(
        problem if str(path) in problem else f"{path}: {problem}"
    )  # alone: whoever asks for the root gets it


def template_name(template: PromptTemplate) -> str:
    """A built-in template's name; of any other the settings that are not the default."""
    known = next((name for name, each in TEMPLATES.items() if each == template), None)
    changed = {f.name: getattr(template, f.name) for f in fields(template) if getattr(template, f.name) != f.default}
    return known or json.dumps({name: value for name, value in changed.items() if value != {}}, ensure_ascii=False)
