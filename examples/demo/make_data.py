"""Writes train.jsonl and heldout.jsonl beside this file: `python examples/demo/make_data.py`.

Two kinds of question. The teacher sees six solved examples of a kind before the question; the student sees the
question and a line that says how to begin. Nobody trains on the answers: training rows have none, and the held-out
rows' answers are there to measure with.

The pools were chosen before the split: countries with one undisputed capital and one usual English spelling of
both, verbs with one simple past on both sides of the Atlantic. A small model does not know many of the world's
capitals, so that the held-out countries are drawn from the better known ones; the teacher's own score is reported
beside the student's. The draw is random with a fixed seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

NUM_HELD_OUT = 28  # of each kind
INSTRUCTION = "Begin your reply with 'Answer:'."
# Words of one name are joined by underscores here.
WELL_KNOWN_CAPITALS = """
Germany:Berlin Spain:Madrid Portugal:Lisbon Poland:Warsaw Greece:Athens Sweden:Stockholm Norway:Oslo
Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Austria:Vienna Hungary:Budapest Russia:Moscow Belgium:Brussels
Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Turkey:Ankara Iceland:Reykjavik
the_Netherlands:Amsterdam the_United_Kingdom:London the_Czech_Republic:Prague China:Beijing India:New_Delhi
Thailand:Bangkok Vietnam:Hanoi the_Philippines:Manila Malaysia:Kuala_Lumpur South_Korea:Seoul
North_Korea:Pyongyang Nepal:Kathmandu Bangladesh:Dhaka Pakistan:Islamabad Afghanistan:Kabul Iran:Tehran
Iraq:Baghdad Syria:Damascus Lebanon:Beirut Jordan:Amman Saudi_Arabia:Riyadh Morocco:Rabat Tunisia:Tunis
Libya:Tripoli Sudan:Khartoum Ethiopia:Addis_Ababa Uganda:Kampala Ghana:Accra Nigeria:Abuja Senegal:Dakar
Cuba:Havana Jamaica:Kingston Mexico:Mexico_City Venezuela:Caracas Ecuador:Quito Peru:Lima Chile:Santiago
Argentina:Buenos_Aires Uruguay:Montevideo Australia:Canberra New_Zealand:Wellington
"""
OTHER_CAPITALS = """
Slovenia:Ljubljana Slovakia:Bratislava Belarus:Minsk Lithuania:Vilnius Latvia:Riga Estonia:Tallinn Albania:Tirana
Cyprus:Nicosia Malta:Valletta Armenia:Yerevan Azerbaijan:Baku Oman:Muscat Qatar:Doha Cambodia:Phnom_Penh
Laos:Vientiane Kazakhstan:Astana Uzbekistan:Tashkent Algeria:Algiers Somalia:Mogadishu Rwanda:Kigali
Tanzania:Dodoma Zambia:Lusaka Zimbabwe:Harare Mozambique:Maputo Angola:Luanda Namibia:Windhoek Botswana:Gaborone
Mali:Bamako Niger:Niamey Liberia:Monrovia Nicaragua:Managua Honduras:Tegucigalpa
"""
PAST_TENSES = """
go:went eat:ate drink:drank write:wrote give:gave fly:flew swim:swam think:thought bring:brought catch:caught
teach:taught speak:spoke break:broke drive:drove come:came begin:began know:knew grow:grew find:found hold:held
play:played jump:jumped sleep:slept leave:left make:made say:said tell:told keep:kept feel:felt meet:met send:sent
spend:spent build:built lose:lost win:won stand:stood understand:understood sit:sat fall:fell draw:drew throw:threw
blow:blew wear:wore choose:chose freeze:froze steal:stole ride:rode rise:rose shake:shook forget:forgot hear:heard
pay:paid sell:sold lead:led feed:fed fight:fought hide:hid bite:bit dig:dug stick:stuck swing:swung sweep:swept
lend:lent bend:bent become:became tear:tore open:opened call:called look:looked ask:asked help:helped work:worked
want:wanted need:needed live:lived love:loved move:moved close:closed stop:stopped plan:planned try:tried cry:cried
study:studied carry:carried wait:waited talk:talked visit:visited cook:cooked clean:cleaned dance:danced
smile:smiled laugh:laughed start:started finish:finished watch:watched listen:listened paint:painted climb:climbed
push:pushed pull:pulled
"""


class Kind(NamedTuple):
    """`held_out_from` is what held-out rows are drawn from; the rest of it and `train_only` are for training."""

    name: str
    question: str
    solved: str
    held_out_from: str
    train_only: str


KINDS = (
    Kind(
        "capital",
        "What is the capital of {}?",
        "France:Paris Japan:Tokyo Egypt:Cairo Canada:Ottawa Italy:Rome Kenya:Nairobi",
        WELL_KNOWN_CAPITALS,
        OTHER_CAPITALS,
    ),
    Kind(
        "past tense",
        "What is the past tense of {}?",
        "sing:sang take:took walk:walked buy:bought run:ran see:saw",
        PAST_TENSES,
        "",
    ),
)


def main() -> None:
    train: list[dict[str, object]] = []
    held_out: list[dict[str, object]] = []
    for kind in KINDS:
        pool = pairs(kind.held_out_from)
        random.Random(0).shuffle(pool)
        held_out += [row(kind, asked, answer) for asked, answer in pool[:NUM_HELD_OUT]]
        train += [row(kind, asked, None) for asked, _ in pool[NUM_HELD_OUT:] + pairs(kind.train_only)]
    for name, rows in (("train", train), ("heldout", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path(__file__).with_name(f"{name}.jsonl").write_text(lines, encoding="utf-8")


def pairs(text: str) -> list[tuple[str, str]]:
    """What is asked for and the answer."""
    split = [item.replace("_", " ").partition(":") for item in text.split()]
    return [(asked, answer) for asked, _, answer in split]


def row(kind: Kind, asked: str, answer: str | None) -> dict[str, object]:
    question = kind.question.format(asked)
    solved = [
        message
        for example, example_answer in pairs(kind.solved)
        for message in (
            {"role": "user", "content": kind.question.format(example)},
            {"role": "assistant", "content": f"Answer: {example_answer}"},
        )
    ]
    prompt: dict[str, object] = {
        "kind": kind.name,
        "messages": [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}],
        "teacher_messages": [*solved, {"role": "user", "content": question}],
    }
    return prompt if answer is None else prompt | {"answer": f"Answer: {answer}", "verifier": "exact"}


if __name__ == "__main__":
    main()
