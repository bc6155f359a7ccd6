"""Each repair of the engine says what it is for, and is still needed."""

from helpers.ranks import run_ranks, undo_ready


def _still_needed(rank: int) -> dict[str, bool]:
    """Ask each repair about the untouched engine."""
    from megatron_mixtral.runtime import environment
    from megatron_mixtral.runtime.engine_fixes import FIXES, TRAINING_FIXES

    undo_ready()
    try:
        return {fix.name: fix.needed() for fix in (*FIXES, *TRAINING_FIXES)}
    finally:
        environment.ready(training=True)


def test_each_engine_repair_is_still_needed() -> None:
    [needed] = run_ranks(1, _still_needed)
    obsolete = [name for name, still in needed.items() if not still]
    assert not obsolete, f"the engine no longer needs {obsolete}: delete them from runtime/engine_fixes"


def test_each_repair_says_what_and_until_when() -> None:
    from megatron_mixtral.runtime.engine_fixes import FIXES, TRAINING_FIXES

    for fix in (*FIXES, *TRAINING_FIXES):
        assert all((fix.symptom, fix.cause, fix.versions, fix.remove_when))
