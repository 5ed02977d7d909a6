"""What the environment says to JAX: which of it holds for commands, and what it has to do with an error."""

import os

import jax

from astra_jax.errors import first_line

# What everything here is made for. A library's user may decide otherwise; a command cannot compute what it should then.
FIXED = {
    "jax_enable_x64": False,  # codes are int32, and weights have the number format that was asked for
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_jit": False,  # takes minutes for seconds, and programs cannot be compiled ahead of time
}
# Variables that switch on checks which right programs need not pass (masks are of -inf, say), or something off.
CHECKS = (
    *("JAX_DEBUG_NANS", "JAX_DEBUG_INFS", "JAX_CHECK_TRACER_LEAKS", "JAX_ENABLE_CHECKS"),
    *("JAX_TRANSFER_GUARD", "JAX_DEBUG_KEY_REUSE", "JAX_LEGACY_PRNG_KEY", "JAX_NO_TRACING", "JAX_NO_EXECUTION"),
)


def fix() -> list[str]:
    """Gives JAX the settings that all is made for. Returns the names of the variables that said something else."""
    changed = [name for name, value in FIXED.items() if getattr(jax.config, name) != value]
    for name in changed:
        jax.config.update(name, FIXED[name])
    return [name.upper() for name in changed]


def _unstartable() -> str | None:
    """Why JAX has no device; None where it has one."""
    try:
        jax.devices()
    except Exception as error:  # of several types, by what is missing
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = f"JAX finds no device ({first_line(error)})"
        return (
            f"JAX_PLATFORMS is {asked!r}, and {why}: unset it or set it to cpu"
            if asked
            else f"{why}: try JAX_PLATFORMS=cpu"
        )
    return None


def explain(error: BaseException) -> str | None:
    """What of the machine or of the environment is behind an error, and what to do; None where it is a mistake here."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"there is not enough memory ({first_line(error)}): take a smaller batch, a shorter text, fewer tokens "
            "or --dtype bfloat16, or share the work with more devices"
        )
    if why := _unstartable():
        return why
    if checks := [name for name in CHECKS if os.environ.get(name, "0").lower() not in ("", "0", "false")]:
        return f"{first_line(error)}: {' and '.join(checks)} may be why: unset it"
    return None
