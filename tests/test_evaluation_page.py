"""docs/evaluation.md says what its data say."""

import json
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"


def table(rows):
    """Policies by tasks, in the order in which they come."""
    tasks = {row["task"]: f"{row['task']}, {row['metric']}, n = {row['n']}" for row in rows}
    cells = {(row["policy"], row["task"]): f"{row['value']:.3f} ± {row['stderr']:.3f}" for row in rows}
    yield f"| policy | {' | '.join(tasks.values())} |"
    yield "|---|" + "---|" * len(tasks)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        yield f"| {policy} | {' | '.join(cells.get((policy, task), '') for task in tasks)} |"


def test_the_table_is_the_datas():
    rows = json.loads((PAGE.parent / "evaluation" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert "\n".join(table(rows)) in PAGE.read_text(encoding="utf-8")
