"""What of the difference between two result files is more than noise: ``python -m bench.compare OLD NEW``.

A time is compared by its ratio to the baseline that was timed in turn with it, so that a machine that was slower on the
day is no finding. Faster or slower is a row whose two ranges of that ratio (its 20th to 80th percentile over the
rounds) have nothing in common and whose ratio changed by more than 3 %. Instruction counts carry no noise: 1 % is a
finding. Exit status 1 if anything is slower, executes more, or was right and is wrong now.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .tables import table

LEAST, LEAST_INSTRUCTIONS = 0.03, 0.01
KEY = ("bench", "case", "threads", "ours", "baseline")
BAD = ("slower", "more", "wrong")


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """ "faster", "slower" or "same" for two rows of one key; "unclear" where the ranges were not recorded."""
    ranges = [(row.get("ratio_p20"), row.get("ratio_p80")) for row in (old, new)]
    if None in (*ranges[0], *ranges[1]):
        return "unclear"
    change = new["ratio"] / old["ratio"] - 1
    if abs(change) <= LEAST:
        return "same"
    (old_low, old_high), (new_low, new_high) = ranges
    return "slower" if new_high < old_low else "faster" if new_low > old_high else "same"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per figure that either file holds: what, old, new, change, verdict; "gone" and "new" where one lacks it."""
    rows = []
    pairs = [{tuple(row[k] for k in KEY): row for row in record.get("rows", [])} for record in (old, new)]
    for key in dict.fromkeys([*pairs[0], *pairs[1]]):
        before, after = (rows_of.get(key) for rows_of in pairs)
        found = {"what": "{} {} t{}, {} over {}".format(*key)}
        if before and after:
            found |= {"old": before["ratio"], "new": after["ratio"], "change": after["ratio"] / before["ratio"] - 1}
            found["verdict"] = verdict(before, after)
        else:
            found["verdict"] = "gone" if before else "new"
        rows.append(found)
    counts = [record.get("instructions", {}) for record in (old, new)]
    for case in dict.fromkeys([*counts[0], *counts[1]]):
        before, after = (found.get(case) for found in counts)
        found = {"what": f"instructions of {case}", "old": before, "new": after}
        if before and after:
            change = after / before - 1
            small = abs(change) <= LEAST_INSTRUCTIONS
            found |= {"change": change, "verdict": "same" if small else "more" if change > 0 else "fewer"}
        else:
            found["verdict"] = "gone" if before else "new"
        rows.append(found)
    for name in new.get("wrong", {}):
        rows.append({"what": name, "verdict": "wrong"})
    return rows


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else changed: the machine, versions."""
    before, after = (record.get("environment", {}) for record in (old, new))
    names = [name for name in dict.fromkeys([*before, *after]) if name not in ("commit", "date")]
    return [f"{n}: {before.get(n)} → {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="list what did not change, too")
    args = parser.parse_args(argv)
    old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
    rows = compare(old, new)
    for line in differences(old, new):
        print(f"not the same: {line}")
    shown = rows if args.all else [row for row in rows if row["verdict"] != "same"]
    if shown:
        columns = {"what": "what", "old": "old", "new": "new", "change": "change", "verdict": "verdict"}
        print(table([{**r, "change": f"{r['change']:+.1%}" if "change" in r else None} for r in shown], columns))
    counts = {name: sum(row["verdict"] == name for row in rows) for name in dict.fromkeys(r["verdict"] for r in rows)}
    print(", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing to compare")
    return int(any(row["verdict"] in BAD for row in rows))


if __name__ == "__main__":
    sys.exit(main())
