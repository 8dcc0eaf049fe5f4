"""Chat templates, as transformers writes them."""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template

Messages = Sequence[Mapping[str, Any]]
"""A "role" and a "content" each, and what else a template reads of them."""

# Around names of special tokens that are to stay text. No text has these: they are for private use, and are taken out.
_OPEN, _CLOSE = "\U0010fde0", "\U0010fde1"


def render(template: str | None, messages: Messages, special_tokens: Mapping[str, str]) -> str:
    """A conversation as the text that the model's next turn goes on from.

    Args:
        template: Jinja, with what transformers adds to it.
        messages: the conversation; what is None in one is left out, as there.
        special_tokens: their texts by the names that the template may use.

    Raises:
        ValueError: there is no template, or it does not take these messages.
    """
    if template is None:
        raise ValueError("the tokenizer has no chat template: expected chat_template.jinja beside it, or one given")
    from jinja2 import TemplateError  # takes a tenth of a second, and few commands need it

    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compile(template).render(
            messages=given, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template does not take this conversation: {error}") from error


@functools.lru_cache(8)
def _compile(template: str) -> "Template":
    """A template that reaches nothing outside the conversation."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block around what an assistant says, for those who want to know which tokens that is."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's name)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def mark(template: str, messages: Messages, added: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Messages in which the names of control tokens are marked as text, for `split_marked`.

    Control tokens are those that are special, and others that the template writes.

    Args:
        template: of the chat.
        messages: the conversation.
        added: names of the tokens that are found in a text before all others, and whether they are special.
    """
    from jinja2 import nodes

    tree = _compile(template).environment.parse(template)
    written = {node.data for node in tree.find_all(nodes.TemplateData)}
    written |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    control = [
        name
        for name, special in added.items()
        if special or (not name.isspace() and any(name in text for text in written))
    ]
    pattern = _any_of(control)

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", value.replace(_OPEN, "").replace(_CLOSE, ""))
        if isinstance(value, Mapping):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list | tuple) else value

    return [marked(message) for message in messages]


def split_marked(text: str, added: Iterable[str]) -> list[tuple[str, bool]]:
    """The parts of a chat rendered from marked messages, and whether they are names that are to stay text."""
    parts = re.split(f"{_OPEN}({_any_of(added).pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]", text)
    # Between two parts of the chat stands a name, or None where a template has torn the marks apart.
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of some names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
