"""Assign classes to head, medium and tail by their training counts."""

from collections.abc import Sequence

GROUPS = ("head", "medium", "tail")
UNKNOWN = "unknown"

# The field's many / medium / few shot (Liu et al. 2019): over 100 training pictures, 20 to 100, under 20.
HEAD_ABOVE, TAIL_BELOW = 100, 20
# If that leaves a group empty: shares of the classes, by rank.
HEAD_SHARE, MEDIUM_SHARE = 0.3, 0.4


_BY_COUNT = {"head": f"over {HEAD_ABOVE}", "medium": f"{TAIL_BELOW} to {HEAD_ABOVE}", "tail": f"under {TAIL_BELOW}"}
_BY_RANK = {"head": f"the largest {HEAD_SHARE:.0%}", "medium": f"the next {MEDIUM_SHARE:.0%}",
            "tail": f"the smallest {1 - HEAD_SHARE - MEDIUM_SHARE:.0%}"}


def meaning_of(group: str, groups_by: str, unit: str = " training pictures") -> str:
    """Which classes a group has, in words: "under 20 training pictures", or "the smallest 30%" by rank."""
    if group == UNKNOWN:
        return "training pictures not known"
    return _BY_RANK[group] if groups_by == "rank" else _BY_COUNT[group] + unit


def group_of_count(count: int) -> str:
    """head above 100 training pictures, tail below 20, medium between."""
    return "head" if count > HEAD_ABOVE else "tail" if count < TAIL_BELOW else "medium"


def assign_groups(class_counts: Sequence[int] | None, num_classes: int | None = None) -> tuple[tuple[str, ...], str]:
    """The group of each class, and how it was found: "count", "rank" or "unknown".

    class_counts  training pictures of each class, without meta and test set; None if they are not known: then each of
                  the num_classes classes is "unknown"

    By count (head > 100, medium 20 to 100, tail < 20) if each group gets a class. Else by rank: the largest 30 % of
    the classes are head, the next 40 % medium, the rest tail; equal counts keep the order of the classes. With two
    classes the larger is head, the smaller tail. The model folder stores the groups.
    """
    if class_counts is None:
        return (UNKNOWN,) * (num_classes or 0), UNKNOWN
    by_count = tuple(group_of_count(n) for n in class_counts)
    if set(by_count) == set(GROUPS):
        return by_count, "count"
    total = len(class_counts)
    heads = max(1, round(HEAD_SHARE * total))
    tails = max(1, total - heads - round(MEDIUM_SHARE * total))
    ranked = sorted(range(total), key=lambda c: -class_counts[c])
    groups = ["medium"] * total
    for c in ranked[:heads]:
        groups[c] = "head"
    for c in ranked[max(heads, total - tails) :]:
        groups[c] = "tail"
    return tuple(groups), "rank"
