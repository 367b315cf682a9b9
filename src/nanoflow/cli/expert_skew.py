"""The option `--expert-skew`, of commands that count or measure with experts that are chosen unevenly."""

from __future__ import annotations

from nanoflow.config import ConfigError

HELP = "How unevenly tokens choose experts: expert i is as popular as 1/(i+1)^SKEW; 0 is balanced, 1 is very uneven"
# Beyond this all tokens choose the same experts.
_MAX = 10.0


def check_expert_skew(skew: float) -> None:
    """Refuse what is no skew.

    Raises:
        ConfigError: It is negative, not finite, or too large.
    """
    if not 0.0 <= skew <= _MAX:
        raise ConfigError(f"expert_skew must be a number from 0 to {_MAX:g}, got {skew}")
