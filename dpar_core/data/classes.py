"""Class names and labels: numbers, text, the names a source gives, classes.txt. Classes never merge and never move."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpar_core.data.splits import first_few

CLASSES = "classes.txt"
MOST_CLASSES = 1 << 20  # a larger number is not a class
_LONGEST_NAME = 1000  # characters
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
# Text that is a number of another kind, as 1.0 or nan. Padded ones (007) are names, which sort as their numbers do.
_SEVERAL_NUMBERS = re.compile(r"[\[(]?\s*-?[0-9]+(\s*[\s,;|]\s*-?[0-9]+)+\s*[\])]?")  # as "3 17" or "[0, 1, 0]"
_OTHER_NUMBER = re.compile(
    r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|0x[0-9a-f]+|[+-]?(nan|inf|infinity)", re.IGNORECASE
)


class Classes(NamedTuple):
    """Classes of a source, and the label of each image. See `Listing` for the flags.

    names: unique, in label order.
    labels: an index into names for each image.
    """

    names: list[str]
    labels: list[int]
    numbered: bool
    doubles: bool
    notes: list[str]


def normal_name(name: str) -> str:
    """Return a name as it is compared here: NFC, so that the forms of Linux and macOS are equal, without outer spaces.

    Characters that cannot be printed, as line ends, are spaces.
    """
    shown = name if name.isprintable() else "".join(one if one.isprintable() else " " for one in name)
    return unicodedata.normalize("NFC", shown).strip()


def unique_names(names: Sequence[str]) -> list[str]:
    """Return names of which none is empty or occurs twice: those get their number, as `crane (134)`; the order stays."""
    found = [normal_name(name) for name in names]
    while True:
        counts = Counter(found)
        if len(counts) == len(found) and "" not in counts:
            return found
        found = [f"{name} ({label})".strip() if counts[name] > 1 or not name else name for label, name in enumerate(found)]


def checked_label(value: object, where: str) -> int | str:
    """Return the label that a source holds for an image: a class number, or text that is none.

    Raises ValueError, beginning with `where`, for nothing, for a number that is not a class, for text that is a number of
    another kind (1.0, nan), that holds control characters, that is empty or too long for a name.
    """
    if isinstance(value, str):
        text = normal_name(value)
        if not text or len(text) > _LONGEST_NAME:
            raise ValueError(f"{where} has the label {value[:60]!r} ({len(value):,} characters), expected a class")
        if _SEVERAL_NUMBERS.fullmatch(text):
            raise ValueError(f"{where} has the label {text[:60]!r}, several numbers, expected one class")
        shown = value.strip()
        odd = not shown.isprintable() and any(unicodedata.category(one) == "Cc" for one in shown)
        if _NUMBER.fullmatch(text):
            value = int(text)
        elif odd or (_OTHER_NUMBER.fullmatch(text) and not re.fullmatch("0[0-9]+", text)):
            raise ValueError(f"{where} has the label {value[:60]!r}, expected a class number, as 3, or a name")
        else:
            value = text
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{where} has the label {str(value)[:60]}, expected a class number or name")
    if isinstance(value, int) and not 0 <= value < MOST_CLASSES:
        raise ValueError(f"{where} has the label {value}, expected a class number from 0 to below {MOST_CLASSES:,}")
    return value


def resolve_labels(
    values: Sequence[int | str], names: Sequence[str] | None, beside: Path, *, where: str, written: bool
) -> Classes:
    """Find the classes that labels stand for.

    values: a label per image, from `checked_label`.
    names: what the source calls its classes, in label order, or None.
    beside: a classes.txt that may exist, and is then what counts.
    written: labels come as text, numbers as well. Text labels without a list are numbered in sorted order (by code point).

    Raises ValueError, beginning with `where`, for labels that are partly text, or in no list, or that may be numbers and
    names alike, and for a classes.txt that has the source's names in another order.
    """
    listed = read_class_names(beside) if beside.exists() else names
    origin = str(beside) if beside.exists() else "the names in the source"
    text = [value for value in values if isinstance(value, str)]
    if not text:
        numbers = [(label, name) for label, name in enumerate(map(normal_name, listed or ())) if _NUMBER.fullmatch(name)]
        if written and (moved := [(label, name) for label, name in numbers if int(name) != label]):
            raise ValueError(
                f"{where}: labels are numbers written as text, and in {origin} class {moved[0][0]} is named "
                f"{moved[0][1]!r}, so a label may mean either: write labels as integers, or name classes by words"
            )
        if listed is not names:
            _refuse_moved(listed or (), names or (), origin, where)
        return _numbers(values, listed, origin, where)
    if listed is None and len(text) < len(values):
        number = next(value for value in values if not isinstance(value, str))
        raise ValueError(
            f"{where}: labels are partly numbers (as {number}) and partly text (as {text[0][:60]!r}): mend them, or put "
            f"{CLASSES} (a name per line, in the order of the labels) beside the data"
        )
    found = [str(value) for value in values]
    different = set(found)
    if listed is None:
        order = sorted(different)
        return Classes(order, _places(found, order), False, False, [f"{len(order)} text labels, numbered in sorted order"])
    order = [normal_name(name) for name in listed]
    double = [name for name, count in Counter(order).items() if count > 1 and name in different]
    if double:
        raise ValueError(f"{where}: labels say {double[0]!r}, which stands twice in {origin}: label images by number")
    unknown = sorted(different - set(order))
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} labels are not in {origin} (first: {unknown[0][:60]!r}, {len(order)} names): mend them"
        )
    return Classes(unique_names(order), _places(found, order), False, False, [f"text labels, numbered as in {origin}"])


def _numbers(values: Sequence[int | str], names: Sequence[str] | None, origin: str, where: str) -> Classes:
    labels = [int(value) for value in values]
    highest = max(labels, default=-1)
    if names is None:
        return Classes([str(number) for number in range(highest + 1)], labels, True, False, [])
    if highest >= len(names):
        raise ValueError(f"{where}: a label is {highest}, but {origin} names {len(names)} classes, 0 to {len(names) - 1}")
    unique = unique_names(names)
    counts = Counter(normal_name(name) for name in names)
    doubles = [name for name, count in counts.items() if count > 1]
    notes = []
    if doubles:
        shown = ", ".join(name for name in unique if re.sub(r" \(\d+\)$", "", name) in doubles[:3])
        notes.append(f"class names that occur more than once stay classes of their own: {shown}")
    return Classes(unique, labels, False, bool(doubles), notes)


def _refuse_moved(listed: Sequence[str], names: Sequence[str], origin: str, where: str) -> None:
    """Raise ValueError where classes.txt gives another number to a name than the source does."""
    place = {normal_name(name): label for label, name in enumerate(names)}
    for label, name in enumerate(map(normal_name, listed)):
        if place.get(name, label) != label and len(place) == len(names):
            raise ValueError(
                f"{where}: class {place[name]} is {name!r} by the names in the source, which is class {label} in {origin}: "
                "put its lines into the order of the labels, or remove it"
            )


def _places(found: Sequence[str], order: Sequence[str]) -> list[int]:
    label = {name: number for number, name in enumerate(order)}
    return [label[name] for name in found]


def read_class_names(path: Path) -> list[str]:
    """Read classes.txt: a name per line, in label order. Raises ValueError when lines are empty or it is not text."""
    try:
        lines = re.split(r"\r\n?|\n", path.read_bytes().decode("utf-8-sig"))  # splitlines cuts at form feeds as well
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    names = [normal_name(line) for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        found = f"line {names.index('') + 1} of {path} is empty" if names else f"{path} is empty"
        raise ValueError(f"{found}: expected the name of a class on every line, in the order of the labels")
    for place, pattern in (("before", r"([0-9]{1,9})[\s,:]+\S.*"), ("behind", r".*\S[\s,:]+([0-9]{1,9})")):
        numbers = [match[1] for match in (re.fullmatch(pattern, name) for name in names) if match]
        if len(numbers) < len(names):  # as "0 tench", or "tench,0"
            continue
        values = [int(number) for number in numbers]
        counting = list(range(min(values), min(values) + len(values)))
        if values != counting and (place == "before" or sorted(values) == counting):  # "Sedan 2012" ends in a year
            raise ValueError(
                f"the numbers {place} the names in {path} do not count up by one ({first_few(numbers)}): lines must stand "
                "in the order of the labels"
            )
    return names
