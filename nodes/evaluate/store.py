"""The pictures of an evaluation, one line of JSON each: what is written stays, so that it can be interrupted at any time."""

import json
import os
from collections import defaultdict
from pathlib import Path

from ...hgr_models import HGRError

FORMAT, VERSION = "safecfg-evaluation", 1
RECORDS = "results.jsonl"
MOST = 3  # differences that a message names


def _flat(facts: dict) -> dict:
    """The facts with those of their groups beside them: a message names the one that differs."""
    return {
        name: value
        for key, group in facts.items()
        for name, value in (group if isinstance(group, dict) else {key: group}).items()
    }


class Store:
    """The records in `folder`. The first line holds the facts that decide what a picture looks like, and who judges it."""

    def __init__(self, folder: Path, facts: dict, resume: bool):
        self.path, self.facts = folder / RECORDS, json.loads(json.dumps(facts))
        self.records: list[dict] = []
        if not resume:
            self.path.unlink(missing_ok=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._read() if self.path.exists() else self._append({"format": FORMAT, "version": VERSION, "facts": self.facts})
        except OSError as error:
            raise HGRError(
                f"{folder} cannot be written ({error.strerror}). Free some space, or choose another `name`."
            ) from error
        self.keys = {record["key"] for record in self.records}

    def _read(self) -> None:
        """Reads what there is; a line that was cut off when the machine stopped is removed. Raises HGRError for other facts."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        try:
            head, *self.records = [json.loads(line) for line in whole.splitlines()] or [{}]
            if head.get("format") not in (FORMAT, None) or not all("key" in record for record in self.records):
                raise ValueError("no evaluation of SafeCFG")
        except (ValueError, AttributeError, TypeError) as error:
            raise HGRError(
                f"{self.path} is damaged ({error}). Choose another `name`, or switch `resume` off to begin anew."
            ) from None
        if not head:
            return self._append({"format": FORMAT, "version": VERSION, "facts": self.facts})
        if head.get("version") != VERSION:
            raise HGRError(f"{self.path} is of version {head.get('version')}, not {VERSION}. Choose another `name`.")
        self._compare(head["facts"])

    def _compare(self, there: dict) -> None:
        before, now = _flat(there), _flat(self.facts)
        different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if different:
            short = lambda value: json.dumps(value, ensure_ascii=False)[:80]  # noqa: E731
            changes = "; ".join(f"{name} = {short(before.get(name))}, not {short(now.get(name))}" for name in different[:MOST])
            raise HGRError(
                f"The pictures in {self.path.parent} were made with {changes}. Choose another `name`, or switch `resume` off to begin anew."
            )

    def add(self, record: dict) -> None:
        """Keeps a record, on the disk before this returns."""
        self._append(record)
        self.records.append(record)
        self.keys.add(record["key"])

    def _append(self, entry: dict) -> None:
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise HGRError(
                f"{self.path} cannot be written ({error.strerror}). Free some space; what is there is kept."
            ) from error

    def found(self, keys: set[str]) -> dict[tuple[str, int, str], list[dict]]:
        """The records of these keys, by (list, row, arm), pictures in order."""
        found = defaultdict(list)
        for record in sorted((r for r in self.records if r["key"] in keys), key=lambda r: r["k"]):
            found[record["list"], record["row"], record["arm"]].append(record)
        return dict(found)
