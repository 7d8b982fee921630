"""Attributes of other modules that are replaced for a while, and put back."""

from typing import Any

_ABSENT = object()


class Patches:
    """Replaces attributes and remembers what was there, so that everything can be undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, Any]] = []

    def set(self, owner: object, name: str, value: Any) -> Any:
        """Sets ``owner.name`` to ``value`` until ``undo``.

        Args:
            owner: module, class or object.
            name: attribute.
            value: new value.

        Returns:
            The value before, or None where the attribute did not exist.
        """
        before = vars(owner).get(name, _ABSENT)
        self._undo.append((owner, name, before))
        setattr(owner, name, value)
        return None if before is _ABSENT else before

    def undo(self) -> None:
        """Puts everything back; a second call does nothing."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
