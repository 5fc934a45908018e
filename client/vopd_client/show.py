"""What a teacher is, and what it thinks of a text, as tables for a terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vopd_client.scored_text import Alternative, ScoredText, ScoredToken, score_text
from vopd_client.teacher import RemoteTeacher, ReplicaUse
from vopd_client.types import SupportKind, TeacherInfo

if TYPE_CHECKING:
    from vopd_client.command_config import InfoConfig, ScoreConfig
    from vopd_client.config import TeacherConfig

FILE_WIDTH = 110  # columns where nobody has a terminal
BAR_WIDTH = 10
PERCENT_WIDTH = 8  # " 100.00%"
NATS_WIDTH = 7  # "-99.999"
MAX_TOKEN_WIDTH = 24
_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_SUPPORT_WORDS: dict[SupportKind, str] = {
    "sampled": "sampled tokens",
    "teacher_top_k": "its own top-k",
    "candidates": "the student's candidates",
    "hidden_states": "hidden states",
}


def show_info(config: InfoConfig, console: Console | None = None) -> None:
    """Prints what the teacher at `config.teacher_url` says of itself. Raises: VopdError."""
    console = console or _console()
    with _connected(config, console, temperature=1.0) as teacher:
        console.print(render_info(teacher.info, ", ".join(config.teacher_url), teacher.replicas))


def show_scores(config: ScoreConfig, console: Console | None = None) -> None:
    """Prints a completion token by token, as the teacher scores it. Raises: VopdError."""
    console = console or _console()
    with _connected(config, console, temperature=config.temperature) as teacher:
        scored = score_text(teacher, config.prompt, config.completion, top=config.top, chat=config.chat)
    console.print(render_scores(scored))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


@contextmanager
def _connected(config: TeacherConfig, console: Console, *, temperature: float) -> Iterator[RemoteTeacher]:
    with console.status(f"asking {', '.join(config.teacher_url)} …"):
        teacher = RemoteTeacher.connect(
            config.teacher_url,
            api_key_file=config.api_key_file,
            plaintext=config.plaintext,
            tls_ca_file=config.tls_ca_file,
            timeout_s=config.teacher_timeout_s,
            float_type=config.score_float_type,
            temperature=temperature,
        )
    with teacher:
        yield teacher


# ---------------------------------------------------------------- info


def render_info(info: TeacherInfo, where: str, replicas: Sequence[ReplicaUse] = ()) -> RenderableType:
    """A panel of what matters to somebody who wants to train against this teacher. replicas: shown if several."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _info_rows(info):
        table.add_row(name, Text(value))
    if len(replicas) > 1:
        table.add_row("replicas", Text("\n".join(map(_replica_line, replicas))))
    title = Text.assemble("teacher ", (info.model_id, "bold cyan"), f" at {where}")
    return Panel(table, title=title, title_align="left", box=ROUNDED, expand=False)


def _info_rows(info: TeacherInfo) -> list[tuple[str, str]]:
    ends = ", ".join(map(str, info.end_ids)) or "none"
    return [
        ("revision", info.model_revision),
        ("engine", f"{info.engine} {info.engine_version}, {info.dtype}"),
        ("tokenizer", f"{info.num_ids:,} tokens, fingerprint {info.fingerprint[:16]}…"),
        ("begin, end, pad", f"{_or_none(info.begin_id)}; {ends}; {_or_none(info.pad_id)}"),
        ("vocabulary", f"{info.vocab_size:,} ids can be scored"),
        ("hidden size", f"{info.hidden_size:,}"),
        ("context", f"{info.max_context_length:,} tokens, completion included"),
        ("scores", ", ".join(words for kind, words in _SUPPORT_WORDS.items() if kind in info.supports)),
        ("top-k", f"at most {info.max_support_size:,} ids a position"),
        ("whole vocabulary", _whole_vocabulary(info)),
        ("temperature", "any" if info.any_temperature else "1 only"),
        ("deterministic", "yes" if info.deterministic else "no (start it with --deterministic)"),
        ("chat template", f"{len(info.chat_template):,} characters" if info.chat_template else "none"),
        ("a request", f"{info.max_sequences_per_request:,} sequences, {info.max_tokens_per_request:,} tokens"),
        ("server", info.server_version),
    ]


def _replica_line(replica: ReplicaUse) -> str:
    return f"{replica.url}  " + (f"missing: {replica.missing}" if replica.missing else "connected, and scores alike")


def _whole_vocabulary(info: TeacherInfo) -> str:
    if not info.head_sha256:
        return "not given away (vopd-server serve --allow-full-vocab, transformers engine)"
    return f"hidden states and the output head, SHA-256 {info.head_sha256[:16]}…"


def _or_none(token_id: int | None) -> str:
    return "none" if token_id is None else str(token_id)


# ---------------------------------------------------------------- scores


def render_scores(scored: ScoredText) -> RenderableType:
    """A table of the completion's tokens, and the totals below it."""
    has_alternatives = any(token.alternatives for token in scored.tokens)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    # Only a column that may wrap gives way on a narrow terminal: the alternatives, whose cells then do not wrap.
    longest = max((cell_len(visible(token.text)) for token in scored.tokens), default=0)
    table.add_column("token", no_wrap=True, min_width=min(longest, MAX_TOKEN_WIDTH))
    table.add_column("nats", justify="right", no_wrap=True, min_width=NATS_WIDTH)
    table.add_column("probability", no_wrap=True, min_width=BAR_WIDTH + PERCENT_WIDTH)
    if has_alternatives:
        table.add_column(Text("the teacher would rather say (nats)", no_wrap=True, overflow="ellipsis"))
    for token in scored.tokens:
        row: list[RenderableType] = [_token_cell(token), f"{token.logprob_nats:.3f}", _bar(token.logprob_nats)]
        if has_alternatives:
            row.append(_alternatives_cell(token))
        table.add_row(*row)
    return Group(table, _totals(scored))


def visible(text: str) -> str:
    """White space as signs, control characters as escapes: every token shows on one line."""
    return "".join(
        _VISIBLE.get(char)
        or (char if unicodedata.category(char)[0] not in "CZ" else char.encode("unicode_escape").decode())
        for char in text
    )


def _token_cell(token: ScoredToken) -> Text:
    return Text(visible(token.text), style=f"bold {_colour(token.logprob_nats)}")


def _colour(logprob_nats: float) -> str:
    """Green above one half, red below one in a hundred."""
    probability = math.exp(logprob_nats)
    return "green" if probability >= 0.5 else "yellow" if probability >= 0.01 else "red"


def _bar(logprob_nats: float) -> Text:
    """The probability as eighths of blocks and a percentage."""
    probability = math.exp(logprob_nats)
    eighths = round(probability * BAR_WIDTH * 8)
    whole, part = divmod(eighths, 8)
    blocks = "█" * whole + (" ▏▎▍▌▋▊▉"[part] if part else "")
    percent = f"{probability:7.2%}" if probability >= 0.0001 else f"{'<0.01%':>7}"
    return Text.assemble((f"{blocks:<{BAR_WIDTH}}", _colour(logprob_nats)), " ", percent)


def _alternatives_cell(token: ScoredToken) -> Text:
    cell = Text(no_wrap=True, overflow="ellipsis")
    for alternative in token.alternatives:
        if cell:
            cell.append("  ")
        cell.append(visible(alternative.text), style="bold" if _is_chosen(alternative, token) else "")
        cell.append(f" {alternative.logprob_nats:.2f}", style="dim")
    return cell


def _is_chosen(alternative: Alternative, token: ScoredToken) -> bool:
    return alternative.text == token.text


def _totals(scored: ScoredText) -> Text:
    num_tokens = len(scored.tokens)
    if not num_tokens:
        return Text("an empty completion: nothing to score")
    line = Text.assemble(
        (f"{num_tokens} token{'s' if num_tokens > 1 else ''}", "bold"),
        f" after {scored.num_context_tokens} of context   sum {scored.sum_nats:.3f} nats   "
        f"mean {scored.mean_nats:.3f}   perplexity {scored.perplexity:.3g}",
    )
    if scored.bytes_received:
        line.append(f"   {scored.bytes_per_token:.0f} bytes a token on the wire", style="dim")
    return line
