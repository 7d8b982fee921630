from types import SimpleNamespace

from galvatron_megatron.integration.patches import Patches


class Owner:
    value = 1

    def __new__(cls):
        return super().__new__(cls)


class Heir(Owner):
    pass


def test_undo_restores_everything_in_reverse():
    namespace, before = SimpleNamespace(a=1), dict(vars(Owner))
    patches = Patches()
    assert patches.set(namespace, "a", 2) == 1
    assert patches.set(namespace, "a", 3) == 2
    assert patches.set(namespace, "b", 4) is None
    patches.set(Owner, "__new__", staticmethod(lambda cls: "made"))
    patches.set(Heir, "value", 5)
    assert (namespace.a, namespace.b, Owner(), Heir.value) == (3, 4, "made", 5)
    patches.undo()
    patches.undo()
    assert vars(namespace) == {"a": 1}
    assert dict(vars(Owner)) == before
    # What was inherited is inherited again, not copied.
    assert "value" not in vars(Heir) and Heir.value == 1
