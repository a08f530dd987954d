"""Goldens of the language model's parts, small enough for `cargo test`: `python tests/parity/language_small.py [templates|tokenizers|answers]`.

transformers renders the chat templates, tokenises and answers; what it says is written beside the tests that hold the project to it.
"""

from __future__ import annotations

import datetime
import json
import sys

import jinja2
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import sketch
import texts
from asking import ROOT, Messages, answer, simplify, summarize, summarize_again

SUMMARIZER = ROOT / "services/summarizer/tests"
CAPTIONS = ["a large red circle on a blue background", "two dogs, one of them asleep.", "a sign that says \"stop\""]


def write(name: str, cases: list[dict]) -> None:
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    path = SUMMARIZER / "goldens" / name
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{name}: {len(cases)} cases, {path.stat().st_size} bytes")


# Chat templates.


class Day(datetime.datetime):
    """The day that the project tells templates, so that a label does not depend on the day that it was made."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


HARD = {
    "quotes, braces and tags": [
        "\"quoted\" 'and' `ticked` \\n \\ back", "{{ messages }} {% if x %} {# no #} {\"a\": 1} }} %}",
        "<b>&amp;</b> <|im_end|> [INST] </s> <think>so</think> that",
    ],
    "white space": [
        "  leading and trailing \n", "\n\tlines\r\nof several\n\n kinds\u2028\u0085.", "\u00a0\u3000no-break and wide\u2003", "\x0bother\x0c", "", " \n ",
    ],
    "scripts": [
        "ein Straßenschild in Łódź ǅ", "一只猫坐在垫子上 👩‍👩‍👧‍👦 e\u0301", "كلب أحمر שלום \u202eабв", "İstanbul ﬁne ΌΣΟΣ ñandú o'clock-ish they're", "a stop sign!",
    ],
}


def conversations() -> dict[str, Messages]:
    made = {
        "prompt 1": simplify(CAPTIONS[0]), "prompt 1, awkward": simplify(CAPTIONS[2]), "prompt 2": summarize(CAPTIONS),
        "prompt 2, asked again": summarize_again(CAPTIONS),
    }
    for name, texts in HARD.items():
        texts = texts if len(texts) % 2 else [*texts, "and then?"]
        made[name] = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    made["two turns of the user"] = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    return made


def templates() -> None:
    chat_template_utils.datetime = Day
    folder, cases = SUMMARIZER / "fixtures/templates", []
    for about in json.loads((folder / "templates.json").read_text()):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **about["tokens"])
        tokenizer.chat_template = (folder / about["file"]).read_text()
        for name, messages in conversations().items():
            if about["file"] == "everything.jinja" and name.startswith("prompt"):
                continue  # it says much of each message
            try:
                result = {"prompt": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)}
            except jinja2.exceptions.TemplateError as error:
                result = {"refused": str(error)}
            cases.append({"file": about["file"], "conversation": name, **result})
    write("conversations.json", [{"conversation": k, "messages": v} for k, v in conversations().items()])
    write("templates.json", cases)


# Tokenizers.


def tokenizers() -> None:
    """Digests of each hundred of the texts: ids with and without special tokens, and the ids as text again."""
    folder = ROOT / "crates/onnx/tests/goldens/tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    lines = texts.texts()
    (folder / "texts.json").write_text(json.dumps(lines, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    cases = []
    # What CLIP's ids mean is never asked.
    for name, decodes in (("captioner", [False, True]), ("clip", []), ("summarizer", [False, True])):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/sketch" / name)
        tokenizer.model_max_length = 10**6
        made = {"plain": [tokenizer(line, add_special_tokens=False).input_ids for line in lines], "special": [tokenizer(line).input_ids for line in lines]}
        for clean_up in decodes:
            tokenizer.clean_up_tokenization_spaces = clean_up
            made["cleaned_up" if clean_up else "decoded"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made["special"]]
        cases.append({"model": name} | {k: [texts.digest(v[i : i + 100]) for i in range(0, len(lines), 100)] for k, v in made.items()})
    (folder / "digests.json").write_text(json.dumps(cases, indent=1) + "\n")
    print(f"texts.json: {(folder / 'texts.json').stat().st_size} bytes")


# Answers.


def answers() -> None:
    """The sketch suite's language model, as a transformers module."""
    model, tokenizer = sketch.language_model(), AutoTokenizer.from_pretrained(ROOT / "models/sketch/summarizer")
    captions = [
        "a large red circle on a blue background", "a picture of a small green star and a large blue ring on a yellow background", "purple horizontal stripes",
        "a red background", "an orange triangle with dots", "a drawing of a white square beside a small black heart",
    ]
    asked = [simplify(caption) for caption in captions] + [summarize(captions[i:]) for i in range(4)] + [summarize_again(captions[i : i + 2]) for i in range(4)]
    cases = []
    for n, messages in enumerate(asked):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        for temperature in (0.0, 0.3, 1.5):
            said, margins = answer(model, ids, {tokenizer.eos_token_id}, prompt, temperature, 5, n, 16)
            text = tokenizer.decode(said, skip_special_tokens=True).strip()
            cases.append({"messages": messages, "attempt": n, "temperature": temperature, "text": text, "tokens": len(said), "closest": round(min(margins), 7)})
    print(f"the closest choices: {sorted(case['closest'] for case in cases)[:3]}; {len({case['text'] for case in cases})} different answers")
    write("answers.json", cases)


def main(parts: list[str]) -> None:
    known = {"templates": templates, "tokenizers": tokenizers, "answers": answers}
    for part in parts or known:
        known[part]()


if __name__ == "__main__":
    main(sys.argv[1:])
