"""What chat templates are told beside the messages, and whether they read it. No torch.

The student's template and the teacher's are told the same: both sides score the same completion, so a reply that
begins with thinking on one side begins with it on the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from vopd_client.config import THINKING_VARIABLES, ChatSettings, YesNoAuto
from vopd_client.errors import ConfigError

if TYPE_CHECKING:
    import jinja2

    from vopd_client.prompt_rows import PromptRow

# What every template may read: transformers gives these itself.
GIVEN_VARIABLES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception"),
        *("strftime_now", "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"),
    }
)


@dataclass(frozen=True)
class ChatOptions:
    """What templates are told. thinking: "auto" says nothing of it. tools: JSON schemas that they are to list."""

    thinking: YesNoAuto = "auto"
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()

    def for_template(self, template: str, whose: str) -> dict[str, Any]:
        """The variables that `template` is rendered with; whose: "the student's" or "the teacher's".

        Raises: ConfigError for something that the template never reads: the rendering would silently be another one.
        """
        told = dict(self.variables)
        if self.tools:
            if "tools" not in _undeclared(template):
                raise ConfigError(
                    f"the environment has tools, and {whose} chat template lists none: leave `tools` out of the "
                    "environment, and say in the rows' messages how tools are called"
                )
            told["tools"] = [dict(tool) for tool in self.tools]
        if self.thinking == "auto" and not self.variables:
            return told
        read = variables_of(template)
        for name in self.variables:
            if name not in read:
                raise ConfigError(f"chat_template_kwargs: {whose} chat template reads no {name}; {_reads(read)}")
        if self.thinking != "auto":
            switches = [name for name in THINKING_VARIABLES if name in read]
            if not switches:
                raise ConfigError(
                    f"thinking {self.thinking}: {whose} chat template reads none of "
                    f"{', '.join(THINKING_VARIABLES)}; {_reads(read)}"
                )
            told |= dict.fromkeys(switches, self.thinking == "yes")
        return told


def chat_options(config: ChatSettings, tools: Sequence[Mapping[str, Any]] = ()) -> ChatOptions:
    return ChatOptions(config.thinking, config.chat_template_kwargs, tools)


def check_has_chats(options: ChatOptions, rows: Iterable[PromptRow]) -> None:
    """Raises: ConfigError for settings of templates where no row goes through one."""
    if options.thinking == "auto" and not options.variables:
        return
    if not any(row.messages or row.teacher_messages for row in rows):
        what = f"thinking {options.thinking}" if options.thinking != "auto" else "chat_template_kwargs"
        raise ConfigError(f"{what} has no effect: no row has messages, and plain text goes through no chat template")


def variables_of(template: str) -> frozenset[str]:
    """The variables that a template reads and nobody but its caller sets; none for one that is not Jinja."""
    return _undeclared(template) - GIVEN_VARIABLES


@cache
def _undeclared(template: str) -> frozenset[str]:
    import jinja2
    import jinja2.meta

    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))
    except jinja2.TemplateError:
        return frozenset()  # rendering it says what is wrong, with the row


def _reads(read: frozenset[str]) -> str:
    return f"it reads {', '.join(sorted(read))}" if read else "it reads no variables of its own"


@cache
def _environment() -> jinja2.Environment:
    """Parses what transformers renders: with its {% generation %} around the assistant's part."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return jinja2.Environment(extensions=[Generation, jinja2.ext.loopcontrols])
