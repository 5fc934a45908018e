r"""The answer inside a completion: the last \boxed{...}, <answer> or line; the letter of a choice. No torch."""

from __future__ import annotations

import re

LETTERS = "A-J"  # ten options, as many as the widest public sets have

_BOX = re.compile(r"\\boxed\s*\{")
_BRACES = re.compile(r"(?<!\\)[{}]")

# One letter, alone or with the option's text behind it: C, (c), \text{C}, \mathrm{(C)}, C. 3 eV, (C) 3 eV
_BOXED_LETTER = re.compile(
    rf"\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{{\s*)?(?:\(\s*([{LETTERS}])\s*\)|([{LETTERS}])(?=[^\w]*\}}?\s*$|[.):,]\s))",
    re.IGNORECASE,
)
# What may stand between "answer is" and its letter: punctuation, Markdown, quotes, brackets, $, \text{
_OPENING = r"[\s\"'`*_$(\[{]*(?:\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{\s*)?[(\[]?"
_STATED_LETTER = re.compile(
    rf"""
    (?: (?i: \b (?: answer | choice | option ) s? ["'`*_]* \s* (?: is | [:=] ) \s* :?      # answer is, "answer": ...
            (?: \s* (?: option | choice ) \b )? )
      | (?i: < answer > ) )
    {_OPENING} (?: ([{LETTERS}]) (?! [\w'’] ) | (?<=["'`(\[{{]) ((?i:[{LETTERS}])) (?= ["'`)\]}}] ) )
    """,
    re.VERBOSE,
)
_LONE_LETTER = re.compile(rf"[\s*_(\[$]*([{LETTERS}])[\s*_)\]$.]*")


def last_boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} of `text` holds, braces inside it balanced; None without one."""
    for box in reversed(list(_BOX.finditer(text))):
        depth = 1
        for brace in _BRACES.finditer(text, box.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return text[box.end() : brace.start()].strip()
    return None


def tagged_answer(completion_text: str) -> str | None:
    """What the last complete <answer>...</answer> holds, else the last line that is not empty; None without any text.

    The tags are how reasoning-gym's system prompts ask for answers, and read as its `extract_answer` reads them. A
    model that answers without them is not failed for the form: what precedes a closing `</think>` is left out, and
    the last line of the rest is its answer.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", completion_text, re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    lines = completion_text.rpartition("</think>")[2].strip().splitlines()
    return lines[-1].strip() if lines else None


def choice_letter(completion_text: str) -> str | None:
    r"""The option that a completion settles on, "A" to "J"; None when it names none.

    What precedes a closing `</think>` is not looked at. Then the first of these rules that finds a letter counts:

    1. The last complete \boxed{...}, if it holds a letter, alone or followed by its option's text: C, (c), \text{C},
       C) 3 eV.
    2. The last statement of an answer: "the answer is (C)", "Answer: C", "**Answer:** C", {"answer": "C"},
       "the correct option is C", <answer>C</answer>. A lower-case letter counts only inside quotes or brackets, so
       that "the answer is a matter of taste" states none.
    3. The last line, if it is a letter and nothing else.

    Source: written for this project. The rules cover the forms that simple-evals ("Answer: C" at the start of a
    line), lighteval and the paper's authors (a JSON object) look for; unlike the authors' grading, an option's text
    without its letter is no answer, and a lower-case letter always means the option of that letter.
    """
    text = completion_text.rpartition("</think>")[2].strip()
    boxed = last_boxed(text)
    if boxed is not None and (letter := _BOXED_LETTER.match(boxed)):
        return (letter[1] or letter[2]).upper()
    stated = list(_STATED_LETTER.finditer(text))
    if stated:
        return (stated[-1][1] or stated[-1][2]).upper()
    last_line = text.splitlines()[-1] if text else ""
    lone = _LONE_LETTER.fullmatch(last_line)
    return lone[1] if lone else None
