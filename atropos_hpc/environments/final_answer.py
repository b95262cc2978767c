"""Read the final number of an answer in any usual spelling, exactly, and compare two of them.

Plain numbers, fractions, mixed numbers, exponents and sums of these are read here, as fractions.
Other mathematics (roots, powers) goes to math-verify, within bounds: sympy would compute a tower of
powers that a policy writes for as long as it takes.
"""

import logging
import re
from fractions import Fraction

MARKER = "####"
LONGEST = 120  # characters of an expression; a longer one is no final number
_DASHES = dict.fromkeys(map(ord, "\u2212\u2012\u2013\u2014\ufe63\uff0d"), "-")
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2009\u202f"), " ")
_REWRITES = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\{,\}|\\[,;!]", lambda match: "," if match[0] == "{,}" else ""),
        (r"\\([$%&#_])", r"\1"),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2 "),
        (r"\\frac\s*(\d)\s*(\d)", r" \1/\2 "),
        (r"\s*(?:\\times|\\cdot|[×x*·])\s*10\s*\^\s*\{?\s*(-?\d{1,3})\s*\}?", r"e\1"),
        (r"\\times|\\cdot|×|·", "*"),
        (r"\\div|÷", "/"),
        (r"\\(?:left|right|quad|displaystyle)\b|\\[()\[\]]", " "),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    )
)
_UNSIGNED = r"(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,3})?"
_VALUE = rf"(?:(?P<whole>\d{{1,40}})\s+)?(?P<top>{_UNSIGNED})(?:\s*/\s*(?P<bottom>{_UNSIGNED}))?"
_SIGN = r"(?P<sign>[-+]?)\s*[$€£]?\s*(?P<inner>[-+]?)\s*"
_FIRST = re.compile(rf"[^\w.+$€£-]*{_SIGN}{_VALUE}")
_LAST = re.compile(rf"(?P<sign>(?<![\w.)])(?<![\w.)] )-\s?|)[$€£]?(?P<inner>-?){_VALUE}")
_OPERATION = re.compile(r"\s*[-+*/^]\s*[\d(.$\\]")
_TERM = re.compile(rf"\s*(?:(?P<operator>[-+*/])|(?P<number>[$€£]?{_UNSIGNED}))")

# What sympy would compute for as long as it takes: towers, large powers, factorials and their kin
_LARGE = re.compile(r"\^.*\^|\^\{?\s*-?\d{3}|\*\*|!|\d{13}|(?i:binom|choose|gamma)")
_SMALL_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{\d{1,3}\}\s*\{\d{1,3}\}")


def final_number(text: str) -> Fraction | None:
    """Return an answer's final number, None if there is none.

    It comes after the last #### that is followed by something, else in the last \\boxed{}, else it
    is the last number.
    """
    expression = _marked(text)
    if expression is None:
        return _last_number(_plain(text[-2000:]))
    return value(expression)


def is_right(text: str, answer: str) -> bool:
    """Return whether `text` has the final number of `answer`, by value: 21.50 is 43/2."""
    gold, given = final_number(answer), final_number(text)
    if gold is None:
        return False
    if given is not None:
        return given == gold
    expression = _marked(text)
    return expression is not None and _verified(expression, gold)


def is_strictly_right(text: str, answer: str) -> bool:
    """Return whether the number after the last #### is right: the format that prompts ask for."""
    expression = _after_marker(text)
    return expression is not None and _equals(value(expression), answer)


def is_flexibly_right(text: str, answer: str) -> bool:
    """Return whether the last number of `text`, in whatever format, is right."""
    return _equals(_last_number(_plain(text[-2000:])), answer)


def _equals(given: Fraction | None, answer: str) -> bool:
    return given is not None and given == final_number(answer)


def value(expression: str) -> Fraction | None:
    """Return the number that an expression begins with, or equals; units may follow it.

    >>> value("-$5"), value("1 1/2 hours"), value("2 + 3 = 5"), value(r"\\frac{1}{2}")
    (Fraction(-5, 1), Fraction(3, 2), Fraction(5, 1), Fraction(1, 2))
    """
    plain = _plain(expression)
    right = next((part for part in reversed(plain.split("=")) if re.search(r"\d", part)), "")
    found = _FIRST.match(right)
    if found is None:
        words = re.search(rf"(?<![\w.]){_SIGN}{_VALUE}", right)  # "x is 5"
        return _number(words) if words and "\\" not in right and "(" not in right else None
    if _OPERATION.match(right, found.end()):
        return _evaluate(right)
    return _number(found)


def _marked(text: str) -> str | None:
    """Return what an answer marks as its final expression, None without a marker."""
    return _after_marker(text) or _boxed(text)


def _after_marker(text: str) -> str | None:
    """Return the line after the last #### that is followed by something."""
    for part in reversed(text.split(MARKER)[1:]):
        line = next((line for line in part.splitlines() if re.search(r"\w", line)), None)
        if line is not None:
            return (_boxed(line) or line)[:LONGEST]
    return None


def _boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{} that is not empty, whatever braces it has."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth, end = 1, start
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        content = text[start : end - 1 if not depth else end]
        if content.strip():
            return _boxed(content) or content[:LONGEST]
    return None


def _plain(text: str) -> str:
    text = text.translate(_DASHES | _SPACES)
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    return text


def _last_number(text: str) -> Fraction | None:
    found = None
    for match in _LAST.finditer(text):
        found = match
    if found is None:
        return None
    number = _number(found)
    if found["whole"] is None or found["bottom"] is not None:
        return number
    return _number(_FIRST.match(found["top"]))  # of two numbers in a row, the last


def _number(match: "re.Match[str] | None") -> Fraction | None:
    if match is None:
        return None
    top, bottom = Fraction(match["top"].rstrip(".")), Fraction((match["bottom"] or "1").rstrip("."))
    if not bottom:
        return None
    whole = match["whole"]
    if whole is not None and match["bottom"] is None:  # two numbers in a row: the first counts
        top, whole = Fraction(whole), None
    size = top / bottom + (Fraction(whole) if whole is not None else 0)
    negative = (match["sign"].strip() == "-") != (match["inner"] == "-")
    return -size if negative else size


def _evaluate(expression: str) -> Fraction | None:
    """Compute a sum of products of numbers; None for anything else."""
    total, product, operator, sign, at = Fraction(0), None, "*", 1, 0
    expression = expression.strip().rstrip(".")
    while at < len(expression):
        term = _TERM.match(expression, at)
        if term is None:
            return None
        at = term.end()
        if term["number"] is not None:
            number = sign * Fraction(term["number"].lstrip("$€£").rstrip("."))
            if operator == "/" and not number:
                return None
            if product is None:
                product = number
            elif operator:
                product = product / number if operator == "/" else product * number
            else:
                return None
            operator, sign = "", 1
        elif operator:  # a sign
            if term["operator"] not in "+-":
                return None
            sign = -sign if term["operator"] == "-" else sign
        elif term["operator"] in "+-":
            assert product is not None
            total, product, operator = total + product, None, "*"
            sign = -1 if term["operator"] == "-" else 1
        else:
            operator = term["operator"]
    return None if product is None else total + product


def _verified(expression: str, gold: Fraction) -> bool:
    """Compare by math-verify what has no number of its own, such as \\sqrt{16}."""
    if _LARGE.search(_SMALL_BINOMIAL.sub("", expression)):
        return False
    from math_verify import parse, verify

    # No timeouts: they need SIGALRM in the main thread. The bounds above keep it quick, and the
    # library's warnings about it are of no use.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    given = parse(f"${expression.strip().strip('$')}$", parsing_timeout=None)
    wanted = parse(f"${gold.numerator}/{gold.denominator}$", parsing_timeout=None)
    return bool(verify(wanted, given, timeout_seconds=None))
