# SPDX-License-Identifier: Apache-2.0
"""Names with fields, read and written by one template; regular expressions are generated.

Fields in braces stand for the parts of a name that vary:

    {n}          an integer
    {n+1}        an integer that is one more on this side
    {last-n}     an integer counted from the other end; the table defines `last`
    {p:q|k|v}    one of these words; the other side has {p}, or as many other words
    {*}          anything (only in names to be left out)
"""

import re
from collections.abc import Mapping


_INTEGER = "(?:0|[1-9][0-9]*)"


class Template:
    """One side of a row, able to read its fields from a name and to make a name from them."""

    def __init__(self, text: str, words: Mapping[str, tuple[str, ...]], constants):
        self.text = text
        pattern, self._fields = "", []
        for position, part in enumerate(re.split(r"\{([^{}]*)\}", text)):
            if position % 2 == 0:
                pattern += re.escape(part)
                continue
            name, offset, sign, choices = _field(part, words, constants)
            self._fields.append((part, name, offset, sign, choices))
            if name == "*":
                pattern += "(.*)"
            elif choices:
                pattern += "(" + "|".join(re.escape(word) for word in choices) + ")"
            else:
                pattern += f"({_INTEGER})"
        self._regex = re.compile(pattern)

    def read(self, name: str) -> dict[str, int] | None:
        """Values of the fields in `name`, or None when it has another form."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        values = {}
        fields = zip(self._fields, found.groups(), strict=True)
        for (_, key, offset, sign, choices), text in fields:
            if key == "*":
                continue
            value = choices.index(text) if choices else sign * (int(text) - offset)
            if value < 0 or values.setdefault(key, value) != value:
                return None
        return values

    def write(self, values: Mapping[str, int]) -> str:
        """The name with these field values."""
        text = self.text
        for part, key, offset, sign, choices in self._fields:
            value = choices[values[key]] if choices else offset + sign * values[key]
            text = text.replace("{" + part + "}", str(value))
        return text


def _field(part, words, constants):
    """(name, offset, sign, choices) of the text between braces; the number is offset+sign*n."""
    if ":" in part:
        name, choices = part.split(":")
        return name, 0, 1, tuple(choices.split("|"))
    if "+" in part:
        name, offset = part.split("+")
        return name, int(offset), 1, ()
    if "-" in part:
        constant, name = part.split("-")
        return name, constants[constant], -1, ()
    return part, 0, 1, words.get(part, ())


def words_of(template: str) -> dict[str, tuple[str, ...]]:
    fields = (part for part in re.findall(r"\{([^{}]*)\}", template) if ":" in part)
    return {p.split(":")[0]: tuple(p.split(":")[1].split("|")) for p in fields}
