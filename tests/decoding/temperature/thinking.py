"""Which texts are within thinking, by a plain loop."""

from decoding.temperature.markers import Markers

# Spellings, by place: one of a token, others of several, one that another's tail stands in.
BEGIN = [[[1]], [[2], [3, 4], [2]]]
END = [[[5]], [[4], [2]], [[6], [6]]]
SMALL = 8  # ids below it make texts with many markers


def markers():
    return Markers(BEGIN, END)


def stands_at(spelling, ids, end):
    begin = end - len(spelling)
    return begin >= 0 and all(id_ in place for id_, place in zip(ids[begin:end], spelling, strict=True))


def is_thinking(ids, begin=BEGIN, end=END, before=False):
    ids = list(ids)
    for stop in range(len(ids), 0, -1):
        if any(stands_at(spelling, ids, stop) for spelling in end):
            return False
        if any(stands_at(spelling, ids, stop) for spelling in begin):
            return True
    return before
