# ruff: noqa: F821
# How EvalPlus compares a solution with the reference. evaluate.py reads this file as text: it is
# the test of each problem of HumanEval+ and MBPP+, after a line that sets TASK, NAME and TOLERANCE.
# The sandbox provides DATA (the arguments of each call) and REFERENCE (the problem's own solution).
import copy
import math

# Functions whose order of results is not defined
SETS = ["similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly",
        "larg_nnum", "intersection_array", "find_dissimilar", "Diff"]


def deep_tuple(value):
    return tuple(map(deep_tuple, value)) if isinstance(value, list) else value


def tuple_or_value(value):
    return tuple(value) if isinstance(value, list) else value


def set_or_dict(value):
    return set(value) if isinstance(value, list) and value else {}


# Arguments that JSON cannot hold, by the number of the task of MBPP+
ARGUMENTS = [
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
     lambda *args: [tuple(item) for item in args]),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
     lambda *args: [[tuple(item) for item in items] for items in args]),
    ("75 413 444 753", lambda first, *rest: [[tuple(item) for item in first], *rest]),
    ("250 307 405 446 617 720 763 808", lambda first, *rest: [tuple(first), *rest]),
    ("106 750", lambda first, second: [first, tuple(second)]),
    ("278", lambda first: [tuple(map(tuple_or_value, first))]),
    ("259 401 445 580 615 791", lambda *args: list(map(deep_tuple, args))),
    ("115", lambda first: [list(map(set_or_dict, first))]),
    ("124", lambda first, second: [float(first), complex(second)]),
    ("252", lambda first: [complex(first)]),
    ("722", lambda first, *rest: [{key: tuple(value) for key, value in first.items()}, *rest])]


def arguments(values):
    """The arguments of a call as the reference solution expects them."""
    benchmark, number = TASK.split("/")
    for numbers, convert in ARGUMENTS:
        if benchmark == "Mbpp" and number in numbers.split():
            return convert(*values)
    return values


def floats(value):
    return isinstance(value, float) or (isinstance(value, (list, tuple)) and len(value) > 0
                                        and all(isinstance(item, float) for item in value))


def close(value, expected, tolerance):
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(
            close(*pair, tolerance) for pair in zip(value, expected))
    return value == expected or abs(value - expected) <= tolerance + 1e-7 * abs(expected) < math.inf


def right(value, expected, inputs, tolerance):
    if NAME == "find_zero":
        return abs(sum(c * math.pow(value, i) for i, c in enumerate(inputs[0]))) <= tolerance
    if NAME == "are_equivalent" or NAME == "sum_div" and value == 0:
        return True
    if NAME == "surface_Area":
        edge, height = inputs
        other = round(edge ** 2 + 2 * edge * math.sqrt(edge ** 2 / 4 + height ** 2))
        return value == expected or abs(value - other) <= tolerance
    if NAME == "digit_distance_nums":
        first, second = (str(number).zfill(40) for number in inputs)
        other = sum(abs(int(a) - int(b)) for a, b in zip(first, second))
        return value in (expected, other)
    if NAME in SETS:
        return set(value) == set(expected)
    if NAME in ("check_str", "text_match_three", "text_starta_endb"):
        matches = value if isinstance(value, bool) else value is not None
        return matches == (expected is not None)
    if tolerance == 0 and floats(expected):
        tolerance = 1e-6
    if value == expected or tolerance == 0:
        return value == expected
    return type(value) is type(expected) and close(value, expected, tolerance)


def check(candidate):
    for values in DATA:
        inputs = arguments(values)
        expected = REFERENCE(*copy.deepcopy(inputs))
        value = candidate(*copy.deepcopy(inputs))
        assert right(value, expected, inputs, TOLERANCE), f"{NAME}{tuple(inputs)}"[:200]
