"""Special ids and chat templates of the published families, as data: nothing of a checkpoint's own template is executed."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.tokenizer import HuggingFace


class SpecialIds(NamedTuple):
    """Ids that a family's config.json may leave out."""

    mask: int
    eos: int  # also pads
    bos: int | None = None
    turn_end: int | None = None


# LLaDA: tokenizer_config.json of LLaDA-8B-Instruct lists all four. LLaDA-MoE, LLaDA2: dInfer's samplers, and `generate` of
# LLaDA2's model class. Dream: mask and pad are defaults of its configuration class; that pad is eos and 151645 `<|im_end|>`
# is from memory of Qwen2.5's tokenizer.
IDS = {
    "llada_moe": SpecialIds(mask=156895, eos=156892),
    "llada": SpecialIds(mask=126336, eos=126081, bos=126080, turn_end=126348),
    "llada2_moe": SpecialIds(mask=156895, eos=156892),
    "dream": SpecialIds(mask=151666, eos=151643, turn_end=151645),
}


class Template(NamedTuple):
    """One turn is `opening` with the role's name, the content, `closing`; a prompt ends with the opening of the assistant."""

    opening: str
    closing: str
    roles: Mapping[str, str]
    start: str = ""
    default_system: str = ""  # content of a system turn that is not given; "" leaves the turn out
    system_suffix: str = ""  # a last line of every system turn
    strip: bool = False  # blanks around contents go


_OWN_NAMES = {role: role for role in ("system", "user", "assistant")}
# tokenizer_config.json of LLaDA2.1-flash writes the system turn always; what it says of tools and thinking is left out here.
# dInfer's benchmarks prompt LLaDA-MoE and LLaDA2.0 with the same text, so their templates are taken to be this one. How it
# writes earlier answers was not to be seen; here as every other turn.
_ROLES = Template("<role>{}</role>", "<|role_end|>", {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"},
                  system_suffix="detailed thinking off")
TEMPLATES = {
    "llada_moe": _ROLES,
    "llada2_moe": _ROLES,
    # tokenizer_config.json of LLaDA-8B-Instruct.
    "llada": Template("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", _OWN_NAMES, start="<|startoftext|>", strip=True),
    # ChatML, as in Qwen2.5. From memory: Dream's default system turn.
    "dream": Template("<|im_start|>{}\n", "<|im_end|>\n", _OWN_NAMES, default_system="You are a helpful assistant."),
}
_MARKER = re.compile(r"(<\|\w+\|>|</?role>)")


def render(family: str, messages: Sequence[Mapping[str, str]], tokenizer: HuggingFace) -> list[int]:
    """Ids of a prompt that the assistant is to answer.

    `messages`: {"role": "system" | "user" | "assistant", "content": text}, a system turn only first, the last of the user.
    Contents are text alone: no spelling in them becomes a marker of the template. Raises ConfigError for other messages, an
    unknown family and a tokenizer without the family's markers.
    """
    _check(messages)
    if not messages or messages[-1]["role"] != "user":
        raise ConfigError("the last message must be of the role user, for the assistant to answer")
    template = _template(family)
    opening = _literal(template.opening.format(template.roles["assistant"]), tokenizer)
    parts = [*_parts(template, messages, tokenizer), *((*part, 0) for part in opening)]
    # Between two markers the tokenizer sees one text, as it would in the rendered whole.
    return [index for marker, group in itertools.groupby(parts, key=lambda part: part[0]) for index in _encode(marker, group, tokenizer)]


def conversation(family: str, messages: Sequence[Mapping[str, str]], tokenizer: HuggingFace) -> tuple[list[int], list[int]]:
    """(ids, answers) of a whole conversation: the number of the answer that an id belongs to, from 1, or 0 for what is given.

    The marker that ends an answer belongs to it. Answers are tokenised by themselves, as a model writes them; where the template's
    markers are tokens, what stands before an answer is what `render` makes of the messages before it. Raises as `check_conversation`
    and `render` do.
    """
    check_conversation(messages)
    ids: list[int] = []
    answers: list[int] = []
    for (marker, answer), group in itertools.groupby(_parts(_template(family), messages, tokenizer), key=lambda part: (part[0], part[2])):
        ids += _encode(marker, group, tokenizer)
        answers += [answer] * (len(ids) - len(answers))
    return ids, answers


def check_conversation(messages: Any) -> None:
    """Raise ConfigError for what cannot be learned from: no answer, one that is empty or follows no message of the user."""
    if not isinstance(messages, list | tuple):
        raise ConfigError(f"messages must be a list of objects with role and content, not {messages!r:.40}")
    _check(messages)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and (i == 0 or messages[i - 1]["role"] != "user"):
            raise ConfigError(f"message {i} is of the assistant, but does not follow one of the user")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ConfigError(f"message {i} of the assistant is empty")
    if all(message["role"] != "assistant" for message in messages):
        raise ConfigError("no message is of the role assistant, so there is no answer to learn")


def _parts(template: Template, messages: Sequence[Mapping[str, str]], tokenizer: HuggingFace) -> list[tuple[bool, str, int]]:
    """(marker or not, text, number of its answer or 0) of each part of the messages."""
    system, turns = ("", messages) if messages[0]["role"] != "system" else (messages[0]["content"], messages[1:])
    system = "\n".join(filter(None, (system or template.default_system, template.system_suffix)))
    turns = [{"role": "system", "content": system}, *turns] if system else turns

    parts = [(*part, 0) for part in _literal(template.start, tokenizer)]
    count = 0
    for turn in turns:
        count += turn["role"] == "assistant"
        answer = count if turn["role"] == "assistant" else 0
        content = turn["content"].strip() if template.strip else turn["content"]
        closing = _literal(template.closing, tokenizer)
        parts += [(*part, 0) for part in _literal(template.opening.format(template.roles[turn["role"]]), tokenizer)]
        parts += [(*part, answer) for part in (*_content(content, tokenizer), *closing[:1])]
        parts += [(*part, 0) for part in closing[1:]]
    return parts


def _encode(marker: bool, parts: Iterable[tuple[bool, str, int]], tokenizer: HuggingFace) -> list[int]:
    """Ids of neighbouring parts of one kind."""
    texts = [text for _, text, _ in parts if text]
    return [tokenizer.special_id(text) for text in texts] if marker else tokenizer.encode("".join(texts))


def markers(family: str) -> list[str]:
    """The control tokens that the family's template needs; none where there is no template."""
    template = TEMPLATES.get(family)
    return list(dict.fromkeys(_MARKER.findall(template.start + template.opening + template.closing))) if template else []


def end_ids(family: str, tokenizer: HuggingFace) -> tuple[int, int]:
    """Ids after which an answer is over: the end of a turn, the end of text."""
    marker = _literal(_template(family).closing, tokenizer)[0][1]
    return tokenizer.special_id(marker), tokenizer.eos_id


def _literal(text: str, tokenizer: HuggingFace) -> list[tuple[bool, str]]:
    """(marker or not, text) of each part of a template. A `<role>` that is no token is text; `<|...|>` must be a token."""
    if not hasattr(tokenizer, "special_id"):
        raise ConfigError(f"chat templates need the tokenizer of a published checkpoint, this one is of the kind {tokenizer.kind}")
    parts = []
    for part in filter(None, _MARKER.split(text)):
        known = tokenizer.special_id(part) is not None
        if part.startswith("<|") and not known:
            raise ConfigError(f"the tokenizer has no token {part}, which the chat template needs; is it that of an instruction-tuned checkpoint?")
        parts.append((known, part))
    return parts


def _content(text: str, tokenizer: HuggingFace) -> list[tuple[bool, str]]:
    """Parts of a message. Added tokens that are not special come from text: an empty marker breaks their spelling in two."""
    found = {part for part in _MARKER.findall(text) if (index := tokenizer.special_id(part)) is not None and tokenizer.pieces[index]}
    if not found:
        return [(False, text)]
    inside = "|".join(f"(?<={re.escape(part[0])})(?={re.escape(part[1:])})" for part in sorted(found))
    return [part for piece in re.split(inside, text) for part in ((False, piece), (True, ""))]


def _template(family: str) -> Template:
    if family not in TEMPLATES:
        raise ConfigError(f"no chat template for the family {family}{config_lib.nearest(family, TEMPLATES)}")
    return TEMPLATES[family]


def _check(messages: Sequence[Mapping[str, str]]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(f"message {i} is not an object with role and content, but {message!r:.40}")
        role, content = message.get("role"), message.get("content")
        if role not in _OWN_NAMES:
            raise ConfigError(f"message {i} has the role {role!r}; roles are {', '.join(_OWN_NAMES)}")
        if not isinstance(content, str):
            raise ConfigError(f"message {i} has no content that is text, but {content!r:.40}")
        if role == "system" and i:
            raise ConfigError(f"message {i} is of the role system, which only the first may have")
