"""An account of every file that data.py read: kept, or dropped for which reason."""

from collections import defaultdict


def funnel(rows):
    """What became of every file: documents and bytes by reason, language and source; text: the
    bytes of the documents that were made of them."""
    table = {"reason": {}, "language": {}, "source": {}}
    for row in rows:
        reason = row.get("reason", "kept")
        entry = table["reason"].setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += row["bytes"]
        if reason != "kept" and len(entry["examples"]) < 3:
            entry["examples"].append(row["path"])
        groups = ("language", "source") if reason == "kept" else ("source",)
        for group in groups:
            entry = table[group].setdefault(row[group], {"documents": 0, "bytes": 0, "text": 0})
            entry["documents"] += 1
            entry["bytes"] += row["bytes"]
            entry["text"] += row["text_bytes"] if reason == "kept" else 0
    return table


def print_funnel(table):
    reasons = sorted(table["reason"].items(),
                     key=lambda item: (item[0] != "kept", -item[1]["bytes"]))
    total = sum(entry["bytes"] for _, entry in reasons) or 1
    print(f"{'':28}{'files':>9}{'bytes':>14}{'share':>8}  such as")
    for reason, entry in reasons:
        print(f"{reason:28}{entry['documents']:9,}{entry['bytes']:14,}"
              f"{entry['bytes'] / total:8.1%}  {', '.join(entry['examples'])[:58]}")
    languages = sorted(table["language"].items(), key=lambda item: -item[1]["text"])
    print("kept: " + ", ".join(f"{name} {entry['text'] / 1e6:.1f} MB"
                               for name, entry in languages[:8]))


def reason_summary(rows):
    """Why files are no code to train on: counts and an example of each reason."""
    examples = defaultdict(list)
    for row in rows:
        examples[row.get("reason", f"kept as {row['kind']}")].append(row["path"])
    ordered = sorted(examples.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{reason}: {len(paths):,}, such as {paths[0]}"
                     for reason, paths in ordered) or "no files"
