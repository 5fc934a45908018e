"""The pages of the docs site that are made of other files, and what no page may leave out."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

import vopd_client.errors
import vopd_server.errors
from conftest import REPOSITORY
from docstrings import markdown
from readme_pages import split_readme
from repository_links import site_links
from settings_reference import COMMANDS, settings_page
from tiny_model import tiny_tokenizer
from vopd_client.errors import HandshakeError
from vopd_client.handshake import check_tokenizers
from vopd_proto import teacher_pb2 as pb
from vopd_proto.fingerprint import token_table, tokenizer_fingerprint
from vopd_server.grpc_errors import STATUS_CODES
from vopd_server.http_errors import HTTP_STATUSES
from wire_reference import read_proto, wire_page

DOCS = REPOSITORY / "docs"

# ---------------------------------------------------------------- the wire contract


@pytest.fixture(scope="module")
def proto() -> FileDescriptorProto:
    return read_proto(REPOSITORY / "proto" / "teacher.proto")


def section(page: str, heading: str) -> str:
    """From a heading of the third level to the next heading."""
    [found] = re.findall(rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    return str(found)


def test_the_wire_page_has_every_message_and_every_field_that_is_spoken(proto: FileDescriptorProto) -> None:
    page = wire_page(proto)
    for name, descriptor in pb.DESCRIPTOR.message_types_by_name.items():
        rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", section(page, name), re.MULTILINE)
        assert rows == [(str(field.number), field.name) for field in sorted(descriptor.fields, key=lambda f: f.number)]
    for method in pb.DESCRIPTOR.services_by_name["Teacher"].methods:
        assert f"[{method.input_type.name}]" in section(page, method.name)


def test_the_wire_page_says_what_the_comments_say(proto: FileDescriptorProto) -> None:
    page = wire_page(proto)
    assert "never as one number a field.\n" in page.split("## ")[0]
    assert "\n## Scoring\n" in page
    assert "a stream of [ScoreStreamRequest](#scorestreamrequest) → a stream of" in section(page, "ScoreStream")
    about = "one of `support`; none set: the sampled log-probabilities alone"
    assert f"| 7 | `teacher_top_k` | [TeacherTopK](#teachertopk) | {about} |" in section(page, "Sequence")
    assert (
        "| 4 | `contexts` | repeated [UIntArray](#uintarray) | a context shared by several completions is sent once |"
        in page
    )
    assert "| 2 | `temperature` | optional float | Logits are divided by it before the softmax; unset: 1. |" in page
    assert "| 1 | `reason` | [StreamWaiting.Reason](#streamwaitingreason) |" in page
    assert "| 5 | `ENGINE` | nothing but the engine's work |" in section(page, "StreamWaiting.Reason")
    assert "```text\nlogit_scale  multiplied in first; a decimal number\n" in section(page, "GetHeadResponse")


def test_every_comment_of_the_proto_is_on_the_wire_page(proto: FileDescriptorProto) -> None:
    shown = set(re.findall(r"[\w.;:]+", wire_page(proto)))
    for location in proto.source_code_info.location:
        words = re.findall(r"[\w.;:]+", location.leading_comments + location.trailing_comments)
        assert set(words) <= shown


# ---------------------------------------------------------------- README, links, settings, docstrings


def test_every_section_of_the_readme_is_on_one_of_its_two_pages_and_new_ones_are_not_lost() -> None:
    readme = (REPOSITORY / "README.md").read_text() + "\n## Something new\n\nSaid here.\n"
    home, quick_start = split_readme(readme)
    titles = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    found = re.findall(r"^## (.+)$", home + quick_start, re.MULTILINE)
    assert sorted(found) == sorted(set(titles) - {"Further"})
    assert "## Something new\n\nSaid here." in quick_start
    assert "make demo" in quick_start
    assert "Quick start" in home


def links(markdown_text: str) -> list[str]:
    """Targets of links and images, by a parser that the site does not use."""
    return [
        str(token.attrs.get("href") or token.attrs.get("src"))
        for block in MarkdownIt().parse(markdown_text)
        for token in block.children or []
        if token.type in ("link_open", "image")
    ]


@pytest.mark.parametrize(
    "path",
    [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))],
    ids=lambda path: path.name,
)
def test_a_link_to_a_file_of_the_repository_finds_it(path: Path) -> None:
    made_by_the_site = {"quick-start.md", "wire-reference.md", "settings-reference.md", "contributing.md"}
    for target in links(path.read_text()):
        if not re.match(r"[a-z]+:|#", target) and target.split("#")[0] not in made_by_the_site:
            assert (path.parent / target.split("#")[0]).exists(), target


def test_links_become_those_of_the_site() -> None:
    complaints: list[str] = []
    pages = {REPOSITORY / "README.md": "index.md"}

    def on_site(text: str, source: str = "docs/some.md") -> str:
        return site_links(text, REPOSITORY / source, repository=REPOSITORY, pages=pages, complain=complaints.append)

    assert on_site("[its memory](docs/method.md#memory)", "README.md") == "[its memory](method.md#memory)"
    assert on_site("[docs/method.md](docs/method.md)", "README.md") == "[The method](method.md)"
    assert on_site("![A curve](docs/images/x.png)", "README.md") == "![A curve](images/x.png)"
    assert on_site("[there](../README.md)") == "[there](index.md)"
    assert on_site("[the alerts](../deploy/monitoring/alerts.yml)") == "the alerts (`deploy/monitoring/alerts.yml`)"
    assert on_site("[examples/paper](../examples/paper)") == "`examples/paper`"
    unchanged = "[a](https://example.org) `[b](../c)` [d](#e)\n```\n[f](../g)\n```\n"
    assert on_site(unchanged) == unchanged
    assert not complaints
    on_site("[gone](../deploy/gone.yml)")
    assert complaints == [f"{DOCS / 'some.md'} links to ../deploy/gone.yml, which does not exist"]


def test_every_setting_is_on_the_page_with_its_default() -> None:
    page = settings_page()
    for model in COMMANDS.values():
        for name in model.model_fields:
            assert f"| `--{name.replace('_', '-')}` |" in page
    assert "| `--top-k` | `100` |" in page
    assert "| `--model` | required |" in page


def test_a_docstring_keeps_its_lists_and_its_layout() -> None:
    docstring = """Does it.

        first: what comes
            before.
        second, third: the rest.
        Not one of them: prose.

        Args:
            fourth: [B, T], in
                nats.

        Raises: ConfigError, and
            no other.

            a    laid out
            bb   by spaces
        """
    assert markdown(docstring, frozenset({"first", "second", "third", "fourth"})).split("\n\n") == [
        "Does it.",
        "- `first`: what comes before.",
        "- `second`, `third`: the rest.",
        "Not one of them: prose.",
        "**Args**",
        "- `fourth`: [B, T], in nats.",
        "**Raises** ConfigError, and no other.",
        "```text\na    laid out\nbb   by spaces\n```",
    ]


# ---------------------------------------------------------------- troubleshooting, tokenizers


def error_classes(module: ModuleType) -> dict[str, type[Exception]]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == module.__name__
    }


def troubleshooting(side: str) -> dict[str, str]:
    """Heading -> text of one side's errors."""
    page = (DOCS / "troubleshooting.md").read_text()
    [part] = re.findall(rf"^## Errors of the {side}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    _, *pairs = re.split(r"^### (\w+).*\n", part, flags=re.MULTILINE)
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


@pytest.mark.parametrize(("side", "module"), [("client", vopd_client.errors), ("server", vopd_server.errors)])
def test_troubleshooting_has_a_heading_for_every_error_class_and_for_nothing_else(
    side: str, module: ModuleType
) -> None:
    sections = troubleshooting(side)
    assert sections.keys() == error_classes(module).keys()
    assert all(text.strip() for text in sections.values())


def test_troubleshooting_names_the_codes_that_the_server_answers_with() -> None:
    sections = troubleshooting("server")
    for name, error in error_classes(vopd_server.errors).items():
        if name != "ConfigError":  # at the start only
            assert sections[name].strip().startswith(f"`{STATUS_CODES[error].name}`, HTTP {HTTP_STATUSES[error]}")


def test_the_refusals_that_the_tokenizer_page_quotes_are_what_the_client_says(demo_model_dir: Path) -> None:
    teacher = token_table(AutoTokenizer.from_pretrained(demo_model_dir))
    page = (DOCS / "tokenizers.md").read_text()
    for student in ([*teacher, b"<tool_call>"], token_table(tiny_tokenizer())):
        with pytest.raises(HandshakeError) as refused:
            check_tokenizers(
                student,
                teacher_fingerprint=tokenizer_fingerprint(teacher),
                fetch_teacher_tokens=lambda: teacher,
            )
        quoted = "".join(f"vopd-client train: {line}\n" for line in str(refused.value).splitlines())
        assert f"```\n{quoted}```\n" in page
