"""Advice for atc's error codes. Takes what atc printed, returns one sentence per cause, in the
user's language.

`error_advice.json` maps codes, families of codes and phrases to {language: [meaning, action]}.
"""

import json
import os
import re
from pathlib import Path

CODE = re.compile(r"\b[EWI][0-9A-Z]\d{4}\b")


def advice(text: str) -> list[str]:
    """For every known phrase and error code in atc's output: code, meaning and what to do."""
    table = json.loads(Path(__file__).with_name("error_advice.json").read_text(encoding="utf-8"))
    found = {phrase: entry for phrase, entry in table["phrases"].items() if phrase in text}
    for code in CODE.findall(text):
        if code.startswith("E"):
            found[code] = _entry(table, code)
    return [_sentence(name, entry, text) for name, entry in found.items() if entry]


def _entry(table: dict, code: str) -> dict | None:
    """The code's own entry, else that of its family with the longest prefix."""
    families = [start for start in table["families"] if code.startswith(start)]
    return table["codes"].get(code) or table["families"].get(max(families, key=len, default=None))


def _sentence(name: str, entry: dict, text: str) -> str:
    meaning, action = entry[language()]
    line = next(line for line in text.splitlines() if name in line)
    return f"{name}: {meaning} ({line.strip()[:200]}): {action}"


def language() -> str:
    """ "zh" in a Chinese locale, else "en"."""
    for variable in ("LC_ALL", "LC_MESSAGES", "LANG"):
        locale = os.environ.get(variable)
        if locale:
            return "zh" if locale.startswith("zh") else "en"
    return "en"
