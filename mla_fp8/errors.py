"""The errors of Python helpers: `<function>: <argument> must <rule>, got <value>`. Those of the ops: csrc/bindings/."""


def require(ok: bool, where: str, argument: str, rule: str, got: object) -> None:
    """Raise the one kind of error that Python helpers of this package raise."""
    if not ok:
        raise ValueError(f"{where}: {argument} must {rule}, got {got}")


def require_int(where: str, argument: str, value: object, minimum: int) -> None:
    """`value` is a whole number of at least `minimum`; True and False are no numbers here."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(ok, where, argument, f"be an integer >= {minimum}", repr(value))
