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

from stepkd.data.rows import shown
from stepkd.errors import ConfigError, DataError, check_bounds, nearest
from stepkd.settings import build_settings
from stepkd.yaml_files import read_yaml

Style = Literal["chat", "plain"]
Message = dict[str, str]

_PLACEHOLDER = "{prompt}"
_ANSWER = "{answer}"
_BUILT_IN = read_yaml(Path(__file__).with_suffix(".yaml"), "built-in prompt templates")
EXEMPLARS: list[dict[str, str]] = _BUILT_IN["examples"]
"""Worked word problems for few-shot prompts (``prompt``, ``reasoning``, ``answer``), as ``few_shot: n`` takes them."""

_OWN_CHAT_KWARGS = {"tokenize", "add_generation_prompt", "continue_final_message", "return_tensors", "return_dict"}


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
        check_bounds("template.", self)
        for name, placeholder in (("user", _PLACEHOLDER), ("plain", _PLACEHOLDER), ("answer_line", _ANSWER)):
            if (count := getattr(self, name).count(placeholder)) != 1:
                raise ConfigError(f"{name} of a prompt template must hold {placeholder} once, found {count} times")
        if own := sorted(_OWN_CHAT_KWARGS & set(self.chat_kwargs)):
            raise ConfigError(f"chat_kwargs must not set {', '.join(own)}: the template sets it itself")
        if isinstance(self.few_shot, int):
            if not 0 <= self.few_shot <= len(EXEMPLARS):
                raise ConfigError(f"few_shot={self.few_shot}: there are {len(EXEMPLARS)} built-in examples")
            return
        for number, each in enumerate(self.few_shot, start=1):
            texts = [isinstance(text, str) and text.strip() for text in each.values()]
            if set(each) != {"prompt", "solution"} or not all(texts):
                what = "must have 'prompt' and 'solution' only, with text in both"
                raise ConfigError(f"few_shot example {number} {what}")

    def resolved_style(self, tokenizer: Any) -> Style:
        """Return "chat" or "plain" for a tokenizer.

        Args:
            tokenizer: a transformers tokenizer.

        Raises:
            ConfigError: chat style was asked for and the tokenizer has no chat template.
        """
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if self.style == "chat" and not has_chat:
            what = f"style 'chat', but the tokenizer {_name(tokenizer)} has no chat template"
            raise ConfigError(f"{what}; use 'plain' (or 'auto'), or a model with a chat template")
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
        return not (bos and (self.plain if self.system is None else self.system).startswith(bos))

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
                f"must be text or chat messages, found {shown(prompt)}", path=str(row.get("id", "?")), column="prompt"
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
            return self.few_shot
        found = []
        for each in EXEMPLARS[: self.few_shot]:
            last = self.answer_line.replace(_ANSWER, each["answer"])
            found.append({"prompt": each["prompt"], "solution": f"{each['reasoning']}\n{last}"})
        return found

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


def _only_text(prompt: str | list[Message], row: Mapping[str, Any]) -> str:
    """The text of a plain prompt; a lone user message counts as text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return prompt[0]["content"]
    raise DataError(
        f"holds {len(prompt)} chat messages, which plain style cannot write; use style 'chat', or text prompts",
        path=str(row.get("id", "?")),
        column="prompt",
    )


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


TEMPLATES = {name: PromptTemplate(**settings) for name, settings in _BUILT_IN["templates"].items()}
"""Built-in templates by name; `task` adds nothing to the prompt (tiny world)."""


def get_template(template: str | Path | PromptTemplate) -> PromptTemplate:
    """Return a template given by name, as a file, or as such.

    Args:
        template: a name in ``TEMPLATES``, the path of a YAML or JSON file with the fields of :class:`PromptTemplate`,
            or a template.

    Raises:
        ConfigError: no template of that name, or a field of the file that is incorrect.
        DataError: a file that cannot be read.
    """
    if isinstance(template, PromptTemplate):
        return template
    if isinstance(template, str) and template in TEMPLATES:
        return TEMPLATES[template]
    path = Path(template).expanduser()
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        return read_template(path)
    what = f"no prompt template named {str(template)!r}.{nearest(str(template), TEMPLATES)}"
    raise ConfigError(f"{what} Give one of {', '.join(TEMPLATES)}, or the path of a YAML file")


def read_template(path: Path) -> PromptTemplate:
    """The template that a YAML or JSON file holds; see :func:`get_template`."""
    raw = read_yaml(path, "prompt template")
    if not isinstance(raw, Mapping) or not raw:
        names = ", ".join(each.name for each in fields(PromptTemplate))
        raise ConfigError(f"{path}: no prompt template: must be keys with values ({names})")
    return build_settings(PromptTemplate, raw, str(path))


def template_name(template: PromptTemplate) -> str:
    """A built-in template's name; of any other the settings that are not the default."""
    known = next((name for name, each in TEMPLATES.items() if each == template), None)
    changed = {f.name: getattr(template, f.name) for f in fields(template) if getattr(template, f.name) != f.default}
    return known or json.dumps({name: value for name, value in changed.items() if value != {}}, ensure_ascii=False)
