"""The scheduler: which tokens are computed in the next iteration, and which requests may run at all.

`scheduler.py` is the loop's partner (schedule, commit), `forming.py` what an iteration computes, `pace.py` how many
tokens it may have, `rows.py` the state of running requests, `admission.py` the prediction that lets waiting ones in,
`waiting.py` their queue, `limits.py` what can be served at all.
"""

from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.results import Committed, SchedulerEvents
from nanoflow.scheduler.scheduler import Scheduler

__all__ = ["Committed", "Pace", "Scheduler", "SchedulerEvents", "SchedulerLimits"]
