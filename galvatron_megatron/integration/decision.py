"""What rank 0 decides for a job, and the store that keeps it for the next job of the same kind."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from galvatron_megatron.describe.profile import digest
from galvatron_megatron.describe.profile_store import write_atomically
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.serialization import plan_from_dict, plan_to_dict

_FORMAT = 1


@dataclass(kw_only=True, frozen=True, slots=True)
class Decision:
    """A plan and what is predicted for it."""

    plan: Plan
    step_seconds: float | None = None
    """Predicted; None where the plan came from a file."""
    memory_bytes: tuple[int, ...] = ()
    """Predicted peak per pipeline rank."""
    profile_seconds: float = 0.0
    search_seconds: float = 0.0
    runners_up: tuple[tuple[str, float], ...] = ()
    """Next-best plans in words, with their predicted step seconds."""
    source: str = ""
    """Where the plan comes from, in words."""
    notes: tuple[str, ...] = field(default=())
    """Lines to show beside the plan."""

    def to_dict(self) -> dict[str, object]:
        """As mappings, lists, strings and numbers."""
        return {
            "plan": plan_to_dict(self.plan),
            "step_seconds": self.step_seconds,
            "memory_bytes": list(self.memory_bytes),
            "profile_seconds": self.profile_seconds,
            "search_seconds": self.search_seconds,
            "runners_up": [list(entry) for entry in self.runners_up],
            "source": self.source,
            "notes": list(self.notes),
        }

    @staticmethod
    def from_dict(document: Mapping[str, object], where: str = "plan") -> "Decision":
        """The decision that ``to_dict`` took apart.

        Raises:
            GalvatronError: the document is something else.
        """
        try:
            plan = plan_from_dict(document["plan"], where)
            seconds = document["step_seconds"]
            return Decision(
                plan=plan,
                step_seconds=None if seconds is None else float(seconds),
                memory_bytes=tuple(map(int, document["memory_bytes"])),
                profile_seconds=float(document["profile_seconds"]),
                search_seconds=float(document["search_seconds"]),
                runners_up=tuple((str(name), float(seconds)) for name, seconds in document["runners_up"]),
                source=str(document["source"]),
                notes=tuple(map(str, document["notes"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise GalvatronError(f"{where}: not a kept plan ({error!r})") from None


class DecisionStore:
    """Plans that were found before, one file per kind of job, beside the profiles they come from.

    Args:
        directory: existing; writable where plans are to be kept.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, job: Mapping[str, object]) -> Path:
        """The file for a kind of job, given everything that decides its plan."""
        return self.directory / f"plan-{digest(dict(job))}.json"

    def read(self, job: Mapping[str, object]) -> tuple[Decision | None, str]:
        """Looks for a plan.

        A damaged file is set aside under another name, so that nothing is lost and the job is planned again.

        Returns:
            The decision or None, and a line to show about a damaged file or "".
        """
        path = self.path(job)
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None, ""
        except OSError as error:
            raise GalvatronError(
                f"kept plan {path}: cannot be read ({error.strerror}); valid: a readable file"
            ) from None
        try:
            document = json.loads(text)
            if not isinstance(document, dict) or document.get("format") != _FORMAT:
                raise GalvatronError("unknown format")
            return Decision.from_dict(document["decision"], str(path)), ""
        except (GalvatronError, ValueError, KeyError) as error:
            aside = path.with_suffix(".damaged")
            fate = f"set aside as {aside.name}"
            try:
                with suppress(FileNotFoundError):  # another job that met it did so first
                    path.replace(aside)
            except OSError as cause:
                fate = f"cannot be set aside ({cause.strerror})"
            return None, f"kept plan {path}: damaged ({error}); {fate}, planning again"

    def write(self, job: Mapping[str, object], decision: Decision) -> None:
        """Keeps a plan, replacing an older one for the same kind of job.

        Raises:
            GalvatronError: the file cannot be written; the old one is untouched.
        """
        document = {"format": _FORMAT, "job": dict(job), "decision": decision.to_dict()}
        write_atomically(self.path(job), json.dumps(document, indent=1) + "\n")
