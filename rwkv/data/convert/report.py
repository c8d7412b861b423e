"""Report of a conversion: schemas of the records, roles, tokens that contribute to the loss,
skipped records, warnings.

Workers count in a Counter with these keys:
- ("schema", name): documents with that schema
- ("role", role): messages
- ("name", role, name): messages, by the role's name in the data
- ("skipped", reason), ("remark", sentence): records
- ("unused", "records" or "messages", field): of conversations, with a field that was not converted
- ("warning", sentence): occurrences
- ("plain", ""): documents without turns, where only answers should contribute to the loss
- ("trained", ""): tokens that contribute to the loss
- ("untrained", ""): documents without such a token
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rwkv.data.convert import roles

_WARN_SHARE = 0.01  # of documents without loss tokens, from which there is a warning


def lines(counts: Counter, documents: int, tokens: int, masked: bool) -> list[str]:
    """Report lines, warnings last; empty for plain text without skipped records.

    Args:
        documents, tokens: numbers written.
    """
    found = []
    schemas = _of(counts, "schema")
    if masked or set(schemas) - {"text"}:
        found.append(f"records:  {_listed(schemas)}")
    if by_role := _of(counts, "role"):
        found.append(
            "roles:    " + ", ".join(f"{role} {number:,}{_named(counts, role)}" for role, number in by_role.items())
        )
    if masked:
        trained, untrained = counts["trained", ""], counts["untrained", ""]
        share = f"{trained:,} of {tokens:,} tokens ({trained / max(1, tokens):.0%}) contribute to the loss"
        found.append(f"loss:     {share}; {untrained:,} of {documents:,} documents have none")
    if plain := counts["plain", ""]:
        found.append(
            f"note: documents without turns such as User: and Assistant:, which contribute to the loss as a whole: {plain:,}"
        )
    found += [f"note: {remark}: {number:,}" for remark, number in _of(counts, "remark").items()]
    for level in ("records", "messages"):
        if unused := _by_name(counts, "unused", level):
            found.append(f"note: fields of {level} that were not converted: {_shortened(unused)}")
    found += [f"note: skipped {why}: {number:,}" for why, number in _of(counts, "skipped").items()]
    found += [f"warning: {warning}: {number:,}" for warning, number in _of(counts, "warning").items()]
    if masked and documents and counts["untrained", ""] >= _WARN_SHARE * documents:
        found.append(f"warning: {_untrained(counts, documents)}")
    return found


def summary(counts: Counter) -> dict[str, Any]:
    """The counts for the manifest."""
    return {
        "records": _of(counts, "schema"),
        "roles": _of(counts, "role"),
        "skipped": _of(counts, "skipped"),
        "loss_tokens": counts["trained", ""],
        "documents_without_loss_tokens": counts["untrained", ""],
        "documents_without_turns": counts["plain", ""],
    }


def add_summaries(summaries: Iterable[Any]) -> dict[str, Any]:
    """Sum of the summaries of several conversions."""
    total: dict[str, Any] = summary(Counter())
    for added in summaries:
        for name, value in added.items() if isinstance(added, dict) else ():
            if isinstance(value, dict):
                total[name] = dict(Counter(total.get(name, {})) + Counter(value))
            else:
                total[name] = total.get(name, 0) + value
    return total


def _untrained(counts: Counter, documents: int) -> str:
    untrained, by_role = counts["untrained", ""], _of(counts, "role")
    text = f"{untrained:,} of {documents:,} documents contain no token that contributes to the loss; nothing is learned from them"
    if by_role and roles.ASSISTANT not in by_role:
        return f"{text}: no message has the role assistant (found: {_listed(by_role)})"
    return f"{text}: they have no answer, or only answers with weight 0"


def _of(counts: Counter, kind: str) -> dict[str, int]:
    """The counts of one kind, by name, in descending order."""
    found = {key[1]: number for key, number in counts.items() if key[0] == kind and len(key) == 2 and number}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _named(counts: Counter, role: str) -> str:
    """The data's names of a role, if they differ from ours."""
    names = _by_name(counts, "name", role)
    if set(names) <= {role}:
        return ""
    return " (" + ", ".join([repr(name)[1:-1] for name in names][:4]) + (", …)" if len(names) > 4 else ")")


def _shortened(numbers: dict[str, int]) -> str:
    """The most frequent fields, with their counts."""
    shown = [f"{repr(name)[1:-1]} {number:,}" for name, number in numbers.items()]
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "")


def _by_name(counts: Counter, kind: str, group: str) -> dict[str, int]:
    """The counts of (kind, group, name) by name, in descending order."""
    names = {key[2]: number for key, number in counts.items() if key[:2] == (kind, group) and key[2]}
    return dict(sorted(names.items(), key=lambda item: (-item[1], item[0])))


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())
